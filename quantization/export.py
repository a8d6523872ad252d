"""Semantic IDs for other systems: tokens and an `index.json` as in the LC-Rec family, and a table with titles."""

import csv
import io
import json
from pathlib import Path

import numpy as np

from common.artifacts import DatasetFolder, load_codes, load_items
from common.publishing import write_text

# N items, L levels


def export(folder: DatasetFolder, quantizer: str, suffix: str, tag: str | None, target: Path) -> list[Path]:
    """Write `<D>.index.json` and `<D>.ids.csv` into the folder `target`; returns their paths."""
    codes, _ = load_codes(folder, quantizer, suffix, tag, distinct=False)
    items = load_items(folder)
    rows = tokens(codes)
    index, sheet = target / f"{folder.name}.index.json", target / f"{folder.name}.ids.csv"
    entries = (f"{json.dumps(raw_id)}: {json.dumps(row)}" for raw_id, row in zip(items["raw_id"], rows, strict=True))
    write_text(index, "{" + ",\n".join(entries) + "}\n")
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(["raw_id", *(f"code_{level + 1}" for level in range(codes.shape[1])), "semantic_id", "title"])
    writer.writerows([raw_id, *code, "".join(row), title] for raw_id, code, row, title in
                     zip(items["raw_id"], codes.tolist(), rows, items["title"], strict=True))
    write_text(sheet, buffer.getvalue())
    return [index, sheet]


def tokens(codes: np.ndarray) -> list[list[str]]:
    """(N, L) -> each item's tokens, `<a_12>` for the first level's code 12, `<b_3>` for the second's 3, ..."""
    return [[token(level, code) for level, code in enumerate(row)] for row in codes.tolist()]


def token(level: int, code: int) -> str:
    """`<a_12>`: the letter names the level."""
    return f"<{letter(level)}_{code}>"


def letter(level: int) -> str:
    return (letter(level // 26 - 1) if level >= 26 else "") + chr(ord("a") + level % 26)
