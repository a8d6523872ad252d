"""Gradient descent: the optimizer, its learning rate, and a training step. On CUDA, the steps are captured."""

import inspect
import logging
import math
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache

import torch
from torch import Tensor, nn

from common.capture import CapturedSteps, CudaGraphs, Graphs, Losses
from common.data_parallel import data_parallel
from common.distributed import world_size
from common.errors import ConfigError
from common.precision import matmul_precision

log = logging.getLogger(__name__)


def total_steps(num_steps: int, params: dict) -> int:
    """Return the total number of training steps: `epochs` times `num_steps`, but at most `max_steps`.

    num_steps: number of steps per epoch
    """
    return min(params["epochs"] * num_steps, params["max_steps"] or params["epochs"] * num_steps)


def learning_rate(step: int, num_steps: int, params: dict) -> float:
    """Return the learning rate of a step.

    num_steps: total number of steps

    The learning rate increases linearly during the first `warmup_steps` steps. Then it is constant, or it follows a
    cosine and reaches 0 at step `num_steps`.
    """
    warmup = params["warmup_steps"]
    if step < warmup:
        return params["lr"] * (step + 1) / warmup
    if params["lr_schedule"] == "constant":
        return params["lr"]
    progress = (step - warmup) / max(num_steps - warmup, 1)
    return params["lr"] * 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))


def make_optimizer(model: nn.Module, params: dict, capturable: bool = False) -> torch.optim.Optimizer | None:
    """Return an optimizer for the trainable parameters of the model, or None if the model has none.

    capturable: keep the learning rate and the number of steps on the device, as captured steps need it
    """
    trainable = [p for p in model.parameters() if p.requires_grad]
    if not trainable:
        return None
    options = {"lr": params["lr"], "weight_decay": params["weight_decay"], "fused": True}
    if capturable:
        options |= {"lr": torch.tensor(params["lr"], device=trainable[0].device), "capturable": True}
        # Some steps are not captured. That is slower, but the optimizer's warning about it would not help anyone.
        warnings.filterwarnings("ignore", "This instance was constructed with capturable=True")
    return _without_compiler(getattr(torch.optim, params["optimizer"]))(trainable, **options)


@lru_cache
def _without_compiler(optimizer: type[torch.optim.Optimizer]) -> type[torch.optim.Optimizer]:
    """Return a class of the same optimizer whose methods do not import the compiler of PyTorch.

    Nothing is compiled here, but the decorators of these methods import the compiler in the first call. That takes
    more than a second.
    """
    methods = {name: inspect.unwrap(getattr(optimizer, name))
               for name in ("add_param_group", "zero_grad", "state_dict", "load_state_dict")}
    # The decorator of `step` also turns gradients off.
    return type(optimizer.__name__, (optimizer,), methods | {"step": torch.no_grad()(inspect.unwrap(optimizer.step))})


class GradientDescent:
    """Takes the training steps of a model."""

    def __init__(self, model: nn.Module, compute_losses: Callable[..., Losses], params: dict, num_steps: int,
                 graphs: Graphs | None = None):
        """Create the optimizer.

        compute_losses: a function of the inputs of a step; the loss to minimize has the key `loss_total`
        num_steps: number of steps per epoch
        graphs: the operations for captured steps; by default, those of the model's device
        """
        self.model, self.params, self.total_steps = model, params, total_steps(num_steps, params)
        self.device = next((tensor.device for tensor in model.state_dict().values()), torch.device("cpu"))
        if graphs is None and _captures(self.device, params):
            graphs = CudaGraphs(self.device)
        self.optimizer = make_optimizer(model, params, capturable=graphs is not None)
        self.rate: float | None = None  # the last learning rate that was written to the optimizer
        self.losses = data_parallel(model, compute_losses)
        self.graphs = graphs
        self.captured = None if graphs is None else CapturedSteps(self._take, self._state, graphs,
                                                                  params["capture"] is True)

    def stream(self) -> AbstractContextManager:
        """Return a context in which all steps must be taken."""
        return nullcontext() if self.graphs is None else self.graphs.stream()

    def step(self, number: int, inputs: tuple[Tensor, ...], weight: float = 1.0) -> Losses:
        """Take step `number` of the training, and return the losses without gradient.

        weight: factor of the losses, see `Shard.weight`

        The returned tensors may change in the next step.
        """
        if self.optimizer is not None:
            self._set_learning_rate(learning_rate(number, self.total_steps, self.params))
        if self.captured is not None:
            return self.captured(*inputs)
        return self._take(*inputs, weight=weight)

    def check_addresses(self) -> None:
        """Capture the steps again if a tensor of the model has moved. Call this after each change of the model."""
        if self.captured is not None:
            self.captured.check_addresses()

    def _set_learning_rate(self, rate: float) -> None:
        if rate == self.rate:
            return
        assert self.optimizer is not None
        for group in self.optimizer.param_groups:
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(rate)
            else:
                group["lr"] = rate
        self.rate = rate

    def _take(self, *inputs: Tensor, weight: float = 1.0) -> Losses:
        """Run the forward and backward pass, clip the gradients, and update the parameters."""
        if self.optimizer is not None:
            self.optimizer.zero_grad(set_to_none=True)
        with matmul_precision("tf32") if self.device.type == "cuda" else nullcontext():
            losses = self.losses(*inputs)
            if weight != 1.0:
                losses = {name: loss * weight for name, loss in losses.items()}
            if self.optimizer is not None:
                losses["loss_total"].backward()
        if self.optimizer is not None:
            if self.params["clip_norm"]:
                nn.utils.clip_grad_norm_(self.model.parameters(), self.params["clip_norm"])
            self.optimizer.step()
        return {name: loss.detach() for name, loss in losses.items()}

    def _state(self) -> list[list[Tensor]]:
        """Return the tensors that a step changes: parameters, buffers, and the state of the optimizer."""
        states = [] if self.optimizer is None else list(self.optimizer.state.values())
        names = {name: None for of_parameter in states for name in of_parameter}
        return [list(self.model.parameters()), list(self.model.buffers()),
                *([of_parameter[name] for of_parameter in states if name in of_parameter] for name in names)]


def _captures(device: torch.device, params: dict) -> bool:
    """Return whether to capture the steps of a training. Log the reason if they cannot be captured on CUDA.

    Raises ConfigError if `capture: true` is impossible.
    """
    if params["capture"] is False:
        return False
    obstacle = ""
    if device.type != "cuda":
        obstacle = f"the device is {device.type}, and only CUDA can capture steps"
    elif world_size() > 1:
        obstacle = "there are several processes, and captured steps cannot exchange gradients"
    elif params["optimizer"] == "SGD":
        obstacle = "the SGD of PyTorch cannot be captured"
    if obstacle and params["capture"] is True:
        raise ConfigError("training_params.capture", "the steps of this training cannot be captured",
                          obstacle[0].upper() + obstacle[1:], "use --capture auto")
    if obstacle and device.type == "cuda":
        log.info("capture: %s; training continues without captured steps", obstacle)
    return not obstacle
