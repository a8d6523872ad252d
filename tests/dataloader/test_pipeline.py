"""The steps and flags of the data part and of the whole job, and the scripts on a user's own files."""

import argparse
import os
import shlex
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from common.artifacts import DatasetFolder, load_meta
from common.cli import given_flags, parse
from common.errors import ConfigError
from dataloader.flags import make_parser
from dataloader.pipeline import plan
from tests.dataloader.helpers import make_options, table, write_baby
from tests.dataloader.processing import prints, version
from tests.errors import Outcome, refused

ROOT = Path(__file__).resolve().parents[2]


def steps(tmp_path: Path, *flags: str) -> list[str]:
    """The modules of the steps of the data part, in order."""
    made = plan(make_options(tmp_path, *flags), list(flags))
    for step in made:
        assert step.command[-len(flags) or len(step.command):] == list(flags)  # every step gets all of them
    return [step.command[3].removeprefix("dataloader.") for step in made]


@pytest.mark.parametrize(("flags", "expected"), [
    ((), "download process text_embedding"),
    (("--modalities=text,image",), "download process images text_embedding image_embedding fusion"),
    (("--modalities=image",), "download process images image_embedding"),
    (("--suffix=image",), "download process images image_embedding"),
    (("--suffix=cf",), "download process fusion"),
    (("--suffix=short",), "download process text_embedding"),
    (("--suffix=fused-align",), "download process images text_embedding image_embedding fusion"),
    (("--suffix=fused-pca", "--fusion_parts=td,cf"), "download process text_embedding fusion"),
    (("--modalities=text,image", "--suffix=td"), "download process images text_embedding image_embedding"),
    (("--check",), "process"),
    (("--check", "--modalities=text,image"), "process"),
])
def test_suffix_and_modalities_select_the_steps(tmp_path, flags, expected):
    assert " ".join(steps(tmp_path, *flags)) == expected


def test_every_step_has_a_numbered_script():
    modules = {"0_download_dataset.sh": "download", "1_load_figure.sh": "images", "2_process.sh": "process",
               "3_get_text_emb.sh": "text_embedding", "4_get_image_emb.sh": "image_embedding",
               "5_fusion_embeddings.sh": "fusion", "run_pipeline.sh": "pipeline"}
    for script, name in modules.items():
        assert f"-m dataloader.{name} " in (ROOT / "dataloader" / script).read_text()


@pytest.fixture
def whole_job(monkeypatch) -> ModuleType:
    """The module run_pipeline.py. Its import changes sys.path, as a script does."""
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


def test_every_data_flag_reaches_the_steps_of_the_job(whole_job, tmp_path):
    data, root = make_parser("for a test"), whole_job.make_parser()
    argv = [word for action in data._actions if action.dest != "help" for word in another_value(action, tmp_path)]
    forwarded = given_flags(root, parse(root, argv), data.destinations())
    assert parse(data, forwarded) == parse(data, argv)
    assert len(forwarded) == len(data.destinations()) > 50


def test_defaults_are_not_forwarded(whole_job):
    root = whole_job.make_parser()
    assert given_flags(root, parse(root, []), make_parser("").destinations()) == []


def whole_plan(whole_job: ModuleType, *flags: str) -> list[list[str]]:
    """The commands of the whole job, each beginning with its module or script."""
    parser = whole_job.make_parser()
    made = whole_job.plan(parser, parse(parser, list(flags), open_ended=True), Path("list"))
    return [[word.removeprefix(f"{ROOT}/") for word in step.command[3 if step.command[1] == "-P" else 1:]]
            for step in made]


def test_the_whole_job_goes_from_the_data_to_the_table(whole_job, tmp_path):
    data, baselines = f"--data_root={tmp_path}", "counting,markov,neighbours,popularity,transitions"
    codes = ["--quantizer_name", "rqvae", "--embedding_suffix", "td"]
    assert whole_plan(whole_job, "--data_root", str(tmp_path)) == [
        ["dataloader.download", data], ["dataloader.process", data], ["dataloader.text_embedding", data],
        ["quantization/main.py", *codes, data],
        *(["recommendation/main.py", "--model", model, *codes, data, "--run_list", "list"]
          for model in (baselines, "encoder_decoder")),
        ["recommendation.results", "--run_list", "list", *codes, data],
        ["quantization/main.py", "--explain", *codes, data]]


