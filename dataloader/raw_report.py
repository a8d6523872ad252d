"""The report of --check on raw files: all facts and errors in one text, not only the first error."""

import logging
import re
import shlex
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from common.errors import DataError, UserError
from common.tables import markdown, percent
from dataloader.flags import MEMORY_LIMIT
from dataloader.options import ProcessOptions
from dataloader.readers.bad_rows import check_texts
from dataloader.readers.lines import NAMES, PARSERS
from dataloader.readers.profile import plain, profile, shown
from dataloader.readers.raw import ID, RawTable, existing_columns, load
from dataloader.sources import ROLES, family
from dataloader.tables.events import EventCounts, make_keys, read_events
from dataloader.tables.filters import Report, apply_filters, drop_items_without_text, number, too_few_users
from dataloader.tables.items import describe_items
from dataloader.tables.splits import make_split
from dataloader.tables.statistics import days_of, notes, report_lines, summarize
from dataloader.tables.times import Times
from dataloader.workspace import Findings, Workspace

log = logging.getLogger(__name__)

REQUIRED = {"interactions": ("user", "item", "time"), "items": ("item",)}
MAX_COLUMNS = 50  # columns of a file that the report shows; the used ones come first
NUM_IDS = 3       # example ids
DELIMITERS = {",": "CSV", "\t": "TSV"}
# The flag in the fix of an error with which the check reads the times again. If a fix has alternatives, none is used.
UNIT, FORMAT = (re.compile(rf"use --time_{flag}(?=,|$)") for flag in (
    r"unit (s|ms|us|ns|day|date)", "format '([^']+)'"))


def check_raw_files(options: ProcessOptions) -> None:
    """Log a report on the raw files that the flags name. Write no file.

    Raises DataError if `process` would stop with an error. The report lists all errors; the first one is raised.
    """
    findings, messages = Findings(), []
    with (_collecting(messages), tempfile.TemporaryDirectory() as scratch,
          Workspace(Path(scratch) / ".work", options.memory_limit, findings) as work):
        check = _RawCheck(work, options)
        lines = check.lines()
    if messages:
        lines += ["", "notes", *(f"  {message}" for message in dict.fromkeys(messages))]
    log.info("%s", "\n".join([*lines, "", *_result(check.options, findings)]))
    if findings.errors:
        first, num = findings.errors[0], len(findings.errors)
        end = "" if first.why.endswith(("?", ".")) or not first.why else "."
        more = f"{end} The report has {num} reasons; this is the first" if num > 1 else ""
        raise DataError(first.where, first.what, f"{first.why}{more}", first.fix)


@contextmanager
def _collecting(messages: list[str]) -> Iterator[None]:
    """Collect the log messages of the steps in the list, because they belong at the end of the report."""
    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            messages.append(record.getMessage().removeprefix("process: "))

    logger, handler = logging.getLogger("dataloader"), Handler(logging.INFO)
    logger.addHandler(handler)
    logger.propagate = False
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.propagate = True


def _result(options: ProcessOptions, findings: Findings) -> list[str]:
    """Return the end of the report: whether `process` would stop, all reasons, and the command of step 2."""
    flags = {"dataset": options.folder.name, **options.flags}
    if options.memory_limit != MEMORY_LIMIT:
        flags["memory_limit"] = options.memory_limit
    words = [word for flag, value in flags.items()
             for word in ([f"--{flag}"] if value is True else [f"--{flag}={value}"])]
    command = f"    bash dataloader/2_process.sh {shlex.join(words)}{options.folder.root_flag}"
    if not findings.errors:
        return ["`process` would succeed. The command:", command]
    reasons = [f"  {number}. {error}" for number, error in enumerate(findings.errors, start=1)]
    return [f"`process` would stop. Reasons ({len(reasons)}):", *reasons, "", "The command, after the corrections:",
            command]


def _fitting_times(errors: list[UserError]) -> dict[str, str]:
    """Return the flags of the first fix that suggests another form of the times, or {}."""
    for error in errors:
        if found := FORMAT.match(error.fix):
            return {"time_unit": "date", "time_format": found[1]}
        if found := UNIT.match(error.fix):
            return {"time_unit": found[1]}
    return {}


