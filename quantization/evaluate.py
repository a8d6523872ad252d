"""Metrics of semantic IDs: collisions, codebook utilization, reconstruction, similarity of items with equal codes."""

import math
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from common.artifacts import DatasetFolder, load_embeddings, load_interactions, load_meta
from common.table_files import SPLITS
from quantization.models.abstract_vq import AbstractVQ
from quantization.utils import checked_codes

# N items, L levels, K codebook size, D width, M pairs

# The embedding that measures the similarity of items. All tokenizers of a dataset use it, so that their metrics can be
# compared.
REFERENCE_SUFFIX = "td"
COLUMNS = 32  # number of embedding columns that are summed at once


class EvaluationData(NamedTuple):
    """Data for the metrics that need more than the codes. Each field may be None."""

    directions: np.ndarray | None  # reference embedding with rows scaled to length 1, float32 (N, D)
    pairs: np.ndarray | None       # pairs of consecutive items in the training events of a user, int64 (M, 2)

    @classmethod
    def load(cls, folder: DatasetFolder, suffix: str) -> "EvaluationData":
        """Load the reference embedding, and the item pairs of the training split.

        The reference embedding is `td`. If it does not exist, the embedding `suffix` is used. If a file does not exist,
        its field is None.
        """
        used, directions = _reference_suffix(folder, suffix), None
        if used is not None:
            vectors = load_embeddings(folder, used)
            lengths = np.sqrt(np.einsum("nd,nd->n", vectors, vectors))  # einsum makes no copy of a large array
            directions = np.divide(vectors, np.maximum(lengths, 1e-12)[:, None], out=vectors)
        return cls(directions, consecutive(folder) if folder.interactions.exists() else None)

    @staticmethod
    def inputs(folder: DatasetFolder, suffix: str) -> dict[str, str]:
        """Return the hashes of the files that `load` reads: file name -> sha256."""
        used = _reference_suffix(folder, suffix)
        paths = [] if used is None else [folder.embeddings(used)]
        paths += [folder.interactions] if folder.interactions.exists() else []
        return {path.name: load_meta(path, folder.make_command)["sha256"] for path in paths}


def _reference_suffix(folder: DatasetFolder, suffix: str) -> str | None:
    return next((s for s in (REFERENCE_SUFFIX, suffix) if folder.embeddings(s).exists()), None)


def consecutive(folder: DatasetFolder) -> np.ndarray:
    """Return the pairs of consecutive items in each user's training events: int64 (M, 2).

    Pairs of an item with itself are left out.
    """
    events = load_interactions(folder)
    train = events.split == SPLITS.index("train")
    user, item = events.user[train], events.item[train]
    pairs = np.column_stack([item[:-1], item[1:]])
    return pairs[(user[:-1] == user[1:]) & (pairs[:, 0] != pairs[:, 1])]


def evaluate(model: AbstractVQ, xs: Tensor, batch_size: int, reference: EvaluationData) -> tuple[dict, np.ndarray]:
    """Return the metrics of a model on all items, and the codes of all items (N, L).

    xs: the input of the model for all items, (N, D)
    """
    losses: dict[str, Tensor] = {}
    codes, errors = [], []
    for batch in xs.split(batch_size):
        codes.append(checked_codes(model, batch))
        outputs, target = model(batch), model.target(batch)
        for name, loss in model.compute_loss(outputs, batch).items():
            losses[name] = losses.get(name, 0.0) + loss.detach() * len(batch)
        if target.is_floating_point() and outputs[0].shape == target.shape:
            errors.append((outputs[0] - target).square().sum(dim=1))
    all_codes = torch.cat(codes).cpu().numpy()
    metrics: dict = {name: float(total) / len(xs) for name, total in losses.items()}
    if errors:
        metrics["reconstruction_error"] = float(torch.cat(errors).mean())
        variances, means = torch.var_mean(model.target(xs), dim=0, correction=0)
        # Because of rounding errors, even identical rows have a variance slightly above 0.
        variance, rounding = float(variances.sum()), 1e-12 * float(means.square().sum())
        metrics["explained_variance"] = 1 - metrics["reconstruction_error"] / variance if variance > rounding else None
    return metrics | code_metrics(all_codes, model.codebook_sizes) | similarity_metrics(all_codes, reference), all_codes


def code_metrics(codes: np.ndarray, codebook_sizes: list[int] | None) -> dict:
    """Return the metrics that can be computed from the codes (N, L) alone.

    If `codebook_sizes` is None, the size of each level is its largest code + 1.
    """
    sizes = codebook_sizes or [int(level.max()) + 1 for level in codes.T]
    counts = [np.bincount(level, minlength=size) for level, size in zip(codes.T, sizes, strict=True)]
    return {
        "collision_rate": collision_rate(codes),
        "largest_bucket": int(bucket_sizes(codes).max()),
        "utilization": [float((count > 0).mean()) for count in counts],
        "num_dead_codes": [int((count == 0).sum()) for count in counts],
        "perplexity": [perplexity(count) for count in counts],
        "gini": [gini(count) for count in counts],
    }


