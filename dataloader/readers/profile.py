"""Profile the columns of a raw file: types, shares of missing values and examples, for the report of --check."""

from typing import NamedTuple

from dataloader.readers.lines import PARSERS
from dataloader.readers.raw import RawTable, load, type_of
from dataloader.workspace import Workspace

NUM_FIRST = 1000  # rows in which the examples are searched first; later examples depend on the number of threads
WIDTH = 30        # maximum number of characters of an example or a type
# The type of a column is the set of the types of its values, as bits.
INTEGER, NUMBER, DATE, TEXT, LIST, OBJECT, BOOLEAN = (1 << place for place in range(7))
TYPES = {INTEGER: "integer", NUMBER: "number", DATE: "date", TEXT: "text", LIST: "list", OBJECT: "object",
         BOOLEAN: "true/false"}
# SQL for the type of a value. {text} is the value as text, {value} is the value as JSON.
TEXT_TYPE = f"""CASE WHEN try_cast({{text}} AS DOUBLE) IS NOT NULL
                     THEN CASE WHEN contains({{text}}, '.') OR try_cast({{text}} AS HUGEINT) IS NULL THEN {NUMBER}
                               ELSE {INTEGER} END
                     WHEN try_cast({{text}} AS TIMESTAMP) IS NOT NULL THEN {DATE} ELSE {TEXT} END"""
JSON_TYPE = f"""CASE json_type({{value}}) WHEN 'VARCHAR' THEN {TEXT_TYPE} WHEN 'ARRAY' THEN {LIST}
                     WHEN 'OBJECT' THEN {OBJECT} WHEN 'BOOLEAN' THEN {BOOLEAN} WHEN 'DOUBLE' THEN {NUMBER}
                     ELSE {INTEGER} END"""


class Column(NamedTuple):
    """The content of a column of a raw file."""

    name: str
    type: str            # such as "integer" or "date or text"; "" if all values are missing
    num_missing: int
    example: str         # the first value, quoted if it is text; "" if all values are missing


def profile(work: Workspace, table: RawTable, columns: list[str]) -> tuple[int, list[Column]]:
    """Return the number of rows of a file, and the content of some of its columns.

    An empty text, an empty list and an empty object count as missing, and so does a row that cannot be read.
    """
    # DuckDB does not distinguish names that differ only in case, so give the columns names of our own.
    fields = {f"f{place}": column for place, column in enumerate(columns)}
    table = table._replace(columns={field: [column] for field, column in fields.items()})
    is_json = table.format in PARSERS
    totals, firsts = ["count(*) AS num_rows"], []
    for field in fields:
        text = f"({field} ->> '$')" if is_json else field
        present = f"coalesce({text}, '') NOT IN ('', '[]', '{{}}')"
        kind = (JSON_TYPE if is_json else TEXT_TYPE).format(text=text, value=field)
        example = f"left({field}::VARCHAR, {WIDTH + 1})"
        totals.append(f"""count(*) FILTER (NOT {present}), bit_or(CASE WHEN {present} THEN {kind} ELSE 0 END),
                          any_value({example}) FILTER ({present})""")
        firsts.append(f"first({example}) FILTER ({present})")
    names = [f"{field}_{part}" for field in fields for part in ("missing", "types", "any")]
    first_names = [f"{field}_first" for field in fields]
    load(work, table, "profile", f"""
        SELECT * FROM (SELECT {', '.join(totals)} FROM {{rows}}) totals(num_rows, {', '.join(names)}),
                      (SELECT {', '.join(firsts)} FROM (FROM {{rows}} LIMIT {NUM_FIRST}))
                      firsts({', '.join(first_names)})""", dict.fromkeys(fields, "JSON" if is_json else "VARCHAR"))
    [(num_rows, *values)] = work.run("SELECT * FROM profile")
    work.run("DROP TABLE profile")
    found = []
    for place, (field, column) in enumerate(fields.items()):
        missing, types, anywhere = values[3 * place:3 * place + 3]
        example, stored = values[3 * len(fields) + place] or anywhere or "", type_of(work, table, field)
        is_text = not is_json and stored == "VARCHAR"
        found.append(Column(column, _type_text(types) if stored == "VARCHAR" else plain(stored), missing,
                            shown(example) if is_text and example else plain(example)))
    return num_rows, found


def shown(value: str) -> str:
    """Return a text in quotes, such as `' T001'`, so that blanks and special characters are visible."""
    return repr(value[:WIDTH]) + ("…" if len(value) > WIDTH else "")


def plain(value: str) -> str:
    """Return a text without quotes. Special characters are shown as escapes."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in value[:WIDTH]) + ("…" if len(value) > WIDTH else "")


def _type_text(types: int | None) -> str:
    # A column of texts may have some texts that are numbers or dates.
    absorbed = {TEXT: INTEGER | NUMBER | DATE, NUMBER: INTEGER}
    for kind, others in absorbed.items():
        if types and types & kind:
            types &= ~others
    return " or ".join(text for kind, text in TYPES.items() if types and types & kind)
