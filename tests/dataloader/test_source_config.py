"""Flags of a dataset of one's own: remembered in source.yaml, or taken from --source_config."""

from pathlib import Path

import pytest
import yaml

from common.artifacts import DatasetFolder, load_meta
from common.errors import ConfigError
from dataloader.flags import REMEMBERED, fill_flags
from dataloader.process import main
from tests.dataloader.helpers import logged, make_options, table, write_baby
from tests.errors import refused

START = 10**12  # milliseconds
EVENTS = ["who,what,when,stars"] + [f"{user},{item},{START + 1000 * time},5"
                                    for user, items in (("a", "xyx"), ("b", "yxy"))
                                    for time, item in enumerate(items, start=1)]
FLAGS = ["--user_column=who", "--item_column=what", "--time_column=when", "--time_unit=ms",
         "--min_user_interactions=2", "--min_item_interactions=0"]


@pytest.fixture
def events(tmp_path) -> Path:
    path = tmp_path / "events.csv"
    path.write_text("\n".join(EVENTS) + "\n")
    return path


@pytest.fixture
def process(tmp_path):
    """flags -> the folder of the dataset `shop` after step 2."""
    def run(*flags: str):
        words = ["--dataset=shop", f"--data_root={tmp_path / 'data'}", *flags]
        main(words)
        return DatasetFolder(tmp_path / "data", "shop")

    return run


def test_the_next_command_needs_no_flags(events, process):
    folder = process(f"--interactions={events}", *FLAGS)
    assert yaml.safe_load(folder.source_flags.read_text()) == {
        "source": "local", "interactions": str(events), "user_column": "who", "item_column": "what",
        "time_column": "when", "time_unit": "ms", "min_user_interactions": 2, "min_item_interactions": 0}
    before = {path: path.stat().st_mtime_ns for path in folder.path.iterdir()}
    process()
    assert {path: path.stat().st_mtime_ns for path in folder.path.iterdir()} == before
    events.write_text("\n".join(EVENTS[:-1]) + "\n")
    process()
    assert len(table(folder.interactions)) == len(EVENTS) - 2


def test_flags_on_the_command_line_win_and_are_remembered(events, process):
    process(f"--interactions={events}", *FLAGS)
    folder = process("--split=temporal", "--split_ratios=0.4,0.3,0.3")
    process()
    assert load_meta(folder.interactions, "")["settings"]["split_ratios"] == [0.4, 0.3, 0.3]
    process("--split_dates=2001-09-09T01:46:42,2001-09-09T01:46:43")  # replaces the remembered ratios
    assert load_meta(folder.interactions, "")["split_name"] == "temporal"
    process("--split=leave_one_out")  # the default, so that nothing but the command line says so
    assert load_meta(folder.interactions, "")["split_name"] == "leave_one_out"
    assert "split" not in yaml.safe_load(folder.source_flags.read_text())


def test_the_whole_job_obeys_a_default_on_the_command_line(events, process, tmp_path, monkeypatch):
    import sys

    monkeypatch.setattr(sys, "path", sys.path[:])
    import run_pipeline

    process(f"--interactions={events}", *FLAGS, "--split=temporal", "--split_ratios=0.4,0.3,0.3")
    words = ["--dataset=shop", f"--data_root={tmp_path / 'data'}", "--split=leave_one_out"]
    parser = run_pipeline.make_parser()
    args = run_pipeline.parse(parser, words, open_ended=True)
    assert "--user_column=who" in fill_flags(args, words)
    steps = run_pipeline.plan(parser, args, tmp_path / "list")
    [step] = [step for step in steps if "dataloader.process" in step.command]
    flags = step.command[step.command.index("dataloader.process") + 1:]
    options = make_options(tmp_path / "data", *[flag for flag in flags if not flag.startswith("--data_root")])
    assert options.process.processing.split == "leave_one_out"
    assert options.process.local.columns["user"] == "who"


