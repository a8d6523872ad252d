"""The flags of the data part, and how the commands refuse wrong ones."""

import importlib
import os
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import pytest

from common.config import load_yaml
from common.errors import ConfigError
from dataloader.flags import CONFIGS, make_parser, source_configs
from dataloader.process import process
from tests.dataloader.helpers import make_options, process_options, review, run_here, write_gz
from tests.dataloader.processing import COMMAND
from tests.errors import Outcome, refused

ROOT = Path(__file__).resolve().parents[2]


def refuse(tmp_path: Path, *flags: str, where: str | None, names: Iterable[object] = (),
           fix: Iterable[object] = ()) -> ConfigError:
    """Check that these flags are a ConfigError, raised before anything is written."""
    with refused(ConfigError, where, names=names, fix=fix) as raised:
        process_options(tmp_path / "data", *flags)
    assert not (tmp_path / "data").exists()
    return raised.value


def command(tmp_path: Path, *words: str) -> Outcome:
    environment = {**os.environ, "PYTHON": sys.executable, "PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run([*words, "--data_root", str(tmp_path / "data")], cwd=tmp_path, env=environment,
                          capture_output=True, text=True, check=False)
    return Outcome(done.returncode, done.stdout, done.stderr)


STEPS = ("download", "images", "process", "text_embedding", "image_embedding", "fusion", "pipeline")


@pytest.mark.parametrize("step", STEPS)
def test_every_step_refuses_an_unknown_dataset_and_writes_nothing(tmp_path, step):
    main = importlib.import_module(f"dataloader.{step}").main
    done = run_here(main, ["--dataset=Babby", "--data_root", str(tmp_path / "data")], tmp_path)
    done.check_error(ConfigError, "--dataset Babby", names=["'Baby'"], fix=["--dataset Baby"])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
@pytest.mark.parametrize("step", STEPS)
def test_a_wrong_flag_is_refused_before_torch_is_loaded(tmp_path, step):
    done = command(tmp_path, sys.executable, "-P", "-X", "importtime", "-m", f"dataloader.{step}", "--tempalte=td")
    done.check_error(ConfigError, "--tempalte", names=["'--template'"], fix=["--template=td"])
    imported = {line.split("|")[-1].strip() for line in done.err.splitlines() if line.startswith("import time:")}
    assert not imported & {"torch", "transformers", "sentence_transformers", "sklearn", "scipy", "PIL"}


@pytest.mark.slow
def test_the_data_script_stops_at_the_first_failed_step(tmp_path):
    done = command(tmp_path, "bash", str(ROOT / "dataloader" / "run_pipeline.sh"), "--dataset", "Babby")
    done.check_error(ConfigError, "--dataset Babby", names=["'Baby'"])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("flags", "name", "nearest"), [
    ([], "baby", "Baby"), ([], "ml100k", "ml-100k"), ([], "Sports_Outdoors", "Sports_and_Outdoors"),
    ([], "Industrial_Scientific", "Industrial_and_Scientific"), (["--source=amazon14"], "Babby", "Baby")])
def test_an_unknown_dataset_names_the_nearest_known_one(tmp_path, flags, name, nearest):
    error = refuse(tmp_path, "--dataset", name, *flags, where=f"--dataset {name}", names=[repr(nearest)])
    assert error.fix == f"--dataset {nearest}"


def test_an_unknown_template_names_the_nearest_known_one(tmp_path):
    assert refuse(tmp_path, "--template=td2", where="--template td2", names=["'td'"]).fix == "--template td"


@pytest.mark.parametrize(("flags", "source"), [
    ((), "amazon14"),
    (("--dataset", "Automotive"), "amazon14"),
    (("--dataset", "Automotive", "--source", "amazon18"), "amazon18"),
    (("--dataset", "Industrial_and_Scientific"), "amazon18"),
    (("--dataset", "All_Beauty"), "amazon18"),
    (("--dataset", "All_Beauty", "--source", "amazon23"), "amazon23"),
    (("--dataset", "Baby_Products"), "amazon23"),
    (("--dataset", "ml-100k"), "movielens"),
    (("--dataset", "ml-32m"), "movielens"),
])
def test_a_dataset_comes_from_the_first_source_that_has_it(tmp_path, flags, source):
    options = process_options(tmp_path, *flags)
    assert options.source == source
    assert options.downloads
    assert options.raw == options.folder.path / "raw" / source


METADATA = {"python": "{'asin': 'x', 'title': 'Cup'}", "json": '{"asin": "x", "title": "Cup"}'}


