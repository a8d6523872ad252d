"""Which texts are encoded, in which order, and which come from the cache. The encoder is a stub that counts."""

import hashlib
import logging
import re

import numpy as np
import pytest

from common.errors import DataError, ResourceError
from dataloader.embeddings import encode, processes
from dataloader.embeddings.cache import VectorCache
from dataloader.embeddings.encode import BatchFailed, Texts, encode_all
from tests.dataloader.helpers import mentions
from tests.errors import refused


def vector_of(text: str, dim: int = 4) -> list[float]:
    """Numbers of this text alone, exact in float32."""
    return [1.0 + byte for byte in hashlib.sha256(text.encode()).digest()[:dim]]


class Counting:
    """An encoder that keeps the lists of texts it received."""

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


def ids(text: str) -> list[str]:
    """The raw ids in a message."""
    return re.findall(r"raw-\d+", text)


def expected(texts: list[str]) -> np.ndarray:
    return np.array([vector_of(text) for text in texts], dtype=np.float32)


TEXTS = ["bb", "a", "cccc", "bb", "ddd", "a", "eeeee", "", "f", "a"]  # 7 different ones


def test_row_i_is_item_i_and_equal_texts_encode_once(tmp_path):
    encoder = Counting()
    np.testing.assert_array_equal(run(tmp_path, TEXTS, encoder), expected(TEXTS))
    assert sorted(encoder.texts) == sorted(set(TEXTS))


def test_texts_are_encoded_by_length_then_hash(tmp_path):
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


def test_cached_texts_do_not_reach_the_encoder(tmp_path):
    run(tmp_path, TEXTS, Counting())
    encoder = Counting()
    np.testing.assert_array_equal(run(tmp_path, TEXTS[::-1], encoder), expected(TEXTS[::-1]))
    assert encoder.calls == []


def test_another_encoder_has_a_cache_of_its_own(tmp_path):
    run(tmp_path, TEXTS, Counting())
    other = Counting(name="another")
    run(tmp_path, TEXTS, other)
    assert len(other.texts) == 7


def test_a_fresh_run_replaces_the_cached_vectors(tmp_path):
    run(tmp_path, TEXTS, Counting())
    run(tmp_path, ["of another dataset"], Counting())
    num_shards = len(list(tmp_path.rglob("*.safetensors")))

    class Changed(Counting):
        def encode(self, texts, done):
            return -super().encode(texts, done)

    np.testing.assert_array_equal(run(tmp_path, TEXTS, Changed(), fresh=True), -expected(TEXTS))
    np.testing.assert_array_equal(run(tmp_path, TEXTS, Counting()), -expected(TEXTS))
    assert len(list(tmp_path.rglob("*.safetensors"))) == num_shards
    encoder = Counting()
    run(tmp_path, ["of another dataset"], encoder)
    assert encoder.calls == []


class Killed(BaseException):
    pass


@pytest.mark.parametrize("done", [0, 1, 2, 3])
def test_after_a_kill_the_remaining_shards_are_the_same(tmp_path, done):
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
    assert str(shards[1]) in caplog.text


def test_vectors_written_by_another_process_do_no_harm(tmp_path):
    class Raced(Counting):
        def encode(self, texts, done):
            run(tmp_path, TEXTS, Counting())
            return super().encode(texts, done)

    np.testing.assert_array_equal(run(tmp_path, TEXTS, Raced()), expected(TEXTS))
    np.testing.assert_array_equal(run(tmp_path, TEXTS, Counting()), expected(TEXTS))


@pytest.mark.parametrize("bad", [np.nan, np.inf, 0.0])
def test_an_invalid_vector_is_refused_and_not_cached(tmp_path, bad):
    class Faulty(Counting):
        def encode(self, texts, done):
            vectors = super().encode(texts, done)
            for row, text in enumerate(texts):
                if text in ("bb", "f"):
                    vectors[row] = 0
                    vectors[row, 2] = bad
            return vectors

    with refused(DataError, tmp_path / "x.npy", fix=["--text_model"]) as error:
        run(tmp_path, TEXTS, Faulty())
    assert mentions(error.value.what, 2)
    assert ids(error.value.why) == ["raw-0", "raw-8"]
    encoder = Counting()
    run(tmp_path, TEXTS, encoder)
    assert encoder.calls == [["bb", "f", "a"], [""]]  # the shard before the fault was kept


@pytest.mark.parametrize("out_of_memory", [False, True])
def test_a_failed_batch_is_an_error_with_its_items(tmp_path, out_of_memory):
    class Failing(Counting):
        def encode(self, texts, done):
            if "bb" in texts:
                raise BatchFailed(range(2), "RuntimeError: it broke", out_of_memory)
            return super().encode(texts, done)

    kind, flags = (ResourceError, ["--text_model", "--device"]) if out_of_memory else (DataError, ["--text_model"])
    with refused(kind, tmp_path / "x.npy", fix=flags) as error:
        run(tmp_path, TEXTS, Failing())
    assert ids(error.value.why) == ["raw-0", "raw-8"]
    assert ("it broke" in error.value.why) != out_of_memory


