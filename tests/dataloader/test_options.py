"""The flags of the data part, and the real commands' answer to wrong ones."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from common.config import load_yaml
from common.errors import ConfigError
from dataloader.options import CONFIGS, SOURCES
from tests.dataloader.helpers import make_options

ROOT = Path(__file__).resolve().parents[2]


def refused(tmp_path, *flags: str) -> str:
    with pytest.raises(ConfigError) as error:
        make_options(tmp_path / "data", *flags)
    assert error.value.exit_code == 2
    assert list(tmp_path.glob("data")) == []
    return str(error.value)


def command(tmp_path, *words: str) -> subprocess.CompletedProcess:
    environment = {**os.environ, "PYTHON": sys.executable, "PYTHONPATH": str(ROOT)}
    return subprocess.run([*words, "--data_root", str(tmp_path / "data")], cwd=tmp_path, env=environment,
                          capture_output=True, text=True, check=False)


@pytest.mark.parametrize("step", ["download", "process", "text_embedding"])
def test_a_command_with_an_unknown_data_set_exits_with_2_and_writes_nothing(tmp_path, step):
    done = command(tmp_path, sys.executable, "-P", "-m", f"dataloader.{step}", "--dataset=Babby")
    assert done.returncode == 2
    assert done.stderr.startswith("error: --dataset Babby: ")
    assert "did you mean 'Baby'?" in done.stderr
    assert "Fix: " in done.stderr
    assert "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_the_script_of_the_data_part_stops_at_the_first_step_that_fails(tmp_path):
    done = command(tmp_path, "bash", str(ROOT / "dataloader" / "run_pipeline.sh"), "--dataset", "Babby")
    assert done.returncode == 2
    assert done.stderr.count("error: ") == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("name", "nearest"), [("baby", "Baby"), ("ml100k", "ml-100k"),
                                               ("Sports_Outdoors", "Sports_and_Outdoors"),
                                               ("Industrial_Scientific", "Industrial_and_Scientific")])
def test_an_unknown_data_set_names_the_nearest_real_one(tmp_path, name, nearest):
    assert f"did you mean {nearest!r}?" in refused(tmp_path, "--dataset", name)


@pytest.mark.parametrize(("flags", "source"), [
    ((), "amazon14"),
    (("--dataset", "Automotive"), "amazon14"),
    (("--dataset", "Automotive", "--source", "amazon18"), "amazon18"),
    (("--dataset", "Industrial_and_Scientific"), "amazon18"),
    (("--dataset", "ml-100k"), "movielens"),
])
def test_a_data_set_comes_from_the_first_source_that_has_it(tmp_path, flags, source):
    options = make_options(tmp_path, *flags)
    assert options.source == source
    assert options.downloads
    assert options.raw.is_relative_to(options.folder.path)


def test_a_source_that_lacks_the_data_set_is_an_error_that_names_it(tmp_path):
    message = refused(tmp_path, "--dataset", "Baby", "--source", "amazon18")
    assert "amazon18 has no such data set" in message
    assert "Fix: correct the name, or --source" in message


def test_an_unknown_source_lists_the_real_ones(tmp_path):
    message = refused(tmp_path, "--source", "amazon15")
    assert all(source in message for source in SOURCES)


@pytest.mark.parametrize("flag", ["--dataset", "--dataset_name", "--category"])
def test_the_data_set_goes_by_three_flags_and_both_spellings(tmp_path, flag):
    assert make_options(tmp_path, flag, "Beauty").folder.name == "Beauty"
    assert make_options(tmp_path, f"{flag}=Beauty").folder.name == "Beauty"


def test_a_folder_of_raw_files_may_hold_a_data_set_of_any_name(tmp_path):
    options = make_options(tmp_path / "data", "--dataset", "My_Shop", "--raw_dir", str(tmp_path))
    assert options.raw == tmp_path
    assert not options.downloads
    assert options.config["reader"] == "amazon"


def test_a_raw_dir_that_is_not_there_is_an_error(tmp_path):
    missing = tmp_path / "missing"
    assert refused(tmp_path, "--raw_dir", str(missing)).startswith(f"--raw_dir {missing}: is not a folder")


def test_a_raw_dir_that_is_a_file_is_an_error(tmp_path):
    file = tmp_path / "reviews_Baby_5.json.gz"
    file.touch()
    assert "is not a folder" in refused(tmp_path, "--raw_dir", str(file))


def test_the_minima_come_from_the_source_or_from_the_flags_and_0_counts(tmp_path):
    assert make_options(tmp_path)[6:8] == (5, 5)
    options = make_options(tmp_path, "--min_user_interactions=0", "--min_item_interactions", "3")
    assert (options.min_user_interactions, options.min_item_interactions) == (0, 3)


@pytest.mark.parametrize(("flags", "message"), [
    (("--min_user_interactions=-1",), "--min_user_interactions: is -1. it must be at least 0"),
    (("--min_item_interactions", "five"), "--min_item_interactions"),
    (("--dataset", "../Baby"), "is not a name"),
    (("--dataset", ""), "is not a name"),
    (("--data", "Baby"), "--data: no such flag"),
    (("--mirrors", "http://127.0.0.1"), "did you mean '--mirror'?"),
    (("Baby",), "Baby: no such flag"),
])
def test_a_wrong_flag_or_value_is_refused(tmp_path, flags, message):
    assert message in refused(tmp_path, *flags)


@pytest.mark.parametrize("source", SOURCES)
def test_every_source_gives_each_file_an_address_for_every_data_set(source):
    config, _ = load_yaml(CONFIGS / f"{source}.yaml")
    assert len(set(config["datasets"])) == len(config["datasets"])
    for name, addresses in config["files"].items():
        assert addresses
        assert all(a.startswith("https://") and a.endswith("/" + name) for a in addresses)
    assert set(config["expected"]) <= set(config["datasets"])
