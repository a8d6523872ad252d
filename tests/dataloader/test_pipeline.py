"""Which steps the data part and the whole job run, with which flags; and the real scripts on a user's own files."""

import argparse
import os
import shlex
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from common.cli import given_flags, parse
from common.errors import ConfigError
from dataloader.options import make_parser
from dataloader.pipeline import plan
from tests.dataloader.helpers import make_options, table, write_baby

ROOT = Path(__file__).resolve().parents[2]


def steps(tmp_path: Path, *flags: str) -> list[str]:
    """The modules of the data part's steps, in their order."""
    made = plan(make_options(tmp_path, *flags), list(flags))
    for step in made:
        assert step.command[-len(flags) or len(step.command):] == list(flags)  # every step gets all of them
    return [step.command[3].removeprefix("dataloader.") for step in made]


@pytest.mark.parametrize(("flags", "expected"), [
    ((), "download process text_embedding"),
    (("--modalities=text,image",), "download process figures text_embedding image_embedding fusion"),
    (("--modalities=image",), "download process figures image_embedding"),
    (("--suffix=image",), "download process figures image_embedding"),
    (("--suffix=cf",), "download process fusion"),
    (("--suffix=short",), "download process text_embedding"),
    (("--suffix=fused-align",), "download process figures text_embedding image_embedding fusion"),
    (("--suffix=fused-pca", "--fusion_parts=td,cf"), "download process text_embedding fusion"),
    (("--modalities=text,image", "--suffix=td"), "download process figures text_embedding image_embedding"),
    (("--check",), "process"),
    (("--check", "--modalities=text,image"), "process"),
])
def test_the_steps_are_those_that_the_suffix_and_the_modalities_need(tmp_path, flags, expected):
    assert " ".join(steps(tmp_path, *flags)) == expected


def test_every_step_is_numbered_by_a_script_of_its_own():
    modules = {"0_download_dataset.sh": "download", "1_load_figure.sh": "figures", "2_process.sh": "process",
               "3_get_text_emb.sh": "text_embedding", "4_get_image_emb.sh": "image_embedding",
               "5_fusion_embeddings.sh": "fusion", "run_pipeline.sh": "pipeline"}
    for script, name in modules.items():
        assert f"-m dataloader.{name} " in (ROOT / "dataloader" / script).read_text()


@pytest.fixture
def whole_job(monkeypatch) -> ModuleType:
    """run_pipeline.py of the root, which puts itself on the path as a script does."""
    monkeypatch.setattr(sys, "path", [str(ROOT), *sys.path])
    import run_pipeline

    return run_pipeline


def another_value(action: argparse.Action, folder: Path) -> list[str]:
    """The flag with a value that is not its default, in one of its spellings."""
    if action.nargs == 0:
        return [action.option_strings[-1]]
    if action.choices:
        value = next(choice for choice in action.choices if choice != action.default)
    else:
        value = {int: 7, float: 0.25, Path: folder / "a b" / action.dest}.get(action.type, f"x.{action.dest}")
    return [action.option_strings[-1], str(value)]


def test_every_flag_of_the_data_part_reaches_its_steps_from_the_root(whole_job, tmp_path):
    data, root = make_parser("for a test"), whole_job.make_parser()
    argv = [word for action in data._actions if action.dest != "help" for word in another_value(action, tmp_path)]
    forwarded = given_flags(root, parse(root, argv), data.destinations())
    assert parse(data, forwarded) == parse(data, argv)
    assert len(forwarded) == len(data.destinations()) > 50


def test_what_is_left_at_its_default_is_not_forwarded(whole_job):
    root = whole_job.make_parser()
    assert given_flags(root, parse(root, []), make_parser("").destinations()) == []


def whole_plan(whole_job: ModuleType, *flags: str) -> list[list[str]]:
    """The commands of the whole job, from the module or the script on."""
    parser = whole_job.make_parser()
    made = whole_job.plan(parser, parse(parser, list(flags), open_ended=True), Path("list"))
    return [[word.removeprefix(f"{ROOT}/") for word in step.command[3 if step.command[1] == "-P" else 1:]]
            for step in made]


