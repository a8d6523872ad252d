"""The hyper-parameters in configs/fusion.yaml, read strictly: no key unknown, missing, or of another kind."""

from pathlib import Path
from typing import NamedTuple, get_type_hints

from common.config import BOUNDS, CHOICES, load_yaml
from common.errors import ConfigError, nearest
from dataloader.options import CONFIGS

FILE = CONFIGS / "fusion.yaml"
OWN_BOUNDS = {  # (smallest, largest); None is open
    "num_dims": (1, None), "smoothing": (0, None), "oversampling": (1, None), "filter_degree": (1, None),
    "max_products": (1, None), "tolerance": (0, 1), "temperature": (1e-3, 10), "min_temperature": (1e-3, 10),
    "max_held_out": (1, None),
}


class Collaborative(NamedTuple):
    """The section `cf`."""

    num_dims: int
    smoothing: float
    oversampling: int
    filter_degree: int
    max_products: int
    tolerance: float


class Alignment(NamedTuple):
    """The section `fused-align`; from `batch_size` on, what `common.training` knows."""

    temperature: float
    min_temperature: float
    max_held_out: int
    batch_size: int
    epochs: int
    max_steps: int
    lr: float
    lr_schedule: str
    warmup_steps: int
    optimizer: str
    weight_decay: float
    clip_norm: float
    eval_every: int
    patience: int
    checkpoint_seconds: float


def load_collaborative(path: Path = FILE) -> Collaborative:
    return Collaborative(**_section(path, "cf", Collaborative))


def load_alignment(path: Path = FILE) -> Alignment:
    return Alignment(**_section(path, "fused-align", Alignment))


def _section(path: Path, name: str, kind: type) -> dict:
    """The section's values, each of the kind that `kind` says and within its bounds. Raises ConfigError."""
    config, origins = load_yaml(path)
    values = config.get(name)
    if not isinstance(values, dict):
        raise ConfigError(path, f"has no section {name!r}", nearest(name, list(config)), f"add `{name}:` and its keys")
    kinds = get_type_hints(kind)
    for key in values:
        if key not in kinds:
            raise ConfigError(origins[f"{name}.{key}"], f"unknown key {name}.{key}", nearest(key, list(kinds)),
                              "correct the name")
    if lacking := [key for key in kinds if key not in values]:
        raise ConfigError(path, f"{name} lacks {lacking[0]}", fix=f"add {lacking[0]}: <value>")
    return {key: _checked(origins[f"{name}.{key}"], key, values[key], kind) for key, kind in kinds.items()}


def _checked(where: str, key: str, value: object, kind: type) -> object:
    if kind is float and type(value) is int:
        value = float(value)
    if type(value) is not kind:
        raise ConfigError(where, f"{key} is {value!r}", f"it must be of type {kind.__name__}", "correct the value")
    low, high = OWN_BOUNDS.get(key) or BOUNDS.get(key, (None, None))
    if (low is not None and not value >= low) or (high is not None and not value <= high):
        raise ConfigError(where, f"{key} is {value!r}",
                          f"it must be at least {low}" if high is None else f"it must be from {low} to {high}",
                          "correct the value")
    if key in CHOICES and value not in CHOICES[key]:
        raise ConfigError(where, f"{key} is {value!r}", nearest(str(value), list(CHOICES[key])),
                          "one of " + ", ".join(CHOICES[key]))
    return value
