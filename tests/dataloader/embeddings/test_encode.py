"""What is encoded, in which order, and what of it comes from the cache; the encoder is a stand-in that counts."""

import hashlib
import logging

import numpy as np
import pytest

from common.errors import DataError, ResourceError
from dataloader.embeddings.cache import VectorCache
from dataloader.embeddings.encode import BatchFailed, Texts, encode_all


def vector_of(text: str, dim: int = 4) -> list[float]:
    """Numbers that no other text has, and that are exact in float32."""
    return [1.0 + byte for byte in hashlib.sha256(text.encode()).digest()[:dim]]


class Counting:
    """An encoder that keeps the lists of texts that it was given."""

    unit, flag = "texts", "--text_model"

    def __init__(self, shard_size: int = 3, dim: int = 4, name: str = "counting"):
        self.identity, self.shard_size, self.dim, self.calls = {"encoder": name}, shard_size, dim, []

    def encode(self, texts, done):
        self.calls.append(list(texts))
        done(len(texts))
        return np.array([vector_of(text, self.dim) for text in texts], dtype=np.float32)

    @property
    def texts(self) -> list[str]:
        return [text for call in self.calls for text in call]


def run(tmp_path, texts: list[str], encoder, fresh: bool = False) -> np.ndarray:
    raw_ids = np.array([f"raw-{n}" for n in range(len(texts))], dtype=object)
    items = Texts(np.array(texts, dtype=object), raw_ids, tmp_path / "x.npy")
    return encode_all(encoder, items, VectorCache(tmp_path, encoder.identity), fresh)


def expected(texts: list[str]) -> np.ndarray:
    return np.array([vector_of(text) for text in texts], dtype=np.float32)


TEXTS = ["bb", "a", "cccc", "bb", "ddd", "a", "eeeee", "", "f", "a"]  # 7 different ones


def test_row_i_belongs_to_item_i_and_equal_texts_are_encoded_once(tmp_path):
    encoder = Counting()
    np.testing.assert_array_equal(run(tmp_path, TEXTS, encoder), expected(TEXTS))
    assert sorted(encoder.texts) == sorted(set(TEXTS))


def test_long_texts_come_first_and_those_of_one_length_by_their_hash_whatever_the_order_of_the_items(tmp_path):
    # sha256("f") begins with 25…, sha256("a") with ca….
    for name, texts in (("one", TEXTS), ("other", TEXTS[::-1])):
        encoder = Counting()
        run(tmp_path / name, texts, encoder)
        assert encoder.calls == [["eeeee", "cccc", "ddd"], ["bb", "f", "a"], [""]]


def test_a_thousand_more_items_cost_a_thousand_encodings(tmp_path):
    texts = [f"item {n}" for n in range(2000)]
    run(tmp_path, texts, Counting(shard_size=128))
    more = [f"new {n}" for n in range(1000)]
    encoder = Counting(shard_size=128)
    np.testing.assert_array_equal(run(tmp_path, more[:500] + texts + more[500:], encoder),
                                  expected(more[:500] + texts + more[500:]))
    assert sorted(encoder.texts) == sorted(more)


def test_everything_cached_means_that_the_encoder_is_not_asked(tmp_path):
    run(tmp_path, TEXTS, Counting())
    encoder = Counting()
    np.testing.assert_array_equal(run(tmp_path, TEXTS[::-1], encoder), expected(TEXTS[::-1]))
    assert encoder.calls == []


def test_another_encoder_has_a_cache_of_its_own(tmp_path):
    run(tmp_path, TEXTS, Counting())
    other = Counting(name="another")
    run(tmp_path, TEXTS, other)
    assert len(other.texts) == 7


def test_a_fresh_run_encodes_all_again_and_takes_the_place_of_what_was_there(tmp_path):
    run(tmp_path, TEXTS, Counting())
    run(tmp_path, ["of another data set"], Counting())
    num_shards = len(list(tmp_path.rglob("*.safetensors")))

    class Changed(Counting):
        def encode(self, texts, done):
            return -super().encode(texts, done)

    np.testing.assert_array_equal(run(tmp_path, TEXTS, Changed(), fresh=True), -expected(TEXTS))
    np.testing.assert_array_equal(run(tmp_path, TEXTS, Counting()), -expected(TEXTS))
    assert len(list(tmp_path.rglob("*.safetensors"))) == num_shards
    encoder = Counting()
    run(tmp_path, ["of another data set"], encoder)
    assert encoder.calls == []


class Killed(BaseException):
    pass