def test_the_form_of_times_and_missing_values_are_remembered(events, process):
    dates = numbers = events.read_text()
    for minute in (1, 2, 3):
        dates = dates.replace(str(START + 1000 * minute), f"28/02/2014 00:0{minute}")
    events.write_text(dates)
    flags = [flag for flag in FLAGS if "time_unit" not in flag]
    folder = process(f"--interactions={events}", *flags, "--time_format=%d/%m/%Y %H:%M", "--missing_values=N/A,-")
    remembered = yaml.safe_load(folder.source_flags.read_text())
    assert (remembered["time_format"], remembered["missing_values"]) == ("%d/%m/%Y %H:%M", "N/A,-")
    before = table(folder.interactions)
    process("--force")
    assert table(folder.interactions) == before
    events.write_text(numbers)
    process("--time_unit=ms")  # replaces the form
    assert "time_format" not in yaml.safe_load(folder.source_flags.read_text())
    assert [row[2] for row in table(folder.interactions)] == [START // 1000 + n for n in (1, 2, 3)] * 2
    events.write_text(dates)
    process("--time_format=%d/%m/%Y %H:%M")  # replaces the unit
    assert table(folder.interactions) == before


def test_a_config_file_fills_flags_and_its_paths_are_relative(events, process, tmp_path):
    config = tmp_path / "shop.yaml"
    config.write_text("interactions: events.csv\nuser_column: who\nitem_column: what\ntime_column: when\n"
                      "time_unit: ms\nmin_user_interactions: 3\nmin_item_interactions: 0\n")
    folder = process(f"--source_config={config}", "--min_user_interactions=2")
    assert load_meta(folder.interactions, "")["settings"]["min_user_interactions"] == 2
    assert yaml.safe_load(folder.source_flags.read_text())["interactions"] == str(events)


def test_remembered_files_may_be_deleted_afterwards(events, process, caplog):
    folder = process(f"--interactions={events}", *FLAGS)
    content = folder.interactions.read_bytes()
    events.unlink()
    process()
    assert folder.interactions.read_bytes() == content
    assert logged(caplog, "--user_column=who")


def test_other_files_replace_the_remembered_ones(events, process, tmp_path):
    process(f"--interactions={events}", *FLAGS)
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "interactions.csv").write_text("\n".join(EVENTS[:4] + [f"c,x,{START},1"]) + "\n")
    folder = process(f"--raw_dir={tmp_path / 'new'}", "--min_user_interactions=0")
    assert len(table(folder.interactions)) == 4
    assert "interactions" not in yaml.safe_load(folder.source_flags.read_text())


def test_files_of_another_source_need_no_remembered_columns(events, process, tmp_path):
    process("--dataset=Baby", f"--interactions={events}", *FLAGS)
    write_baby(tmp_path / "raw", [(user, item, 10**9 + n) for user in "ab" for n, item in enumerate("xyx")])
    process("--dataset=Baby", f"--raw_dir={tmp_path / 'raw'}", "--time_unit=s")
    assert yaml.safe_load((tmp_path / "data" / "Baby" / "source.yaml").read_text()) == {
        "source": "amazon14", "raw_dir": str(tmp_path / "raw"), "min_user_interactions": 2,
        "min_item_interactions": 0, "time_unit": "s"}


def test_nothing_is_remembered_on_request(events, process):
    process(f"--interactions={events}", *FLAGS)
    with pytest.raises(Exception, match="user_id"):
        process("--source_config=none", f"--interactions={events}")


@pytest.mark.parametrize(("line", "names"), [
    ("user_colum: who", ["'user_column'"]), ("time_unit: hours", ["'hours'", "ms"]),
    ("min_user_interactions: many", ["'many'"]), ("drop_items_without_text: 3", ["3"]), ("items: [a, b]", ["'a'"]),
    ("mirror: http://u:secret@host/", ["'mirror'"])])
def test_a_wrong_line_is_refused_with_its_place(events, process, tmp_path, line, names):
    config = tmp_path / "shop.yaml"
    config.write_text(f"interactions: events.csv\n{line}\n")
    with refused(ConfigError, f"{config}:2", names=names):
        process(f"--source_config={config}")


def test_secrets_and_one_time_flags_are_not_remembered():
    assert not {"mirror", "force", "check", "adopt", "api_url", "export_recbole"} & set(REMEMBERED)




@pytest.mark.parametrize("line", ["interactions: 5", "items: 5", "raw_dir: 5", "raw_dir: 2.5",
                                  f"min_rating: {'9' * 400}", "min_user_interactions: .inf"])
def test_a_value_of_wrong_type_is_named_with_its_line(tmp_path, process, line):
    path = tmp_path / "data" / "shop" / "source.yaml"
    path.parent.mkdir(parents=True)
    path.write_text(f"source: local\n{line}\n")
    for flags in ([], [f"--source_config={path}"]):
        with refused(ConfigError, f"{path}:2", names=[line.partition(":")[0]]):
            process(*flags)


def test_a_list_is_not_told_to_have_unknown_keys(tmp_path, process):
    path = tmp_path / "data" / "shop" / "source.yaml"
    path.parent.mkdir(parents=True)
    path.write_text("- source: local\n")
    with refused(ConfigError, f"{path}:1", fix=["key: value"]) as raised:
        process()
    assert "common" not in raised.value.fix
