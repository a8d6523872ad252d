"""Recommenders, found by name: models/<name>/model.py with its class, and config.yaml beside it."""

from pathlib import Path
from typing import Any

from common.config import declared
from common.digest import code_digest
from common.registry import load_class, unknown

MODELS = Path(__file__).resolve().parent
DEFAULTS = MODELS / "defaults.yaml"


def names() -> list[str]:
    """Every recommender there is: the folders with a config.yaml are the list."""
    return sorted(path.parent.name for path in MODELS.glob("*/config.yaml"))


def baselines() -> list[str]:
    """The recommenders that others have to beat; each says so in its YAML."""
    return [name for name in names() if declared(name, config_path(name)).get("baseline")]


def config_path(name: str) -> Path:
    """The recommender's own YAML. Raises ConfigError for an unknown name."""
    if name not in names():
        raise unknown("--model", name, "recommender", names(), f"recommendation/models/{name}/ with model.py and "
                      "config.yaml")
    return MODELS / name / "config.yaml"


def model_path(name: str) -> Path:
    return MODELS / name / "model.py"


def code_of(name: str) -> str:
    """The digest of the code that trains a recommender."""
    return code_digest(model_path(name), MODELS.parent)


def find_class(name: str) -> type[Any]:
    """The class in models/<name>/model.py whose name is the folder's, except for case and underscores."""
    from .abstract_model import AbstractRecommender

    return load_class(model_path(name), f"{__name__}.{name}.model", name, AbstractRecommender)
