import errno
import json
import logging
import math
import os
import stat
import string
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import nn

from common.checkpoint import Checkpoints, load_state, restore, restore_optimizer, save_state
from common.errors import ArtifactError, DataError
from common.publishing import meta_path, publish
from common.reading import Record
from tests.common.helpers import flip_a_bit
from tests.errors import refused


@pytest.fixture
def checkpoints(tmp_path):
    return Checkpoints(tmp_path, "python train.py")


def round_trip(tmp_path, state: dict) -> dict:
    save_state(tmp_path / "state.safetensors", state, "train")
    return load_state(tmp_path / "state.safetensors", "train --force")


def truncate(path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def lose_the_meta(path) -> None:
    meta_path(path).unlink()


def test_plain_values_come_back_as_they_were(tmp_path):
    state = {"epoch": 3, "value": 0.1, "tiny": 5e-324, "none": None, "done": False, "name": "é", "empty": {},
             "list": [1, [2.5, None], []], "of ints": {0: "a", 7: {1: "b"}, -1: 2}}
    assert round_trip(tmp_path, state) == state


def test_integer_and_text_keys_stay_apart(tmp_path):
    back = round_trip(tmp_path, {"a": {1: torch.tensor([1.0]), "1": torch.tensor([2.0])}})["a"]
    assert {type(key): value.item() for key, value in back.items()} == {int: 1.0, str: 2.0}


def test_keys_with_slashes_stay_apart(tmp_path):
    back = round_trip(tmp_path, {"a/b": torch.tensor([1.0]), "a": {"b": torch.tensor([2.0])}})
    assert (back["a/b"].item(), back["a"]["b"].item()) == (1.0, 2.0)


@pytest.mark.parametrize("tensor", [
    torch.tensor(3), torch.tensor([1.5, -0.0, float("inf")]), torch.zeros(0, 4), torch.tensor([True, False]),
    torch.tensor([[1.0, 2.0]], dtype=torch.float64), torch.tensor([1.5], dtype=torch.bfloat16),
    torch.tensor([2**62], dtype=torch.int64), torch.arange(6).reshape(2, 3).T, torch.arange(6)[::2]],
    ids=["scalar", "floats", "empty", "bool", "double", "bfloat16", "int64", "transposed", "strided"])
def test_tensors_come_back_with_their_type_and_shape(tmp_path, tensor):
    back = round_trip(tmp_path, {"t": [tensor]})["t"][0]
    assert back.dtype == tensor.dtype
    assert back.shape == tensor.shape
    assert torch.equal(back, tensor)


def test_not_a_number_is_saved_as_such(tmp_path):
    back = round_trip(tmp_path, {"value": float("nan"), "t": torch.tensor([float("nan")])})
    assert back["value"] != back["value"]
    assert back["t"].isnan().all()


def test_tied_weights_come_back_tied(tmp_path):
    def tied():
        model = nn.ModuleList([nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False)])
        model[1].weight = model[0].weight
        return model

    model = tied()
    back = round_trip(tmp_path, model.state_dict())
    other = tied()
    other.load_state_dict(back)
    assert torch.equal(other[0].weight, model[0].weight)
    assert other[0].weight is other[1].weight


def test_training_can_continue_after_saving(tmp_path):
    weight = nn.Parameter(torch.ones(2))
    round_trip(tmp_path, {"w": weight})
    with torch.no_grad():
        weight += 1
    assert torch.equal(load_state(tmp_path / "state.safetensors", "")["w"], torch.ones(2))


@pytest.mark.parametrize("kind", ["AdamW", "Adam", "SGD"])
def test_a_restored_optimizer_takes_the_same_steps(tmp_path, kind):
    def step(weight, optimizer):
        optimizer.zero_grad()
        (weight.square().sum() + weight.prod()).backward()
        optimizer.step()

    weight = nn.Parameter(torch.tensor([1.0, -2.0, 3.0]))
    optimizer = getattr(torch.optim, kind)([weight], lr=0.1, weight_decay=0.01)
    step(weight, optimizer)
    back = round_trip(tmp_path, {"weight": weight, "optimizer": optimizer.state_dict()})
    copy = nn.Parameter(back["weight"])
    resumed = getattr(torch.optim, kind)([copy], lr=99.0)
    resumed.load_state_dict(back["optimizer"])
    for _ in range(3):
        step(weight, optimizer)
        step(copy, resumed)
    assert torch.equal(weight, copy)