@pytest.mark.parametrize("done", [0, 1, 2, 3])
def test_after_a_kill_the_shards_that_are_left_are_the_same(tmp_path, done):
    class Dying(Counting):
        def encode(self, texts, progress):
            if len(self.calls) == done:
                raise Killed
            return super().encode(texts, progress)

    texts = [f"{n}" * (1 + n % 4) for n in range(10)]
    straight, dying, resumed = Counting(), Dying(), Counting()
    run(tmp_path / "straight", texts, straight)
    with pytest.raises(Killed):
        run(tmp_path / "killed", texts, dying)
    np.testing.assert_array_equal(run(tmp_path / "killed", texts, resumed), expected(texts))
    assert dying.calls + resumed.calls == straight.calls
    assert len(resumed.calls) == 4 - done


def test_a_damaged_shard_is_encoded_again_and_only_that(tmp_path, caplog):
    run(tmp_path, TEXTS, Counting())
    shards = sorted(tmp_path.rglob("*.safetensors"))
    shards[1].write_bytes(shards[1].read_bytes()[:-1])
    encoder = Counting()
    with caplog.at_level(logging.WARNING):
        np.testing.assert_array_equal(run(tmp_path, TEXTS, encoder), expected(TEXTS))
    assert encoder.calls == [["bb", "f", "a"]]
    assert "is damaged" in caplog.text


def test_vectors_that_another_process_writes_meanwhile_do_no_harm(tmp_path):
    class Raced(Counting):
        def encode(self, texts, done):
            run(tmp_path, TEXTS, Counting())
            return super().encode(texts, done)

    np.testing.assert_array_equal(run(tmp_path, TEXTS, Raced()), expected(TEXTS))
    np.testing.assert_array_equal(run(tmp_path, TEXTS, Counting()), expected(TEXTS))


@pytest.mark.parametrize("bad", [np.nan, np.inf, 0.0])
def test_a_vector_that_is_not_usable_is_an_error_with_the_item_and_is_not_cached(tmp_path, bad):
    class Faulty(Counting):
        def encode(self, texts, done):
            vectors = super().encode(texts, done)
            for row, text in enumerate(texts):
                if text in ("bb", "f"):
                    vectors[row] = 0
                    vectors[row, 2] = bad
            return vectors

    with pytest.raises(DataError) as error:
        run(tmp_path, TEXTS, Faulty())
    assert error.value.exit_code == 3
    assert "no usable vector for 2 texts" in error.value.what
    assert error.value.why == "Items: raw-0, raw-8"
    encoder = Counting()
    run(tmp_path, TEXTS, encoder)
    assert encoder.calls == [["bb", "f", "a"], [""]]  # the shard before the fault was kept


@pytest.mark.parametrize("out_of_memory", [False, True])
def test_a_batch_that_fails_is_an_error_with_its_items(tmp_path, out_of_memory):
    class Failing(Counting):
        def encode(self, texts, done):
            if "bb" in texts:
                raise BatchFailed(range(2), "RuntimeError: it broke", out_of_memory)
            return super().encode(texts, done)

    with pytest.raises(ResourceError if out_of_memory else DataError) as error:
        run(tmp_path, TEXTS, Failing())
    assert error.value.exit_code == (5 if out_of_memory else 3)
    assert "Items: raw-0, raw-8" in error.value.why
    assert ("not enough memory" in error.value.what) == out_of_memory
    assert ("it broke" in error.value.why) != out_of_memory


def test_of_many_failed_items_ten_are_named_and_the_rest_counted(tmp_path):
    class Failing(Counting):
        def encode(self, texts, done):
            raise BatchFailed(range(len(texts)), "it broke")

    with pytest.raises(DataError) as error:
        run(tmp_path, [f"{n:02d}" for n in range(12)], Failing(shard_size=12))
    assert ", ".join(f"raw-{n}" for n in range(10)) + " and 2 more" in error.value.why


def test_a_model_that_changed_its_dimensions_under_the_same_name_is_an_error_until_it_is_forced(tmp_path):
    run(tmp_path, ["a", "b", "c", "dd"], Counting(dim=4))
    with pytest.raises(DataError, match="gives 5 dimensions"):
        run(tmp_path, ["a", "b", "new"], Counting(dim=5))
    assert run(tmp_path, ["a", "b", "new"], Counting(dim=5), fresh=True).shape == (3, 5)
    encoder = Counting(dim=5)
    assert run(tmp_path, ["a", "dd"], encoder).shape == (2, 5)
    assert encoder.calls == [["dd"]]
