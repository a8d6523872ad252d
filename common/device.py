"""Which device a run computes on."""

import logging

import torch

from common.distributed import local_rank, local_world_size, world_size
from common.errors import ConfigError

log = logging.getLogger(__name__)


def resolve_device(name: str, origin: str) -> torch.device:
    """`auto` takes CUDA where there is one.

    Where there is none, a YAML's `cuda` falls back to the CPU with one line that says so; the same
    name on the command line (`origin` begins with `--`) is the user's explicit wish, and an error.
    Of several processes on a machine each takes a GPU of its own.
    """
    if name == "auto":
        return _own(torch.device("cuda" if torch.cuda.is_available() else "cpu"), origin)
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ConfigError(origin, f"{name!r} is no device", fix="auto, cpu, cuda or cuda:<n>") from error
    if device.type == "cuda" and (not torch.cuda.is_available() or (device.index or 0) >= torch.cuda.device_count()):
        if origin.startswith("--"):
            raise ConfigError(origin, f"{name!r} is not there", f"{torch.cuda.device_count()} CUDA devices are visible",
                              "--device auto or --device cpu")
        log.warning("%s asks for %s, which is not there: running on the CPU", origin, name)
        return torch.device("cpu")
    return _own(device, origin)


def _own(device: torch.device, origin: str) -> torch.device:
    """This process's GPU, if there are several processes."""
    if world_size() == 1 or device.type != "cuda":
        return device
    if device.index is not None:
        raise ConfigError(origin, f"names one GPU, {device}, for {world_size()} processes", "each takes its own",
                          "--device cuda or --device auto")
    if local_world_size() > torch.cuda.device_count():
        raise ConfigError("torchrun", f"started {local_world_size()} processes on a machine with "
                          f"{torch.cuda.device_count()} GPUs", "each takes its own",
                          f"--nproc_per_node {torch.cuda.device_count()}, or --device cpu")
    return torch.device("cuda", local_rank())
