import os
import re
from textwrap import dedent

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from common.config import StrictLoader, load_yaml, resolve
from common.errors import ConfigError
from tests.common.helpers import numbers
from tests.errors import refused

DEFAULTS = """\
common:
  device: auto
  seed: 0
training_params:
  batch_size: 32
  epochs: 10
  lr: 0.001
  patience: null
  optimizer: AdamW
  select_by: loss_total
  select_mode: min
  smoothing: 0.0
  eval_batch_size: 8
bounds:
  smoothing: [0, 1]
uses:
  always: [eval_batch_size]
  if_read: [smoothing]
"""


@pytest.fixture
def write(tmp_path):
    def write(text: str, name: str = "vq.yaml"):
        path = tmp_path / name
        path.write_text(dedent(text), encoding="utf-8")
        return path
    return write


@pytest.fixture
def config(write):
    """Resolves a YAML of the model `vq` with overrides."""
    def resolve_text(text: str, *overrides: tuple[str, str]):
        return resolve("vq", write(text), write(DEFAULTS, "defaults.yaml"), list(overrides))
    return resolve_text


@pytest.fixture
def at(tmp_path):
    """The place of an error in the model's YAML."""
    def place(line: int) -> str:
        return f"{tmp_path / 'vq.yaml'}:{line}"
    return place


def value(text: str):
    """The value that YAML reads from a text."""
    return yaml.load(text, Loader=StrictLoader)  # noqa: S506 (StrictLoader is a SafeLoader)


@pytest.mark.parametrize(("text", "value"), [
    ("1e-4", 0.0001), ("1E+3", 1000.0), ("-2e5", -200000.0), ("1.5e3", 1500.0), ("2.e1", 20.0), ("0.25", 0.25)])
def test_an_exponent_makes_a_float(write, text, value):
    loaded = load_yaml(write(f"lr: {text}"))[0]["lr"]
    assert type(loaded) is float
    assert loaded == value


@pytest.mark.parametrize(("text", "value"), [
    ("12", 12), ("0", 0), ("-3", -3), ("1:30", "1:30"), ("010", "010"), ("1_000", "1_000"), ("0x1f", "0x1f"),
    (".5", 0.5), (".inf", float("inf")), ("-.inf", float("-inf")), (".", "."), ("1e-4x", "1e-4x"), ("e5", "e5"),
    ("5e", "5e"), ("1e-", "1e-")])
def test_numbers_are_written_as_in_json(write, text, value):
    loaded = load_yaml(write(f"key: {text}"))[0]["key"]
    assert type(loaded) is type(value)
    assert loaded == value


@settings(max_examples=50, deadline=None, database=None)
@given(st.floats(allow_nan=False, allow_infinity=False))
def test_every_float_that_python_prints_is_read_back(number):
    assert value(repr(number)) == number


def test_other_users_of_yaml_are_not_affected():
    assert yaml.safe_load("1e-4") == "1e-4"


def test_every_key_knows_its_line(write):
    path = write("common:\n  seed: 1\nvq:\n  model_params:\n    num_levels: 3\n")
    assert load_yaml(path)[1] == {
        "common": f"{path}:1", "common.seed": f"{path}:2", "vq": f"{path}:3", "vq.model_params": f"{path}:4",
        "vq.model_params.num_levels": f"{path}:5"}


@pytest.mark.parametrize(("text", "line", "key", "first"), [
    ("common:\n  seed: 1\n  seed: 2\n", 3, "common.seed", 2),
    ("common:\n  seed: 1\nvq: {}\ncommon:\n  seed: 2\n", 4, "common", 1),
    ("vq:\n  model_params:\n    layers:\n    - size: 1\n      size: 2\n", 5, "vq.model_params.layers.0.size", 4),
    ("vq: {a: 1, a: 2}\n", 1, "vq.a", 1)])
def test_a_duplicate_key_is_an_error_at_its_second_line(write, at, text, line, key, first):
    with refused(ConfigError, at(line), names=[f"'{key}'"]) as raised:
        load_yaml(write(text))
    assert str(first) in numbers(raised)


