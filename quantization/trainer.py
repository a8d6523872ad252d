"""Training of a quantizer, and publication of its semantic IDs."""

import logging
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from common.artifacts import load_meta, save_array
from common.capture import Graphs
from common.checkpoint import Checkpoints
from common.config import Config
from common.data_parallel import shard_batch, sync
from common.errors import ConfigError, UserError, nearest
from common.optimization import GradientDescent
from common.run import Run
from common.training import TrainingLoop, derive_seed
from quantization.dataset import Batches, Embeddings
from quantization.disambiguation import disambiguate
from quantization.evaluate import EvaluationData, Evaluator, Prefixes, collision_rate
from quantization.models.abstract_vq import AbstractVQ
from quantization.utils import check_contract

log = logging.getLogger(__name__)

# `maintain` is called once in this number of steps, or once per epoch if an epoch has fewer steps. In a long epoch, a
# codebook could collapse before the end.
MAINTAIN_EVERY = 100


class QuantizerTask:
    """The training of a quantizer by gradient descent. It implements `common.training.Task`."""

    def __init__(self, model: AbstractVQ, xs: Tensor, params: dict, seed: int, name: str, reference: EvaluationData,
                 graphs: Graphs | None = None):
        """graphs: the operations for captured steps; by default, those of the model's device"""
        self.model, self.xs, self.params, self.seed, self.name = model, xs, params, seed, name
        self.evaluator = Evaluator(model, xs, params["eval_batch_size"], reference)
        self.batches = Batches(xs, min(params["batch_size"], -(-len(xs) // params["min_steps_per_epoch"])), seed)
        self.num_steps = self.batches.num_batches
        self.descent = GradientDescent(model, self._compute_losses, params, self.num_steps, graphs)

    def step(self, epoch: int, index: int) -> dict[str, Tensor]:
        number = epoch * self.num_steps + index
        if number and number % min(MAINTAIN_EVERY, self.num_steps) == 0:
            # Call this at the start of a step, so that it comes after the evaluation of the previous epoch.
            self.model.maintain(self.xs, self._generator("maintain", number))
            sync(self.model)
            self.descent.check_addresses()
        num_rows = len(self.batches.numbers(epoch, index))
        with shard_batch(num_rows) as part:
            own = self.batches.get(epoch, index, part.rows)
            return self.descent.step(number, (own,), part.weight(len(own), num_rows))

    def _compute_losses(self, batch: Tensor) -> dict[str, Tensor]:
        return self.model.compute_loss(self.model(batch), batch)

    def end_epoch(self, epoch: int) -> None:
        """Update the model at the end of an epoch. All processes make the same update."""
        self.model.end_epoch(self.xs, self._generator("end", epoch))
        sync(self.model)

    def _generator(self, *use: str | int) -> torch.Generator:
        return torch.Generator().manual_seed(derive_seed(self.seed, *use))

    def evaluate(self) -> dict:
        metrics, _ = self.evaluator.evaluate()
        log.info("%s: collision rate %.2f %%, largest bucket %d, codebook utilization %s", self.name,
                 100 * metrics["collision_rate"], metrics["largest_bucket"],
                 " ".join(f"{share:.0%}" for share in metrics["utilization"]))
        return metrics

    def batch_numbers(self, epoch: int, index: int) -> list[int]:
        """Return the indices of the items in batch `index` of the epoch."""
        return self.batches.numbers(epoch, index).tolist()


class Trainer:
    """A trainer for one quantizer. It also computes all codes with the best checkpoint, and publishes them."""

    def __init__(self, model: AbstractVQ, embeddings: Embeddings, config: Config, run: Run, device: torch.device,
                 reference: EvaluationData):
        self.model, self.embeddings, self.config, self.run = model.to(device), embeddings, config, run
        self.xs = torch.from_numpy(embeddings.xs).to(device)
        self.seed, self.reference = config["common"]["seed"], reference

    def train(self) -> dict:
        """Train the model by its `fit` method or by gradient descent, and return the metrics of the best checkpoint.

        Afterwards, `model` has the weights of the best checkpoint, and `codes` has the codes of all items.
        """
        params = self.config.training_params
        generator = torch.Generator().manual_seed(derive_seed(self.seed, "start"))
        checkpoints = Checkpoints(self.run.checkpoints, self.run.command)
        if self.model.fit(self.xs, generator):
            check_contract(self.model, self.xs)
            checkpoints.save_best({"model": self.model.state_dict()})
            evaluator = Evaluator(self.model, self.xs, params["eval_batch_size"], self.reference)
        else:
            check_contract(self.model, self.xs)
            self._check_selection(params["select_by"])
            if checkpoints.load_newest() is None:
                self.model.initialize(self.xs, generator)
            task = QuantizerTask(self.model, self.xs, params, self.seed, self.config.name, self.reference)
            TrainingLoop(task, self.run, params, self.seed).train()
            evaluator = task.evaluator
        checkpoints.load_best(self.model)  # the published codes come from the saved weights
        self.model.eval()
        metrics, codes = evaluator.evaluate()
        self.codes = codes.cpu().numpy()
        return metrics

    def publish(self, path: Path, command: str, info: dict) -> dict:
        """Disambiguate the codes, and write them to `path`. Return the content of the meta file.

        info: additional entries for the meta file
        """
        sizes = list(self.model.codebook_sizes or (self.codes.max(axis=0) + 1).tolist())
        ids = disambiguate(self.config["common"]["disambiguation"], self.codes, sizes, self.model, self.xs,
                           self.reference.directions)
        before, after = (collision_rate(Prefixes(torch.from_numpy(codes))) for codes in (self.codes, ids.codes))
        meta = {
            "inputs": self.embeddings.hashes, "items_sha256": self.embeddings.items_sha256, "command": command,
            "codebook_sizes": ids.codebook_sizes, "disambiguation_level": ids.level,
            "disambiguation": ids.method,
            "collision_rate_before": before, "collision_rate_after": after, **info}
        save_array(path, ids.codes.astype(np.int32), meta)
        return meta

    def _check_selection(self, select_by: str) -> None:
        """Raise ConfigError if `select_by` is not a metric of this model."""
        metrics, _ = Evaluator(self.model, self.xs[:256], 256, EvaluationData(None, None)).evaluate()
        known = sorted(name for name, value in metrics.items() if isinstance(value, float)) + ["behavioral_coherence"]
        if select_by not in known:
            raise ConfigError(self.config.origins[f"{self.config.name}.training_params.select_by"],
                              f"unknown metric {select_by!r}", nearest(select_by, known), "correct the name")


def is_published(codes: Path, run_id: str) -> bool:
    """Return whether the file `codes` is from the run `run_id` and is not stale."""
    try:
        return load_meta(codes, "").get("run") == run_id
    except UserError:
        return False
