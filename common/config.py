"""Load and check configurations: YAML files, defaults and command-line overrides. Importing this module is fast."""

import copy
import logging
import re
import reprlib
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import NamedTuple

import yaml

from common.errors import ConfigError, nearest
from common.reading import fits, is_usable, kind_name, read_text, shortened

log = logging.getLogger(__name__)

# Allowed values of the keys that all models have. A bound is (smallest, largest); None means no limit. Stages and
# models can add rules in their YAML files, under the keys `bounds` and `choices`.
MOST = 2**31 - 1
BOUNDS: dict[str, tuple] = {
    "seed": (0, MOST), "epochs": (1, MOST), "max_steps": (1, MOST), "batch_size": (1, MOST), "lr": (0, None),
    "weight_decay": (0, None), "warmup_steps": (0, MOST), "clip_norm": (0, None), "eval_every": (1, MOST),
    "patience": (1, MOST), "checkpoint_seconds": (0, None),
}
CHOICES: dict[str, tuple] = {
    "select_mode": ("min", "max"), "optimizer": ("AdamW", "Adam", "SGD"), "lr_schedule": ("constant", "cosine"),
    "capture": ("auto", True, False), "filter_seen": ("auto", True, False),
}
NULLABLE = {"patience": int, "max_steps": int}  # keys that may be null, and the type of their other values
SECTIONS = ("model_params", "training_params")
# Keys of a model's YAML file that describe the model, and the types of their values.
DECLARED = {"baseline": bool, "uses": list[str], "bounds": dict, "choices": dict[str, list]}
TAGS = {f"tag:yaml.org,2002:{name}" for name in ("str", "int", "float", "bool", "null", "seq", "map", "merge")}


class StrictLoader(yaml.SafeLoader):
    """A safe YAML loader for values that JSON has too: text, numbers, booleans, null, lists and keys with values.

    Numbers are written as in JSON. The loader refuses aliases, because a few lines with aliases can expand to
    gigabytes. It also refuses all other types, such as sets.
    """

    def compose_node(self, parent, index):
        if self.check_event(yaml.AliasEvent):
            event = self.peek_event()
            raise yaml.composer.ComposerError(None, None, f"the alias *{event.anchor} is not allowed; write the value "
                                              "itself", event.start_mark)
        return super().compose_node(parent, index)

    def construct_object(self, node, deep=False):
        if node.tag not in TAGS:
            raise yaml.constructor.ConstructorError(None, None, f"the type {node.tag} is not allowed", node.start_mark)
        try:
            return super().construct_object(node, deep)
        except (ValueError, OverflowError) as error:  # for example a number of 5,000 digits
            raise yaml.constructor.ConstructorError(None, None, str(error), node.start_mark) from error


# YAML 1.1 reads 1:30 as 90, 010 as 8 and 2020-01-31 as a date. Here they are text.
NUMBERS = {"int": r"[-+]?(0|[1-9][0-9]*)",
           "float": r"[-+]?(([0-9]+\.[0-9]*|\.[0-9]+)([eE][-+]?[0-9]+)?|[0-9]+[eE][-+]?[0-9]+|\.(inf|Inf|INF))|"
                    r"\.(nan|NaN|NAN)"}
REPLACED = {f"tag:yaml.org,2002:{name}" for name in (*NUMBERS, "timestamp")}
StrictLoader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag not in REPLACED]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()}
for kind, number in NUMBERS.items():
    StrictLoader.add_implicit_resolver(f"tag:yaml.org,2002:{kind}", re.compile(f"^({number})$"), list("-+.0123456789"))


class TrackedParams(dict):
    """A dict that records which keys were read, also by `**` or a loop."""

    def __init__(self, values: dict, where: str = "model_params"):
        super().__init__(values)
        self.read: set[str] = set()
        self.where = where

    def __getitem__(self, key):
        self.read.add(key)
        return super().__getitem__(key)

    def __missing__(self, key):
        raise ConfigError(self.where, f"missing key {key!r}", "Unused keys: "
                          + (", ".join(map(repr, self.unread())) or "none"), f"add {key}: <value>")

    def get(self, key, default=None):
        self.read.add(key)
        return super().get(key, default)

    def setdefault(self, key, default=None):
        self.read.add(key)
        return super().setdefault(key, default)

    def __iter__(self):  # overridden so that `**params` calls __getitem__
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
    """The allowed values of the keys of a configuration, and the training parameters that its model uses."""

    bounds: dict[str, tuple]  # key -> (smallest, largest)
    choices: dict[str, tuple]  # key -> allowed values
    always: set[str]          # training parameters that every model uses
    if_read: set[str]         # training parameters that a model uses only if it reads them
    uses: set[str] | None     # training parameters under `uses` in the model's YAML; None if it has no `uses`


