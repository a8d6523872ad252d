"""Runs with a prior and a teacher."""

import json

import numpy as np
import pytest
import torch

from common.artifacts import DatasetFolder, save_array
from common.errors import ArtifactError, ConfigError
from recommendation.inputs import Choice, neighbour_sources
from recommendation.models import find_class, names
from recommendation.models.abstract_model import PADDING
from recommendation.options import read_flags
from recommendation.recommender import Recommender
from recommendation.report import report
from recommendation.runs import load_recommender
from tests.errors import refused

from .test_pipeline import HISTORIES, RAW_ITEMS

TRAINED = [name for name in names() if find_class(name).trained_by_gradient()]


@pytest.mark.slow
@pytest.mark.parametrize("name", TRAINED)
def test_a_run_with_prior_and_teacher_reports_the_three_rankers_and_is_loaded_again(train, name):
    trained = train(name, prior="counting", teacher="transitions", teacher_weight=0.5)
    metrics = json.loads((trained.run / "metrics.json").read_text())
    assert {"alone", "prior", "both"} <= metrics.keys()
    assert metrics["weights"].keys() == {"all", "unseen"}
    ranks = json.loads((trained.run / "ranks.json").read_text())
    for ranker in ("alone", "prior", "both"):
        for protocol in ("all", "unseen"):
            found = np.array(ranks[ranker][protocol])
            assert metrics[ranker]["test"][protocol]["recall@10"] == ((found > 0) & (found <= 10)).mean()
    recommender = Recommender.load("Tiny", name, data_root=trained.folder.data_root, run_root=trained.run_root)
    for protocol, filter_seen in (("all", False), ("unseen", True)):
        assert recommender.evaluate("test", filter_seen) == metrics["both"]["test"][protocol]
    rows = [json.loads(line) for line in (trained.run / "predictions.jsonl").read_text().splitlines()]
    assert all(len(row["unseen"]) == len(row["unseen_scores"]) for row in rows)


@pytest.mark.slow
def test_the_prior_alone_has_the_metrics_of_its_baseline(train):
    auto = dict.fromkeys(("pair_distance", "distance_decay", "backward", "source_exponent", "popularity_exponent",
                          "num_newest", "recency"), "auto")
    alone = json.loads((train("transitions", **auto).run / "metrics.json").read_text())["alone"]
    with_model = json.loads((train("sasrec", prior="transitions", max_history=50).run / "metrics.json").read_text())
    assert with_model["prior"] == alone


@pytest.mark.slow
def test_the_prior_has_no_part_in_the_training_but_the_teacher_has(train):
    def model(**own: object) -> dict[str, torch.Tensor]:
        trained = train("sasrec", **own)
        return load_recommender(trained.folder, trained.run_root, Choice("sasrec")).model.state_dict()

    plain, with_prior, taught = model(), model(prior="transitions"), model(teacher="transitions")
    assert all(torch.equal(plain[name], with_prior[name]) for name in plain)
    assert not all(torch.equal(plain[name], taught[name]) for name in plain)
    for other in (model(teacher="transitions", teacher_temperature=0.125),
                  model(teacher="transitions", teacher_weight=0.8)):
        assert not all(torch.equal(other[name], taught[name]) for name in plain)


@pytest.mark.slow
def test_the_report_names_the_prior_of_its_lists(train):
    trained = train("sasrec", prior="transitions")
    assert "\n  sasrec + transitions recommends\n" in report(trained.folder, trained.run_root, [trained.run])


@pytest.mark.slow
def test_no_ranker_recommends_a_seen_item_for_unseen_items(train):
    trained = train("encoder_decoder", prior="transitions")
    rows = [json.loads(line) for line in (trained.run / "predictions.jsonl").read_text().splitlines()]
    recommender = Recommender.load("Tiny", data_root=trained.folder.data_root, run_root=trained.run_root)
    raw = recommender.lookup.raw_ids
    for row, history in zip(rows, HISTORIES, strict=True):
        assert not {raw[item] for item in history[:-1]} & set(row["unseen"])
        assert PADDING not in row["unseen"]


@pytest.mark.slow
def test_a_damaged_prior_is_refused_with_the_command_that_makes_it_again(train):
    trained = train("sasrec", prior="transitions")
    path = trained.run / "checkpoints" / "transitions.safetensors"
    path.write_bytes(b"damaged")
    with refused(ArtifactError, path, fix=["--force"]):
        load_recommender(trained.folder, trained.run_root, Choice("sasrec"))


