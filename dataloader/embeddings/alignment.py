"""Projections of several embeddings into one space in which an item's parts agree (--suffix fused-align).

One linear map a part, trained with the symmetric InfoNCE loss of CLIP (Radford et al., Learning transferable visual
models from natural language supervision, 2021): among the items of a batch, each part of an item shall find the
item's other part, and a learned temperature says how sharply.
"""

from itertools import combinations

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from common.errors import DataError, TrainingError
from common.run import Run
from common.training import Best, TrainingLoop, derive_seed, make_optimizer, optimize
from dataloader.embeddings.transform import mean_of, slices
from dataloader.options import CONFIGS, Alignment

ROWS = 65_536  # that are projected at once

# N items, P parts, D_p dimensions of part p, B items of a batch, D dimensions of the common space


class Projections(nn.Module):
    """A linear map for every part, and the temperature of the loss."""

    def __init__(self, part_dims: list[int], dim: int, params: Alignment):
        super().__init__()
        self.maps = nn.ModuleList(nn.Linear(part_dim, dim, bias=False) for part_dim in part_dims)
        self.log_scale = nn.Parameter(torch.tensor(1 / params.temperature).log())
        self.max_log_scale = float(np.log(1 / params.min_temperature))

    def project(self, part: int, rows: Tensor) -> Tensor:
        """(B, D_p) -> (B, D), of length 1."""
        return F.normalize(self.maps[part](rows), dim=1)

    def loss(self, projected: list[Tensor]) -> Tensor:
        """InfoNCE in both directions, the mean over all pairs of parts; projected: P times (B, D)."""
        scale = self.log_scale.clamp(max=self.max_log_scale).exp()
        target = torch.arange(len(projected[0]), device=projected[0].device)
        losses = []
        for one, other in combinations(projected, 2):
            scores = scale * one @ other.T  # (B, B)
            losses += [F.cross_entropy(scores, target), F.cross_entropy(scores.T, target)]
        return torch.stack(losses).mean()


class AlignmentTask:
    """What the training loop trains: batches are slices of an epoch's permutation, taken on the device.

    parts: P times (N, D_p), centred; rows: the items that have all parts. A tenth of these, and at most
    `max_held_out`, is held out and chooses the epoch; where they are too few to spare any, all do both.
    """

    name = "fuse: align"

    def __init__(self, parts: list[Tensor], rows: Tensor, dim: int, params: Alignment, seed: int):
        self.parts, self.params, self.seed = parts, params._asdict(), seed
        torch.manual_seed(derive_seed(seed, "projections"))
        self.model = Projections([part.shape[1] for part in parts], dim, params).to(parts[0].device)
        self.optimizer = make_optimizer(self.model, self.params)
        rows = rows[self._permutation(len(rows), "held out")]
        num_held_out = min(len(rows) // 10, params.max_held_out)
        self.held_out, self.rows = (rows[:num_held_out], rows[num_held_out:]) if num_held_out > 1 else (rows, rows)
        self.batch_size = min(params.batch_size, len(self.rows))
        self.num_steps = len(self.rows) // self.batch_size
        self._epoch, self._order = -1, rows

    def step(self, epoch: int, index: int) -> dict[str, Tensor]:
        loss = self.model.loss(self._projected(self._batch(epoch, index)))
        optimize(self, loss, epoch * self.num_steps + index, self.params)
        return {"loss": loss}

    def end_epoch(self, epoch: int) -> None:
        pass

    def evaluate(self) -> dict:
        """The held-out items' loss, and how often a part of theirs is nearest to the same item's other part."""
        projected = self._projected(self.held_out)
        target = torch.arange(len(self.held_out), device=self.held_out.device)
        hits = []
        for one, other in combinations(projected, 2):
            scores = one @ other.T
            hits += [(scores.argmax(dim=axis) == target).float().mean() for axis in (0, 1)]
        return {"held_out_loss": self.model.loss(projected).item(), "top1": torch.stack(hits).mean().item(),
                "num_held_out": len(self.held_out)}

    def batch_numbers(self, epoch: int, index: int) -> list[int]:
        """The items of the batch."""
        return self._batch(epoch, index).tolist()

    def _batch(self, epoch: int, index: int) -> Tensor:
        if epoch != self._epoch:
            self._epoch, self._order = epoch, self.rows[self._permutation(len(self.rows), epoch)]
        return self._order[index * self.batch_size:(index + 1) * self.batch_size]

    def _projected(self, rows: Tensor) -> list[Tensor]:
        return [self.model.project(p, part[rows]) for p, part in enumerate(self.parts)]

    def _permutation(self, count: int, *parts: object) -> Tensor:
        generator = torch.Generator().manual_seed(derive_seed(self.seed, *parts))
        return torch.randperm(count, generator=generator).to(self.parts[0].device)


def align(parts: list[tuple[np.ndarray, np.ndarray, float]], dim: int, params: Alignment, seed: int,
          device: torch.device, run: Run) -> tuple[np.ndarray, Best]:
    """Train, and return float32 (N, D), the weighted mean of the projections of an item's parts, and how well it went.

    parts: of each the vectors (N, D_p), rows of length 1, which are centred in place; whether an item has it (N,); its
    weight. An item that lacks a part gets the mean of those that it has, and zeros where it has none. Raises DataError
    where fewer than two items have all parts, and TrainingError where the loss leaves the finite numbers.
    """
    vectors, present, weights = zip(*parts, strict=True)
    complete = np.logical_and.reduce(present)
    if complete.sum() < 2:
        raise DataError("--fusion_parts", f"{complete.sum()} items have all parts",
                        "projections are trained on such items", "--suffix fused-concat, or other parts")
    for part in vectors:
        part -= mean_of(part, complete).astype(np.float32)
    tensors = [torch.from_numpy(part).to(device) for part in vectors]
    task = AlignmentTask(tensors, torch.from_numpy(np.flatnonzero(complete)).to(device), dim, params, seed)
    loop_params = {**task.params, "select_by": "held_out_loss", "select_mode": "min"}
    try:
        best = TrainingLoop(task, run, loop_params, seed).train()
    except TrainingError as error:  # the loop knows no flags of this step
        raise TrainingError(run.folder, error.what, error.why, f"a lower lr in {CONFIGS / 'fusion.yaml'}") from error
    shares = torch.from_numpy(np.stack(present, axis=1) * np.asarray(weights, dtype=np.float32))  # (N, P)
    shares = (shares / shares.sum(dim=1, keepdim=True).clamp(min=1e-30)).to(device)
    result = np.empty((len(complete), dim), dtype=np.float32)
    with torch.no_grad():
        for rows in slices(result, ROWS):
            mean = sum(shares[rows, p, None] * task.model.project(p, part[rows]) for p, part in enumerate(tensors))
            result[rows] = mean.cpu().numpy()
    return result, best