def test_the_whole_job_goes_from_the_data_to_the_table(whole_job, tmp_path):
    data, floors = f"--data_root={tmp_path}", ["markov", "popularity"]
    codes = ["--quantizer_name", "rqvae", "--embedding_suffix", "td"]
    assert whole_plan(whole_job, "--data_root", str(tmp_path)) == [
        ["dataloader.download", data], ["dataloader.process", data], ["dataloader.text_embedding", data],
        ["quantization/main.py", *codes, data],
        *(["recommendation/main.py", "--model", model, *codes, data, "--run_list", "list"]
          for model in (*floors, "encoder_decoder")),
        ["recommendation.results", "--run_list", "list", *codes, data],
        ["quantization/main.py", "--explain", *codes, data]]


def test_configuration_keys_reach_the_stages_that_have_them(whole_job, tmp_path):
    made = whole_plan(whole_job, "--data_root", str(tmp_path), "--num_levels=4", "--num_beams", "3", "--top_k=30",
                      "--quantization.max_steps=5", "--recommendation.training_params.max_steps", "6")
    own = {" ".join(command[:3]): [word for word in command if word.startswith("--set=")] for command in made}
    assert own["quantization/main.py --quantizer_name rqvae"] == ["--set=num_levels=4", "--set=max_steps=5"]
    assert own["recommendation/main.py --model encoder_decoder"] == [
        "--set=num_beams=3", "--set=top_k=30", "--set=training_params.max_steps=6"]
    for baseline in ("markov", "popularity"):  # which has neither beams nor steps
        assert own[f"recommendation/main.py --model {baseline}"] == ["--set=top_k=30"]


def test_a_key_of_both_stages_needs_its_stage(whole_job, tmp_path):
    with pytest.raises(ConfigError) as raised:
        whole_plan(whole_job, "--data_root", str(tmp_path), "--max_steps=5")
    assert raised.value.where == "--max_steps"
    assert "--quantization.max_steps or --recommendation.max_steps" in raised.value.fix
    # k-means takes no step, so that only the recommender has the key
    made = whole_plan(whole_job, "--data_root", str(tmp_path), "--quantizer_name=rkmeans", "--max_steps=5")
    assert sum("--set=max_steps=5" in command for command in made) == 1


@pytest.mark.parametrize(("flags", "where"), [
    (("--num_beems=3",), "--num_beems"), (("--quantization.num_beams=3",), "--num_beams"),
    (("--recommendation.epochs=0",), "--epochs")])
def test_a_wrong_key_stops_the_whole_job_before_it_begins(whole_job, tmp_path, flags, where):
    with pytest.raises(ConfigError) as raised:
        whole_plan(whole_job, "--data_root", str(tmp_path), *flags)
    assert raised.value.where == where


def test_the_baselines_are_tested_by_the_rule_of_the_model(whole_job, tmp_path):
    made = whole_plan(whole_job, "--data_root", str(tmp_path), "--filter_seen", "--model=sasrec")
    recommenders = [command for command in made if command[0] == "recommendation/main.py"]
    assert [command[command.index("--model") + 1] for command in recommenders] == ["markov", "popularity", "sasrec"]
    assert all("--filter_seen" in command for command in recommenders)


