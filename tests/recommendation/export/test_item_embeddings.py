"""A recommender's item vectors as an embedding."""

import json

import numpy as np
import pytest

from common.artifacts import load_embeddings, load_mask, save_array
from common.errors import ConfigError, DataError
from common.publishing import meta_path
from recommendation.main import main
from recommendation.runs import Choice, load_recommender

# Items 0 to 28 stand in training, item 29 in a test event alone.
HISTORIES = [[*range(start, 29), 0, 29] for start in (0, 5)]


@pytest.fixture
def sasrec(train):
    return train("sasrec", HISTORIES, d_model=8, num_heads=2)


def export(trained, *words: str) -> None:
    main(trained.argv("--export_item_embeddings=mine", *words))


@pytest.mark.slow
def test_the_embedding_holds_the_models_vectors_and_marks_items_without_a_training_event(sasrec):
    export(sasrec, "--model=sasrec")
    vectors, present = load_embeddings(sasrec.folder, "mine"), load_mask(sasrec.folder, "mine")
    own = load_recommender(sasrec.folder, sasrec.run_root, Choice("sasrec")).model.items.weight.detach().numpy()
    assert vectors.shape == (30, 8)
    assert present.tolist() == [True] * 29 + [False]
    assert (vectors[:29] == own[:29]).all()
    assert vectors[29] == pytest.approx(own[:29].mean(axis=0))
    meta = json.loads(meta_path(sasrec.folder.embeddings("mine")).read_text())
    assert set(meta["inputs"]) == {"items.parquet", "interactions.parquet", "Tiny.mask-mine.npy"}
    assert (meta["recommender"], meta["run"], meta["num_missing"]) == ("sasrec", sasrec.run.name, 1)
    assert "--export_item_embeddings=mine" in meta["command"]


@pytest.mark.slow
def test_its_own_embedding_is_written_again_and_anothers_is_not_lost(sasrec):
    export(sasrec, "--model=sasrec")
    export(sasrec, "--model=sasrec")
    path = sasrec.folder.embeddings("mine")
    save_array(path, np.ones((30, 2), dtype=np.float32), {"inputs": {}, "items_sha256": "abc", "command": "a command"})
    before = path.read_bytes()
    with pytest.raises(ConfigError, match="Tiny.emb-mine.npy: is there already. it was made by a command.*--force"):
        export(sasrec, "--model=sasrec")
    assert path.read_bytes() == before
    export(sasrec, "--model=sasrec", "--force")
    assert load_embeddings(sasrec.folder, "mine").shape == (30, 8)


def test_a_model_without_item_embeddings_is_an_error_that_names_those_that_have(sasrec):
    with pytest.raises(ConfigError, match="--model markov: has no item embeddings.*Fix: --model sasrec"):
        export(sasrec, "--model=markov")


def test_where_no_run_is_finished_the_error_has_the_command(train):
    with pytest.raises(DataError, match="has no finished run. Fix: python recommendation/main.py --model=sasrec"):
        export(train("markov", HISTORIES), "--model=sasrec")


@pytest.mark.slow
def test_what_would_change_the_run_is_an_error_and_a_device_is_none(sasrec):
    with pytest.raises(ConfigError, match="--export_item_embeddings: --epochs does not go with it"):
        export(sasrec, "--model=sasrec", "--epochs=3")
    with pytest.raises(ConfigError, match="--seeds does not go with it.*leave out --seeds --export_t5"):
        export(sasrec, "--model=encoder_decoder", "--seeds=1,2", "--export_t5=t5")
    export(sasrec, "--model=sasrec", "--device=cpu")
