"""Step 2: convert raw files to interactions.parquet, items.parquet and users.parquet."""

import logging
import shutil
import sys
import tempfile
from contextlib import suppress
from functools import partial
from pathlib import Path

from common.artifacts import counts, load_interactions, load_items, load_meta, load_users
from common.cli import command_line
from common.command import run_command
from common.errors import ArtifactError, ConfigError, DataError, UserError
from common.lock import FolderLock
from common.publishing import fingerprint, publish
from common.run import log_to_console
from common.tables import parquet_rows, text
from common.targets import check_targets
from dataloader.card import write_card
from dataloader.check import check_folder
from dataloader.flags import remember_flags
from dataloader.options import ProcessOptions, parse_options
from dataloader.raw_report import check_raw_files
from dataloader.readers.bad_rows import check_texts
from dataloader.sources import ROLES, family, with_download
from dataloader.tables.events import make_keys, read_events
from dataloader.tables.filters import Report, apply_filters, drop_items_without_text, number, too_few_users
from dataloader.tables.items import describe_items, read_records
from dataloader.tables.splits import make_split
from dataloader.tables.statistics import notes, report_lines, summarize
from dataloader.workspace import Workspace

log = logging.getLogger(__name__)

SCRATCH = ".work"
ITEM_COLUMNS = ("item_id:token", "title:token_seq", "text:token_seq")  # of RecBole's file of items


def main(argv: list[str]) -> None:
    options = parse_options(argv, "Convert raw files to interactions, items and users.").process
    log_to_console()
    if options.check:
        check(options)
    else:
        process(options, command_line("bash dataloader/2_process.sh", argv))


def check(options: ProcessOptions) -> None:
    """Check the raw files that the flags name, and the existing tables and arrays. Without --adopt, write nothing.

    Raises DataError if something in the raw files would stop `process`, or if a table or an array is not valid. Raises
    ArtifactError if a meta file is missing, stale or wrong.
    """
    if not options.downloads:
        check_raw_files(options)
    if options.downloads or options.folder.interactions.exists():
        check_folder(options)
        recorded, found = _recorded_fingerprints(options), {}
        with suppress(DataError):  # the raw files may have been deleted
            found = _fingerprints(family(options).raw_paths(options), {}) if recorded else {}
        for role, file in found.items():  # compare the sha256; the size and time of a damaged file may be unchanged
            if file["sha256"] != recorded.get(role, file)["sha256"]:
                raise ArtifactError(options.folder.interactions,
                                    f"is stale: {file['file']} has changed since the tables were made",
                                    fix=f"{options.folder.make_command} --force")


def process(options: ProcessOptions, command: str) -> None:
    """Make and publish the tables of interactions, items and users, or reuse them if they are up to date.

    The events are filtered, sorted and split. Users and items are numbered.
    """
    folder = options.folder
    if options.export_recbole is not None:
        check_export(options)
    if options.filled:
        log.info("process: %s", options.filled)
    why = "--force" if options.force else outdated(options)
    if why:
        if folder.interactions.exists():
            log.info("process: making the tables again (%s)", why)
        paths = family(options).raw_paths(options)
        with (with_download(options), FolderLock(folder.path),
              Workspace(folder.path / SCRATCH, options.memory_limit) as work):
            bad_lines = folder.path / "bad_lines.jsonl"
            bad_lines.unlink(missing_ok=True)
            meta, split = _make_tables(work, options, paths, bad_lines)
            queries = {
                folder.items: """
                    SELECT i.id AS item, i.raw_id, coalesce(nullif(d.title, ''), i.raw_id) AS title,
                           coalesce(nullif(d."text", ''), i.raw_id) AS "text", d.image_url
                    FROM items i LEFT JOIN described d ON i.raw_id = d.raw_id ORDER BY i.id""",
                folder.users: 'SELECT id AS "user", raw_id FROM users ORDER BY id',
                folder.interactions: f'SELECT "user", item, "timestamp", rating, {split} AS split FROM numbered'}
            ids_sha256, inputs = work.ids_sha256("SELECT raw_id FROM items ORDER BY id"), {}
            # The interactions are published last, because their meta file contains the hashes of the other two tables.
            for path, query in queries.items():
                inputs[path.name] = publish(path, partial(work.copy, query), {
                    "inputs": inputs if path == folder.interactions else {}, "command": command, **meta,
                    "items_sha256": ids_sha256})["sha256"]
        for line in report_lines(meta):
            log.info("process: %s", line)
        for level, note in notes(options, meta):
            log.log(level, "process: %s", note)
    else:
        if (folder.path / SCRATCH).exists():  # left by a run that was killed after it had published all tables
            with FolderLock(folder.path):
                shutil.rmtree(folder.path / SCRATCH)
        meta = load_meta(folder.interactions, command)
        log.info("process: reusing %s (%s)", folder.interactions, counts(meta))
    # A run that was killed after it had published all tables has written no card.
    if "statistics" in meta and write_card(folder):
        log.info("process: wrote %s", folder.card)
    if not options.downloads:
        remember_flags(folder.source_flags, options.flags)
    elif options.source != "local":
        folder.source_flags.unlink(missing_ok=True)
    if options.export_recbole is not None:
        export(options)


