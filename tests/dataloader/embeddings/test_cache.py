"""Vectors on disk, found by the content that they were made from."""

import errno
import fcntl
import hashlib
import json
import logging
import os

import numpy as np
import pytest
from safetensors.numpy import save_file

from dataloader.embeddings.cache import VectorCache, text_keys

IDENTITY = {"encoder": "of a test", "precision": "float32"}


@pytest.fixture
def cache(tmp_path) -> VectorCache:
    return VectorCache(tmp_path, IDENTITY)


def fill(cache: VectorCache, texts: list[str], value: float = 1.0) -> None:
    cache.write(text_keys(texts), np.full((len(texts), 3), value, dtype=np.float32))


def content(cache: VectorCache) -> dict[bytes, float]:
    """Key -> first number of its vector, the newest shard winning."""
    found = {}
    for keys, vectors in cache.shards():
        for key, vector in zip(keys.tolist(), vectors, strict=True):
            found.setdefault(key, float(vector[0]))
    return found


def key(text: str) -> bytes:
    return text_keys([text]).tolist()[0]


def test_keys_are_the_first_bytes_of_the_sha256():
    texts = ["red", "", "ein Füller \ud800", "x" * 100_000]
    keys = np.ascontiguousarray(text_keys(texts)).view(np.uint8).reshape(-1, 16)
    for text, row in zip(texts, keys, strict=True):
        assert row.tobytes() == hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()[:16]


def test_keys_with_zeros_at_the_end_stay_apart():
    # One text in 256 has such a key; among 3,000 there are about a dozen.
    texts = [str(n) for n in range(3000)]
    keys = text_keys(texts)
    assert sum(hashlib.sha256(t.encode()).digest()[15] == 0 for t in texts) > 3
    assert len(np.unique(keys)) == len(texts)


def test_a_cache_of_the_same_identity_reads_the_vectors(tmp_path, cache):
    rng = np.random.default_rng(0)
    keys, vectors = text_keys(["a", "b"]), rng.normal(size=(2, 5)).astype(np.float32)
    cache.write(keys, vectors)
    [shard] = VectorCache(tmp_path, dict(reversed(IDENTITY.items()))).shards()
    np.testing.assert_array_equal(shard[0], keys)
    np.testing.assert_array_equal(shard[1], vectors)


def test_another_identity_has_a_cache_of_its_own(tmp_path, cache):
    fill(cache, ["a"])
    assert list(VectorCache(tmp_path, {**IDENTITY, "precision": "float16"}).shards()) == []


def test_the_folder_holds_its_identity_and_the_shards_alone(tmp_path, cache):
    fill(cache, ["a"])
    fill(cache, ["b"])
    assert json.loads((cache.folder / "encoder.json").read_text()) == IDENTITY
    assert cache.folder.parent == tmp_path / ".embeddings"
    assert len(list(cache.folder.iterdir())) == 3


def test_the_newest_shard_comes_first(cache):
    for value in range(1, 13):
        fill(cache, ["a", f"text {value}"], value)
    assert content(cache)[key("a")] == 12
    assert len(content(cache)) == 13


def test_two_writers_with_one_number_keep_both_shards(cache, monkeypatch):
    monkeypatch.setattr(cache, "newest", lambda: 6)
    fill(cache, ["a"])
    fill(cache, ["b"])
    assert set(content(cache)) == {key("a"), key("b")}


@pytest.mark.parametrize("damage", ["empty", "truncated", "flipped", "other tensors", "other shape"])
def test_a_damaged_shard_is_deleted_with_a_warning(cache, caplog, damage):
    fill(cache, ["a"], 1)
    fill(cache, ["b"], 2)
    path = min(cache.folder.glob("*.safetensors"))
    whole = path.read_bytes()
    if damage == "empty":
        path.write_bytes(b"")
    elif damage == "truncated":
        path.write_bytes(whole[:-1])
    elif damage == "flipped":
        path.write_bytes(whole[:-2] + bytes([whole[-2] ^ 1]) + whole[-1:])
    elif damage == "other tensors":
        save_file({"x": np.zeros(3, dtype=np.float32)}, path)
    else:
        save_file({"keys": np.zeros((2, 15), dtype=np.uint8), "vectors": np.zeros((2, 3), dtype=np.float32)}, path)
    with caplog.at_level(logging.WARNING):
        assert content(cache) == {key("b"): 2.0}
    [warning] = caplog.messages
    assert str(path) in warning
    assert not path.exists()
    caplog.clear()
    assert content(cache) == {key("b"): 2.0}
    assert caplog.messages == []


def test_a_shard_deleted_while_reading_is_skipped(cache):
    for value in range(3):
        fill(cache, [f"text {value}"], value)
    reading = cache.shards()
    next(reading)
    min(cache.folder.glob("*.safetensors")).unlink()
    assert len(list(reading)) == 1


def test_staged_files_of_killed_processes_alone_are_deleted(cache):
    fill(cache, ["a"])
    dead, alive = (cache.folder / f".000009-00000000.safetensors.tmp-{token}" for token in ("1", "2"))
    dead.write_bytes(b"half")
    with alive.open("wb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        fill(cache, ["b"])
    assert not dead.exists()
    assert alive.exists()
    assert set(content(cache)) == {key("a"), key("b")}


def test_only_shards_that_were_encoded_again_are_dropped(cache):
    fill(cache, ["a", "b"], 1)
    fill(cache, ["b", "c"], 2)
    newest = cache.newest()
    fill(cache, ["a", "b"], 3)
    cache.drop_superseded(newest, np.sort(text_keys(["a", "b"])))
    assert content(cache) == {key("a"): 3.0, key("b"): 3.0, key("c"): 2.0}
    assert len(list(cache.folder.glob("*.safetensors"))) == 2


def test_a_full_disk_leaves_no_shard_and_no_staged_file(cache, monkeypatch):
    fill(cache, ["a"])

    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device", str(cache.folder))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError) as error:  # noqa: PT011 (its number is checked)
        fill(cache, ["b"])
    assert error.value.errno == errno.ENOSPC
    assert set(content(cache)) == {key("a")}
    assert len(list(cache.folder.iterdir())) == 2
