import re
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.cli import (
    ROOT,
    Parser,
    add_config_flags,
    add_shared_flags,
    add_variant_flags,
    check_name,
    command_line,
    given_flags,
    help_with_keys,
    parse,
    value_of,
)
from common.errors import ConfigError
from tests.errors import refused


def parser() -> Parser:
    parser = Parser(prog="main.py", description="Trains.")
    parser.add_argument("--quantizer_name", "--model_name", default="rqvae", help="which one")
    add_shared_flags(parser)
    add_variant_flags(parser)
    add_config_flags(parser)
    return parser


def flags(*argv: str):
    return parse(parser(), list(argv))


def overrides(*argv: str) -> list[tuple[str, str]]:
    return parse(parser(), list(argv), open_ended=True).overrides


def test_the_defaults_are_those_of_the_contract():
    args = flags()
    assert (args.dataset, args.embedding_suffix, args.quantizer_name, args.tag) == ("Baby", "td", "rqvae", None)
    assert (args.data_root, args.run_root) == (ROOT / "data", ROOT / "runs")
    assert (args.force, args.debug, args.config, args.set) == (False, False, None, [])


def test_the_root_does_not_depend_on_the_working_directory():
    assert (ROOT / "common" / "cli.py").samefile(Path(__file__).parents[2] / "common" / "cli.py")
    assert ROOT.is_absolute()


@pytest.mark.parametrize("flag", ["--dataset", "--dataset_name", "--category"])
def test_the_dataset_has_three_flags_and_two_spellings(flag):
    assert flags(flag, "Toys").dataset == "Toys"
    assert flags(f"{flag}=Toys").dataset == "Toys"


@pytest.mark.parametrize(("flag", "nearest"), [
    ("--data", "--dataset"), ("--dataset_nam", "--dataset_name"), ("--datase", "--dataset"), ("--forc", "--force"),
    ("--quantizer", "--quantizer_name"), ("--dataset-name", "--dataset_name"), ("--datset", "--dataset")])
def test_an_abbreviated_flag_is_refused_with_the_nearest_one(flag, nearest):
    for words, fix in (([flag, "Toys"], nearest), ([f"{flag}=Toys"], f"{nearest}=Toys")):
        with refused(ConfigError, flag, names=[f"'{nearest}'"], fix=[fix]):
            flags(*words)


@pytest.mark.parametrize(("word", "flag"), [("--dataset", "--dataset"), ("--force=1", "--force"), ("--tag", "--tag")])
def test_a_flag_used_wrongly_is_a_configuration_error(word, flag):
    with refused(ConfigError, flag, fix=["--help"]):
        flags(word)


@pytest.mark.parametrize("name", ["../x", "..", ".", ".hid", "", "a/b", "/etc", "a b", "a\n", "é", "x" * 300, "a\0b",
                                  "$(reboot)", "~"])
@pytest.mark.parametrize(("flag", "where"), [
    ("--dataset", "--dataset"), ("--dataset_name", "--dataset"), ("--category", "--dataset"),
    ("--embedding_suffix", "--embedding_suffix"), ("--tag", "--tag")])
def test_a_name_may_not_climb_hide_or_be_endless(flag, where, name):
    with refused(ConfigError, where, names=[repr(name), 100]) as raised:
        flags(f"{flag}={name}")
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("name", ["Baby", "ml-100k", "a.b", "_x", "3", "x" * 100, "a..b"])
def test_an_ordinary_name_is_accepted(name):
    assert flags("--dataset", name, "--tag", name).dataset == name


@settings(max_examples=100, deadline=None, database=None)
@given(st.text(alphabet="aZ0._-/\\~ \n\0é", max_size=120))
def test_an_accepted_name_stays_in_its_folder(name):
    try:
        check_name("--dataset", name)
    except ConfigError:
        return
    assert re.fullmatch(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,99}", name)
    assert (Path("/data") / name).resolve().parent == Path("/data").resolve()


def test_overrides_come_with_set_or_by_name_in_both_spellings():
    assert overrides("--epochs", "5", "--lr=1e-4", "--set", "common.seed=1", "--set=a.b=c=d", "--force") == [
        ("common.seed", "1"), ("a.b", "c=d"), ("epochs", "5"), ("lr", "1e-4")]


@pytest.mark.parametrize(("argv", "pair"), [
    (["--shift", "-1"], ("shift", "-1")), (["--shift", "-1e-3"], ("shift", "-1e-3")), (["--x=--y"], ("x", "--y")),
    (["--x="], ("x", "")), (["--shape", "[1, 2]"], ("shape", "[1, 2]")), (["--a.b", "3"], ("a.b", "3")),
    (["--url", "http://h/?a=b"], ("url", "http://h/?a=b"))])
def test_a_value_may_look_like_a_flag_or_a_list(argv, pair):
    assert overrides(*argv) == [pair]
    assert overrides("--dataset", "Toys", *argv, "--force") == [pair]


def test_the_last_of_two_overrides_comes_last():
    assert overrides("--lr", "1", "--lr", "2") == [("lr", "1"), ("lr", "2")]


@pytest.mark.parametrize(("argv", "where", "names", "fix"), [
    (["--epochs"], "--epochs", [], ["--epochs="]),
    (["--epochs", "--lr", "3"], "--epochs", [], ["--epochs="]),
    (["--force_", "--debug"], "--force_", ["'--force'"], ["--force", "--force_="]),
    (["stray"], "stray", [], ["--help"]),
    (["--epochs", "5", "6"], "6", [], ["--help"]),
    (["--set", "epochs"], "--set", ["'epochs'"], ["--set"])])
def test_an_override_needs_a_key_and_a_value(argv, where, names, fix):
    with refused(ConfigError, where, names=names, fix=fix):
        overrides(*argv)


