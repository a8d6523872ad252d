"""The inputs of a recommender: the semantic IDs that a command chooses, the catalogue, and the neighbours of items."""

import logging
import shlex
from collections.abc import Iterable
from functools import lru_cache
from operator import eq
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from common.artifacts import (
    DatasetFolder,
    load_codes,
    load_embeddings,
    load_items,
    load_items_meta,
    load_mask,
    load_meta,
    variant,
)
from common.cli import ROOT, check_name
from common.config import Config
from common.errors import ArtifactError, ConfigError, nearest, one_line
from recommendation.models import find_class, uses_neighbours
from recommendation.models.abstract_model import Catalogue, ItemNeighbours

log = logging.getLogger(__name__)

AUTO, TFIDF = "auto", "tfidf"  # the sources of neighbours that are not the suffix of an embedding
NO_CODES = "no-codes"  # name of the variant if the model does not use semantic IDs
# The flags that select the semantic IDs, and their defaults.
FLAGS = {"quantizer_name": "rqvae", "embedding_suffix": "td", "tag": None}


class Choice(NamedTuple):
    """The name of a recommender, and the names that select its semantic IDs."""

    model: str
    quantizer: str = "rqvae"
    suffix: str = "td"
    tag: str | None = None

    @property
    def needs_codes(self) -> bool:
        return find_class(self.model).needs_codes

    def runs(self, run_root: Path, dataset: str) -> Path:
        """Return the folder of all runs of this recommender on a dataset."""
        variant_name = variant(self.quantizer, self.suffix, self.tag) if self.needs_codes else NO_CODES
        return run_root / "recommendation" / dataset / self.model / variant_name

    def training_command(self, folder: DatasetFolder, run_root: Path, script: str = "main.py") -> str:
        """Return the command that trains this recommender on the dataset, or runs another script with it."""
        flags = [f"--{name} {value}" for (name, default), value in zip(FLAGS.items(), self[1:], strict=True)
                 if value != default and self.needs_codes]
        root = [] if run_root.resolve() == ROOT / "runs" else [f"--run_root {shlex.quote(str(run_root))}"]
        words = [f"python recommendation/{script}", f"--model={self.model}", f"--category={folder.name}"]
        return " ".join([*words, *flags, *root]) + folder.root_flag

    def flags_of(self, name: str) -> str:
        """Return the flags that a user must change to select the semantic IDs `name`, for example `rqvae-td-small`."""
        words = name.split("-")
        splits = [[words[:i], words[i:j], words[j:]]
                  for i in range(1, len(words)) for j in range(i + 1, len(words) + 1)]
        others = [tuple("-".join(part) or None for part in split) for split in splits]
        # The parts of the name may contain dashes. Try all splits into three parts. Take the split that has the most
        # parts in common with this choice.
        other = max(others, key=lambda values: sum(map(eq, values, self[1:])))
        return " ".join(f"--{flag} {value}" if value else f"without --{flag}"
                        for flag, value, own in zip(FLAGS, other, self[1:], strict=True) if value != own)


class Source(NamedTuple):
    """The catalogue of a dataset, and the checksums of its files."""

    catalogue: Catalogue
    inputs: dict[str, str]        # file name -> sha256
    collisions: dict[str, float]  # collision rates before and after disambiguation; empty without semantic IDs


def neighbour_sources(config: Config, folder: DatasetFolder) -> list[str]:
    """Return from what neighbours are computed: `tfidf` (the texts of the items), and suffixes of embeddings.

    The result is empty if neither the model nor its prior nor its teacher uses neighbours. If there are several sources
    (with `auto`), the search of the settings chooses one.
    """
    if not uses_neighbours(config):
        return []
    value, path = str(config.training_params["neighbours_from"]), f"{config.name}.training_params.neighbours_from"
    where = config.origins.get(path, path)
    check_name(where, value)
    if value == AUTO:
        return [TFIDF, *_usable_embedding(folder)]
    if value not in (known := [TFIDF, *folder.suffixes()]):
        raise ConfigError(where, f"the dataset has no embedding {value!r}", nearest(value, [AUTO, *known]),
                          f"use another value, or make the embedding: {folder.embedding_command(value)}")
    return [value]