def test_the_next_stages_read_the_embedding_that_the_data_part_makes(whole_job, tmp_path):
    made = whole_plan(whole_job, "--data_root", str(tmp_path), "--modalities", "text,image", "--fusion_weights=1,2",
                      "--seed=3", "--device=cpu", "--force", "--run_root", str(tmp_path / "runs"), "--model=markov")
    names = [command[0] for command in made]
    assert names[:6] == [f"dataloader.{name}" for name in ("download", "process", "figures", "text_embedding",
                                                           "image_embedding", "fusion")]
    assert names[6:] == ["quantization/main.py", *["recommendation/main.py"] * 2, "recommendation.results",
                         "quantization/main.py"]
    for command in made[:6]:
        assert set(command[1:]) == {f"--data_root={tmp_path}", "--modalities=text,image", "--fusion_weights=1,2",
                                    "--seed=3", "--device=cpu", "--force"}
    for command in made[6:]:
        assert command[command.index("--embedding_suffix") + 1] == "fused-concat"
        assert f"--run_root={tmp_path / 'runs'}" in command
    assert {"--seed=3", "--device=cpu", "--force"} <= set(made[6])
    assert not {"--seed=3", "--device=cpu", "--force"} & {*made[-2], *made[-1]}  # these train nothing


def test_the_whole_job_imports_semantic_ids_from_a_file_that_is_there(whole_job, tmp_path):
    file, data = tmp_path / "index.json", f"--data_root={tmp_path}"
    with pytest.raises(ConfigError, match="--file <an existing file>"):
        whole_plan(whole_job, data, "--quantizer_name=imported", f"--file={file}")
    with pytest.raises(ConfigError, match="--file index.json"):
        whole_plan(whole_job, data, "--quantizer_name=imported")
    file.write_text("{}")
    with pytest.raises(ConfigError, match="file"):  # which rqvae has no use for
        whole_plan(whole_job, data, f"--file={file}")
    made = whole_plan(whole_job, data, "--quantizer_name=imported", f"--file={file}")
    assert [command for command in made if f"--set=file={file}" in command] == [
        ["quantization/main.py", "--quantizer_name", "imported", "--embedding_suffix", "td", data,
         f"--set=file={file}"]]


@pytest.mark.slow
@pytest.mark.parametrize(("quantizer", "flags", "others"), [
    ("letter", [], [["dataloader.fusion", "--suffix=cf"]]),
    ("letter", ["--pca=16", "--suffix=td"], [["dataloader.fusion", "--suffix=cf"]]),  # cf itself is not transformed
    ("letter", ["--modalities=text,image", "--suffix=fused-pca"], [["dataloader.fusion", "--modalities=text,image",
                                                                    "--suffix=cf"]]),
    ("mm_rqvae", [], [["dataloader.figures", "--suffix=image"], ["dataloader.image_embedding", "--suffix=image"]]),
    ("mm_rqvae", ["--modalities=text,image", "--suffix=td"], []),
    ("random", [], [])])
def test_the_whole_job_also_makes_what_a_quantizer_reads_beside_the_text(whole_job, tmp_path, quantizer, flags, others):
    data = f"--data_root={tmp_path}"
    plain = whole_plan(whole_job, data, *flags)
    made = whole_plan(whole_job, data, *flags, f"--quantizer_name={quantizer}")
    last = [command[0] for command in made].index("quantization/main.py")
    assert made[:last - len(others)] == [command for command in plain if command[0].startswith("dataloader.")]
    assert [[word for word in command if word != data] for command in made[last - len(others):last]] == others


@pytest.mark.parametrize(("flags", "message"), [
    (["--quantizer_name=letter", "--suffix=cf"], "is what letter reads anyway"),
    (["--quantizer_name=mm_rqvae", "--modalities=text"], "--suffix image needs it")])
def test_a_quantizer_that_cannot_have_its_embeddings_is_refused(whole_job, tmp_path, flags, message):
    with pytest.raises(ConfigError, match=message):
        whole_plan(whole_job, "--data_root", str(tmp_path), *flags)


def test_checking_from_the_root_is_the_check_and_nothing_else(whole_job, tmp_path):
    assert whole_plan(whole_job, "--data_root", str(tmp_path), "--check", "--dataset=Beauty") == [
        ["dataloader.process", "--dataset=Beauty", f"--data_root={tmp_path}", "--check"]]


