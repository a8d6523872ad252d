"""Loading of embeddings, and the order of training."""

import numpy as np
import pytest
import torch

from common.artifacts import DatasetFolder, ids_sha256, load_meta, save_array
from common.errors import DataError
from common.publishing import file_sha256
from quantization.dataset import Batches, Embeddings
from tests.errors import refused
from tests.quantization.tiny_data import save_items


@pytest.fixture
def folder(tmp_path) -> DatasetFolder:
    """A dataset of three items with the embeddings td (2 wide) and image (1 wide)."""
    folder = DatasetFolder(tmp_path, "Tiny")
    save_items(folder, 3)
    items = load_meta(folder.items, "")
    meta = {"inputs": {folder.items.name: items["sha256"]}, "items_sha256": items["items_sha256"]}
    save_array(folder.embeddings("td"), np.array([[1, 2], [3, 4], [5, 6]], dtype=np.float32), meta)
    save_array(folder.embeddings("image"), np.array([[7], [8], [9]], dtype=np.float32), meta)
    return folder


def test_one_embedding_is_read_with_its_hash(folder):
    embeddings = Embeddings.load(folder, ["td"])
    assert embeddings.xs.tolist() == [[1, 2], [3, 4], [5, 6]]
    assert embeddings.xs.dtype == np.float32
    assert embeddings.inputs == {"td": 2}
    assert embeddings.hashes == {"Tiny.emb-td.npy": file_sha256(folder.embeddings("td"))}
    assert embeddings.items_sha256 == ids_sha256(["raw 0", "raw 1", "raw 2"])


def test_several_embeddings_are_joined_in_the_given_order(folder):
    embeddings = Embeddings.load(folder, ["image", "td"])
    assert embeddings.xs.tolist() == [[7, 1, 2], [8, 3, 4], [9, 5, 6]]
    assert list(embeddings.inputs.items()) == [("image", 1), ("td", 2)]
    assert set(embeddings.hashes) == {"Tiny.emb-td.npy", "Tiny.emb-image.npy"}


def test_no_embedding_gives_item_numbers_and_the_items_hash(folder):
    embeddings = Embeddings.load(folder, [])
    assert embeddings.xs.tolist() == [[0], [1], [2]]
    assert embeddings.inputs == {}
    assert embeddings.hashes == {"items.parquet": file_sha256(folder.items)}


def test_a_missing_embedding_names_the_command_that_makes_it(folder):
    with refused(DataError, folder.embeddings("cf"),
                 fix=["bash dataloader/run_pipeline.sh --dataset Tiny --suffix cf"]):
        Embeddings.load(folder, ["cf"])


@pytest.mark.parametrize("value", [1e30, -1e30])
def test_an_embedding_whose_squares_are_infinite_is_refused(folder, value):
    meta = {"inputs": {}, "items_sha256": load_meta(folder.items, "")["items_sha256"]}
    save_array(folder.embeddings("own"), np.array([[1, 2], [3, value], [5, 6]], dtype=np.float32), meta)
    with refused(DataError, folder.embeddings("own"), names=["1e+30"]):
        Embeddings.load(folder, ["td", "own"])


ROWS = torch.arange(10.0).unsqueeze(1)


def epoch_of(batches: Batches, epoch: int) -> list[list[float]]:
    return [batches.get(epoch, index).flatten().tolist() for index in range(batches.num_batches)]


def test_an_epoch_visits_every_item_once():
    batches = Batches(ROWS, batch_size=4, seed=0)
    epoch = epoch_of(batches, 0)
    assert [len(batch) for batch in epoch] == [4, 4, 2]
    assert sorted(sum(epoch, [])) == list(range(10))


def test_the_order_is_a_function_of_seed_and_epoch():
    batches = Batches(ROWS, batch_size=4, seed=0)
    first, second = epoch_of(batches, 0), epoch_of(batches, 1)
    assert first != second
    assert epoch_of(batches, 0) == first
    fresh = Batches(ROWS, batch_size=4, seed=0)
    assert fresh.get(1, 2).flatten().tolist() == second[2]
    assert epoch_of(Batches(ROWS, batch_size=4, seed=1), 0) != first


def test_a_batch_may_be_larger_than_the_data():
    assert Batches(ROWS, batch_size=64, seed=0).num_batches == 1


def test_a_batch_knows_its_items():
    batches = Batches(10 * ROWS, batch_size=4, seed=0)
    numbers = [batches.numbers(epoch, index).tolist() for epoch in (3, 4) for index in range(3)]
    assert sorted(sum(numbers[:3], [])) == list(range(10))
    assert numbers[1] == [row / 10 for row in batches.get(3, 1).flatten().tolist()]
    assert numbers[5] == Batches(ROWS, batch_size=4, seed=0).numbers(4, 2).tolist()
