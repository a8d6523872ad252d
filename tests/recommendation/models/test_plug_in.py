"""A recommender of one's own: its mistakes are told by name, and before anything is written if that can be."""

import shutil
import sys

import pytest

from common.command import run_command
from recommendation import models, recommend
from tests.readme import RECOMMENDER, RECOMMENDER_CONFIG

from ..test_pipeline import HISTORIES, write_data

NAME = "recently_popular"


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """model.py, config.yaml, flags ... -> the exit code and what was said when the README's recommender is trained."""
    from recommendation.main import main

    stage = tmp_path / "recommendation"
    shutil.copytree(models.MODELS.parent, stage, ignore=shutil.ignore_patterns("__pycache__", NAME))
    monkeypatch.setattr(models, "MODELS", stage / "models")
    monkeypatch.setattr(models, "__path__", [str(stage / "models")])
    monkeypatch.setattr("common.cli.help_with_keys", lambda *_: None)  # it names files inside the checkout
    folder = write_data(tmp_path, HISTORIES)

    def run(model: str, config: str, *flags: str, command=main) -> tuple[int, str]:
        _unload()
        (models.MODELS / NAME).mkdir(exist_ok=True)
        (models.MODELS / NAME / "model.py").write_text(model)
        (models.MODELS / NAME / "config.yaml").write_text(config)
        code = run_command(command, [f"--model={NAME}", f"--dataset={folder.name}", f"--data_root={folder.data_root}",
                                     f"--run_root={tmp_path / 'runs'}", *flags])
        return code, capsys.readouterr().err

    own = _unload()  # the checkout's own, if the guide was followed there
    yield run
    _unload()
    sys.modules.update(own)


def _unload() -> dict:
    return {name: sys.modules.pop(name) for name in [*sys.modules] if name.startswith(f"recommendation.models.{NAME}")}


@pytest.mark.parametrize(("method", "line"), [("fit", "items, offsets = sequences"), ("recommend", "return top_items")])
def test_an_exception_names_its_line_and_method(run, method, line):
    code, said = run(RECOMMENDER.replace(line, f"1 / 0; {line}"), RECOMMENDER_CONFIG)
    assert code == 2
    assert f"RecentlyPopular.{method} raised ZeroDivisionError" in said
    assert f"error: {models.model_path(NAME)}:" in said


def test_other_code_is_another_run(run, tmp_path):
    predicted = []
    for code in (RECOMMENDER, RECOMMENDER.replace("top_items(self", "top_items(-self")):
        assert run(code, RECOMMENDER_CONFIG)[0] == 0
        predicted += {path.read_text() for path in tmp_path.glob("runs/**/predictions.jsonl")} - {*predicted}
    assert len(predicted) == 2
    run(RECOMMENDER, RECOMMENDER_CONFIG)
    assert len([*tmp_path.glob("runs/**/predictions.jsonl")]) == 2  # the first one is used again


def test_an_exception_while_recommending_names_its_line_and_method(run):
    assert run(RECOMMENDER, RECOMMENDER_CONFIG)[0] == 0
    code, said = run(RECOMMENDER.replace("return top_items", "1 / 0; return top_items"), RECOMMENDER_CONFIG,
                     "--history", "0000", command=recommend.main)
    assert code == 2
    assert "was trained by other code" in said
    assert "RecentlyPopular.recommend raised ZeroDivisionError" in said
    assert f"error: {models.model_path(NAME)}:" in said


def test_an_unused_flag_is_an_error_also_where_nothing_is_declared(run, tmp_path):
    code, said = run(RECOMMENDER, RECOMMENDER_CONFIG.replace("  uses:", "  # uses:"), "--lr=0.5")
    assert code == 2
    assert "error: --lr: recently_popular does not use lr" in said
    assert not (tmp_path / "runs").exists()


def test_a_key_that_nobody_reads_is_an_error_before_anything_is_written(run, tmp_path):
    code, said = run(RECOMMENDER, RECOMMENDER_CONFIG + "    dekay: 0.5\n")
    assert code == 2
    assert "unused key recently_popular.model_params.dekay" in said
    assert "did you mean 'decay'?" in said
    assert not (tmp_path / "runs").exists()
