"""Export of semantic IDs for other systems: an `index.json` in the format of LC-Rec, and a CSV table with titles."""

import csv
import io
import json
from pathlib import Path

import numpy as np

from common.artifacts import DatasetFolder, load_codes, load_items
from common.publishing import write_text

# N items, L levels


def export(folder: DatasetFolder, quantizer: str, suffix: str, tag: str | None, target: Path) -> list[Path]:
    """Write `<D>.index.json` and `<D>.ids.csv` into the folder `target`, and return their paths."""
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
    """Return the tokens of every item: (N, L) -> N lists such as `["<a_12>", "<b_3>"]`."""
    return [[token(level, code) for level, code in enumerate(row)] for row in codes.tolist()]


def token(level: int, code: int) -> str:
    """Return the token of a code: `<a_12>` is code 12 of the first level."""
    return f"<{letter(level)}_{code}>"


def letter(level: int) -> str:
    """Return the letters of a level: a, b, ..., z, aa, ab, ..."""
    return (letter(level // 26 - 1) if level >= 26 else "") + chr(ord("a") + level % 26)
