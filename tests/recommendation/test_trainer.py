"""Precision and compilation of a training step, as far as a CPU can show them."""

import logging

import pytest
import torch
from torch import nn

from common.errors import ConfigError
from recommendation.dataset import TrainingBatches
from recommendation.models.abstract_model import AbstractRecommender, Catalogue
from recommendation.trainer import _autocast, loss_function

from .conftest import LOSSES, windows_of

CPU = torch.device("cpu")


class Means(AbstractRecommender):
    """The smallest model with a loss: how far the mean of a window's embeddings is from one."""

    def __init__(self):
        super().__init__({}, Catalogue(5, None, []))
        self.items = nn.Embedding(6, 2)
        nn.init.constant_(self.items.weight, 0.5)

    def recommend(self, histories, top_k):
        raise NotImplementedError

    def compute_loss(self, windows):
        return {"loss_total": (1 - self.items(windows.items + 1).mean()) ** 2}


def params(**own: object) -> dict:
    return {"precision": "float32", "compile": False} | own


def test_as_configured_by_default_a_step_computes_the_models_own_loss():
    model = Means()
    assert loss_function(model, params(), CPU) == model.compute_loss


def test_bfloat16_on_the_cpu_is_float32_and_says_so_in_one_line(caplog):
    model = Means()
    with caplog.at_level(logging.INFO):
        assert loss_function(model, params(precision="bfloat16"), CPU) == model.compute_loss
    assert [record.getMessage() for record in caplog.records] == [
        "precision: bfloat16 is for CUDA; on the cpu this runs in float32"]


@pytest.mark.parametrize(("name", "normalize_over"), LOSSES)
def test_every_models_loss_and_gradients_survive_bfloat16(name, normalize_over, make_model, sequences):
    model = make_model(name, normalize_over=normalize_over).train()
    if model.fit(sequences.training_sequences()):
        pytest.skip("fits in one call")
    windows = TrainingBatches(sequences, model.training_unit, 16, 5, seed=0).get(0, 0)
    expected = model.compute_loss(windows)["loss_total"]
    loss = _autocast(model.compute_loss, windows, "cpu")["loss_total"]
    assert loss.dtype == torch.float32
    assert loss.item() != expected.item()
    assert loss.item() == pytest.approx(expected.item(), rel=0.02)
    whole = torch.cat([g.flatten() for g in torch.autograd.grad(expected, list(model.parameters()))])
    half = torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()))])
    assert half.dtype == torch.float32
    assert torch.nn.functional.cosine_similarity(whole, half, dim=0) > 0.99


@pytest.fixture
def backend(monkeypatch):
    """name -> torch.compile with that backend instead of its own, which wants a C++ compiler on the CPU."""
    compile_with = torch.compile
    torch._dynamo.reset()
    return lambda name: monkeypatch.setattr(
        torch, "compile", lambda compute, **options: compile_with(compute, backend=name, **options))


@pytest.mark.slow
def test_a_compiled_loss_is_the_loss_for_windows_of_all_shapes_from_one_compilation(backend):
    graphs = []
    backend(lambda graph, _: graphs.append(graph) or graph.forward)
    model = Means()
    compute = loss_function(model, params(compile=True), CPU)
    for windows in (windows_of([0, 1, 2], [3, 4]), windows_of([0, 1, 2, 3]), windows_of(*[[1, 2]] * 7)):
        loss = compute(windows)["loss_total"]
        assert loss.item() == pytest.approx(model.compute_loss(windows)["loss_total"].item())
        loss.backward()
    assert len(graphs) <= 2  # a window of one row may have a graph of its own
    assert model.items.weight.grad.abs().sum() > 0


def test_a_compiler_that_fails_is_an_error_with_its_reason(backend):
    def fail(graph, inputs):
        raise FileNotFoundError("no working C++ compiler")

    backend(fail)
    with pytest.raises(ConfigError, match="compile: the model cannot be compiled here. .*no working C.. compiler.*"
                                          "Fix: --compile false"):
        loss_function(Means(), params(compile=True), CPU)(windows_of([0, 1, 2], [3, 4]))


@pytest.mark.parametrize(("own", "error"), [({"precision": "float16"}, "precision is 'float16'.*float32, bfloat16"),
                                            ({"compile": "1"}, "compile is 1. it must be of type bool")])
def test_what_the_keys_may_hold(make_config, own, error):
    # The small configuration takes every key that the model's YAML or the defaults have.
    with pytest.raises(ConfigError, match=error):
        make_config("encoder_decoder", **own)
