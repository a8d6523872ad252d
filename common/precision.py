"""The precision of float32 matrix products on CUDA."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def matmul_precision(precision: str) -> Iterator[None]:
    """Compute float32 matrix products on CUDA with this precision inside the `with` block.

    precision: `ieee` for full float32, or `tf32` for inputs that are rounded to 10 bits of mantissa, which is several
        times as fast
    """
    # PyTorch has an older interface for the same setting (`allow_tf32`). It raises an error if both are used.
    setting = torch.backends.cuda.matmul
    before = setting.fp32_precision
    setting.fp32_precision = precision
    try:
        yield
    finally:
        setting.fp32_precision = before
