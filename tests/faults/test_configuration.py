"""Wrong flags, YAML files and output paths are refused before the work, and nothing is written."""

import pytest

from common.errors import ConfigError
from tests.faults.world import RUNS

pytestmark = pytest.mark.slow
RQVAE = f"quantization/main.py {RUNS} --quantizer_name rqvae"
SLOW_IMPORTS = {"torch", "pandas", "duckdb", "transformers"}
LONG = "x" * 300


@pytest.fixture(scope="module")
def embedded(reference, tmp_path_factory):
    """A world with the data of the shop."""
    return reference.after("text_embedding").copy(tmp_path_factory.mktemp("embedded") / "world")


def check_refused(world, words: str, kind, where, names: str = "", fix: str = "", **options) -> str:
    """Run a command. Fail if it is not refused, or writes anything. Return the standard error."""
    before = sorted(world.root.rglob("*"))
    outcome = world.run(*words.split(), PYTHONDONTWRITEBYTECODE="1", **options)
    outcome.check_error(kind, where, names=names.split(), fix=[fix])
    assert sorted(world.root.rglob("*")) == before
    return outcome.err


@pytest.mark.parametrize(("words", "where", "names", "fix"), [
    (f"quantization/main.py {RUNS} --quantizer_name rqva", "--quantizer_name rqva", "'rqvae'",
     "--quantizer_name rqvae"),
    ("quantization/main.py --data_root data --dataset tee", "--dataset tee", "'tea'", "--dataset tea"),
    (f"{RQVAE} --epoch 3", "--epoch", "'epochs'", ""),
    (f"{RQVAE} --epochs many", "--epochs", "'many' int", ""),
    (f"{RQVAE} --set common.sead=1", "--common.sead", "'common.seed'", ""),
    (f"{RQVAE} --explain --epochs 3", "--compare, --explain, --export", "--epochs", "--epochs"),
    (f"recommendation/main.py {RUNS} --model=encoder_decode", "--model encoder_decode", "'encoder_decoder'",
     "--model encoder_decoder"),
    (f"recommendation/main.py {RUNS} --lr=-1", "--lr", "encoder_decoder.training_params.lr -1.0 0", ""),
    (f"recommendation/main.py {RUNS} --compare --seeds=1,2", "--compare", "--seeds", "--seeds"),
    ("run_pipeline.py --dataset Babyy", "--dataset Babyy", "'Baby'", "--dataset Baby"),
    ("run_pipeline.py --quantiser_name rqvae", "--quantiser_name", "'quantizer_name'", ""),
    ("run_pipeline.py --template {titel}", "--template {titel}", "'titel' title description", ""),
    ("run_pipeline.py --suffix=image --modalities=text", "--modalities text", "--suffix", "--modalities image")])
def test_a_wrong_flag_is_refused_quickly_and_writes_nothing(embedded, words, where, names, fix):
    err = check_refused(embedded, words, ConfigError, where, names, fix, PYTHONPROFILEIMPORTTIME="1")
    imported = {line.split("|")[-1].strip() for line in err.splitlines() if line.startswith("import time:")}
    assert "common.command" in imported
    assert not imported & SLOW_IMPORTS


@pytest.mark.parametrize(("lines", "line", "names"), [
    (["rqvae:", "  model_params:", "\tlatent_size: 8"], 3, ""),                               # a tab
    (["rqvae:", "  training_params:", "    epohcs: 3"], 3, "epohcs 'epochs'"),                # an unknown key
    (["rqvae:", "  training_params:", "    epochs: 3", "    epochs: 4"], 4, "epochs"),       # a repeated key
    (["rqvae:", "  training_params:", "    epochs: many"], 3, "epochs 'many' int"),           # a wrong type
    (["rqvae:", "  training_params:", "    lr: 1e-3", "    epochs: 0"], 4, "epochs 1 0")])    # out of range
def test_a_wrong_line_of_a_yaml_is_named(embedded, tmp_path, lines, line, names):
    path = tmp_path / "mine.yaml"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    check_refused(embedded, f"{RQVAE} --config {path}", ConfigError, f"{path}:{line}", names)


def test_a_missing_yaml_is_named(embedded):
    check_refused(embedded, f"{RQVAE} --config no.yaml", ConfigError, "no.yaml")


@pytest.mark.parametrize(("words", "where"), [
    (f"quantization/main.py {RUNS} --compare --dataset ../tea", "--dataset"),
    (f"quantization/main.py {RUNS} --tag ../a", "--tag"),
    (f"quantization/main.py {RUNS} --tag {LONG}", "--tag"),
    (f"quantization/main.py {RUNS} --data_root raw/events.csv", "--dataset tea"),
    (f"recommendation/recommend.py {RUNS} --user U003 --output raw", "--output raw")])
def test_an_impossible_output_is_refused_before_the_work(embedded, words, where):
    check_refused(embedded, words, ConfigError, where)


@pytest.mark.parametrize("target", ["raw/events.csv", f"out/{LONG}"])
def test_an_impossible_folder_of_an_export_is_refused(reference, tmp_path, target):
    world = reference.after("rqvae").copy(tmp_path / "world")
    outcome = world.run("quantization/main.py", *RUNS.split(), "--export", target)
    assert outcome.code == ConfigError.exit_code, outcome.err
    assert target in outcome.error.where
    assert outcome.error.fix
    assert world.files() == reference.after("rqvae").files()


@pytest.mark.parametrize(("error", "code"), [("EACCES", 2), ("ENODEV", 5)])
def test_a_file_that_cannot_be_created_is_named(reference, tmp_path, error, code):
    case = reference.case("process", "again")
    world = case.before.copy(tmp_path / "world")
    fault = {"at": case.point("create", "users.parquet.meta.json"), "do": error}
    outcome = world.run(case.script, *case.words, fault=fault)
    assert outcome.code == code, outcome.err
    assert outcome.error.where.startswith("data/tea/"), outcome.err
    assert outcome.error.fix
    case.check_unharmed(world)
    case.check_repeated(world, world.run(case.script, *case.repeated))
