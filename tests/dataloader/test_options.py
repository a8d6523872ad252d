"""The flags of the data part, and the real commands' answer to wrong ones."""

import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

from common.config import load_yaml
from common.errors import ConfigError
from dataloader.options import CONFIGS, make_parser, source_configs
from dataloader.process import process
from tests.dataloader.helpers import make_options, process_options, review, run_here, write_gz
from tests.dataloader.processing import COMMAND

ROOT = Path(__file__).resolve().parents[2]


def refused(tmp_path, *flags: str) -> str:
    with pytest.raises(ConfigError) as error:
        process_options(tmp_path / "data", *flags)
    assert error.value.exit_code == 2
    assert list(tmp_path.glob("data")) == []
    return str(error.value)


def command(tmp_path, *words: str) -> subprocess.CompletedProcess:
    environment = {**os.environ, "PYTHON": sys.executable, "PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"}
    return subprocess.run([*words, "--data_root", str(tmp_path / "data")], cwd=tmp_path, env=environment,
                          capture_output=True, text=True, check=False)


STEPS = ("download", "figures", "process", "text_embedding", "image_embedding", "fusion", "pipeline")


@pytest.mark.parametrize("step", STEPS)
def test_a_command_with_an_unknown_data_set_exits_with_2_and_writes_nothing(tmp_path, step):
    main = importlib.import_module(f"dataloader.{step}").main
    code, _, err = run_here(main, ["--dataset=Babby", "--data_root", str(tmp_path / "data")], tmp_path)
    assert code == 2
    assert err.startswith("error: --dataset Babby: ")
    assert "did you mean 'Baby'?" in err
    assert "Fix: " in err
    assert "Traceback" not in err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
@pytest.mark.parametrize("step", STEPS)
def test_a_wrong_flag_is_refused_before_torch_and_the_like_are_loaded(tmp_path, step):
    done = command(tmp_path, sys.executable, "-P", "-X", "importtime", "-m", f"dataloader.{step}", "--tempalte=td")
    assert done.returncode == 2
    assert "error: --tempalte: no such flag. did you mean '--template'?" in done.stderr
    imported = {line.split("|")[-1].strip() for line in done.stderr.splitlines() if line.startswith("import time:")}
    assert not imported & {"torch", "transformers", "sentence_transformers", "sklearn", "scipy", "PIL"}


@pytest.mark.slow
def test_the_script_of_the_data_part_stops_at_the_first_step_that_fails(tmp_path):
    done = command(tmp_path, "bash", str(ROOT / "dataloader" / "run_pipeline.sh"), "--dataset", "Babby")
    assert done.returncode == 2
    assert done.stderr.count("error: ") == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("name", "nearest"), [("baby", "Baby"), ("ml100k", "ml-100k"),
                                               ("Sports_Outdoors", "Sports_and_Outdoors"),
                                               ("Industrial_Scientific", "Industrial_and_Scientific")])
def test_an_unknown_data_set_names_the_nearest_real_one(tmp_path, name, nearest):
    message = refused(tmp_path, "--dataset", name)
    assert f"did you mean {nearest!r}?" in message
    assert message.endswith(f"Fix: --dataset {nearest}")


@pytest.mark.parametrize(("flags", "fix"), [
    (("--dataset=Babby", "--source=amazon14"), "--dataset Baby"), (("--template=td2",), "--template td")])
def test_a_fix_names_the_nearest_name(tmp_path, flags, fix):
    assert refused(tmp_path, *flags).endswith(f"Fix: {fix}")


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
def test_a_data_set_comes_from_the_first_source_that_has_it(tmp_path, flags, source):
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
def test_a_folder_of_raw_files_tells_its_source_by_itself(tmp_path, files, source):
    for name, line in files.items():
        if name.endswith(".gz"):
            write_gz(tmp_path / "raw" / name, [line])
        else:
            (tmp_path / "raw").mkdir(exist_ok=True)
            (tmp_path / "raw" / name).write_text(line)
    options = process_options(tmp_path / "data", "--dataset", "Shop", "--raw_dir", str(tmp_path / "raw"))
    assert (options.source, options.raw, options.downloads) == (source, tmp_path / "raw", False)


def test_the_archive_of_a_folder_tells_that_it_is_movielens(tmp_path):
    (tmp_path / "ml-1m.zip").touch()
    assert process_options(tmp_path / "data", "--dataset", "ml-1m", "--raw_dir", str(tmp_path)).source == "movielens"


