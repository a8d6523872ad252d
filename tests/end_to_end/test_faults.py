"""Kill, resume, stale input and wrong words, through the real commands."""

import json
import signal
import time

import duckdb
import pytest

from common.artifacts import DatasetFolder, load_meta
from common.publishing import publish
from tests.end_to_end.conftest import NUM_KEPT

# A checkpoint after every step, each on the disk before the next: no more of them than it takes to be stopped twice.
QUANTIZE = ("python", "quantization/main.py", "--epochs", "20", "--eval_every", "5", "--checkpoint_seconds", "0")
RECOMMEND = ("python", "recommendation/main.py", "--quantizer_name", "random", "--max_steps", "40",
             "--checkpoint_seconds", "0", "--batch_size", "64")


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


@pytest.mark.parametrize(("stage", "command"), [("quantization", QUANTIZE), ("recommendation", RECOMMEND)])
def test_a_killed_run_continues_and_ends_with_the_bytes_of_an_undisturbed_one(baby, stage, command):
    if stage == "recommendation":
        assert baby.command("python", "quantization/main.py", "--quantizer_name", "random").code == 0
    code, _, err = stop_after(baby, stage, command, 7, signal.SIGKILL)
    assert code == -signal.SIGKILL, err
    code, _, err = stop_after(baby, stage, command, 20, signal.SIGTERM)
    assert code == 143, err
    assert "the same command again continues" in err
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


def test_every_table_and_report_fits_an_ascii_terminal(baby):
    ascii_locale = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONIOENCODING": "ascii"}
    for words, shown in (
            (("quantization/main.py", "--quantizer_name", "random"), "random"),
            (("quantization/main.py", "--quantizer_name", "random", "--explain"), r"\u00b7"),
            (("recommendation/main.py", "--model=popularity"), "popularity"),
            (("recommendation/main.py", "--compare"), r"\u00b1")):
        outcome = baby.command("python", *words, **ascii_locale)
        assert outcome.code == 0, outcome.err
        assert shown in outcome.out


def test_stale_codes_are_refused_with_the_command_that_rebuilds_them(baby):
    assert baby.command("python", "quantization/main.py", "--epochs", "2").code == 0
    embedding = baby.data("Baby.emb-td.npy.meta.json")
    embedding.write_text(embedding.read_text().replace('"sha256": "', '"sha256": "0', 1))
    outcome = baby.command("python", "recommendation/main.py", "--model=encoder_decoder")
    assert outcome.code == 4
    assert "is stale" in outcome.err
    assert "Fix: python quantization/main.py --epochs 2 --force" in outcome.err
    assert "Traceback" not in outcome.err


def test_missing_codes_name_the_command_that_makes_them(baby):
    outcome = baby.command("python", "recommendation/main.py", "--model=encoder_decoder")
    assert outcome.code == 3
    assert "python quantization/main.py --quantizer_name rqvae --dataset_name Baby" in outcome.err


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


def test_a_checkpoint_of_another_size_is_refused_by_its_keys_and_the_named_command_mends_it(baby):
    train = ("python", "recommendation/main.py", "--model=sasrec", "--max_steps=4")
    for width in ("64", "32"):  # the last one is what recommends
        assert baby.command(*train, "--d_model", width).code == 0
    runs = baby.root / "runs/recommendation/Baby/sasrec/no-codes"
    asked = ("python", "recommendation/recommend.py", "--model=sasrec", "--history", "0000000100")
    [best] = (runs / (runs / "latest").read_text().strip()).glob("checkpoints/best.safetensors")
    [other] = {*runs.glob("*/checkpoints/best.safetensors")} - {best}
    for part in ("", ".meta.json"):
        best.with_name(best.name + part).write_bytes(other.with_name(other.name + part).read_bytes())
    refused = baby.command(*asked)
    assert (refused.code, refused.out, "Traceback" in refused.err) == (4, "", False)
    assert str(best) in refused.err
    fix = "python recommendation/main.py --model=sasrec --max_steps=4 --d_model 32 --force"
    assert f"Fix: {fix}\n" in refused.err
    assert baby.command(*fix.split()).code == 0
    assert baby.command(*asked).code == 0


def test_a_split_that_leaks_is_refused_and_nothing_else_is_touched(baby):
    folder = DatasetFolder(baby.root / "data", "Baby")
    one_off = duckdb.read_parquet(str(folder.interactions)).order('"user", timestamp').project(
        "* REPLACE (CASE split WHEN 'valid' THEN 'test' WHEN 'test' THEN 'train' ELSE split END AS split)")
    meta = load_meta(folder.interactions, "")
    publish(folder.interactions, lambda path: one_off.write_parquet(str(path)),
            {key: value for key, value in meta.items() if key not in ("sha256", "size")})
    before = {path: path.read_bytes() for path in (baby.root / "data").rglob("*") if path.is_file()}
    outcome = baby.command("python", "recommendation/main.py", "--model=markov")
    assert (outcome.code, "Traceback" in outcome.err) == (3, False)
    assert "a training event behind a test event of the same user. the test split would leak" in outcome.err
    assert {path: path.read_bytes() for path in before} == before
    assert not [*(baby.root / "runs").rglob("metrics.json")]


def test_more_than_the_catalogue_is_all_of_it_and_said(baby):
    assert baby.command("python", "recommendation/main.py", "--model=popularity").code == 0
    outcome = baby.command("python", "recommendation/recommend.py", "--model=popularity", "--user=A00007",
                           "--top_k=500", "--format=jsonl")
    assert outcome.code == 0
    assert len(set(json.loads(outcome.out)["items"])) == NUM_KEPT
    assert f"--top_k is 500, and the catalogue has no more than {NUM_KEPT} items" in outcome.err


def test_numbers_that_are_none_end_training_with_what_may_help(baby):
    outcome = baby.command("python", "recommendation/main.py", "--model=sasrec", "--lr=1e30", "--max_steps=40")
    assert (outcome.code, "Traceback" in outcome.err) == (6, False)
    assert "is not finite" in outcome.err
    assert "Fix: a lower --lr" in outcome.err
    assert not [*(baby.root / "runs").rglob("metrics.json")]


def test_no_network_is_one_error_that_lists_all_that_was_tried(baby):
    closed = "http://127.0.0.1:9"
    outcome = baby.command("bash", "run_pipeline.sh", "--dataset", "Beauty", "--mirror", closed,
                           http_proxy=closed, https_proxy=closed)
    assert outcome.code == 5
    assert f"{closed}/reviews_Beauty_5.json.gz" in outcome.err
    assert "snap.stanford.edu" in outcome.err
    assert "--raw_dir" in outcome.err
    assert not (baby.root / "data/Beauty/interactions.parquet").exists()