@pytest.mark.parametrize(("flags", "message"), [
    (["--dataset=Babyy"], "did you mean 'Baby'?"), (["--quantizer_name=rqva"], "did you mean 'rqvae'?"),
    (["--model=markow"], "did you mean 'markov'?"), (["--template={titel}"], "names 'titel'"),
    (["--seed=-1"], "--seed: is -1"), (["--quantizer_name=../x"], "is not a name")])
def test_a_wrong_name_is_refused_before_the_first_step(whole_job, tmp_path, flags, message):
    with pytest.raises(ConfigError) as error:
        whole_plan(whole_job, "--data_root", str(tmp_path), *flags)
    assert message in str(error.value)


def shell(tmp_path: Path, script: str, *flags: str) -> subprocess.CompletedProcess:
    return subprocess.run(["bash", str(ROOT / script), "--data_root", str(tmp_path / "data"), *flags], cwd=tmp_path,
                          env={**os.environ, "PYTHON": sys.executable}, capture_output=True, text=True, check=False)


SHOP = "user_id,item_id,timestamp\n" + "".join(f"{user},i{n % 7},{n}\n" for user in "abcdef" for n in range(9))


@pytest.mark.slow
def test_own_files_become_a_data_set_that_later_steps_know_by_its_name(tmp_path):
    (tmp_path / "events.csv").write_text(SHOP)
    (tmp_path / "items.csv").write_text("item_id,title\n" + "".join(f"i{n},Cup number {n}\n" for n in range(7)))
    made = shell(tmp_path, "dataloader/2_process.sh", "--dataset=shop", "--interactions=events.csv",
                 "--items=items.csv")
    assert made.returncode == 0, made.stderr
    assert "6 users, 7 items, 54 interactions" in made.stdout
    (tmp_path / "events.csv").unlink()
    whole = shell(tmp_path, "dataloader/run_pipeline.sh", "--dataset=shop", "--text_model=tfidf", "--suffix=words")
    assert whole.returncode == 0, whole.stderr
    assert whole.stdout.count("reusing") == 2
    assert (tmp_path / "data" / "shop" / "shop.emb-words.npy").exists()
    single = shell(tmp_path, "dataloader/3_get_text_emb.sh", "--dataset=shop", "--text_model=tfidf", "--suffix=words")
    assert (single.returncode, "reusing" in single.stdout) == (0, True), single.stderr


@pytest.mark.slow
@pytest.mark.parametrize("script", ["run_pipeline.sh", "dataloader/run_pipeline.sh"])
def test_the_scripts_check_raw_files_and_folders_and_write_nothing(tmp_path, script):
    write_baby(tmp_path / "raw", [(user, f"i{n}", n) for user in "ab" for n in range(5)])
    raw = ("--raw_dir=raw", "--min_user_interactions=0", "--min_item_interactions=0")
    before = sorted(tmp_path.rglob("*"))
    done = shell(tmp_path, script, "--check", *raw)
    assert done.returncode == 0, done.stderr
    assert "[1/1] data: check" in done.stdout
    assert "check: the raw files are sound" in done.stdout
    assert sorted(tmp_path.rglob("*")) == before
    unknown = shell(tmp_path, script, "--check")
    assert unknown.returncode == 2
    assert "there is no such data set" in unknown.stderr
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.slow
@pytest.mark.parametrize("readme", ["README.md", "README.zh-CN.md"])
def test_the_readme_s_own_catalogue_is_read_by_its_command(tmp_path, readme):
    text = (ROOT / readme).read_text(encoding="utf-8").replace("\\\n", " ")
    [line] = [line for line in text.splitlines() if "--dataset tea_shop" in line]
    flags = shlex.split(line)[2:]
    flags = [str(ROOT / word) if word.startswith("examples/") else word for word in flags]
    done = shell(tmp_path, "dataloader/2_process.sh", *flags)
    assert done.returncode == 0, done.stderr
    assert "120 users, 48 items, 1,081 interactions" in done.stdout
    titles = table(tmp_path / "data" / "tea_shop" / "items.parquet", "raw_id, title")
    assert ("T001", "Assam, loose leaf, 100 g") in titles