def similarity_metrics(codes: np.ndarray, reference: EvaluationData) -> dict:
    """Measure the prefix coherence and the behavioral coherence of codes (N, L), and return the metrics.

    Prefix coherence: the mean similarity of items with the same first codes, divided by the mean similarity of random
    pairs.
    Behavioral coherence: of the pairs of consecutive items, the share with the same first code, divided by the share
    expected by chance.

    If `reference` does not have the data for a metric, the metric is left out.
    """
    metrics: dict = {}
    if reference.directions is not None:
        metrics["random_pairs_similarity"] = group_similarity(np.zeros(len(codes), np.int64), reference.directions)
        metrics["prefix_similarity"] = prefix_similarity(codes, reference.directions)
        base = metrics["random_pairs_similarity"]
        # The ratio is meaningless if the mean of random pairs is near or below 0, as it is for centered embeddings.
        metrics["prefix_coherence"] = [mean / base if mean is not None and base and base > 0.01 else None
                                       for mean in metrics["prefix_similarity"]]
    if reference.pairs is not None and len(reference.pairs):
        same, chance = same_first_code(codes[:, 0], reference.pairs)
        metrics |= {"same_first_code": same, "same_first_code_by_chance": chance,
                    "behavioral_coherence": same / chance if chance else None}
    return metrics


def collision_rate(codes: np.ndarray) -> float:
    """Return the collision rate of codes (N, L): 1 - (number of distinct IDs) / (number of items)."""
    return 1.0 - len(bucket_sizes(codes)) / len(codes)


def bucket_sizes(codes: np.ndarray) -> np.ndarray:
    """Return the number of items of each distinct ID in codes (N, L)."""
    return np.unique(codes, axis=0, return_counts=True)[1]


def perplexity(counts: np.ndarray) -> float:
    """Return the perplexity of a level: the effective number of codes in use, exp(entropy).

    counts: number of items with each code of the level, (K,)
    """
    share = counts[counts > 0] / counts.sum()
    return math.exp(-float(np.sum(share * np.log(share))))


def gini(counts: np.ndarray) -> float:
    """Return the Gini coefficient of a level: 0 if all codes have equally many items, near 1 if one code has all.

    counts: number of items with each code of the level, (K,)
    """
    ordered, size = np.sort(counts), len(counts)
    return float(np.sum((2 * np.arange(1, size + 1) - size - 1) * ordered) / (size * ordered.sum()))


def prefix_similarity(codes: np.ndarray, directions: np.ndarray) -> list[float | None]:
    """For each prefix length 1, 2, ..., L, return the mean cosine over all pairs of items with the same prefix.

    codes: (N, L)
    directions: embeddings with rows of length 1, (N, D)

    If no two items have the same prefix, the value is None.
    """
    prefix, means = np.zeros(len(codes), dtype=np.int64), []
    for level in codes.T:
        prefix = np.unique(np.column_stack([prefix, level]), axis=0, return_inverse=True)[1].reshape(-1)
        means.append(group_similarity(prefix, directions))
    return means


def group_similarity(group: np.ndarray, directions: np.ndarray) -> float | None:
    """Return the mean cosine over all pairs of items in the same group, or None if no group has two items.

    group: the group of each item, (N,)
    directions: embeddings with rows of length 1 (or 0), (N, D)
    """
    # In a group of n unit vectors, the cosines of all pairs sum to (|sum of vectors|^2 - n) / 2.
    counts = np.bincount(group)
    grouped = np.flatnonzero(counts[group] > 1)
    grouped = grouped[np.argsort(group[grouped], kind="stable")]
    counts = counts[counts > 1].astype(np.float64)
    if not len(counts):
        return None
    starts = (np.cumsum(counts) - counts).astype(np.int64)
    squares = sum(float((np.add.reduceat(block.astype(np.float64), starts) ** 2).sum())
                  for block in (directions[grouped, column:column + COLUMNS]
                                for column in range(0, directions.shape[1], COLUMNS)))
    # The sum of the squared lengths is the number of unit vectors; zero vectors add nothing.
    lengths = float(np.einsum("nd,nd->n", directions, directions)[grouped].sum(dtype=np.float64))
    return (squares - lengths) / float((counts * (counts - 1)).sum())


def same_first_code(first: np.ndarray, pairs: np.ndarray) -> tuple[float, float]:
    """Return the share of pairs in which both items have the same first code, and the share expected by chance.

    first: first code of each item, (N,)
    pairs: item indices, (M, 2)

    "By chance" means that the items of a pair are drawn independently, one from each column of `pairs`.
    """
    one, two = first[pairs[:, 0]], first[pairs[:, 1]]
    size = int(first.max()) + 1
    chance = np.bincount(one, minlength=size) @ np.bincount(two, minlength=size) / len(pairs) ** 2
    return float((one == two).mean()), float(chance)
