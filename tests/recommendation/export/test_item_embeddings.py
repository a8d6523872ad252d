"""Export of a recommender's item embeddings."""

import json

import numpy as np
import pytest

from common.artifacts import load_embeddings, load_mask, save_array
from common.errors import ConfigError, DataError
from common.publishing import meta_path
from recommendation.inputs import Choice
from recommendation.main import main
from recommendation.runs import load_recommender
from tests.errors import refused

from ..test_pipeline import ITEMS_SHA256

# Items 0 to 28 have training events, item 29 only a test event.
HISTORIES = [[*range(start, 29), 0, 29] for start in (0, 5)]


@pytest.fixture
def sasrec(train):
    return train("sasrec", HISTORIES, d_model=8, num_heads=2)


def export(trained, *words: str) -> None:
    main(trained.argv("--export_item_embeddings=mine", *words))


@pytest.mark.slow
def test_the_embedding_has_the_models_vectors_and_a_mask(sasrec):
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
def test_an_export_killed_before_its_last_rename_is_repeated(sasrec):
    export(sasrec, "--model=sasrec")
    meta = meta_path(sasrec.folder.embeddings("mine"))
    meta.rename(meta.with_name(f".{meta.name}.tmp-0123456789abcdef"))
    export(sasrec, "--model=sasrec")
    assert load_embeddings(sasrec.folder, "mine").shape == (30, 8)


@pytest.mark.slow
def test_only_its_own_embedding_is_overwritten_without_force(sasrec):
    export(sasrec, "--model=sasrec")
    export(sasrec, "--model=sasrec")
    path = sasrec.folder.embeddings("mine")
    save_array(path, np.ones((30, 2), dtype=np.float32), {
        "inputs": {}, "items_sha256": ITEMS_SHA256, "command": "a command"})
    before = path.read_bytes()
    with refused(ConfigError, path, names=["a command"], fix=["--export_item_embeddings", "--force"]):
        export(sasrec, "--model=sasrec")
    assert path.read_bytes() == before
    export(sasrec, "--model=sasrec", "--force")
    assert load_embeddings(sasrec.folder, "mine").shape == (30, 8)


@pytest.mark.parametrize("suffix", ["td", "image", "cf", "fused-pca"])
def test_a_name_of_the_data_stage_needs_force(sasrec, suffix):
    with refused(ConfigError, f"--export_item_embeddings {suffix}", fix=["sasrec", "--force"]):
        main(sasrec.argv("--model=sasrec", f"--export_item_embeddings={suffix}"))
    assert not sasrec.folder.embeddings(suffix).exists()


def test_a_model_without_item_embeddings_is_refused(sasrec):
    with refused(ConfigError, "--model markov", fix=["--model sasrec"]):
        export(sasrec, "--model=markov")


def test_a_missing_run_gives_the_training_command(train):
    trained = train("markov", HISTORIES)
    command = (f"python recommendation/main.py --model=sasrec --category=Tiny --run_root {trained.run_root} "
               f"--data_root {trained.folder.data_root}")
    with refused(DataError, trained.run_root / "recommendation/Tiny/sasrec/no-codes", fix=[command]):
        export(trained, "--model=sasrec")


@pytest.mark.slow
def test_flags_that_change_the_run_are_refused_except_device(sasrec):
    with refused(ConfigError, "--export_item_embeddings", fix=["--epochs"]):
        export(sasrec, "--model=sasrec", "--epochs=3")
    with refused(ConfigError, "--export_item_embeddings", fix=["--seeds --export_t5"]):
        export(sasrec, "--model=encoder_decoder", "--seeds=1,2", "--export_t5=t5")
    export(sasrec, "--model=sasrec", "--device=cpu")
