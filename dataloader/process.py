"""Step 2: raw files become interactions.parquet, items.parquet and users.parquet."""

import importlib
import logging
import sys
import tempfile
from pathlib import Path
from types import ModuleType

from common.artifacts import file_sha256, ids_sha256, load_meta, publish
from common.cli import command_line
from common.errors import DataError, UserError, run_command
from common.run import FolderLock, log_to_console
from dataloader.check import check_folder
from dataloader.filters import Report, apply_filters, drop_items_without_text, make_keys, number
from dataloader.item_text import MAX_TEXT, describe, no_metadata
from dataloader.options import DataOptions, parse_options
from dataloader.sources.events import read_events
from dataloader.sources.items import read_items
from dataloader.sources.tables import UNITS, RawTable
from dataloader.splits import Split, make_split
from dataloader.statistics import counts, measure, report_lines
from dataloader.workspace import Workspace

log = logging.getLogger(__name__)

ROLES = ("interactions", "items")
RAW_IDS_AT_ONCE = 100_000


def main(argv: list[str]) -> None:
    options = parse_options(argv, "Turn raw files into interactions, items and users.")
    log_to_console()
    command = command_line("bash dataloader/2_process.sh", argv)
    if options.check:
        check(options, command)
    else:
        process(options, command)


def check(options: DataOptions, command: str) -> None:
    """Look at the raw files that the flags name, and at the tables and arrays that are there; write nothing."""
    if not options.downloads:
        with tempfile.TemporaryDirectory() as scratch:
            _make(options, _reader(options).raw_paths(options), command, Path(scratch), publish=False)
        log.info("check: the raw files are sound")
    if options.downloads or options.folder.interactions.exists():
        check_folder(options.folder, options.adopt)


def process(options: DataOptions, command: str) -> None:
    """Filter, number, order and split the events, and publish the three tables."""
    folder = options.folder
    if not options.force and is_current(options):
        log.info("process: reusing %s (%s)", folder.interactions, counts(load_meta(folder.interactions, command)))
    else:
        paths = _reader(options).raw_paths(options)
        with FolderLock(folder.path):
            _make(options, paths, command, folder.path)
        _tell(options, load_meta(folder.interactions, command))
    if options.export_recbole is not None:
        from dataloader.recbole import export

        export(folder, options.export_recbole)


def _reader(options: DataOptions) -> ModuleType:
    return importlib.import_module(f"dataloader.sources.{options.config['reader']}")


def is_current(options: DataOptions) -> bool:
    """Whether the tables there were made with these settings from these raw files (which may be deleted since)."""
    try:
        meta = load_meta(options.folder.interactions, "")
    except UserError:
        return False
    if meta.get("settings") != _settings(options):
        return False
    try:
        paths = _reader(options).raw_paths(options)
    except DataError:
        return True
    return meta["raw"] == _raw(paths)


def _settings(options: DataOptions) -> dict:
    own = {"columns": options.local.columns, "item_columns": options.local.item_columns}
    return {"source": options.source, **options.processing.settings, **(own if options.source == "local" else {})}


def _raw(paths: list[Path]) -> dict:
    return {role: {"file": path.name, "sha256": file_sha256(path)} for role, path in zip(ROLES, paths, strict=False)}


def _make(options: DataOptions, paths: list[Path], command: str, scratch: Path, publish: bool = True) -> None:
    processing, bad_lines = options.processing, scratch / "bad_lines.jsonl"
    bad_lines.unlink(missing_ok=True)
    with Workspace(scratch / ".work", options.memory_limit) as work:
        log.info("process: reading %s", ", ".join(map(str, paths)))
        tables = _reader(options).raw_tables(options, paths, work)
        num_bad = read_events(work, tables[0], options, bad_lines)
        make_keys(work)
        report = Report(work)
        if processing.drop_items_without_text:
            num_bad += _describe_items(work, options, tables, "SELECT raw FROM item_keys", bad_lines)
            drop_items_without_text(work)
            report.add("--drop_items_without_text")
        apply_filters(work, processing, report)
        _refuse_too_few(paths[0], work, report)
        number(work, UNITS[processing.time_unit])
        split = make_split(work, processing, report)
        if not processing.drop_items_without_text:
            num_bad += _describe_items(work, options, tables, "SELECT raw_id FROM items", bad_lines)
        meta = {"command": command, "settings": _settings(options), "raw": _raw(paths), "filters": report.steps,
                "num_bad_lines": num_bad, **_text_counts(work)}
        if publish:
            _publish_tables(work, options, split, meta)
        else:
            _tell(options, {**meta, **split.info, **_counts(work)})


