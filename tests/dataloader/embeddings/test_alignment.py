"""Projections that agree, on parts that have a common cause."""

import json
import logging
import re

import numpy as np
import pytest

from common.artifacts import load_mask
from common.errors import DataError, TrainingError
from dataloader import options as option_module
from dataloader.flags import CONFIGS
from dataloader.fusion import fuse
from dataloader.options import Alignment, load_section
from tests.dataloader.fusion_parts import COMMAND, fused, random_parts, shop, unit
from tests.dataloader.helpers import mentions
from tests.errors import refused


def quick(monkeypatch, **changes) -> None:
    """Hyper-parameters that make training take about a second."""
    values = {"batch_size": 64, "epochs": 25, "lr": 0.02, "eval_every": 5, **changes}
    monkeypatch.setattr(option_module, "load_section", lambda path, name, record: load_section(
        path, name, record)._replace(**(values if record is Alignment else {})))


def common_cause(num_items: int, dims: tuple[int, ...] = (24, 16), seed: int = 0) -> dict[str, np.ndarray]:
    """Parts that are linear images of the same 6 hidden numbers, with noise."""
    rng = np.random.default_rng(seed)
    hidden = rng.standard_normal((num_items, 6))
    return {name: hidden @ rng.standard_normal((6, dim)) + 0.3 * rng.standard_normal((num_items, dim)) + 1
            for name, dim in zip(("td", "image", "mine"), dims, strict=False)}


@pytest.mark.slow
def test_parts_of_unseen_items_find_each_other(tmp_path, monkeypatch):
    quick(monkeypatch)
    parts = common_cause(500)
    # The last hundred items are in the catalogue twice: once with their text alone, once with their image alone.
    twice = {name: np.vstack([vectors, vectors[400:]]) for name, vectors in parts.items()}
    missing = {"image": list(range(400, 500)), "td": list(range(500, 600))}
    vectors = fused(shop(tmp_path, twice, "--fusion_dim", "8", missing=missing, suffix="fused-align"))
    scores = unit(vectors[400:500]) @ unit(vectors[500:]).T
    assert np.mean(scores.argmax(axis=1) == np.arange(100)) > 0.7  # by chance 0.01
    assert np.mean(scores.argmax(axis=0) == np.arange(100)) > 0.7


@pytest.mark.slow
def test_three_parts_agree_and_the_log_tells_how_well(tmp_path, monkeypatch, caplog):
    caplog.set_level(logging.INFO)
    quick(monkeypatch)
    options = shop(tmp_path, common_cause(300, (24, 16, 12)), "--fusion_dim", "8", "--fusion_parts", "td,image,mine",
                   suffix="fused-align")
    assert fused(options).shape == (300, 8)
    [share] = [message for message in caplog.messages if "%" in message]
    assert mentions(share, 30)  # a tenth of the items is held out
    assert float(re.search(r"([\d.]+) ?%", share)[1]) > 60


def test_vectors_are_weighted_means_of_unit_projections(tmp_path, monkeypatch):
    quick(monkeypatch, epochs=1)
    parts = common_cause(60)
    results = {}
    for weights in ("1,1", "1,3"):
        options = shop(tmp_path / weights, parts, "--fusion_dim", "4", "--fusion_weights", weights,
                       missing={"image": [7, 8], "td": [8]}, suffix="fused-align")
        results[weights] = fused(options)
        np.testing.assert_array_equal(load_mask(options.folder, "fused-align"), np.arange(60) != 8)
    # With unit projections a and b, the results are (a + b) / 2 and (a + 3 b) / 4; solve for a and b.
    b = 2 * results["1,3"] - results["1,1"]
    a = 2 * results["1,1"] - b
    both = ~np.isin(np.arange(60), [7, 8])
    np.testing.assert_allclose(np.linalg.norm(a[both], axis=1), 1, atol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(b[both], axis=1), 1, atol=1e-5)
    for vectors in results.values():
        assert np.linalg.norm(vectors[7]) == pytest.approx(1, abs=1e-5)


def test_the_seed_determines_the_bytes(tmp_path, monkeypatch):
    quick(monkeypatch, epochs=2)
    files = []
    for name, seed in (("one", "0"), ("same", "0"), ("other", "1")):
        options = shop(tmp_path / name, common_cause(60), "--fusion_dim", "4", "--seed", seed, suffix="fused-align")
        fused(options)
        files.append(options.folder.embeddings("fused-align").read_bytes())
    assert files[0] == files[1] != files[2]


class Killed(BaseException):
    """Simulates a kill of the process: no code may catch it."""


@pytest.mark.slow
def test_a_killed_alignment_continues_to_the_same_bytes(tmp_path, monkeypatch):
    from dataloader.embeddings.alignment import AlignmentTask

    quick(monkeypatch, epochs=6, checkpoint_seconds=0.0)
    undisturbed = shop(tmp_path / "undisturbed", common_cause(150), "--fusion_dim", "4", suffix="fused-align")
    fused(undisturbed)
    options = shop(tmp_path / "killed", common_cause(150), "--fusion_dim", "4", suffix="fused-align")
    with monkeypatch.context() as patch:
        patch.setattr(AlignmentTask, "end_epoch", lambda task, epoch: exec_kill(epoch))
        with pytest.raises(Killed):
            fuse(options, COMMAND)
    assert not options.folder.embeddings("fused-align").exists()
    epochs = []
    monkeypatch.setattr(AlignmentTask, "end_epoch", lambda task, epoch: epochs.append(epoch))
    fuse(options, COMMAND)
    assert epochs == [3, 4, 5]
    files = [o.folder.embeddings("fused-align").read_bytes() for o in (undisturbed, options)]
    assert files[0] == files[1]
    assert not list(options.folder.path.glob(".fused-align*"))


def exec_kill(epoch: int) -> None:
    if epoch == 3:
        raise Killed


def test_a_loss_that_is_not_finite_publishes_nothing(tmp_path, monkeypatch):
    quick(monkeypatch, lr=1e38, clip_norm=0.0)
    options = shop(tmp_path, common_cause(60), "--fusion_dim", "4", suffix="fused-align")
    with refused(TrainingError, names=["not_finite.json"], fix=["lr", CONFIGS / "fusion.yaml"]) as raised:
        fused(options)
    [batch] = (options.folder.path / ".fused-align").glob("*/not_finite.json")
    assert raised.value.where == batch.parent
    assert json.loads(batch.read_text())["epoch"] == 2
    assert not options.folder.embeddings("fused-align").exists()


def test_items_without_all_parts_cannot_be_aligned(tmp_path):
    options = shop(tmp_path, random_parts(), missing={"td": [0, 1, 2, 3], "image": [4, 5, 6]}, suffix="fused-align")
    with refused(DataError, "--fusion_parts", names=[1], fix=["--suffix fused-concat"]):
        fused(options)
