"""Raw item records of any format become the table `metadata`, and their fields plain text."""

import html
from pathlib import Path

from dataloader.options import DataOptions
from dataloader.sources.tables import RawTable, lacking, load, set_apart, value_of
from dataloader.workspace import Workspace

# Between the members of a list.
SEPARATORS = {"title": " ", "description": " ", "brand": " ", "price": " ", "categories": ", ", "features": " ",
              "year": " ", "genres": ", "}
TAG = r"<(?:[/!?]?[A-Za-z]|!--)[^<>]{0,500}>"    # "width < 5, height > 3" has none
BLANKS = r"[\s\x0b\x1c-\x1f\x{85}\p{Z}]+"
# A text that BLANKS would change; finding out is far faster than changing.
UNEVEN = r"  |[\t-\r\x1c-\x1f\x{85}\x{a0}\x{1680}\x{2000}-\x{200a}\x{2028}\x{2029}\x{202f}\x{205f}\x{3000}]"
PRICE = r"^\$?\d[\d,.]*(?: ?- ?\$?\d[\d,.]*)?$"  # some price fields hold pieces of a page
# An address; a list of them; or a list of records of one picture's sizes, the first being the main picture.
IMAGE_URL = """nullif(CASE json_type(image) WHEN 'VARCHAR' THEN image ->> '$'
    WHEN 'ARRAY' THEN CASE WHEN json_type(image, '$[0]') = 'OBJECT'
        THEN coalesce(image ->> '$[0].large', image ->> '$[0].hi_res', image ->> '$[0].thumb')
        ELSE image ->> '$[0]' END END, '')"""


def read_items(work: Workspace, table: RawTable, options: DataOptions, wanted: str, bad_lines: Path) -> int:
    """Fill `metadata (raw_id, wanted, <fields>, image_url)`, one row a record in the file's order.

    The fields are the title and those of the template: plain text, empty where a record has none, and read for the
    raw ids in `wanted` (SQL) alone. Returns how many lines were left out. Raises DataError naming file and line of
    what is no item.
    """
    work.connection.create_function("unescape", html.unescape, ["VARCHAR"], "VARCHAR")
    in_template = "".join(options.processing.template)
    fields = [f for f in SEPARATORS if table.columns.get(f) and (f == "title" or f"{{{f}}}" in in_template)]
    query = _cleaned(fields, f"""
        SELECT raw_id, wanted, {''.join(f'CASE WHEN wanted THEN {_plain(f)} END AS {f}, ' for f in fields)}
               CASE WHEN wanted THEN {IMAGE_URL} END AS image_url
        FROM (SELECT *, item AS raw_id, item IN ({wanted}) AS wanted FROM {{rows}})""")
    types = {"item": "VARCHAR", **dict.fromkeys([*fields, "image"], "JSON")}
    load(work, table, "metadata", query, ("item",), types)

    def explain(values: dict) -> str:
        return lacking(table, "item") if value_of(table, values, "item") is None else "is no item record"

    return set_apart(work, table, "metadata", "coalesce(raw_id, '') = ''", explain, options.processing.bad_lines,
                     bad_lines)


def _plain(field: str) -> str:
    """SQL for the text that a JSON value holds; the members of a list, and of a list of lists, are joined."""
    members = f"""CASE WHEN json_type({field}, '$[0]') = 'ARRAY' THEN json_extract_string({field}, '$[*][*]')
                       ELSE json_extract_string({field}, '$[*]') END"""
    return f"""CASE json_type({field}) WHEN 'ARRAY' THEN array_to_string({members}, '{SEPARATORS[field]}')
                    WHEN 'OBJECT' THEN NULL ELSE {field} ->> '$' END"""


def _cleaned(fields: list[str], query: str) -> str:
    """A query around one whose fields are plain: without entities and tags, and with single blanks.

    One level a step: within one, DuckDB would work a step out again wherever the next one names it. Entities go first,
    as what they stand for may be a tag; only texts that have one go through Python.
    """
    for step in (lambda f: f"CASE WHEN contains({f}, '&') THEN unescape({f}) ELSE {f} END",
                 lambda f: f"CASE WHEN contains({f}, '<') THEN regexp_replace({f}, '{TAG}', ' ', 'g') ELSE {f} END",
                 lambda f: f"CASE WHEN regexp_matches({f}, '{UNEVEN}') "
                           f"THEN regexp_replace({f}, '{BLANKS}', ' ', 'g') ELSE {f} END",
                 # `trim` walks through a whole text.
                 lambda f: f"CASE WHEN starts_with({f}, ' ') OR ends_with({f}, ' ') THEN trim({f}) ELSE {f} END",
                 lambda f: f"regexp_extract({f}, '{PRICE}')" if f == "price" else f"coalesce({f}, '')"):
        query = f"SELECT raw_id, wanted, {''.join(f'{step(f)} AS {f}, ' for f in fields)} image_url FROM ({query})"
    return query