def test_the_same_key_in_two_sections_is_not_a_duplicate(write):
    values, _ = load_yaml(write("common:\n  a: 1\nvq:\n  a: 2\n  b: [{a: 3}, {a: 4}]\n"))
    assert values == {"common": {"a": 1}, "vq": {"a": 2, "b": [{"a": 3}, {"a": 4}]}}


@pytest.mark.parametrize(("text", "line"), [
    ("common:\n\tseed: 1\n", 2), ("common:\n  seed: 1\n  lr 2\n  x: 3\n", 4), ("a: 1\nb: [1, 2\nc: 3\n", 3),
    ("a: 1\nb: 'open\n", 3), ("a: 1\nb: !!python/object:os.system x\n", 2)])
def test_invalid_yaml_is_an_error_at_its_line(write, at, text, line):
    with refused(ConfigError, at(line)) as raised:
        load_yaml(write(text))
    assert "\n" not in str(raised.value)


BOMB = "".join(f"{name}: &{name} [{', '.join([value] * 9)}]\n" for name, value in
               (("a", "x"), ("b", "*a"), ("c", "*b"), ("d", "*c"), ("e", "*d"), ("f", "*e"), ("g", "*f"), ("h", "*g")))


@pytest.mark.parametrize(("text", "line", "named"), [
    (BOMB, 2, "*a"), ("a: &x 1\nb: *x\n", 2, "*x"), ("a: &x {b: 1}\nc:\n  <<: *x\n", 3, "*x"),
    ("a: &x [*x]\n", 1, "*x"), ("a: 1\nb: " + "9" * 5_000 + "\n", 2, ""),
    ("b: !!timestamp 2001-99-99\n", 1, "timestamp"),
    ("b: !!set {c}\n", 1, "set"), ("b: !!binary aGk=\n", 1, "binary"), ("b: !!int x\n", 1, "'x'")])
def test_values_that_no_json_has_are_refused(write, at, text, line, named):
    with refused(ConfigError, at(line), names=[named]):
        load_yaml(write(text))


@pytest.mark.parametrize("text", ["a: " + "[" * 5_000, "a: " + "{b: " * 5_000, "a: \0\n", "a: \x1b\n"])
def test_deep_values_and_control_characters_are_refused(write, tmp_path, text):
    with refused(ConfigError, tmp_path / "vq.yaml"):
        load_yaml(write(text))


@pytest.mark.parametrize("text", ["2001-99-99", "2001-01-31", "2001-01-31 10:00:00"])
def test_a_date_is_text(write, config, text):
    assert load_yaml(write(f"a: {text}\n"))[0] == {"a": text}
    with refused(ConfigError, "--lr", names=[repr(text)]):
        config("", ("lr", text))


def test_a_named_pipe_is_not_a_configuration(tmp_path):
    os.mkfifo(tmp_path / "vq.yaml")
    with refused(ConfigError, tmp_path / "vq.yaml"):
        load_yaml(tmp_path / "vq.yaml")


@pytest.mark.parametrize("text", ["9" * 5_000, "[" * 5_000, "[*a]", "!!set {a}"])
def test_an_override_that_no_json_has_is_refused(config, text):
    with refused(ConfigError, "--epochs") as raised:
        config("", ("epochs", text))
    assert len(str(raised.value)) < 600


@pytest.mark.parametrize("declared", [
    "uses: [[1]]", "uses: {a: 1}", "bounds: {a: [x, y]}", "bounds: {a: 3}", "choices: {a: 5}", "baseline: 1"])
def test_declarations_of_a_wrong_type_are_refused(config, declared):
    with refused(ConfigError):
        config(f"vq:\n  {declared}\n  model_params: {{a: 1}}\n")


def test_a_key_that_is_not_a_string_is_an_error(write, at):
    for key in ("on", "7", "null"):
        with refused(ConfigError, at(2), names=[f"'{key}'"]):
            load_yaml(write(f"common:\n  {key}: 1\n"))
    assert load_yaml(write("'on': 1\n"))[0] == {"on": 1}


def test_a_missing_file_is_an_error_that_names_it(tmp_path):
    with refused(ConfigError, tmp_path / "gone.yaml"):
        load_yaml(tmp_path / "gone.yaml")


