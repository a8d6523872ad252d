"""The folder of a run, with its lock, log, metrics and result. Also sets up the logging of all commands."""

import hashlib
import json
import logging
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import UTC, datetime
from pathlib import Path
from typing import TypeVar

import yaml

from common.cli import NAME, ROOT
from common.config import load_yaml
from common.distributed import barrier, is_main
from common.errors import ArtifactError, ConfigError, ResourceError, mask_secrets, naming
from common.lock import FolderLock
from common.machine import machine_error
from common.output import flush, show
from common.publishing import SCHEMA_VERSION, discard_folder, sweep, write_bytes, write_text
from common.reading import AMOUNT, COUNT, SHARE, WHY, Record, fits, read_record, read_text, shortened

log = logging.getLogger(__name__)

T = TypeVar("T")


class Run:
    """A training run in the folder `parent/<run id>/`.

    config: the resolved configuration, with the seed
    inputs: file name -> sha256 of each input file
    command: the command line
    code: the digest of the training code (common/digest.py)

    The id of the run is a hash of `config`, `inputs` and `code`. If the same command runs again, it finds the same
    folder, and continues the run or reuses its results.
    """

    def __init__(self, parent: Path, config: dict, inputs: dict[str, str], command: str, code: str = ""):
        content = json.dumps({"config": config, "inputs": inputs, "code": code}, sort_keys=True)
        self.id = hashlib.sha256(content.encode()).hexdigest()[:12]
        self.parent, self.folder = parent, parent / self.id
        self.config, self.inputs, self.command, self.code = config, inputs, command, code
        self._seconds: dict[str, float] = {}

    @property
    def checkpoints(self) -> Path:
        return self.folder / "checkpoints"

    @property
    def metrics(self) -> Path:
        return self.folder / "metrics.jsonl"

    @property
    def finished(self) -> bool:
        return (self.folder / "finished.json").exists()

    def open(self, force: bool) -> AbstractContextManager:
        """Lock the folder, write config.yaml, and start run.log. With `force`, delete earlier results.

        If there are several processes, only the first one does this. Returns the lock as a context manager.
        """
        if not is_main():
            barrier()
            return nullcontext()
        lock = FolderLock(self.folder)
        log_file = self.folder / "run.log"
        if log_file.exists() and not log_file.is_file():  # before anything is deleted
            raise ConfigError(log_file, "is not a regular file", fix="remove it")
        if force:
            # If this process is killed here, the run must be able to continue. So the checkpoints disappear together,
            # and before the metrics, which a run without checkpoints deletes.
            (self.folder / "finished.json").unlink(missing_ok=True)
            discard_folder(self.checkpoints)
            for file in (self.metrics, self.folder / "times.json"):
                file.unlink(missing_ok=True)
        sweep(self.folder, "checkpoints")
        self.checkpoints.mkdir(exist_ok=True)
        header = f"# {self.command}\n"
        write_text(self.folder / "config.yaml", header + yaml.safe_dump(self.config, sort_keys=False))
        log_to(log_file)
        log.info("run %s: %s", self.id, self.command)
        barrier()
        return lock

    @contextmanager
    def clock(self, part: str, repeated: bool = False) -> Iterator[None]:
        """Measure the time of the `with` block, and add it to the time of this part in times.json.

        If the run was interrupted and continued, the time before the interruption is included. With `repeated`, it is
        not, because a continued run repeats this part from its start.
        """
        start = time.monotonic()
        try:
            yield
        finally:
            path = self.folder / "times.json"
            times = self._earlier_times(path)
            # The time is at least a millisecond, because callers divide by it.
            earlier = (self._seconds if repeated else times).get(part, 0.0)
            times[part] = self._seconds[part] = round(earlier + max(time.monotonic() - start, 0.001), 3)
            write_text(path, json.dumps(times) + "\n")

    def _earlier_times(self, path: Path) -> dict[str, float]:
        if not path.exists():
            return {}
        try:
            times = read_record(path, f"{self.command} --force", {})
            times.check(dict.fromkeys(times, AMOUNT), {})
        except ArtifactError as error:  # lost times must not stop the training
            log.warning("the times before the interruption are lost: %s", error)
            return {}
        return times

    def seconds(self, part: str) -> float:
        """Return how many seconds a part of the run took, as measured by `clock`.

        If a process was ended by SIGKILL, its time is not included.
        """
        return self._seconds[part]

    def append_metrics(self, record: dict) -> None:
        if not is_main():
            return
        with naming(self.metrics), self.metrics.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")

    def truncate_metrics(self, num_lines: int) -> None:
        """Keep only the first `num_lines` lines of metrics.jsonl."""
        if self.metrics.is_file():
            lines = self.metrics.read_bytes().splitlines(keepends=True)
            if len(lines) > num_lines:
                write_bytes(self.metrics, b"".join(lines[:num_lines]))

    def finish(self, summary: dict) -> None:
        """Mark the run as finished: write finished.json and `latest`, which names the latest run."""
        write_text(self.folder / "finished.json", json.dumps(
            {"schema_version": SCHEMA_VERSION, "command": self.command, "inputs": self.inputs, "code": self.code,
             **_environment(), **summary}, indent=2) + "\n")
        self.make_latest()

    def make_latest(self) -> None:
        write_text(self.parent / "latest", self.id + "\n")

    def summary(self) -> Record:
        return read_finished(self.folder, f"{self.command} --force")


