"""Configuration: strict YAML, defaults, overrides, and the checks that come before any heavy import."""

import copy
import logging
import re
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import NamedTuple

import yaml

from common.errors import ConfigError, nearest

log = logging.getLogger(__name__)

# What the keys of `common` and of the training loop (common/training.py) may hold. A bound is (smallest, largest);
# None is open. A stage adds its own keys in defaults.yaml, and a model in its YAML, under `bounds` and `choices`.
BOUNDS: dict[str, tuple] = {
    "seed": (0, 2**31 - 1), "epochs": (1, None), "max_steps": (1, None), "batch_size": (1, None), "lr": (0, None),
    "weight_decay": (0, None), "warmup_steps": (0, None), "clip_norm": (0, None), "eval_every": (1, None),
    "patience": (1, None), "checkpoint_seconds": (0, None),
}
CHOICES: dict[str, tuple] = {
    "select_mode": ("min", "max"), "optimizer": ("AdamW", "Adam", "SGD"), "lr_schedule": ("constant", "cosine"),
}
NULLABLE = {"patience": int, "max_steps": int}
SECTIONS = ("model_params", "training_params")
DECLARED = {"baseline": bool, "uses": list, "bounds": dict, "choices": dict}  # what a model's YAML may also say of it


class StrictLoader(yaml.SafeLoader):
    """YAML without surprises: `1e-4` is a float, a duplicate key is an error."""


StrictLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?[0-9][0-9_]*(\.[0-9_]*)?[eE][-+]?[0-9]+$"), list("-+0123456789"))


class TrackedParams(dict):
    """A `model_params` mapping that knows which of its keys were read (also by `**` or a loop)."""

    def __init__(self, values: dict, where: str = "model_params"):
        super().__init__(values)
        self.read: set[str] = set()
        self.where = where

    def __getitem__(self, key):
        self.read.add(key)
        return super().__getitem__(key)

    def __missing__(self, key):
        raise ConfigError(self.where, f"the model needs {key!r}", nearest(key, self.unread()), f"add {key}: <value>")

    def get(self, key, default=None):
        self.read.add(key)
        return super().get(key, default)

    def setdefault(self, key, default=None):
        self.read.add(key)
        return super().setdefault(key, default)

    def __iter__(self):  # overridden, so that `**params` takes the slow path through __getitem__
        return iter(list(super().keys()))

    def items(self):
        self.read.update(super().keys())
        return super().items()

    def values(self):
        self.read.update(super().keys())
        return super().values()

    def unread(self) -> list[str]:
        return sorted(set(super().keys()) - self.read)


class Rules(NamedTuple):
    """What keys may hold, and which training parameters are used."""

    bounds: dict[str, tuple]  # key -> (smallest, largest)
    choices: dict[str, tuple]  # key -> its words
    always: set[str]          # training parameters that every model uses
    if_read: set[str]         # those that only a model which reads them uses
    uses: set[str] | None     # what the model declares to use besides `always`; None: it declares nothing


