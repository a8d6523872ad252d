"""The flags that every stage shares, parsed the same way everywhere."""

import argparse
import re
import shlex
import sys
from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path

from common.errors import ConfigError, closest, mask_secrets

ROOT = Path(__file__).resolve().parents[1]
NAME = re.compile(r"[A-Za-z0-9._-]{1,100}")


class Parser(argparse.ArgumentParser):
    """An argument parser whose mistakes are user errors; no abbreviations, defaults in the help."""

    def __init__(self, **kwargs):
        super().__init__(allow_abbrev=False, formatter_class=HelpFormatter, **kwargs)

    def error(self, message: str):
        raise ConfigError(f"{Path(sys.argv[0]).name}", message, fix="see --help")

    def flags(self) -> list[str]:
        return [flag for action in self._actions for flag in action.option_strings if flag.startswith("--")]

    def guess(self, flag: str) -> tuple[str, str | None]:
        """`did you mean '--x'?` or the list of all flags; and that flag, or None. Dashes do not make flags alike."""
        close = closest(flag.lstrip("-"), [known.lstrip("-") for known in self.flags()])
        if close is None:
            return f"there are: {', '.join(sorted(self.flags()))}", None
        return f"did you mean '--{close}'?", f"--{close}"

    def destinations(self) -> set[str]:
        return {action.dest for action in self._actions if action.option_strings and action.dest != "help"}


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Shows each flag's default if it has one, and leaves the epilog's lines as they are."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default in (None, False) else super()._get_help_string(action)


def add_shared_flags(parser: Parser) -> None:
    parser.add_argument("--dataset", "--dataset_name", "--category", dest="dataset", default="Baby", metavar="D",
                        help="the data set")
    parser.add_argument("--data_root", type=Path, default=ROOT / "data", metavar="DIR",
                        help="where data sets and their artifacts live")
    parser.add_argument("--debug", action="store_true", help="print the traceback of an error")


def add_force_flag(parser: Parser) -> None:
    parser.add_argument("--force", action="store_true", help="repeat what is finished already")


def add_variant_flags(parser: Parser) -> None:
    """Which semantic IDs, and where runs lie."""
    parser.add_argument("--run_root", type=Path, default=ROOT / "runs", metavar="DIR", help="where runs are written")
    parser.add_argument("--embedding_suffix", default="td", metavar="S", help="the embedding that is quantized")
    parser.add_argument("--tag", default=None, metavar="T", help="keeps variants of the semantic IDs apart")


def add_config_flags(parser: Parser) -> None:
    """What a trainer takes beside the keys of its YAML."""
    add_force_flag(parser)
    parser.add_argument("--config", type=Path, default=None, metavar="FILE", help="a YAML in place of the model's own")
    parser.add_argument("--set", action="append", default=[], metavar="a.b=value",
                        help="override a configuration key (so does --b=value)")


def parse(parser: Parser, argv: list[str], open_ended: bool = False):
    """The parsed flags; with `open_ended` also `overrides`: `(key, text)` from --set and unknown --key value."""
    args, rest = parser.parse_known_args(argv)
    for flag in ("dataset", "embedding_suffix", "tag"):
        check_name(f"--{flag}", getattr(args, flag, None))
    if rest and not open_ended:
        flag, sign, value = rest[0].partition("=")
        guess, close = parser.guess(flag)
        raise ConfigError(flag, "no such flag", guess, f"{close}{sign}{value}" if close else "see --help")
    if open_ended:
        args.flags = [flag.removeprefix("--") for flag in parser.flags()]
        args.overrides = [_split_set(text) for text in getattr(args, "set", [])] + _split_rest(rest, parser)
    return args


def folder_flag(flag: str, folder: Path, default: Path) -> str:
    """` --flag FOLDER` for commands that would look in the default folder otherwise, else nothing."""
    return "" if folder.resolve() == default else f" {flag} {shlex.quote(str(folder))}"


def check_name(where: str, name: str | None) -> None:
    """Names become folder and file names, so they may not climb or hide."""
    if name is not None and (not NAME.fullmatch(name) or name.startswith(".")):
        raise ConfigError(where, f"{name!r} is not a name", "letters, digits, '.', '_' and '-', at most 100, "
                          "no '.' in front", "choose another name")


def given_flags(parser: Parser, args: argparse.Namespace, destinations: Iterable[str]) -> list[str]:
    """The flags, of these destinations, that are set to something else than their default, for another command."""
    given = []
    for action in parser._actions:  # argparse has no public name for them
        value = getattr(args, action.dest, None)
        if action.dest in destinations and value != action.default:
            given += [action.option_strings[0]] if value is True else [f"{action.option_strings[0]}={value}"]
    return given


def reject_ignored(args: argparse.Namespace, flag: str, others: Iterable[str], reason: str,
                   keys: Iterable[str] = ()) -> None:
    """Raise ConfigError for what a flag that trains nothing would not read.

    That is any of the `others`, and every configuration key but `keys`.
    """
    ignored = [f"--{key}" for key, _ in args.overrides if key not in keys]
    ignored += [f"--{other}" for other in others if getattr(args, other) not in (None, False)]
    if ignored:
        raise ConfigError(flag, f"{ignored[0]} does not go with it", reason, f"leave out {' '.join(ignored)}")


def _split_set(text: str) -> tuple[str, str]:
    key, sign, value = text.partition("=")
    if not sign:
        raise ConfigError("--set", f"{text!r} has no '='", fix="--set a.b=value")
    return key, value


def _split_rest(rest: list[str], parser: Parser) -> list[tuple[str, str]]:
    overrides, words = [], iter(rest)
    for word in words:
        if not word.startswith("--"):
            raise ConfigError(word, "stands alone", "every value belongs to a --flag", "see --help")
        key, sign, value = word[2:].partition("=")
        if not sign:
            value = next(words, "--")
            if value.startswith("--"):
                guess, close = parser.guess(word)
                raise ConfigError(word, "no such flag, or its value is missing", guess,
                                  f"{close}, or {word}=<value> if it is a configuration key" if close
                                  else f"{word}=<value>")
        overrides.append((key, value))
    return overrides


def value_of(argv: list[str], flags: tuple[str, ...], default: str) -> str:
    """What one of these flags is set to, before anything is parsed; for a --help that depends on it."""
    for word, following in pairwise([*argv, default]):
        flag, sign, value = word.partition("=")
        if flag in flags:
            return value if sign else following
    return default


def command_line(script: str, argv: list[str]) -> str:
    """How the user would type this command from the root, for `Fix:` lines and manifests; without any secret."""
    line = shlex.join(script.split() + [mask_secrets(a) for a in argv if a not in ("--force", "--debug")])
    # In an ASCII locale Python leaves the bytes of an UTF-8 path undecoded.
    return line.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def help_with_keys(parser: Parser, yamls: list[Path]) -> None:
    """Let --help end with the configuration keys, their defaults and their meaning, as the YAMLs have them."""
    texts = (f"{path.relative_to(ROOT)}:\n{path.read_text(encoding='utf-8')}" for path in yamls)
    parser.epilog = "Configuration keys, each also a flag (--epochs 100, --set common.seed=1):\n\n" + "\n".join(texts)
