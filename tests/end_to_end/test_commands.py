"""The user's commands, as documented, on a generated dataset."""

import json
import re

import duckdb
import numpy as np
import pytest

from tests.brute_force import brute_force, buckets, of_bucket
from tests.end_to_end.conftest import NUM_ITEMS, NUM_KEPT, NUM_USERS, copy_program
from tests.text import lines_with


def test_the_whole_job_shows_its_results_and_titles(whole_run):
    tree, outcome = whole_run
    assert outcome.code == 0, outcome.err
    assert lines_with(outcome.out, NUM_USERS, NUM_KEPT)
    assert lines_with(outcome.err, "[19445, 7050, 160792]")  # the numbers of the published dataset
    for model in ("popularity", "markov", "transitions", "neighbours", "counting", "encoder_decoder"):
        assert f"| {model}" in outcome.out
    written = [line for line in outcome.out.splitlines() if " wrote " in line]
    assert len(written) == len(set(written)) > 6  # the baselines share a process, but each line is printed once
    assert len(re.findall(r"^ +10\. ", outcome.out, re.MULTILINE)) == 3  # the tenth item of each example
    assert (tree.root / "runs/recommendation/Baby/report.md").read_text().strip() in outcome.out
    page = tree.root / "runs/quantization/Baby/rqvae-td/explain.html"
    assert str(page) in outcome.out
    assert "bottle No." in page.read_text(encoding="utf-8")
    assert " 'new'" in outcome.out
    assert "<b>" not in outcome.out


@pytest.mark.parametrize("variant", ["popularity/no-codes", "markov/no-codes", "counting/no-codes",
                                     "encoder_decoder/rqvae-td"])
def test_predictions_are_distinct_items_and_reproduce_every_metric(whole_run, variant):
    tree, _ = whole_run
    parent, data = tree.root / "runs/recommendation/Baby" / variant, tree.root / "data/Baby"
    run = parent / (parent / "latest").read_text().strip()
    rows = [json.loads(line) for line in (run / "predictions.jsonl").read_text().splitlines()]
    targets = [row["target"] for row in rows]
    assert len(rows) == NUM_USERS
    raw_ids, counts = duckdb.sql(f"""
        SELECT raw_id, count(*) FILTER (split = 'train') FROM '{data}/items.parquet' LEFT JOIN
        '{data}/interactions.parquet' USING (item) GROUP BY item, raw_id ORDER BY item""").fetchnumpy().values()
    metrics = json.loads((run / "metrics.json").read_text())
    metrics = metrics.get("both", metrics["alone"])  # users get the lists of both the model and its prior
    bucket_of = dict(zip(raw_ids, buckets(counts.tolist()), strict=True))
    for protocol, key in (("all", "items"), ("unseen", "unseen")):
        items, test = [row[key] for row in rows], metrics["test"][protocol]
        assert all(len(set(row)) == len(row) == 20 for row in items)
        assert {item for row in items for item in row} <= {f"{i:010d}" for i in range(NUM_ITEMS)}
        assert test.pop("by_popularity") == {name: pytest.approx(of_bucket(name, items, targets, bucket_of))
                                             for name in ("cold", "tail", "middle", "head")}
        code_hits = [test.pop(f"code_{name}@10") for name in ("recall", "ndcg")] if "encoder" in variant else None
        assert test == pytest.approx(brute_force(items, targets, NUM_KEPT) | {
            "num_targets": NUM_USERS, "num_without_history": 0,
            "missing_share": 0, "invalid_share": 0, "duplicate_share": 0})
        if code_hits is not None:
            group_of = dict(zip(raw_ids, map(tuple, np.load(data / "Baby.codes-rqvae-td.npy")[:, :-1]), strict=True))
            groups = [[*dict.fromkeys(group_of[item] for item in row)] for row in items]
            expected = brute_force(groups, [group_of[target] for target in targets], NUM_KEPT)
            assert code_hits == pytest.approx([expected["recall@10"], expected["ndcg@10"]])