@pytest.mark.parametrize(("files", "source"), [
    ({"reviews_Shop_5.json.gz": "", "meta_Shop.json.gz": METADATA["python"]}, "amazon14"),
    ({"Shop_5.json.gz": "", "meta_Shop.json.gz": METADATA["json"]}, "amazon18"),
    ({"Shop.json.gz": "", "meta_Shop.json.gz": METADATA["json"]}, "amazon18"),
    ({"Shop.jsonl.gz": ""}, "amazon23"),
    ({"interactions.csv": ""}, "local"),
    ({"interactions.parquet": "", "items.csv": ""}, "local"),
    ({"Shop.inter": ""}, "local"),
])
def test_the_names_of_raw_files_tell_their_source(tmp_path, files, source):
    for name, line in files.items():
        if name.endswith(".gz"):
            write_gz(tmp_path / "raw" / name, [line])
        else:
            (tmp_path / "raw").mkdir(exist_ok=True)
            (tmp_path / "raw" / name).write_text(line)
    options = process_options(tmp_path / "data", "--dataset", "Shop", "--raw_dir", str(tmp_path / "raw"))
    assert (options.source, options.raw, options.downloads) == (source, tmp_path / "raw", False)


def test_an_archive_of_movielens_tells_its_source(tmp_path):
    (tmp_path / "ml-1m.zip").touch()
    assert process_options(tmp_path / "data", "--dataset", "ml-1m", "--raw_dir", str(tmp_path)).source == "movielens"


@pytest.mark.parametrize("name", ["interactions.csv", "reviews_Shop_5.json.gz", "Shop.json.gz", "Shop.inter"])
def test_a_named_pipe_is_not_a_raw_file(tmp_path, name):
    os.mkfifo(tmp_path / name)
    refuse(tmp_path, "--dataset", "Shop", "--raw_dir", str(tmp_path), where=f"--raw_dir {tmp_path}", names=["Shop"],
           fix=["--interactions FILE"])


def test_an_empty_folder_goes_by_the_name_of_the_dataset(tmp_path):
    (tmp_path / "raw").mkdir()
    raw = ("--raw_dir", str(tmp_path / "raw"))
    assert process_options(tmp_path / "data", "--dataset", "Beauty", *raw).source == "amazon14"
    refuse(tmp_path, "--dataset", "My_Shop", *raw, where=f"--raw_dir {tmp_path / 'raw'}", names=["My_Shop"],
           fix=["--source", "--interactions FILE"])


def test_own_files_are_a_dataset_of_any_name(tmp_path):
    (tmp_path / "events.csv").touch()
    options = process_options(tmp_path / "data", "--dataset", "my.shop", "--interactions", str(tmp_path / "events.csv"))
    assert (options.source, options.raw, options.downloads) == ("local", tmp_path, False)


def test_a_processed_dataset_keeps_its_source(tmp_path):
    events = [review(user, "x", time) for user in "ab" for time in range(3)]
    write_gz(tmp_path / "raw" / "Automotive.json.gz", events)
    flags = ("--dataset", "Automotive", "--min_user_interactions=0", "--min_item_interactions=0")
    process(process_options(tmp_path, *flags, "--raw_dir", str(tmp_path / "raw"), "--source", "amazon18"), COMMAND)
    assert process_options(tmp_path, "--dataset", "Automotive").source == "amazon18"
    assert process_options(tmp_path, "--dataset", "Automotive", "--source", "amazon14").source == "amazon14"


@pytest.mark.parametrize("source", ["amazon18", "local"])
def test_a_source_without_the_dataset_is_refused(tmp_path, source):
    refuse(tmp_path, "--dataset", "Baby", "--source", source, where="--dataset Baby", names=[source],
           fix=["--source", "--raw_dir DIR"])


def test_an_unknown_source_lists_the_known_ones(tmp_path):
    refuse(tmp_path, "--source", "amazon15", where=None, names=["amazon15", *source_configs()])


@pytest.mark.parametrize("flag", ["--dataset", "--dataset_name", "--category"])
def test_three_flags_in_two_spellings_name_the_dataset(tmp_path, flag):
    assert process_options(tmp_path, flag, "Beauty").folder.name == "Beauty"
    assert process_options(tmp_path, f"{flag}=Beauty").folder.name == "Beauty"


def test_a_missing_raw_dir_is_refused(tmp_path):
    missing = tmp_path / "missing"
    refuse(tmp_path, "--raw_dir", str(missing), where=f"--raw_dir {missing}")


@pytest.mark.parametrize("flag", ["--raw_dir", "--interactions", "--items"])
def test_a_folder_is_no_file_and_a_file_no_folder(tmp_path, flag):
    path = tmp_path
    if flag == "--raw_dir":
        path = tmp_path / "reviews_Baby_5.json.gz"
        path.touch()
    refuse(tmp_path, flag, str(path), where=f"{flag} {path}")