class Config:
    """A resolved configuration: `values` as nested dicts, and where each key came from."""

    def __init__(self, name: str, values: dict, origins: dict[str, str], rules: Rules, defaults: Path):
        self.name, self.values, self.origins, self.rules, self.defaults = name, values, origins, rules, defaults

    def __getitem__(self, key: str):
        return self.values[key]

    @property
    def training_params(self) -> dict:
        return self.values[self.name]["training_params"]

    def has_key(self, key: str) -> bool:
        """Whether `key`, a leaf or a path to it, names a key that the model uses as far as its YAML says."""
        paths = [path for path in _leaves(self.values) if path == key or path.endswith(f".{key}")]
        uses = self.rules.uses
        return any(uses is None or not path.startswith(f"{self.name}.training_params.")
                   or path.rpartition(".")[2] in self.rules.always | uses for path in paths)

    def leaf_names(self) -> list[str]:
        """The last part of every key."""
        return [path.rpartition(".")[2] for path in _leaves(self.values)]

    def for_model(self, **data) -> dict:
        """What a model's constructor gets: the same nested dicts plus `data`; which of its keys it reads is tracked."""
        paths = {section: f"{self.name}.{section}" for section in SECTIONS}
        own = {section: TrackedParams(self.values[self.name][section], self.origins.get(path, path))
               for section, path in paths.items()}
        return {**self.values, self.name: own, "data": data}

    def check_all_read(self, model_config: dict) -> None:
        """Raise ConfigError for a model parameter that the built model never looked at."""
        params = model_config[self.name]["model_params"]
        for key in params.unread():
            path = f"{self.name}.model_params.{key}"
            raise ConfigError(self.origins.get(path, path), f"unused key {path}", nearest(key, sorted(params.read)),
                              "remove the key or correct its name")

    def check_training_keys(self, model_config: dict, by_gradient: bool) -> None:
        """Find training parameters that have no effect on the built model.

        On the command line such a key is a ConfigError, in a YAML of the model's a warning.
        """
        keys = set(self.training_params)
        used = self.rules.uses if self.rules.uses is not None else keys - self.rules.if_read if by_gradient else set()
        used = used | self.rules.always | model_config[self.name]["training_params"].read
        reject_unused(self, used)
        for key in sorted(keys - used):
            where = self.origins[f"{self.name}.training_params.{key}"]
            if not where.startswith(f"{self.defaults}:"):
                log.warning("%s: unused key %s: %s does not use it", where, key, self.name)


def reject_unused(config: Config, used: set[str]) -> None:
    """Raise ConfigError for a training parameter of the command line that is not among the used ones."""
    for key in config.training_params:
        where = config.origins[f"{config.name}.training_params.{key}"]
        if key not in used and where.startswith("--"):
            raise ConfigError(where, f"{config.name} does not use {key}", f"of training_params it uses "
                              f"{', '.join(sorted(used))}", "leave it out")


def load_yaml(path: Path) -> tuple[dict, dict[str, str]]:
    """The mapping in a YAML file, and `dotted.key -> file:line` for each of its keys."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(path, "cannot be read", str(error), "name an existing YAML file") from error
    values, origins = _parse(text, path)
    return copy.deepcopy(values), dict(origins)


@cache  # a command asks for the same YAML several times
def _parse(text: str, path: Path) -> tuple[dict, dict[str, str]]:
    loader = StrictLoader(text)
    try:
        node = loader.get_single_node()
        origins: dict[str, str] = {}
        if node is not None:
            _walk(node, path, "", origins)
        values = {} if node is None else loader.construct_document(node)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{path}:{mark.line + 1}" if mark else path
        raise ConfigError(where, "not valid YAML", str(getattr(error, "problem", error)),
                          "correct that line (indent with spaces)") from error
    finally:
        loader.dispose()
    if not isinstance(values, dict):
        raise ConfigError(f"{path}:1", "not a mapping of keys to values", fix="start with `common:`")
    return values, origins


def _walk(node: yaml.Node, path: Path, prefix: str, origins: dict[str, str]) -> None:
    """Record every key's line, and refuse a key that stands twice or is no text."""
    if isinstance(node, yaml.SequenceNode):
        for index, entry in enumerate(node.value):
            _walk(entry, path, f"{prefix}{index}.", origins)
    if not isinstance(node, yaml.MappingNode):
        return
    for key_node, value_node in node.value:
        key, line = prefix + str(key_node.value), key_node.start_mark.line + 1
        if key_node.tag not in ("tag:yaml.org,2002:str", "tag:yaml.org,2002:merge"):
            raise ConfigError(f"{path}:{line}", f"the key {key_node.value!r} is no text",
                              f"YAML takes it for a {key_node.tag.rsplit(':', 1)[-1]}", "quote it")
        if key in origins:
            raise ConfigError(f"{path}:{line}", f"duplicate key {key!r}",
                              f"it stands already at line {origins[key].rsplit(':', 1)[1]}", "remove one of the two")
        origins[key] = f"{path}:{line}"
        _walk(value_node, path, key + ".", origins)


