"""A quantizer that reads the semantic IDs from a file, for example from a file of another project."""

import logging
from pathlib import Path

import numpy as np
import torch

from common.artifacts import load_items
from common.errors import ConfigError, DataError
from quantization.id_files import read_codes

from .table import TableVQ

log = logging.getLogger(__name__)

# N items, L levels

# The maximum size of a level is the larger of two numbers: MAX_SIZE, and MAX_SIZE_PER_ITEM times the number of items.
# All codes of a level need memory, here and in recommenders, even if most of them are not used.
MAX_SIZE, MAX_SIZE_PER_ITEM = 65_536, 10


class IMPORTED(TableVQ):
    """A quantizer that reads the codes of each raw item id from a file.

    The file is an `index.json` in the format of LC-Rec, LETTER and MiniOneRec, or a CSV file.
    """

    def __init__(self, config: dict, input_size: int):
        super().__init__(config)
        path, sizes = _file(config), config["imported"]["model_params"]["codebook_sizes"]
        raw_ids = load_items(config["data"]["folder"])["raw_id"]
        codes = without_offsets(path, table(path, read_codes(path), raw_ids))
        _check_codes(path, codes, raw_ids)
        self.sizes = _sizes(path, sizes, codes)
        self.register_buffer("codes", torch.from_numpy(codes))

    @classmethod
    def other_files(cls, config: dict) -> list[Path]:
        return [_file(config)]

    @property
    def codebook_sizes(self) -> list[int]:
        return self.sizes


def table(path: Path, codes: dict[str, list[int]], raw_ids: np.ndarray) -> np.ndarray:
    """Return the codes of the items in `raw_ids` as an array, in the same order: int64 (N, L).

    path: the file that the codes come from, for messages
    codes: a dict that maps each raw id to its codes; raw ids that are not in `raw_ids` are ignored with a warning
    raw_ids: (N,)

    Raises DataError if an item has no codes.
    """
    missing = [raw_id for raw_id in raw_ids if raw_id not in codes]
    if missing:
        raise DataError(path, f"has no semantic ID for {len(missing)} of {len(raw_ids)} items",
                        f"The first missing items are {', '.join(map(repr, missing[:3]))}, but the first id in the "
                        f"file is {next(iter(codes))!r}", "use a file whose keys are the raw ids of items.parquet")
    if len(codes) > len(raw_ids):
        known = set(raw_ids)
        unused = next(raw_id for raw_id in codes if raw_id not in known)
        log.warning("quantization: %s: %d of %d entries belong to no item of the dataset, for example %r%s", path,
                    len(codes) - len(raw_ids), len(codes), unused, "; if the ids in the file are numbers that another "
                    "program gave to the items, they may be shifted, so that items get the codes of their neighbors"
                    if unused.isdecimal() else "")
    return np.array([codes[raw_id] for raw_id in raw_ids], dtype=np.int64)


def without_offsets(path: Path, codes: np.ndarray) -> np.ndarray:
    """Return codes (N, L) that begin at 0 in each level, if the levels of a file use consecutive ranges of codes.

    Files for a language model often number the codes of all levels together, such as 0 to 255 for the first level and
    256 to 511 for the second one. In files without offsets, the ranges usually overlap. They can fail to overlap by
    chance if most levels have a single code. Therefore, the offsets are only subtracted if at least two levels have
    several codes. Otherwise, the codes are returned unchanged.
    """
    low, high = codes.min(axis=0), codes.max(axis=0)  # (L,)
    if not (high[:-1] < low[1:]).all() or (low < high).sum() < 2:
        return codes
    log.warning("quantization: %s: the codes of the levels begin at %s, and the ranges of the levels do not overlap; "
                "these offsets are subtracted, so that the codes of each level begin at 0", path,
                ", ".join(map(str, low)))
    return codes - low


def _check_codes(path: Path, codes: np.ndarray, raw_ids: np.ndarray) -> None:
    """Raise DataError if a code is too large."""
    item, level = np.unravel_index(codes.argmax(), codes.shape)
    if codes[item, level] >= _max_size(len(codes)):
        raise DataError(f"{path}: {raw_ids[item]!r}", f"has the code {codes[item, level]} in level {level + 1}",
                        f"The codes must be less than {_max_size(len(codes))} for a dataset of {len(codes)} items",
                        "correct the entry, or subtract the smallest code of this level from all codes of the level")


def _sizes(path: Path, sizes: object, codes: np.ndarray) -> list[int]:
    """Return the size of each level. Raises ConfigError if the option `codebook_sizes` does not suit the codes."""
    where, max_codes = "imported.model_params.codebook_sizes", codes.max(axis=0).tolist()
    if sizes == "auto":
        return [code + 1 for code in max_codes]
    if not isinstance(sizes, list) or len(sizes) != len(max_codes) or any(type(s) is not int for s in sizes):
        raise ConfigError(where, f"must be auto or a list of {len(max_codes)} integers, got {sizes!r}",
                          f"{path} has {len(max_codes)} levels",
                          "use --codebook_sizes auto, or a list with one integer per level")
    if any(size <= code for size, code in zip(sizes, max_codes, strict=True)):
        raise ConfigError(where, f"each size must be greater than the largest code of the level, got {sizes}",
                          f"The largest codes in {path} are {max_codes}", "use --codebook_sizes auto")
    if max(sizes) > _max_size(len(codes)):
        raise ConfigError(where, f"each size must be at most {_max_size(len(codes))} for a dataset of {len(codes)} "
                          f"items, got {sizes}", f"The largest codes in {path} are {max_codes}",
                          "use --codebook_sizes auto")
    return sizes


def _max_size(num_items: int) -> int:
    return max(MAX_SIZE, MAX_SIZE_PER_ITEM * num_items)


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
        raise ConfigError("imported.model_params.file", f"file {name} " + (
            "is not a regular file" if path.exists() else "not found"), fix="use --file <path of an existing file>")
    return path