def test_the_same_state_makes_the_same_bytes(tmp_path):
    state = {"b": torch.arange(3.0), "a": torch.arange(4), "n": {2: 0.1, 1: None}}
    files = [tmp_path / "one.safetensors", tmp_path / "two.safetensors"]
    for file in files:
        save_state(file, state, "train")
    assert files[0].read_bytes() == files[1].read_bytes()


def test_a_checkpoint_holds_no_pickle(tmp_path):
    save_state(tmp_path / "state.safetensors", {"t": torch.ones(1), "epoch": 3}, "train")
    content = (tmp_path / "state.safetensors").read_bytes()
    header = json.loads(content[8:8 + int.from_bytes(content[:8], "little")])
    assert json.loads(header["__metadata__"]["state"]) == {"dict": [["t", {"tensor": "/t"}], ["epoch", {"value": 3}]]}


def test_a_state_that_json_cannot_hold_writes_nothing(tmp_path):
    with pytest.raises(TypeError):
        save_state(tmp_path / "state.safetensors", {"x": object()}, "train")
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_is_not_a_checkpoint_is_refused(tmp_path):
    path = tmp_path / "state.safetensors"
    publish(path, lambda staged: staged.write_bytes(b"nothing of the kind"), {"inputs": {}})
    with refused(ArtifactError, path, fix=["train --force"]):
        load_state(path, "train --force")


DEEP = '{"list": [' * 20_000 + '{"value": 1}' + "]}" * 20_000
MODEL = '{"dict": [["model", %s]]}'


@pytest.mark.parametrize("skeleton", [
    None, "", "{", "[]", "null", "3", '"x"', DEEP, '{"value": 5}', '{"list": []}', '{"dict": [], "list": []}', "{}",
    '{"tensor": "gone"}', '{"dict": [5]}', '{"dict": 5}', '{"dict": [[[], {"value": 1}]]}', MODEL % '{"list": []}',
    MODEL % '{"value": null}', MODEL % '{"dict": [["w", {"value": 1}]]}', MODEL % '{"dict": [[5, {"tensor": "w"}]]}'])
def test_a_state_that_is_damaged_is_refused(tmp_path, skeleton):
    path = tmp_path / "state.safetensors"
    metadata = None if skeleton is None else {"state": skeleton}
    publish(path, lambda staged: save_file({"w": torch.ones(2)}, staged, metadata=metadata), {"inputs": {}})
    with refused(ArtifactError, path, fix=["train --force"]):
        load_state(path, "train --force")


@pytest.mark.parametrize(("key", "value"), [
    ("epoch", "3"), ("index", None), ("num_lines", 2.0), ("done", 1), ("totals", {"loss": 0.5}), ("optimizer", []),
    ("model", {"w": 1}), ("best", []), ("best", [1, 0.5]), ("best", ["1", 0.5, {}]), ("best", {"epoch": 1})])
def test_a_value_of_wrong_type_is_named_with_its_key(tmp_path, key, value):
    with refused(ArtifactError, tmp_path / "state.safetensors", names=[key], fix=["train --force"]):
        round_trip(tmp_path, {key: value})


def test_a_value_that_is_missing_is_named_when_needed(tmp_path):
    with refused(ArtifactError, tmp_path / "state.safetensors", names=["'model'"], fix=["train --force"]):
        round_trip(tmp_path, {"epoch": 3})["model"]


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_weights_that_are_not_finite_are_refused(checkpoints, caplog, bad):
    good = {"model": {"fine": torch.ones(2), "count": torch.tensor(3)}}
    checkpoints.save(1, good)
    checkpoints.save(2, {"model": {"fine": torch.ones(2), "bad.weight": torch.tensor([1.0, bad])}})
    with caplog.at_level(logging.WARNING):
        assert checkpoints.load_newest()["model"].keys() == good["model"].keys()
    assert "bad.weight" in caplog.text
    checkpoints.save_best({"model": {"bad.weight": torch.tensor([1.0, bad])}})
    with refused(ArtifactError, checkpoints.best, names=["bad.weight"], fix=["python train.py --force"]):
        checkpoints.load_best()


@pytest.mark.parametrize("content", [{}, {"state": {}, "param_groups": 5}, {"state": {}, "param_groups": []},
                                     {"state": {}, "param_groups": [{"params": [0]}]}])
def test_a_state_of_another_optimizer_is_refused(tmp_path, content):
    state = round_trip(tmp_path, {"optimizer": content})
    with refused(ArtifactError, tmp_path / "state.safetensors", fix=["train --force"]):
        restore_optimizer(torch.optim.AdamW(nn.Linear(2, 1).parameters()), state)


def test_without_checkpoints_there_is_nothing_to_load(checkpoints):
    assert checkpoints.load_newest() is None