def resolve(name: str, model_yaml: Path, defaults_yaml: Path, overrides: list[tuple[str, str]],
            flags: Sequence[str] = (), declared_yaml: Path | None = None) -> Config:
    """Defaults, then the model's YAML, then the command line's `(key, text)` overrides; checked.

    `flags` are the command's own, which a misspelt key may have been meant to be. `declared_yaml` is the model's own
    YAML if `model_yaml` is another one: what a model declares (`DECLARED`) is read there.

    `common` and `training_params` may only hold keys that the defaults know, and values of their kind.
    `model_params` belongs to the model; its unread keys are found by `Config.check_all_read`. Any other
    section of the defaults is a group of options that models share: a key of that name in `model_params`
    takes the group, filled up from the defaults and checked against them.
    """
    defaults, default_origins = load_yaml(defaults_yaml)
    own, own_origins = load_yaml(model_yaml)
    for key in own:
        if key not in ("common", name):
            raise ConfigError(own_origins[key], f"unknown section {key!r}", nearest(key, ["common", name]),
                              f"use `common:` and `{name}:`")
    section = _mapping(own, name, own_origins, model_yaml)
    for key in section:
        if key not in (*SECTIONS, *DECLARED):
            raise ConfigError(own_origins[f"{name}.{key}"], f"unknown key {name}.{key}",
                              nearest(key, [*SECTIONS, *DECLARED]), "correct the name")
    rules = _rules(name, defaults, declared_yaml or model_yaml)
    origins = {(k if k.split(".")[0] == "common" else f"{name}.{k}"): v for k, v in default_origins.items()}
    origins |= own_origins
    config = {
        "common": {**defaults["common"], **_mapping(own, "common", own_origins, model_yaml)},
        name: {
            "model_params": _mapping(section, "model_params", own_origins, model_yaml),
            "training_params": {**defaults["training_params"],
                                **_mapping(section, "training_params", own_origins, model_yaml)},
        },
    }
    params = config[name]["model_params"]
    groups = [key for key in defaults if key not in ("common", "training_params", "bounds", "choices", "uses")
              and key in params and isinstance(params[key], dict | None)]
    for group in groups:
        params[group] = {**defaults[group], **(params[group] or {})}
        shared = {k: v for k, v in default_origins.items() if k.startswith(f"{group}.")}
        origins = {f"{name}.model_params.{key}": place for key, place in shared.items()} | origins
    for key, text in overrides:
        _override(config, origins, key, text, flags)
    check_section(config["common"], defaults["common"], "common", origins, rules)
    check_section(config[name]["training_params"], defaults["training_params"], f"{name}.training_params", origins,
                  rules)
    for group in groups:
        check_section(params[group], defaults[group], f"{name}.model_params.{group}", origins, rules)
    for key in params.keys() & (rules.bounds.keys() | rules.choices.keys()):
        path = f"{name}.model_params.{key}"
        _check_value(origins.get(path, path), path, key, params[key], rules)
    found = Config(name, config, origins, rules, defaults_yaml)
    if rules.uses is not None:
        reject_unused(found, rules.always | rules.uses)
    return found


def declared(name: str, model_yaml: Path) -> dict:
    """What a model's YAML says of the model, besides its parameters: the keys of `DECLARED` that it has."""
    values, origins = load_yaml(model_yaml)
    section = _mapping(values, name, origins, model_yaml)
    for key in section.keys() & DECLARED.keys():
        if type(section[key]) is not DECLARED[key]:
            raise ConfigError(origins[f"{name}.{key}"], f"{name}.{key} is {section[key]!r}",
                              f"it must be of type {DECLARED[key].__name__}", "correct the value")
    return {key: section[key] for key in DECLARED if key in section}


def _rules(name: str, defaults: dict, declared_yaml: Path) -> Rules:
    """The rules of the training loop, of the stage and of the model, the later ones first."""
    model, stage = declared(name, declared_yaml), defaults.get("uses", {})
    for key in model.get("uses", []):
        if key not in defaults["training_params"]:
            raise ConfigError(declared_yaml, f"{name}.uses names {key!r}", nearest(str(key), list(
                defaults["training_params"])), "name keys of training_params")
    bounds = {**defaults.get("bounds", {}), **model.get("bounds", {})}
    for key, bound in bounds.items():
        if type(bound) is not list or len(bound) != 2:
            raise ConfigError(declared_yaml, f"the bounds of {key} are {bound!r}", "bounds are [smallest, largest], "
                              "where null is open", "correct the value")
    return Rules(BOUNDS | {key: tuple(bound) for key, bound in bounds.items()},
                 CHOICES | {key: tuple(words) for key, words in
                            {**defaults.get("choices", {}), **model.get("choices", {})}.items()},
                 set(stage.get("always", [])), set(stage.get("if_read", [])),
                 set(model["uses"]) if "uses" in model else None)