def outdated(options: ProcessOptions) -> str:
    """Return why the tables must be made again, or "" if they match the settings and the raw files.

    Deleted raw files count as unchanged.
    """
    try:
        meta = load_meta(options.folder.interactions, "")
    except UserError as error:
        return error.what
    recorded, current = meta.get("settings", {}), _settings(options)
    if options.source == "local" and options.downloads:  # no flag names the user's own files this time
        if recorded.get("adopted"):
            return ""
        current |= {key: recorded.get(key) for key in ("columns", "item_columns", "layout")}
    if differing := [key for key in sorted({*recorded, *current}) if recorded.get(key) != current.get(key)]:
        return "; ".join(f"{key}: {recorded.get(key)} -> {current.get(key)}" for key in differing)
    try:
        found = _fingerprints(family(options).raw_paths(options), meta["raw"])
    except DataError:
        return ""
    names_and_hashes = [{role: (file["file"], file["sha256"]) for role, file in raw.items()}
                        for raw in (found, meta["raw"])]
    return "" if names_and_hashes[0] == names_and_hashes[1] else "the raw files have changed"


def _settings(options: ProcessOptions) -> dict:
    own = {"columns": options.local.columns, "item_columns": options.local.item_columns,
           **({"layout": layout} if (layout := options.local.layout.settings) else {})}
    return {"source": options.source, **options.processing.settings, **(own if options.source == "local" else {})}


def _fingerprints(paths: list[Path], recorded: dict[str, dict]) -> dict[str, dict]:
    """Return the fingerprint of each raw file: role (interactions or items) -> fingerprint.

    A file is not read again if its size and time are equal to those in `recorded`.
    """
    return {role: fingerprint(path, recorded.get(role)) for role, path in zip(ROLES, paths, strict=False)}


def _recorded_fingerprints(options: ProcessOptions) -> dict[str, dict]:
    with suppress(UserError):
        return load_meta(options.folder.interactions, "").get("raw", {})
    return {}