def _usable_embedding(folder: DatasetFolder) -> list[str]:
    """Return the suffix of the default embedding if the dataset has it and it is current, otherwise no suffix."""
    suffix = FLAGS["embedding_suffix"]
    if suffix not in folder.suffixes():
        return []
    try:
        load_meta(folder.embeddings(suffix), folder.make_command)
    except ArtifactError as error:
        log.warning("recommendation: items are compared by their texts only: %s", error)
        return []
    return [suffix]


def load_source(folder: DatasetFolder, choice: Choice, sources: Iterable[str] = ()) -> Source:
    """Load the catalogue for a recommender, without the neighbours of the items.

    sources: the sources of neighbours, for the checksums

    Raises DataError if the interactions, items or semantic IDs are missing. Raises ArtifactError if they are stale.
    """
    inputs = {folder.interactions.name: load_meta(folder.interactions, folder.make_command)["sha256"]}
    inputs |= content_inputs(folder, [(folder.items if source == TFIDF else folder.embeddings(source)).name
                                      for source in sources])
    if not choice.needs_codes:
        num_items = load_items_meta(folder)["num_items"]
        return Source(Catalogue(num_items, None, []), inputs, {})
    codes, meta = load_codes(folder, *choice[1:])
    path = folder.codes(*choice[1:])
    inputs[path.name] = meta["sha256"]
    if collapse := meta.get("collapse"):
        num_distinct = round((1 - meta["collision_rate_before"]) * len(codes))
        log.warning("recommendation: WARNING: %s: %d items have only %d distinct IDs before disambiguation: %s. "
                    "The command that made this file: %s", path.name, len(codes), num_distinct, one_line(collapse),
                    one_line(meta["command"] or ""))
    group_of = None
    if (level := meta.get("disambiguation_level")) is not None and meta["collision_rate_before"]:
        group_of = np.unique(np.delete(codes, level, axis=1), axis=0, return_inverse=True)[1].reshape(-1)
    catalogue = Catalogue(len(codes), torch.from_numpy(codes).long(), meta["codebook_sizes"], group_of=group_of)
    return Source(catalogue, inputs,
                  {key: meta[key] for key in ("collision_rate_before", "collision_rate_after")})


def load_neighbours(folder: DatasetFolder, source: str) -> ItemNeighbours:
    """Find the items with the most similar content, by their texts (`tfidf`) or by the embedding with this suffix.

    The last results are kept, because the models of one command need the same neighbours.

    Raises DataError if the items are missing. Raises ArtifactError if the items or the embedding are stale.
    """
    path = folder.items if source == TFIDF else folder.embeddings(source)
    return _compute_neighbours(folder, source, content_inputs(folder, [path.name]).get(path.name))


@lru_cache(maxsize=2)
def _compute_neighbours(folder: DatasetFolder, source: str, sha256: str | None) -> ItemNeighbours:
    """sha256: of the source's file, so that another content is not taken from the cache"""
    from recommendation.counting.neighbours import neighbours_of_texts, neighbours_of_vectors  # imports scipy

    if source == TFIDF:
        found = neighbours_of_texts([text or "" for text in load_items(folder)["text"]])
    else:
        found = neighbours_of_vectors(load_embeddings(folder, source), load_mask(folder, source))
    return ItemNeighbours(*map(torch.from_numpy, found))


def content_inputs(folder: DatasetFolder, names: Iterable[str]) -> dict[str, str]:
    """Return the sha256 of the files in `names` from which neighbours are computed: file name -> sha256.

    names: names of input files of a run; the files that do not describe the content of items are ignored
    """
    commands = {folder.items: folder.make_command,
                **{folder.embeddings(suffix): folder.embedding_command(suffix) for suffix in folder.suffixes()}}
    return {path.name: load_meta(path, command)["sha256"] for path, command in commands.items() if path.name in names}
