"""How good semantic IDs are: collisions, use of the codebooks, reconstruction, and what the codes say of items."""

import math
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from common.artifacts import SPLITS, DatasetFolder, load_embeddings, load_interactions, load_meta
from quantization.models.abstract_vq import AbstractVQ
from quantization.utils import checked_codes

# N items, L levels, K codebook size, D width, M pairs

REFERENCE_SUFFIX = "td"  # all tokenizers of a data set are judged by the same embedding, where it is there
COLUMNS = 32           # of the embedding that are summed at once


class EvaluationData(NamedTuple):
    """What codes are judged by beside themselves; each part may be absent."""

    directions: np.ndarray | None  # float32 (N, D) item texts' embeddings, scaled to length 1
    pairs: np.ndarray | None       # int64 (M, 2) items that follow each other in a user's training events

    @classmethod
    def load(cls, folder: DatasetFolder, suffix: str) -> "EvaluationData":
        """By `td`, else by the embedding `suffix`; and by the training split alone."""
        named, directions = _reference_suffix(folder, suffix), None
        if named is not None:
            vectors = load_embeddings(folder, named)
            lengths = np.sqrt(np.einsum("nd,nd->n", vectors, vectors))  # no copy of what may be large
            directions = np.divide(vectors, np.maximum(lengths, 1e-12)[:, None], out=vectors)
        return cls(directions, consecutive(folder) if folder.interactions.exists() else None)

    @staticmethod
    def inputs(folder: DatasetFolder, suffix: str) -> dict[str, str]:
        """The files that `load` reads, and the hashes of their content."""
        named = _reference_suffix(folder, suffix)
        paths = [] if named is None else [folder.embeddings(named)]
        paths += [folder.interactions] if folder.interactions.exists() else []
        return {path.name: load_meta(path, folder.make_command)["sha256"] for path in paths}


def _reference_suffix(folder: DatasetFolder, suffix: str) -> str | None:
    return next((s for s in (REFERENCE_SUFFIX, suffix) if folder.embeddings(s).exists()), None)


def consecutive(folder: DatasetFolder) -> np.ndarray:
    """int64 (M, 2): neighbours in the users' training events; an item that follows itself says nothing of codes."""
    events = load_interactions(folder)
    train = events.split == SPLITS.index("train")
    user, item = events.user[train], events.item[train]
    pairs = np.column_stack([item[:-1], item[1:]])
    return pairs[(user[:-1] == user[1:]) & (pairs[:, 0] != pairs[:, 1])]


def evaluate(model: AbstractVQ, xs: Tensor, batch_size: int, reference: EvaluationData) -> tuple[dict, np.ndarray]:
    """The figures of a model over all items (N, D), and the codes (N, L) that it gives them."""
    losses: dict[str, Tensor] = {}
    codes, errors = [], []
    for batch in xs.split(batch_size):
        codes.append(checked_codes(model, batch))
        outputs, target = model(batch), model.target(batch)
        for name, loss in model.compute_loss(outputs, batch).items():
            losses[name] = losses.get(name, 0.0) + loss.detach() * len(batch)
        if target.is_floating_point() and outputs[0].shape == target.shape:
            errors.append((outputs[0] - target).square().sum(dim=1))
    table = torch.cat(codes).cpu().numpy()
    metrics: dict = {name: float(total) / len(xs) for name, total in losses.items()}
    if errors:
        metrics["reconstruction_error"] = float(torch.cat(errors).mean())
        variances, means = torch.var_mean(model.target(xs), dim=0, correction=0)
        variance, rounding = float(variances.sum()), 1e-12 * float(means.square().sum())  # equal rows have some, too
        metrics["explained_variance"] = 1 - metrics["reconstruction_error"] / variance if variance > rounding else None
    return metrics | code_metrics(table, model.codebook_sizes) | similarity_metrics(table, reference), table