def test_the_recommender_learned_the_users_walks(whole_run):
    tree, _ = whole_run
    variant = tree.root / "runs/recommendation/Baby/encoder_decoder/rqvae-td"
    run = variant / (variant / "latest").read_text().strip()
    # A walk goes to one of three items; a random list would have a recall of 10 / NUM_ITEMS.
    metrics = json.loads((run / "metrics.json").read_text())["alone"]["test"]
    assert metrics["all"]["recall@10"] > 5 * 10 / NUM_ITEMS


@pytest.mark.parametrize(("folder", "script", "flag"), [
    ("quantization", "main.py", "--quantizer_name=rqvae"),
    ("dataloader", "../recommendation/main.py", "--model=encoder_decoder")])
def test_each_stage_runs_from_any_folder_and_reuses_finished_runs(whole_run, folder, script, flag):
    tree, _ = whole_run
    before = tree.written()
    outcome = tree.command("python", script, flag, cwd=tree.root / folder)
    assert outcome.code == 0, outcome.err
    assert tree.written() == before
    assert ("| encoder_decoder" in outcome.out) == flag.startswith("--model")


def test_the_data_steps_run_one_by_one_and_reuse_files(whole_run):
    tree, _ = whole_run
    before = tree.written()
    for script in ("0_download_dataset.sh", "2_process.sh", "3_get_text_emb.sh", "run_pipeline.sh"):
        outcome = tree.command("bash", script, "--dataset", "Baby", cwd=tree.root / "dataloader")
        assert outcome.code == 0, outcome.err
        assert tree.written() == before, script


def test_a_second_whole_run_changes_nothing(whole_run, mirror):
    tree, _ = whole_run
    before = tree.written()
    contents = {path: path.read_bytes() for path in before}
    outcome = tree.command("bash", "run_pipeline.sh", "--dataset", "Baby", "--mirror", mirror)
    assert outcome.code == 0, outcome.err
    assert tree.written() == before
    assert {path: path.read_bytes() for path in before} == contents


@pytest.mark.parametrize("folder", [".", "dataloader"])
def test_checking_the_data_finds_no_faults_and_changes_nothing(whole_run, folder):
    tree, _ = whole_run
    before = {path: path.stat().st_mtime_ns for path in (tree.root / "data").rglob("*")}
    outcome = tree.command("bash", "run_pipeline.sh", "--check", cwd=tree.root / folder)
    assert outcome.code == 0, outcome.err
    assert outcome.err == ""  # a fault would be a warning
    for name in ("items.parquet", "users.parquet", "interactions.parquet", "Baby.emb-td.npy",
                 "Baby.codes-rqvae-td.npy"):
        assert lines_with(outcome.out, name)
    assert lines_with(outcome.out, tree.root / "data/Baby", 5)  # files
    assert {path: path.stat().st_mtime_ns for path in (tree.root / "data").rglob("*")} == before


def test_a_moved_copy_never_runs_another_checkouts_code(baby, tmp_path):
    other = copy_program(tmp_path / "other")
    for stage in ("common", "quantization", "recommendation", "dataloader"):
        (other.root / stage / "__init__.py").write_text("raise SystemExit('DECOY')\n")
    for name in ("utils.py", "dataset.py", "trainer.py"):
        (other.root / name).write_text("raise SystemExit('DECOY')\n")
    for words in (("python", f"{baby.root}/quantization/main.py", "--quantizer_name=random"),
                  ("bash", f"{baby.root}/dataloader/2_process.sh", "--dataset", "Baby"),
                  ("bash", f"{baby.root}/run_pipeline.sh", "--help")):
        outcome = baby.command(*words, cwd=other.root, PYTHONPATH=str(other.root))
        assert outcome.code == 0, outcome.err
        assert "DECOY" not in outcome.out + outcome.err
