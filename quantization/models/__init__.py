"""Find quantizers by name: the class in models/<name>.py and the configuration in configs/<name>_config.yaml."""

from pathlib import Path
from typing import Any

from common.registry import load_class, unknown

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
DEFAULTS = CONFIGS / "defaults.yaml"


def names() -> list[str]:
    """Return the names of all quantizers. Each has a YAML file in `CONFIGS`."""
    return sorted(path.name.removesuffix("_config.yaml") for path in CONFIGS.glob("*_config.yaml"))


def config_path(name: str) -> Path:
    """Return the path of the quantizer's YAML file. Raises ConfigError for an unknown name."""
    if name not in names():
        raise unknown("--quantizer_name", name, "quantizer", names(), f"quantization/models/{name}.py and "
                      f"quantization/configs/{name}_config.yaml")
    return CONFIGS / f"{name}_config.yaml"


def model_path(name: str) -> Path:
    return Path(__file__).with_name(f"{name}.py")


def find_class(name: str) -> type[Any]:
    """Return the class in models/<name>.py that has the name of the file, except for case and underscores.

    Raises ConfigError if the file or the class is missing.
    """
    from .abstract_vq import AbstractVQ

    return load_class(model_path(name), f"{__name__}.{name}", name, AbstractVQ)
