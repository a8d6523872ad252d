"""A Python class to load and use the semantic IDs of a dataset."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from common.artifacts import DatasetFolder, load_codes, load_items
from common.cli import ROOT, check_name
from common.errors import ConfigError, DataError, nearest_id


class SemanticIDs:
    """The published semantic IDs of all items of a dataset.

    codes: int32 (num_items, num_levels), including the disambiguation level if there is one
    raw_ids, titles: object arrays (num_items,)
    codebook_sizes: the number of codes of each level
    """

    def __init__(self, codes: np.ndarray, raw_ids: np.ndarray, titles: np.ndarray, codebook_sizes: list[int]):
        self.codes, self.raw_ids, self.titles, self.codebook_sizes = codes, raw_ids, titles, codebook_sizes
        self._item_of = {raw_id: item for item, raw_id in enumerate(raw_ids)}

    @classmethod
    def load(cls, dataset: str, quantizer: str = "rqvae", suffix: str = "td", tag: str | None = None,
             data_root: str | Path | None = None) -> "SemanticIDs":
        """Load the semantic IDs that `quantization/main.py` has written.

        Raises ConfigError if a name is invalid or the dataset is unknown. Raises DataError if there are no such
        semantic IDs. Raises ArtifactError if their file is stale or damaged.
        """
        for where, name in (("dataset", dataset), ("quantizer", quantizer), ("suffix", suffix), ("tag", tag)):
            check_name(where, name)
        folder = DatasetFolder(Path(data_root or ROOT / "data"), dataset)
        folder.require()
        codes, meta = load_codes(folder, quantizer, suffix, tag, distinct=False)
        items = load_items(folder)
        return cls(codes, items["raw_id"], items["title"], meta["codebook_sizes"])

    def of(self, raw_id: str) -> tuple[int, ...]:
        """Return the semantic ID of the item `raw_id`.

        Raises ConfigError if `raw_id` is not a string. Raises DataError if there is no such item.
        """
        if not isinstance(raw_id, str):
            raise ConfigError("raw_id", f"must be a string, got {raw_id!r}",
                              "Raw ids are strings, even if they look like numbers", f"pass {str(raw_id)!r}")
        if raw_id not in self._item_of:
            why, close = nearest_id(raw_id, self._item_of)
            raise DataError("raw_id", f"unknown item {raw_id!r}", why,
                            f"pass {close!r}" if close else "pass an id from `raw_ids`")
        return tuple(self.codes[self._item_of[raw_id]].tolist())

    def items(self, prefix: Sequence[int] = ()) -> list[str]:
        """Return the raw ids of all items whose semantic ID begins with `prefix`, in item order.

        Raises ConfigError if the prefix is longer than the semantic IDs.
        """
        num_levels = self.codes.shape[1]
        if len(prefix) > num_levels:
            raise ConfigError("prefix", f"has {len(prefix)} codes", f"The semantic IDs have {num_levels} levels",
                              f"pass at most {num_levels} codes")
        matches = (self.codes[:, :len(prefix)] == np.asarray(prefix, dtype=np.int64)).all(axis=1)
        return self.raw_ids[matches].tolist()

    def __len__(self) -> int:
        return len(self.codes)
