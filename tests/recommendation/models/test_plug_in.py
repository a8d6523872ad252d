"""A user's own recommender: errors name the line and the method, if possible before anything is written."""

import shutil
import sys

import pytest

from common.command import run_command
from common.errors import ConfigError
from recommendation import models, recommend
from tests.docs import RECOMMENDER, RECOMMENDER_CONFIG
from tests.errors import Outcome
from tests.text import lines_with

from ..test_pipeline import HISTORIES, write_data

NAME = "recently_popular"


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """model.py, config.yaml, flags ... -> the outcome of training the recommender of docs/extending.md."""
    from recommendation.main import main

    stage = tmp_path / "recommendation"
    shutil.copytree(models.MODELS.parent, stage, ignore=shutil.ignore_patterns("__pycache__", NAME))
    monkeypatch.setattr(models, "MODELS", stage / "models")
    monkeypatch.setattr(models, "__path__", [str(stage / "models")])
    monkeypatch.setattr("common.cli.help_with_keys", lambda *_: None)  # it names files inside the checkout
    folder = write_data(tmp_path, HISTORIES)

    def run(model: str, config: str, *flags: str, command=main) -> Outcome:
        _unload()
        (models.MODELS / NAME).mkdir(exist_ok=True)
        (models.MODELS / NAME / "model.py").write_text(model)
        (models.MODELS / NAME / "config.yaml").write_text(config)
        code = run_command(command, [f"--model={NAME}", f"--dataset={folder.name}", f"--data_root={folder.data_root}",
                                     f"--run_root={tmp_path / 'runs'}", *flags])
        return Outcome(code, *capsys.readouterr())

    own = _unload()  # the checkout may have this model as well
    yield run
    _unload()
    sys.modules.update(own)


def _unload() -> dict:
    return {name: sys.modules.pop(name) for name in [*sys.modules] if name.startswith(f"recommendation.models.{NAME}")}


def place_of(code: str, source: str) -> str:
    """`model.py:line` of the code in the source of the model."""
    return f"{models.model_path(NAME)}:{source[:source.index(code)].count(chr(10)) + 1}"


@pytest.mark.parametrize(("method", "line"), [
    ("fit", "items, offsets = sequences"), ("score_items", "return self.scores")])
def test_an_exception_names_its_line_and_method(run, method, line):
    source = RECOMMENDER.replace(line, f"1 / 0; {line}")
    run(source, RECOMMENDER_CONFIG).check_error(ConfigError, place_of("1 / 0", source),
                                                names=[f"RecentlyPopular.{method}", "ZeroDivisionError"])


def test_other_code_is_another_run(run, tmp_path):
    predicted = []
    for code in (RECOMMENDER, RECOMMENDER.replace("return self.scores", "return -self.scores")):
        assert run(code, RECOMMENDER_CONFIG).code == 0
        predicted += {path.read_text() for path in tmp_path.glob("runs/**/predictions.jsonl")} - {*predicted}
    assert len(predicted) == 2
    run(RECOMMENDER, RECOMMENDER_CONFIG)
    assert len([*tmp_path.glob("runs/**/predictions.jsonl")]) == 2  # the first run is reused


def test_an_exception_while_recommending_names_its_line_and_method(run):
    assert run(RECOMMENDER, RECOMMENDER_CONFIG).code == 0
    source = RECOMMENDER.replace("return self.scores", "1 / 0; return self.scores")
    outcome = run(source, RECOMMENDER_CONFIG, "--history", "0000", command=recommend.main)
    outcome.check_error(ConfigError, place_of("1 / 0", source),
                        names=["RecentlyPopular.score_items", "ZeroDivisionError"])
    [trained] = models.MODELS.parents[1].glob(f"runs/recommendation/Tiny/{NAME}/no-codes/*/")
    [warning] = {*lines_with(outcome.err, trained)}  # the model's code has changed; each call of main adds a handler
    assert not warning.startswith("error: ")


def test_an_unused_flag_is_refused_without_declarations_too(run, tmp_path):
    outcome = run(RECOMMENDER, RECOMMENDER_CONFIG.replace("  uses:", "  # uses:"), "--lr=0.5")
    outcome.check_error(ConfigError, "--lr", names=[NAME])
    assert not (tmp_path / "runs").exists()


def test_an_unused_key_is_refused_before_anything_is_written(run, tmp_path):
    config = RECOMMENDER_CONFIG + "    dekay: 0.5\n"
    outcome = run(RECOMMENDER, config)
    outcome.check_error(ConfigError, f"{models.config_path(NAME)}:{len(config.splitlines())}",
                        names=[f"{NAME}.model_params.dekay", "'decay'"])
    assert not (tmp_path / "runs").exists()
