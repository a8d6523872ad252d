"""Which device a run computes on."""

import logging

import torch

from common.errors import ConfigError

log = logging.getLogger(__name__)


def resolve_device(name: str, origin: str) -> torch.device:
    """`auto` takes CUDA where there is one.

    Where there is none, a YAML's `cuda` falls back to the CPU with one line that says so; the same
    name on the command line (`origin` begins with `--`) is the user's explicit wish, and an error.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
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
    return device