class _RawCheck:
    """The steps of `process` on raw files. After a fault, the check continues with the next step that is possible."""

    def __init__(self, work: Workspace, options: ProcessOptions):
        assert work.findings is not None
        self.work, self.findings = work, work.findings
        self.options = options  # replaced if another --time_unit fits the file
        self.tables: dict[str, RawTable] = {}
        self.events: EventCounts | None = None  # None: the events cannot be read
        self.records: dict = {}                 # empty: the items cannot be read
        self.has_item_keys = False

    def lines(self) -> list[str]:
        """Run all steps, and return the report on the files and on the filters."""
        source, own = family(self.options), self.options.local
        paths = [own.interactions, *filter(None, [own.items])] if own.interactions else []
        with self.work.recording():
            paths = source.raw_paths(self.options)
        with self.work.recording():
            self.tables = dict(zip(ROLES, source.raw_tables(self.options, paths, self.work) if paths else [],
                                   strict=False))
        return [f"Check of the raw files of {self.options.folder.name} (source {self.options.source})",
                *filter(None, [self.options.filled]), *self._interactions(), *self._items(), *self._after_filters()]

    def _file(self, role: str) -> list[str]:
        """Return the format and the columns of a file."""
        table, lines = self.tables[role], []
        if not table.format:
            return ["", f"{role}: {table.origin}", "  cannot be read"]
        with self.work.recording():
            names = existing_columns(self.work, table)[:MAX_COLUMNS]
            lines = [f"  cannot be read completely; its columns: {', '.join(map(shown, names))}"]
            lines = self._columns(role, table)
        return ["", f"{role}: {table.origin}", *(lines or ["  cannot be read"])]

    def _columns(self, role: str, table: RawTable) -> list[str]:
        fields = {column: field for field, columns in table.columns.items() for column in columns}
        existing = _different(existing_columns(self.work, table), table)
        columns = [c for place, c in enumerate(existing) if c in fields or place < MAX_COLUMNS]
        if not columns:
            return ["  has no records that can be read"]
        num_rows, found = profile(self.work, table, columns)
        in_text = "".join(self.options.processing.template)
        rows = []
        for column in found:
            field = fields.get(column.name, "")
            unused = " (not in the text)" * (role == "items" and field not in ("", "item", "title", "image")
                                             and f"{{{field}}}" not in in_text)
            rows.append([plain(column.name), column.type, percent(column.num_missing / max(num_rows, 1)),
                         column.example, field + unused])
        known = {**self.options.config.get(role, {}).get("columns", {}), **table.columns}
        absent = [field for field in known if not set(table.columns.get(field, ())) & set(existing)]
        return [f"  {_format(table)}, {num_rows:,} rows, {table.path.stat().st_size:,} bytes",
                *(f"  {line}" for line in markdown(["column", "type", "missing", "example", "used as"],
                                                   rows).splitlines()),
                *([f"  {len(existing) - len(columns):,} more columns"] if len(existing) > len(columns) else []),
                *([f"  fields without a column: {', '.join(absent)}"] if absent else [])]

    def _is_complete(self, role: str) -> bool:
        table = self.tables.get(role)
        return table is not None and table.format != "" and all(
            field in table.columns for field in REQUIRED[role])

    def _interactions(self) -> list[str]:
        if (table := self.tables.get("interactions")) is None:
            return []
        lines = self._file("interactions")
        if self._is_complete("interactions"):
            lines += self._read_events(table)
        elif "item" in table.columns:  # the ids can be compared with those of the items file
            with self.work.recording():
                load(self.work, table, "item_keys", """
                    SELECT item AS raw, row_number() OVER () AS key FROM (SELECT DISTINCT item FROM {rows})
                    WHERE item <> ''""", {"item": ID})
                self.has_item_keys = True
        return lines + (self._event_facts() if self.events else [])

    def _read_events(self, table: RawTable) -> list[str]:
        """Make the table `events`, and return the invalid lines.

        If an error names another form of the times, read the file again in this form.
        """
        with self.work.recording():
            self.events = read_events(self.work, table, self.options, Path())
        if not (flags := _fitting_times(self.findings.errors)):
            return self._bad_lines()
        self.findings.bad_rows = [rows for rows in self.findings.bad_rows if " time" in rows.kind]
        lines = [*self._bad_lines(), "  The rest of the report reads the times with "
                 + " ".join(f"--{flag} {shlex.quote(value)}" for flag, value in flags.items())]
        self.options = self.options._replace(
            processing=self.options.processing._replace(**{"time_format": None, **flags}),
            flags={**self.options.flags, **flags})
        self.findings.bad_rows, self.events = [], None
        self.work.run("DROP TABLE IF EXISTS events")
        with self.work.recording():
            self.events = read_events(self.work, table, self.options, Path())
        return [*lines, *self._bad_lines()]

    def _event_facts(self) -> list[str]:
        """Return counts, the time range and the repeats of the valid events. Replaces `events` by `kept`."""
        processing = self.options.processing
        form = Times(self.work, self.tables["interactions"], processing).form
        flag = {"typed": "", "format": f", read with --time_format '{processing.time_format}'"}.get(
            form, f", read with --time_unit {form}")
        [(num, first, last)] = self.work.run('SELECT count(*), min("time"), max("time") FROM events')
        make_keys(self.work)
        check_texts(self.work, self.tables["interactions"])
        self.has_item_keys = True
        if not num:
            if self.findings.errors:  # the filters must not report the missing events as another error
                self.events = None
            return ["  no valid events"]
        [(pairs, distinct)] = self.work.run("""
            SELECT (SELECT count(*) FROM (SELECT DISTINCT user_key, item_key FROM kept)),
                   (SELECT count(*) FROM (SELECT DISTINCT user_key, item_key, "time" FROM kept))""")
        num_users, num_items = (self.work.count(f"{side}_keys") for side in ("user", "item"))
        return [f"  {num:,} valid events of {num_users:,} users with {num_items:,} items",
                f"  time: {days_of(int(first), int(last))}{flag}",
                f"  repeats: {num - pairs:,} events ({percent((num - pairs) / num)}) repeat a pair of user and item; "
                f"{num - distinct:,} are exact duplicates (also the same time)"]

    def _items(self) -> list[str]:
        if "items" not in self.tables:
            return ["", "items: no file, so the items have no text"] if self.tables else []
        lines = self._file("items")
        if not self._is_complete("items"):
            return lines
        if not self.has_item_keys:
            self.work.run("CREATE TABLE item_keys (raw VARCHAR, key UINTEGER)")
        self.findings.bad_rows = []
        with self.work.recording():
            self.records = describe_items(self.work, self.options, list(self.tables.values()),
                                          "SELECT raw FROM item_keys", Path())
        return [*lines, *self._bad_lines(), *(self._join() if self.records and self.has_item_keys else [])]

    def _join(self) -> list[str]:
        """Return how many items of the interactions have a record, with example ids of those that have none."""
        [(num, joined, without)] = self.work.run(f"""
            SELECT count(*), count(m.raw_id), min(k.raw, {NUM_IDS}) FILTER (m.raw_id IS NULL)
            FROM item_keys k LEFT JOIN (SELECT DISTINCT raw_id FROM metadata) m ON k.raw = m.raw_id""")
        [(records, distinct, unused, others)] = self.work.run(f"""
            SELECT count(*), count(DISTINCT m.raw_id), count(*) FILTER (k.raw IS NULL),
                   min(m.raw_id, {NUM_IDS}) FILTER (k.raw IS NULL)
            FROM metadata m LEFT JOIN item_keys k ON k.raw = m.raw_id""")
        share = percent(joined / max(num, 1))
        lines = [f"  join: {joined:,} of {num:,} items of the interactions ({share}) have a record",
                 f"  {records:,} records: {records - distinct:,} are further records of the same item, {unused:,} are "
                 "of items without interactions"]
        for what, ids in (("items without a record", without), ("records without interactions", others)):
            lines += [f"    {what}, for example: {', '.join(map(shown, ids))}"] if ids else []
        return lines

    def _after_filters(self) -> list[str]:
        """Return the part of the report on the filters and the split."""
        processing, table = self.options.processing, self.tables.get("interactions")
        if self.events is None or (processing.drop_items_without_text and "items" in self.tables and not self.records):
            return ["", "filters and splits: not checked, because of the faults above"] if self.tables else []
        report, records = Report(self.work), self.records
        if not records:
            for name in ("metadata", "described"):
                self.work.run(f"DROP TABLE IF EXISTS {name}")
            records = describe_items(self.work, self.options, [table], "SELECT raw FROM item_keys", Path())
        if processing.drop_items_without_text:
            drop_items_without_text(self.work, report)
        apply_filters(self.work, processing, report)
        lines = report.lines()
        if error := too_few_users(self.work, report, table.path):
            self.work.stop(error)
        else:
            number(self.work)
            with self.work.recording():
                split = make_split(self.work, processing, report, table.path)
                lines = self._summary(summarize(self.work, report, self.events, records, split))
        return ["", "after the filters", *(f"  {line}" for line in lines)]

    def _summary(self, meta: dict) -> list[str]:
        if "items" in self.tables and not self.records:
            del meta["num_without_text"]
            return [*report_lines(meta), "the texts are not checked, because of the faults above"]
        return [*report_lines(meta), *(note for _level, note in notes(self.options, meta))]

    def _bad_lines(self) -> list[str]:
        lines = []
        for rows in self.findings.bad_rows:
            skipped = " (they would be skipped)" if rows.skipped else ""
            lines += [f"  {rows.num:,} of {rows.num_rows:,} lines {rows.kind}{skipped}, for example:",
                      *(f"    {example}" for example in rows.examples)]
        return lines


def _format(table: RawTable) -> str:
    separator = table.layout.delimiter
    if table.format == "csv":
        return DELIMITERS.get(separator, f"CSV with the separator {separator!r}")
    return NAMES.get(table.format, table.format.title())


def _different(columns: list[str], table: RawTable) -> list[str]:
    """Return each column once. For JSON, leave out names that differ only in case; DuckDB cannot distinguish them."""
    if table.format not in PARSERS:
        return list(dict.fromkeys(columns))
    seen: dict[str, str] = {}
    for column in [*table.all_columns(), *columns]:
        for part in (column.partition(".")[0], column):
            seen.setdefault(part.lower(), part)
    return [column for column in columns
            if all(seen[part.lower()] == part for part in (column.partition(".")[0], column))]
