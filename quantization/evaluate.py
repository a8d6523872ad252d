"""Metrics of semantic IDs: collisions, codebook utilization, reconstruction, similarity of items with equal codes.

The metrics are computed on the device of the model. The functions return tensors, so that an evaluation can read all of
its metrics at once, with `to_host`.
"""

from collections.abc import Mapping
from functools import cached_property
from itertools import islice
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from common.artifacts import DatasetFolder, load_embeddings, load_interactions, load_meta
from common.table_files import SPLITS
from quantization.models.abstract_vq import AbstractVQ
from quantization.utils import check_range, shaped_codes

# N items, L levels, K codebook size, D width, M pairs, G groups of items

# The embedding that measures the similarity of items. All tokenizers of a dataset use it, so that their metrics can be
# compared.
REFERENCE_SUFFIX = "td"
COLUMNS = 64  # number of embedding columns that are summed at once; a float64 copy of all columns could fill the memory
# Metrics that are not defined for all codes. They are then NaN on the device, and None on the host.
OPTIONAL = {"random_pairs_similarity", "prefix_similarity", "prefix_coherence", "behavioral_coherence"}


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


class Reference:
    """`EvaluationData` on a device, together with the values that do not depend on the codes."""

    def __init__(self, data: EvaluationData, device: torch.device):
        self.directions, self.pairs = (None if array is None else torch.from_numpy(array).to(device)
                                       for array in data)
        if self.directions is not None:
            squares = [block.double().square().sum(dim=1) for block in self.directions.split(COLUMNS, dim=1)]
            self.squared_lengths = torch.stack(squares).sum(dim=0)                              # (N,)
            one_group = torch.zeros(len(self.directions), 1, dtype=torch.long, device=device)
            [self.random_pairs_similarity] = prefix_similarity(Prefixes(one_group), self)       # ()


class Evaluator:
    """Computes the metrics of a model on all items.

    xs: the input of the model for all items, (N, D)
    """

    def __init__(self, model: AbstractVQ, xs: Tensor, batch_size: int, reference: EvaluationData):
        self.model, self.xs, self.batch_size = model, xs, batch_size
        self.reference = Reference(reference, xs.device)

    @torch.no_grad()
    def evaluate(self) -> tuple[dict, Tensor]:
        """Return the metrics, and the codes of all items (N, L).

        On a GPU, the evaluation waits for the device three times: to check the codes, for the numbers of groups, and
        for the metrics.
        """
        losses: dict[str, Tensor] = {}
        parts, errors = [], []
        for batch in self.xs.split(self.batch_size):
            parts.append(shaped_codes(self.model, batch))
            outputs, target = self.model(batch), self.model.target(batch)
            for name, loss in self.model.compute_loss(outputs, batch).items():
                losses[name] = losses.get(name, 0.0) + loss.detach() * len(batch)
            if target.is_floating_point() and outputs[0].shape == target.shape:
                errors.append((outputs[0] - target).square().sum(dim=1))
        codes = torch.cat(parts)
        sizes, prefixes = check_range(self.model, codes), Prefixes(codes)
        metrics: dict[str, Tensor | None] = {name: total.double() / len(self.xs) for name, total in losses.items()}
        if errors:
            metrics |= self._reconstruction_metrics(torch.cat(errors))
        metrics |= code_metrics(codes, sizes, prefixes) | similarity_metrics(prefixes, self.reference)
        return to_host(metrics), codes

    def _reconstruction_metrics(self, errors: Tensor) -> dict[str, Tensor | None]:
        """Return the metrics of the reconstruction; `errors` (N,) has the squared error of each item."""
        error = errors.mean().double()
        explained = None if self._variance is None else 1 - error / self._variance
        return {"reconstruction_error": error, "explained_variance": explained}

    @cached_property
    def _variance(self) -> float | None:
        """The variance of the data, summed over the columns, or None if all rows are equal."""
        variances, means = torch.var_mean(self.model.target(self.xs), dim=0, correction=0)
        variance, squares = torch.stack([variances.sum(), means.square().sum()]).tolist()
        # Because of rounding errors, even identical rows have a variance slightly above 0.
        return variance if variance > 1e-12 * squares else None