def test_a_file_that_is_not_text_is_an_error(tmp_path):
    (tmp_path / "vq.yaml").write_bytes(b"a: \xff\xfe\n")
    with refused(ConfigError, tmp_path / "vq.yaml"):
        load_yaml(tmp_path / "vq.yaml")


def test_a_list_is_not_a_configuration(write, at):
    with refused(ConfigError, at(1), fix=["key: value"]):
        load_yaml(write("- a\n- b\n"))


def test_an_empty_file_holds_nothing(write):
    assert load_yaml(write("# nothing yet\n")) == ({}, {})


def test_defaults_fill_in_keys_missing_in_the_yaml(config):
    resolved = config("vq:\n  model_params:\n    num_levels: 3\n  training_params:\n    epochs: 5\n")
    assert resolved.values == {
        "common": {"device": "auto", "seed": 0},
        "vq": {"model_params": {"num_levels": 3},
               "training_params": {"batch_size": 32, "epochs": 5, "lr": 0.001, "patience": None, "optimizer": "AdamW",
                                   "select_by": "loss_total", "select_mode": "min", "smoothing": 0.0,
                                   "eval_batch_size": 8}}}
    assert resolved.training_params["epochs"] == 5
    assert resolved["common"]["seed"] == 0


@pytest.mark.parametrize("text", ["", "vq:\n", "common:\nvq:\n  model_params:\n  training_params:\n"])
def test_an_empty_section_is_all_defaults(config, text):
    assert config(text).training_params["epochs"] == 10


def test_the_command_line_beats_the_yaml_which_beats_the_defaults(config):
    text = "common: {seed: 2, device: cpu}\nvq: {training_params: {epochs: 5, batch_size: 8}}"
    resolved = config(text, ("epochs", "7"), ("seed", "3"))
    params = resolved.training_params
    assert (params["epochs"], params["batch_size"], params["lr"]) == (7, 8, 0.001)
    assert resolved["common"] == {"seed": 3, "device": "cpu"}


def test_a_value_says_where_it_came_from(config):
    origins = config("vq:\n  training_params:\n    epochs: 5\n", ("seed", "3")).origins
    assert origins["vq.training_params.epochs"].endswith("vq.yaml:3")
    assert origins["vq.training_params.lr"].endswith("defaults.yaml:7")
    assert origins["common.device"].endswith("defaults.yaml:2")
    assert origins["common.seed"] == "--seed"


@pytest.mark.parametrize(("text", "line", "name", "nearest"), [
    ("common:\n  sed: 1\n", 2, "common.sed", "seed"),
    ("vq:\n  training_params:\n    epoch: 1\n", 3, "vq.training_params.epoch", "epochs"),
    ("vq:\n  training_params:\n    LR: 1\n", 3, "vq.training_params.LR", "lr"),
    ("vq:\n  model_parms: {}\n", 2, "vq.model_parms", "model_params"),
    ("common: {}\nVQ: {}\n", 2, "'VQ'", "vq"),
    ("comon: {}\n", 1, "'comon'", "common")])
def test_an_unknown_name_is_refused_with_the_nearest_one(config, at, text, line, name, nearest):
    with refused(ConfigError, at(line), names=[name, f"'{nearest}'"]):
        config(text)


@pytest.mark.parametrize(("key", "text", "kind"), [
    ("epochs", "many", "int"), ("epochs", "true", "int"), ("epochs", "5.0", "int"), ("epochs", "null", "int"),
    ("epochs", "1e3", "int"), ("epochs", "[5]", "int"), ("lr", "'0.1'", "float"), ("lr", "false", "float"),
    ("patience", "2.5", "int"), ("patience", "never", "int"), ("select_by", "3", "str")])
def test_a_value_of_the_wrong_kind_is_an_error(config, at, key, text, kind):
    with refused(ConfigError, at(3), names=[f"vq.training_params.{key}", repr(value(text)), kind]):
        config(f"vq:\n  training_params:\n    {key}: {text}\n")


def test_a_whole_number_becomes_a_float(config):
    lr = config("vq: {training_params: {lr: 1}}").training_params["lr"]
    assert type(lr) is float
    assert lr == 1.0