def test_configuration_keys_reach_their_stages(whole_job, tmp_path):
    made = whole_plan(whole_job, "--data_root", str(tmp_path), "--num_levels=4", "--num_beams", "3", "--top_k=30",
                      "--quantization.max_steps=5", "--recommendation.training_params.max_steps", "6")
    own = {" ".join(command[:3]): [word for word in command if word.startswith("--set=")] for command in made}
    assert own["quantization/main.py --quantizer_name rqvae"] == ["--set=num_levels=4", "--set=max_steps=5"]
    assert own["recommendation/main.py --model encoder_decoder"] == [
        "--set=num_beams=3", "--set=top_k=30", "--set=training_params.max_steps=6"]
    baselines = "counting,markov,neighbours,popularity,transitions"
    assert own[f"recommendation/main.py --model {baselines}"] == ["--set=top_k=30"]  # without beams and steps


def commands_of(whole_job: ModuleType, dataset: str, root: Path, *flags: str) -> list[str]:
    made = whole_plan(whole_job, f"--dataset={dataset}", "--data_root", str(root), *flags)
    return [" ".join(command) for command in made]


CODES_64 = "--set=rqvae.model_params.codebook_size=64"


def test_the_source_has_defaults_for_the_embedding_and_the_quantizer(whole_job, tmp_path):
    def commands(*flags: str) -> list[str]:
        return commands_of(whole_job, "ml-1m", tmp_path, *flags)

    made = commands()
    [fused] = [command for command in made if "--suffix=fused-concat" in command and "dataloader.fusion" in command]
    assert {"--fusion_parts=td,cf", "--fusion_weights=1,2"} < set(fused.split())
    later = [command for command in made if command.startswith(("quantization", "recommendation"))]
    assert all("--quantizer_name rqvae --embedding_suffix fused-concat" in command for command in later)
    assert [CODES_64 in command for command in later] == [True] + [False] * (len(later) - 1)
    for flags, used in ((["--fusion_weights=1,5"], {"--fusion_parts=td,cf", "--fusion_weights=1,5"}),
                        (["--fusion_parts=td,cf,mine"], {"--fusion_parts=td,cf,mine"})):
        [fused] = [command for command in commands(*flags)
                   if "--suffix=fused-concat" in command and "dataloader.fusion" in command]
        assert {word for word in fused.split() if word.startswith("--fusion")} == used
    [own] = [command for command in commands("--quantization.codebook_size=32") if CODES_64 in command]
    assert own.index(CODES_64) < own.index("--set=codebook_size=32")  # the last value counts
    assert not any("fused-concat" in command for command in commands("--suffix=td"))
    assert not any(CODES_64 in command for command in commands("--quantizer_name=rkmeans"))


@pytest.mark.parametrize(("dataset", "flags", "model", "quantizer", "recipe"), [
    ("ml-100k", [], "encoder_retrieve", "opq", True), ("ml-1m", [], "encoder_decoder", "rqvae", False),
    ("ml-100k", ["--suffix=td"], "encoder_retrieve", "opq", True),
    ("ml-100k", ["--model=encoder_retrieve", "--quantizer_name=rqvae"], "encoder_retrieve", "rqvae", True),
    ("ml-100k", ["--model=encoder_decoder"], "encoder_decoder", "rqvae", False)])
def test_the_source_has_a_default_model_for_a_dataset(whole_job, tmp_path, dataset, flags, model, quantizer, recipe):
    made = commands_of(whole_job, dataset, tmp_path, *flags)
    later = [command for command in made if command.startswith(("quantization", "recommendation"))]
    assert all(f"--quantizer_name {quantizer} --embedding_suffix" in command for command in later)
    assert (CODES_64 in later[0]) == (quantizer == "rqvae")
    own = f"--model {model}" + " --config recommendation/models/encoder_retrieve/recipes/ml-100k.yaml" * recipe
    trained = [command for command in later if "/main.py --model" in command]
    assert [f"{own} --quantizer_name" in command for command in trained] == [False, True]
    assert "--config" not in trained[0]


def test_a_key_overrides_the_recipe_of_the_source(whole_job, tmp_path):
    made = commands_of(whole_job, "ml-100k", tmp_path, "--teacher=none", "--recommendation.max_steps=7")
    [own] = [command for command in made if "--model encoder_retrieve" in command]
    assert own.endswith("--set=teacher=none --set=max_steps=7")
    with refused(ConfigError, "--teacher_weight", names=["no teacher"]):
        commands_of(whole_job, "ml-100k", tmp_path, "--teacher=none", "--teacher_weight=0.3")