@pytest.mark.parametrize("flag", ["--user_column", "--time_column", "--item_id_column", "--title_column",
                                  "--image_column"])
@pytest.mark.parametrize("source", [(), ("--source", "amazon14")])
def test_other_sources_refuse_the_columns_of_own_files(tmp_path, flag, source):
    refuse(tmp_path, flag, "c", *source, where=flag, names=["Baby", "amazon14"], fix=["--source local"])


def test_other_sources_refuse_own_items(tmp_path):
    (tmp_path / "items.csv").touch()
    refuse(tmp_path, "--items", str(tmp_path / "items.csv"), where="--items", names=["Baby", "amazon14"],
           fix=["--source local"])


def test_flags_name_the_columns_of_own_files(tmp_path):
    (tmp_path / "e.csv").touch()
    local = process_options(tmp_path / "data", "--interactions", str(tmp_path / "e.csv"), "--item_column=ware",
                         "--rating_column=stars", "--title_column=name").local
    assert local.columns == {"user": None, "item": "ware", "time": None, "rating": "stars"}
    assert (local.item_columns["item"], local.item_columns["title"], local.item_columns["brand"]) == (
        "ware", "name", None)
    assert process_options(tmp_path / "data", "--interactions", str(tmp_path / "e.csv"), "--item_column=ware",
                        "--item_id_column=nr").local.item_columns["item"] == "nr"


def test_flags_replace_the_minima_of_the_source_even_with_0(tmp_path):
    processing = process_options(tmp_path).processing
    assert (processing.min_user_interactions, processing.min_item_interactions) == (5, 5)
    processing = process_options(tmp_path, "--min_user_interactions=0", "--min_item_interactions", "3").processing
    assert (processing.min_user_interactions, processing.min_item_interactions) == (0, 3)


def test_the_defaults_of_processing_are_those_of_the_papers(tmp_path):
    processing = process_options(tmp_path).processing
    assert (processing.min_rating, processing.duplicates, processing.split) == (None, "keep", "leave_one_out")
    assert processing.template == ("{title}", "{description}")
    assert process_options(tmp_path, "--dataset", "Baby_Products").processing.time_unit == "ms"


@pytest.mark.parametrize(("flags", "unused"), [
    ((), {"split_ratios", "split_dates"}),
    (("--split=temporal",), {"split_dates"}),
    (("--split=temporal", "--split_dates=2014-01-01,2014-03-01"), {"split_ratios"}),
])
def test_only_used_settings_are_recorded(tmp_path, flags, unused):
    processing = process_options(tmp_path, *flags).processing
    assert set(processing._asdict()) - set(processing.settings) == unused


@pytest.mark.parametrize(("flags", "modalities", "suffix", "text_suffix"), [
    ((), ("text",), "td", "td"),
    (("--modalities=text",), ("text",), "td", "td"),
    (("--modalities=image",), ("image",), "image", "td"),
    (("--modalities=text,image",), ("text", "image"), "fused-concat", "td"),
    (("--modalities=image,text",), ("text", "image"), "fused-concat", "td"),
    (("--modalities=text,text",), ("text",), "td", "td"),
    (("--modalities=text,image", "--suffix=td"), ("text", "image"), "td", "td"),
    (("--suffix=short",), ("text",), "short", "short"),
    (("--embedding_suffix=short",), ("text",), "short", "short"),
    (("--suffix=image",), ("image",), "image", "td"),
    (("--suffix=cf",), (), "cf", "td"),
    (("--suffix=cf", "--modalities=text"), ("text",), "cf", "td"),
    (("--suffix=fused-pca",), ("text", "image"), "fused-pca", "td"),
    (("--suffix=fused-pca", "--fusion_parts=td,cf"), ("text",), "fused-pca", "td"),
    (("--suffix=fused-pca", "--fusion_parts=image,cf"), ("image",), "fused-pca", "td"),
    (("--suffix=fused-align", "--fusion_parts=image,short"), ("text", "image"), "fused-align", "short"),
])
def test_modalities_and_suffix_follow_from_each_other(tmp_path, flags, modalities, suffix, text_suffix):
    options = make_options(tmp_path, *flags)
    assert (options.modalities, options.suffix, options.text.target.suffix) == (modalities, suffix, text_suffix)


def test_the_transform_belongs_to_the_embedding_of_the_next_stage(tmp_path):
    options = make_options(tmp_path, "--suffix=fused-concat", "--pca=64", "--whiten", "--l2")
    assert options.fusion.target.transform == (64, True, False, True)
    assert options.text.target.transform == (None, False, False, False)


