"""Selection of the device on which a run computes, and copies to it."""

import logging
import re

import torch

from common.distributed import local_rank, local_world_size, world_size
from common.errors import ConfigError

log = logging.getLogger(__name__)


# `torch.device` rejects some of these names: it knows npu and tpu only with a plug-in, and rejects very large numbers.
OTHER_DEVICES = re.compile(r"(cuda|npu|tpu)(:\d+)?")


def resolve_device(name: str, origin: str) -> torch.device:
    """Return the torch device called `name`, for example `cpu`. `auto` selects CUDA if it is available, else the CPU.

    `origin` is the place where the name was set: a flag such as `--device`, or a line of a YAML file. If the device is
    not available, this function raises ConfigError if a flag has set the device. If a YAML file has set it, the
    function logs a warning and returns the CPU. If there are several processes on a machine, each process gets its own
    GPU.
    """
    if name == "auto":
        return _for_this_process(torch.device("cuda" if torch.cuda.is_available() else "cpu"), origin)
    device = _parse(name)
    if device is None and not OTHER_DEVICES.fullmatch(name):
        raise ConfigError(origin, f"unknown device {name!r}", fix="use auto, cpu, cuda or cuda:<n>")
    if device is None or not _is_available(device, int(name.partition(":")[2] or 0)):
        if origin.startswith("--"):
            why = (f"{torch.cuda.device_count()} CUDA devices are visible" if name.startswith("cuda") else
                   "PyTorch cannot use this device on this machine")
            raise ConfigError(origin, f"{name!r} is not available", why, "use --device auto or --device cpu")
        log.warning("%s: device %s is not available; running on the CPU", origin, name)
        return torch.device("cpu")
    return _for_this_process(device, origin)


def send(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Copy a tensor from the CPU to a device, without waiting for the work of the device."""
    # A copy from memory that is not pinned waits for the steps that the GPU has not finished yet.
    return (tensor.pin_memory() if device.type == "cuda" else tensor).to(device, non_blocking=True)


def _parse(name: str) -> torch.device | None:
    try:
        return torch.device(name)
    except RuntimeError:
        return None


def _is_available(device: torch.device, index: int) -> bool:
    if device.type == "cuda":
        return torch.cuda.is_available() and index < torch.cuda.device_count()
    try:
        return torch.ones(1, device=device).add(1).item() == 2  # the only test that works for all types of devices
    except (RuntimeError, AssertionError, ImportError):
        return False


def _for_this_process(device: torch.device, origin: str) -> torch.device:
    """Return this process's own GPU if there are several processes, else `device`."""
    if world_size() == 1 or device.type != "cuda":
        return device
    if device.index is not None:
        raise ConfigError(origin, f"{device} is a single GPU, but there are {world_size()} processes",
                          "Each process needs its own GPU", "use --device cuda or --device auto")
    if local_world_size() > torch.cuda.device_count():
        raise ConfigError("torchrun", f"started {local_world_size()} processes on a machine with "
                          f"{torch.cuda.device_count()} GPUs", "Each process needs its own GPU",
                          f"use --nproc_per_node {torch.cuda.device_count()}, or --device cpu")
    return torch.device("cuda", local_rank())
