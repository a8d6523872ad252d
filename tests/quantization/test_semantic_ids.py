"""Semantic IDs from Python."""

import numpy as np
import pytest

from common.artifacts import DatasetFolder
from common.errors import ArtifactError, ConfigError, DataError
from quantization import SemanticIDs
from tests.errors import refused

from .tiny_data import save_codes, save_interactions, save_items

CODES = np.array([[1, 0, 0], [1, 0, 1], [1, 2, 0], [0, 2, 0]])


@pytest.fixture
def folder(tmp_path) -> DatasetFolder:
    folder = save_items(DatasetFolder(tmp_path, "Tiny"), len(CODES))
    save_codes(folder, CODES, [2, 3, 2], "rqvae")
    save_interactions(folder, [(0, 0, "train")])
    return folder


@pytest.fixture
def ids(folder) -> SemanticIDs:
    return SemanticIDs.load("Tiny", data_root=folder.data_root)


def test_codes_of_items_and_items_of_prefixes(ids):
    assert len(ids) == 4
    assert np.array_equal(ids.codes, CODES)
    assert ids.codebook_sizes == [2, 3, 2]
    assert ids.of("raw 2") == (1, 2, 0)
    assert ids.items((1, 0)) == ["raw 0", "raw 1"]
    assert ids.items([1]) == ["raw 0", "raw 1", "raw 2"]
    assert ids.items() == ["raw 0", "raw 1", "raw 2", "raw 3"]
    assert ids.items(ids.of("raw 3")) == ["raw 3"]
    assert ids.items((0, 0)) == []


def test_unknown_items_and_long_prefixes_are_refused(ids):
    with refused(DataError, "raw_id", names=["'Raw 2'"], fix=["'raw 2'"]):
        ids.of("Raw 2")
    with refused(ConfigError, "prefix", names=[4, 3]):
        ids.items((1, 0, 0, 0))
    with refused(ConfigError, "raw_id", names=[242], fix=["'242'"]):
        ids.of(242)


def test_loading_has_the_checks_of_the_commands(folder):
    with refused(ConfigError, "quantizer", names=["'../x'"]):
        SemanticIDs.load("Tiny", quantizer="../x", data_root=folder.data_root)
    with pytest.raises(DataError):
        SemanticIDs.load("Tiny", quantizer="rkmeans", data_root=folder.data_root)
    with pytest.raises(ConfigError):
        SemanticIDs.load("Tinny", data_root=folder.data_root)
    save_items(folder, len(CODES), ["other", "titles", "of", "items"])
    with pytest.raises(ArtifactError):
        SemanticIDs.load("Tiny", data_root=folder.data_root)
