"""RecBole's atomic files: their lines, and that reading them back gives the same interactions."""

import random
from pathlib import Path

import pytest

from common.artifacts import DatasetFolder
from common.errors import ArtifactError, ConfigError, DataError
from dataloader.process import export, process
from tests.dataloader.helpers import process_options as make_options
from tests.dataloader.helpers import table
from tests.dataloader.processing import COMMAND, run
from tests.errors import refused


def written(tmp_path: Path, events, metadata=(), *flags: str):
    return run(tmp_path, events, "--export_recbole", str(tmp_path / "atomic"), *flags, metadata=metadata)


def test_the_files_have_typed_headers_and_one_line_per_row(tmp_path):
    events = [("b", "y", 1_400_000_000, 4.5), ("a", "x", 5, 1.0), ("a", "y", 7), ("a", "x", 7)]
    metadata = [repr({"asin": "x", "title": 'A "cup"\tof tea', "description": "Holds 5 oz"})]
    written(tmp_path, events, metadata)
    assert {path.name for path in (tmp_path / "atomic").iterdir()} == {"Baby.inter", "Baby.item"}
    assert (tmp_path / "atomic" / "Baby.inter").read_text() == (
        "user_id:token\titem_id:token\trating:float\ttimestamp:float\n"
        "b\ty\t4.5\t1400000000.0\na\tx\t1.0\t5.0\na\ty\t5.0\t7.0\na\tx\t5.0\t7.0\n")
    assert (tmp_path / "atomic" / "Baby.item").read_text() == (
        "item_id:token\ttitle:token_seq\ttext:token_seq\n"
        "y\ty\ty\nx\tA \"cup\" of tea\tA \"cup\" of tea. Holds 5 oz\n")


def interactions(folder: DatasetFolder) -> list[tuple]:
    """Raw user, raw item, time, rating and split of every event, in the order of the file."""
    users, items = dict(table(folder.users)), dict(table(folder.items, "item, raw_id"))
    return [(users[user], items[item], *rest) for user, item, *rest in table(folder.interactions)]


def test_the_files_read_back_as_the_same_interactions(tmp_path):
    rng = random.Random(1)
    names = ["0001", "NA", "null", "1e5", "Zoë 日本", '"quoted"', "a,b", "back\\slash", "nan", "'", "#1", " blank "]
    events = [(rng.choice(names), rng.choice(names), rng.randrange(6), rng.randrange(10) / 2) for _ in range(300)]
    metadata = [repr({"asin": name, "title": f"Title of {name}"}) for name in names]
    options = written(tmp_path, events, metadata)
    back = make_options(tmp_path / "back", "--dataset", "again", "--interactions", str(tmp_path / "atomic/Baby.inter"),
                        "--items", str(tmp_path / "atomic/Baby.item"), "--title_column", "title",
                        "--min_user_interactions=0", "--min_item_interactions=0")
    process(back, COMMAND)
    assert interactions(back.folder) == interactions(options.folder)
    assert table(back.folder.users) == table(options.folder.users)
    assert sorted(table(back.folder.items, "raw_id, title")) == sorted(table(options.folder.items, "raw_id, title"))


def test_the_files_tell_their_source(tmp_path):
    written(tmp_path, [(user, "x", time) for user in "ab" for time in range(3)])
    options = make_options(tmp_path / "back", "--raw_dir", str(tmp_path / "atomic"))
    assert options.source == "local"


@pytest.mark.slow
@pytest.mark.parametrize("raw_id", ["a\tb", "a\nb", "a\rb"])
@pytest.mark.parametrize("side", ["users", "items"])
def test_an_id_with_a_tab_or_line_break_is_refused(tmp_path, raw_id, side):
    pair = {"users": (raw_id, "x"), "items": ("b", raw_id)}[side]
    events = [(*pair, 1), *[(user, "x", time) for user in "cd" for time in range(3)]]
    with refused(DataError, tmp_path / "data" / "Baby" / f"{side}.parquet", names=[repr(raw_id)]):
        written(tmp_path, events)
    assert not (tmp_path / "atomic").exists()


def test_reused_tables_are_exported_too(tmp_path):
    events = [(user, "x", time) for user in "ab" for time in range(3)]
    run(tmp_path, events)
    written(tmp_path, events)
    assert (tmp_path / "atomic" / "Baby.inter").exists()


def test_changed_tables_are_not_exported(tmp_path):
    run(tmp_path, EVENTS)
    users = tmp_path / "data" / "Baby" / "users.parquet"
    content = users.read_bytes()
    users.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with refused(ArtifactError, users, fix=["2_process.sh"]):
        export(make_options(tmp_path / "data", "--export_recbole", str(tmp_path / "atomic")))
    assert not (tmp_path / "atomic").exists()


def test_a_file_in_place_of_the_folder_is_refused(tmp_path):
    (tmp_path / "atomic").touch()
    with refused(ConfigError, f"--export_recbole {tmp_path / 'atomic'}"):
        written(tmp_path, [("a", "x", 1)])
    assert not (tmp_path / "data").exists()


EVENTS = [(user, "x", time) for user in "ab" for time in range(3)]


def test_an_export_replaces_only_an_earlier_export(tmp_path):
    written(tmp_path, EVENTS)
    written(tmp_path, EVENTS)
    items = tmp_path / "atomic" / "Baby.item"
    for content, refused_at in ((None, "Baby.inter"), ("item_id:token\tmovie_title:token_seq\n", "Baby.item")):
        items.unlink() if content is None else items.write_text(content)
        with refused(ConfigError, f"--export_recbole {tmp_path / 'atomic' / refused_at}"):
            written(tmp_path, EVENTS)


def test_a_raw_file_is_not_replaced_by_its_export(tmp_path):
    written(tmp_path, EVENTS)
    raw = tmp_path / "atomic" / "Baby.inter"
    before = raw.read_bytes()
    options = make_options(tmp_path / "back", "--interactions", str(raw), "--items", str(raw.with_suffix(".item")),
                           "--title_column", "title", "--export_recbole", str(tmp_path / "atomic"))
    with refused(ConfigError, f"--export_recbole {tmp_path / 'atomic'}", names=[raw]):
        process(options, COMMAND)
    assert raw.read_bytes() == before
