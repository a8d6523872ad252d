"""Checks that the methods of a quantizer follow the contract of `AbstractVQ`."""

import operator

import torch
from torch import Tensor

from common.errors import ConfigError
from quantization.models.abstract_vq import AbstractVQ

# N items, B batch, L levels

NUM_CHECKED = 64  # number of items for the check
MAX_MOVED = 0.05  # maximum share of items whose codes change if each item is encoded alone


def check_contract(model: AbstractVQ, xs: Tensor) -> None:
    """Call the methods of a quantizer on a few items, and check the results.

    xs: the input of the model, (N, D)

    Raises ConfigError if a method returns a wrong value. Afterwards, the model is in eval mode.
    """
    batch = xs[:NUM_CHECKED]
    model.eval()
    with torch.no_grad():
        outputs = model(batch)
        if not isinstance(outputs, tuple) or len(outputs) != 3:
            raise ConfigError(_place(model, "forward"), f"returned {_described(outputs)}",
                              fix="return (reconstruction, loss, codes)")
        losses = model.compute_loss(outputs, batch)
        if not isinstance(losses, dict) or "loss_total" not in losses:
            raise ConfigError(_place(model, "compute_loss"), f"returned {_described(losses)}",
                              fix='return {"loss_total": <the loss to minimize>, ...}')
        for name, loss in losses.items():
            if not isinstance(loss, Tensor) or loss.ndim:
                raise ConfigError(_place(model, "compute_loss"), f"returned {name} as {_described(loss)}",
                                  fix="return every loss as a scalar tensor")
        codes = checked_codes(model, batch)
        alone = torch.cat([shaped_codes(model, row) for row in batch.split(1)])
        check_range(model, alone)
        moved = (codes != alone).any(dim=1).sum()  # rounding may give a row another codeword
        if moved > MAX_MOVED * len(batch) or not torch.equal(codes, checked_codes(model, batch)):
            raise ConfigError(_place(model, "get_codes"), "returned different codes for the same items",
                              "The codes of an item must not depend on randomness or on the rest of the batch",
                              "remove noise, dropout and batch statistics from get_codes")


def checked_codes(model: AbstractVQ, xs: Tensor) -> Tensor:
    """Compute the codes of a batch: (B, D) -> int64 (B, L).

    Raises ConfigError if the codes have a wrong dtype, shape or range.
    """
    codes = shaped_codes(model, xs)
    check_range(model, codes)
    return codes


def shaped_codes(model: AbstractVQ, xs: Tensor) -> Tensor:
    """Compute the codes of a batch without a check of their range: (B, D) -> int64 (B, L).

    Raises ConfigError if the codes have a wrong dtype or shape.
    """
    where = _place(model, "get_codes")
    codes = model.get_codes(xs)
    if not isinstance(codes, Tensor) or codes.is_floating_point() or codes.dtype == torch.bool:
        raise ConfigError(where, f"returned {getattr(codes, 'dtype', type(codes).__name__)}",
                          "Codes must be a tensor of integers", "return integer codes of shape (batch, levels)")
    if codes.ndim == 1:
        codes = codes.unsqueeze(1)
    if codes.ndim != 2 or len(codes) != len(xs):
        raise ConfigError(where, f"returned shape {tuple(codes.shape)} for {len(xs)} items",
                          fix="return codes of shape (batch, levels)")
    return codes.long()  # with a shorter type, computations on codes would overflow


def check_range(model: AbstractVQ, codes: Tensor) -> list[int]:
    """Return the size of each level. If the model does not know it, it is the largest of the codes (N, L) plus 1.

    Raises ConfigError if there is a wrong number of levels, or a code that is negative or too large. On a GPU, this
    waits for the device once.
    """
    sizes = model.codebook_sizes
    smallest, largest = torch.stack(codes.aminmax(dim=0)).tolist()
    limits = sizes or [torch.iinfo(torch.int32).max] * len(largest)
    if len(limits) != len(largest) or min(smallest) < 0 or any(map(operator.ge, largest, limits)):
        raise ConfigError(_place(model, "get_codes"), f"returned codes from {smallest} to {largest} "
                          "(the smallest and the largest code of each level)",
                          f"The codebook sizes are {sizes}", "return one code per level, from 0 to codebook size - 1")
    return sizes or [code + 1 for code in largest]


def _place(model: AbstractVQ, method: str) -> str:
    return f"{type(model).__module__}.{type(model).__name__}.{method}"


def _described(value: object) -> str:
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)}"
    if isinstance(value, dict):
        return f"a dict with {', '.join(map(repr, value)) or 'no keys'}"
    return f"{len(value)} values" if isinstance(value, tuple) else f"a {type(value).__name__}"