def test_the_parts_of_a_fusion_weigh_the_same_by_default(tmp_path):
    assert make_options(tmp_path).fusion[1:4] == (("td", "image"), (1.0, 1.0), 128)
    flags = ("--suffix=fused-concat", "--fusion_parts=td,cf,image", "--fusion_weights=1,0.5,2")
    assert make_options(tmp_path, *flags).fusion[1:4] == (
        ("td", "cf", "image"), (1.0, 0.5, 2.0), 128)


# The flags, the place of the error (None: of argparse's own, which names the program), and what the error names.
WRONG = [
    ("--min_user_interactions=-1", "--min_user_interactions", "-1", "0"),
    ("--min_item_interactions=five", None, "--min_item_interactions", "five"),
    ("--min_rating=nan", "--min_rating", "nan"),
    ("--min_rating=inf", "--min_rating", "inf"),
    ("--min_rating=good", None, "--min_rating", "good"),
    ("--duplicates=some", None, "--duplicates", "some", "keep", "exact", "user_item"),
    ("--split=random", None, "--split", "random", "leave_one_out", "temporal"),
    ("--split=temporal --split_ratios=0.8,0.2", "--split_ratios", "0.8,0.2", "3"),
    ("--split=temporal --split_ratios=0.8,0.1,x", "--split_ratios", "0.8,0.1,x", "3"),
    ("--split=temporal --split_ratios=0.8,0.1,nan", "--split_ratios", "0.8,0.1,nan", "3"),
    ("--split=temporal --split_ratios=0.8,0.1,0.2", "--split_ratios", "0.8,0.1,0.2"),
    ("--split=temporal --split_ratios=1,0,0", "--split_ratios", "1,0,0"),
    ("--split=temporal --split_ratios=1.2,-0.1,-0.1", "--split_ratios", "1.2,-0.1,-0.1"),
    ("--split=temporal --split_dates=2014-01-01", "--split_dates", "2014-01-01"),
    ("--split=temporal --split_dates=2014-03-01,2014-01-01", "--split_dates", "2014-03-01,2014-01-01"),
    ("--split=temporal --split_dates=2014-01-01,2014-01-01", "--split_dates", "2014-01-01,2014-01-01"),
    ("--split=temporal --split_dates=2014-02-30,2014-03-01", "--split_dates", "2014-02-30,2014-03-01"),
    ("--split=temporal --split_dates=2014-01-01T05:00,2014-01-01T06:00+02:00", "--split_dates",
     "2014-01-01T05:00,2014-01-01T06:00+02:00"),
    ("--split=temporal --split_dates=", "--split_dates"),
    ("--split=temporal --split_ratios=0.8,0.1,0.1 --split_dates=2014-01-01,2014-03-01", "--split_dates",
     "--split_ratios"),
    ("--time_unit=minutes", None, "--time_unit", "minutes", "'s'", "'ms'", "'us'", "'date'"),
    ("--time_format=%Q", "--time_format", "%Q"),
    ("--time_format=dd/mm/yyyy", "--time_format", "dd/mm/yyyy"),
    ("--time_format=%d/%m/%Y --time_unit=s", "--time_format", "--time_unit s"),
    ("--bad_lines=ignore", None, "--bad_lines", "ignore", "fail", "skip"),
    ("--memory_limit=lots", "--memory_limit", "lots", "2GB"),
    ("--memory_limit=2", "--memory_limit", "2GB"),
    ("--memory_limit=0GB", "--memory_limit", "0GB", "2GB"),
    ("--memory_limit=-1GB", "--memory_limit", "-1GB", "2GB"),
    ("--check --export_recbole=somewhere", "--export_recbole", "--check"),
    ("--suffix=a/b", "--suffix", "'a/b'"),
    ("--suffix=", "--suffix", "''"),
    ("--api_rate=0", "--api_rate", "0"),
    ("--api_rate=nan", "--api_rate", "nan", "0"),
    ("--image_rate=-1", "--image_rate", "-1", "0"),
    ("--min_image_side=0", "--min_image_side", "0"),
    ("--missing_images=zero", None, "--missing_images", "zero", "mask", "error"),
    ("--pca=0", "--pca", "0"),
    ("--fusion_parts=td", "--fusion_parts", "td"),
    ("--fusion_parts=td,td", "--fusion_parts", "td,td"),
    ("--fusion_parts=td,fused-pca", "--fusion_parts", "td,fused-pca"),
    ("--fusion_parts=td,../x", "--fusion_parts", "'../x'"),
    ("--fusion_weights=1", "--fusion_weights", "1", "2"),
    ("--fusion_weights=1,0", "--fusion_weights", "1,0"),
    ("--fusion_weights=1,nan", "--fusion_weights", "1,nan", "2"),
    ("--fusion_weights=", "--fusion_weights", "2"),
    ("--fusion_parts=td,cf", "--fusion_parts", "--suffix td", "fused-concat"),
    ("--suffix=cf --fusion_weights=1,2", "--fusion_weights", "--suffix cf", "fused-concat"),
    ("--fusion_dim=0", "--fusion_dim", "0"),
    ("--seed=-1", "--seed", "-1", "0", "2147483647"),
    ("--seed=2147483648", "--seed", "2147483648", "2147483647"),
    ("--device=gpu", "--device", "gpu", "auto", "cpu", "cuda"),
    ("--dataset=../Baby", "--dataset", "'../Baby'"),
    ("--dataset=", "--dataset", "''"),
    ("Baby", "Baby", "--dataset"),
]

