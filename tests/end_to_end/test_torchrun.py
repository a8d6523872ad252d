"""Two processes under torchrun against one: equal models, metrics and files; if one dies, both end."""

import itertools
import json
import logging
import signal
import subprocess
import time
from pathlib import Path

import duckdb
import numpy as np
import pandas as pd
import pytest

from common.artifacts import DatasetFolder
from common.checkpoint import Checkpoints
from common.config import resolve
from common.errors import ResourceError
from common.publishing import publish
from quantization.models import CONFIGS
from quantization.models import config_path as quantizer_config
from quantization.pipeline import Options, train
from recommendation.inputs import Choice
from recommendation.models import DEFAULTS
from recommendation.models import config_path as recommender_config
from recommendation.pipeline import Pipeline
from tests.end_to_end.conftest import ROOT
from tests.end_to_end.torchrun import by_hand, in_two_processes
from tests.errors import Outcome
from tests.quantization.tiny_data import save_codes, save_embedding, save_interactions, save_items
from tests.text import lines_with

NUM_ITEMS, NUM_USERS = 120, 60
# One batch of 119 of the 120 items, and one of a single item, which is fewer than there are processes. There are so
# few steps that an item between two codewords, which rounding assigns to either, does not change the result.
QUANTIZE = {"hidden_sizes": "[24]", "latent_size": "8", "num_levels": "2", "codebook_size": "8", "epochs": "3",
            "eval_every": "1", "batch_size": "119", "update": "ema", "sinkhorn_levels": "[-1]"}
# Batches of windows, so that the shards have different numbers of targets, and some batches have one window.
RECOMMEND = {"dropout": "0.0", "d_model": "24", "d_ff": "32", "epochs": "2", "batch_size": "12", "max_history": "8",
             "prior": "none"}
# Python runs this at its start: process 1 kills itself as soon as there are two checkpoints.
DIES = """
import glob, os, pathlib, signal, threading, time
def wait():
    while len(glob.glob(os.environ["DIE_AFTER"], recursive=True)) < 2:
        time.sleep(0.005)
    pathlib.Path(os.environ["DIED"]).touch()
    os.kill(os.getpid(), signal.SIGKILL)
if os.environ.get("RANK") == "1":
    threading.Thread(target=wait, daemon=True).start()
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> DatasetFolder:
    """Items in twelve groups, users who walk between neighbouring items, and random codes."""
    folder, rng = DatasetFolder(tmp_path_factory.mktemp("torchrun") / "data", "Tiny"), np.random.default_rng(0)
    save_items(folder, NUM_ITEMS)
    events = []
    for user in range(NUM_USERS):
        size, item = 4 + int(rng.integers(9)), int(rng.integers(NUM_ITEMS))
        for split in ["train"] * (size - 2) + ["valid", "test"]:
            events.append((user, item, split))
            item = (item + int(rng.choice([1, 1, 2, 5]))) % NUM_ITEMS
    save_interactions(folder, events)
    users = pd.DataFrame({"user": range(NUM_USERS), "raw_id": [f"user {user}" for user in range(NUM_USERS)]})
    publish(folder.users, lambda path: duckdb.from_df(users).write_parquet(str(path)), {"inputs": {}})
    groups = rng.normal(size=(12, 16))[np.arange(NUM_ITEMS) // 10]
    save_embedding(folder, "td", groups + 0.4 * rng.normal(size=(NUM_ITEMS, 16)))
    save_codes(folder, np.stack(np.unravel_index(rng.permutation(216)[:NUM_ITEMS], (6, 6, 6)), axis=1), [6, 6, 6])
    return folder


def command_line(script: str, folder: DatasetFolder, run_root: Path, *flags: str) -> list[str]:
    return [str(ROOT / script), "--dataset", "Tiny", "--data_root", str(folder.data_root), "--run_root",
            str(run_root), *flags]


def torchrun(script: str, folder: DatasetFolder, run_root: Path, *flags: str) -> subprocess.CompletedProcess:
    """Run the command in two processes."""
    return in_two_processes(command_line(script, folder, run_root, *flags), run_root.parent)


def words(keys: dict[str, str]) -> list[str]:
    return [f"--{key}={value}" for key, value in keys.items()]


def recommend(folder: DatasetFolder, run_root: Path, keys: dict[str, str]) -> Pipeline:
    """Do the same as `recommendation/main.py`, in this process."""
    config = resolve("encoder_decoder", recommender_config("encoder_decoder"), DEFAULTS, list(keys.items()))
    pipeline = Pipeline(config, folder, Choice(config.name, "q"), run_root, "a command")
    pipeline.execute(force=False)
    return pipeline


@pytest.fixture(scope="module")
def alone(folder) -> Path:
    """The recommender's run in one process."""
    return recommend(folder, folder.data_root.parent / "alone", RECOMMEND).run.folder


