"""The models that count: their settings, their two protocols, and their inputs."""

import json

import numpy as np
import pandas as pd
import pytest
import torch
import yaml

from common.artifacts import DatasetFolder, save_array
from common.config import resolve
from common.errors import ArtifactError, ConfigError, DataError
from recommendation.counting.transitions import MAX_PAIRS
from recommendation.inputs import Choice, content_inputs, load_neighbours, load_source
from recommendation.models import DEFAULTS, config_path, counting_model, find_class
from recommendation.models.abstract_model import Catalogue, ItemNeighbours
from recommendation.pipeline import Pipeline
from recommendation.runs import load_recommender
from tests.errors import refused

from ..conftest import NUM_ITEMS, leave_one_out, padded, windows_of
from ..test_pipeline import ITEMS_SHA256, RAW_ITEMS, write_table

NAMES = ["transitions", "neighbours", "counting"]
SETTINGS = {"pair_distance": 1, "distance_decay": 1, "backward": 0, "source_exponent": 0, "popularity_exponent": 0,
            "neighbour_weight": 1, "num_newest": 2, "recency": 0.5}
# Training events: [0, 1, 0] and [2, 1]; the items 3 and 4 have only validation and test events.
EVENTS = [[0, 1, 0, 3, 4], [2, 1, 4, 3]]


def fitted(name: str, histories: list[list[int]], num_items: int, neighbours: ItemNeighbours | None = None,
           **settings: object):
    known = yaml.safe_load(config_path(name).read_text())[name]["model_params"]
    config = resolve(name, config_path(name), DEFAULTS, [(key, str(value)) for key, value in settings.items()
                                                         if key in known])
    model = find_class(name)(config.for_model(), Catalogue(num_items, None, [], neighbours and {"td": neighbours}))
    sequences = leave_one_out(histories)
    assert model.fit(sequences.training_sequences(), sequences.validation_events())
    return model.eval()


def one_neighbour(*items: int) -> ItemNeighbours:
    return ItemNeighbours(torch.tensor([[item] for item in items]), torch.full((len(items), 1), 0.25))


def test_transitions_by_hand():
    # 0 -> 1, 1 -> 0 and 2 -> 1 once each.
    model = fitted("transitions", EVENTS, 5, **SETTINGS)
    scores = model.score_items(windows_of([0, 2], [2, 0, 1], [3]))
    expected = torch.tensor([[0, 1.5, 0, 0, 0], [1, 0.5, 0, 0, 0], [0, 0, 0, 0, 0]], dtype=torch.float64)
    assert torch.allclose(scores, expected, rtol=1e-8, atol=1e-50)


def test_the_more_popular_of_two_items_with_equal_scores_is_better():
    # 0 -> 1 and 0 -> 2 twice each; 2 has one more event; 3 has the most events, and never follows 0.
    histories = [[0, 1, 3, 5, 5], [0, 1, 3, 5, 5], [0, 2, 3, 5, 5], [0, 2, 3, 5, 5], [2, 3, 3, 5, 5]]
    model = fitted("transitions", histories, 6, **SETTINGS | {"num_newest": 20, "recency": 0.2})
    found = model.recommend(windows_of([0], [0, *[4] * 19]), 4).items
    # The second history has the item 0 at lag 19, where a score is only 1e-13.
    assert found.tolist() == [[2, 1, 3, 0], [2, 1, 3, 0]]


def test_the_better_source_of_neighbours_is_chosen():
    histories = [[item, (item + 1) % 6, (item + 2) % 6, (item + 3) % 6] for item in range(6)]
    config = resolve("neighbours", config_path("neighbours"), DEFAULTS, [("num_newest", "1")])
    sources = {"tfidf": one_neighbour(5, 0, 1, 2, 3, 4), "td": one_neighbour(1, 2, 3, 4, 5, 0)}
    model = find_class("neighbours")(config.for_model(), Catalogue(6, None, [], sources))
    sequences = leave_one_out(histories)
    model.fit(sequences.training_sequences(), sequences.validation_events())
    assert {found["neighbours_from"] for found in model.properties()["settings"].values()} == {"td"}
    assert model.recommend(windows_of([3]), 1).items.tolist() == [[4]]


