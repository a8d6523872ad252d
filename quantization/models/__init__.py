"""Quantizers, found by name: models/<name>.py with its class, configs/<name>_config.yaml."""

import importlib
from pathlib import Path

from common.errors import ConfigError, plug_in_files
from common.errors import nearest as nearest_name  # `nearest` is a module of this package

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
DEFAULTS = CONFIGS / "defaults.yaml"


def names() -> list[str]:
    """Every quantizer there is: the YAMLs are the list."""
    return sorted(path.name.removesuffix("_config.yaml") for path in CONFIGS.glob("*_config.yaml"))


def config_path(name: str) -> Path:
    """The quantizer's own YAML. Raises ConfigError for an unknown name."""
    if name not in names():
        raise ConfigError(f"--quantizer_name {name}", "there is no such quantizer", nearest_name(name, names()),
                          f"one of {', '.join(names())}; or add quantization/models/{name}.py and "
                          f"quantization/configs/{name}_config.yaml")
    return CONFIGS / f"{name}_config.yaml"


def model_path(name: str) -> Path:
    return Path(__file__).with_name(f"{name}.py")


def find_class(name: str) -> type:
    """The class in models/<name>.py whose name is the file's, but for case and underscores."""
    from .abstract_vq import AbstractVQ

    path = model_path(name)
    if not path.exists():
        raise ConfigError(path, "not there", f"configs/{name}_config.yaml names this quantizer", "add the file")
    plug_in_files.add(str(path))
    module = importlib.import_module(f"{__name__}.{name}")
    wanted = name.replace("_", "").lower()
    for attribute, value in vars(module).items():
        if attribute.replace("_", "").lower() == wanted and isinstance(value, type) and issubclass(value, AbstractVQ):
            return value
    raise ConfigError(path, f"has no class named like the file ({wanted.upper()}) derived from AbstractVQ",
                      fix="name the class like the file and derive it from AbstractVQ")