# The flags, the place of the error, what its fix names, and what else it names.
WRONG_WITH_FIX = [
    ("--split_ratios=0.8,0.1,0.1", "--split_ratios", "--split temporal"),
    ("--split_dates=2014-01-01,2014-03-01", "--split_dates", "--split temporal"),
    ("--adopt", "--adopt", "--check --adopt"),
    ("--modalities=video", "--modalities video", "text,image", "'video'"),
    ("--modalities=", "--modalities ", "text,image", "''"),
    ("--modalities=text,", "--modalities text,", "text,image", "''"),
    ("--modalities=text --suffix=image", "--modalities text", "--modalities image", "--suffix image"),
    ("--modalities=image --suffix=td", "--modalities image", "--modalities text", "--suffix td"),
    ("--modalities=text --suffix=fused-pca", "--modalities text", "--modalities text,image", "--suffix fused-pca"),
    ("--whiten", "--whiten", "--pca N --whiten"),
    ("--data=Baby", "--data", "--dataset=Baby", "'--dataset'"),
    ("--mirror=name:secret@host/folder", "--mirror", "--mirror https://HOST/FOLDER"),
    ("--mirrors=http://127.0.0.1", "--mirrors", "--mirror=http://127.0.0.1", "'--mirror'"),
]


@pytest.mark.parametrize(("flags", "where", "fix", "names"), [
    *((flags, where, [], names) for flags, where, *names in WRONG),
    *((flags, where, [fix], names) for flags, where, fix, *names in WRONG_WITH_FIX),
], ids=[row[0] for row in (*WRONG, *WRONG_WITH_FIX)])
def test_a_wrong_flag_or_value_is_refused(tmp_path, flags, where, fix, names):
    error = refuse(tmp_path, *flags.split(), where=where, names=names, fix=fix)
    assert "secret" not in str(error)


@pytest.mark.parametrize(("flags", "key", "value"), [
    ("--memory_limit=1.5GiB", "memory_limit", "1.5GiB"), ("--memory_limit=500mb", "memory_limit", "500mb"),
    ("--device=cuda:1", "device", "cuda:1"), ("--device=cpu", "device", "cpu"),
    ("--seed=2147483647", "seed", 2**31 - 1), ("--min_rating=-2", "min_rating", -2.0),
    ("--split=temporal --split_ratios=.5,.25,.25", "split_ratios", (0.5, 0.25, 0.25)),
    ("--split=temporal --split_dates=2014-01-01,2014-01-01T00:00:01", "split_dates",
     ("2014-01-01", "2014-01-01T00:00:01"))])
def test_a_value_at_the_limit_is_accepted(tmp_path, flags, key, value):
    options = make_options(tmp_path, *flags.split())
    records = (options.process, options.process.processing, options.fusion)
    assert next(getattr(record, key) for record in records if hasattr(record, key)) == value


def test_the_help_explains_every_flag():
    parser = make_parser("for a test")
    text = parser.format_help()
    assert all(flag in text for flag in parser.flags())
    assert all(action.help for action in parser._actions)


@pytest.mark.parametrize("source", list(source_configs()))
def test_every_source_has_addresses_for_its_files(source):
    config, _ = load_yaml(CONFIGS / f"{source}.yaml")
    assert len(set(config["datasets"])) == len(config["datasets"])
    for name, entry in config["files"].items():
        addresses = entry["addresses"] if isinstance(entry, dict) else entry
        assert addresses
        assert all(a.startswith("https://") and a.endswith("/" + name) for a in addresses)
    assert set(config["expected"]) <= set(config["datasets"])