@pytest.mark.parametrize(("key", "text", "limits"), [
    ("epochs", "0", {"1"}), ("batch_size", "-1", {"1"}), ("lr", "-0.1", {"0"}), ("lr", ".nan", set()),
    ("patience", "0", {"1"}), ("seed", "-1", {"0", "2147483647"}), ("seed", "2147483648", {"0", "2147483647"}),
    ("epochs", "2147483648", {"1", "2147483647"}), ("lr", ".inf", set())])
def test_a_value_out_of_range_is_an_error(config, key, text, limits):
    with refused(ConfigError, f"--{key}", names=[f".{key}", value(text)]) as raised:
        config("", (key, text))
    assert numbers(raised) >= limits


@pytest.mark.parametrize("key", ["epochs", "lr", "num_levels"])
@pytest.mark.parametrize("text", ["9" * 400, "-" + "9" * 20])
def test_a_number_of_more_than_64_bits_is_an_error(config, key, text):
    with refused(ConfigError, f"--{key}", names=[f".{key}"]):
        config("vq: {model_params: {num_levels: 3}}", (key, text))


def test_the_borders_of_a_range_belong_to_it(config):
    resolved = config("", ("epochs", "1"), ("patience", "1"), ("seed", "2147483647"))
    assert (resolved.training_params["epochs"], resolved.training_params["patience"]) == (1, 1)
    assert resolved["common"]["seed"] == 2**31 - 1


def test_a_choice_outside_the_list_is_an_error(config):
    with refused(ConfigError, "--optimizer", names=["'adamw'", "'AdamW'"], fix=["AdamW", "Adam", "SGD"]):
        config("", ("optimizer", "adamw"))
    with refused(ConfigError, "--select_mode", names=["'median'"], fix=["min", "max"]):
        config("", ("select_mode", "median"))


@pytest.mark.parametrize(("text", "line", "key", "held"), [
    ("vq: 345\n", 1, "vq", "345"), ("common: [1]\n", 1, "common", "[1]"),
    ("vq:\n  training_params: fast\n", 2, "training_params", "'fast'"),
    ("vq:\n  model_params: 456\n", 2, "model_params", "456")])
def test_a_section_must_hold_keys(config, at, text, line, key, held):
    with refused(ConfigError, at(line), names=[f"'{key}'", held], fix=[f"{key}:"]):
        config(text)


@pytest.mark.parametrize("key", ["epochs", "training_params.epochs", "vq.training_params.epochs"])
def test_a_leaf_or_any_path_to_it_overrides(config, key):
    assert config("", (key, "3")).training_params["epochs"] == 3


@pytest.mark.parametrize(("text", "value"), [
    ("[64, 32]", [64, 32]), ("1e-4", 0.0001), ("null", None), ("true", True), ("cuda:0", "cuda:0"), ("a b", "a b")])
def test_an_override_is_read_as_yaml(config, text, value):
    resolved = config("vq: {model_params: {shape: 1}}", ("shape", text))
    assert resolved["vq"]["model_params"] == {"shape": value}


def test_a_key_in_two_sections_needs_its_path(config):
    text = "vq: {model_params: {lr: 5}}"
    with refused(ConfigError, "--lr", names=["vq.model_params.lr", "vq.training_params.lr"], fix=["--set"]):
        config(text, ("lr", "1"))
    resolved = config(text, ("model_params.lr", "7"))
    assert resolved["vq"]["model_params"]["lr"] == 7
    assert resolved.training_params["lr"] == 0.001


def test_a_whole_path_is_never_ambiguous(config):
    resolved = config("vq: {model_params: {common: {seed: 5}}}", ("common.seed", "3"))
    assert resolved["common"]["seed"] == 3
    assert resolved["vq"]["model_params"]["common"]["seed"] == 5


@pytest.mark.parametrize("key", ["epoch", "common.epochs", "pochs", "vq.model_params", "vq"])
def test_an_override_of_an_unknown_key_is_an_error(config, key):
    with refused(ConfigError, f"--{key}", fix=["--help"]):
        config("vq: {model_params: {a: 1}}", (key, "3"))