def _environment() -> dict:
    """Return the date, the machine, the number of threads, the commit, and the versions of Python and PyTorch."""
    import torch

    git = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        commit = subprocess.run(git, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):  # no git, or not a checkout
        commit = None
    # Do not use platform.platform(), which would start another process.
    machine = f"{platform.system()} {platform.release()} {platform.machine()}, {os.cpu_count()} cores"
    if torch.cuda.is_available():
        machine += f", {torch.cuda.get_device_name()}"
    return {"date": datetime.now(UTC).isoformat(timespec="seconds"), "commit": commit,
            "python": platform.python_version(), "torch": torch.__version__, "threads": torch.get_num_threads(),
            "machine": machine}


def latest_run(parent: Path) -> Path | None:
    """Return the folder of the latest finished run in `parent`, or None.

    The file `latest` names this run. If that run is not finished or was deleted, the function logs a warning and
    returns the newest finished run.
    """
    try:
        name = read_text(parent / "latest").strip()
    except (OSError, ValueError):  # missing or damaged
        name = ""
    if NAME.fullmatch(name) and (parent / name / "finished.json").exists():
        return parent / name
    finished = sorted(parent.glob("*/finished.json"), key=lambda path: (path.stat().st_mtime_ns, path))
    if not finished:
        return None
    log.warning("%s: the file latest names %s, which is not a finished run; using %s, the newest of %d finished runs",
                parent, shortened(name) or "no run", finished[-1].parent.name, len(finished))
    return finished[-1].parent


def read_finished(run: Path, fix: str) -> Record:
    """Load `finished.json` of a run. Raises ArtifactError if the file is damaged or has another schema version."""
    content = read_record(run / "finished.json", fix, {"inputs": dict[str, str], "command": str}, {
        "schema_version": int, "code": str, "metrics": dict, "codebook_sizes": list[COUNT],
        "collision_rate_after": SHARE, "users_per_second": AMOUNT})
    content.fix = f"{content['command']} --force"
    if (version := content.get("schema_version", 1)) != SCHEMA_VERSION:  # version 1 did not record it
        raise ArtifactError(content.path, f"has schema version {version}",
                            f"This code reads schema version {SCHEMA_VERSION}", content.fix)
    return content


