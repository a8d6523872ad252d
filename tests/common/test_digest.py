"""Which changes of the code make another run."""

import shutil
from pathlib import Path

import pytest

from common.cli import ROOT
from common.digest import code_digest

MODEL = """
from .kit import layers
class Model:
    'A model.'
    def fit(self):
        '''Fit.'''
        return layers.scale(2)
"""


@pytest.fixture
def stage(tmp_path) -> Path:
    """A stage with a trainer, a dataset, and a model that imports one of two files of its kit."""
    files = {"trainer.py": "STEPS = 3\n", "dataset.py": "ROWS = 4\n", "prior_weight.py": "MOST = 8\n",
             "models/with_prior.py": "SIGN = 1\n", "main.py": "print()\n", "models/model.py": MODEL,
             "models/kit/__init__.py": "", "models/kit/layers.py": "from . import deep\ndef scale(x): return x\n",
             "models/kit/deep.py": "ONE = 1\n", "models/kit/unrelated.py": "TWO = 2\n"}
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    return tmp_path


def digest(stage: Path) -> str:
    return code_digest(stage / "models/model.py", stage)


@pytest.mark.parametrize(("file", "old", "new"), [
    ("models/model.py", "return ", "return -"), ("models/kit/layers.py", "return x", "return 2 * x"),
    ("models/kit/deep.py", "1", "1.0"), ("trainer.py", "3", "4"), ("dataset.py", "ROWS", "LINES"),
    ("prior_weight.py", "8", "9"), ("models/with_prior.py", "1", "-1")])
def test_other_code_has_another_digest(stage, file, old, new):
    before, path = digest(stage), stage / file
    path.write_text(path.read_text().replace(old, new))
    assert digest(stage) != before


@pytest.mark.parametrize(("file", "old", "new"), [
    ("models/model.py", "A model.", "The model."), ("models/model.py", "Fit.", "Fit it."),
    ("models/model.py", "        return", "        # twice\n\n        return"), ("main.py", "print()", "exit()"),
    ("models/kit/unrelated.py", "2", "3")])
def test_words_layout_and_other_files_do_not_count(stage, file, old, new):
    before, path = digest(stage), stage / file
    path.write_text(path.read_text().replace(old, new))
    assert digest(stage) == before


def test_a_text_that_is_no_docstring_counts(stage):
    before, path = digest(stage), stage / "trainer.py"
    path.write_text("STEPS = 3\n'a value'\n")
    assert digest(stage) != before


@pytest.mark.slow
def test_a_change_of_the_quantizers_kit_is_other_code(tmp_path, monkeypatch):
    for folder in ("common", "quantization"):
        shutil.copytree(ROOT / folder, tmp_path / folder)
    monkeypatch.setattr("common.digest.ROOT", tmp_path)
    stage, kit = tmp_path / "quantization", tmp_path / "quantization/codebooks/nearest.py"
    before = code_digest(stage / "models/letter.py", stage)
    kit.write_text(kit.read_text() + "\nTHREE = 3\n")
    assert code_digest(stage / "models/letter.py", stage) != before