@pytest.mark.parametrize(("key", "suggestion"), [
    ("batchsize", "batch_size"), ("common.sead", "common.seed"),
    ("training_params.epoch", "vq.training_params.epochs")])
def test_a_misspelled_override_names_the_nearest_key(config, key, suggestion):
    with refused(ConfigError, f"--{key}", names=[f"'{suggestion}'"]):
        config("", (key, "3"))


def test_an_override_that_is_not_yaml_is_an_error(config):
    with refused(ConfigError, "--epochs", names=["'[1'"]):
        config("", ("epochs", "[1"))


def test_an_override_is_checked_like_a_yaml_value(config):
    with refused(ConfigError, "--epochs", names=["vq.training_params.epochs", "'ten'", "int"]):
        config("", ("epochs", "ten"))


@pytest.mark.parametrize("text", ["codes #2.json", "[1].json", "a: b.csv", "*.json", "'x'.json", "2024"])
def test_a_path_is_taken_as_it_is(config, text):
    resolved = config('vq: {model_params: {file: ""}}', ("file", text))
    assert resolved["vq"]["model_params"]["file"] == text


def test_text_in_place_of_text_keeps_its_number_sign(config):
    assert config("", ("select_by", "recall #2")).training_params["select_by"] == "recall #2"


USES = "vq: {uses: [lr], model_params: {a: 1}}"


def test_an_unused_key_on_the_command_line_is_an_error(config):
    with refused(ConfigError, "--epochs", names=["eval_batch_size", "lr"]):
        config(USES, ("epochs", "3"))


@pytest.mark.parametrize("key", ["lr", "eval_batch_size", "seed"])
def test_a_used_key_and_a_common_one_are_accepted(config, key):
    assert config(USES, (key, "2")).origins[f"common.{key}" if key == "seed" else f"vq.training_params.{key}"] == (
        f"--{key}")


@pytest.mark.parametrize(("by_gradient", "reads", "unused"), [
    (True, [], ["smoothing"]), (True, ["smoothing"], []),
    (False, [], ["lr", "smoothing"]), (False, ["lr"], ["smoothing"])])
def test_a_model_that_declares_nothing_uses_what_it_reads(config, at, caplog, by_gradient, reads, unused):
    resolved = config("vq:\n  training_params:\n    lr: 1\n    smoothing: 0.5\n    eval_batch_size: 1\n")
    model_config = resolved.for_model()
    for key in reads:
        model_config["vq"]["training_params"][key]
    resolved.check_training_keys(model_config, by_gradient)
    for record, key in zip(caplog.records, unused, strict=True):
        assert record.levelname == "WARNING"
        assert at({"lr": 3, "smoothing": 4}[key]) in record.getMessage()
        assert re.search(rf"\b{key}\b", record.getMessage())
    for key in unused:
        flagged = config("", (key, "0.5"))
        with refused(ConfigError, f"--{key}"):
            flagged.check_training_keys(flagged.for_model(), by_gradient)


def test_a_replaced_yaml_keeps_the_models_declarations(write):
    own, other = write(USES, "own.yaml"), write("vq: {model_params: {a: 2}}", "other.yaml")
    defaults, overrides = write(DEFAULTS, "defaults.yaml"), [("epochs", "3")]
    resolve("vq", other, defaults, overrides)
    with refused(ConfigError, "--epochs", names=["eval_batch_size", "lr"]):
        resolve("vq", other, defaults, overrides, declared_yaml=own)


@pytest.mark.parametrize(("declared", "text"), [
    ("bounds: {decay: [0, 1]}", "1.5"), ("bounds: {decay: [1, null]}", "0"), ("bounds: {decay: [0, 1]}", "much"),
    ("choices: {decay: [slow, fast]}", "medium"), ("bounds: {decay: [0, 1]}, choices: {decay: [auto]}", "2"),
    ("bounds: {decay: [0, 1]}, choices: {decay: [auto]}", "fast")])
def test_a_model_declares_what_its_own_keys_may_hold(config, declared, text):
    with refused(ConfigError, "--decay", names=["vq.model_params.decay", repr(value(text))]):
        config(f"vq: {{{declared}, model_params: {{decay: 1}}}}", ("decay", text))