def _describe_items(work: Workspace, options: DataOptions, tables: list[RawTable], wanted: str, bad_lines: Path) -> int:
    """Make `described`, the items' titles and texts; returns how many bad lines were left out."""
    num_bad = 0
    if len(tables) > 1:
        num_bad = read_items(work, tables[1], options, wanted, bad_lines)
    else:
        log.warning("process: there is no file of the items, so that no item has a text")
        no_metadata(work)
    describe(work, options.processing.template)
    return num_bad


def _refuse_too_few(path: Path, work: Workspace, report: Report) -> None:
    num_users = work.value("SELECT count(DISTINCT user_key) FROM kept")
    if num_users < 2:
        raise DataError(path, "no interaction is left" if not num_users else "only one user is left",
                        "; ".join(report.lines()), "relax --min_rating, --duplicates, --min_user_interactions or "
                        "--min_item_interactions" if len(report.steps) > 1 else "a file with more interactions")


def _counts(work: Workspace) -> dict:
    statistics = measure(work)
    return {"statistics": statistics,
            **{key: statistics[key] for key in ("num_users", "num_items", "num_interactions")}}


def _publish_tables(work: Workspace, options: DataOptions, split: Split, meta: dict) -> None:
    """users and items first, then the interactions, which record the hashes of both."""
    folder = options.folder
    meta = {**meta, **_counts(work), "items_sha256": _ids_sha256(work), **split.info}
    queries = {
        folder.items: """
            SELECT i.id AS item, i.raw_id, coalesce(nullif(d.title, ''), i.raw_id) AS title,
                   coalesce(nullif(d."text", ''), i.raw_id) AS "text", d.image_url
            FROM items i LEFT JOIN described d ON i.raw_id = d.raw_id ORDER BY i.id""",
        folder.users: 'SELECT id AS "user", raw_id FROM users ORDER BY id',
        folder.interactions: f'SELECT "user", item, "timestamp", rating, {split.expression} AS split FROM numbered',
    }
    inputs = {}
    for path, query in queries.items():
        made = _publish(work, query, path, {"inputs": inputs if path == folder.interactions else {}, **meta})
        inputs[path.name] = made["sha256"]


def _publish(work: Workspace, query: str, path: Path, meta: dict) -> dict:
    return publish(path, lambda staged: work.copy(query, staged), meta)


def _ids_sha256(work: Workspace) -> str:
    def raw_ids():
        rows = work.connection.execute("SELECT raw_id FROM items ORDER BY id")
        while some := rows.fetchmany(RAW_IDS_AT_ONCE):
            yield from (row[0] for row in some)

    return ids_sha256(raw_ids())


def _text_counts(work: Workspace) -> dict[str, int]:
    """How items and their records meet: which lack the other, and what became of the texts."""
    [(without_text, cut, without_record)] = work.run("""
        SELECT count(*) FILTER (coalesce(d."text", '') = ''), count(*) FILTER (d.cut),
               count(*) FILTER (d.raw_id IS NULL)
        FROM items i LEFT JOIN described d ON i.raw_id = d.raw_id""")
    [(records, distinct)] = work.run("SELECT count(*), count(DISTINCT raw_id) FROM metadata")
    return {"num_without_text": without_text, "num_texts_cut": cut, "num_without_record": without_record,
            "num_records": records, "num_duplicate_records": records - distinct,
            "num_unused_records": distinct - (work.count("items") - without_record)}


def _tell(options: DataOptions, meta: dict) -> None:
    """Print what was made, and how it compares with what the literature has."""
    for line in report_lines(meta):
        log.info("process: %s", line)
    if meta["num_without_text"]:
        log.warning("process: %d items have no text; their raw ids stand in for it", meta["num_without_text"])
    if meta["num_texts_cut"]:
        log.info("process: %d texts are longer than %d characters and were cut", meta["num_texts_cut"], MAX_TEXT)
    expected = options.config["expected"].get(options.folder.name)
    found = [meta["num_users"], meta["num_items"], meta["num_interactions"]]
    plain = options.processing._replace(min_user_interactions=5, min_item_interactions=5, min_rating=None,
                                        duplicates="keep", drop_items_without_text=False)
    if not expected or options.processing != plain:
        return
    if expected == found:
        log.info("process: these are the counts that the literature has")
    else:
        log.warning("process: the literature has %s users, items, interactions, and this set %s", expected, found)


if __name__ == "__main__":
    sys.exit(run_command(main))
