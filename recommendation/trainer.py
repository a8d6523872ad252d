"""Training of a recommender. The weights with the best validation metric are kept."""

import logging
from collections.abc import Callable

import torch
from torch import Tensor, nn

from common.capture import Graphs
from common.checkpoint import Checkpoints
from common.config import Config
from common.data_parallel import WHOLE, shard_batch
from common.optimization import GradientDescent
from common.run import Run
from common.training import Best, TrainingLoop
from recommendation.batches import TrainingBatches
from recommendation.dataset import Sequences
from recommendation.evaluator import metrics, predict, selecting_protocol
from recommendation.models.abstract_model import AbstractRecommender, Teacher, Windows
from recommendation.models.contract import NUM_TRIED, check_contract, check_types

log = logging.getLogger(__name__)

Loss = Callable[[Windows], dict[str, Tensor]]


def validate(model: AbstractRecommender, sequences: Sequences, params: dict, name: str) -> dict:
    """Return the metrics of the model on the validation events, with the protocol that selects the checkpoint."""
    protocol = selecting_protocol(sequences, params)
    return metrics(predict(model, sequences, "valid", params, protocol, f"validate {name}"),
                   model.catalogue.num_items)


class RecommenderTask:
    """The training of a recommender by gradient descent. It implements `common.training.Task`."""

    def __init__(self, model: AbstractRecommender, sequences: Sequences, params: dict, seed: int, name: str,
                 graphs: Graphs | None = None, teacher: Teacher | None = None):
        """graphs: the operations for captured steps; by default, those of the model's device"""
        self.model: nn.Module = model
        self.recommender, self.sequences, self.params, self.name = model, sequences, params, name
        self.batches = TrainingBatches(sequences, model.training_unit, params["batch_size"], params["max_history"],
                                       seed)
        self.num_steps = self.batches.num_batches
        self.teacher = teacher
        compute = loss_function(model, params, sequences.device_items.device)
        self.descent = GradientDescent(
            model, lambda items, lengths, starts: compute(Windows(items, lengths, starts, teacher)), params,
            self.num_steps, graphs)

    def step(self, epoch: int, index: int) -> dict[str, Tensor]:
        with shard_batch(self.batches.num_windows(epoch, index)) as part:
            windows = self.batches.get(epoch, index, part)
            weight = 1.0 if part is WHOLE else part.weight(self.batches.num_targets(epoch, index, part.rows),
                                                           self.batches.num_targets(epoch, index))
            return self.descent.step(epoch * self.num_steps + index, _tensors(windows), weight)

    def end_epoch(self, epoch: int) -> None:
        """Do nothing; recommenders need no work between epochs."""

    def evaluate(self) -> dict:
        return validate(self.recommender, self.sequences, self.params, self.name)

    def batch_numbers(self, epoch: int, index: int) -> list[int]:
        """Return the user index of each window in a batch."""
        return self.batches.users(epoch, index)


def train(model: AbstractRecommender, sequences: Sequences, config: Config, run: Run,
          teacher: Teacher | None = None) -> Best:
    """Train the model, and return the validation metrics of the best weights.

    If the class of the model overrides `fit`, `fit` trains the model. Otherwise, the model is trained by gradient
    descent, and has the weights with the best validation metric afterwards. Test events are not used.
    """
    params, seed = config.training_params, config["common"]["seed"]
    tried = sequences.histories(sequences.positions("valid")[:NUM_TRIED], params["max_history"])
    types = {name: tensor.dtype for name, tensor in model.state_dict().items()}
    if model.fit(sequences.training_sequences(), sequences.validation_events()):
        model.eval()
        check_types(model, types)
        check_contract(model, tried, params["top_k"], None)
        metrics = validate(model, sequences, params, config.name)
        Checkpoints(run.checkpoints, run.command).save_best({"model": model.state_dict()})
        best = Best(0, metrics[params["select_by"]], metrics)
    else:
        task = RecommenderTask(model, sequences, params, seed, config.name, teacher=teacher)
        items, lengths, starts = (part[:NUM_TRIED] for part in _tensors(task.batches.get(0, 0, WHOLE)))
        with task.descent.stream():
            check_contract(model, tried, params["top_k"], Windows(items, lengths, starts, teacher))
        best = TrainingLoop(task, run, params, seed).train()
    model.eval()
    model.prepare()
    return best


def _tensors(windows: Windows) -> tuple[Tensor, Tensor, Tensor]:
    assert windows.starts is not None
    return windows.items, windows.lengths, windows.starts


def loss_function(model: AbstractRecommender, params: dict, device: torch.device) -> Loss:
    """Return the loss function of the model, with the precision that `params` selects."""
    if params["precision"] == "float32":
        return model.compute_loss
    if device.type != "cuda":
        log.info("precision: bfloat16 needs CUDA. The device is %s, so the training uses float32", device.type)
        return model.compute_loss
    return lambda windows: autocast(model.compute_loss, windows, device.type)


def autocast(compute: Loss, windows: Windows, device_type: str) -> dict[str, Tensor]:
    """Compute the losses in bfloat16."""
    # Loss scaling is not needed, because bfloat16 has the same range as float32. In a captured step, a cached copy of
    # the weights would keep its old value.
    with torch.autocast(device_type, dtype=torch.bfloat16, cache_enabled=False):
        return compute(windows)
