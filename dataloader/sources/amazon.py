"""Amazon product reviews of 2014 and 2018: gzipped lines, metadata as Python literals or as JSON."""

import ast
import gzip
import json
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import duckdb

from common.errors import DataError
from dataloader.sources.text import clean

DAMAGED = (EOFError, zlib.error, gzip.BadGzipFile)
REVIEW_NAMES = ("reviews_{0}_5.json.gz", "{0}_5.json.gz", "{0}.json.gz")


def raw_paths(raw: Path, dataset: str) -> list[Path]:
    """The review file and the metadata file in a folder of raw files."""
    reviews = [raw / name.format(dataset) for name in REVIEW_NAMES]
    found = next((path for path in reviews if path.exists()), None)
    if found is None:
        raise DataError(raw, "has no review file", "looked for " + ", ".join(p.name for p in reviews),
                        f"bash dataloader/0_download_dataset.sh --dataset {dataset} --force")
    metadata = raw / f"meta_{dataset}.json.gz"
    if not metadata.exists():
        raise DataError(metadata, "not there", "the items' texts are in it",
                        f"bash dataloader/0_download_dataset.sh --dataset {dataset} --force")
    return [found, metadata]


def read(paths: list[Path], connection: duckdb.DuckDBPyConnection) -> Iterator[dict]:
    """Fill the table `events` and return the items' records, each with `raw_id` and text fields."""
    reviews, metadata = paths
    _read_reviews(reviews, connection)
    return _read_metadata(metadata)


def _read_reviews(path: Path, connection: duckdb.DuckDBPyConnection) -> None:
    columns = "{reviewerID: 'VARCHAR', asin: 'VARCHAR', overall: 'DOUBLE', unixReviewTime: 'BIGINT'}"
    try:
        connection.execute(f"""
            CREATE TABLE events AS
            SELECT reviewerID AS raw_user, asin AS raw_item, unixReviewTime AS "timestamp", overall AS rating,
                   row_number() OVER () AS line
            FROM read_json(?, format = 'newline_delimited', columns = {columns})""", [str(path)])
    except duckdb.Error as error:
        raise DataError(_first_bad_line(path), "cannot be read as JSON lines", " ".join(str(error).split())[:300],
                        "fetch the file again (--force), or remove the line") from error
    bad = connection.execute("""
        SELECT line FROM events
        WHERE raw_user IS NULL OR raw_item IS NULL OR "timestamp" IS NULL OR rating IS NULL OR NOT isfinite(rating)
        ORDER BY line LIMIT 1""").fetchall()
    if bad:
        raise DataError(f"{path}:{bad[0][0]}", "lacks a field", "wanted reviewerID, asin, overall, unixReviewTime",
                        "fetch the file again (--force), or remove the line")


def _first_bad_line(path: Path) -> str:
    """`file:line` of the first line that is no JSON object (duckdb counts from elsewhere), or the file alone."""
    try:
        with gzip.open(path) as file:
            for number, line in enumerate(file, start=1):
                if line.strip() and not _is_object(line):
                    return f"{path}:{number}"
    except DAMAGED:
        pass
    return str(path)


def _is_object(line: bytes) -> bool:
    try:
        return isinstance(json.loads(line.decode("utf-8")), dict)
    except (ValueError, RecursionError):
        return False


def _read_metadata(path: Path) -> Iterator[dict]:
    parse = None
    number, line = 0, b""
    try:
        with gzip.open(path) as file:
            for number, line in enumerate(file, start=1):
                if not line.strip():
                    continue
                text = line.decode("utf-8-sig")
                parse = parse or _parser_of(text)
                record = parse(text)
                yield {"raw_id": record["asin"], "title": clean(record.get("title")),
                       "description": clean(record.get("description")), "brand": clean(record.get("brand"))}
    except (ValueError, SyntaxError, KeyError, TypeError, AttributeError, RecursionError, MemoryError) as error:
        # The last two: a line nested too deeply for its parser.
        excerpt = line[:80].decode("utf-8", "replace")
        raise DataError(f"{path}:{number}", f"is not an item record: {excerpt!r}", str(error) or type(error).__name__,
                        "remove the line, or fetch the file again (--force)") from error
    except DAMAGED as error:
        raise DataError(f"{path}:{number + 1}", "the file is damaged from here on", str(error),
                        "fetch it again (--force)") from error


def _parser_of(text: str) -> Callable[[str], dict]:
    """2018 metadata are JSON; 2014 metadata are Python literals, which `literal_eval` reads without running them."""
    try:
        json.loads(text)
        return json.loads
    except ValueError:
        return ast.literal_eval
