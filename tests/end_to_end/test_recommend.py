"""Recommendations from the run that the whole job trained, with the real command."""

import json

from common.artifacts import DatasetFolder, load_items, load_users
from recommendation.dataset import Sequences
from tests.end_to_end.conftest import NUM_USERS

RECOMMEND = ("python", "recommendation/recommend.py")


def test_histories_without_their_last_event_get_the_runs_predictions(whole_run, tmp_path):
    tree, _ = whole_run
    folder = DatasetFolder(tree.root / "data", "Baby")
    items, users, events = load_items(folder)["raw_id"], load_users(folder)["raw_id"], Sequences.load(folder, "cpu")
    asked = tmp_path / "histories.jsonl"
    with asked.open("w") as file:
        for user in range(NUM_USERS):
            history = list(items[events.item[events.user == user][:-1]])
            file.write(json.dumps({"user": users[user], "history": history}) + "\n")
    variant = tree.root / "runs/recommendation/Baby/encoder_decoder/rqvae-td"
    predicted = variant / (variant / "latest").read_text().strip() / "predictions.jsonl"
    expected = [json.loads(line) for line in predicted.read_text().splitlines()]
    for filter_seen, keys in (("false", ("items", "scores")), ("true", ("unseen", "unseen_scores"))):
        outcome = tree.command(*RECOMMEND, "--histories", str(asked), "--format", "jsonl", "--top_k", "20",
                               "--filter_seen", filter_seen)
        assert outcome.code == 0, outcome.err
        assert all(line.startswith("recommend: ") for line in outcome.err.splitlines())  # progress on a slow machine
        rows = [json.loads(line) for line in outcome.out.splitlines()]
        assert [[row[key] for key in ("user", "items", "scores")] for row in rows] == [
            [row[key] for key in ("user", *keys)] for row in expected]
        assert all(row["unknown"] == 0 and len(row["titles"]) == 20 for row in rows)


def test_a_user_gets_a_table_of_titles(whole_run):
    tree, _ = whole_run
    outcome = tree.command("python", "recommend.py", "--user", "A00007", "--filter_seen", "--top_k", "5",
                           cwd=tree.root / "recommendation")
    assert (outcome.code, outcome.err) == (0, "")
    heading, *lines = outcome.out.splitlines()
    assert "A00007" in heading
    assert [line.split(".")[0].strip() for line in lines] == ["1", "2", "3", "4", "5"]
    assert all(" No. " in line for line in lines)
