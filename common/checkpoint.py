"""Checkpoints without pickle: safetensors files. Values that are not tensors are stored in the file as JSON."""

import json
import logging
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from common.distributed import barrier, is_main
from common.errors import ArtifactError, UserError
from common.metas import verify
from common.publishing import meta_path, publish, sweep
from common.reading import WHY, Record, parse_json, shortened

log = logging.getLogger(__name__)

NUM_KEPT = 2   # the newest checkpoint, and the previous one in case the newest cannot be read
NUM_NAMED = 5  # an error message names at most this many keys
# The types of tensors in a checkpoint. Others, such as float8, lack operations that every reader needs.
DTYPES = {torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.float16, torch.bfloat16,
          torch.float32, torch.float64, torch.complex64, torch.complex128}
MOMENTS = ("exp_avg", "exp_avg_sq")  # the tensors of Adam and AdamW for each parameter; SGD has none
# The types of the values in the states of training runs. Not every state has all of them.
TYPES = {"model": dict[str, torch.Tensor], "optimizer": dict, "epoch": int, "index": int, "num_lines": int,
         "totals": dict[str, torch.Tensor], "done": bool, "best": tuple[int, float, dict]}


class Checkpoints:
    """The checkpoints of one run: numbered checkpoints, from which training continues, and the best checkpoint.

    If there are several processes, all of them must call the same methods in the same order. Only the first process
    writes files; the others wait.
    """

    def __init__(self, folder: Path, command: str):
        self.folder, self.command = folder, command

    @property
    def best(self) -> Path:
        return self.path_of("best")

    def path_of(self, name: str) -> Path:
        return self.folder / f"{name}.safetensors"

    def numbered(self) -> list[Path]:
        """Return the numbered checkpoints, newest first."""
        return sorted(self.folder.glob("step-*.safetensors"), reverse=True)

    def save(self, step: int, state: dict) -> None:
        if is_main():
            save_state(self.folder / f"step-{step:09d}.safetensors", state, self.command)
            self._delete_old()
            sweep(self.folder, "step-*")
        barrier()

    def _delete_old(self) -> None:
        for old in self.numbered()[NUM_KEPT:]:
            # If the process is killed between the two calls, the next call of this method finds the checkpoint again.
            meta_path(old).unlink(missing_ok=True)
            old.unlink()
        self._delete_leftovers()

    def _delete_leftovers(self) -> None:
        # safetensors writes to such a file before it renames it. Only this process writes here, as it locks the run.
        for leftover in self.folder.glob(".tmp??????"):
            leftover.unlink()

    def save_best(self, state: dict) -> None:
        self.save_named("best", state)

    def save_named(self, name: str, state: dict) -> None:
        """Save a state that belongs to the run, such as a prior. There is one state for each name."""
        if is_main():
            save_state(self.path_of(name), state, self.command)
            self._delete_leftovers()  # a model that is fitted in one call has no other checkpoint
        barrier()

    def load_newest(self, use: Callable[[Record], None] = lambda state: None) -> Record | None:
        """Load the newest numbered checkpoint that can be used. Return None if no checkpoint can be read.

        use: called with the state; raises ArtifactError if the state does not fit. The next older checkpoint
            is then tried. If no readable checkpoint fits, the error of the oldest one is raised.
        """
        if is_main():
            self._delete_old()  # the process that saved the last checkpoint may have been killed
        misfit = None
        for path in self.numbered():
            state = None
            try:
                state = load_state(path, f"{self.command} --force")
                use(state)
                return state
            except UserError as error:
                log.warning("skipped a checkpoint, trying the previous one: %s", error)
                misfit = error if state is not None else misfit
        if misfit is not None:
            raise misfit
        return None

    def load_best(self, model: torch.nn.Module | None = None) -> Record:
        """Load the best checkpoint, and restore the model if one is given.

        Raises the errors of `load_state` and of `restore`.
        """
        return self.load_named("best", model)

    def load_named(self, name: str, model: torch.nn.Module | None = None) -> Record:
        """Load the state that `save_named` has saved, and restore the model if one is given."""
        state = load_state(self.path_of(name), f"{self.command} --force")
        if model is not None:
            restore(model, state)
        return state


def save_state(path: Path, state: dict, command: str) -> None:
    """Write a state to the file `path`, which must be `<run>/checkpoints/<file>`.

    A state consists of nested dicts and lists of tensors and JSON values.
    """
    tensors: dict[str, torch.Tensor] = {}
    skeleton = json.dumps(_split(state, "", tensors))

    def write(staged: Path) -> None:
        with system_errors(path):
            save_file(tensors, staged, metadata={"state": skeleton})

    # With the name of the run, `load_state` can reject a checkpoint that was copied from another run.
    publish(path, write, {"inputs": {}, "command": command, "run": path.parent.parent.name},
            sum(tensor.nbytes for tensor in tensors.values()))


@contextmanager
def system_errors(path: Path) -> Iterator[None]:
    """If writing a safetensors file to `path` fails, raise the OSError that safetensors hides."""
    try:
        yield
    except SafetensorError as error:
        if number := re.search(r"os error (\d+)", str(error)):
            raise OSError(int(number[1]), os.strerror(int(number[1])), str(path)) from error
        raise