def assert_same_recommender(run: Path, other: Path) -> None:
    one, two = (json.loads((folder / "metrics.json").read_text()) for folder in (run, other))
    assert one["protocol"] == two["protocol"]
    for split, protocol in itertools.product(("valid", "test"), ("all", "unseen")):
        ours, theirs = (metrics["alone"][split][protocol] for metrics in (one, two))
        assert ours.pop("by_popularity") == theirs.pop("by_popularity")
        assert ours == pytest.approx(theirs, rel=1e-6)
    predictions = [[json.loads(line) for line in (folder / "predictions.jsonl").read_text().splitlines()]
                   for folder in (run, other)]
    for ours, theirs in zip(*predictions, strict=True):
        assert all(ours[key] == theirs[key] for key in ("user", "items", "unseen"))
        for key in ("scores", "unseen_scores"):
            assert ours[key] == pytest.approx(theirs[key], abs=1e-4)


def test_two_processes_train_the_same_recommender_for_several_seeds(folder, alone, tmp_path):
    done = torchrun("recommendation/main.py", folder, tmp_path / "runs", "--quantizer_name", "q", "--seeds=0,1",
                    *words(RECOMMEND))
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("| encoder_decoder |") == 1
    [path] = (tmp_path / "runs").rglob("seeds.json")
    summary = json.loads(path.read_text())
    assert summary["seeds"] == [0, 1]
    assert all((path.parent / run / "finished.json").exists() for run in summary["runs"])
    [run] = (tmp_path / "runs").rglob(alone.name)  # the ID of a run does not depend on the number of processes
    assert_same_recommender(run, alone)
    losses = [[json.loads(line)["loss_total"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
              for folder in (run, alone)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


def test_a_killed_process_ends_the_other_and_one_resumes(folder, alone, tmp_path, caplog):
    (tmp_path / "sitecustomize.py").write_text(DIES)
    keys, runs = {**RECOMMEND, "checkpoint_seconds": "0"}, tmp_path / "runs"
    line = command_line("recommendation/main.py", folder, runs, "--quantizer_name", "q", *words(keys))
    (code, stderr), (killed, _) = by_hand(line, tmp_path, PYTHONPATH=str(tmp_path), DIED=str(tmp_path / "died"),
                                          DIE_AFTER=f"{runs}/**/step-*.safetensors.meta.json")
    ended = time.time()
    assert killed == -signal.SIGKILL
    Outcome(code, "", stderr).check_error(ResourceError, "torchrun")
    assert ended - (tmp_path / "died").stat().st_mtime < 60
    [checkpoints] = runs.rglob("checkpoints")
    state = Checkpoints(checkpoints, "").load_newest()
    assert (state["epoch"], state["index"]) > (0, 0)
    assert not state["done"]
    with caplog.at_level(logging.INFO):
        run = recommend(folder, runs, keys).run
    assert lines_with("\n".join(caplog.messages), state["epoch"], state["index"])
    assert_same_recommender(run.folder, alone)


def test_two_processes_train_the_same_quantizer(folder, tmp_path):
    config = resolve("rqvae", quantizer_config("rqvae"), CONFIGS / "defaults.yaml", list(QUANTIZE.items()))
    train(config, folder, Options(tmp_path / "alone", "td", None, force=False, strict=False), "a command")
    path = folder.codes("rqvae", "td", None)
    codes = np.load(path)
    done = torchrun("quantization/main.py", folder, tmp_path / "runs", "--force", *words(QUANTIZE))
    assert done.returncode == 0, done.stderr
    assert len(lines_with(done.stdout, path)) == 1  # only one process reports
    assert json.loads((path.with_name(path.name + ".meta.json")).read_text())["command"].startswith("python quant")
    assert np.array_equal(np.load(path), codes)
    files = [next((tmp_path / name).rglob("metrics.jsonl")) for name in ("alone", "runs")]
    assert files[0].parent.name == files[1].parent.name
    for ours, theirs in zip(*([json.loads(line) for line in file.read_text().splitlines()] for file in files),
                            strict=True):
        assert {key: value for key, value in ours.items() if key != "metrics"} == pytest.approx(
            {key: value for key, value in theirs.items() if key != "metrics"}, rel=1e-5)
        for key, value in ours["metrics"].items():
            assert value == pytest.approx(theirs["metrics"][key], rel=1e-5), key
