"""Check that the interactions and the item records use the same item ids."""

import logging

from common.errors import DataError
from dataloader.options import ProcessOptions
from dataloader.readers.raw import RawTable
from dataloader.workspace import Workspace

log = logging.getLogger(__name__)

MIN_SHARE, LOW_SHARE = 0.01, 0.5  # shares of items with a record; below them: an error, a warning
NUM_COMPARED = 10_000             # items without a record that are compared in other forms
MIN_EXPLAINED = 0.1               # the share of these items that must have a record in another form
EXCERPT = 60                      # characters of an id in a message
UNICODE_FORM = "the Unicode form of characters"
# For each usual difference between two ids of the same item, SQL that removes the difference. The last entries remove
# several differences at once. A message names the entry with the largest number of matches (the first one
# of equal entries).
FORMS = {
    "blanks or invisible characters": r"regexp_replace(id, '[\s\p{Z}\p{C}]+', '', 'g')",
    "upper and lower case": "lower(id)",
    "leading zeros": r"regexp_replace(id, '^0+(.)', '\1')",
    "a fraction such as .0": r"regexp_replace(id, '^(\d+)\.0*$', '\1')",
    "quotes": """trim(id, '"''`')""",
    UNICODE_FORM: "nfc_normalize(id)",
    "the notation of a number": "CASE WHEN try_cast(id AS DOUBLE) < 9e15 THEN try_cast(id AS DOUBLE)::VARCHAR END",
    "punctuation or case": r"nullif(lower(regexp_replace(id, '[^\p{L}\p{N}]+', '', 'g')), '')",
    "the part before the last separator": r"regexp_replace(id, '^.*[/:_#|.-]([^/:_#|.-]+)$', '\1')",
    "characters before or after the number": r"ltrim(nullif(regexp_extract(id, '^\D*(\d+)(?:\.0*)?\D*$', 1), ''), '0')",
}


def check_join(work: Workspace, tables: list[RawTable], options: ProcessOptions) -> dict[str, int]:
    """Compare the items of all interactions, before any filter, with the item records in the table `metadata`.

    Returns counts for the meta files. Logs a warning if less than LOW_SHARE of the items have a record. Raises
    DataError if less than MIN_SHARE of them have one. Both messages show an id of each file.
    """
    [(num_items, num_found)] = work.run("""SELECT count(*), count(*) FILTER (raw IN (SELECT raw_id FROM metadata))
                                           FROM item_keys""")
    counts = {"num_raw_items": num_items, "num_raw_items_with_record": num_found}
    if num_found >= LOW_SHARE * num_items or not work.count("metadata"):
        return counts
    ours, theirs, reason = _example(work)
    events, records = (table.origin for table in tables)
    what = f"has records of {num_found:,} of the {num_items:,} items in {events}"
    shown = ascii if reason == UNICODE_FORM else repr  # two forms of a character look the same
    why = f"{events} has the item {shown(ours[:EXCERPT])}, and {records} has {shown(theirs[:EXCERPT])}; " + (
        f"the ids of the two files differ in {reason}" if reason else "these ids have no common form")
    if num_found >= MIN_SHARE * num_items:
        log.warning("process: %s %s. %s", records, what, why)
        return counts
    fix = "use the item file that belongs to the interactions"
    if options.source == "local":
        fix = ("write the ids in the same form in both files, or name the columns that have the same ids with "
               "--item_column and --item_id_column")
    work.stop(DataError(records, what, why, fix))
    return counts


def _example(work: Workspace) -> tuple[str, str, str]:
    """Return an id of the interactions without a record, an id of a record, and how such ids differ (or "")."""
    work.run(f"""CREATE TABLE our_ids AS SELECT raw AS id FROM item_keys
                 WHERE raw NOT IN (SELECT raw_id FROM metadata) ORDER BY key LIMIT {NUM_COMPARED}""")
    work.run("""CREATE TABLE their_ids AS SELECT raw_id AS id FROM metadata
                WHERE raw_id NOT IN (SELECT raw FROM item_keys) GROUP BY raw_id ORDER BY min(metadata.rowid)""")
    best = 0, "", "", ""
    for reason, form in FORMS.items():
        [(number, *pair)] = work.run(f"""
            SELECT count(DISTINCT form), arg_min(ours.id, ours.rowid), arg_min(theirs.id, ours.rowid)
            FROM (SELECT id, rowid, {form} AS form FROM our_ids) ours
            JOIN (SELECT arg_min(id, rowid) AS id, {form} AS form FROM their_ids GROUP BY ALL) theirs USING (form)""")
        if number > best[0]:
            best = number, *pair, reason
    if best[0] >= MIN_EXPLAINED * work.count("our_ids"):
        return best[1:]
    [(ours, theirs)] = work.run("""SELECT (SELECT id FROM our_ids ORDER BY rowid LIMIT 1), coalesce(
        (SELECT id FROM their_ids ORDER BY rowid LIMIT 1), (SELECT raw_id FROM metadata ORDER BY rowid LIMIT 1))""")
    return ours, theirs, ""
