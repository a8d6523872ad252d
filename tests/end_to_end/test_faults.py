"""Kill, resume, stale input and wrong flags, with the real commands."""

import json
import re
import shutil
import signal
import time

import numpy as np
import pytest

from common.checkpoint import Checkpoints
from common.errors import ArtifactError, ConfigError, ResourceError
from common.publishing import file_sha256
from tests.end_to_end.conftest import copy_program
from tests.errors import Outcome
from tests.text import lines_with

NO_SERVER = "http://127.0.0.1:9"  # no server answers there
# Write a checkpoint after every step.
TRAIN = {
    "quantization": "python quantization/main.py --epochs 12 --eval_every 4 --checkpoint_seconds 0 "
                    "--hidden_sizes [64]",
    "recommendation": "python recommendation/main.py --model=sasrec --max_steps 24 --checkpoint_seconds 0 "
                      "--batch_size 64 --d_model 32"}


def output_files(tree, stage):
    """The files of a run that must not depend on interruptions."""
    runs = tree.root / "runs" / stage
    files = [*runs.rglob("metrics.jsonl"), *runs.rglob("best.safetensors"), *runs.rglob("metrics.json"),
             *runs.rglob("predictions.jsonl"), *tree.root.glob("data/Baby/*.codes-*.npy")]
    return {str(path.relative_to(tree.root)): path for path in files}


def outputs(tree, stage):
    return {name: path.read_bytes() for name, path in output_files(tree, stage).items()}


def written_at(tree, stage):
    return {name: path.stat().st_mtime_ns for name, path in output_files(tree, stage).items()}


def stop_after(tree, stage, command, num_checkpoints, signal_number):
    """Start a command, send it a signal when it has written some checkpoints, and return its outcome."""
    process = tree.start(*command)
    deadline = time.monotonic() + 120
    pattern = "step-*.safetensors.meta.json"
    while process.poll() is None and time.monotonic() < deadline:
        steps = [int(path.name[5:14]) for path in tree.root.glob(f"runs/{stage}/Baby/**/{pattern}")]
        if max(steps, default=0) >= num_checkpoints:
            process.send_signal(signal_number)
            break
        time.sleep(0.01)
    out, err = process.communicate(timeout=60)
    return Outcome(process.returncode, out, err)


@pytest.mark.parametrize(("stage", "stopped_by", "ending"), [
    ("quantization", signal.SIGKILL, -signal.SIGKILL), ("recommendation", signal.SIGTERM, 143)])
def test_a_resumed_run_has_the_bytes_of_an_uninterrupted_one(baby, stage, stopped_by, ending):
    command = TRAIN[stage].split()
    stopped = stop_after(baby, stage, command, 6, stopped_by)
    assert stopped.code == ending, stopped.err
    assert ("Fix: " in stopped.err) == (stopped_by == signal.SIGTERM)
    newest = max(baby.root.glob(f"runs/{stage}/**/step-*.safetensors"), key=lambda path: path.name)
    newest.write_bytes(newest.read_bytes()[:1000])
    state = Checkpoints(newest.parent, "").load_newest()  # the one before the damaged one
    assert (state["epoch"], state["index"]) > (0, 0)
    resumed = baby.command(*command)
    assert resumed.code == 0, resumed.err
    assert newest.name in resumed.err
    assert lines_with(resumed.out, state["epoch"], state["index"])
    with_faults, written = outputs(baby, stage), written_at(baby, stage)
    again = baby.command(*command, "--force")
    assert again.code == 0, again.err
    assert outputs(baby, stage) == with_faults
    assert len(with_faults) >= 3
    assert all(time > written[name] for name, time in written_at(baby, stage).items() if name.startswith("runs"))


def test_output_to_an_ascii_terminal_is_escaped(whole_run):
    tree, _ = whole_run
    ascii_locale = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONIOENCODING": "ascii"}
    explained = tree.command("python", "quantization/main.py", "--explain", **ascii_locale)
    assert explained.code == 0, explained.err
    assert re.search(r"\\u[0-9a-f]{4}", explained.out)
    compared = tree.command("python", "recommendation/main.py", "--compare", **ascii_locale)
    assert compared.code == 0, compared.err
    assert r"\u00b1" in compared.out
    rows = [line.split("|")[1].strip() for line in compared.out.splitlines() if line.startswith("| ")]
    assert rows[0] == "model"
    assert sorted(rows[1:]) == ["encoder_decoder", "markov", "popularity"]
    assert (tree.root / "runs/recommendation/Baby/compare.csv").read_text().count("\n") == 4


