"""Raw events and items for the tests of processing: through the step itself, or directly into its database."""

from pathlib import Path

from dataloader.options import Processing, ProcessOptions
from dataloader.process import process
from dataloader.tables.events import make_keys
from dataloader.workspace import Workspace
from tests.dataloader.helpers import mentions, write_baby
from tests.dataloader.helpers import process_options as make_options

COMMAND = "bash dataloader/2_process.sh"
Event = tuple[str, str, float] | tuple[str, str, float, float]  # user, item, time, and perhaps the rating


def run(tmp_path: Path, events: list[Event], *flags: str, metadata: list[str] = (), minimum: int = 0) -> ProcessOptions:
    """Process these events from a folder of raw files of Baby; return the options, whose folder has the tables."""
    write_baby(tmp_path / "raw", events, metadata)
    options = make_options(tmp_path / "data", "--raw_dir", str(tmp_path / "raw"),
                           f"--min_user_interactions={minimum}", f"--min_item_interactions={minimum}", *flags)
    process(options, COMMAND)
    return options


def fill(work: Workspace, events: list[Event]) -> None:
    """Make the table of the readers of raw files, and the integer keys of its users and items."""
    work.run('CREATE OR REPLACE TABLE events (raw_user VARCHAR, raw_item VARCHAR, "time" DOUBLE, rating DOUBLE)')
    for event in events:
        work.run("INSERT INTO events VALUES (?, ?, ?, ?)", *event, *[5.0] * (4 - len(event)))
    for table in ("user_keys", "item_keys", "kept"):
        work.run(f"DROP TABLE IF EXISTS {table}")
    make_keys(work)


def kept(work: Workspace) -> list[tuple]:
    """The events that pass the filters, as raw user, raw item and time, in the order of their lines."""
    return work.run("""SELECT u.raw, i.raw, "time" FROM kept JOIN user_keys u ON user_key = u.key
                       JOIN item_keys i ON item_key = i.key ORDER BY line""")


def processing(**changed) -> Processing:
    """Processing without any filter, with some values changed."""
    plain = Processing(min_rating=None, duplicates="keep", min_user_interactions=0, min_item_interactions=0,
                       drop_items_without_text=False, template=("{title}",), split="leave_one_out",
                       split_ratios=(0.8, 0.1, 0.1), split_dates=(), time_unit="s", time_format=None,
                       missing_values=None, bad_lines="fail")
    return plain._replace(**changed)


def prints(text: str, *values: object) -> bool:
    """Whether one line of the text mentions all values."""
    return any(mentions(line, *values) for line in text.splitlines())


def version(path: Path) -> tuple[int, int]:
    """Of a file: another tuple after every write, even of the same bytes."""
    return path.stat().st_ino, path.stat().st_mtime_ns
