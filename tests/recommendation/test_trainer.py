"""Precision and capture of a training step, as far as a CPU can test them."""

import logging

import pytest
import torch
from torch import nn

from common.data_parallel import WHOLE
from common.errors import ConfigError
from recommendation.batches import TrainingBatches
from recommendation.models.abstract_model import AbstractRecommender, Catalogue
from recommendation.trainer import autocast, loss_function
from tests.errors import refused
from tests.text import lines_with

from .conftest import LOSSES

CPU = torch.device("cpu")


class Means(AbstractRecommender):
    """The smallest model with a loss: the squared distance of a window's mean embedding from one."""

    def __init__(self):
        super().__init__({}, Catalogue(5, None, []))
        self.items = nn.Embedding(6, 2)
        nn.init.constant_(self.items.weight, 0.5)

    def recommend(self, histories, top_k):
        raise NotImplementedError

    def compute_loss(self, windows):
        return {"loss_total": (1 - self.items(windows.items + 1).mean()) ** 2}


def params(**own: object) -> dict:
    return {"precision": "float32"} | own


def test_a_default_step_computes_the_models_own_loss():
    model = Means()
    assert loss_function(model, params(), CPU) == model.compute_loss


def test_bfloat16_on_the_cpu_is_logged_as_float32(caplog):
    model = Means()
    with caplog.at_level(logging.INFO):
        assert loss_function(model, params(precision="bfloat16"), CPU) == model.compute_loss
    [record] = caplog.records
    assert record.levelname == "INFO"
    assert lines_with(record.getMessage(), "precision", "bfloat16", "cpu", "float32")


@pytest.mark.parametrize("taught", [False, True])
@pytest.mark.parametrize(("name", "normalize_over"), LOSSES)
def test_every_models_loss_and_gradients_survive_bfloat16(name, normalize_over, taught, make_model, sequences):
    model = make_model(name, normalize_over=normalize_over).train()
    if model.fit(sequences.training_sequences(), sequences.validation_events()):
        pytest.skip("fits in one call")
    windows = TrainingBatches(sequences, model.training_unit, 1000, 5, seed=0).get(0, 0, WHOLE)
    if taught:
        count = make_model("transitions")
        count.fit(sequences.training_sequences(), sequences.validation_events())
        windows = windows._replace(teacher=count.teacher(sequences.training_events(), 0.5, False, 0.25))
    torch.manual_seed(0)  # a teacher may draw targets
    expected = model.compute_loss(windows)["loss_total"]
    torch.manual_seed(0)
    loss = autocast(model.compute_loss, windows, "cpu")["loss_total"]
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(expected.item(), rel=0.02)
    whole = torch.cat([g.flatten() for g in torch.autograd.grad(expected, list(model.parameters()))])
    half = torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()))])
    assert half.dtype == torch.float32
    assert not torch.equal(whole, half)
    assert torch.nn.functional.cosine_similarity(whole, half, dim=0) > 0.99


@pytest.mark.parametrize(("key", "value", "names"), [
    ("precision", "float16", ["'float16'", "float32", "bfloat16"]), ("precision", "null", ["None", "float32"]),
    ("capture", "1", [1, "auto"]),
    ("capture", "always", ["'always'", "auto", "true", "false"])])
def test_wrong_values_of_the_keys_are_refused(make_config, key, value, names):
    where = f"--encoder_decoder.training_params.{key}"
    with refused(ConfigError, where, names=[f"encoder_decoder.training_params.{key}", *names]):
        make_config("encoder_decoder", **{key: value})