def test_a_key_of_the_baselines_is_not_passed_to_a_model_without_it(whole_job, tmp_path):
    data = ["--data_root", str(tmp_path)]
    made = {" ".join(command[:3]): command for command in whole_plan(whole_job, *data, "--model=sasrec",
                                                                     "--neighbours_from=cf")}
    key = "--set=neighbours_from=cf"
    assert key in made["recommendation/main.py --model counting,markov,neighbours,popularity,transitions"]
    assert key not in made["recommendation/main.py --model sasrec"]
    assert sum(key in command for command in whole_plan(whole_job, *data, "--neighbours_from=cf")) == 2
    with refused(ConfigError, "--teacher_weight"):
        whole_plan(whole_job, *data, "--teacher_weight=0.3")
    with refused(ConfigError, "--num_newest"):
        whole_plan(whole_job, *data, "--num_newest=0")
    with refused(ConfigError, "--select_by"):
        whole_plan(whole_job, *data, "--select_by=recal@10")
    with refused(ConfigError, "--max_history", fix=["leave"]):
        whole_plan(whole_job, *data, "--model=popularity", "--max_history=5")


def test_the_embedding_of_the_neighbours_is_made_too(whole_job, tmp_path):
    def fusions(*flags: str) -> list[str]:
        made = whole_plan(whole_job, "--data_root", str(tmp_path), *flags)
        return [command[-1] for command in made if command[0] == "dataloader.fusion"]

    assert fusions("--neighbours_from=cf") == fusions("--model=sasrec", "--neighbours_from=cf") == ["--suffix=cf"]
    assert fusions("--neighbours_from=cf", "--neighbours_from=tfidf") == fusions("--neighbours_from=auto") == []
    assert fusions("--neighbours_from=cf", "--quantizer_name=letter") == ["--suffix=cf"]  # only once
    for flags in (["--neighbours_from=td"], ["--quantizer_name=letter", "--collaborative=td"]):
        made = whole_plan(whole_job, "--data_root", str(tmp_path), "--suffix=td16", "--pca=16", *flags)
        assert [command[1:] for command in made if command[0] == "dataloader.text_embedding"] == [
            [f"--data_root={tmp_path}", *words] for words in (["--suffix=td16", "--pca=16"], ["--suffix=td"])]


def test_flags_of_a_fusion_need_a_fused_embedding(whole_job, tmp_path):
    parts = ("--fusion_parts=td,cf", "--fusion_weights=1,2")
    for flags in ([], ["--dataset=ml-100k", "--pca=16"], ["--suffix=td"], ["--neighbours_from=cf"]):
        with refused(ConfigError, "--fusion_parts", fix=["--suffix fused-concat"]):
            whole_plan(whole_job, "--data_root", str(tmp_path), *parts, *flags)
    for flags, steps in ((["--neighbours_from=fused-pca"], [[*parts, "--suffix=fused-pca"]]),
                         (["--suffix=fused-pca", "--neighbours_from=cf"],
                          [["--suffix=fused-pca", *parts], ["--suffix=cf"]])):
        made = whole_plan(whole_job, "--data_root", str(tmp_path), *parts, *flags)
        assert [set(command[1:]) for command in made if command[0] == "dataloader.fusion"] == [
            {f"--data_root={tmp_path}", *words} for words in steps]


@pytest.mark.parametrize(("flags", "where", "names"), [
    (["--neighbours_from=tfdif"], "--neighbours_from", ["tfdif"]),
    (["--neighbours_from=tfdif", "--suffix=cf"], "--neighbours_from", ["tfdif"]),
    (["--filter_seen=maybe"], "--filter_seen", ["maybe"])])
def test_wrong_values_are_refused_before_the_first_step(whole_job, tmp_path, flags, where, names):
    with refused(ConfigError, where, names=names, fix=["auto"]):
        whole_plan(whole_job, "--data_root", str(tmp_path), *flags)


def test_a_key_of_both_stages_needs_its_stage(whole_job, tmp_path):
    with refused(ConfigError, "--max_steps", fix=["--quantization.max_steps", "--recommendation.max_steps"]):
        whole_plan(whole_job, "--data_root", str(tmp_path), "--max_steps=5")
    # k-means takes no steps: only the recommender has the key.
    made = whole_plan(whole_job, "--data_root", str(tmp_path), "--quantizer_name=rkmeans", "--max_steps=5")
    assert sum("--set=max_steps=5" in command for command in made) == 1


@pytest.mark.parametrize(("word", "passed"), [
    ("--filter_seen", "--filter_seen=true"), ("--filter_seen=false", "--filter_seen=false"),
    ("--filter_seen=auto", "--filter_seen=auto"), ("--seed=0", None)])