def test_a_folder_that_tells_nothing_goes_by_the_name_of_the_data_set(tmp_path):
    (tmp_path / "raw").mkdir()
    raw = ("--raw_dir", str(tmp_path / "raw"))
    assert process_options(tmp_path / "data", "--dataset", "Beauty", *raw).source == "amazon14"
    message = refused(tmp_path, "--dataset", "My_Shop", *raw)
    assert "holds nothing that tells where My_Shop is from" in message
    assert "--interactions FILE" in message


def test_own_files_are_a_data_set_of_any_name(tmp_path):
    (tmp_path / "events.csv").touch()
    options = process_options(tmp_path / "data", "--dataset", "my.shop", "--interactions", str(tmp_path / "events.csv"))
    assert (options.source, options.raw, options.downloads) == ("local", tmp_path, False)


def test_a_data_set_that_is_processed_keeps_its_source(tmp_path):
    events = [review(user, "x", time) for user in "ab" for time in range(3)]
    write_gz(tmp_path / "raw" / "Automotive.json.gz", events)
    flags = ("--dataset", "Automotive", "--min_user_interactions=0", "--min_item_interactions=0")
    process(process_options(tmp_path, *flags, "--raw_dir", str(tmp_path / "raw"), "--source", "amazon18"), COMMAND)
    assert process_options(tmp_path, "--dataset", "Automotive").source == "amazon18"
    assert process_options(tmp_path, "--dataset", "Automotive", "--source", "amazon14").source == "amazon14"


def test_a_source_that_lacks_the_data_set_is_an_error_that_names_it(tmp_path):
    message = refused(tmp_path, "--dataset", "Baby", "--source", "amazon18")
    assert "amazon18 has no such data set" in message
    assert "Fix: correct the name or --source, or name the files: --raw_dir DIR" in message
    assert "its files are not named" in refused(tmp_path, "--dataset", "Baby", "--source", "local")


def test_an_unknown_source_lists_the_real_ones(tmp_path):
    message = refused(tmp_path, "--source", "amazon15")
    assert all(source in message for source in source_configs())


@pytest.mark.parametrize("flag", ["--dataset", "--dataset_name", "--category"])
def test_the_data_set_goes_by_three_flags_and_both_spellings(tmp_path, flag):
    assert process_options(tmp_path, flag, "Beauty").folder.name == "Beauty"
    assert process_options(tmp_path, f"{flag}=Beauty").folder.name == "Beauty"


def test_a_raw_dir_that_is_not_there_is_an_error(tmp_path):
    missing = tmp_path / "missing"
    assert refused(tmp_path, "--raw_dir", str(missing)).startswith(f"--raw_dir {missing}: is not a folder")


@pytest.mark.parametrize("flag", ["--raw_dir", "--interactions", "--items"])
def test_a_folder_is_no_file_and_a_file_no_folder(tmp_path, flag):
    path = tmp_path
    if flag == "--raw_dir":
        path = tmp_path / "reviews_Baby_5.json.gz"
        path.touch()
    assert f"is not a {'folder' if flag == '--raw_dir' else 'file'}" in refused(tmp_path, flag, str(path))


@pytest.mark.parametrize("flag", ["--user_column", "--time_column", "--item_id_column", "--title_column",
                                  "--image_column"])
@pytest.mark.parametrize("source", [(), ("--source", "amazon14")])
def test_the_columns_of_own_files_have_no_meaning_for_another_source(tmp_path, flag, source):
    assert f"{flag}: has no meaning for Baby, which is from amazon14" in refused(tmp_path, flag, "c", *source)


def test_own_items_without_own_interactions_are_not_passed_over(tmp_path):
    (tmp_path / "items.csv").touch()
    assert "--items: has no meaning for Baby" in refused(tmp_path, "--items", str(tmp_path / "items.csv"))


def test_the_columns_of_own_files_are_those_that_are_named(tmp_path):
    (tmp_path / "e.csv").touch()
    local = process_options(tmp_path / "data", "--interactions", str(tmp_path / "e.csv"), "--item_column=ware",
                         "--rating_column=stars", "--title_column=name").local
    assert local.columns == {"user": None, "item": "ware", "time": None, "rating": "stars"}
    assert (local.item_columns["item"], local.item_columns["title"], local.item_columns["brand"]) == (
        "ware", "name", None)
    assert process_options(tmp_path / "data", "--interactions", str(tmp_path / "e.csv"), "--item_column=ware",
                        "--item_id_column=nr").local.item_columns["item"] == "nr"


def test_the_minima_come_from_the_source_or_from_the_flags_and_0_counts(tmp_path):
    processing = process_options(tmp_path).processing
    assert (processing.min_user_interactions, processing.min_item_interactions) == (5, 5)
    processing = process_options(tmp_path, "--min_user_interactions=0", "--min_item_interactions", "3").processing
    assert (processing.min_user_interactions, processing.min_item_interactions) == (0, 3)


