"""Training steps that can be captured as a CUDA graph: no synchronization, the same operations, the same memory."""

from itertools import chain

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from quantization.models import find_class
from quantization.models.abstract_vq import AbstractVQ
from tests.quantization.conftest import DOCUMENTED, WIDTH, seeded

TRAINED = sorted(name for name in DOCUMENTED if find_class(name).trained_by_gradient())
BATCH = 32
# Options that change the step of a quantizer with a `codebook:` section.
CODEBOOK_OPTIONS = [
    {}, {"distance": "cosine"}, {"update": "ema"}, {"update": "ema", "distance": "cosine"}, {"gradient": "rotation"},
    {"gradient": "gumbel", "update": "gradient"},
    {"gradient": "gumbel", "update": "gradient", "distance": "cosine", "sinkhorn_levels": "[]"},
    {"sinkhorn_levels": "[0, -1]"}, {"sinkhorn_levels": "[]", "update": "gradient"}, {"restart_dead": "false"},
    {"standardize": "true"}, {"standardize": "false"}]
OPTIONS = {"fsq": [{}, {"standardize": "true"}, {"num_levels": 1}]}
VARIANTS = [(name, options) for name in TRAINED for options in OPTIONS.get(name, CODEBOOK_OPTIONS)]
every_variant = pytest.mark.parametrize(
    ("name", "options"), VARIANTS, ids=[f"{name}-{'-'.join(map(str, chain(*options.items())))}"
                                        for name, options in VARIANTS])


@pytest.fixture
def ready(make_config, make_model, name, options):
    """A quantizer in training mode, initialized; and its items, of which some lack the second embedding."""
    model = make_model(make_config(name, sinkhorn_iterations=3, **options))
    items = torch.randn(2 * BATCH, WIDTH * len(model.embedding_suffixes(model.config, "td")), generator=seeded(3))
    items[::5, WIDTH:] = 0.0
    model.initialize(items, seeded())
    return model.train(), items


class Operations(TorchDispatchMode):
    """Records the ATen operations inside the `with` block."""

    def __init__(self):
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        self.names.append(str(operation))
        return operation(*args, **(kwargs or {}))


class OnlyOn(TorchDispatchMode):
    """Fails if an operation reads a tensor of another device, such as a copy from the host."""

    def __init__(self, device: str):
        super().__init__()
        self.device = device

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        result = operation(*args, **(kwargs or {}))
        devices = {value.device.type for value in tree_leaves((args, kwargs, result)) if isinstance(value, Tensor)}
        assert devices <= {self.device}, operation
        return result


def step(model: AbstractVQ, batch: Tensor, optimizer: torch.optim.Optimizer | None = None) -> None:
    loss = model.compute_loss(model(batch), batch)["loss_total"]
    if loss.requires_grad:
        loss.backward()
    if optimizer is not None:
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


@every_variant
def test_a_step_does_not_wait_for_the_device(ready, monkeypatch):
    model, items = ready
    # The device `meta` has no data: an operation that needs data on the host raises an error.
    model, batch = model.to("meta"), items[:BATCH].to("meta")
    for constructor in ("tensor", "as_tensor", "from_numpy"):  # they copy from the host
        monkeypatch.delattr(torch, constructor)
    with OnlyOn("meta"):
        step(model, batch)


@every_variant
def test_maintenance_does_not_wait_for_the_device(ready, name):
    model, items = ready
    model, items = model.to("meta"), items.to("meta")
    model.maintain(items, seeded())
    if name != "letter":  # it divides the codewords into groups on the host
        model.end_epoch(items, seeded())


@every_variant
def test_every_step_has_the_same_operations_and_memory(ready):
    model, items = ready
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=0.01, fused=True) if trained else None
    batch, recorded = torch.empty(BATCH, items.shape[1]), []

    def addresses() -> list[int]:
        state = optimizer.state.values() if optimizer else []
        moments = [value for values in state for value in values.values()]
        return [value.data_ptr() for value in (*model.parameters(), *model.buffers(), *moments, batch)]

    places = []
    for number in range(4):
        torch.manual_seed(number)
        batch.copy_(items[number * BATCH // 4:][:BATCH])
        with Operations() as operations:
            step(model, batch, optimizer)
        recorded.append(operations.names)
        model.maintain(items, seeded(number))
        model.end_epoch(items, seeded(number))
        places.append(addresses())
    assert all(names == recorded[1] for names in recorded[2:])  # the first step creates the state of the optimizer
    assert all(place == places[0] for place in places)
