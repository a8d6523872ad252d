"""A digest of the code that trains a model, so that a run knows whether it would still be trained that way."""

import ast
import hashlib
import json
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import NamedTuple

from common.cli import ROOT


def code_digest(model: Path, stage: Path) -> str:
    """The digest of a model's file, the files of its stage that it imports, the stage's trainer and dataset, the loop.

    It is taken from the syntax trees without docstrings: comments and layout do not count. Files that an imported file
    imports count as well.
    """
    parsed = {path: _parse(path.read_text(encoding="utf-8"))
              for path in (stage / "trainer.py", stage / "dataset.py", ROOT / "common/training.py")}
    waiting = [model]
    while waiting:
        path = waiting.pop()
        if path not in parsed:
            parsed[path] = _parse(path.read_text(encoding="utf-8"))
            waiting += _files(parsed[path].imports, path, stage)
    parts = ", ".join(f"[{json.dumps(path.name)}, {parsed[path].tree}]" for path in sorted(parsed))
    return hashlib.sha256(f"[{parts}]".encode()).hexdigest()[:16]


class _Parsed(NamedTuple):
    """What counts of a file, and which other files may count with it."""

    tree: str                             # the plain syntax tree as JSON
    imports: list[tuple[int, list[str]]]  # the dots before each import's names, and the names


@cache  # a table of many runs asks for the same files again and again
def _parse(text: str) -> _Parsed:
    tree, imports = ast.parse(text), []
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            tails = [(), *((alias.name,) for alias in node.names)]
            imports.append((node.level, [".".join(filter(None, (node.module, *tail))) for tail in tails]))
        elif isinstance(node, ast.Import):
            imports.append((0, [alias.name for alias in node.names]))
    return _Parsed(json.dumps(_plain(tree)), imports)


def _files(imports: list[tuple[int, list[str]]], path: Path, stage: Path) -> Iterable[Path]:
    """The files of a stage that one of its files imports, wherever the import stands."""
    for level, names in imports:
        folder = path.parents[level - 1] if level else ROOT
        for name in names:
            target = folder.joinpath(*name.split("."))
            for file in (target.with_name(f"{target.name}.py"), target / "__init__.py"):
                if file.is_file() and file.is_relative_to(stage):
                    yield file


def _plain(node: object) -> object:
    """A syntax tree as nested lists, without docstrings and places, and alike in every version of Python."""
    if isinstance(node, list):
        return [_plain(part) for part in node]
    if not isinstance(node, ast.AST):
        return node if isinstance(node, str | int | float | bool | None) else repr(node)
    fields = dict(ast.iter_fields(node))
    if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and ast.get_docstring(
            node, clean=False) is not None:
        fields["body"] = fields["body"][1:]
    return [type(node).__name__, *([name, _plain(value)] for name, value in fields.items() if value not in (None, []))]