def _mapping(values: dict, key: str, origins: dict[str, str], path: Path) -> dict:
    value = values.get(key)
    if value is None:
        return {}
    if not isinstance(value, dict):
        where = next((o for k, o in origins.items() if k.split(".")[-1] == key), path)
        raise ConfigError(where, f"{key!r} must hold keys, not {value!r}", fix=f"indent the keys under `{key}:`")
    return value


def _leaves(config: dict, prefix: str = "") -> dict[str, tuple[dict, str]]:
    """`dotted.path -> (the dict that holds it, its key)` for every value that is not a mapping."""
    found: dict[str, tuple[dict, str]] = {}
    for key, value in config.items():
        path = f"{prefix}{key}"
        if isinstance(value, dict):
            found |= _leaves(value, path + ".")
        else:
            found[path] = (config, key)
    return found


def _override(config: dict, origins: dict[str, str], key: str, text: str, flags: Sequence[str]) -> None:
    leaves = _leaves(config)
    matches = [key] if key in leaves else [path for path in leaves if path.endswith("." + key)]
    if not matches:
        names = leaves if "." in key else {path.split(".")[-1] for path in leaves} | set(flags)
        raise ConfigError(f"--{key}", "no such flag or configuration key", nearest(key, sorted(names)),
                          "see --help for the keys")
    if len(matches) > 1:
        raise ConfigError(f"--{key}", "names more than one key", ", ".join(matches), "--set <whole.path>=<value>")
    holder, leaf = leaves[matches[0]]
    holder[leaf] = _value(f"--{key}", text, holder[leaf])
    origins[matches[0]] = f"--{key}"


def _value(where: str, text: str, before: object) -> object:
    """An override as YAML; text that replaces text is taken as it is, so that `codes #2.json` is not cut short."""
    if before == "":  # a key that has to be given, such as a path
        return text
    try:
        value = yaml.load(text, Loader=StrictLoader)  # noqa: S506 (StrictLoader is a SafeLoader)
    except yaml.YAMLError as error:
        raise ConfigError(where, f"{text!r} is not a YAML value", fix="quote it") from error
    return text if isinstance(value, str) and isinstance(before, str) and text[0] not in "'\"" else value


def check_section(values: dict, defaults: dict, section: str, origins: dict[str, str], rules: Rules) -> None:
    """Raise ConfigError for a key that `defaults` lacks, for a value of another kind, and for one against the rules."""
    for key, value in values.items():
        where = origins.get(f"{section}.{key}", section)
        if key not in defaults:
            raise ConfigError(where, f"unknown key {section}.{key}", nearest(key, list(defaults)), "correct the name")
        kind = NULLABLE.get(key, type(defaults[key]))
        if kind is float and type(value) is int:
            values[key] = value = float(value)
        if type(value) is not kind and not (value is None and key in NULLABLE):
            raise ConfigError(where, f"{section}.{key} is {value!r}", f"it must be of type {kind.__name__}",
                              "correct the value")
        if value is not None:
            _check_value(where, f"{section}.{key}", key, value, rules)


def _check_value(where: str, path: str, key: str, value: object, rules: Rules) -> None:
    """Raise ConfigError for a value outside the key's bounds or choices."""
    if key in rules.bounds:
        low, high = rules.bounds[key]
        fits = type(value) in (int, float) and (low is None or value >= low) and (high is None or value <= high)
        if not fits:
            raise ConfigError(where, f"{path} is {value!r}", "it must be "
                              + (f"at least {low}" if high is None else f"from {low} to {high}"), "correct the value")
    if key in rules.choices and value not in rules.choices[key]:
        raise ConfigError(where, f"{path} is {value!r}", nearest(str(value), list(rules.choices[key])),
                          "one of " + ", ".join(map(str, rules.choices[key])))
