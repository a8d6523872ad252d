"""Precision of float32 matrix products on a GPU."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def matmul_precision(precision: str) -> Iterator[None]:
    """Compute float32 matrix products on CUDA devices in this precision, inside the `with` block.

    precision: "ieee" (full float32) or "tf32" (inputs are rounded to 10 bits after the point; several times faster)

    The function can also be used as a decorator. Products on the CPU do not change. A captured CUDA graph keeps the
    precision of its capture.
    """
    # PyTorch has an older way to set this, `set_float32_matmul_precision` and `allow_tf32`. Some of its functions raise
    # an error after a mixture of both, so this project uses only this one.
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    matmul.fp32_precision = precision
    try:
        yield
    finally:
        matmul.fp32_precision = before
