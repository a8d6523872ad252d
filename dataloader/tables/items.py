"""Convert raw item records of any format to plain text: the tables `metadata` and `described`."""

import html
import logging
from pathlib import Path
from string import Formatter

from dataloader.options import ProcessOptions
from dataloader.readers.bad_rows import bad_id, drop_bad_rows, id_fault
from dataloader.readers.lines import MAX_FIELD
from dataloader.readers.raw import RawTable, load, repair
from dataloader.sources import refuse_other_source
from dataloader.workspace import Workspace, text

log = logging.getLogger(__name__)

MAX_TEXT = 10_000  # characters; far more than any text model reads
# Separators between the members of a list.
SEPARATORS = {"title": " ", "description": " ", "brand": " ", "price": " ", "categories": ", ", "features": " ",
              "year": " ", "genres": ", "}
TAG = r"<(?:[/!?]?[A-Za-z]|!--)[^<>]{0,500}>"    # does not match "width < 5, height > 3"
BLANK = r"\s\x0b\x1c-\x1f\x{85}\p{Z}"
# White space other than a single space. A pattern for all white space would replace every space of a text.
ODD_BLANK = (r"[\t-\r\x1c-\x1f\x{85}\x{a0}\x{1680}\x{2000}-\x{200a}\x{2028}\x{2029}\x{202f}\x{205f}\x{3000}]"
             f"[{BLANK}]*")
UNEVEN = f" [{BLANK}]+|{ODD_BLANK}"
PRICE = r"^\$?\d[\d,.]*(?: ?- ?\$?\d[\d,.]*)?$"  # some price fields contain fragments of HTML pages
# A URL; a list of URLs; or a list of records, each with the sizes of one image. The first image is the main one.
IMAGE_URL = """nullif(CASE json_type(image) WHEN 'VARCHAR' THEN image ->> '$'
    WHEN 'ARRAY' THEN CASE json_type(image, '$[0]') WHEN 'VARCHAR' THEN image ->> '$[0]'
        WHEN 'OBJECT' THEN coalesce(image ->> '$[0].large', image ->> '$[0].hi_res', image ->> '$[0].thumb')
        END END, '')"""
BITS_FOR_ONE = 16  # minimum number of bits per wanted id in the bitmap
NESTED = "[[["     # the beginning of a JSON value that is nested too deeply for a text


def read_items(work: Workspace, table: RawTable, options: ProcessOptions, wanted: str, bad_lines: Path) -> int:
    """Create `metadata (raw_id, wanted, <fields>, image_url, nested)`, one row per record, in file order.

    The fields are the title and those of the template, as plain text. They are filled only for the raw ids selected by
    `wanted` (SQL, one column). Returns the number of skipped lines. Raises DataError with file and line of an invalid
    item.
    """
    work.connection.create_function("unescape", html.unescape, ["VARCHAR"], "VARCHAR")
    # A bitmap with one bit per hash. A join would be exact, but lose the row order, which decides between several
    # records of one item.
    num_bits = 1 << min(30, max(10, (BITS_FOR_ONE * work.value(f"SELECT count(*) FROM ({wanted})")).bit_length()))
    work.run(f"""SET VARIABLE wanted = (SELECT bitstring_agg((hash(raw_id) % {num_bits})::INTEGER, 0, {num_bits - 1})
                                        FROM ({wanted}) ids(raw_id))""")
    is_wanted = f"coalesce(get_bit(getvariable('wanted'), (hash(item) % {num_bits})::INTEGER) = 1, false)"
    in_template = "".join(options.processing.template)
    fields = [f for f in SEPARATORS if table.columns.get(f) and (f == "title" or f"{{{f}}}" in in_template)]
    texts = "".join(f"CASE WHEN wanted THEN {_clean(field)} ELSE '' END AS {field}, " for field in fields)
    deep = [f"coalesce(starts_with({field}::VARCHAR, '{NESTED}'), false)" for field in fields]
    query = f"""
        SELECT raw_id, wanted, {texts} CASE WHEN wanted THEN {IMAGE_URL} END AS image_url,
               wanted AND ({' OR '.join(['false', *deep])}) AS nested
        FROM (SELECT *, item AS raw_id, {is_wanted} AS wanted FROM {{rows}})"""
    types = {"item": "VARCHAR", **dict.fromkeys([*fields, "image"], "JSON")}
    for field in (*fields, "image"):  # another source may share the column of ids but not these
        if options.source != "local" and table.columns.get(field):
            refuse_other_source(work, table, "items", options.source, [field], optional=True)
    load(work, table, "metadata", query, types)
    if work.count("metadata") and not work.value("SELECT count(raw_id) FROM metadata"):
        refuse_other_source(work, table, "items", options.source, ["item"])
    repair(work, table, "metadata", query, types, "raw_id IS NULL")
    return drop_bad_rows(work, table, "metadata", f"{bad_id('raw_id')} OR nested", lambda values: (id_fault(
        table, values, "item") or "has a text in lists nested three levels deep or more", ""),
        options.processing.bad_lines, bad_lines)


