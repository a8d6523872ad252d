"""Recommendations from Python: the same as those of the command, with the same checks."""

import json
import subprocess
import sys

import pytest

from common.cli import ROOT
from common.errors import ArtifactError, ConfigError, DataError
from recommendation import Recommender
from recommendation.recommend import main
from tests.errors import refused

from .test_pipeline import HISTORIES
from .test_recommend import BY_HAND


@pytest.fixture
def load(train):
    """key=value, ... -> a Recommender of the chain of BY_HAND."""
    trained = train("markov", BY_HAND)

    def run(**own) -> Recommender:
        return Recommender.load(trained.folder.name, **{
            "model": "markov", "data_root": trained.folder.data_root, "run_root": trained.run_root} | own)

    return run


def test_items_titles_and_scores_by_hand(load):
    [[first, *rest]] = load().recommend([["0003", "0000"]], k=4)
    assert first == ("0001", "0001", 2.5)
    assert [(item.raw_id, item.score) for item in rest] == [("0002", 1.25), ("0000", 0.75), ("0003", 0.0)]


def test_python_and_the_command_give_the_same(train, load, capsys):
    trained = train("markov", BY_HAND)
    main(trained.argv("--model=markov", "--format=jsonl", "--history", "0001", "0000", "--filter_seen", "--top_k=3"))
    row = json.loads(capsys.readouterr().out)
    [items] = load().recommend([["0001", "0000"]], k=3, filter_seen=True)
    assert [item.raw_id for item in items] == row["items"]
    assert [item.score for item in items] == row["scores"]


def test_unknown_items_are_skipped_with_a_warning(load, caplog):
    recommender = load()
    assert recommender.recommend([["nope", "0000"], ["nope"]], k=2) == recommender.recommend([["0000"], []], k=2)
    assert "'nope'" in caplog.text


def test_evaluation_repeats_the_runs_metrics(train, load):
    written = json.loads((train("markov", BY_HAND).run / "metrics.json").read_text())
    recommender = load()
    assert written["protocol"] == "all"  # users have repeated items
    for filter_seen, protocol in ((None, "all"), (False, "all"), (True, "unseen")):
        for split in ("valid", "test"):
            assert recommender.evaluate(split, filter_seen) == written["alone"][split][protocol]
    assert recommender.evaluate() == written["alone"]["test"]["all"]


@pytest.mark.parametrize(("filter_seen", "excluded"), [("auto", False), ("true", True), ("false", False)])
def test_users_get_the_protocol_of_the_run(train, load, filter_seen, excluded):
    train("markov", BY_HAND, filter_seen=filter_seen)
    recommender, history = load(), ["0003", "0000"]
    seen = [{*history} & {item.raw_id for item in items} for items in (
        *recommender.recommend([history]), *recommender.recommend([history], filter_seen=False),
        *recommender.recommend([history], filter_seen=True))]
    assert [bool(part) for part in seen] == [not excluded, True, False]


def test_users_without_repeats_get_unseen_items(train):
    trained = train("markov", HISTORIES)
    recommender = Recommender.load(trained.folder.name, model="markov", data_root=trained.folder.data_root,
                                   run_root=trained.run_root)
    history = ["0003", "0000"]
    [unseen], [every] = (recommender.recommend([history], k=30, **own) for own in ({}, {"filter_seen": False}))
    assert [item for item in every if item.raw_id not in history] == unseen
    assert len(unseen) == 28


def test_evaluation_uses_the_same_search_as_the_run(train, load):
    graph = {"scoring": "graph", "num_neighbours": 2, "num_beams": 2, "num_hops": 1}
    written = json.loads((train("encoder_retrieve", HISTORIES, **graph).run / "metrics.json").read_text())
    recommender = load(model="encoder_retrieve")
    for filter_seen, protocol in ((False, "all"), (True, "unseen")):
        assert recommender.evaluate(filter_seen=filter_seen)["ndcg@20"] == pytest.approx(
            written["alone"]["test"][protocol]["ndcg@20"])


def test_evaluation_can_leave_out_seen_items(load):
    recommender = load()
    # User 0 has seen 0, 1, 2 and 3, so that only 4, the target, and ids above it are left.
    assert recommender.evaluate(filter_seen=True)["recall@1"] > recommender.evaluate(filter_seen=False)["recall@1"]
    with refused(ConfigError, "split", names=["train"]):
        recommender.evaluate("train")


@pytest.mark.parametrize("histories", [["0000", "0001"], [[0, 1]], [["0000", None]]])
def test_a_history_must_be_a_list_of_raw_ids(load, histories):
    with refused(ConfigError, "histories[0]"):
        load().recommend(histories)


def test_a_run_is_chosen_by_its_id(train, load, capsys):
    first = train("markov", BY_HAND)
    second = train("markov", BY_HAND, max_history=4)
    assert load().run.folder == second.run
    assert load(run=first.run.name).run.folder == first.run
    with refused(DataError, "--run 123", fix=["--run"]):
        load(run="123")
    with refused(DataError, f"--run {first.run.name[:-1]}", names=[repr(first.run.name)], fix=[first.run.name]):
        load(run=first.run.name[:-1])
    main(first.argv("--model=markov", f"--run={first.run.name}", "--history", "0000", "--format=jsonl"))
    assert json.loads(capsys.readouterr().out)["items"][0] == "0001"


def test_loading_checks_names_and_stale_data(load, train):
    for own, where in (({"model": "markv"}, "--model"), ({"quantizer": "../x"}, "quantizer"), ({"run": "a/b"}, "run")):
        with pytest.raises(ConfigError) as raised:
            load(**own)
        assert str(raised.value.where).startswith(where)
    with pytest.raises(DataError):
        load(model="sasrec")  # without a run
    run = load().run.folder
    train("popularity", [*BY_HAND, [1, 2, 3]])  # writes other interactions
    with refused(ArtifactError, run):
        load()


@pytest.mark.slow
def test_importing_the_package_does_not_load_torch():
    code = "import sys, recommendation, quantization; sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0
