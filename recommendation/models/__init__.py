"""Find the recommenders. Each recommender is a folder models/<name>/ with model.py and config.yaml."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common.config import Config, declared, resolve
from common.digest import code_digest
from common.registry import load_class, unknown

if TYPE_CHECKING:
    from .abstract_model import AbstractRecommender, Catalogue

MODELS = Path(__file__).resolve().parent
DEFAULTS = MODELS / "defaults.yaml"


def names() -> list[str]:
    """Return the names of all recommenders. A recommender is a folder that has a config.yaml."""
    return sorted(path.parent.name for path in MODELS.glob("*/config.yaml"))


def baselines() -> list[str]:
    """Return the names of the baselines. A baseline is a recommender with `baseline: true` in its YAML."""
    return [name for name in names() if declared(name, config_path(name)).get("baseline")]


def uses_neighbours(config: Config) -> bool:
    """Return whether the model, its prior or its teacher reads the key `neighbours_from`."""
    users = {config.name, config.training_params["prior"], config.training_params["teacher"]} & set(names())
    return any("neighbours_from" in declared(name, config_path(name)).get("uses", []) for name in users)


def applies(config: Config, key: str) -> bool:
    """Return whether a configuration key has an effect on the recommender of this configuration."""
    name = key.rpartition(".")[2]
    return config.has_key(key) and not (name == "neighbours_from" and not uses_neighbours(config)
                                        or name in ("teacher_weight", "teacher_temperature")
                                        and config.training_params["teacher"] == "none")


def config_path(name: str, flag: str = "--model") -> Path:
    """Return the path of the recommender's YAML. Raises ConfigError if no recommender has this name."""
    if name not in names():
        raise unknown(flag, name, "recommender", names(), f"recommendation/models/{name}/ with model.py and "
                      "config.yaml")
    return MODELS / name / "config.yaml"


def model_path(name: str) -> Path:
    return MODELS / name / "model.py"


def code_of(name: str, prior: str, teacher: str) -> str:
    """Return a digest of the code that trains the recommender `name`, with its prior and its teacher (or "none").

    The digest also covers the settings of the prior and the teacher, because they come from the YAML of these models.
    """
    digests = [code_digest(model_path(name), MODELS.parent)]
    for baseline in sorted({prior, teacher} & set(names())):
        settings = json.dumps(_own_config(baseline)[baseline]["model_params"], sort_keys=True)
        digests.append(code_digest(model_path(baseline), MODELS.parent, settings))
    return "-".join(digests)


def make_baseline(name: str, catalogue: "Catalogue") -> "AbstractRecommender":
    """Return the baseline `name` with the settings of its YAML, not yet fitted."""
    return find_class(name)(_own_config(name).for_model(), catalogue)


def _own_config(name: str) -> Config:
    return resolve(name, config_path(name), DEFAULTS, [])


def find_class(name: str) -> type[Any]:
    """Return the class in models/<name>/model.py that has the name of the folder, ignoring case and underscores."""
    from .abstract_model import AbstractRecommender

    return load_class(model_path(name), f"{__name__}.{name}.model", name, AbstractRecommender)
