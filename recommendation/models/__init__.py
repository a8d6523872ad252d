"""Recommenders, found by name: models/<name>/model.py with its class, and config.yaml beside it."""

import importlib
from pathlib import Path

from common.config import declared
from common.digest import code_digest
from common.errors import ConfigError, closest, nearest, plug_in_files

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
        close = closest(name, names())
        raise ConfigError(f"--model {name}", "there is no such recommender", nearest(name, names()),
                          f"--model {close}" if close else f"one of {', '.join(names())}; or add "
                          f"recommendation/models/{name}/ with model.py and config.yaml")
    return MODELS / name / "config.yaml"


def model_path(name: str) -> Path:
    return MODELS / name / "model.py"


def code_of(name: str) -> str:
    """The digest of the code that trains a recommender."""
    return code_digest(model_path(name), MODELS.parent)


def find_class(name: str) -> type:
    """The class in models/<name>/model.py whose name is the folder's, but for case and underscores."""
    from .abstract_model import AbstractRecommender

    path = model_path(name)
    if not path.exists():
        raise ConfigError(path, "not there", "config.yaml beside it names this recommender", "add the file")
    plug_in_files.add(str(path))
    module = importlib.import_module(f"{__name__}.{name}.model")
    wanted = name.replace("_", "").lower()
    for attribute, value in vars(module).items():
        if (attribute.replace("_", "").lower() == wanted and isinstance(value, type)
                and issubclass(value, AbstractRecommender)):
            return value
    raise ConfigError(path, f"has no class named like the folder ({wanted}) derived from AbstractRecommender",
                      fix="name the class like the folder and derive it from AbstractRecommender")
