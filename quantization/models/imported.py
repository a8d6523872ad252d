"""A quantizer that reads the semantic IDs from a file, for example from a file of another project."""

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
    """Reads the codes of each raw item id from a file.

    The file is an `index.json` in the format of LC-Rec, LETTER and MiniOneRec, or a CSV file.
    """

    def __init__(self, config: dict, input_size: int):
        super().__init__(config)
        path, sizes = _file(config), config["imported"]["model_params"]["codebook_sizes"]
        raw_ids = load_items(config["data"]["folder"])["raw_id"]
        codes = table(path, read_codes(path), raw_ids)
        max_codes = codes.max(axis=0).tolist()
        if sizes == "auto":
            sizes = [code + 1 for code in max_codes]
        elif not isinstance(sizes, list) or len(sizes) != len(max_codes) or any(type(s) is not int for s in sizes):
            raise ConfigError("imported.model_params.codebook_sizes", f"must be auto or a list of {len(max_codes)} "
                              f"integers, got {sizes!r}", f"{path} has {len(max_codes)} levels",
                              "use --codebook_sizes auto, or a list with one integer per level")
        elif any(size <= code for size, code in zip(sizes, max_codes, strict=True)):
            raise ConfigError("imported.model_params.codebook_sizes", "each size must be greater than the largest "
                              f"code of the level, got {sizes}", f"The largest codes in {path} are {max_codes}",
                              "use --codebook_sizes auto")
        self.sizes = sizes
        self.register_buffer("codes", torch.from_numpy(codes))

    @classmethod
    def other_files(cls, config: dict) -> list[Path]:
        return [_file(config)]

    @property
    def codebook_sizes(self) -> list[int]:
        return self.sizes


def read_codes(path: Path) -> dict[str, list[int]]:
    """Read semantic IDs from a .json or .csv file, and return a dict that maps each raw id to its codes.

    Raises DataError if the file is invalid. The error message names the invalid entry or line.
    """
    entries = _read_json(path) if path.suffix == ".json" else _read_csv(path)
    codes, width = {}, None
    for where, raw_id, words in entries:
        tokens = [TOKEN.fullmatch(str(word).strip()) for word in words]
        numbers = [int(token[1] or token[2]) for token in tokens if token]
        if not numbers or len(numbers) < len(words):
            raise DataError(where, f"{words!r} is not a semantic ID", "Expected tokens such as <a_12>, or integers",
                            "correct the entry")
        width = width or len(numbers)
        if len(numbers) != width:
            raise DataError(where, f"has {len(numbers)} codes", f"All earlier entries have {width} codes",
                            "give all items the same number of codes")
        if raw_id in codes:
            raise DataError(where, f"duplicate item {raw_id!r}", fix="remove one of the two entries")
        codes[raw_id] = numbers
    if not codes:
        raise DataError(path, "has no entries", fix="use a file that contains semantic IDs")
    return codes


def table(path: Path, codes: dict[str, list[int]], raw_ids: np.ndarray) -> np.ndarray:
    """Return the codes of the items in `raw_ids` as an array, in the same order: int64 (N, L).

    path: the file that the codes come from, for the error message
    codes: a dict that maps each raw id to its codes; raw ids that are not in `raw_ids` are ignored
    raw_ids: (N,)

    Raises DataError if an item has no codes.
    """
    missing = [raw_id for raw_id in raw_ids if raw_id not in codes]
    if missing:
        raise DataError(path, f"has no semantic ID for {len(missing)} of {len(raw_ids)} items",
                        f"The first missing items are {', '.join(map(repr, missing[:3]))}, but the first id in the "
                        f"file is {next(iter(codes))!r}", "use a file whose keys are the raw ids of items.parquet")
    return np.array([codes[raw_id] for raw_id in raw_ids], dtype=np.int64)


def _file(config: dict) -> Path:
    name = config["imported"]["model_params"]["file"]
    if not isinstance(name, str) or not name:
        raise ConfigError("imported.model_params.file", f"must be the path of a .json or .csv file, got {name!r}",
                          fix="use --file <file with semantic IDs>, such as --file index.json")
    path = Path(name).expanduser()
    if path.suffix not in (".json", ".csv"):
        raise ConfigError("imported.model_params.file", f"{name} is not a .json or .csv file",
                          fix="use a .json or .csv file, such as --file index.json")
    if not path.is_file():
        raise ConfigError("imported.model_params.file", f"file {name} not found",
                          fix="use --file <path of an existing file>")
    return path


def _read_json(path: Path):
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DataError(path, "is not valid JSON", str(error), "use a valid index.json") from error
    if not isinstance(entries, dict):
        raise DataError(path, "is not a JSON object", 'Expected {"<raw id>": ["<a_12>", "<b_3>", ...], ...}',
                        "use a valid index.json")
    for raw_id, words in entries.items():
        yield f"{path}: {raw_id!r}", raw_id, words if isinstance(words, list) else [words]


def _read_csv(path: Path):
    """For each line of a CSV file, yield the line's location (for error messages), raw id and codes (as strings).

    The first column contains the raw ids, and each other column contains the codes of one level. If the first line has
    no codes, it is a header and is skipped.
    """
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            rows = list(csv.reader(file))
    except (ValueError, csv.Error) as error:
        raise DataError(path, "is not a valid CSV file", str(error),
                        "save it in UTF-8, with commas between the columns") from error
    for number, row in enumerate(rows, start=1):
        is_header = number == 1 and not any(TOKEN.fullmatch(word.strip()) for word in row[1:])
        if row and not is_header:
            yield f"{path}:{number}", row[0], row[1:]