def test_stale_codes_are_refused_with_the_command_that_rebuilds_them(whole_run, baby):
    for codes in whole_run[0].data("").glob("*.codes-rqvae-td.npy*"):
        shutil.copy(codes, baby.data(codes.name))
    embedding, meta = baby.data("Baby.emb-td.npy"), baby.data("Baby.emb-td.npy.meta.json")
    np.save(embedding, np.load(embedding)[:, ::-1].copy())
    meta.write_text(json.dumps({**json.loads(meta.read_text()), "sha256": file_sha256(embedding)}))
    outcome = baby.command("python", "recommendation/main.py", "--model=encoder_decoder")
    outcome.check_error(
        ArtifactError, baby.data("Baby.codes-rqvae-td.npy"), names=["Baby.emb-td.npy"],
        fix=["python quantization/main.py --quantizer_name rqvae --embedding_suffix td --force"])


@pytest.mark.parametrize(("words", "where", "names", "fix"), [
    ("quantization/main.py --quantizer_name rqva", "--quantizer_name rqva", "'rqvae'", "--quantizer_name rqvae"),
    ("quantization/main.py --dataset Babi", "--dataset Babi", "'Baby'", "--dataset Baby"),
    ("quantization/main.py --epoch 3", "--epoch", "'epochs'", ""),
    ("quantization/main.py --epochs many", "--epochs", "'many' int", ""),
    ("quantization/main.py --set common.sead=1", "--common.sead", "'common.seed'", ""),
    ("recommendation/main.py --model=encoder_decode", "--model encoder_decode", "'encoder_decoder'",
     "--model encoder_decoder"),
    ("recommendation/main.py --lr=-1", "--lr", "encoder_decoder.training_params.lr -1.0 0", ""),
    ("recommendation/main.py --compare --seeds=1,2", "--compare", "--seeds", "--seeds"),
    ("quantization/main.py --explain --epochs 3", "--compare, --explain, --export", "--epochs", "--epochs"),
    ("run_pipeline.py --dataset Babyy", "--dataset Babyy", "'Baby'", "--dataset Baby"),
    ("run_pipeline.py --quantiser_name rqvae", "--quantiser_name", "'quantizer_name'", ""),
    ("run_pipeline.py --template {titel}", "--template {titel}", "'titel' title description", ""),
    ("run_pipeline.py --suffix=image --modalities=text", "--modalities text", "--suffix", "--modalities image"),
    ("recommendation/main.py --category ../Baby", "--dataset", "'../Baby'", "")])
def test_a_wrong_flag_is_refused_quickly_and_writes_nothing(baby, words, where, names, fix):
    before = sorted(baby.root.rglob("*"))
    outcome = baby.command("python", "-X", "importtime", *words.split(), PYTHONDONTWRITEBYTECODE="1")
    imported = {line.split("|")[-1].strip() for line in outcome.err.splitlines() if line.startswith("import time:")}
    assert not imported & {"torch", "pandas", "duckdb", "transformers"}  # slow imports
    outcome.check_error(ConfigError, where, names=names.split(), fix=[fix])
    assert sorted(baby.root.rglob("*")) == before


@pytest.fixture(scope="module", autouse=True)
def offline(tmp_path_factory):
    """A whole job without a network. Its retries take ten seconds, during which other tests run."""
    tree = copy_program(tmp_path_factory.mktemp("offline"))
    process = tree.start("bash", "run_pipeline.sh", "--dataset", "Beauty", "--mirror", NO_SERVER,
                         http_proxy=NO_SERVER, https_proxy=NO_SERVER)
    yield tree, process
    process.kill()


def test_without_network_one_error_lists_all_addresses(offline):
    tree, process = offline
    out, err = process.communicate(timeout=100)
    Outcome(process.returncode, out, err).check_error(
        ResourceError, "Beauty", names=[f"{NO_SERVER}/reviews_Beauty_5.json.gz", "snap.stanford.edu"],
        fix=["--mirror", "--raw_dir"])
    assert not (tree.root / "data/Beauty/interactions.parquet").exists()
