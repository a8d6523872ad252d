"""Selection of the device on which a run computes."""

import logging

import torch

from common.distributed import local_rank, local_world_size, world_size
from common.errors import ConfigError

log = logging.getLogger(__name__)


def resolve_device(name: str, origin: str) -> torch.device:
    """Return the torch device called `name`, for example `cpu`. `auto` selects CUDA if it is available, else the CPU.

    `origin` is the place where the name was set: a flag such as `--device`, or a line of a YAML file. If CUDA is not
    available, this function raises ConfigError for a `cuda` that was set by a flag. For a `cuda` in a YAML file, it
    logs a warning and returns the CPU. If there are several processes on a machine, each process gets its own GPU.
    """
    if name == "auto":
        return _for_this_process(torch.device("cuda" if torch.cuda.is_available() else "cpu"), origin)
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ConfigError(origin, f"unknown device {name!r}", fix="use auto, cpu, cuda or cuda:<n>") from error
    if device.type == "cuda" and (not torch.cuda.is_available() or (device.index or 0) >= torch.cuda.device_count()):
        if origin.startswith("--"):
            raise ConfigError(origin, f"{name!r} is not available", f"{torch.cuda.device_count()} CUDA devices are "
                              "visible", "use --device auto or --device cpu")
        log.warning("%s: device %s is not available; running on the CPU", origin, name)
        return torch.device("cpu")
    return _for_this_process(device, origin)


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
