"""Convert raw item records to plain text, and store the text in the tables `metadata` and `described`."""

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

MAX_TEXT = 10_000  # characters of a title or text; far more than any text model reads
# The text fields. If the value of a field is a list, its members are joined with this separator.
SEPARATORS = {"title": " ", "description": " ", "brand": " ", "price": " ", "categories": ", ", "features": " ",
              "year": " ", "genres": ", "}
TAG = r"<(?:[/!?]?[A-Za-z]|!--)[^<>]{0,500}>"    # an HTML tag; does not match "width < 5, height > 3"
BLANK = r"\s\x0b\x1c-\x1f\x{85}\p{Z}"
# UNEVEN matches all white space except a single space, because replacing a space by a space would only take time.
ODD_BLANK = (r"[\t-\r\x1c-\x1f\x{85}\x{a0}\x{1680}\x{2000}-\x{200a}\x{2028}\x{2029}\x{202f}\x{205f}\x{3000}]"
             f"[{BLANK}]*")
UNEVEN = f" [{BLANK}]+|{ODD_BLANK}"
# A price or a range of prices; some price fields contain fragments of HTML pages instead.
PRICE = r"^\$?\d[\d,.]*(?: ?- ?\$?\d[\d,.]*)?$"
# SQL for the URL of the main image of an item. The field `image` can be a URL, a list of URLs, or a list of records
# that each contain the URLs of one image in several sizes. The first image of a list is the main one.
IMAGE_URL = """nullif(CASE json_type(image) WHEN 'VARCHAR' THEN image ->> '$'
    WHEN 'ARRAY' THEN CASE json_type(image, '$[0]') WHEN 'VARCHAR' THEN image ->> '$[0]'
        WHEN 'OBJECT' THEN coalesce(image ->> '$[0].large', image ->> '$[0].hi_res', image ->> '$[0].thumb')
        END END, '')"""
BITS_FOR_ONE = 16  # minimum number of bits per wanted id in the bitmap
NESTED = "[[["     # the beginning of a JSON value that is nested too deeply for a text


def read_items(work: Workspace, table: RawTable, options: ProcessOptions, wanted: str, bad_lines: Path) -> int:
    """Load the item records into the table `metadata (raw_id, wanted, <fields>, image_url, nested)`, in file order.

    wanted: an SQL query for the raw ids of the needed items

    The fields are the title and the fields of the template, as plain text. The column `wanted` is true for the records
    of needed items, and by chance for a few others. The texts of all other records are empty. The column `nested` is
    true if the value of a text field is a list that is nested too deeply.

    Returns the number of invalid lines that were skipped. Raises DataError if --bad_lines does not allow skipping them;
    the error names the first invalid line.
    """
    work.connection.create_function("unescape", html.unescape, ["VARCHAR"], "VARCHAR")
    # The wanted ids are stored as a bitmap with one bit per hash. A join with the ids would be exact, but it would lose
    # the row order. The row order decides which of several records of an item is used.
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
    for field in (*fields, "image"):  # a file of another source may have the same id column, but not these columns
        if options.source != "local" and table.columns.get(field):
            refuse_other_source(work, table, "items", options.source, [field], optional=True)
    load(work, table, "metadata", query, types)
    if work.count("metadata") and not work.value("SELECT count(raw_id) FROM metadata"):
        refuse_other_source(work, table, "items", options.source, ["item"])
    repair(work, table, "metadata", query, types, "raw_id IS NULL")
    return drop_bad_rows(work, table, "metadata", f"{bad_id('raw_id', table)} OR nested", lambda values: (id_fault(
        table, values, "item") or "has a text in lists that are nested three or more levels deep", ""),
        options.processing.bad_lines, bad_lines)


def _clean(field: str) -> str:
    """Return SQL that converts a field to plain text, without HTML entities, tags and repeated spaces.

    If the field is missing, the text is empty. The members of a list, or of a list of lists, are joined.
    """
    # Each step evaluates the previous expression only once, because DuckDB would compute every further copy again.
    raw = f"{field}::VARCHAR"
    members = f"""CASE WHEN starts_with({raw}, '[[') THEN json_extract_string({field}, '$[*][*]')
                       ELSE json_extract_string({field}, '$[*]') END"""
    plain = f"""CASE left({raw}, 1)
                     WHEN '[' THEN array_to_string(list_filter({members}, lambda m: m <> ''), '{SEPARATORS[field]}')
                     WHEN '{{' THEN NULL ELSE {field} ->> '$' END"""
    # `unescape` is a Python function and therefore slow, so call it only where it is needed.
    has_entity = f"contains({raw}, '&') OR contains({raw}, '\\u0026')"
    text = f"""CASE WHEN strlen({raw}) > {MAX_FIELD} THEN unescape(left({plain}, {MAX_FIELD}))
                    WHEN {has_entity} THEN unescape({plain}) ELSE {plain} END"""
    # Remove tags after decoding the entities, because entities may encode a tag.
    for pattern, by in ((TAG, " "), (UNEVEN, " "), ("^ | $", "")):
        text = f"regexp_replace({text}, '{pattern}', '{by}', 'g')"
    if field == "price":
        text = f"regexp_extract({text}, '{PRICE}')"
    return f"coalesce({text}, '')"


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