def test_ten_failed_items_are_named_and_the_rest_counted(tmp_path):
    class Failing(Counting):
        def encode(self, texts, done):
            raise BatchFailed(range(len(texts)), "it broke")

    with refused(DataError, tmp_path / "x.npy") as error:
        run(tmp_path, [f"{n:02d}" for n in range(12)], Failing(shard_size=12))
    assert mentions(error.value.what, 12)
    assert ids(error.value.why) == [f"raw-{n}" for n in range(10)]
    assert mentions(re.sub(r"raw-\d+", "", error.value.why), 2)  # more


def test_a_change_of_dimensions_needs_force(tmp_path):
    run(tmp_path, ["a", "b", "c", "dd"], Counting(dim=4))
    with refused(DataError, tmp_path / "x.npy", names=[".embeddings"], fix=["--force"]) as error:
        run(tmp_path, ["a", "b", "new"], Counting(dim=5))
    assert mentions(error.value.what, 5)
    assert mentions(error.value.why, 4)
    assert run(tmp_path, ["a", "b", "new"], Counting(dim=5), fresh=True).shape == (3, 5)
    encoder = Counting(dim=5)
    assert run(tmp_path, ["a", "dd"], encoder).shape == (2, 5)
    assert encoder.calls == [["dd"]]


@pytest.fixture
def run_together(process, monkeypatch):
    """Runs one process for each encoder, one after the other, and returns the vectors of the first one.

    The first one reads the cache, then the others run, and then the first one encodes. `meanwhile` is called before the
    others run, and `afterwards` after that.
    """
    monkeypatch.setattr(processes, "_all_gather", lambda error: [error])

    def run_all(tmp_path, texts, encoders, fresh=False, meanwhile=lambda: None, afterwards=lambda: None):
        state: list[np.ndarray] = []

        def all_gather_rows(*arrays):
            if not state:
                state.extend(array.copy() for array in arrays)
                meanwhile()
                for rank, encoder in enumerate(encoders[1:], 1):
                    process(rank, len(encoders))
                    assert run(tmp_path, texts, encoder, fresh) is None
                process(0, len(encoders))
                afterwards()
            for array, shared in zip(arrays, state, strict=True):
                assert array is not shared
                array[...] = shared

        monkeypatch.setattr(encode, "all_gather_rows", all_gather_rows)
        process(0, len(encoders))
        return run(tmp_path, texts, encoders[0], fresh)
    return run_all


LONG_LIST = [f"{n}" * (1 + n % 4) for n in range(14)]  # 5 shards of 3, the last one has 2


@pytest.mark.parametrize("count", [2, 3, 7])
@pytest.mark.parametrize("cached", [0, 2])
def test_processes_share_the_shards_of_one_process(tmp_path, run_together, count, cached):
    straight = Counting()
    run(tmp_path / "straight", LONG_LIST, straight)
    for call in straight.calls[1:1 + cached]:
        run(tmp_path / "together", call, Counting())
    encoders = [Counting() for _ in range(count)]
    vectors = run_together(tmp_path / "together", LONG_LIST, encoders)
    np.testing.assert_array_equal(vectors, expected(LONG_LIST))
    missing = straight.calls[:1] + straight.calls[1 + cached:]
    assert [encoder.calls for encoder in encoders] == [missing[rank::count] for rank in range(count)]


def test_another_command_does_not_change_the_shares(tmp_path, run_together, monkeypatch):
    def fill_cache():
        with monkeypatch.context() as alone:
            alone.delenv("TORCHELASTIC_RUN_ID")
            alone.setattr(encode, "all_gather_rows", lambda *arrays: None)
            run(tmp_path, LONG_LIST, Counting())

    encoders = [Counting(), Counting()]
    np.testing.assert_array_equal(run_together(tmp_path, LONG_LIST, encoders, meanwhile=fill_cache),
                                  expected(LONG_LIST))
    assert [len(encoder.calls) for encoder in encoders] == [3, 2]


def test_the_first_process_encodes_a_lost_shard_again(tmp_path, run_together):
    def lose_one():
        sorted(tmp_path.rglob("*.safetensors"))[0].unlink()

    encoders = [Counting(), Counting()]
    np.testing.assert_array_equal(run_together(tmp_path, LONG_LIST, encoders, afterwards=lose_one),
                                  expected(LONG_LIST))
    assert encoders[0].calls[3:] == encoders[1].calls[:1]


def test_fresh_vectors_of_all_processes_replace_the_cached(tmp_path, run_together):
    class Changed(Counting):
        def encode(self, texts, done):
            return -super().encode(texts, done)

    run(tmp_path, LONG_LIST, Counting())
    encoders = [Changed(), Changed()]
    np.testing.assert_array_equal(run_together(tmp_path, LONG_LIST, encoders, fresh=True), -expected(LONG_LIST))
    assert [len(encoder.calls) for encoder in encoders] == [3, 2]
    assert len(list(tmp_path.rglob("*.safetensors"))) == 5


def test_every_process_refuses_other_dimensions(tmp_path, run_together):
    run(tmp_path, ["a", "b", "c", "dd"], Counting())
    with refused(DataError, tmp_path / "x.npy", names=[".embeddings"], fix=["--force"]):
        run_together(tmp_path, [*LONG_LIST, "a"], [Counting(), Counting(dim=5)])
