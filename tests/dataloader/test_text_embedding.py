"""Step 3: the choice of the encoder, reuse of vectors, the artifact's meta, and continuing after a kill."""

import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest

from common import publishing
from common.artifacts import load_embeddings, load_meta
from common.errors import ConfigError, DataError
from common.publishing import file_sha256
from dataloader import text_embedding
from dataloader.embeddings import sentence
from dataloader.embeddings.models import content_sha256, model_files
from dataloader.embeddings.sentence import HalfPrecisionOverflow, SentenceEncoder
from dataloader.text_embedding import embed
from tests.dataloader.dataset import add_item, write_dataset
from tests.dataloader.endpoint import KEY, Endpoint, vector
from tests.dataloader.helpers import logged, make_options
from tests.dataloader.processing import prints, version
from tests.dataloader.tiny_model import DIM, save_tiny_model
from tests.errors import refused

ROOT = Path(__file__).resolve().parents[2]
TEXTS = ["red", "soft warm blue blanket with small green toy for baby and crib", "green crib", "red",
         "large red seat for baby and toy", "toy", "warm bottle with soft seat", "baby bottle"]
PLAIN = {"pca": None, "whiten": False, "zscore": False, "l2": False}


@pytest.fixture(scope="session")
def model(tmp_path_factory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("tiny"))


def shop(tmp_path, model: Path | str, *flags: str, texts: list[str] = TEXTS):
    return write_dataset(tmp_path / "data", texts, "--text_model", str(model), "--device", "cpu", *flags).text


def embedded(options, suffix: str = "td") -> np.ndarray:
    embed(options, "bash dataloader/3_get_text_emb.sh")
    return load_embeddings(options.folder, suffix)


@pytest.fixture
def encoded(monkeypatch) -> list[str]:
    """The texts that the sentence-transformers model encodes from now on."""
    texts, encode = [], SentenceEncoder.encode

    def counting(encoder, part, done):
        texts.extend(part)
        return encode(encoder, part, done)

    monkeypatch.setattr(SentenceEncoder, "encode", counting)
    return texts


@pytest.mark.slow
@pytest.mark.parametrize("reverse", [False, True])
def test_row_i_belongs_to_item_i_in_every_order(tmp_path, model, monkeypatch, reverse):
    from sentence_transformers import SentenceTransformer

    monkeypatch.setattr(sentence, "SHARD", 3)
    monkeypatch.setitem(sentence.BATCH, "cpu", 2)
    texts = TEXTS[::-1] if reverse else TEXTS
    vectors = embedded(shop(tmp_path, model, texts=texts))
    library = SentenceTransformer(str(model), device="cpu")
    one_by_one = np.stack([library.encode(text, show_progress_bar=False) for text in texts])
    np.testing.assert_allclose(vectors, one_by_one, rtol=0, atol=1e-6)
    distances = np.linalg.norm(one_by_one[:, None] - one_by_one[None], axis=2)
    same = np.array(texts)[:, None] == np.array(texts)[None]
    assert distances[~same].min() > 0.1  # or else a swapped row would pass


def test_the_artifact_records_its_inputs_and_settings(tmp_path, model):
    options = shop(tmp_path, model)
    vectors = embedded(options)
    meta, items = load_meta(options.folder.embeddings("td"), ""), load_meta(options.folder.items, "")
    assert (vectors.dtype, vectors.shape) == (np.float32, (8, DIM))
    assert meta["inputs"] == {"items.parquet": file_sha256(options.folder.items)}
    assert meta["items_sha256"] == items["items_sha256"]
    content = content_sha256(model_files(model))
    assert meta["settings"] == {"text_model": "model", "model_sha256": content, "transform": PLAIN}
    assert meta["encoder"]["precision"] == "float32"
    assert (meta["dim"], meta["command"]) == (DIM, "bash dataloader/3_get_text_emb.sh")


def test_two_runs_in_two_places_give_the_same_bytes(tmp_path, model):
    files = []
    for name in ("first", "second"):
        options = shop(tmp_path / name, model)
        embedded(options)
        files.append(options.folder.embeddings("td").read_bytes())
    assert files[0] == files[1]


@pytest.mark.parametrize(("flags", "suffix"), [((), "td"), (("--suffix=image",), "td"), (("--suffix=cf",), "td"),
                                               (("--suffix=fused-pca",), "td"), (("--suffix=mine",), "mine")])
def test_the_step_makes_the_text_embedding_for_every_suffix(tmp_path, flags, suffix):
    options = shop(tmp_path, "tfidf", *flags)
    embed(options, "")
    assert [path.name for path in options.folder.path.glob("*.npy")] == [f"Baby.emb-{suffix}.npy"]