@pytest.mark.parametrize("text", ["auto", "0.5"])
def test_a_value_may_fit_the_bounds_or_the_choices_of_its_key(config, text):
    found = config("vq: {bounds: {decay: [0, 1]}, choices: {decay: [auto]}, model_params: {decay: 1}}",
                   ("decay", text))
    assert found["vq"]["model_params"]["decay"] == value(text)


@pytest.mark.parametrize(("text", "named"), [
    ("baseline: 345", ["vq.baseline", "345", "bool"]), ("uses: lr", ["vq.uses", "'lr'", "list"]),
    ("uses: [rate]", ["vq.uses", "'rate'"]), ("bounds: {decay: 345}", ["decay", "345"])])
def test_a_wrong_declaration_is_an_error(config, tmp_path, text, named):
    with refused(ConfigError, names=[tmp_path / "vq.yaml", *named]):
        config(f"vq: {{{text}}}")


@pytest.mark.parametrize(("key", "found"), [
    ("lr", True), ("training_params.lr", True), ("epochs", False), ("eval_batch_size", True), ("seed", True),
    ("a", True), ("b", False)])
def test_a_configuration_knows_the_keys_that_its_model_uses(config, key, found):
    assert config(USES).has_key(key) is found


READERS = {
    "subscript": lambda p: (p["a"], p["b"]),
    "get": lambda p: (p.get("a"), p.get("b", 3)),
    "double star": lambda p: (lambda a, b: (a, b))(**p),
    "dict display": lambda p: {**p, "c": 1},
    "loop over keys": lambda p: [p[key] for key in p],
    "keys": lambda p: [p[key] for key in p.keys()],  # noqa: SIM118 (keys() is under test)
    "items": lambda p: list(p.items()),
    "values": lambda p: list(p.values()),
    "dict": dict,
    "copy": lambda p: p.copy(),
    "union": lambda p: p | {"c": 1},
    "union from the right": lambda p: {"c": 1} | p,
    "update": lambda p: {}.update(p),
    "pop": lambda p: (p.pop("a"), p.pop("b")),
    "setdefault": lambda p: (p.setdefault("a", 0), p.setdefault("b", 0)),
}


@pytest.mark.parametrize("read", READERS.values(), ids=READERS)
def test_every_way_to_read_a_parameter_counts_as_reading(config, read):
    resolved = config("vq: {model_params: {a: 1, b: 2}}")
    model_config = resolved.for_model()
    read(model_config["vq"]["model_params"])
    resolved.check_all_read(model_config)


def test_a_parameter_that_the_model_ignores_is_an_error(config, at):
    resolved = config("vq:\n  model_params:\n    num_levels: 3\n    num_heds: 2\n")
    model_config = resolved.for_model()
    params = model_config["vq"]["model_params"]
    assert (params["num_levels"], params.get("num_heads", 4), "num_heds" in params) == (3, 4, True)
    with refused(ConfigError, at(4), names=["vq.model_params.num_heds", "'num_heads'"]):
        resolved.check_all_read(model_config)


def test_a_parameter_missing_in_the_yaml_is_an_error(config, at):
    params = config("vq: {model_params: {num_levls: 3}}").for_model()["vq"]["model_params"]
    with refused(ConfigError, at(1), names=["'num_levels'", "'num_levls'"], fix=["num_levels:"]):
        params["num_levels"]
    assert params.get("num_levels", 4) == 4


def test_a_merged_parameter_that_the_model_ignores_is_an_error(config):
    resolved = config("vq:\n  model_params:\n    <<: {a: 1, b: 2}\n")
    model_config = resolved.for_model()
    assert model_config["vq"]["model_params"]["a"] == 1
    with refused(ConfigError, names=["vq.model_params.b"]):
        resolved.check_all_read(model_config)


def test_a_model_gets_the_configuration_and_the_data_sizes(config):
    model_config = config("vq: {model_params: {a: 1}}").for_model(num_items=9)
    assert model_config["data"] == {"num_items": 9}
    assert model_config["common"]["seed"] == 0
    assert model_config["vq"]["training_params"]["epochs"] == 10
    assert model_config["vq"]["model_params"] == {"a": 1}