def test_the_newest_two_are_kept(checkpoints):
    for step in (9, 10, 100):
        checkpoints.save(step, {"step": step})
    assert checkpoints.load_newest() == {"step": 100}
    assert {path.name for path in checkpoints.folder.iterdir()} == {
        "step-000000010.safetensors", "step-000000010.safetensors.meta.json",
        "step-000000100.safetensors", "step-000000100.safetensors.meta.json"}


def test_saving_a_step_again_replaces_it(checkpoints):
    checkpoints.save(5, {"done": False})
    checkpoints.save(5, {"done": True})
    assert checkpoints.load_newest() == {"done": True}
    assert len(checkpoints.numbered()) == 1


@pytest.mark.parametrize("name", [".step-000000001.safetensors.tmp-99999999", ".tmp4TybpU"])  # of safetensors itself
def test_files_of_a_killed_process_are_removed(checkpoints, name):
    left = checkpoints.folder / name
    left.write_bytes(b"half")
    checkpoints.save(2, {"step": 2})
    assert not left.exists()
    left.write_bytes(b"half")
    checkpoints.load_newest()
    assert not left.exists() or name.startswith(".step")
    left.write_bytes(b"half")
    checkpoints.save_best({"step": 2})  # a model that is fitted in one call saves nothing else
    assert not left.exists() or name.startswith(".step")


def test_an_old_checkpoint_that_was_deleted_by_half_disappears(checkpoints):
    for step in (1, 2, 3):
        checkpoints.save(step, {"step": step})
    (checkpoints.folder / "step-000000001.safetensors").write_bytes(b"old")  # killed after the meta file was deleted
    assert checkpoints.load_newest() == {"step": 3}
    assert [path.name[:14] for path in checkpoints.numbered()] == ["step-000000003", "step-000000002"]


@pytest.mark.parametrize("damage", [truncate, flip_a_bit, lose_the_meta])
def test_a_damaged_newest_checkpoint_is_skipped_with_a_warning(checkpoints, caplog, damage):
    for step in (1, 2):
        checkpoints.save(step, {"step": step, "t": torch.ones(3)})
    damage(checkpoints.numbered()[0])
    with caplog.at_level(logging.WARNING):
        assert checkpoints.load_newest()["step"] == 1
    [record] = caplog.records
    assert record.levelname == "WARNING"
    assert "step-000000002.safetensors" in record.getMessage()


@pytest.mark.parametrize("damage", [truncate, flip_a_bit, lose_the_meta])
def test_a_damaged_best_checkpoint_is_an_error(checkpoints, damage):
    checkpoints.save(1, {"step": 1, "t": torch.ones(3)})
    checkpoints.save_best({"step": 1, "t": torch.ones(3)})
    damage(checkpoints.best)
    with refused(ArtifactError, checkpoints.best, fix=["python train.py --force"]):
        checkpoints.load_best()


def test_a_checkpoint_of_another_run_is_refused(tmp_path):
    own, foreign = (Checkpoints(tmp_path / run / "checkpoints", "train") for run in ("own", "0123456789ab"))
    for checkpoints in (own, foreign):
        checkpoints.save_best({"weights": torch.ones(3)})
    own.load_best()
    for file in foreign.folder.iterdir():
        file.replace(own.folder / file.name)
    with refused(ArtifactError, own.best, names=["0123456789ab"], fix=["train --force"]):
        own.load_best()


def test_a_full_disk_raises_its_system_error(checkpoints, monkeypatch):
    def full(*_, **__):
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr("common.checkpoint.save_file", full)
    with pytest.raises(OSError, match=os.strerror(errno.ENOSPC)) as caught:
        checkpoints.save(1, {"weights": torch.ones(3)})
    assert caught.value.errno == errno.ENOSPC


def test_a_checkpoint_has_the_permissions_of_the_umask(checkpoints):
    before = os.umask(0o022)
    try:
        checkpoints.save_best({"weights": torch.ones(3)})
    finally:
        os.umask(before)
    assert stat.S_IMODE(checkpoints.best.stat().st_mode) == 0o644


def test_a_missing_best_checkpoint_is_an_error(checkpoints):
    checkpoints.save(1, {"step": 1})
    with refused(DataError, checkpoints.best, fix=["python train.py --force"]):
        checkpoints.load_best()


def state_of(tensors: dict[str, torch.Tensor]) -> Record:
    return Record({"model": tensors}, Path("best"), "train --force")


def test_a_state_that_fits_is_given_to_the_model():
    model, other = nn.Linear(3, 2), nn.Linear(3, 2)
    restore(model, state_of(other.state_dict()))
    assert torch.equal(model.weight, other.weight)


