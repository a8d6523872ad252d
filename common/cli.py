"""Command-line parsing, and the flags that all stages share."""

import argparse
import re
import shlex
import sys
from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path
from typing import Any

from common.errors import ConfigError, closest, mask_secrets
from common.output import show

ROOT = Path(__file__).resolve().parents[1]
NAME = re.compile(r"[A-Za-z0-9._-]{1,100}")
DASH = "A word that begins with a dash is read as a flag"


class Parser(argparse.ArgumentParser):
    """An argument parser that raises ConfigError if an argument is wrong. Flags cannot be abbreviated."""

    def __init__(self, **kwargs):
        super().__init__(allow_abbrev=False, formatter_class=HelpFormatter, **kwargs)

    def parse_known_args(self, args=None, namespace=None):
        self._argv = sys.argv[1:] if args is None else list(args)  # for error messages
        return super().parse_known_args(args, namespace)

    def _get_option_tuples(self, option_string: str) -> list:
        return []  # otherwise, argparse reads the id -h7 as the flag -h

    def error(self, message: str):
        # argparse names the flag in a message such as "argument --top_k: invalid int value: 'x'".
        flags, _, what = message.removeprefix("argument ").partition(": ")
        if not message.startswith("argument --"):
            raise ConfigError(Path(sys.argv[0]).name, message, fix="see --help")
        flag, why, fix = flags.split("/")[0], "", "see --help"
        if what.startswith("expected"):
            value = next((value for word, value in pairwise(self._argv) if word in flags.split("/") and
                          value.startswith("-") and not self._action(value)), None)
            value = value if self._option_string_actions[flag].type in (None, Path) else None  # others are numbers
            why = "" if value is None else DASH
            fix = (f"see --help; write a value that begins with '-' as {flag}=VALUE" if value is None else
                   f"use {flag}={shlex.quote(value)}")
        raise ConfigError(flag, what, why, fix)

    def as_values(self, word: str) -> str | None:
        """Return the correct form of a value that argparse has read as a flag, because it begins with a dash.

        For example, return `--history=A --history=-B` for the word `-B` in `--history A -B`. Return None if the word
        does not follow a flag that takes several values.
        """
        flag, values = None, []
        for other in self._argv:
            if action := self._action(other):
                if word in values:
                    break
                name, sign, value = other.partition("=")
                flag, values = name if action.nargs in ("*", "+") else None, [value] if sign else []
            elif other != "--":
                values.append(other)
        return " ".join(f"{flag}={shlex.quote(value)}" for value in values) if flag and word in values else None

    def _action(self, word: str) -> argparse.Action | None:
        """Return the action of a word such as `--lr` or `--lr=0.1`, or None if the word is not a known flag."""
        return self._option_string_actions.get(word.partition("=")[0])  # argparse has no public attribute

    def _print_message(self, message: str, file: Any = None) -> None:
        # argparse would ignore an error in writing the --help text.
        show(message, file or sys.stderr, end="")

    def flags(self) -> list[str]:
        return [flag for action in self._actions for flag in action.option_strings if flag.startswith("--")]

    def guess(self, flag: str) -> tuple[str, str | None]:
        """Return a hint for an unknown flag, and the most similar known flag (or None).

        The hint is "Did you mean '--x'?", or the list of all flags if no flag is similar.
        """
        # Compare the flags without their leading dashes. The dashes would make any two short flags look similar.
        close = closest(flag.lstrip("-"), [known.lstrip("-") for known in self.flags()])
        if close is None:
            return f"Known: {', '.join(sorted(self.flags()))}", None
        return f"Did you mean '--{close}'?", f"--{close}"

    def destinations(self) -> set[str]:
        return {action.dest for action in self._actions if action.option_strings and action.dest != "help"}


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """A formatter that shows the defaults of the flags. It does not wrap the description and the epilog."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        hidden = action.default is None or action.default is False
        return action.help if hidden else super()._get_help_string(action)


def add_shared_flags(parser: Parser) -> None:
    parser.add_argument("--dataset", "--dataset_name", "--category", dest="dataset", default="Baby", metavar="D",
                        help="the name of the dataset")
    parser.add_argument("--data_root", type=Path, default=ROOT / "data", metavar="DIR",
                        help="the folder with the datasets and their artifacts")
    parser.add_argument("--debug", action="store_true", help="print the traceback if an error occurs")


def add_force_flag(parser: Parser) -> None:
    parser.add_argument("--force", action="store_true", help="run again even if the results already exist")


def add_variant_flags(parser: Parser) -> None:
    """Add --run_root, and the flags --embedding_suffix and --tag, which select the semantic IDs."""
    parser.add_argument("--run_root", type=Path, default=ROOT / "runs", metavar="DIR", help="the folder with the runs")
    parser.add_argument("--embedding_suffix", default="td", metavar="S",
                        help="the suffix of the embedding, for example td")
    parser.add_argument("--tag", default=None, metavar="T",
                        help="a name for this variant of the semantic IDs (a part of the file name)")


def add_config_flags(parser: Parser) -> None:
    """Add --force, and the flags that change the configuration of a training run."""
    add_force_flag(parser)
    parser.add_argument("--config", type=Path, default=None, metavar="FILE",
                        help="a YAML file that replaces the model's own YAML file")
    parser.add_argument("--set", action="append", default=[], metavar="a.b=value",
                        help="set the configuration key a.b to this value; --b=value does the same")


def parse(parser: Parser, argv: list[str], open_ended: bool = False):
    """Parse the command line `argv`. Raises ConfigError for an unknown flag or a wrong value.

    If `open_ended` is True, an unknown flag `--key value` sets a configuration key. The result then has two more
    attributes:

    overrides: the `(key, text)` pairs of --set and of the unknown flags
    flags: the names of the known flags
    """
    args, rest = parser.parse_known_args(argv)
    for flag in ("dataset", "embedding_suffix", "tag"):
        check_name(f"--{flag}", getattr(args, flag, None))
    if rest and not open_ended:
        raise _unknown_flag(parser, next((word for word in rest if word.startswith("-") and word != "--"), rest[0]))
    if open_ended:
        args.flags = [flag.removeprefix("--") for flag in parser.flags()]
        args.overrides = [_split_set(text) for text in getattr(args, "set", [])] + _split_rest(rest, parser)
    return args


def _unknown_flag(parser: Parser, word: str) -> ConfigError:
    flag, sign, value = word.partition("=")
    guess, close = parser.guess(flag)
    values, right = parser.as_values(word), f"use {close}{sign}{value}" if close else "see --help"
    if values is None:
        return ConfigError(flag, "unknown flag", guess, right)
    if close is None:
        return ConfigError(flag, "unknown flag", DASH, f"use {values}")
    return ConfigError(flag, "unknown flag", guess, f"{right}, or {values} if {word!r} is a value")


def folder_flag(flag: str, folder: Path, default: Path) -> str:
    """Return the text ` --flag FOLDER` to append to a command, or "" if the folder is the default."""
    return "" if folder.resolve() == default else f" {flag} {shlex.quote(str(folder))}"


def check_name(where: str, name: str | None) -> None:
    """Raise ConfigError if a name is not safe as a file name, for example `../x` or `.x`."""
    if name is not None and (not NAME.fullmatch(name) or name.startswith(".")):
        raise ConfigError(where, f"{name!r} is not a valid name",
                          "A name has at most 100 letters, digits, '.', '_' and '-', and does not begin with '.'",
                          "choose another name")


def given_flags(parser: Parser, args: argparse.Namespace, destinations: Iterable[str]) -> list[str]:
    """Return the flags that differ from their defaults, as arguments for another command.

    Only flags with an argparse `dest` in `destinations` are returned.
    """
    given = []
    for action in parser._actions:  # argparse has no public attribute for its actions
        value = getattr(args, action.dest, None)
        if action.dest in destinations and value != action.default:
            given += [action.option_strings[0]] if value is True else [f"{action.option_strings[0]}={value}"]
    return given


def reject_ignored(args: argparse.Namespace, flag: str, others: Iterable[str], reason: str,
                   keys: Iterable[str] = ()) -> None:
    """Raise ConfigError if the command line has options that have no effect together with `flag`.

    others: flags that have no effect
    reason: a sentence for the error
    keys: the only configuration keys that have an effect
    """
    ignored = [f"--{key}" for key, _ in args.overrides if key not in keys]
    ignored += [f"--{other}" for other in others if getattr(args, other) not in (None, False)]
    if ignored:
        raise ConfigError(flag, f"cannot be combined with {ignored[0]}", reason, f"leave out {' '.join(ignored)}")


def _split_set(text: str) -> tuple[str, str]:
    key, sign, value = text.partition("=")
    if not sign:
        raise ConfigError("--set", f"{text!r} has no '='", fix="write --set a.b=value")
    return key, value


def _split_rest(rest: list[str], parser: Parser) -> list[tuple[str, str]]:
    overrides, words = [], iter(rest)
    for word in words:
        if not word.startswith("--"):
            raise ConfigError(word, "is a value without a flag", "Every value must follow a --flag", "see --help")
        key, sign, value = word[2:].partition("=")
        if not sign:
            value = next(words, "--")
            if value.startswith("--"):
                guess, close = parser.guess(word)
                raise ConfigError(word, "unknown flag, or its value is missing", guess,
                                  f"use {close}, or {word}=<value> if it is a configuration key" if close
                                  else f"write {word}=<value>")
        overrides.append((key, value))
    return overrides


def value_of(argv: list[str], flags: tuple[str, ...], default: str) -> str:
    """Return the value of the first of `flags` that is on the command line, or `default`.

    Use this function before the command line is parsed, for example for a --help text that depends on a flag.
    """
    for word, following in pairwise([*argv, default]):
        flag, sign, value = word.partition("=")
        if flag in flags:
            return value if sign else following
    return default


def command_line(script: str, argv: list[str]) -> str:
    """Return the command line as text, for `Fix:` lines and meta files.

    Secrets are masked. --force and --debug are left out.
    """
    line = shlex.join(script.split() + [mask_secrets(a) for a in argv if a not in ("--force", "--debug")])
    # In an ASCII locale, Python does not decode the bytes of a UTF-8 path, so decode them here.
    return line.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def help_with_keys(parser: Parser, yamls: list[Path]) -> None:
    """Append YAML files to the --help text. They show the configuration keys with defaults and comments."""
    texts = (f"{path.relative_to(ROOT)}:\n{path.read_text(encoding='utf-8')}" for path in yamls)
    parser.epilog = ("Configuration keys. Each key is also a flag, such as --epochs 100 or --set common.seed=1:\n\n"
                     + "\n".join(texts))