def test_the_defaults_of_processing_are_those_that_the_papers_use(tmp_path):
    processing = process_options(tmp_path).processing
    assert (processing.min_rating, processing.duplicates, processing.split) == (None, "keep", "leave_one_out")
    assert processing.template == ("{title}", "{description}")
    assert process_options(tmp_path, "--dataset", "Baby_Products").processing.time_unit == "ms"


@pytest.mark.parametrize(("flags", "unused"), [
    ((), {"split_ratios", "split_dates"}),
    (("--split=temporal",), {"split_dates"}),
    (("--split=temporal", "--split_dates=2014-01-01,2014-03-01"), {"split_ratios"}),
])
def test_only_settings_that_count_are_recorded(tmp_path, flags, unused):
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
def test_modalities_and_suffix_follow_from_one_another(tmp_path, flags, modalities, suffix, text_suffix):
    options = make_options(tmp_path, *flags)
    assert (options.modalities, options.suffix, options.text.target.suffix) == (modalities, suffix, text_suffix)


def test_the_transform_belongs_to_the_embedding_that_the_next_stage_reads(tmp_path):
    options = make_options(tmp_path, "--suffix=fused-concat", "--pca=64", "--whiten", "--l2")
    assert options.fusion.target.transform == (64, True, False, True)
    assert options.text.target.transform == (None, False, False, False)


def test_the_parts_of_a_fusion_weigh_the_same_unless_they_are_told_otherwise(tmp_path):
    assert make_options(tmp_path).fusion[1:4] == (("td", "image"), (1.0, 1.0), 128)
    assert make_options(tmp_path, "--fusion_parts=td,cf,image", "--fusion_weights=1,0.5,2").fusion[1:4] == (
        ("td", "cf", "image"), (1.0, 0.5, 2.0), 128)


WRONG = [
    ("--min_user_interactions=-1", "--min_user_interactions: is -1. it must be at least 0"),
    ("--min_item_interactions=five", "--min_item_interactions"),
    ("--min_rating=nan", "--min_rating: is nan. it must be finite"),
    ("--min_rating=inf", "--min_rating: is inf. it must be finite"),
    ("--min_rating=good", "--min_rating"),
    ("--duplicates=some", "--duplicates"),
    ("--split=random", "--split"),
    ("--split=temporal --split_ratios=0.8,0.2", "--split_ratios: is 0.8,0.2. wanted: 3 numbers with commas"),
    ("--split=temporal --split_ratios=0.8,0.1,x", "wanted: 3 numbers with commas"),
    ("--split=temporal --split_ratios=0.8,0.1,nan", "wanted: 3 numbers with commas"),
    ("--split=temporal --split_ratios=0.8,0.1,0.2", "wanted: three shares above 0 that sum to 1"),
    ("--split=temporal --split_ratios=1,0,0", "wanted: three shares above 0 that sum to 1"),
    ("--split=temporal --split_ratios=1.2,-0.1,-0.1", "wanted: three shares above 0 that sum to 1"),
    ("--split_ratios=0.8,0.1,0.1", "--split_ratios: belongs to the temporal split. Fix: --split temporal"),
    ("--split_dates=2014-01-01,2014-03-01", "--split_dates: belongs to the temporal split. Fix: --split temporal"),
    ("--split=temporal --split_dates=2014-01-01", "wanted: two dates, the earlier first"),
    ("--split=temporal --split_dates=2014-03-01,2014-01-01", "wanted: two dates, the earlier first"),
    ("--split=temporal --split_dates=2014-01-01,2014-01-01", "wanted: two dates, the earlier first"),
    ("--split=temporal --split_dates=2014-02-30,2014-03-01", "wanted: two dates, the earlier first"),
    ("--split=temporal --split_dates=2014-01-01T05:00,2014-01-01T06:00+02:00", "wanted: two dates, the earlier"),
    ("--split=temporal --split_dates=", "wanted: two dates, the earlier first"),
    ("--split=temporal --split_ratios=0.8,0.1,0.1 --split_dates=2014-01-01,2014-03-01",
     "--split_dates: takes the place of --split_ratios"),
    ("--time_unit=minutes", "--time_unit"),
    ("--bad_lines=ignore", "--bad_lines"),
    ("--memory_limit=lots", "--memory_limit: is lots. wanted: a size, such as 2GB"),
    ("--memory_limit=2", "wanted: a size, such as 2GB"),
    ("--memory_limit=0GB", "wanted: a size, such as 2GB"),
    ("--memory_limit=-1GB", "wanted: a size, such as 2GB"),
    ("--adopt", "--adopt: belongs to --check"),
    ("--check --export_recbole=somewhere", "--export_recbole: has no meaning beside --check"),
    ("--modalities=video", "no such modality as 'video'"),
    ("--modalities=", "no such modality as ''"),
    ("--modalities=text,", "no such modality as ''"),
    ("--modalities=text --suffix=image", "--modalities text: lacks image. --suffix image needs it"),
    ("--modalities=image --suffix=td", "--modalities image: lacks text. --suffix td needs it"),
    ("--modalities=text --suffix=fused-pca", "--modalities text: lacks image. --suffix fused-pca needs it"),
    ("--suffix=a/b", "is not a name"),
    ("--suffix=", "is not a name"),
    ("--api_rate=0", "--api_rate: is 0.0. it must be above 0"),
    ("--api_rate=nan", "--api_rate: is nan. it must be above 0"),
    ("--image_rate=-1", "--image_rate: is -1.0. it must be above 0"),
    ("--min_image_side=0", "--min_image_side: is 0. it must be above 0"),
    ("--missing_images=zero", "--missing_images"),
    ("--pca=0", "--pca: is 0. it must be above 0"),
    ("--whiten", "--whiten: needs the number of dimensions. Fix: --pca N --whiten"),
    ("--fusion_parts=td", "wanted: two different embeddings or more, such as td,image"),
    ("--fusion_parts=td,td", "wanted: two different embeddings or more, such as td,image"),
    ("--fusion_parts=td,fused-pca", "wanted: two different embeddings or more, such as td,image"),
    ("--fusion_parts=td,../x", "is not a name"),
    ("--fusion_weights=1", "--fusion_weights: is 1. wanted: 2 numbers with commas"),
    ("--fusion_weights=1,0", "--fusion_weights: is 1,0. wanted: weights above 0"),
    ("--fusion_weights=1,nan", "wanted: 2 numbers with commas"),
    ("--fusion_weights=", "wanted: 2 numbers with commas"),
    ("--fusion_dim=0", "--fusion_dim: is 0. it must be above 0"),
    ("--seed=-1", "--seed: is -1. it must be from 0 to 2147483647"),
    ("--seed=2147483648", "--seed: is 2147483648. it must be from 0 to 2147483647"),
    ("--device=gpu", "--device: is gpu. wanted: auto, cpu, cuda or cuda:<n>"),
    ("--dataset=../Baby", "is not a name"),
    ("--dataset=", "is not a name"),
    ("--data=Baby", "--data: no such flag"),
    ("--mirror=name:secret@host/folder", "--mirror: is not an http or https address. Fix"),
    ("--mirrors=http://127.0.0.1", "did you mean '--mirror'?"),
    ("Baby", "Baby: no such flag"),
]


