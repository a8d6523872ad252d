"""Convert raw item records to plain text, and store the text in the tables `metadata` and `described`."""

import logging
from pathlib import Path
from string import Formatter

from common.tables import text
from dataloader.options import ProcessOptions
from dataloader.readers.bad_rows import Fault, bad_id, drop_bad_rows, id_fault
from dataloader.readers.raw import ID, RawTable, inexact_id, largest_id, load, repair
from dataloader.sources import refuse_other_source
from dataloader.tables import cells
from dataloader.tables.cells import SEPARATORS
from dataloader.tables.joins import check_join
from dataloader.tables.records import check_records
from dataloader.workspace import Workspace

log = logging.getLogger(__name__)

MAX_TEXT = 10_000  # characters of a title or text; far more than any text model reads
BITS_FOR_ONE = 16  # minimum number of bits per wanted id in the bitmap


def describe_items(work: Workspace, options: ProcessOptions, tables: list[RawTable], wanted: str,
                   bad_lines: Path) -> dict:
    """Make the table `described` with the titles and texts of the items, and return counts for the meta files.

    tables: the interactions file and, if there is one, the items file
    wanted: an SQL query for the raw ids of the items to describe
    """
    if len(tables) == 1:
        work.run("CREATE TABLE metadata (raw_id VARCHAR, wanted BOOLEAN, title VARCHAR, image_url VARCHAR)")
    counts = read_records(work, options, tables, wanted, bad_lines) | check_records(work, options, wanted)
    describe(work, options.processing.template)
    return counts


def read_records(work: Workspace, options: ProcessOptions, tables: list[RawTable], wanted: str,
                 bad_lines: Path) -> dict:
    """Make the table `metadata` from the item records, and return counts for the meta files.

    Raises DataError if almost no item of the interactions has a record.
    """
    num_bad = read_items(work, tables[1], options, wanted, bad_lines) if len(tables) > 1 else 0
    return {"num_bad_lines": num_bad, **check_join(work, tables, options)}


def read_items(work: Workspace, table: RawTable, options: ProcessOptions, wanted: str, bad_lines: Path) -> int:
    """Load the item records into the table `metadata`, in file order.

    Its columns are `raw_id, wanted, <fields>, image_url, nested`, and `<field>_note` for each field and the image.

    wanted: an SQL query for the raw ids of the needed items

    The fields are the title and the fields of the template, as plain text. The column `wanted` is true for the records
    of needed items, and by chance for a few others. The texts of all other records are empty. The column `nested` is
    true if the value of a text field is a list that is nested too deeply. A note explains why a value that is not
    empty gives no text: it is the text that means a missing value, or cells.NO_TEXT for an object. Other values have
    the note NULL.

    Returns the number of invalid lines that were skipped. Raises DataError if --bad_lines does not allow skipping them;
    the error names the first invalid line.
    """
    cells.register(work)
    # The wanted ids are stored as a bitmap with one bit per hash. A join with the ids would be exact, but it would lose
    # the row order. The row order decides which of several records of an item is used.
    num_bits = 1 << min(30, max(10, (BITS_FOR_ONE * work.value(f"SELECT count(*) FROM ({wanted})")).bit_length()))
    work.run(f"""SET VARIABLE wanted = (SELECT bitstring_agg((hash(raw_id) % {num_bits})::INTEGER, 0, {num_bits - 1})
                                        FROM ({wanted}) ids(raw_id))""")
    is_wanted = f"coalesce(get_bit(getvariable('wanted'), (hash(item) % {num_bits})::INTEGER) = 1, false)"
    in_template = "".join(options.processing.template)
    fields = [f for f in SEPARATORS if table.columns.get(f) and (f == "title" or f"{{{f}}}" in in_template)]
    query = _query(fields, options.processing.missing_values, is_wanted)
    types = {"item": ID, **dict.fromkeys([*fields, "image"], "JSON")}
    for field in (*fields, "image"):  # a file of another source may have the same id column, but not these columns
        if options.source != "local" and table.columns.get(field):
            refuse_other_source(work, table, "items", options.source, [field], optional=True)
    load(work, table, "metadata", query, types)
    [(num_records, num_ids, num_inexact)] = work.run(
        f"SELECT count(*), count(raw_id), count(*) FILTER ({inexact_id(table, 'raw_id')}) FROM metadata")
    if num_records and not num_ids:
        refuse_other_source(work, table, "items", options.source, ["item"])
    repair(work, table, "metadata", query, types, "raw_id IS NULL", num_inexact)
    largest, deep = largest_id(work, table, "item"), "has a text in lists that are nested three or more levels deep"

    def explain(values: dict) -> Fault:
        fault = id_fault(table, values, "item", largest, "--item_id_column" if options.source == "local" else "")
        return fault if fault.reason else Fault(deep)

    kinds = {"have no valid item": bad_id("raw_id", table), "have a text in nested lists": "nested"}
    return drop_bad_rows(work, table, "metadata", kinds, explain, options.processing.bad_lines, bad_lines)


