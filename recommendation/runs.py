"""What a recommender recommends from, and where its runs lie: both depend on which semantic IDs it reads, if any."""

import logging
import shlex
from operator import eq
from pathlib import Path
from typing import NamedTuple

import torch

from common.artifacts import DatasetFolder, load_codes, load_meta, variant
from common.cli import ROOT
from recommendation.models import find_class
from recommendation.models.abstract_model import Catalogue

log = logging.getLogger(__name__)

NO_CODES = "no-codes"  # the variant's name where a model reads no semantic IDs
FLAGS = {"quantizer_name": "rqvae", "embedding_suffix": "td", "tag": None}  # which semantic IDs, and the defaults


class Choice(NamedTuple):
    """A recommender, and whose semantic IDs it reads."""

    model: str
    quantizer: str = "rqvae"
    suffix: str = "td"
    tag: str | None = None

    @property
    def needs_codes(self) -> bool:
        return find_class(self.model).needs_codes

    def runs(self, run_root: Path, dataset: str) -> Path:
        """The folder of its runs on a data set."""
        of_codes = variant(self.quantizer, self.suffix, self.tag) if self.needs_codes else NO_CODES
        return run_root / "recommendation" / dataset / self.model / of_codes

    def training_command(self, folder: DatasetFolder, run_root: Path) -> str:
        """The command that trains it, with the flags that are not at their default."""
        flags = [f"--{name} {value}" for (name, default), value in zip(FLAGS.items(), self[1:], strict=True)
                 if value != default and self.needs_codes]
        root = [] if run_root.resolve() == ROOT / "runs" else [f"--run_root {shlex.quote(str(run_root))}"]
        return " ".join(["python recommendation/main.py", f"--model={self.model}", f"--category={folder.name}", *flags,
                         *root]) + folder.root_flag

    def flags_of(self, name: str) -> str:
        """The flags that name the semantic IDs of the variant `name` (`rqvae-td-small`) in place of these."""
        words = name.split("-")
        parts = [[words[:i], words[i:j], words[j:]] for i in range(1, len(words)) for j in range(i + 1, len(words) + 1)]
        others = [tuple("-".join(part) or None for part in of_one) for of_one in parts]
        other = max(others, key=lambda values: sum(map(eq, values, self[1:])))  # names may contain the dash
        return " ".join(f"--{flag} {value}" if value else f"without --{flag}"
                        for flag, value, own in zip(FLAGS, other, self[1:], strict=True) if value != own)


class Source(NamedTuple):
    """The catalogue as the artifacts have it."""

    catalogue: Catalogue
    inputs: dict[str, str]        # file name -> sha256
    collisions: dict[str, float]  # rates before and after disambiguation; empty without semantic IDs


def load_source(folder: DatasetFolder, choice: Choice) -> Source:
    """Raises DataError or ArtifactError where interactions, items or semantic IDs are missing or stale."""
    inputs = {folder.interactions.name: load_meta(folder.interactions, folder.make_command)["sha256"]}
    if not choice.needs_codes:
        num_items = load_meta(folder.items, folder.make_command)["num_items"]
        return Source(Catalogue(num_items, None, []), inputs, {})
    codes, meta = load_codes(folder, *choice[1:])
    path = folder.codes(*choice[1:])
    inputs[path.name] = meta["sha256"]
    if meta.get("collapse"):
        num_distinct = round((1 - meta["collision_rate_before"]) * len(codes))
        log.warning("recommendation: WARNING: %s: %d items have only %d distinct IDs before disambiguation: %s. "
                    "They were made by: %s", path.name, len(codes), num_distinct, meta["collapse"], meta["command"])
    return Source(Catalogue(len(codes), torch.from_numpy(codes).long(), meta["codebook_sizes"]), inputs,
                  {key: meta[key] for key in ("collision_rate_before", "collision_rate_after")})
