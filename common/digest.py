"""Compute a digest of the code that trains a model. If the digest has changed, the code has changed."""

import ast
import hashlib
import json
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import NamedTuple

from common.cli import ROOT

# The files of a stage, and of `common`, that determine a run together with its model.
TRAINING = ("trainer.py", "dataset.py", "batches.py", "shapes.py", "training.py", "optimization.py", "prior_weight.py",
            "models/with_prior.py", "evaluator.py", "metrics.py", "pipeline.py", "inputs.py", "data_parallel.py")


def code_digest(model: Path, stage: Path, settings: str = "") -> str:
    """Return a digest (16 hexadecimal digits) of the code that trains a model.

    model: the path of the model's file
    stage: the path of the stage's folder
    settings: a text that the digest covers too

    The digest covers the model's file, all files of the stage that it imports (directly or indirectly), and the files
    `TRAINING` of the stage and of `common`. It ignores comments, docstrings and layout.
    """
    parsed = {path: _parse(path.read_text(encoding="utf-8"))
              for folder in (stage, ROOT / "common") for name in TRAINING if (path := folder / name).is_file()}
    waiting = [model]
    while waiting:
        path = waiting.pop()
        if path not in parsed:
            parsed[path] = _parse(path.read_text(encoding="utf-8"))
            waiting += _files(parsed[path].imports, path, stage)
    parts = ", ".join(f"[{json.dumps(path.name)}, {parsed[path].tree}]" for path in sorted(parsed))
    return hashlib.sha256(f"[{parts}]{settings}".encode()).hexdigest()[:16]


class _Parsed(NamedTuple):
    """A parsed Python file: its syntax tree and its imports."""

    tree: str                             # the syntax tree as JSON, see `_as_lists`
    imports: list[tuple[int, list[str]]]  # per import: the number of leading dots, and the imported names


@cache  # a command that shows many runs needs the same files many times
def _parse(text: str) -> _Parsed:
    tree, imports = ast.parse(text), []
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            tails = [(), *((alias.name,) for alias in node.names)]
            imports.append((node.level, [".".join(filter(None, (node.module, *tail))) for tail in tails]))
        elif isinstance(node, ast.Import):
            imports.append((0, [alias.name for alias in node.names]))
    return _Parsed(json.dumps(_as_lists(tree)), imports)


def _files(imports: list[tuple[int, list[str]]], path: Path, stage: Path) -> Iterable[Path]:
    """Yield the files in the folder `stage` that the file `path` imports.

    imports: all imports of the file `path` (see `_Parsed`)
    """
    for level, names in imports:
        folder = path.parents[level - 1] if level else ROOT
        for name in names:
            target = folder.joinpath(*name.split("."))
            for file in (target.with_name(f"{target.name}.py"), target / "__init__.py"):
                if file.is_file() and file.is_relative_to(stage):
                    yield file


def _as_lists(node: object) -> object:
    """Convert a syntax tree to nested lists, without docstrings and line numbers."""
    # Unlike `ast.dump`, this gives the same result in all versions of Python.
    if isinstance(node, list):
        return [_as_lists(part) for part in node]
    if not isinstance(node, ast.AST):
        return node if isinstance(node, str | int | float | bool | None) else repr(node)
    fields = dict(ast.iter_fields(node))
    if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and ast.get_docstring(
            node, clean=False) is not None:
        fields["body"] = fields["body"][1:]
    return [type(node).__name__, *([name, _as_lists(value)] for name, value in fields.items()
                                   if value not in (None, []))]