def to_host(metrics: Mapping[str, Tensor | None]) -> dict:
    """Copy metrics to the host, and wait only once for the device. Vectors become lists.

    For the metrics in `OPTIONAL`, NaN becomes None.
    """
    present = {name: metric for name, metric in metrics.items() if metric is not None}
    device = next((metric.device for metric in present.values()), None)
    flat = [metric.to(device, torch.float64).reshape(-1) for metric in present.values()]
    values = iter(torch.cat(flat).tolist() if flat else [])
    result: dict = dict(metrics)
    for name, metric in present.items():
        kind = float if metric.is_floating_point() else int
        numbers = [None if name in OPTIONAL and value != value else kind(value)
                   for value in islice(values, metric.numel())]
        result[name] = numbers if metric.ndim else numbers[0]
    return result


class Prefixes:
    """The items grouped by their first code, by their first two codes, ..., and by all L codes.

    codes: (N, L)

    On a GPU, this waits for the device once.
    """

    def __init__(self, codes: Tensor):
        self.order = torch.arange(len(codes), device=codes.device)  # (N,) the items, sorted by their codes
        for level in codes.T.flip(0):
            self.order = self.order[level[self.order].argsort(stable=True)]
        in_order = codes[self.order]
        # 1 if the prefix of an item differs from the prefix of the previous item: the item begins a new group.
        begins = (in_order[1:] != in_order[:-1]).long().cummax(dim=1).values
        groups = torch.cat([torch.zeros_like(codes[:1]), begins.cumsum(dim=0)])
        # For each prefix length, the group of each sorted item, (N,), and the number of groups.
        self.groups = groups.T.contiguous()
        self.num_groups: list[int] = (groups[-1] + 1).tolist()

    def sizes(self, level: int) -> Tensor:
        """Return the number of items in each group of items with the same first `level + 1` codes: (G,)."""
        return count(self.groups[level], self.num_groups[level])

    def parents(self, level: int) -> Tensor:
        """Return the group of level `level` that contains each group of the next level, or each sorted item: (G,).

        The last level has no next level.
        """
        if level == len(self.groups) - 1:
            return self.groups[level]
        return self.groups.new_empty(self.num_groups[level + 1]).scatter_(0, self.groups[level + 1], self.groups[level])


def count(codes: Tensor, size: int) -> Tensor:
    """Return how often each of the codes 0, ..., `size` - 1 occurs in `codes` (N,): int64 (size,)."""
    # `bincount` would wait for the GPU.
    return torch.zeros(size, dtype=torch.long, device=codes.device).index_add_(0, codes, torch.ones_like(codes))


def code_metrics(codes: Tensor, sizes: list[int], prefixes: Prefixes) -> dict[str, Tensor]:
    """Return the metrics that can be computed from the codes (N, L) alone.

    sizes: the L codebook sizes
    """
    counts = [count(level, size) for level, size in zip(codes.T, sizes, strict=True)]
    return {
        "collision_rate": codes.new_full((), collision_rate(prefixes), dtype=torch.float64),
        "largest_bucket": prefixes.sizes(-1).max(),
        "utilization": torch.stack([(level > 0).double().mean() for level in counts]),
        "num_dead_codes": torch.stack([(level == 0).sum() for level in counts]),
        "perplexity": torch.stack([perplexity(level) for level in counts]),
        "gini": torch.stack([gini(level) for level in counts]),
    }