def test_equal_scores_are_ordered_by_popularity():
    model = fitted("transitions", [[0, 1, 9, 9], [0, 2, 9, 9], [2, 2, 9, 9]], 10, **SETTINGS)
    assert model.recommend(windows_of([0]), 3).items.tolist() == [[2, 1, 0]]
    assert model.recommend(windows_of([7]), 3).items.tolist() == [[2, 0, 1]]  # no scores: only popularity


def test_neighbours_by_hand():
    model = fitted("neighbours", EVENTS, 5, one_neighbour(3, 4, 4, 0, 1), **SETTINGS)
    scores = model.score_items(windows_of([0, 2])).round(decimals=6)
    assert scores.tolist() == [[0, 0, 0, 0.125, 0.25]]


def test_similar_items_are_scaled_to_the_sum_of_the_transitions():
    # The transitions have the sum 3, the similarities 5/4. With the weight 0.5, each similarity becomes 0.3.
    model = fitted("counting", EVENTS, 5, one_neighbour(3, 4, 4, 0, 1), **SETTINGS | {"neighbour_weight": 0.5})
    scores = model.score_items(windows_of([0], [2])).round(decimals=6)
    assert torch.allclose(scores, torch.tensor([[0, 1, 0, 0.3, 0], [0, 1, 0, 0, 0.3]], dtype=torch.float64))


@pytest.mark.parametrize("name", NAMES)
def test_the_search_is_reproducible_and_reported(name, monkeypatch):
    rng = np.random.default_rng(0)
    histories = [((np.arange(8) * step + start) % 40).tolist() for step, start in rng.integers(1, 40, (60, 2))]
    neighbours = one_neighbour(*((np.arange(40) + 1) % 40).tolist())
    one, other = (fitted(name, histories, 40, neighbours, num_trials=12) for _ in range(2))
    properties = one.properties()
    assert properties == other.properties()
    assert properties["num_trials"] <= 12
    assert properties["settings"].keys() == {"all_items", "unseen_items"}
    assert all(tuple(values) == one.settings for values in properties["settings"].values())
    json.dumps(properties)
    for key, value in one.state_dict().items():
        assert torch.equal(value, other.state_dict()[key])


def test_unseen_items_have_their_own_settings(monkeypatch):
    monkeypatch.setattr(counting_model, "mean_ndcg", lambda folds, settings: (settings.recency, -settings.recency))
    model = fitted("transitions", EVENTS, 5, **SETTINGS | {"recency": "auto"})
    assert [round(float(counts.recency), 6) for counts in (model.all_items, model.unseen_items)] == [0.9, 0.2]
    histories, seen = windows_of([1, 2]), padded([1, 2])
    assert model.recommend(histories, 1).scores.item() == pytest.approx(1)      # 2 -> 1
    unseen = model.recommend_unseen(histories, seen, 3)
    assert unseen.items.tolist() == [[0, 3, 4]]
    assert unseen.scores[0, 0].item() == pytest.approx(0.2)                     # 1 -> 0
    by_protocol = [model.log_probabilities(histories, unseen=value) for value in (False, True)]
    assert by_protocol[0][0, 0] > by_protocol[1][0, 0]


def test_blocks_of_histories_give_the_same_lists(monkeypatch):
    model, histories = fitted("transitions", EVENTS, 5, **SETTINGS), windows_of([0], [1, 2], [2, 0, 1])
    whole = model.recommend_unseen(histories, padded([0], [1, 2], []), 3)
    monkeypatch.setattr(counting_model, "BLOCK_SCORES", 1)
    assert all(map(torch.equal, whole, model.recommend_unseen(histories, padded([0], [1, 2], []), 3)))


