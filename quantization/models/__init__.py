"""Find quantizers by name.

The class of a quantizer is in models/<name>.py, and the configuration is in configs/<name>_config.yaml.
"""

from pathlib import Path
from typing import Any

from common.registry import load_class, unknown

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
DEFAULTS = CONFIGS / "defaults.yaml"


def names() -> list[str]:
    """Return the sorted names of all quantizers that have a YAML file in the folder `CONFIGS`."""
    return sorted(path.name.removesuffix("_config.yaml") for path in CONFIGS.glob("*_config.yaml"))


def config_path(name: str) -> Path:
    """Return the path of the quantizer's YAML file. Raises ConfigError if the name is unknown."""
    if name not in names():
        raise unknown("--quantizer_name", name, "quantizer", names(), f"quantization/models/{name}.py and "
                      f"quantization/configs/{name}_config.yaml")
    return CONFIGS / f"{name}_config.yaml"


def model_path(name: str) -> Path:
    return Path(__file__).with_name(f"{name}.py")


def find_class(name: str) -> type[Any]:
    """Return the class of the quantizer `name`, which is defined in models/<name>.py.

    The class must have the name of the quantizer, ignoring case and underscores. Raises ConfigError if
    the file does not exist or does not define the class.
    """
    from .abstract_vq import AbstractVQ

    return load_class(model_path(name), f"{__name__}.{name}", name, AbstractVQ)