def similarity_metrics(prefixes: Prefixes, reference: Reference) -> dict[str, Tensor]:
    """Measure the prefix coherence and the behavioral coherence of codes, and return the metrics.

    Prefix coherence: the mean similarity of items with the same first codes, divided by the mean similarity of random
    pairs.
    Behavioral coherence: of the pairs of consecutive items, the share with the same first code, divided by the share
    expected by chance.

    If `reference` does not have the data for a metric, the metric is left out.
    """
    metrics: dict[str, Tensor] = {}
    if reference.directions is not None:
        base, similarity = reference.random_pairs_similarity, prefix_similarity(prefixes, reference)
        # The ratio is meaningless if the mean of random pairs is near or below 0, as it is for centered embeddings.
        metrics |= {"random_pairs_similarity": base, "prefix_similarity": similarity,
                    "prefix_coherence": torch.where(base > 0.01, similarity / base, torch.nan)}
    if reference.pairs is not None and len(reference.pairs):
        same, chance = same_first_code(prefixes, reference.pairs)
        metrics |= {"same_first_code": same, "same_first_code_by_chance": chance,
                    "behavioral_coherence": torch.where(chance > 0, same / chance, torch.nan)}
    return metrics


def collision_rate(prefixes: Prefixes) -> float:
    """Return the collision rate: 1 - (number of distinct IDs) / (number of items)."""
    return 1.0 - prefixes.num_groups[-1] / len(prefixes.order)


def perplexity(counts: Tensor) -> Tensor:
    """Return the perplexity of a level: the effective number of codes in use, exp(entropy), as a scalar.

    counts: number of items with each code of the level, (K,)
    """
    return torch.special.entr(counts.double() / counts.sum()).sum().exp()


def gini(counts: Tensor) -> Tensor:
    """Return the Gini coefficient of a level: 0 if all codes have equally many items, near 1 if one code has all.

    counts: number of items with each code of the level, (K,)
    """
    ordered, size = counts.sort().values, len(counts)
    weights = torch.arange(1 - size, size, 2, device=counts.device)
    return (weights * ordered).sum().double() / (size * ordered.sum())


def prefix_similarity(prefixes: Prefixes, reference: Reference) -> Tensor:
    """For each prefix length 1, 2, ..., L, return the mean cosine over all pairs of items with the same prefix: (L,).

    If no two items have the same prefix, the value is NaN. `reference` must have directions.
    """
    # In a group of n vectors, the cosines of all pairs sum to (|sum of vectors|^2 - sum of |vector|^2) / 2. The groups
    # are nested: the sum of a group is the sum of the next level's sums.
    directions, lengths = reference.directions, reference.squared_lengths[prefixes.order]
    assert directions is not None
    levels = range(len(prefixes.num_groups))
    sizes = [prefixes.sizes(level).double() for level in levels]                                    # (G,) each
    shared = [(size > 1).double() for size in sizes]
    totals = torch.stack([-(has_pairs[group] * lengths).sum()                                       # (L,)
                          for has_pairs, group in zip(shared, prefixes.groups, strict=True)])
    parents = [prefixes.parents(level) for level in levels]
    for block in directions.split(COLUMNS, dim=1):
        sums = block.index_select(0, prefixes.order).double()
        for level in reversed(levels):
            sums = sums.new_zeros(len(sizes[level]), block.shape[1]).index_add_(0, parents[level], sums)
            totals[level] += shared[level] @ sums.square().sum(dim=1)
    return totals / torch.stack([(size * (size - 1)).sum() for size in sizes])


def same_first_code(prefixes: Prefixes, pairs: Tensor) -> tuple[Tensor, Tensor]:
    """Return the share of pairs in which both items have the same first code, and the share expected by chance.

    pairs: item indices, (M, 2)

    "By chance" means that the items of a pair are drawn independently, one from each column of `pairs`.
    """
    first = torch.empty_like(prefixes.order).scatter_(0, prefixes.order, prefixes.groups[0])       # (N,)
    one, two = first[pairs].unbind(dim=1)                                                          # (M,)
    both = count(one, prefixes.num_groups[0]) * count(two, prefixes.num_groups[0])
    return (one == two).double().mean(), both.sum().double() / len(pairs) ** 2
