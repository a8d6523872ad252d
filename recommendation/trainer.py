"""Training of a recommender. The weights with the best validation metric are kept."""

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
from recommendation.models.contract import NUM_TRIED, check_contract, check_types

log = logging.getLogger(__name__)

Loss = Callable[[Windows], dict[str, Tensor]]


def validate(model: AbstractRecommender, sequences: Sequences, params: dict, name: str) -> dict:
    """Return the metrics of the model on the validation events."""
    return metrics(predict(model, sequences, "valid", params, f"validate {name}"), model.catalogue.num_items)


class RecommenderTask:
    """The training of a recommender by gradient descent. It implements `common.training.Task`."""

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
        """Do nothing; recommenders need no work between epochs."""

    def evaluate(self) -> dict:
        return validate(self.recommender, self.sequences, self.params, self.name)

    def batch_numbers(self, epoch: int, index: int) -> list[int]:
        """Return the user index of each window in a batch."""
        return self.sequences.user[self.batches.batch(epoch, index).starts].tolist()


def train(model: AbstractRecommender, sequences: Sequences, config: Config, run: Run) -> Best:
    """Train the model, and return the validation metrics of the best weights.

    If the class of the model overrides `fit`, `fit` trains the model. Otherwise, the model is trained by gradient
    descent, and has the weights with the best validation metric afterwards. Test events are not used.
    """
    params, seed = config.training_params, config["common"]["seed"]
    tried = sequences.histories(sequences.positions("valid")[:NUM_TRIED], params["max_history"])
    types = {name: tensor.dtype for name, tensor in model.state_dict().items()}
    if model.fit(sequences.training_sequences()):
        model.eval()
        check_types(model, types)
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
    """Return the loss function of the model, with the precision and compilation that `params` selects."""
    compute = _compiled(model.compute_loss) if params["compile"] else model.compute_loss
    if params["precision"] == "float32":
        return compute
    if device.type != "cuda":
        log.info("precision: bfloat16 needs CUDA. The device is %s, so the training uses float32", device.type)
        return compute
    return lambda windows: _autocast(compute, windows, device.type)


def _autocast(compute: Loss, windows: Windows, device_type: str) -> dict[str, Tensor]:
    """Compute the losses in bfloat16."""
    # Loss scaling is not needed, because bfloat16 has the same range as float32.
    with torch.autocast(device_type, dtype=torch.bfloat16):
        return compute(windows)


def _compiled(compute: Loss) -> Loss:
    """Wrap `compute` in torch.compile. A call raises ConfigError if the model cannot be compiled on this machine."""
    from torch._dynamo.exc import TorchDynamoException  # PyTorch has no public name for compiler errors

    compiled = torch.compile(compute, dynamic=True)

    def call(windows: Windows) -> dict[str, Tensor]:
        try:
            return compiled(windows)
        except TorchDynamoException as error:
            if out_of_memory(error):
                raise
            # The message is about a page long. The first two lines name the cause.
            lines = [line.strip() for line in str(error).splitlines() if line.strip()]
            raise ConfigError("training_params.compile", "the model cannot be compiled on this machine",
                              " ".join(lines[:2]), "use --compile false") from error

    return call