def code_metrics(codes: np.ndarray, codebook_sizes: list[int] | None) -> dict:
    """Figures of codes (N, L) alone. Sizes that a model does not state are read off the codes."""
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
    """How alike items are that share codes (N, L), and how often users go on to an item of the same first code."""
    metrics: dict = {}
    if reference.directions is not None:
        metrics["random_pairs_similarity"] = group_similarity(np.zeros(len(codes), np.int64), reference.directions)
        metrics["prefix_similarity"] = prefix_similarity(codes, reference.directions)
        base = metrics["random_pairs_similarity"]
        # Over a mean near 0 or below it, as centred embeddings have it, a ratio would say nothing.
        metrics["prefix_coherence"] = [mean / base if mean is not None and base and base > 0.01 else None
                                       for mean in metrics["prefix_similarity"]]
    if reference.pairs is not None and len(reference.pairs):
        same, chance = same_first_code(codes[:, 0], reference.pairs)
        metrics |= {"same_first_code": same, "same_first_code_by_chance": chance,
                    "behavioural_coherence": same / chance if chance else None}
    return metrics


def collision_rate(codes: np.ndarray) -> float:
    """1 - distinct IDs / items."""
    return 1.0 - len(bucket_sizes(codes)) / len(codes)


def bucket_sizes(codes: np.ndarray) -> np.ndarray:
    """How many items each distinct ID stands for."""
    return np.unique(codes, axis=0, return_counts=True)[1]


def perplexity(counts: np.ndarray) -> float:
    """exp of the entropy of a level's counts (K,): the number of codes in use, were they used alike."""
    share = counts[counts > 0] / counts.sum()
    return math.exp(-float(np.sum(share * np.log(share))))


def gini(counts: np.ndarray) -> float:
    """Gini coefficient of a level's counts (K,): 0 where all codes are used alike, near 1 where one has all items."""
    ordered, size = np.sort(counts), len(counts)
    return float(np.sum((2 * np.arange(1, size + 1) - size - 1) * ordered) / (size * ordered.sum()))


def prefix_similarity(codes: np.ndarray, directions: np.ndarray) -> list[float | None]:
    """Mean cosine of all pairs of items that share their first 1, 2, ... codes; None where no two do."""
    prefix, means = np.zeros(len(codes), dtype=np.int64), []
    for level in codes.T:
        prefix = np.unique(np.column_stack([prefix, level]), axis=0, return_inverse=True)[1].reshape(-1)
        means.append(group_similarity(prefix, directions))
    return means


def group_similarity(group: np.ndarray, directions: np.ndarray) -> float | None:
    """Mean cosine over all pairs of different items in the same group (N,); None without such a pair.

    The pairs of a group of n unit vectors sum to (|sum of vectors|^2 - n) / 2, so that no pair is ever formed.
    """
    counts = np.bincount(group)
    inside = np.flatnonzero(counts[group] > 1)
    inside = inside[np.argsort(group[inside], kind="stable")]
    counts = counts[counts > 1].astype(np.float64)
    if not len(counts):
        return None
    starts = (np.cumsum(counts) - counts).astype(np.int64)
    squares = sum(float((np.add.reduceat(block.astype(np.float64), starts) ** 2).sum())
                  for block in (directions[inside, column:column + COLUMNS]
                                for column in range(0, directions.shape[1], COLUMNS)))
    own = float(np.einsum("nd,nd->n", directions, directions)[inside].sum(dtype=np.float64))  # 0 for a zero vector
    return (squares - own) / float((counts * (counts - 1)).sum())


def same_first_code(first: np.ndarray, pairs: np.ndarray) -> tuple[float, float]:
    """How often both items of a pair (M, 2) have the same first code (N,), and how often they would by chance.

    By chance: one item drawn from the first column, one from the second.
    """
    one, two = first[pairs[:, 0]], first[pairs[:, 1]]
    size = int(first.max()) + 1
    chance = np.bincount(one, minlength=size) @ np.bincount(two, minlength=size) / len(pairs) ** 2
    return float((one == two).mean()), float(chance)
