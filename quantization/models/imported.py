"""Someone else's semantic IDs, read from a file: compared by the same report, used by the same recommenders."""

import csv
import json
import re
from pathlib import Path

import numpy as np
import torch

from common.artifacts import load_items
from common.errors import ConfigError, DataError

from .table import TableVQ

# N items, L levels

TOKEN = re.compile(r"<[a-z]+_(\d{1,9})>|(\d{1,9})")


class IMPORTED(TableVQ):
    """Codes by raw item id: an `index.json` as LC-Rec, LETTER and MiniOneRec publish it, or a CSV."""

    def __init__(self, config: dict, input_size: int):
        super().__init__(config)
        path, sizes = _file(config), config["imported"]["model_params"]["codebook_sizes"]
        raw_ids = load_items(config["data"]["folder"])["raw_id"]
        codes = table(path, read_codes(path), raw_ids)
        max_size = codes.max(axis=0).tolist()
        if sizes == "auto":
            sizes = [size + 1 for size in max_size]
        elif not isinstance(sizes, list) or len(sizes) != len(max_size) or any(type(size) is not int for size in sizes):
            raise ConfigError("imported.model_params.codebook_sizes", f"is {sizes!r}", f"{path} has {len(max_size)} "
                              "levels", "--codebook_sizes auto, or a list with a number for each")
        elif any(size <= code for size, code in zip(sizes, max_size, strict=True)):
            raise ConfigError("imported.model_params.codebook_sizes", f"is {sizes}",
                              f"{path} has codes up to {max_size}", "--codebook_sizes auto")
        self.sizes = sizes
        self.register_buffer("codes", torch.from_numpy(codes))

    @classmethod
    def other_files(cls, config: dict) -> list[Path]:
        return [_file(config)]

    @property
    def codebook_sizes(self) -> list[int]:
        return self.sizes


def read_codes(path: Path) -> dict[str, list[int]]:
    """`raw id -> codes` of a .json or .csv file. Raises DataError that names the file and the entry or line."""
    entries = _read_json(path) if path.suffix == ".json" else _read_csv(path)
    codes, width = {}, None
    for where, raw_id, words in entries:
        tokens = [TOKEN.fullmatch(str(word).strip()) for word in words]
        numbers = [int(token[1] or token[2]) for token in tokens if token]
        if not numbers or len(numbers) < len(words):
            raise DataError(where, f"{words!r} is no semantic ID", "wanted tokens like <a_12> or whole numbers",
                            "correct the entry")
        width = width or len(numbers)
        if len(numbers) != width:
            raise DataError(where, f"has {len(numbers)} codes", f"the entries before it have {width}",
                            "give all items equally many")
        if raw_id in codes:
            raise DataError(where, f"item {raw_id!r} stands twice", fix="remove one of the two")
        codes[raw_id] = numbers
    if not codes:
        raise DataError(path, "has no entries", fix="name a file with semantic IDs")
    return codes


def table(path: Path, codes: dict[str, list[int]], raw_ids: np.ndarray) -> np.ndarray:
    """int64 (N, L) in the order of the raw ids (N,); entries for other items are passed over."""
    missing = [raw_id for raw_id in raw_ids if raw_id not in codes]
    if missing:
        raise DataError(path, f"has no semantic ID for {len(missing)} of {len(raw_ids)} items",
                        f"the first ones are {', '.join(map(repr, missing[:3]))}; the file begins with "
                        f"{next(iter(codes))!r}", "a file whose keys are the raw ids of items.parquet")
    return np.array([codes[raw_id] for raw_id in raw_ids], dtype=np.int64)


def _file(config: dict) -> Path:
    name = config["imported"]["model_params"]["file"]
    if not isinstance(name, str) or not name:
        raise ConfigError("imported.model_params.file", f"is {name!r}", "it names the semantic IDs to import",
                          "--file index.json")
    path = Path(name).expanduser()
    if path.suffix not in (".json", ".csv"):
        raise ConfigError("imported.model_params.file", f"{name} is neither .json nor .csv", fix="--file index.json")
    if not path.is_file():
        raise ConfigError("imported.model_params.file", f"{name} is not there", fix="--file <an existing file>")
    return path


def _read_json(path: Path):
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DataError(path, "is not JSON", str(error), "name an index.json") from error
    if not isinstance(entries, dict):
        raise DataError(path, "is not a JSON object", 'wanted {"<raw id>": ["<a_12>", "<b_3>", ...], ...}',
                        "name an index.json")
    for raw_id, words in entries.items():
        yield f"{path}: {raw_id!r}", raw_id, words if isinstance(words, list) else [words]


def _read_csv(path: Path):
    """First column the raw id, then a column a level; a first line that holds no codes is the heading."""
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            rows = list(csv.reader(file))
    except (ValueError, csv.Error) as error:
        raise DataError(path, "is not a CSV", str(error), "save it as UTF-8, separated by commas") from error
    for number, row in enumerate(rows, start=1):
        heading = number == 1 and not any(TOKEN.fullmatch(word.strip()) for word in row[1:])
        if row and not heading:
            yield f"{path}:{number}", row[0], row[1:]