def asking(*argv: str):
    command = Parser()
    add_shared_flags(command)
    command.add_argument("--user", "--who")
    command.add_argument("--items", nargs="*", action="extend")
    command.add_argument("--top_k", type=int)
    command.add_argument("--file", type=Path)
    return parse(command, list(argv))


@pytest.mark.parametrize(("argv", "where", "fix"), [
    (["--user", "--Xk2"], "--user", "--user=--Xk2"), (["--top_k", "1", "--who", "-h1"], "--user", "--user=-h1"),
    (["--user", "-a=b'c"], "--user", "--user='-a=b'\"'\"'c'"), (["--file", "-f"], "--file", "--file=-f"),
    (["--items", "-A", "--B"], "-A", "--items=-A --items=--B"),
    (["--top_k", "1", "--items", "A", "-h7", "B", "--user", "u"], "-h7", "--items=A --items=-h7 --items=B"),
    (["--items=A,B", "--C=1"], "--C", "--items=A,B --items=--C=1"), (["--items", "--", "-A"], "-A", "--items=-A")])
def test_a_value_with_a_dash_is_refused_with_its_spelling(argv, where, fix):
    with refused(ConfigError, where) as raised:
        asking(*argv)
    assert raised.value.fix == f"use {fix}"


def test_a_value_with_a_dash_follows_an_equals_sign():
    args = asking("--who=--Xk2", "--items=-A", "--items=--B", "--items", "C", "-5")
    assert (args.user, args.items) == ("--Xk2", ["-A", "--B", "C", "-5"])


def test_a_misspelled_flag_after_values_may_be_both():
    with refused(ConfigError, "--topk", names=["'--top_k'"], fix=["--top_k", "--items=A --items=--topk --items=3"]):
        asking("--items", "A", "--topk", "3")


@pytest.mark.parametrize(("argv", "where"), [
    (["--user", "--top_k", "3"], "--user"), (["--user"], "--user"), (["--top_k", "-x"], "--top_k"),
    (["--items", "A", "--user", "u", "-B"], "-B")])
def test_a_missing_value_is_not_taken_from_flags(argv, where):
    with refused(ConfigError, where, fix=["--help"]):
        asking(*argv)


def test_a_command_without_overrides_refuses_a_key():
    assert overrides("--epochs", "5") == [("epochs", "5")]
    with refused(ConfigError, "--epochs", names=["--dataset", "--force"], fix=["--help"]):
        flags("--epochs", "5")


def test_a_command_is_recorded_as_it_would_be_typed():
    line = command_line("python quantization/main.py", ["--dataset=my set", "--force", "--lr", "1e-4", "--debug"])
    assert line == "python quantization/main.py '--dataset=my set' --lr 1e-4"


def forwarded(*argv: str, destinations: set[str]) -> list[str]:
    command = parser()
    return given_flags(command, parse(command, list(argv)), destinations)


def test_given_flags_are_forwarded_to_another_command():
    argv = ("--category", "My_Set", "--data_root", "a folder/data", "--debug", "--tag=t",
            "--model_name", "vqvae")
    assert forwarded(*argv, destinations={"dataset", "data_root", "debug", "tag", "quantizer_name"}) == [
        "--quantizer_name=vqvae", "--dataset=My_Set", "--data_root=a folder/data", "--debug", "--tag=t"]


def test_defaults_and_other_flags_are_not_forwarded():
    assert forwarded("--tag=t", "--dataset=Baby", "--force", destinations={"dataset", "data_root", "debug"}) == []


def test_a_forwarded_value_may_look_like_a_flag():
    command = Parser()
    command.add_argument("--low", type=float, default=0.0)
    command.add_argument("--text", default=None)
    args = parse(command, ["--low=-1.5", "--text=--low"])
    given = given_flags(command, args, command.destinations())
    assert given == ["--low=-1.5", "--text=--low"]
    assert parse(command, given) == args


def test_the_destinations_of_a_parser_are_those_of_its_flags():
    command = Parser()
    add_shared_flags(command)
    command.add_argument("place")
    assert command.destinations() == {"dataset", "data_root", "debug"}


def test_help_shows_defaults_and_ends_with_the_yaml_keys(capsys):
    command = parser()
    path = ROOT / "quantization" / "configs" / "defaults.yaml"
    help_with_keys(command, [path])
    with pytest.raises(SystemExit) as raised:
        parse(command, ["--help"])
    assert raised.value.code == 0
    text, keys = capsys.readouterr().out, f"quantization/configs/defaults.yaml:\n{path.read_text(encoding='utf-8')}"
    assert text.endswith(keys)
    assert "rqvae" in text.removesuffix(keys)


@pytest.mark.parametrize(("argv", "value"), [
    ([], "one"), (["--other"], "one"), (["--name", "two"], "two"), (["--name=two", "--other"], "two"),
    (["--name"], "one"), (["--other", "--called", "two"], "two")])
def test_a_value_is_found_before_anything_is_parsed(argv, value):
    assert value_of(argv, ("--name", "--called"), "one") == value


@pytest.mark.slow
def test_checking_a_command_line_imports_nothing_heavy(python):
    done = python("import sys, common.artifacts, common.cli, common.config, common.errors, common.run\n"
                  "print([name for name in ('torch', 'duckdb', 'pandas', 'transformers') if name in sys.modules])")
    assert (done.stdout, done.stderr) == ("[]\n", "")


def test_a_command_line_of_undecoded_bytes_is_readable():
    undecoded = "data/é".encode().decode("ascii", "surrogateescape")  # as in an ASCII locale
    assert command_line("python main.py", ["--data_root", undecoded]) == "python main.py --data_root 'data/é'"
