"""Trains any recommender and keeps the model that validates best."""

import logging
from collections.abc import Callable

import torch
from torch import Tensor, nn

from common.checkpoint import Checkpoints
from common.config import Config
from common.data_parallel import data_parallel, shard_batch
from common.errors import ConfigError, out_of_memory
from common.run import Run
from common.training import Best, TrainingLoop, make_optimizer, optimize
from recommendation.dataset import Sequences, TrainingBatches
from recommendation.evaluator import metrics, predict
from recommendation.models.abstract_model import AbstractRecommender, Windows
from recommendation.models.contract import NUM_TRIED, check_contract

log = logging.getLogger(__name__)

Loss = Callable[[Windows], dict[str, Tensor]]


def validate(model: AbstractRecommender, sequences: Sequences, params: dict, name: str) -> dict:
    """The metrics of the validation events."""
    return metrics(predict(model, sequences, "valid", params, f"validate {name}"), model.catalogue.num_items)


class RecommenderTask:
    """What `common.training.TrainingLoop` needs to know about training a recommender."""

    def __init__(self, model: AbstractRecommender, sequences: Sequences, params: dict, seed: int, name: str):
        self.model: nn.Module = model
        self.recommender, self.sequences, self.params, self.name = model, sequences, params, name
        self.batches = TrainingBatches(sequences, model.training_unit, params["batch_size"], params["max_history"],
                                       seed)
        self.optimizer = make_optimizer(model, params)
        self.losses = data_parallel(model, loss_function(model, params, sequences.device_items.device))
        self.num_steps = self.batches.num_batches

    def step(self, epoch: int, index: int) -> dict[str, Tensor]:
        with shard_batch(len(self.batches.batch(epoch, index).starts)) as part:
            losses = self.losses(self.batches.get(epoch, index, part.rows))
            losses = part.weighted(losses, self.batches.num_targets(epoch, index, part.rows),
                                   self.batches.num_targets(epoch, index))
        optimize(self, losses["loss_total"], epoch * self.num_steps + index, self.params)
        return losses

    def end_epoch(self, epoch: int) -> None:
        """Nothing to do between epochs."""

    def evaluate(self) -> dict:
        return validate(self.recommender, self.sequences, self.params, self.name)

    def batch_numbers(self, epoch: int, index: int) -> list[int]:
        """The users of the batch."""
        return self.sequences.user[self.batches.batch(epoch, index).starts].tolist()


def train(model: AbstractRecommender, sequences: Sequences, config: Config, run: Run) -> Best:
    """Fit in one call or by gradient, whichever the model does; it ends as the selected model.

    Test events are not read.
    """
    params, seed = config.training_params, config["common"]["seed"]
    tried = sequences.histories(sequences.positions("valid")[:NUM_TRIED], params["max_history"])
    if model.fit(sequences.training_sequences()):
        model.eval()
        check_contract(model, tried, params["top_k"], None)
        metrics = validate(model, sequences, params, config.name)
        Checkpoints(run.checkpoints, run.command).save_best({"model": model.state_dict()})
        best = Best(0, metrics[params["select_by"]], metrics)
    else:
        task = RecommenderTask(model, sequences, params, seed, config.name)
        check_contract(model, tried, params["top_k"], task.batches.get(0, 0, slice(NUM_TRIED)))
        best = TrainingLoop(task, run, params, seed).train()
    model.eval()
    model.prepare()
    return best


def loss_function(model: AbstractRecommender, params: dict, device: torch.device) -> Loss:
    """The model's `compute_loss` as the training parameters `precision` and `compile` ask for it.

    Weights, optimizer and evaluation stay in float32 whatever these two say.
    """
    compute = _compiled(model.compute_loss) if params["compile"] else model.compute_loss
    if params["precision"] == "float32":
        return compute
    if device.type != "cuda":
        log.info("precision: bfloat16 is for CUDA; on the %s this runs in float32", device.type)
        return compute
    return lambda windows: _autocast(compute, windows, device.type)


def _autocast(compute: Loss, windows: Windows, device_type: str) -> dict[str, Tensor]:
    """bfloat16 has float32's range, so that no loss needs scaling."""
    with torch.autocast(device_type, dtype=torch.bfloat16):
        return compute(windows)


def _compiled(compute: Loss) -> Loss:
    """Compiled at the first call, once for windows of all shapes."""
    from torch._dynamo.exc import TorchDynamoException  # torch has no public name for what its compiler raises

    compiled = torch.compile(compute, dynamic=True)

    def call(windows: Windows) -> dict[str, Tensor]:
        try:
            return compiled(windows)
        except TorchDynamoException as error:
            if out_of_memory(error):
                raise
            lines = [line.strip() for line in str(error).splitlines() if line.strip()]  # a page, the cause on top
            raise ConfigError("training_params.compile", "the model cannot be compiled here", " ".join(lines[:2]),
                              "--compile false") from error

    return call
