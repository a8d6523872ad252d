"""Trains any quantizer, and turns its codes into the artifact of semantic IDs."""

import logging
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from common.artifacts import load_meta, save_array
from common.checkpoint import Checkpoints
from common.config import Config
from common.errors import UserError
from common.run import Run
from common.training import TrainingLoop, derive_seed, make_optimizer, optimize
from quantization.dataset import Batches, Embeddings
from quantization.evaluate import collision_rate, evaluate
from quantization.models.abstract_vq import AbstractVQ
from quantization.utils import disambiguate

log = logging.getLogger(__name__)


class QuantizerTask:
    """What `common.training.TrainingLoop` needs to know about training a quantizer."""

    def __init__(self, model: AbstractVQ, xs: Tensor, params: dict, seed: int, name: str):
        self.model, self.xs, self.params, self.seed, self.name = model, xs, params, seed, name
        self.batches = Batches(xs, params["batch_size"], seed)
        self.optimizer = make_optimizer(model, params)
        self.num_steps = self.batches.num_batches

    def step(self, epoch: int, index: int) -> dict[str, Tensor]:
        batch = self.batches.get(epoch, index)
        losses = self.model.compute_loss(self.model(batch), batch)
        optimize(self, losses["loss_total"], epoch * self.num_steps + index, self.params)
        return losses

    def end_epoch(self, epoch: int) -> None:
        self.model.end_epoch(self.xs, torch.Generator().manual_seed(derive_seed(self.seed, "end", epoch)))

    def evaluate(self) -> dict:
        return evaluate(self.model, self.xs, self.params["eval_batch_size"])[0]


class Trainer:
    """Fits one quantizer in its run folder and publishes the codes of the selected model."""

    def __init__(self, model: AbstractVQ, embeddings: Embeddings, config: Config, run: Run, device: torch.device):
        self.model, self.embeddings, self.config, self.run = model.to(device), embeddings, config, run
        self.xs = torch.from_numpy(embeddings.xs).to(device)
        self.seed = config["common"]["seed"]

    def train(self) -> dict:
        """Fit in one call or by gradient, whichever the model does; returns the selected model's figures."""
        params = self.config.training_params
        generator = torch.Generator().manual_seed(derive_seed(self.seed, "start"))
        checkpoints = Checkpoints(self.run.checkpoints, self.run.command)
        if self.model.fit(self.xs, generator):
            checkpoints.save_best({"model": self.model.state_dict()})
        else:
            if checkpoints.load_newest() is None:
                self.model.initialize(self.xs, generator)
            task = QuantizerTask(self.model, self.xs, params, self.seed, self.config.name)
            TrainingLoop(task, self.run, params, self.seed).train()
        self.model.eval()
        with torch.no_grad():
            figures, self.codes = evaluate(self.model, self.xs, params["eval_batch_size"])
        return figures

    def publish(self, path: Path, command: str, info: dict) -> dict:
        """Disambiguate the selected model's codes and write them with all that the next stage must know."""
        codes = disambiguate(self.codes)
        sizes = list(self.model.codebook_sizes or (self.codes.max(axis=0) + 1).tolist())
        extra = codes.shape[1] > self.codes.shape[1]
        meta = {
            "inputs": self.embeddings.hashes, "items_sha256": self.embeddings.items_sha256, "command": command,
            "codebook_sizes": sizes + ([int(codes[:, -1].max()) + 1] if extra else []),
            "disambiguation_level": codes.shape[1] - 1 if extra else None,
            "collision_rate_before": collision_rate(self.codes), "collision_rate_after": collision_rate(codes), **info}
        save_array(path, codes.astype(np.int32), meta)
        return meta


def is_published(codes: Path, run_id: str) -> bool:
    """Whether the codes that lie there are those of this run."""
    try:
        return load_meta(codes, "").get("run") == run_id
    except UserError:
        return False