class Config:
    """A resolved configuration, with the place where each key was set.

    values: the configuration as nested dicts
    origins: dotted key -> the place where the key was set (a flag or `file:line`)
    """

    def __init__(self, name: str, values: dict, origins: dict[str, str], rules: Rules, defaults: Path):
        self.name, self.values, self.origins, self.rules, self.defaults = name, values, origins, rules, defaults

    def __getitem__(self, key: str):
        return self.values[key]

    @property
    def training_params(self) -> dict:
        return self.values[self.name]["training_params"]

    def has_key(self, key: str) -> bool:
        """Return whether the configuration has this key: a name such as `lr`, or a dotted path.

        The result is False for a training parameter that the model does not use.
        """
        paths = [path for path in _leaves(self.values) if path == key or path.endswith(f".{key}")]
        uses = self.rules.uses
        return any(uses is None or not path.startswith(f"{self.name}.training_params.")
                   or path.rpartition(".")[2] in self.rules.always | uses for path in paths)

    def leaf_names(self) -> list[str]:
        """Return the names of all keys without their sections, such as `lr`."""
        return [path.rpartition(".")[2] for path in _leaves(self.values)]

    def for_model(self, **data) -> dict:
        """Return the configuration for a model's constructor: the nested dicts, and `data` under the key "data".

        The model's sections record which keys the model reads (see `TrackedParams`).
        """
        paths = {section: f"{self.name}.{section}" for section in SECTIONS}
        own = {section: TrackedParams(self.values[self.name][section], self.origins.get(path, path))
               for section, path in paths.items()}
        return {**self.values, self.name: own, "data": data}

    def check_all_read(self, model_config: dict) -> None:
        """Raise ConfigError if the model has not read one of its model parameters.

        `model_config` is the dict from `for_model` that the model's constructor has read.
        """
        params = model_config[self.name]["model_params"]
        for key in params.unread():
            path = f"{self.name}.model_params.{key}"
            raise ConfigError(self.origins.get(path, path), f"unused key {path}", nearest(key, sorted(params.read)),
                              "remove the key or correct its name")

    def check_training_keys(self, model_config: dict, by_gradient: bool) -> None:
        """Report training parameters that have no effect on the model.

        model_config: the dict from `for_model` that the model's constructor has read
        by_gradient: whether the model is trained by gradient descent

        An unused key on the command line raises ConfigError. An unused key in the model's YAML logs a warning.
        """
        keys = set(self.training_params)
        used = self.rules.uses if self.rules.uses is not None else keys - self.rules.if_read if by_gradient else set()
        used = used | self.rules.always | model_config[self.name]["training_params"].read
        reject_unused(self, used)
        for key in sorted(keys - used):
            where = self.origins[f"{self.name}.training_params.{key}"]
            if not where.startswith(f"{self.defaults}:"):
                log.warning("%s: unused key %s: it has no effect with %s", where, key, self.name)


def reject_unused(config: Config, used: set[str]) -> None:
    """Raise ConfigError if the command line sets a training parameter that is not in `used`."""
    for key in config.training_params:
        where = config.origins[f"{config.name}.training_params.{key}"]
        if key not in used and where.startswith("--"):
            raise ConfigError(where, f"has no effect with {config.name}", f"{config.name} uses these training_params: "
                              f"{', '.join(sorted(used))}", "leave it out")


def load_yaml(path: Path) -> tuple[dict, dict[str, str]]:
    """Load a YAML file. Return its content, and the `file:line` of each dotted key.

    Raises ConfigError if the file cannot be read, is not valid YAML, or has a duplicate key.
    """
    try:
        text = read_text(path)
    except (OSError, ValueError) as error:
        raise ConfigError(path, "cannot be read", str(error), "give the path of an existing YAML file") from error
    values, origins = _parse(text, path)
    return copy.deepcopy(values), dict(origins)