def test_transforms_apply_to_the_embedding_of_the_suffix(tmp_path):
    assert embedded(shop(tmp_path / "one", "tfidf", "--pca=2", "--l2")).shape == (8, 2)
    assert embedded(shop(tmp_path / "two", "tfidf", "--suffix=fused-concat", "--pca=2")).shape[1] > 2


def test_later_runs_encode_only_new_texts(tmp_path, model, encoded):
    options = shop(tmp_path, model)
    before = embedded(options)
    assert sorted(encoded) == sorted(set(TEXTS))
    written = version(options.target.path)
    embedded(options)
    assert version(options.target.path) == written
    assert len(encoded) == 7
    add_item(options, "small soft toy")
    after = embedded(options)
    assert encoded[7:] == ["small soft toy"]
    np.testing.assert_array_equal(after[:8], before)


def test_a_model_that_looks_unchanged_is_not_hashed_again(tmp_path, model, monkeypatch):
    options = shop(tmp_path, shutil.copytree(model, tmp_path / "model"))
    embedded(options)
    hashed = []
    monkeypatch.setattr(publishing, "file_sha256", lambda path: hashed.append(path) or file_sha256(path))
    embed(options, "")
    assert not [path for path in hashed if path.parent.name == "model"]
    os.utime(tmp_path / "model" / "config.json")
    embed(options, "")
    assert [path.name for path in hashed if path.parent.name == "model"] == ["config.json"]


def test_another_dataset_takes_equal_texts_from_the_cache(tmp_path, model, encoded):
    first = embedded(shop(tmp_path, model))
    encoded.clear()
    options = shop(tmp_path, model, "--dataset=Beauty", texts=["toy", "red", "green crib"])
    assert options.folder.name == "Beauty"
    np.testing.assert_array_equal(embedded(options), first[[5, 0, 2]])
    assert encoded == []


def test_force_encodes_everything_again(tmp_path, model, encoded):
    options = shop(tmp_path, model)
    before = embedded(options)
    [shard] = (tmp_path / "data" / ".embeddings").rglob("*.safetensors")
    encoded.clear()
    np.testing.assert_array_equal(embedded(options._replace(force=True)), before)
    assert len(encoded) == 7
    assert not shard.exists()
    assert len(list((tmp_path / "data" / ".embeddings").rglob("*.safetensors"))) == 1


def test_a_changed_model_in_the_same_folder_is_noticed(tmp_path, model, encoded):
    folder = shutil.copytree(model, tmp_path / "mine")
    options = shop(tmp_path, folder)
    before = embedded(options)
    shutil.copy(save_tiny_model(tmp_path / "other", seed=1) / "model.safetensors", folder)
    assert np.abs(embedded(options) - before).max() > 0.1
    assert len(encoded) == 14


def test_a_copy_of_the_model_is_the_same_model(tmp_path, model, encoded):
    options = shop(tmp_path, model)
    embedded(options)
    written = version(options.target.path)
    copy = shutil.copytree(model, tmp_path / "elsewhere" / "model")
    embedded(options._replace(model=str(copy)))
    assert version(options.target.path) == written
    assert len(encoded) == 7


def test_a_text_model_that_fails_keeps_the_old_vectors(tmp_path, model):
    options = shop(tmp_path, model)
    before = embedded(options)
    (tmp_path / "empty").mkdir()
    with refused(ConfigError, f"--text_model {tmp_path / 'empty'}"):
        embed(options._replace(model=str(tmp_path / "empty")), "")
    np.testing.assert_array_equal(load_embeddings(options.folder, "td"), before)


def test_items_with_empty_texts_are_named(tmp_path):
    options = shop(tmp_path, "tfidf", texts=["red toy", " ", "blue toy", "\t"])
    with refused(DataError, options.target.path, names=["raw-1", "raw-3"]) as raised:
        embed(options, "")
    assert "raw-0" not in str(raised.value)
    assert "raw-2" not in str(raised.value)
    assert not options.target.path.exists()


def test_an_unprocessed_dataset_names_the_command_and_the_others(tmp_path, model):
    shop(tmp_path, model)
    options = make_options(tmp_path / "data", "--dataset", "Beauty", "--text_model", str(model)).text
    with refused(ConfigError, "--dataset Beauty", names=["Baby"],
                 fix=["bash dataloader/run_pipeline.sh --dataset Beauty"]):
        embed(options, "")


@pytest.mark.parametrize("device", ["cuda:99", "gpu"])
def test_a_missing_device_is_refused_before_any_work(tmp_path, model, device):
    options = shop(tmp_path, model)
    with refused(ConfigError, "--device", names=[repr(device)], fix=["auto", "cpu"]):
        embed(options._replace(device=device), "")


