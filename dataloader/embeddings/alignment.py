"""Fusion of several embeddings by aligning them in a common space (--suffix fused-align).

The embeddings that are fused are called parts. Each part has a linear map into the common space. The maps are trained
with the symmetric InfoNCE loss of CLIP (Radford et al., Learning transferable visual models from natural language
supervision, 2021). This loss brings the parts of an item together, and separates them from the parts of the other items
in the batch. The temperature of the loss is learned too.
"""

from itertools import combinations

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from common.device import send
from common.errors import DataError, TrainingError
from common.optimization import GradientDescent
from common.run import Run
from common.training import Best, TrainingLoop, derive_seed
from dataloader.embeddings.transform import mean_of, slices
from dataloader.flags import CONFIGS
from dataloader.options import Alignment

ROWS = 65_536  # rows projected at once

# N items, P parts, D_p dimensions of part p, B items in a batch, D dimensions of the common space


class Projections(nn.Module):
    """One linear map per part, and the learned temperature of the loss."""

    def __init__(self, part_dims: list[int], dim: int, params: Alignment):
        super().__init__()
        self.maps = nn.ModuleList(nn.Linear(part_dim, dim, bias=False) for part_dim in part_dims)
        self.log_scale = nn.Parameter(torch.tensor(1 / params.temperature).log())
        self.max_log_scale = float(np.log(1 / params.min_temperature))

    def project(self, part: int, rows: Tensor) -> Tensor:
        """Project the rows of one part and normalize them to length 1: (B, D_p) -> (B, D)."""
        return F.normalize(self.maps[part](rows), dim=1)

    def loss(self, projected: list[Tensor]) -> Tensor:
        """Return the InfoNCE loss in both directions, averaged over all pairs of parts.

        projected: P tensors (B, D)
        """
        scale = self.log_scale.clamp(max=self.max_log_scale).exp()
        target = torch.arange(len(projected[0]), device=projected[0].device)
        losses = []
        for one, other in combinations(projected, 2):
            scores = scale * one @ other.T  # (B, B)
            losses += [F.cross_entropy(scores, target), F.cross_entropy(scores.T, target)]
        return torch.stack(losses).mean()


class AlignmentTask:
    """The task that trains the projections in a `TrainingLoop`.

    parts: P tensors (N, D_p), centered
    rows: the indices of the items that have all parts

    A tenth of these items, but at most `max_held_out`, is held out to select the best epoch. If a tenth is fewer than
    two items, all items are used for both training and selection.
    """

    name = "fuse: align"

    def __init__(self, parts: list[Tensor], rows: Tensor, dim: int, params: Alignment, seed: int):
        self.parts, self.params, self.seed = parts, {**params._asdict(), "capture": "auto"}, seed
        torch.manual_seed(derive_seed(seed, "projections"))
        self.model = Projections([part.shape[1] for part in parts], dim, params).to(parts[0].device)
        rows = rows[self._permutation(len(rows), "held out")]
        num_held_out = min(len(rows) // 10, params.max_held_out)
        self.held_out, self.rows = (rows[:num_held_out], rows[num_held_out:]) if num_held_out > 1 else (rows, rows)
        self.batch_size = min(params.batch_size, len(self.rows))
        self.num_steps = len(self.rows) // self.batch_size
        self.descent = GradientDescent(self.model, self._compute_losses, self.params, self.num_steps)
        self._epoch, self._order = -1, rows

    def step(self, epoch: int, index: int) -> dict[str, Tensor]:
        return self.descent.step(epoch * self.num_steps + index, (self._batch(epoch, index),))

    def _compute_losses(self, rows: Tensor) -> dict[str, Tensor]:
        return {"loss_total": self.model.loss(self._projected(rows))}

    def end_epoch(self, epoch: int) -> None:
        pass

    def evaluate(self) -> dict:
        """Return the loss and the top-1 accuracy of the held-out items.

        The accuracy is the fraction of vectors whose nearest vector in another part belongs to the same item. It is
        averaged over all pairs of parts, in both directions.
        """
        projected = self._projected(self.held_out)
        target = torch.arange(len(self.held_out), device=self.held_out.device)
        hits = []
        for one, other in combinations(projected, 2):
            scores = one @ other.T
            hits += [(scores.argmax(dim=axis) == target).float().mean() for axis in (0, 1)]
        return {"held_out_loss": self.model.loss(projected).item(), "top1": torch.stack(hits).mean().item(),
                "num_held_out": len(self.held_out)}

    def batch_numbers(self, epoch: int, index: int) -> list[int]:
        """Return the indices of the items in a batch."""
        return self._batch(epoch, index).tolist()

    def _batch(self, epoch: int, index: int) -> Tensor:
        if epoch != self._epoch:
            self._epoch, self._order = epoch, self.rows[self._permutation(len(self.rows), epoch)]
        return self._order[index * self.batch_size:(index + 1) * self.batch_size]

    def _projected(self, rows: Tensor) -> list[Tensor]:
        return [self.model.project(p, part[rows]) for p, part in enumerate(self.parts)]

    def _permutation(self, count: int, *parts: object) -> Tensor:
        generator = torch.Generator().manual_seed(derive_seed(self.seed, *parts))
        return send(torch.randperm(count, generator=generator), self.parts[0].device)


def align(parts: list[tuple[np.ndarray, np.ndarray, float]], dim: int, params: Alignment, seed: int,
          device: torch.device, run: Run) -> tuple[np.ndarray, Best]:
    """Train a linear map for each part, and return the fused vectors and the metrics of the best epoch.

    parts: (vectors, mask, weight) of each part. The vectors (N, D_p) must have length 1; this function centers them in
        place. The mask (N,) is true for the items that have the part.

    The fused vectors are float32 (N, dim). The fused vector of an item is the weighted mean of its mapped parts, or
    zero if the item has no part. Raises DataError if fewer than two items have all parts. Raises TrainingError if the
    loss becomes NaN or infinite.
    """
    vectors, present, weights = zip(*parts, strict=True)
    complete = np.logical_and.reduce(present)
    if complete.sum() < 2:
        raise DataError("--fusion_parts", f"at least 2 items must have a vector in every part, got {complete.sum()}",
                        "fused-align is trained on these items", "use --suffix fused-concat, or other parts")
    for part in vectors:
        part -= mean_of(part, complete).astype(np.float32)
    tensors = [torch.from_numpy(part).to(device) for part in vectors]
    task = AlignmentTask(tensors, torch.from_numpy(np.flatnonzero(complete)).to(device), dim, params, seed)
    loop_params = {**task.params, "select_by": "held_out_loss", "select_mode": "min"}
    try:
        best = TrainingLoop(task, run, loop_params, seed).train()
    except TrainingError as error:  # replace the fix, because it names flags that this step does not have
        raise TrainingError(run.folder, error.what, error.why,
                            f"use a lower lr in {CONFIGS / 'fusion.yaml'}") from error
    shares = torch.from_numpy(np.stack(present, axis=1) * np.asarray(weights, dtype=np.float32))  # (N, P)
    shares = (shares / shares.sum(dim=1, keepdim=True).clamp(min=1e-30)).to(device)
    result = np.empty((len(complete), dim), dtype=np.float32)
    with torch.no_grad():
        for rows in slices(result, ROWS):
            mean = sum(shares[rows, p, None] * task.model.project(p, part[rows]) for p, part in enumerate(tensors))
            result[rows] = mean.cpu().numpy()
    return result, best