def test_too_large_a_distance_is_refused_or_limited(monkeypatch, caplog):
    assert MAX_PAIRS >= 10_000_000
    monkeypatch.setattr(counting_model, "largest_distance", lambda offsets, limit: min(limit, 2))
    with refused(DataError, "transitions.model_params.pair_distance", names=[3], fix=["auto", 2]):
        fitted("transitions", EVENTS, 5, **SETTINGS | {"pair_distance": 3})
    with caplog.at_level("INFO"):
        model = fitted("transitions", EVENTS, 5, **SETTINGS | {"pair_distance": "auto"})
    assert "up to 2 instead of 20" in caplog.text
    assert model.properties()["settings"]["all_items"]["pair_distance"] <= 2


@pytest.mark.parametrize(("key", "value"), [("pair_distance", 0), ("pair_distance", 2.5), ("recency", 1.5),
                                            ("backward", "often"), ("num_newest", "null"), ("num_trials", 0)])
def test_a_setting_that_cannot_be_used_is_refused(make_model, key, value):
    with refused(ConfigError, names=[f"transitions.model_params.{key}"]):
        make_model("transitions", **{key: value})


def test_the_neighbours_are_inputs_of_the_run(train):
    trained = train("neighbours")
    inputs = json.loads((trained.run / "finished.json").read_text())["inputs"]
    assert inputs.keys() == {"interactions.parquet", "items.parquet"}
    loaded = load_recommender(trained.folder, trained.run_root, Choice("neighbours"))
    assert loaded.model.catalogue.neighbours is None  # the checkpoint has all weights
    assert loaded.inputs == inputs


def test_a_run_of_other_texts_is_refused(train, make_config):
    trained = train("counting")
    other = train("transitions")  # does not use the texts
    items = pd.DataFrame({"item": range(NUM_ITEMS), "raw_id": RAW_ITEMS, "title": RAW_ITEMS, "text": "another text"})
    write_table(trained.folder.items, items, {})
    with refused(ArtifactError, trained.run, names=["items.parquet"], fix=["the training command"]):
        load_recommender(trained.folder, trained.run_root, Choice("counting"))
    assert load_recommender(other.folder, other.run_root, Choice("transitions")).folder == other.run
    changed = Pipeline(make_config("counting"), trained.folder, Choice("counting"), trained.run_root, "a command")
    assert changed.run.id != trained.run.name


def test_neighbours_come_from_an_embedding(train):
    folder = train("transitions").folder
    angle = np.arange(len(RAW_ITEMS)) / len(RAW_ITEMS)
    vectors = np.stack([np.cos(angle), np.sin(angle)], axis=1).astype(np.float32)
    save_array(folder.embeddings("cf"), vectors, {"inputs": {}, "items_sha256": ITEMS_SHA256})
    source = load_source(folder, Choice("neighbours"), ["cf"])
    assert load_neighbours(folder, "cf").items[0, :2].tolist() == [1, 2]
    assert source.inputs.keys() == {"interactions.parquet", "Tiny.emb-cf.npy"}
    assert content_inputs(folder, source.inputs).keys() == {"Tiny.emb-cf.npy"}
    with refused(DataError, folder.embeddings("td")):
        load_neighbours(folder, "td")


def test_the_fix_of_an_embedding_without_meta_names_its_suffix(tmp_path):
    folder = DatasetFolder(tmp_path, "tiny")
    folder.path.mkdir()
    save_array(folder.embeddings("cf"), np.ones((2, 2), np.float32), {"inputs": {}})
    folder.embeddings("cf").with_name(f"{folder.embeddings('cf').name}.meta.json").unlink()
    with refused(ArtifactError, folder.embeddings("cf"), fix=["--suffix cf"]):
        content_inputs(folder, [folder.embeddings("cf").name])