@pytest.mark.slow
def test_an_ended_training_with_a_damaged_teacher_fits_it_again(train, caplog):
    trained = train("sasrec", teacher="transitions")
    (trained.run / "finished.json").unlink()
    path = trained.run / "checkpoints" / "transitions.safetensors"
    before = path.read_bytes()
    path.write_bytes(b"damaged")
    train("sasrec", teacher="transitions")
    assert path.read_bytes() == before
    assert "transitions" in caplog.text


@pytest.mark.parametrize(("flags", "where"), [
    (["--teacher_weight=0.3"], "--teacher_weight"), (["--teacher_temperature=0.5"], "--teacher_temperature"),
    (["--teacher=counting", "--teacher_temperature=0"], "--teacher_temperature"),
    (["--teacher=counting", "--teacher_temperature=warm"], "--teacher_temperature"),
    (["--neighbours_from=td"], "--neighbours_from"),
    (["--neighbours_from=td", "--prior=transitions"], "--neighbours_from"),
    (["--model=transitions", "--neighbours_from=td"], "--neighbours_from"),
    (["--model=markov", "--prior=transitions"], "--prior"), (["--prior=sasrec"], "--prior"),
    (["--teacher=neighbours"], "--teacher"), (["--teacher=counting", "--teacher_weight=1.5"], "--teacher_weight")])
def test_flags_without_effect_or_with_wrong_values_are_refused(flags, where):
    with refused(ConfigError, where):
        read_flags(["--model=sasrec", *flags] if not flags[0].startswith("--model") else flags)


@pytest.mark.parametrize("flags", [["--model=neighbours"], ["--model=counting"], ["--model=sasrec", "--prior=counting"],
                                   ["--model=sasrec", "--teacher=counting"]])
def test_one_flag_selects_the_source_of_neighbours(flags, tmp_path, caplog):
    folder = DatasetFolder(tmp_path, "tiny")
    folder.path.mkdir()
    _, config = read_flags([*flags, "--neighbours_from=cf"])
    with refused(ConfigError, "--neighbours_from", names=["'cf'"], fix=["--suffix cf"]):
        neighbour_sources(config, folder)
    assert neighbour_sources(read_flags(flags)[1], folder) == ["tfidf"]
    for suffix in ("cf", "td"):
        save_array(folder.embeddings(suffix), np.ones((2, 2), np.float32), {"inputs": {}})
    assert neighbour_sources(config, folder) == ["cf"]
    assert neighbour_sources(read_flags(flags)[1], folder) == ["tfidf", "td"]
    assert neighbour_sources(read_flags([*flags, "--neighbours_from=tfidf"])[1], folder) == ["tfidf"]
    assert neighbour_sources(read_flags(["--model=transitions"])[1], folder) == []
    folder.embeddings("td").write_bytes(b"damaged")
    assert neighbour_sources(read_flags(flags)[1], folder) == ["tfidf"]
    assert str(folder.embeddings("td")) in caplog.text


@pytest.mark.slow
def test_changed_texts_make_another_run_of_a_prior_with_neighbours(train):
    trained = train("sasrec", prior="neighbours")
    inputs = json.loads((trained.run / "finished.json").read_text())["inputs"]
    assert "items.parquet" in inputs
    assert "items.parquet" not in json.loads((train("sasrec").run / "finished.json").read_text())["inputs"]


@pytest.mark.slow
def test_recommend_uses_the_prior(train, capsys):
    from recommendation.recommend import main as recommend

    trained = train("sasrec", prior="transitions")
    capsys.readouterr()
    recommend(trained.argv("--model=sasrec", "--user=user 0", "--format=jsonl"))
    row = json.loads(capsys.readouterr().out)
    loaded = load_recommender(trained.folder, trained.run_root, Choice("sasrec"))
    assert loaded.ranker is not loaded.model
    recommender = Recommender.load("Tiny", "sasrec", data_root=trained.folder.data_root, run_root=trained.run_root)
    [items] = recommender.recommend([[RAW_ITEMS[item] for item in HISTORIES[0]]])
    assert [item.score for item in items] == row["scores"]
