"""Checkpoints without pickle: safetensors files. Values that are not tensors are stored in the file as JSON."""

import json
import logging
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from common.distributed import barrier, is_main
from common.errors import ArtifactError, UserError
from common.metas import verify
from common.publishing import meta_path, publish, sweep
from common.reading import Record, parse_json, shortened

log = logging.getLogger(__name__)

NUM_KEPT = 2   # the newest checkpoint, and the previous one in case the newest cannot be read
NUM_NAMED = 5  # an error message names at most this many keys
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
        return self.folder / "best.safetensors"

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

    def save_best(self, state: dict) -> None:
        if is_main():
            save_state(self.best, state, self.command)
        barrier()

    def load_newest(self) -> Record | None:
        """Load the newest numbered checkpoint that can be read. Return None if none can be read."""
        if is_main():
            self._delete_old()  # the process that saved the last checkpoint may have been killed
        for path in self.numbered():
            try:
                return load_state(path, f"{self.command} --force")
            except UserError as error:
                log.warning("skipped a checkpoint, trying the previous one: %s", error)
        return None

    def load_best(self) -> Record:
        """Load the best checkpoint. Raises the errors of `load_state`."""
        return load_state(self.best, f"{self.command} --force")


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
    if bad := [name for name, tensor in state.get("model", {}).items() if not tensor.isfinite().all()]:
        raise ArtifactError(path, "has weights that are NaN or infinite", _some(bad), fix)
    return state


def restore(model: torch.nn.Module, state: dict[str, torch.Tensor], path: Path, fix: str) -> None:
    """Load the tensors of a checkpoint into a model.

    state: key -> tensor
    path: the file of the checkpoint, for errors

    Buffers get the dtype of the checkpoint. Empty buffers also get the shape of the checkpoint. Raises ArtifactError if
    the keys or the shapes do not match the model.
    """
    # A model may fill a buffer only while it is fitted. Until then, the buffer is empty.
    for name, buffer in list(model.named_buffers()):
        if name in state and (buffer.dtype != state[name].dtype or not buffer.numel()):
            owner, _, own = name.rpartition(".")
            setattr(model.get_submodule(owner), own, torch.empty(
                buffer.shape if buffer.numel() else state[name].shape, dtype=state[name].dtype, device=buffer.device))
    wanted = model.state_dict()
    missing, unexpected = ([name for name in one if name not in other] for one, other in
                           ((wanted, state), (state, wanted)))
    shapes = [f"{name} is {_shape(state[name])} in the checkpoint and {_shape(tensor)} in the model"
              for name, tensor in wanted.items() if name in state and state[name].shape != tensor.shape]
    found = [f"{what} {_some(names)}" for what, names in
             (("Missing keys:", missing), ("Unexpected keys:", unexpected), ("Different shapes:", shapes)) if names]
    if found:
        raise ArtifactError(path, "does not match the model", "; ".join(found), fix)
    model.load_state_dict(state)


def restore_optimizer(optimizer: torch.optim.Optimizer, state: Record) -> None:
    """Load the entry `optimizer` of a checkpoint. Raises ArtifactError if it does not fit the optimizer."""
    try:
        optimizer.load_state_dict(state["optimizer"])
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ArtifactError(state.path, "has a state of another optimizer", shortened(str(error)), state.fix) from error


def _shape(tensor: torch.Tensor) -> str:
    return f"({', '.join(map(str, tensor.shape))})"


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