def test_float32_follows_an_overflow_of_half_precision(tmp_path, model, monkeypatch, caplog):
    import torch

    class OnGpu(SentenceEncoder):
        def __init__(self, folder, devices, half):
            made.append((devices, half))
            super().__init__(folder, ["cpu"], half)

        def encode(self, texts, done):
            if self.half:
                raise HalfPrecisionOverflow(str(self.folder))
            return super().encode(texts, done)

    made = []
    monkeypatch.setattr("common.device.resolve_device", lambda name, origin: torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(sentence, "SentenceEncoder", OnGpu)
    options = shop(tmp_path, model)
    with caplog.at_level(logging.WARNING):
        vectors = embedded(options._replace(device="auto"))
    assert made == [(["cuda:0", "cuda:1"], True), (["cuda:0", "cuda:1"], False)]
    assert logged(caplog, model, "float32", level=logging.WARNING)
    np.testing.assert_allclose(vectors, embedded(shop(tmp_path / "cpu", model)), atol=1e-6)
    assert load_meta(options.folder.embeddings("td"), "")["encoder"]["precision"] == "float32"


@pytest.fixture
def become_second(process, monkeypatch):
    """Makes this process the second of two. It connects to no other process."""
    monkeypatch.setattr(text_embedding, "embedding_processes", nullcontext)
    monkeypatch.setattr("dataloader.embeddings.processes._all_gather", lambda error: [error])
    monkeypatch.setattr("dataloader.embeddings.processes.all_reduce_max", lambda *values: values)
    monkeypatch.setattr("dataloader.embeddings.encode.all_gather_rows", lambda *arrays: None)
    return lambda: process(1, count=2)


def test_one_of_several_processes_uses_only_its_own_gpu(tmp_path, model, monkeypatch, become_second):
    import torch

    class OnGpu(SentenceEncoder):
        def __init__(self, folder, devices, half):
            made.append((devices, half))
            super().__init__(folder, devices, half)

        def encode(self, texts, done):
            with pytest.raises(ConfigError):
                self.model  # noqa: B018
            raise HalfPrecisionOverflow(str(self.folder))

    def no_gpu(*args, **options):
        raise RuntimeError("there is no GPU")

    made, current = [], []
    options = shop(tmp_path, model)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    monkeypatch.setattr("sentence_transformers.SentenceTransformer", no_gpu)
    monkeypatch.setattr(sentence, "SentenceEncoder", OnGpu)
    monkeypatch.setattr(sentence, "SHARD", 4)
    become_second()
    with pytest.raises(HalfPrecisionOverflow):
        embed(options._replace(device="auto"), "")
    assert made == [(["cuda:1"], True), (["cuda:1"], False)]
    assert current == ["cuda:1", "cuda:1"]
    assert not options.target.path.exists()


def test_several_processes_keep_the_rate_of_an_api_together(tmp_path, monkeypatch, become_second):
    class Api:
        unit, flag, shard_size, identity = "texts", "--text_model", 4, {}

        def __init__(self, name, url, rate):
            rates.append(rate)

        def encode(self, texts, done):
            return np.ones((len(texts), 3), dtype=np.float32)

        def close(self):
            pass

    rates = []
    monkeypatch.setattr(text_embedding, "ApiEncoder", Api)
    options = shop(tmp_path, "api:m", "--api_url=http://127.0.0.1:9", "--api_rate=8")
    become_second()
    embed(options, "")
    assert rates == [4.0]


@pytest.fixture
def endpoint(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    server = Endpoint()
    yield server
    server.close()


@pytest.mark.slow
def test_vectors_of_an_api_are_cached_without_the_key(tmp_path, endpoint):
    options = shop(tmp_path, "api:m", "--api_url", endpoint.url, "--api_rate=1000")
    np.testing.assert_array_equal(embedded(options), np.array([vector(text) for text in TEXTS], dtype=np.float32))
    asked = len(endpoint.asked)
    meta = load_meta(options.folder.embeddings("td"), "")
    assert meta["settings"] == {"text_model": "api:m", "api_url": endpoint.url, "transform": PLAIN}
    embedded(options)
    add_item(options, "new one")
    embedded(options)
    assert endpoint.asked[asked:] == [{"model": "m", "input": ["new one"]}]
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and KEY.encode() in path.read_bytes()]


@pytest.mark.slow
def test_a_stop_does_not_wait_for_a_silent_api(tmp_path, endpoint):
    shop(tmp_path, "api:m")
    endpoint.slow = 8.0
    process = step(tmp_path, "--text_model=api:m", "--api_url", endpoint.url)
    deadline = time.monotonic() + 60
    while not endpoint.asked and time.monotonic() < deadline:
        time.sleep(0.01)
    stopped = time.monotonic()
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=30)
    assert time.monotonic() - stopped < 5
    assert process.returncode == 143
    assert [line for line in err.splitlines() if line.startswith("error: ") and " Fix: " in line]
    assert KEY not in err