def _query(fields: list[str], missing: tuple[str, ...] | None, is_wanted: str) -> str:
    """Return the query that makes the table `metadata` from the rows of the file."""
    # Each subquery adds columns that the next one uses more than once.
    notes = "".join(f"{cells.note(field, missing)} AS {field}_note, " for field in (*fields, "image"))
    values = ", ".join(f"{cells.value(field)} AS {field}" for field in (*fields, "image"))
    plain = "".join(f"CASE WHEN wanted THEN {cells.plain(field)} END AS {field}_plain, " for field in fields)
    plain += f"CASE WHEN wanted THEN {cells.IMAGE_URL} END AS image_url, "
    texts = "".join(f"CASE WHEN wanted THEN {cells.clean(field)} ELSE '' END AS {field}, " for field in fields)
    texts += "".join(f"{cells.note_of_object(field, found)} AS {field}_note, " for field, found in (
        *((field, f"{field}_plain") for field in fields), ("image", "image_url")))
    return f"""
        SELECT raw_id, wanted, {texts} image_url,
               wanted AND ({' OR '.join(['false', *map(cells.nested, fields)])}) AS nested
        FROM (SELECT {plain} * FROM (SELECT * REPLACE ({values}) FROM (
            SELECT {notes} * FROM (SELECT *, item AS raw_id, {is_wanted} AS wanted FROM {{rows}}))))"""


def describe(work: Workspace, template: tuple[str, ...]) -> None:
    """Fill in the template for each item, and create the table `described (raw_id, title, text, image_url, cut)`.

    If an item has several records, its first record with a text is used. Titles and texts longer than MAX_TEXT are cut
    between words. `cut` is true if the text was cut.
    """
    available = {row[0] for row in work.run("DESCRIBE metadata")} & set(SEPARATORS)
    pieces, missing = [], set()
    for piece in template:
        parts = [part[:2] for part in Formatter().parse(piece)]
        absent = {field for _words, field in parts if field is not None} - available
        missing |= absent
        if not absent:  # SQL for the piece with its fields filled in; the piece is NULL if one of the fields is empty
            pieces.append(" || ".join(sql for words, field in parts for sql in (
                words and text(words), field and f"nullif({field}, '')") if sql))
    if missing and work.count("metadata"):
        log.info("process: the item records do not have these fields of the template: %s", ", ".join(sorted(missing)))
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
    """Return SQL that cuts a text to at most MAX_TEXT characters, if possible between two words."""
    head = f"substr({value}, 1, {MAX_TEXT + 1})"
    return f"""CASE WHEN length({value}) <= {MAX_TEXT} THEN {value}
                    ELSE coalesce(nullif(regexp_extract({head}, '(?s)^(.*) ', 1), ''), substr({value}, 1, {MAX_TEXT}))
               END"""
