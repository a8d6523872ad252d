"""A step can be captured as a CUDA graph, and has few operations: as far as a CPU and the meta device can tell."""

import itertools

import pytest
import torch

from recommendation.models import attention_bias, find_class, layers, names
from recommendation.models.abstract_model import Catalogue, Windows
from tests.operations import operations

from ..conftest import NUM_ITEMS, SIZES, random_codes, randomize, windows_of

OPTIONS = {"normalize_over": ["codebook", "valid_items"], "train_on": ["target", "every_position"],
           "encoder_positions": ["item", "code"]}
TRAINED = [name for name in names() if find_class(name).trained_by_gradient()]


def variants(name: str) -> list[dict]:
    """All combinations of the options of a recommender that change the training step."""
    known = {"encoder_decoder": OPTIONS, "decoder_only": {"normalize_over": OPTIONS["normalize_over"]},
             "encoder_retrieve": {"normalize_over": OPTIONS["normalize_over"]}}.get(name, {})
    known = known | {"dropout": [0.0, 0.1], "label_smoothing": [0.0, 0.1]}
    return [dict(zip(known, values, strict=True)) for values in itertools.product(*known.values())]


EVERY = pytest.mark.parametrize(("name", "own"), [
    pytest.param(name, own, id="-".join([name, *map(str, own.values())]))
    for name in TRAINED for own in variants(name)])
FOUR_AND_FOUR = {"num_encoder_layers": 4, "num_decoder_layers": 4, "d_model": 128, "d_ff": 1024, "d_kv": 64,
                 "num_heads": 6, "train_on": "every_position"}


def step_of(model, windows: Windows):
    def step() -> None:
        model.zero_grad(set_to_none=True)
        model.compute_loss(windows)["loss_total"].backward()

    return step


def random_windows(seed: int) -> Windows:
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(2, 7, (8,), generator=generator)
    items = torch.randint(NUM_ITEMS, (8, 6), generator=generator)
    return Windows(items.masked_fill(torch.arange(6) >= lengths.unsqueeze(1), -1), lengths)


def on_meta(windows: Windows) -> Windows:
    return Windows(windows.items.to("meta"), windows.lengths.to("meta"))


@EVERY
def test_a_step_runs_without_values(make_model, name, own):
    model = make_model(name, **own).train().to("meta")  # `item`, `nonzero` and `bool` raise on the meta device
    step_of(model, on_meta(random_windows(0)))()
    assert all(parameter.grad is not None for parameter in model.parameters())


@EVERY
def test_steps_of_one_shape_issue_the_same_operations(make_model, name, own):
    model, issued = make_model(name, **own).train(), []
    before = {key: tensor.data_ptr() for key, tensor in [*model.named_parameters(), *model.named_buffers()]}
    for seed in (0, 0, 1, 2):  # the first step makes the constants of the shape
        torch.manual_seed(seed)
        issued.append(operations(step_of(model, random_windows(seed))))
    assert issued[1] == issued[2] == issued[3]
    assert before == {key: tensor.data_ptr() for key, tensor in [*model.named_parameters(), *model.named_buffers()]}
    assert not any("arange" in operation for operation in issued[1] if name != "encoder_retrieve")


@pytest.mark.parametrize(("name", "own", "most"), [
    ("encoder_decoder", FOUR_AND_FOUR, 479), ("encoder_decoder", FOUR_AND_FOUR | {"encoder_positions": "item"}, 483),
    ("decoder_only", {"num_layers": 3}, 151), ("encoder_retrieve", {}, 154),
    ("sasrec", {}, 102)])
def test_a_step_has_few_operations(make_model, name, own, most):
    sizes = [5, 5, 5, 5]
    model = make_model(name, of=Catalogue(NUM_ITEMS, random_codes(NUM_ITEMS, sizes), sizes), dropout=0.1, **own)
    step = step_of(model.train().to("meta"), on_meta(random_windows(0)))
    step()  # makes the constants of the shape
    assert len(operations(step, fused=True)) <= most


@EVERY
def test_rows_of_padding_change_nothing(make_model, name, own):
    model = make_model(name, **own | {"dropout": 0.0}).train()
    if model.training_unit == "target":
        pytest.skip("each row has a target")
    randomize(model)
    found = []
    for empty in ([], [[]]):
        windows = windows_of([3, 8, 0, 29], *empty, [5, 21], *empty)
        step_of(model, windows)()
        gradients = [parameter.grad.clone() for parameter in model.parameters()]
        found.append([model.compute_loss(windows)["loss_total"].detach(), *gradients])
    for without, with_padding in zip(*found, strict=True):
        assert torch.allclose(without, with_padding, atol=1e-6)


@pytest.mark.parametrize("name", TRAINED)
def test_fused_attention_has_the_same_loss_and_gradients(make_model, name, monkeypatch):
    model, found = make_model(name).train(), []
    randomize(model)
    for fused in (False, True):
        monkeypatch.setattr(layers, "FUSED_ATTENTION", fused)
        step_of(model, windows_of([3, 8, 0, 29], [5, 21]))()
        found.append([parameter.grad.clone() for parameter in model.parameters()])
    for one, other in zip(*found, strict=True):
        assert torch.allclose(one, other, atol=1e-5)


@pytest.mark.parametrize("name", TRAINED)
def test_constants_follow_the_type_of_the_model(make_model, name):
    model, windows = make_model(name), windows_of([3, 8, 0, 29], [5, 21])
    expected = model.compute_loss(windows)["loss_total"]
    assert model.double().compute_loss(windows)["loss_total"].item() == pytest.approx(expected.item(), abs=1e-5)


def test_without_gradients_no_constant_is_kept():
    calls = []
    make = attention_bias.constant(lambda size: calls.append(size) or torch.zeros(size))
    with torch.no_grad():
        assert make(3).shape == make(3).shape == (3,)
    assert calls == [3, 3]
    assert make(3) is make(3)
    assert calls == [3, 3, 3]


def test_old_constants_are_dropped():
    make = attention_bias.constant(torch.zeros)
    first = make(1)
    for size in range(2, attention_bias.NUM_CONSTANTS + 2):
        make(size)
    assert make(1) is not first


def test_the_codebook_sizes_of_the_tests_differ():
    assert len(set(SIZES)) > 1  # so the steps above mask logits