def load_state(path: Path, fix: str) -> Record:
    """Load a state that `save_state` has written.

    Raises DataError if the file is missing. Raises ArtifactError if the file is damaged or belongs to another run, or
    if weights of the model are not finite.
    """
    run = verify(path, fix).get("run", path.parent.parent.name)
    if run != path.parent.parent.name:
        raise ArtifactError(path, f"is a checkpoint of run {run}", "It was copied from the folder of another run", fix)
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
            values = _join(parse_json(file.metadata()["state"]), tensors)
            if not isinstance(values, dict):
                raise TypeError(f"The state is of type {type(values).__name__}")
    except (SafetensorError, OSError, KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
        raise ArtifactError(path, "is not a checkpoint", shortened(str(error)), fix) from error
    state = Record(values, path, fix)
    state.check({}, TYPES)
    if foreign := {str(tensor.dtype) for tensor in tensors.values() if tensor.dtype not in DTYPES}:
        raise ArtifactError(path, f"has tensors of type {_some(sorted(foreign))}", WHY, fix)
    if bad := [name for name, tensor in state.get("model", {}).items() if not tensor.isfinite().all()]:
        raise ArtifactError(path, "has weights that are NaN or infinite", _some(bad), fix)
    return state


def restore(model: torch.nn.Module, state: Record) -> None:
    """Load the entry `model` of a checkpoint into a model.

    An empty buffer gets the shape of the checkpoint, because some models fill their buffers only in `fit`. Raises
    ArtifactError if the keys, the types or the shapes do not match the model; the model then keeps its weights.
    """
    given, wanted, empty = state["model"], model.state_dict(), _empty_buffers(model)
    missing, unexpected = ([name for name in one if name not in other] for one, other in
                           ((wanted, given), (given, wanted)))
    different = [f"{name} is {_kind(given[name])} in the checkpoint and {_kind(tensor)} in the model"
                 for name, tensor in wanted.items() if name in given and (given[name].dtype != tensor.dtype or (
                     name not in empty and given[name].shape != tensor.shape))]
    found = [f"{what} {_some(names)}" for what, names in
             (("Missing keys:", missing), ("Unexpected keys:", unexpected), ("Different tensors:", different)) if names]
    if found:
        raise ArtifactError(state.path, "does not match the model", "; ".join(found), state.fix)
    for name, buffer in empty.items():
        owner, _, own = name.rpartition(".")
        setattr(model.get_submodule(owner), own, given[name].to(buffer.device, copy=True))
    model.load_state_dict(given)


def _empty_buffers(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    wanted = model.state_dict()
    return {name: buffer for name, buffer in model.named_buffers() if name in wanted and not buffer.numel()}


def optimizer_state(optimizer: torch.optim.Optimizer | None) -> dict:
    """Return the entry `optimizer` of a checkpoint: the steps and moments, but no options and no learning rate."""
    if optimizer is None:
        return {}
    state = optimizer.state_dict()
    return {"state": state["state"], "param_groups": [{"params": group["params"]} for group in state["param_groups"]]}


def restore_optimizer(optimizer: torch.optim.Optimizer, state: Record) -> None:
    """Load the entry `optimizer` of a checkpoint. Raises ArtifactError if it does not fit the optimizer.

    The options of the optimizer, such as its weight decay, stay those of the configuration.
    """
    own = optimizer.state_dict()["param_groups"]
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    try:
        given = state["optimizer"]
        if [group["params"] for group in given["param_groups"]] != [group["params"] for group in own]:
            raise ValueError(f"The optimizer has {len(parameters)} parameters")
        for number, values in given["state"].items():
            # The fused kernels of PyTorch do not check the shapes, and would read past the end of a tensor.
            fitting = {"step": ((), torch.float32)} | dict.fromkeys(
                MOMENTS, (parameters[number].shape, parameters[number].dtype))
            if number < 0 or isinstance(optimizer, torch.optim.SGD) or values.keys() != fitting.keys() or any(
                    (tensor.shape, tensor.dtype) != fitting[name] for name, tensor in values.items()
            ) or not values["step"] >= 0:
                raise ValueError(f"The state of parameter {number} does not fit it")
        optimizer.load_state_dict({"state": given["state"], "param_groups": own})
    except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
        raise ArtifactError(state.path, "has a state of another optimizer", shortened(str(error)), state.fix) from error


def _kind(tensor: torch.Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} ({', '.join(map(str, tensor.shape))})"


def _some(names: list[str]) -> str:
    more = f" and {len(names) - NUM_NAMED} more" if len(names) > NUM_NAMED else ""
    return ", ".join(names[:NUM_NAMED]) + more


def _split(value, path: str, tensors: dict[str, torch.Tensor]):
    """Copy the tensors of a state into the dict `tensors`, and return the rest of the state as a JSON value.

    In the JSON value, each tensor is replaced by its key in `tensors`.
    """
    if isinstance(value, torch.Tensor):
        while path in tensors:  # two keys can give the same path: 1 and "1", or "a/b" and "b" under "a"
            path += "'"
        # Clone, because safetensors rejects tensors that share memory, such as tied weights.
        tensors[path] = value.detach().cpu().clone().contiguous()
        return {"tensor": path}
    if isinstance(value, dict):
        # A list of pairs, because JSON would convert integer keys to text.
        return {"dict": [[k, _split(v, f"{path}/{k}", tensors)] for k, v in value.items()]}
    if isinstance(value, list | tuple):
        return {"list": [_split(v, f"{path}/{i}", tensors) for i, v in enumerate(value)]}
    return {"value": value}


def _join(skeleton: dict, tensors: dict[str, torch.Tensor]):
    """Return the original state from the two results of `_split`: the JSON value `skeleton` and the tensors."""
    [(kind, content)] = skeleton.items()
    if kind == "tensor":
        return tensors[content]
    if kind == "dict":
        return {k: _join(v, tensors) for k, v in content}
    if kind == "list":
        return [_join(v, tensors) for v in content]
    return content
