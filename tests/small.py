"""Small configurations of a model, for fast tests."""

from pathlib import Path

from common.config import Config, resolve


def small_config(name: str, model_yaml: Path, defaults_yaml: Path, sizes: dict[str, object]) -> Config:
    """Return the model's configuration. `sizes` replaces the values of the keys that the model uses."""
    plain = resolve(name, model_yaml, defaults_yaml, [])
    sections = {"common": plain["common"], f"{name}.training_params": plain.training_params,
                f"{name}.model_params": plain[name]["model_params"]}
    overrides = [(f"{section}.{key}", str(value)) for section, params in sections.items()
                 for key, value in sizes.items() if key in params and plain.has_key(f"{section}.{key}")]
    return resolve(name, model_yaml, defaults_yaml, overrides)