@cache  # one command loads the same YAML file several times
def _parse(text: str, path: Path) -> tuple[dict, dict[str, str]]:
    try:
        loader = StrictLoader(text)
        node = loader.get_single_node()
        origins: dict[str, str] = {}
        if node is not None:
            _walk(node, path, "", origins)
        values = {} if node is None else loader.construct_document(node)
    except (yaml.YAMLError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{path}:{mark.line + 1}" if mark else path
        raise ConfigError(where, "is not valid YAML", _yaml_problem(error),
                          "correct that line (indent with spaces)") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{path}:1", "is not a mapping of keys to values", fix="write `key: value` in each line")
    return values, origins


def _yaml_problem(error: yaml.YAMLError | RecursionError) -> str:
    if isinstance(error, RecursionError):
        return "The values are nested too deeply"
    return shortened(str(getattr(error, "problem", error)))


def _walk(node: yaml.Node, path: Path, prefix: str, origins: dict[str, str]) -> None:
    """Store the `file:line` of each key of a YAML node in the dict `origins`.

    Raises ConfigError if a key is a duplicate or is not text.
    """
    if isinstance(node, yaml.SequenceNode):
        for index, entry in enumerate(node.value):
            _walk(entry, path, f"{prefix}{index}.", origins)
    if not isinstance(node, yaml.MappingNode):
        return
    for key_node, value_node in node.value:
        key, line = prefix + str(key_node.value), key_node.start_mark.line + 1
        if key_node.tag not in ("tag:yaml.org,2002:str", "tag:yaml.org,2002:merge"):
            raise ConfigError(f"{path}:{line}", f"the key {key_node.value!r} is not text",
                              f"YAML reads it as {key_node.tag.rsplit(':', 1)[-1]}", "put it in quotes")
        if key in origins:
            raise ConfigError(f"{path}:{line}", f"duplicate key {key!r}",
                              f"The key is already set in line {origins[key].rsplit(':', 1)[1]}", "remove one of them")
        origins[key] = f"{path}:{line}"
        _walk(value_node, path, key + ".", origins)


def resolve(name: str, model_yaml: Path, defaults_yaml: Path, overrides: list[tuple[str, str]],
            flags: Sequence[str] = (), declared_yaml: Path | None = None) -> Config:
    """Return the checked configuration of the model `name`.

    model_yaml: the model's values; they replace the defaults
    overrides: `(key, text)` pairs from the command line; they replace both
    flags: names of the command's own flags, to suggest the right one if the user misspells a flag
    declared_yaml: the model's own YAML file, if `model_yaml` is another file; the keys `DECLARED` are read from it

    The sections `common` and `training_params` may contain only keys of the defaults, with values of the same types.
    The section `model_params` may contain any key; `Config.check_all_read` finds unused keys. All further sections of
    the defaults, such as `codebook`, have the default options of a group. If `model_params` has a key with the name of
    a group, the defaults fill in the options that are missing there.

    Raises ConfigError if a section, key or group option is unknown, or if a value is wrong.
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
    for path, (holder, key) in _leaves(config).items():
        value = holder[key]
        if not all(map(is_usable, value if isinstance(value, list) else [value])):
            raise ConfigError(origins.get(path, path), f"{path} must have finite numbers of at most 64 bits, got "
                              f"{reprlib.repr(value)}", fix="correct the value")
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
    """Return the entries of a model's YAML file that are in `DECLARED`, such as `uses`."""
    values, origins = load_yaml(model_yaml)
    section = _mapping(values, name, origins, model_yaml)
    for key in section.keys() & DECLARED.keys():
        if not fits(section[key], DECLARED[key]):
            raise ConfigError(origins[f"{name}.{key}"], f"{name}.{key} must be of type {kind_name(DECLARED[key])}, "
                              f"got {section[key]!r}", fix="correct the value")
    return {key: section[key] for key in DECLARED if key in section}


def _rules(name: str, defaults: dict, declared_yaml: Path) -> Rules:
    """Merge the rules of the training loop, the stage and the model.

    Rules of the model have priority, then rules of the stage.
    """
    model, stage = declared(name, declared_yaml), defaults.get("uses", {})
    for key in model.get("uses", []):
        if key not in defaults["training_params"]:
            raise ConfigError(declared_yaml, f"unknown key {key!r} in {name}.uses", nearest(str(key), list(
                defaults["training_params"])), "use keys of training_params")
    bounds = {**defaults.get("bounds", {}), **model.get("bounds", {})}
    for key, bound in bounds.items():
        if not fits(bound, list[float | None]) or len(bound) != 2:
            raise ConfigError(declared_yaml, f"the bounds of {key} must be [smallest, largest], got {bound!r}",
                              "The value null means no limit", "correct the value")
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
        raise ConfigError(where, f"{key!r} must contain keys, not {value!r}", fix=f"indent the keys under `{key}:`")
    return value


def _leaves(config: dict, prefix: str = "") -> dict[str, tuple[dict, str]]:
    """Find all values in nested dicts, except the dicts themselves.

    The result maps the dotted path of each value to a pair: the dict with the value, and the key in this dict.
    """
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
        raise ConfigError(f"--{key}", "unknown flag or configuration key", nearest(key, sorted(names)),
                          "see --help for the keys")
    if len(matches) > 1:
        raise ConfigError(f"--{key}", "is ambiguous", f"It matches {', '.join(matches)}",
                          "write --set <whole.path>=<value>")
    holder, leaf = leaves[matches[0]]
    holder[leaf] = _value(f"--{key}", text, holder[leaf])
    origins[matches[0]] = f"--{key}"


def _value(where: str, text: str, before: object) -> object:
    """Parse the text of an override as YAML. `before` is the value that the override replaces.

    If `before` is text, text without quotes is returned unchanged.
    """
    if before == "":  # a key without a default, such as a path: use the text unchanged
        return text
    try:
        value = yaml.load(text, Loader=StrictLoader)  # noqa: S506 (StrictLoader is a SafeLoader)
    except (yaml.YAMLError, RecursionError) as error:
        raise ConfigError(where, f"{shortened(text)!r} is not a valid YAML value", _yaml_problem(error),
                          "put it in quotes") from error
    # YAML would read the end of `codes #2.json` as a comment.
    return text if isinstance(value, str) and isinstance(before, str) and text[0] not in "'\"" else value


def check_section(values: dict, defaults: dict, section: str, origins: dict[str, str], rules: Rules) -> None:
    """Raise ConfigError if a section has an unknown key or a wrong value.

    Each key must be in `defaults`. Each value must follow `rules`, and have the type of its default, or be one of its
    choices. If the default is a float, an integer is converted to a float.
    """
    for key, value in values.items():
        where = origins.get(f"{section}.{key}", section)
        if key not in defaults:
            raise ConfigError(where, f"unknown key {section}.{key}", nearest(key, list(defaults)), "correct the name")
        kind = NULLABLE.get(key, type(defaults[key]))
        if kind is float and type(value) is int:
            values[key] = value = float(value)
        if value is None and key in NULLABLE:
            continue
        if type(value) is not kind and key not in rules.choices:
            raise ConfigError(where, f"{section}.{key} must be of type {kind.__name__}, got {reprlib.repr(value)}",
                              fix="correct the value")
        _check_value(where, f"{section}.{key}", key, value, rules)


def _check_value(where: str, path: str, key: str, value: object, rules: Rules) -> None:
    """Raise ConfigError if the rules do not allow this value for the key.

    If a key has bounds and choices, a value may be within the bounds or one of the choices.
    """
    # In Python, 1 equals True, so compare the types as well.
    if key in rules.choices and (type(value), value) in [(type(word), word) for word in rules.choices[key]]:
        return
    words = [str(word).lower() if isinstance(word, bool) else str(word) for word in rules.choices.get(key, ())]
    if key in rules.bounds:
        low, high = rules.bounds[key]
        fits = type(value) in (int, float) and (low is None or value >= low) and (high is None or value <= high)
        if not fits:
            required = [f"at least {low}" if high is None else f"from {low} to {high}", *words]
            raise ConfigError(where, f"{path} must be {' or '.join(required)}, got {reprlib.repr(value)}",
                              fix="correct the value")
    elif words:
        raise ConfigError(where, f"unknown value {value!r} for {path}", nearest(str(value), words),
                          "use one of " + ", ".join(words))
