"""A digest of the code that trains a model, so that a run knows whether it would still be trained that way."""

import ast
import hashlib
import json
from collections.abc import Iterable
from pathlib import Path

from common.cli import ROOT


def code_digest(model: Path, stage: Path) -> str:
    """The digest of a model's file, the files of its stage that it imports, the stage's trainer and dataset, the loop.

    It is taken from the syntax trees without docstrings: comments and layout do not count. Files that an imported file
    imports count as well.
    """
    files, waiting = {stage / "trainer.py", stage / "dataset.py", ROOT / "common/training.py"}, [model]
    while waiting:
        path = waiting.pop()
        if path not in files:
            files.add(path)
            waiting += _imported(path, stage)
    parts = [[path.name, _plain(ast.parse(path.read_text(encoding="utf-8")))] for path in sorted(files)]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


def _imported(path: Path, stage: Path) -> Iterable[Path]:
    """The files of a stage that one of its files imports, wherever the import stands."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            folder = path.parents[node.level - 1] if node.level else ROOT
            names = [".".join(filter(None, (node.module, *tail))) for tail in ((), *((a.name,) for a in node.names))]
        elif isinstance(node, ast.Import):
            folder, names = ROOT, [alias.name for alias in node.names]
        else:
            continue
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