def test_filter_seen_reaches_the_baselines_and_the_model(whole_job, tmp_path, word, passed):
    made = whole_plan(whole_job, "--data_root", str(tmp_path), word, "--model=sasrec")
    recommenders = [command for command in made if command[0] == "recommendation/main.py"]
    assert [command[command.index("--model") + 1] for command in recommenders] == [
        "counting,markov,neighbours,popularity,transitions", "sasrec"]
    for command in recommenders:
        assert [word for word in command if word.startswith("--filter_seen")] == ([passed] if passed else [])


def test_the_next_stages_read_the_embedding_of_the_data_part(whole_job, tmp_path):
    made = whole_plan(whole_job, "--data_root", str(tmp_path), "--modalities", "text,image", "--fusion_weights=1,2",
                      "--seed=3", "--device=cpu", "--force", "--run_root", str(tmp_path / "runs"), "--model=markov")
    names = [command[0] for command in made]
    assert names[:6] == [f"dataloader.{name}" for name in ("download", "process", "images", "text_embedding",
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
    assert not {"--seed=3", "--device=cpu", "--force"} & {*made[-2], *made[-1]}  # the last two steps do not train


def test_the_whole_job_imports_semantic_ids_from_an_existing_file(whole_job, tmp_path):
    file, data, where = tmp_path / "index.json", f"--data_root={tmp_path}", "imported.model_params.file"
    with refused(ConfigError, where, names=[file], fix=["--file"]):
        whole_plan(whole_job, data, "--quantizer_name=imported", f"--file={file}")
    with refused(ConfigError, where, fix=["--file index.json"]):
        whole_plan(whole_job, data, "--quantizer_name=imported")
    file.write_text("{}")
    with refused(ConfigError, "--file"):  # a key that rqvae does not have
        whole_plan(whole_job, data, f"--file={file}")
    made = whole_plan(whole_job, data, "--quantizer_name=imported", f"--file={file}")
    assert [command for command in made if f"--set=file={file}" in command] == [
        ["quantization/main.py", "--quantizer_name", "imported", "--embedding_suffix", "td", data,
         f"--set=file={file}"]]


@pytest.mark.slow
@pytest.mark.parametrize(("quantizer", "flags", "others"), [
    ("letter", [], [["dataloader.fusion", "--suffix=cf"]]),
    ("letter", ["--pca=16", "--suffix=td"], [["dataloader.fusion", "--suffix=cf"]]),  # without PCA
    ("letter", ["--modalities=text,image", "--suffix=fused-pca"], [["dataloader.fusion", "--modalities=text,image",
                                                                    "--suffix=cf"]]),
    ("mm_rqvae", [], [["dataloader.images", "--suffix=image"], ["dataloader.image_embedding", "--suffix=image"]]),
    ("mm_rqvae", ["--modalities=text,image", "--suffix=td"], []),
    ("random", [], [])])
def test_the_whole_job_makes_every_embedding_of_the_quantizer(whole_job, tmp_path, quantizer, flags, others):
    data = f"--data_root={tmp_path}"
    plain = whole_plan(whole_job, data, *flags)
    made = whole_plan(whole_job, data, *flags, f"--quantizer_name={quantizer}")
    last = [command[0] for command in made].index("quantization/main.py")
    assert made[:last - len(others)] == [command for command in plain if command[0].startswith("dataloader.")]
    assert [[word for word in command if word != data] for command in made[last - len(others):last]] == others


def test_check_runs_no_step_but_the_check(whole_job, tmp_path):
    assert whole_plan(whole_job, "--data_root", str(tmp_path), "--check", "--dataset=Beauty") == [
        ["dataloader.process", "--dataset=Beauty", f"--data_root={tmp_path}", "--check"]]


@pytest.mark.parametrize(("flags", "where", "names", "fix"), [
    ("--dataset=Babyy", "--dataset Babyy", ["'Baby'"], ["--dataset Baby"]),
    ("--quantizer_name=rqva", "--quantizer_name rqva", ["'rqvae'"], ["--quantizer_name rqvae"]),
    ("--quantizer_name=../x", "--quantizer_name", ["'../x'"], []),
    ("--model=markow", "--model markow", ["'markov'"], ["--model markov"]),
    ("--template={titel}", "--template {titel}", ["'titel'", "title, description, brand, price, categories"], []),
    ("--seed=-1", "--seed", ["-1", "0", "2147483647"], []),
    ("--num_beems=3", "--num_beems", ["'num_beams'"], []),
    ("--quantization.num_beams=3", "--quantization.num_beams", [], []),
    ("--recommendation.epochs=0", "--recommendation.epochs", ["encoder_decoder.training_params.epochs", "0", "1"], []),
    # A quantizer that cannot have its embeddings.
    ("--quantizer_name=letter --suffix=cf", "--embedding_suffix cf", ["letter"], ["--embedding_suffix td"]),
    ("--quantizer_name=mm_rqvae --modalities=text", "--modalities text", ["--suffix image"], ["--modalities image"])])
def test_a_wrong_flag_is_refused_before_the_first_step(whole_job, tmp_path, flags, where, names, fix):
    with refused(ConfigError, where, names=names, fix=fix):
        whole_plan(whole_job, "--data_root", str(tmp_path), *flags.split())


def shell(tmp_path: Path, script: str, *flags: str) -> Outcome:
    done = subprocess.run(["bash", str(ROOT / script), "--data_root", str(tmp_path / "data"), *flags], cwd=tmp_path,
                          env={**os.environ, "PYTHON": sys.executable}, capture_output=True, text=True, check=False)
    return Outcome(done.returncode, done.stdout, done.stderr)


SHOP = "user_id,item_id,timestamp\n" + "".join(f"{user},i{n % 7},{n}\n" for user in "abcdef" for n in range(9))


@pytest.mark.slow
def test_later_steps_know_a_dataset_of_own_files(tmp_path):
    (tmp_path / "events.csv").write_text(SHOP)
    (tmp_path / "items.csv").write_text("item_id,title\n" + "".join(f"i{n},Cup number {n}\n" for n in range(7)))
    made = shell(tmp_path, "dataloader/2_process.sh", "--dataset=shop", "--interactions=events.csv",
                 "--items=items.csv")
    assert made.code == 0, made.err
    assert prints(made.out, 6, 7, 54)  # users, items, interactions
    (tmp_path / "events.csv").unlink()
    folder = DatasetFolder(tmp_path / "data", "shop")
    tables = [folder.interactions, folder.items, folder.users]
    before = list(map(version, tables))
    whole = shell(tmp_path, "dataloader/run_pipeline.sh", "--dataset=shop", "--text_model=tfidf", "--suffix=words")
    assert whole.code == 0, whole.err
    assert list(map(version, tables)) == before  # step 2 reuses them, and step 0 downloads nothing
    assert not (folder.path / "raw").exists()
    embedding = version(folder.embeddings("words"))
    single = shell(tmp_path, "dataloader/3_get_text_emb.sh", "--dataset=shop", "--text_model=tfidf", "--suffix=words")
    assert single.code == 0, single.err
    assert version(folder.embeddings("words")) == embedding


@pytest.mark.slow
@pytest.mark.parametrize("script", ["run_pipeline.sh", "dataloader/run_pipeline.sh"])
def test_the_scripts_check_files_and_write_nothing(tmp_path, script):
    write_baby(tmp_path / "raw", [(user, f"i{n}", n) for user in "ab" for n in range(5)])
    raw = ("--raw_dir=raw", "--min_user_interactions=0", "--min_item_interactions=0")
    before = sorted(tmp_path.rglob("*"))
    done = shell(tmp_path, script, "--check", *raw)
    assert done.code == 0, done.err
    assert prints(done.out, "1/1")  # the only step
    assert prints(done.out, 2, 5, 10)  # users, items, interactions
    assert sorted(tmp_path.rglob("*")) == before
    unknown = shell(tmp_path, script, "--check")
    unknown.check_error(ConfigError, "--dataset Baby", names=[tmp_path / "data"], fix=[
        f"bash dataloader/run_pipeline.sh --dataset Baby --data_root {tmp_path / 'data'}"])
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.slow
@pytest.mark.parametrize("readme", ["README.md", "README.zh-CN.md"])
def test_the_readme_s_command_reads_its_own_catalogue(tmp_path, readme):
    text = (ROOT / readme).read_text(encoding="utf-8").replace("\\\n", " ")
    [line] = [line for line in text.splitlines() if "--dataset tea_shop --interactions" in line]
    flags = shlex.split(line)[2:]
    flags = [str(ROOT / word) if word.startswith("examples/") else word for word in flags]
    done = shell(tmp_path, "dataloader/2_process.sh", *flags)
    assert done.code == 0, done.err
    folder = DatasetFolder(tmp_path / "data", "tea_shop")
    meta = load_meta(folder.interactions, "")
    assert (meta["num_users"], meta["num_items"], meta["num_interactions"]) == (120, 48, 1081)
    assert prints(done.out, 120, 48, "1,081")
    titles = table(folder.items, "raw_id, title")
    assert ("T001", "Assam, loose leaf, 100 g") in titles
