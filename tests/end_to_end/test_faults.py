"""Kill, resume, stale input and wrong words, through the real commands."""

import shutil
import signal
import time

import pytest

from tests.end_to_end.conftest import copy_program

NOBODY = "http://127.0.0.1:9"  # nobody answers there
# A checkpoint after every step, each on the disk before the next.
TRAIN = {
    "quantization": "python quantization/main.py --epochs 12 --eval_every 4 --checkpoint_seconds 0 "
                    "--hidden_sizes [64]",
    "recommendation": "python recommendation/main.py --model=sasrec --max_steps 24 --checkpoint_seconds 0 "
                      "--batch_size 64 --d_model 32"}


def output_files(tree, stage):
    """Everything that a run leaves behind and that must not depend on its history."""
    runs = tree.root / "runs" / stage
    files = [*runs.rglob("metrics.jsonl"), *runs.rglob("best.safetensors"), *runs.rglob("metrics.json"),
             *runs.rglob("predictions.jsonl"), *tree.root.glob("data/Baby/*.codes-*.npy")]
    return {str(path.relative_to(tree.root)): path for path in files}


def outputs(tree, stage):
    return {name: path.read_bytes() for name, path in output_files(tree, stage).items()}


def written_at(tree, stage):
    return {name: path.stat().st_mtime_ns for name, path in output_files(tree, stage).items()}


def stop_after(tree, stage, command, num_checkpoints, signal_number):
    """Start a command, send it a signal once it has written some checkpoints, and return how it ended."""
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
    return process.returncode, out, err


@pytest.mark.parametrize(("stage", "stopped_by", "ending"), [
    ("quantization", signal.SIGKILL, -signal.SIGKILL), ("recommendation", signal.SIGTERM, 143)])
def test_a_stopped_run_continues_and_ends_with_the_bytes_of_an_undisturbed_one(baby, stage, stopped_by, ending):
    command = TRAIN[stage].split()
    code, _, err = stop_after(baby, stage, command, 6, stopped_by)
    assert code == ending, err
    assert ("the same command again continues" in err) == (stopped_by == signal.SIGTERM)
    newest = max(baby.root.glob(f"runs/{stage}/**/step-*.safetensors"), key=lambda path: path.name)
    newest.write_bytes(newest.read_bytes()[:1000])
    resumed = baby.command(*command)
    assert resumed.code == 0, resumed.err
    assert newest.name in resumed.err
    assert "skipped, taking the one before it" in resumed.err
    assert "continuing after epoch" in resumed.out
    with_faults, written = outputs(baby, stage), written_at(baby, stage)
    again = baby.command(*command, "--force")
    assert (again.code, "reusing" in again.out) == (0, False)
    assert outputs(baby, stage) == with_faults
    assert len(with_faults) >= 3
    assert all(time > written[name] for name, time in written_at(baby, stage).items() if name.startswith("runs"))


def test_tables_and_reports_fit_an_ascii_terminal(whole_run):
    tree, _ = whole_run
    ascii_locale = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONIOENCODING": "ascii"}
    explained = tree.command("python", "quantization/main.py", "--explain", **ascii_locale)
    assert explained.code == 0, explained.err
    assert r"\u00b7" in explained.out
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
    embedding = baby.data("Baby.emb-td.npy.meta.json")
    embedding.write_text(embedding.read_text().replace('"sha256": "', '"sha256": "0', 1))
    outcome = baby.command("python", "recommendation/main.py", "--model=encoder_decoder")
    assert outcome.code == 4
    assert "is stale" in outcome.err
    assert "Fix: python quantization/main.py --quantizer_name rqvae --embedding_suffix td --force" in outcome.err
    assert "Traceback" not in outcome.err


@pytest.mark.parametrize(("words", "message"), [
    (("quantization/main.py", "--quantizer_name", "rqva"), "did you mean 'rqvae'?"),
    (("quantization/main.py", "--dataset", "Babi"), "did you mean 'Baby'?"),
    (("quantization/main.py", "--epoch", "3"), "did you mean 'epochs'?"),
    (("quantization/main.py", "--epochs", "many"), "must be of type int"),
    (("quantization/main.py", "--set", "common.sead=1"), "did you mean"),
    (("recommendation/main.py", "--model=encoder_decode"), "did you mean 'encoder_decoder'?"),
    (("recommendation/main.py", "--lr=-1"), "at least 0"),
    (("recommendation/main.py", "--compare", "--seeds=1,2"), "--compare: --seeds does not go with it"),
    (("quantization/main.py", "--explain", "--epochs", "3"), "--explain, --export: --epochs does not go with it"),
    (("run_pipeline.py", "--dataset", "Babyy"), "did you mean 'Baby'?"),
    (("run_pipeline.py", "--quantiser_name", "rqvae"), "did you mean 'quantizer_name'?"),
    (("run_pipeline.py", "--template", "{titel}"), "there are: title, description"),
    (("run_pipeline.py", "--suffix=image", "--modalities=text"), "--suffix image needs it"),
    (("recommendation/main.py", "--category", "../Baby"), "is not a name"),
])
def test_a_wrong_word_is_refused_at_once_with_the_nearest_real_one_and_nothing_is_written(baby, words, message):
    before = sorted(baby.root.rglob("*"))
    outcome = baby.command("python", "-X", "importtime", *words, PYTHONDONTWRITEBYTECODE="1")
    assert outcome.code == 2
    imported = {line.split("|")[-1].strip() for line in outcome.err.splitlines() if line.startswith("import time:")}
    assert not imported & {"torch", "pandas", "duckdb", "transformers"}  # what would take the time
    assert message in outcome.err
    assert "Fix:" in outcome.err
    assert "Traceback" not in outcome.err
    assert sorted(baby.root.rglob("*")) == before


@pytest.fixture(scope="module", autouse=True)
def offline(tmp_path_factory):
    """A whole job without a network, which tries again for ten seconds beside the other tests."""
    tree = copy_program(tmp_path_factory.mktemp("offline"))
    process = tree.start("bash", "run_pipeline.sh", "--dataset", "Beauty", "--mirror", NOBODY, http_proxy=NOBODY,
                         https_proxy=NOBODY)
    yield tree, process
    process.kill()


def test_no_network_is_one_error_that_lists_all_that_was_tried(offline):
    tree, process = offline
    _, err = process.communicate(timeout=100)
    assert process.returncode == 5
    assert f"{NOBODY}/reviews_Beauty_5.json.gz" in err
    assert "snap.stanford.edu" in err
    assert "--raw_dir" in err
    assert not (tree.root / "data/Beauty/interactions.parquet").exists()
