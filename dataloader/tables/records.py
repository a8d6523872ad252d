"""Find item records with missing values, with titles that are program code, and with contradictions."""

import logging

from dataloader.options import ProcessOptions
from dataloader.tables.cells import MISSING_IF_REPEATED, NO_TEXT, SEPARATORS
from dataloader.workspace import Workspace

log = logging.getLogger(__name__)

MAX_PLAIN_TITLE = 200  # characters; a title of at most this length is never taken for code
# Functions, variables and calls in JavaScript, and rules in CSS, but not words such as "functions (and more)".
CODE = (r"\bfunction\(|\bfunction\b[^(){}]{0,50}\([^(){}]{0,200}\)\s*\{|=>\s*\{|\bgetTime\(\)|\bdocument\.\w+\(|"
        r"\b(?:var|let|const)\s+\w+\s*=|(?:^|[\s,;}])[.#][A-Za-z_][\w-]*\s*\{|[\w-]\s*\{\s*[\w-]+\s*:[^{}]+[;}]|"
        r"(?:^|[\s;}])@(?:media|import|font-face)\b")
EXCERPT = 60  # characters of an example


def check_records(work: Workspace, options: ProcessOptions, wanted: str) -> dict:
    """Check the records in the table `metadata`, and return counts for the meta files.

    Some texts are changed: a title that is program code becomes empty, and `None`, `null` and `NULL` are texts if only
    one record has them. All findings are logged, with examples. `wanted` is an SQL query for the raw ids of the
    items.
    """
    columns = {row[0] for row in work.run("DESCRIBE metadata")}
    texts = [field for field in SEPARATORS if field in columns]
    noted = [column.removesuffix("_note") for column in sorted(columns) if column.endswith("_note")]
    found = {field: field for field in texts} | {"image": "image_url"}
    code = f"length(title) > {MAX_PLAIN_TITLE} AND regexp_matches(title, '{CODE}')" if "title" in texts else "false"
    parts = [f"count({field}_note)" for field in noted] + [f"count(nullif({column}, ''))" for column in found.values()]
    [(num_records, num_distinct, num_code, *numbers)] = work.run(f"""
        SELECT count(*), count(DISTINCT raw_id), count(*) FILTER ({code}), {', '.join(parts)} FROM metadata""")
    missing, no_text = {}, {}
    for field, number in zip(noted, numbers[:len(noted)], strict=True):
        if number:
            missing[field], no_text[field] = _check_notes(work, options, field)
    for field, number in zip(found, numbers[len(noted):], strict=True):
        if not number and options.local.item_columns.get(field) and num_records:
            log.warning("process: --%s_column %s gives no %s for any item", field,
                        options.local.item_columns[field], "URL" if field == "image" else "text")
    if num_code:
        [(raw_id, title)] = work.run(f"SELECT raw_id, title FROM metadata WHERE {code} ORDER BY rowid LIMIT 1")
        log.warning("process: the titles of %d records are JavaScript or CSS and are not used, for example that of %r: "
                    "%r", num_code, raw_id[:EXCERPT], title[:EXCERPT])
        work.run(f"UPDATE metadata SET title = '' WHERE {code}")
    num_contradicting = _check_contradictions(work, texts, wanted) if num_records > num_distinct else 0
    return {"num_records": num_records, "num_duplicate_records": num_records - num_distinct,
            "num_missing_values": {field: n for field, n in missing.items() if n},
            "num_objects_without_text": {field: n for field, n in no_text.items() if n},
            "num_titles_of_code": num_code, "num_contradicting_items": num_contradicting}


def _check_notes(work: Workspace, options: ProcessOptions, field: str) -> tuple[int, int]:
    """Return the numbers of missing values and of objects without text in a field, and log them with examples."""
    notes = work.run(f"""SELECT {field}_note, count(*), arg_min(raw_id, rowid) FROM metadata
                         WHERE {field}_note IS NOT NULL GROUP BY ALL ORDER BY min(rowid)""")
    num_missing, num_no_text, listed = 0, 0, []
    for note, number, raw_id in notes:
        if note == NO_TEXT:
            num_no_text = number
            log.warning("process: the %s of %d records is an object without a text, and counts as empty, for example "
                        "that of %r", field, number, raw_id[:EXCERPT])
        elif number == 1 and note in MISSING_IF_REPEATED and options.processing.missing_values is None and (
                field not in ("price", "image")):
            work.run(f"UPDATE metadata SET {field} = {field}_note WHERE wanted AND {field}_note = ?", note)
        else:
            num_missing += number
            listed.append(f"{note!r} in {number:,} records, such as that of {raw_id[:EXCERPT]!r}")
    if listed:
        log.info("process: %d values of %s are missing: %s (see --missing_values)", num_missing, field,
                 "; ".join(listed))
    return num_missing, num_no_text


def _check_contradictions(work: Workspace, fields: list[str], wanted: str) -> int:
    """Return how many items have records with different texts in the same field, and log an example."""
    # Equal texts have equal hashes, and a hash takes less memory than a text.
    differ = (f"min(hash({field})) FILTER ({field} <> '') <> max(hash({field})) FILTER ({field} <> '')"
              for field in fields)
    [(number, raw_id)] = work.run(f"""SELECT count(*), arg_min(raw_id, first) FROM (
        SELECT raw_id, min(rowid) AS first FROM metadata WHERE wanted AND raw_id IN ({wanted})
        GROUP BY raw_id HAVING count(*) > 1 AND ({' OR '.join(['false', *differ])}))""")
    if number:
        field, values = next((field, values) for field in fields if len(values := work.run(f"""
            SELECT {field} FROM metadata WHERE raw_id = ? AND {field} <> ''
            GROUP BY {field} ORDER BY min(rowid) LIMIT 2""", raw_id)) > 1)
        log.warning("process: %d items have records that contradict each other, for example the item %r: its %s is %r "
                    "and %r. The first record with a text is used. If each record has one property of an item, make a "
                    "file with one record per item", number, raw_id[:EXCERPT], field,
                    *(value[:EXCERPT] for value, in values))
    return number