def _make_tables(work: Workspace, options: ProcessOptions, paths: list[Path], bad_lines: Path) -> tuple[dict, str]:
    """Make the tables `items`, `users`, `described` and `numbered` in the workspace from the raw files.

    Skipped lines are written to the file `bad_lines`. Returns two values: a dict with the entries that all meta files
    have in common, and an SQL expression whose value is the split of a row of `numbered`. Raises DataError if fewer
    than two users remain after filtering.
    """
    processing = options.processing
    raw = _fingerprints(paths, {} if options.force else _recorded_fingerprints(options))
    log.info("process: reading %s", ", ".join(map(str, paths)))
    tables = family(options).raw_tables(options, paths, work)
    if len(tables) == 1:
        log.warning("process: no items file was found, so the items have no text")
    events = read_events(work, tables[0], options, bad_lines)
    make_keys(work)
    check_texts(work, tables[0])
    report, records = Report(work), {}
    if processing.drop_items_without_text:
        records = describe_items(work, options, tables, "SELECT raw FROM item_keys", bad_lines)
        drop_items_without_text(work, report)
    apply_filters(work, processing, report)
    if error := too_few_users(work, report, paths[0]):
        if not records and len(tables) > 1:  # ids that do not join are the more important error
            read_records(work, options, tables, "SELECT raw FROM item_keys WHERE false", bad_lines)
        raise error
    number(work)
    records = records or describe_items(work, options, tables, "SELECT raw_id FROM items", bad_lines)
    split = make_split(work, processing, report, paths[0])
    return {"settings": _settings(options), "raw": raw,
            **summarize(work, report, events, records, split)}, split.expression


def check_export(options: ProcessOptions) -> None:
    """Raise ConfigError if --export_recbole would replace a raw file, or a file that it has not written."""
    target, names = options.export_recbole, [f"{options.folder.name}.{kind}" for kind in ("item", "inter")]
    raw_paths: list[Path] = []
    with suppress(UserError):  # the raw files may have been deleted
        raw_paths = [path for path in family(options).raw_paths(options) if path.exists()]
    for raw in raw_paths:
        if any((target / name).exists() and raw.samefile(target / name) for name in names):
            raise ConfigError(f"--export_recbole {target}", f"would replace the raw file {raw}",
                              fix="choose another folder")
    check_targets("--export_recbole", target, [options.folder.data_root], names[0], names[1:],
                  lambda line: line == "\t".join(ITEM_COLUMNS))


def export(options: ProcessOptions) -> None:
    """Write RecBole's atomic files, `<D>.inter` and `<D>.item`, to the folder of --export_recbole.

    The format cannot represent tabs and line breaks. In titles and texts, they are replaced by spaces. Raises DataError
    if a raw id contains a tab or a line break.
    """
    folder, target = options.folder, options.export_recbole
    for load in (load_interactions, load_items, load_users):  # these check the content
        load(folder)
    items, users = (parquet_rows(path) for path in (folder.items, folder.users))
    columns = ("raw_id", *(f"regexp_replace({name}, '[\\t\\r\\n]+', ' ', 'g')" for name in ("title", '"text"')))
    files = {f"{folder.name}.item": f"""
                 SELECT {", ".join(f'{value} AS "{name}"' for value, name in zip(columns, ITEM_COLUMNS, strict=True))}
                 FROM {items} ORDER BY item""",
             f"{folder.name}.inter": f"""
                 SELECT u.raw_id AS "user_id:token", i.raw_id AS "item_id:token", e.rating AS "rating:float",
                        e."timestamp"::DOUBLE AS "timestamp:float"
                 FROM {parquet_rows(folder.interactions, "file_row_number = true")} e
                 JOIN {users} u ON e."user" = u."user" JOIN {items} i ON e.item = i.item ORDER BY e.file_row_number"""}
    with (tempfile.TemporaryDirectory() as scratch,
          Workspace(Path(scratch) / SCRATCH, options.memory_limit, target=target) as work):
        for path, rows in ((folder.items, items), (folder.users, users)):
            if bad := work.run(f"SELECT raw_id FROM {rows} WHERE regexp_matches(raw_id, '[\\t\\r\\n]') LIMIT 1"):
                raise DataError(path, f"the raw id {bad[0][0]!r} contains a tab or a line break",
                                "RecBole's format does not allow this", "change the raw id in the raw files")
        target.mkdir(parents=True, exist_ok=True)
        for name, query in files.items():
            staged = target / f".{name}.tmp"
            work.run(f"COPY ({query}) TO {text(str(staged))} (FORMAT csv, DELIMITER '\t', HEADER, QUOTE '', ESCAPE '')")
            staged.replace(target / name)
            log.info("process: wrote %s", target / name)


if __name__ == "__main__":
    sys.exit(run_command(main))
