"""The user's own commands, verbatim, on a generated data set."""

import json

import duckdb
import pytest

from tests.brute_force import brute_force, buckets, of_bucket
from tests.end_to_end.conftest import NUM_ITEMS, NUM_KEPT, NUM_USERS, copy_program


def test_the_whole_job_ends_with_the_table_and_titles(whole_run):
    tree, outcome = whole_run
    assert outcome.code == 0, outcome.err
    assert f"{NUM_USERS} users, {NUM_KEPT} items" in outcome.out
    assert "the literature has [19445, 7050, 160792]" in outcome.err
    for model in ("popularity", "markov", "encoder_decoder"):
        assert f"| {model}" in outcome.out
    assert outcome.out.count("encoder_decoder recommends") == 3
    assert (tree.root / "runs/recommendation/Baby/report.md").read_text().strip() in outcome.out
    page = tree.root / "runs/quantization/Baby/rqvae-td/explain.html"
    assert f"open {page} in a browser" in outcome.out
    assert "bottle No." in page.read_text(encoding="utf-8")
    assert " 'new'" in outcome.out
    assert "<b>" not in outcome.out


@pytest.mark.parametrize("variant", ["popularity/no-codes", "markov/no-codes", "encoder_decoder/rqvae-td"])
def test_predictions_hold_existing_items_once_each_and_give_every_figure_again(whole_run, variant):
    tree, _ = whole_run
    parent, data = tree.root / "runs/recommendation/Baby" / variant, tree.root / "data/Baby"
    run = parent / (parent / "latest").read_text().strip()
    rows = [json.loads(line) for line in (run / "predictions.jsonl").read_text().splitlines()]
    items, targets = [row["items"] for row in rows], [row["target"] for row in rows]
    assert len(rows) == NUM_USERS
    assert all(len(set(row)) == len(row) == 20 for row in items)
    assert {item for row in items for item in row} <= {f"{i:010d}" for i in range(NUM_ITEMS)}
    raw_ids, counts = duckdb.sql(f"""
        SELECT raw_id, count(*) FILTER (split = 'train') FROM '{data}/items.parquet' LEFT JOIN
        '{data}/interactions.parquet' USING (item) GROUP BY item, raw_id ORDER BY item""").fetchnumpy().values()
    test = json.loads((run / "metrics.json").read_text())["test"]
    bucket_of = dict(zip(raw_ids, buckets(counts.tolist()), strict=True))
    assert test.pop("by_popularity") == {name: pytest.approx(of_bucket(name, items, targets, bucket_of))
                                         for name in ("cold", "tail", "middle", "head")}
    assert test == pytest.approx(brute_force(items, targets, NUM_KEPT) | {
        "num_targets": NUM_USERS, "num_without_history": 0,
        "missing_share": 0, "invalid_share": 0, "duplicate_share": 0})


def test_the_recommender_learned_what_the_users_do(whole_run):
    tree, _ = whole_run
    variant = tree.root / "runs/recommendation/Baby/encoder_decoder/rqvae-td"
    run = variant / (variant / "latest").read_text().strip()
    # A walk goes to one of three items; a guess among all would hit ten times in 260.
    assert json.loads((run / "metrics.json").read_text())["test"]["recall@10"] > 5 * 10 / NUM_ITEMS


@pytest.mark.parametrize(("folder", "script", "flag"), [
    ("quantization", "main.py", "--quantizer_name=rqvae"),
    ("dataloader", "../recommendation/main.py", "--model=encoder_decoder")])
def test_each_stage_runs_from_every_folder_and_reuses_what_is_finished(whole_run, folder, script, flag):
    tree, _ = whole_run
    outcome = tree.command("python", script, flag, cwd=tree.root / folder)
    assert (outcome.code, "reusing" in outcome.out) == (0, True), outcome.err
    assert ("| encoder_decoder" in outcome.out) == flag.startswith("--model")


def test_the_data_steps_run_one_by_one_from_their_folder(whole_run):
    tree, _ = whole_run
    for script in ("0_download_dataset.sh", "2_process.sh", "3_get_text_emb.sh", "run_pipeline.sh"):
        outcome = tree.command("bash", script, "--dataset", "Baby", cwd=tree.root / "dataloader")
        assert (outcome.code, "reusing" in outcome.out) == (0, True), outcome.err


def test_a_second_whole_run_says_what_it_reuses_and_changes_nothing(whole_run, mirror):
    tree, _ = whole_run
    files = [*(tree.root / "data/Baby").glob("*.npy"), *(tree.root / "data/Baby").glob("*.parquet")]
    before = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in files}
    outcome = tree.command("bash", "run_pipeline.sh", "--dataset", "Baby", "--mirror", mirror)
    assert outcome.code == 0, outcome.err
    assert outcome.out.count("reusing") == 7
    assert {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in files} == before


@pytest.mark.parametrize("folder", [".", "dataloader"])
def test_what_the_whole_job_leaves_is_sound_and_checking_it_changes_nothing(whole_run, folder):
    tree, _ = whole_run
    before = {path: path.stat().st_mtime_ns for path in (tree.root / "data").rglob("*")}
    outcome = tree.command("bash", "run_pipeline.sh", "--check", cwd=tree.root / folder)
    assert outcome.code == 0, outcome.err
    for name in ("items.parquet", "users.parquet", "interactions.parquet", "Baby.emb-td.npy",
                 "Baby.codes-rqvae-td.npy"):
        assert f"check: {name}: content ok" in outcome.out
    assert "Baby is sound: 5 files" in outcome.out
    assert {path: path.stat().st_mtime_ns for path in (tree.root / "data").rglob("*")} == before


def test_a_moved_copy_runs_its_own_code_while_another_checkout_is_on_the_path(baby, tmp_path):
    other = copy_program(tmp_path / "other")
    for stage in ("common", "quantization", "recommendation", "dataloader"):
        (other.root / stage / "__init__.py").write_text("raise SystemExit('the other checkout ran')\n")
    for name in ("utils.py", "dataset.py", "trainer.py"):
        (other.root / name).write_text("raise SystemExit('a decoy ran')\n")
    for words in (("python", f"{baby.root}/quantization/main.py", "--quantizer_name=random"),
                  ("bash", f"{baby.root}/dataloader/2_process.sh", "--dataset", "Baby"),
                  ("bash", f"{baby.root}/run_pipeline.sh", "--help")):
        outcome = baby.command(*words, cwd=other.root, PYTHONPATH=str(other.root))
        assert outcome.code == 0, outcome.err
        assert "ran" not in outcome.out.split()