@pytest.mark.parametrize("name", ["api:", ""])
def test_a_text_model_without_a_name_is_refused(tmp_path, name):
    with refused(ConfigError, f"--text_model {name}", fix=[f"--text_model {name}"]):
        embed(shop(tmp_path, name), "")


def step(tmp_path, *flags: str, script: tuple[str, ...] = ("-P", "-m", "dataloader.text_embedding"), **started):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHON": sys.executable, "OMP_NUM_THREADS": "1",
                   "HF_HUB_OFFLINE": "1"}
    return subprocess.Popen([sys.executable, *script, "--data_root", str(tmp_path / "data"), *flags], cwd=tmp_path,
                            env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **started)


def finished(process: subprocess.Popen) -> tuple[str, str]:
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    return out, err


@pytest.mark.slow
@pytest.mark.parametrize("what", ["tfidf", "reuse"])
def test_neither_tfidf_nor_reuse_waits_for_torch(tmp_path, model, what):
    options = shop(tmp_path, model if what == "reuse" else "tfidf")
    if what == "reuse":
        embedded(options)
        written = version(options.target.path)
    _, err = finished(step(tmp_path, "--text_model", options.model,
                             script=("-P", "-X", "importtime", "-m", "dataloader.text_embedding")))
    imported = {line.split("|")[-1].strip() for line in err.splitlines() if line.startswith("import time:")}
    assert not imported & {"torch", "transformers", "sentence_transformers"}
    assert what != "reuse" or version(options.target.path) == written


MANY = [" ".join(f"{word} {number}" for word in ("red", "soft", "warm", "baby")[:1 + number % 4])
        for number in range(1400)]

# Step 3 with shards of 64 texts and a pause after each, so that a signal arrives during the work.
SLOW = """
import sys
import time

from common.command import run_command
from dataloader import text_embedding
from dataloader.embeddings import cache as vector_cache
from dataloader.embeddings import sentence

sentence.SHARD = 64
write = vector_cache.VectorCache.write
vector_cache.VectorCache.write = lambda *args: (write(*args), time.sleep(0.3))
sys.exit(run_command(text_embedding.main))
"""


@pytest.mark.slow
def test_a_killed_run_continues_and_ends_with_the_same_bytes(tmp_path, model, monkeypatch, encoded, caplog):
    (tmp_path / "slow.py").write_text(SLOW)
    texts = MANY[:3 * 64 - 10]
    straight = shop(tmp_path / "straight", model, texts=texts)
    monkeypatch.setattr(sentence, "SHARD", 64)
    embedded(straight)
    killed = shop(tmp_path / "killed", model, texts=texts)
    process = step(tmp_path / "killed", "--text_model", str(model), "--device=cpu", script=(str(tmp_path / "slow.py"),))
    cache = tmp_path / "killed" / "data" / ".embeddings"
    deadline = time.monotonic() + 100
    while process.poll() is None and not list(cache.rglob("*.safetensors")) and time.monotonic() < deadline:
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=30)
    assert process.returncode == -signal.SIGKILL
    assert not killed.folder.embeddings("td").exists()
    num_shards = len(list(cache.rglob("*.safetensors")))
    assert 1 <= num_shards < 3
    encoded.clear()
    with caplog.at_level(logging.INFO):
        embedded(killed)
    assert len(encoded) == len(texts) - 64 * num_shards
    assert logged(caplog, len(texts), len(encoded))
    assert killed.folder.embeddings("td").read_bytes() == straight.folder.embeddings("td").read_bytes()
    metas = [json.loads(options.folder.embeddings("td").with_name("Baby.emb-td.npy.meta.json").read_text())
             for options in (killed, straight)]
    assert metas[0]["sha256"] == metas[1]["sha256"]


@pytest.mark.slow
def test_two_datasets_embedded_at_once_share_a_cache(tmp_path, endpoint):
    flags = ("--text_model=api:m", "--api_url", endpoint.url, "--api_rate=1000")
    texts = {"Baby": MANY[:1100], "Beauty": MANY[300:]}
    options = {name: shop(tmp_path, "api:m", f"--dataset={name}", texts=texts[name]) for name in texts}
    for process in [step(tmp_path, *flags, f"--dataset={name}") for name in texts]:
        finished(process)
    for name in texts:
        assert load_embeddings(options[name].folder, "td").tolist() == [vector(text) for text in texts[name]]


@pytest.mark.slow
def test_the_script_runs_in_any_folder(tmp_path):
    options = shop(tmp_path, "tfidf")
    done = subprocess.run(["bash", str(ROOT / "dataloader" / "3_get_text_emb.sh"), "--text_model=tfidf", "--data_root",
                           str(tmp_path / "data")], cwd=tmp_path, text=True, check=False,
                          env={**os.environ, "PYTHON": sys.executable}, capture_output=True)
    assert done.returncode == 0, done.stderr
    assert prints(done.stdout, options.target.path, *load_embeddings(options.folder, "td").shape)