def read_config(run: Path, fix: str) -> dict:
    """Load `config.yaml` of a run. Raises ArtifactError if the file is damaged or has no seed."""
    path = run / "config.yaml"
    try:
        config, _ = load_yaml(path)
    except ConfigError as error:  # not a mistake of the user
        raise ArtifactError(error.where, error.what, error.why, fix) from error
    common = config.get("common")
    if not isinstance(common, dict) or not fits(common.get("seed"), int):
        raise ArtifactError(path, "common.seed must be of type int", WHY, fix)
    return config


def read_runs(folders: Iterable[Path], read: Callable[[Path], T]) -> dict[Path, T]:
    """Call `read` for each run folder, and return a dict of folder -> result.

    If `read` raises ArtifactError, the folder is skipped and a warning is logged. If all folders are skipped, the last
    ArtifactError is raised.
    """
    found, failure = {}, None
    for folder in folders:
        try:
            found[folder] = read(folder)
        except ArtifactError as error:
            log.warning("skipped a run: %s", error)
            failure = error
    if failure is not None and not found:
        raise failure
    return found


class Formatter(logging.Formatter):
    """A log formatter that masks secrets, including those in tracebacks."""

    def format(self, record: logging.LogRecord) -> str:
        return mask_secrets(super().format(record))


class ConsoleHandler(logging.StreamHandler):
    """A log handler that raises ResourceError if the log cannot be written, for example because the disk is full."""

    def emit(self, record: logging.LogRecord) -> None:
        show(self.format(record), self.stream)
        flush(self.stream)


def log_to_console() -> None:
    """Print info messages on stdout and warnings on stderr.

    If there are several processes, only the first one prints.
    """
    root = logging.getLogger()
    root.setLevel(logging.DEBUG)
    if not is_main():
        root.addHandler(logging.NullHandler())
        return
    out, err = ConsoleHandler(sys.stdout), ConsoleHandler(sys.stderr)
    out.addFilter(lambda record: logging.INFO <= record.levelno < logging.WARNING and _ours(record))
    err.addFilter(lambda record: record.levelno == logging.WARNING and _ours(record))
    for handler in (out, err):
        handler.setFormatter(Formatter("%(message)s"))
        root.addHandler(handler)
    for library in ("urllib3", "filelock", "httpx", "httpcore", "huggingface_hub", "sentence_transformers",
                    "matplotlib", "fsspec"):
        logging.getLogger(library).setLevel(logging.WARNING)


def _ours(record: logging.LogRecord) -> bool:
    return record.name.split(".")[0] in ("common", "dataloader", "quantization", "recommendation", "__main__")


class RunLog(logging.FileHandler):
    """A log handler that writes the log of the current run to its run.log. Raises OSError if that fails."""

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802 (overrides logging's method)
        error = sys.exc_info()[1]
        if isinstance(error, OSError) and error.errno:
            error.filename = error.filename or self.baseFilename
            raise
        super().handleError(record)


def end_log() -> None:
    """Close the log file of an earlier run of this process."""
    root = logging.getLogger()
    for handler in [handler for handler in root.handlers if isinstance(handler, RunLog)]:
        root.removeHandler(handler)
        handler.close()


def log_to(path: Path) -> None:
    """Write the log to the file `path` from now on."""
    end_log()
    handler = RunLog(path, encoding="utf-8", errors="backslashreplace")  # a path in the log may not be UTF-8
    handler.setFormatter(Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    logging.getLogger().addHandler(handler)


def save_comparison(folder: Path, text: str, csv: str) -> str:
    """Write compare.md and compare.csv, and return a line of text that names them.

    If the files cannot be written, for example without permission, the line says so. Raises OSError if the disk is full
    or broken.
    """
    try:
        write_text(folder / "compare.md", text + "\n")
        write_text(folder / "compare.csv", csv)
    except OSError as error:
        if isinstance(machine_error(error), ResourceError):
            raise
        return f"{folder / 'compare.md'} and compare.csv could not be written: {error.strerror}"
    return f"wrote {folder / 'compare.md'} and compare.csv"
