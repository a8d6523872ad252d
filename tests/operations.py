"""The ATen operations of a step."""

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

# Operations that return a view or memory without values. They launch no kernel.
FREE = {"_unsafe_view", "empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"}


def operations(step: Callable[[], object], fused: bool = False) -> list[str]:
    """Return the names of the operations of `step` that launch a kernel, in their order.

    fused: count dropout, RMSNorm and fused attention as one operation in each direction, as CUDA runs them. The meta
        device and the CPU run several operations instead.
    """
    recorder = _Recorder()
    with ExitStack() as stack:
        if fused:
            stack.enter_context(_FusedKernels())
        stack.enter_context(recorder)
        step()
    return recorder.names


class _Recorder(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not func.is_view and func.overloadpacket.__name__ not in FREE:
            self.names.append(str(func))
        return func(*args, **kwargs or {})


class _FusedKernels(TorchFunctionMode):
    def __torch_function__(self, func: Callable, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.dropout:
            return torch.native_dropout(args[0], kwargs["p"], kwargs["training"])[0]
        if func is F.rms_norm:  # layer_norm has the same arguments, and one kernel in each direction on all devices
            return F.layer_norm(*args, kwargs["weight"], None, kwargs["eps"])
        if func is F.scaled_dot_product_attention:
            return torch.ops.aten._scaled_dot_product_efficient_attention(
                *args, kwargs["attn_mask"], True, kwargs["dropout_p"], scale=kwargs["scale"])[0]
        return func(*args, **kwargs)
