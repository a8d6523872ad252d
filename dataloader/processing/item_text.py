"""What is written of each item: title, text in a template, address of its image."""

import logging
from string import Formatter

from dataloader.processing.workspace import Workspace, text
from dataloader.sources.items import SEPARATORS

log = logging.getLogger(__name__)

MAX_TEXT = 10_000  # characters; far more than any text model reads


def describe(work: Workspace, template: tuple[str, ...]) -> None:
    """Make `described (raw_id, title, text, image_url, cut)`, one row a raw id of `metadata` whose text was wanted.

    Of several records of an item the first that has a text counts. A text is cut between words.
    """
    there = {row[0] for row in work.run("DESCRIBE metadata")} & set(SEPARATORS)
    pieces = [_piece(piece) for piece in template if _fields(piece) <= there]
    lacking = sorted(set().union(*map(_fields, template)) - there)
    if lacking and work.count("metadata"):
        log.info("process: the items' records have no %s; their texts go without", ", ".join(lacking))
    whole = f"concat_ws('. ', {', '.join(pieces)})" if pieces else "''"
    title = "title" if "title" in there else "''"
    work.run(f"""CREATE TABLE whole AS
        SELECT raw_id, {title} AS title, {whole} AS "text", image_url FROM metadata WHERE wanted""")
    work.run(f"""CREATE TABLE described AS
        SELECT w.raw_id, {_shorten('w.title')} AS title, {_shorten('w."text"')} AS "text", w.image_url,
               length(w."text") > {MAX_TEXT} AS cut
        FROM whole w
        WHERE w.rowid IN (SELECT coalesce(min(rowid) FILTER ("text" <> ''), min(rowid)) FROM whole GROUP BY raw_id)""")
    work.run("DROP TABLE whole")


def no_metadata(work: Workspace) -> None:
    """Make an empty `metadata`, for a data set without records of its items."""
    work.run("CREATE TABLE metadata (raw_id VARCHAR, wanted BOOLEAN, title VARCHAR, image_url VARCHAR)")


def _fields(piece: str) -> set[str]:
    return {field for _words, field, *_ in Formatter().parse(piece) if field is not None}


def _piece(piece: str) -> str:
    """SQL for a piece of a template: its fields within its words, NULL if one of them is empty."""
    parts = []
    for words, field, *_ in Formatter().parse(piece):
        parts += [text(words)] * bool(words) + [field] * (field is not None)
    filled = " AND ".join(f"{field} <> ''" for field in sorted(_fields(piece)))
    return f"CASE WHEN {filled} THEN {' || '.join(parts)} END"


def _shorten(value: str) -> str:
    """At most MAX_TEXT characters, cut between words, and never to nothing."""
    head = f"substr({value}, 1, {MAX_TEXT + 1})"
    return f"""CASE WHEN length({value}) <= {MAX_TEXT} THEN {value}
                    ELSE coalesce(nullif(regexp_extract({head}, '(?s)^(.*) ', 1), ''), substr({value}, 1, {MAX_TEXT}))
               END"""