def test_a_model_refuses_other_keys_and_keeps_its_weights():
    model = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2, bias=False))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state = {"0.weight": torch.zeros(2, 4), "0.bias": torch.zeros(2), "7.scale": torch.zeros(1)}
    with refused(ArtifactError, "best", names=["1.weight", "7.scale", "0.weight", "(2, 4)", "(2, 3)"],
                 fix=["train --force"]) as raised:
        restore(model, state_of(state))
    assert "0.bias" not in str(raised.value)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_of_many_other_keys_five_are_named():
    keys = [f"layer_{letter}" for letter in string.ascii_lowercase]
    with refused(ArtifactError, "best", names=[*keys[:5], 21], fix=["train --force"]) as raised:
        restore(nn.Identity(), state_of({key: torch.zeros(1) for key in keys}))
    assert not [key for key in keys[5:] if key in str(raised.value)]


def test_empty_buffers_come_back_with_their_size():
    model = nn.Module()
    model.register_buffer("counts", torch.zeros(2, dtype=torch.float64))
    model.register_buffer("pairs", torch.zeros(0, dtype=torch.int64))
    exact = 1 + 2.0**-40  # which a float32 could not hold
    counts = torch.tensor([exact, 0.0], dtype=torch.float64)
    restore(model, state_of({"counts": counts, "pairs": torch.tensor([3, 1, 2])}))
    assert model.counts[0].item() == exact
    assert model.pairs.tolist() == [3, 1, 2]
    with refused(ArtifactError, "best", names=["counts", "(3)", "(2)"]):
        restore(model, state_of({"counts": torch.zeros(3, dtype=torch.float64), "pairs": torch.tensor([3])}))


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.complex64, torch.bfloat16, torch.float64])
def test_tensors_of_another_type_are_refused(dtype):
    model = nn.BatchNorm1d(2)
    before, state = model.state_dict(), model.state_dict()
    for name in ("weight", "running_mean"):
        with refused(ArtifactError, "best", names=[name, str(dtype).removeprefix("torch.")], fix=["train --force"]):
            restore(model, state_of(state | {name: torch.ones(2).to(dtype)}))
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("key", ["model", "optimizer"])
def test_tensors_of_a_foreign_type_are_refused(tmp_path, key):
    with refused(ArtifactError, tmp_path / "state.safetensors", names=["float8"], fix=["train --force"]):
        round_trip(tmp_path, {key: {"w": torch.ones(2).to(torch.float8_e4m3fn)}})


def flat(values: dict) -> dict:
    return values | {name: values[name].reshape(-1)[:1] for name in ("exp_avg", "exp_avg_sq")}


@pytest.mark.parametrize("damage", [
    flat, lambda values: values | {"exp_avg": values["exp_avg"].double()}, lambda values: {"step": values["step"]},
    lambda values: values | {"step": torch.ones(2, 3)}, lambda values: values | {"step": 3},
    lambda values: values | {"step": torch.tensor(math.nan)}, lambda values: values | {"step": torch.tensor(-1.0)},
    lambda values: values | {"max_exp_avg_sq": values["exp_avg_sq"]}, lambda values: 5],
    ids=["flat", "double", "missing", "step", "number", "nan", "negative", "more", "no dict"])
def test_moments_that_do_not_fit_the_parameter_are_refused(tmp_path, damage):
    model = nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    state = optimizer.state_dict()
    restore_optimizer(optimizer, round_trip(tmp_path, {"optimizer": state}))
    for number in (0, 1):
        changed = state["state"] | {number: damage(state["state"][number])}
        with refused(ArtifactError, tmp_path / "state.safetensors", fix=["train --force"]):
            restore_optimizer(optimizer, round_trip(tmp_path, {"optimizer": state | {"state": changed}}))
    with refused(ArtifactError, tmp_path / "state.safetensors"):  # -1 would be the last parameter
        restore_optimizer(optimizer, round_trip(tmp_path, {"optimizer": state | {"state": {-1: state["state"][1]}}}))


def test_a_checkpoint_that_does_not_fit_gives_the_previous_one(checkpoints):
    def use(state):
        if state["epoch"] > largest:
            raise ArtifactError(state.path, "does not fit")

    for step in (1, 2):
        checkpoints.save(step, {"epoch": step})
    largest = 1
    assert checkpoints.load_newest(use) == {"epoch": 1}
    largest = 0
    with refused(ArtifactError, checkpoints.numbered()[-1]):
        checkpoints.load_newest(use)
