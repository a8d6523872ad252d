"""Write docs/reference.md, which lists all flags and configuration keys: python docs/make_reference.py"""

import argparse
import sys
from collections.abc import Iterator
from itertools import takewhile
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])

# The path comes first.
from common.cli import ROOT, Parser  # noqa: E402
from common.config import DECLARED, load_yaml  # noqa: E402

TARGET = ROOT / "docs" / "reference.md"
HEAD = """# Reference

All flags and configuration keys, with their defaults. `python docs/make_reference.py` writes this page from the code.

- `--key value` and `--key=value` both work. Abbreviations do not.
- Every configuration key of a model is also a flag: `--epochs 100`, or `--set common.seed=1` with its full name.
- `run_pipeline.sh` accepts the keys of both stages: `--quantization.max_steps 300`, `--recommendation.max_steps 300`.
"""


def main() -> None:
    TARGET.write_text(make_reference(), encoding="utf-8")


def make_reference() -> str:
    """Return the text of docs/reference.md."""
    import run_pipeline
    from dataloader.flags import make_parser as data_parser
    from quantization import models as quantizers
    from quantization.main import make_parser as quantization_parser
    from recommendation import models as recommenders
    from recommendation.options import make_parser as recommendation_parser
    from recommendation.recommend import make_parser as recommend_parser

    parts = [HEAD, "## Flags\n"]
    parts += _command("bash run_pipeline.sh", "All flags of the data stage (next table) and these:",
                      run_pipeline.make_parser(), without=data_parser("").destinations() - {"dataset", "data_root"})
    parts += _command("bash dataloader/<step>.sh", "All steps have the same flags, and each uses those that it needs.",
                      data_parser(""))
    parts += _command("python quantization/main.py", "", quantization_parser([]))
    parts += _command("python recommendation/main.py", "", recommendation_parser([]))
    parts += _command("python recommendation/recommend.py", "", recommend_parser())
    parts += ["## Configuration keys of quantizers\n", *_keys(quantizers.DEFAULTS)]
    for name in quantizers.names():
        parts += _keys(quantizers.config_path(name), quantizers.DEFAULTS)
    parts += ["## Configuration keys of recommenders\n", *_keys(recommenders.DEFAULTS)]
    for name in recommenders.names():
        parts += _keys(recommenders.config_path(name), recommenders.DEFAULTS)
    return "\n".join(parts)


def _command(name: str, note: str, parser: Parser, without: set[str] = frozenset()) -> list[str]:
    rows = ["| flag | default | meaning |", "|---|---|---|"]
    for action in parser._actions:  # argparse has no public name for them
        if action.dest != "help" and action.option_strings and action.dest not in without:
            rows.append(f"| {_names(action)} | {_default(action)} | {_prose((action.help or '').replace('%%', '%'))} |")
    return [f"### `{name}`\n", *([f"{note}\n"] if note else []), *rows, ""]


def _names(action: argparse.Action) -> str:
    value = action.metavar or ("{" + ",".join(map(str, action.choices)) + "}" if action.choices else "")
    names = ", ".join(f"`{flag}`" for flag in action.option_strings)
    return f"{names} `{_cell(value)}`" if value else names


def _default(action: argparse.Action) -> str:
    if action.default is None or action.default is False or action.default == []:
        return ""
    value = action.default
    return f"`{value.relative_to(ROOT) if isinstance(value, Path) else value}`"


def _keys(path: Path, defaults: Path | None = None) -> list[str]:
    """Return the section on a YAML file: its first comment lines, and a table of its keys.

    defaults: the file whose values this one overrides; a key without a comment has the comment there
    """
    inherited = {} if defaults is None else {key.rpartition(".")[2]: text for key, text in _meanings(defaults).items()}
    lines = path.read_text(encoding="utf-8").splitlines()
    first = next(number for number, line in enumerate(lines) if not line.startswith("#"))
    note = [line.lstrip("# ") for line in lines[:first]]
    values, meanings = load_yaml(path)[0], _meanings(path)
    rows = ["| key | default | meaning |", "|---|---|---|"]
    for key, value in _leaves(values):
        meaning = meanings[key] or inherited.get(key.rpartition(".")[2], "")
        rows.append(f"| `{key}` | `{_cell(_yaml(value))}` | {_prose(meaning)} |")
    return [f"### `{path.relative_to(ROOT)}`\n", *note, "", *rows, ""]


def _meanings(path: Path) -> dict[str, str]:
    """Return the comment on each key of a YAML file."""
    values, origins = load_yaml(path)
    lines, meanings = path.read_text(encoding="utf-8").splitlines(), {}
    for key, _ in _leaves(values):
        place = int(origins[key].rpartition(":")[2]) - 1
        # A long comment continues in the next lines, which are indented.
        more = takewhile(lambda line: line.startswith("     ") and line.lstrip().startswith("# "), lines[place + 1:])
        meanings[key] = " ".join([lines[place].partition(" # ")[2].strip(), *(line.strip("# ") for line in more)])
    return meanings


def _leaves(values: dict, prefix: str = "") -> Iterator[tuple[str, object]]:
    """Yield the dotted name and the value of every key, without the sections about the allowed values."""
    for key, value in values.items():
        if key in DECLARED:
            continue
        if isinstance(value, dict) and value:
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _yaml(value: object) -> str:
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def _prose(text: str) -> str:
    """Return a table cell in which `<D>` is not taken for HTML."""
    return _cell(text).replace("<", "&lt;")


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


if __name__ == "__main__":
    main()