@pytest.mark.parametrize(("flags", "message"), WRONG, ids=[flags for flags, _message in WRONG])
def test_a_wrong_flag_or_value_is_refused(tmp_path, flags, message):
    assert message in refused(tmp_path, *flags.split())


@pytest.mark.parametrize(("flags", "key", "value"), [
    ("--memory_limit=1.5GiB", "memory_limit", "1.5GiB"), ("--memory_limit=500mb", "memory_limit", "500mb"),
    ("--device=cuda:1", "device", "cuda:1"), ("--device=cpu", "device", "cpu"),
    ("--seed=2147483647", "seed", 2**31 - 1), ("--min_rating=-2", "min_rating", -2.0),
    ("--split=temporal --split_ratios=.5,.25,.25", "split_ratios", (0.5, 0.25, 0.25)),
    ("--split=temporal --split_dates=2014-01-01,2014-01-01T00:00:01", "split_dates",
     ("2014-01-01", "2014-01-01T00:00:01"))])
def test_a_value_at_the_edge_is_taken(tmp_path, flags, key, value):
    options = make_options(tmp_path, *flags.split())
    records = (options.process, options.process.processing, options.fusion)
    assert next(getattr(record, key) for record in records if hasattr(record, key)) == value


def test_the_help_names_every_flag_and_says_what_it_is_for():
    parser = make_parser("for a test")
    text = parser.format_help()
    assert all(flag in text for flag in parser.flags())
    assert all(action.help for action in parser._actions)


@pytest.mark.parametrize("source", list(source_configs()))
def test_every_source_gives_each_file_an_address_for_every_data_set(source):
    config, _ = load_yaml(CONFIGS / f"{source}.yaml")
    assert len(set(config["datasets"])) == len(config["datasets"])
    for name, entry in config["files"].items():
        addresses = entry["addresses"] if isinstance(entry, dict) else entry
        assert addresses
        assert all(a.startswith("https://") and a.endswith("/" + name) for a in addresses)
    assert set(config["expected"]) <= set(config["datasets"])