GROUPED = DEFAULTS.replace("bounds:", "bounds:\n  ema_decay: [0, 1]") + """\
codebook:
  start: kmeans
  update: gradient
  ema_decay: 0.99
  restart_dead: true
  sinkhorn_levels: []
choices:
  update: [gradient, ema]
"""
GROUP = {"start": "kmeans", "update": "gradient", "ema_decay": 0.99, "restart_dead": True, "sinkhorn_levels": []}


@pytest.fixture
def grouped(write):
    """Resolves a YAML of the model `vq` with overrides; the defaults have a group of options."""
    def resolve_text(text: str, *overrides: tuple[str, str]):
        return resolve("vq", write(text), write(GROUPED, "defaults.yaml"), list(overrides))
    return resolve_text


@pytest.mark.parametrize(("text", "own"), [
    ("codebook:", {}), ("codebook: {}", {}), ("codebook: {update: ema, sinkhorn_levels: [-1]}",
                                              {"update": "ema", "sinkhorn_levels": [-1]})])
def test_a_model_that_names_a_group_gets_its_options(grouped, text, own):
    assert grouped(f"vq: {{model_params: {{{text}}}}}")["vq"]["model_params"] == {"codebook": GROUP | own}


@pytest.mark.parametrize(("text", "params"), [
    ("", {}), ("vq: {model_params: {size: 3}}", {"size": 3}),
    ("vq: {model_params: {codebook: 512}}", {"codebook": 512})])  # a plug-in's own key of that name
def test_a_model_that_names_no_group_gets_no_options(grouped, text, params):
    resolved = grouped(text)
    assert resolved["vq"]["model_params"] == params
    assert "codebook" not in resolved.values


def test_two_models_do_not_share_the_defaults_of_a_group(grouped):
    text = "vq: {model_params: {codebook: }}"
    grouped(text, ("start", "random"))
    assert grouped(text)["vq"]["model_params"]["codebook"] == GROUP


@pytest.mark.parametrize("key", ["ema_decay", "codebook.ema_decay", "model_params.codebook.ema_decay",
                                 "vq.model_params.codebook.ema_decay"])
def test_an_option_is_overridden_like_any_other_key(grouped, key):
    resolved = grouped("vq: {model_params: {codebook: {update: ema}}}", (key, "0.5"))
    assert resolved["vq"]["model_params"]["codebook"] == GROUP | {"update": "ema", "ema_decay": 0.5}
    assert resolved.origins["vq.model_params.codebook.ema_decay"] == f"--{key}"


def test_an_option_says_where_it_came_from(grouped):
    origins = grouped("vq:\n  model_params:\n    codebook:\n      update: ema\n").origins
    assert origins["vq.model_params.codebook.update"].endswith("vq.yaml:4")
    assert origins["vq.model_params.codebook.start"].endswith("defaults.yaml:21")


@pytest.mark.parametrize(("key", "text", "named", "fix"), [
    ("updat", "ema", ["'update'"], []), ("update", "emma", ["'emma'", "'ema'"], ["gradient", "ema"]),
    ("restart_dead", "1", ["bool"], []), ("sinkhorn_levels", "1", ["list"], [])])
def test_a_wrong_option_is_an_error_at_its_line(grouped, at, key, text, named, fix):
    with refused(ConfigError, at(4), names=[f"vq.model_params.codebook.{key}", *named], fix=fix):
        grouped(f"vq:\n  model_params:\n    codebook:\n      {key}: {text}\n")


def test_an_option_out_of_range_names_the_range(grouped, at):
    with refused(ConfigError, at(4), names=["vq.model_params.codebook.ema_decay"]) as raised:
        grouped("vq:\n  model_params:\n    codebook:\n      ema_decay: 1.5\n")
    assert numbers(raised) >= {"1.5", "0", "1"}


def test_an_option_of_a_missing_group_is_an_unknown_key(grouped):
    with refused(ConfigError, "--ema_decay", fix=["--help"]):
        grouped("vq: {model_params: {size: 3}}", ("ema_decay", "0.5"))
