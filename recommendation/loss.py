"""How a training step computes its loss: in which precision, and whether compiled."""

import logging
from collections.abc import Callable

import torch
from torch import Tensor

from common.errors import ConfigError, out_of_memory
from recommendation.models.abstract_model import AbstractRecommender, Windows

log = logging.getLogger(__name__)

Loss = Callable[[Windows], dict[str, Tensor]]


def loss_function(model: AbstractRecommender, params: dict, device: torch.device) -> Loss:
    """The model's `compute_loss` as the training parameters `precision` and `compile` ask for it.

    Weights, optimizer and evaluation stay in float32 whatever these two say.
    """
    compute = _compiled(model.compute_loss) if params["compile"] else model.compute_loss
    if params["precision"] == "float32":
        return compute
    if device.type != "cuda":
        log.info("precision: bfloat16 is for CUDA; on the %s this runs in float32", device.type)
        return compute
    return lambda windows: _autocast(compute, windows, device.type)


def _autocast(compute: Loss, windows: Windows, device_type: str) -> dict[str, Tensor]:
    """bfloat16 has float32's range, so that no loss needs scaling."""
    with torch.autocast(device_type, dtype=torch.bfloat16):
        return compute(windows)


def _compiled(compute: Loss) -> Loss:
    """Compiled at the first call, once for windows of all shapes."""
    from torch._dynamo.exc import TorchDynamoException  # torch has no public name for what its compiler raises

    compiled = torch.compile(compute, dynamic=True)

    def call(windows: Windows) -> dict[str, Tensor]:
        try:
            return compiled(windows)
        except TorchDynamoException as error:
            if out_of_memory(error):
                raise
            lines = [line.strip() for line in str(error).splitlines() if line.strip()]  # a page, the cause on top
            raise ConfigError("training_params.compile", "the model cannot be compiled here", " ".join(lines[:2]),
                              "--compile false") from error

    return call