def _clean(field: str) -> str:
    """Return SQL for the plain text of a field: HTML entities decoded, no tags, single spaces.

    The text is empty if the field is missing. The members of a list, or of a list of lists, are joined. Each step
    contains the expression of the step before only once, because DuckDB would compute a second one again. Entities are
    decoded first, because they may encode a tag. Only records with an entity and very long ones call Python, which is
    slow.
    """
    raw = f"{field}::VARCHAR"
    members = f"""CASE WHEN starts_with({raw}, '[[') THEN json_extract_string({field}, '$[*][*]')
                       ELSE json_extract_string({field}, '$[*]') END"""
    plain = f"""CASE left({raw}, 1)
                     WHEN '[' THEN array_to_string(list_filter({members}, lambda m: m <> ''), '{SEPARATORS[field]}')
                     WHEN '{{' THEN NULL ELSE {field} ->> '$' END"""
    has_entity = f"contains({raw}, '&') OR contains({raw}, '\\u0026')"
    text = f"""CASE WHEN strlen({raw}) > {MAX_FIELD} THEN unescape(left({plain}, {MAX_FIELD}))
                    WHEN {has_entity} THEN unescape({plain}) ELSE {plain} END"""
    for pattern, by in ((TAG, " "), (UNEVEN, " "), ("^ | $", "")):
        text = f"regexp_replace({text}, '{pattern}', '{by}', 'g')"
    if field == "price":
        text = f"regexp_extract({text}, '{PRICE}')"
    return f"coalesce({text}, '')"


def describe(work: Workspace, template: tuple[str, ...]) -> None:
    """Create `described (raw_id, title, text, image_url, cut)` from the first record of each item that has a text.

    Long texts are cut between words; `cut` is true for these items.
    """
    available = {row[0] for row in work.run("DESCRIBE metadata")} & set(SEPARATORS)
    pieces, missing = [], set()
    for piece in template:
        parts = [part[:2] for part in Formatter().parse(piece)]
        absent = {field for _words, field in parts if field is not None} - available
        missing |= absent
        if not absent:  # SQL for the piece with its fields filled in, NULL if one of them is empty
            pieces.append(" || ".join(sql for words, field in parts for sql in (
                words and text(words), field and f"nullif({field}, '')") if sql))
    if missing and work.count("metadata"):
        log.info("process: fields of the template that are missing in the item records: %s", ", ".join(sorted(missing)))
    whole = f"concat_ws('. ', {', '.join(pieces)})" if pieces else "''"
    title = "title" if "title" in available else "''"
    work.run(f"""CREATE TABLE whole AS
        SELECT raw_id, {title} AS title, {whole} AS "text", image_url FROM metadata WHERE wanted""")
    work.run(f"""CREATE TABLE described AS
        SELECT w.raw_id, {_shorten('w.title')} AS title, {_shorten('w."text"')} AS "text", w.image_url,
               length(w."text") > {MAX_TEXT} AS cut
        FROM whole w
        WHERE w.rowid IN (SELECT coalesce(min(rowid) FILTER ("text" <> ''), min(rowid)) FROM whole GROUP BY raw_id)""")
    work.run("DROP TABLE whole")


def _shorten(value: str) -> str:
    """Return SQL that cuts a text to at most MAX_TEXT characters, between words if there are several."""
    head = f"substr({value}, 1, {MAX_TEXT + 1})"
    return f"""CASE WHEN length({value}) <= {MAX_TEXT} THEN {value}
                    ELSE coalesce(nullif(regexp_extract({head}, '(?s)^(.*) ', 1), ''), substr({value}, 1, {MAX_TEXT}))
               END"""
