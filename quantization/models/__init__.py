"""Quantizers, found by name: models/<name>.py with its class, configs/<name>_config.yaml."""

from pathlib import Path
from typing import Any

from common.registry import load_class, unknown

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
DEFAULTS = CONFIGS / "defaults.yaml"


def names() -> list[str]:
    """Every quantizer there is: the YAMLs are the list."""
    return sorted(path.name.removesuffix("_config.yaml") for path in CONFIGS.glob("*_config.yaml"))


def config_path(name: str) -> Path:
    """The quantizer's own YAML. Raises ConfigError for an unknown name."""
    if name not in names():
        raise unknown("--quantizer_name", name, "quantizer", names(), f"quantization/models/{name}.py and "
                      f"quantization/configs/{name}_config.yaml")
    return CONFIGS / f"{name}_config.yaml"


def model_path(name: str) -> Path:
    return Path(__file__).with_name(f"{name}.py")


def find_class(name: str) -> type[Any]:
    """The class in models/<name>.py whose name is the file's, except for case and underscores."""
    from .abstract_vq import AbstractVQ

    return load_class(model_path(name), f"{__name__}.{name}", name, AbstractVQ)
