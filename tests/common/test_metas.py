"""Meta files that are damaged or hostile: each is refused with its path and its key."""

import json
import math
import os

import pytest

from common.errors import ArtifactError
from common.metas import load_meta
from common.publishing import meta_path
from tests.common.helpers import put
from tests.errors import refused

DEEP = "[" * 100_000 + "]" * 100_000
WRONG = {  # key -> values of a wrong type
    "schema_version": ["2", None, 2.0, [2]], "sha256": [5, None], "size": ["5", 5.0, None, True],
    "inputs": [None, [], "items", {"items": 5}, {"items": None}], "command": [5, ["make"], {}],
    "items_sha256": [None, 5], "num_items": ["48", 48.0, True, [48], None], "num_users": ["1"],
    "settings": [None, [], "local"], "raw": [5, {"items": 5}, {"items": {"file": "x"}}, {"items": {"sha256": None}}],
    "filters": [5, [5], [{"step": "read"}], [{"step": "read", "interactions": "9"}]],
    "num_in_split": [{"test": "1"}, {}, {"train": 1}],
    "split_name": [5, None], "counts": [[], {"ok": "3"}], "model_files": [{"a": 5}],
    "codebook_sizes": [None, "8", {}, [8, "8"], [[8]], [8.0], [True], [-1], [10**30]],
    "disambiguation_level": ["3", []],
    "num_interactions": [-1, 10**400, math.nan], "num_repeats": [{}, {"valid": 1}, {"valid": 1, "test": -1}],
    "num_cold_items": [{}, {"valid": 1, "test": 10**400}], "num_without_text": [-1],
    "collision_rate_before": ["0", None, [], math.nan, math.inf, 10**400, -0.5, 1.5],
    "collision_rate_after": [{}], "collapse": [5, ["x"]], "run": [5],
    "recommender": [None], "mtime_ns": ["0"],
}


@pytest.fixture
def path(tmp_path):
    put(tmp_path / "file", b"hello", codebook_sizes=[8, 8])
    return tmp_path / "file"


def change(path, **entries) -> None:
    meta = json.loads(meta_path(path).read_text())
    meta_path(path).write_text(json.dumps(meta | entries))


@pytest.mark.parametrize(("key", "value"), [(key, value) for key, values in WRONG.items() for value in values])
def test_a_value_of_wrong_type_is_named_with_its_key(path, key, value):
    change(path, **{key: value})
    with refused(ArtifactError, meta_path(path), names=[key], fix=["make it" if key in ("command", "schema_version")
                                                                  else "make file --force"]):
        load_meta(path, "make it")


def test_a_deeply_nested_meta_is_refused(path):
    meta_path(path).write_text(DEEP)
    with refused(ArtifactError, meta_path(path), fix=["make it"]):
        load_meta(path, "make it")


def test_a_missing_entry_is_named_when_it_is_needed(path):
    meta = load_meta(path, "make it")
    assert meta["codebook_sizes"] == [8, 8]
    with refused(ArtifactError, meta_path(path), names=["'num_items'"], fix=["make file --force"]):
        meta["num_items"]


@pytest.mark.parametrize("name", ["", ".", "..", "../file", "a/b", "/etc/passwd", "file",
                                  "x\0", "x\n", "\ud800"])
def test_an_input_must_be_another_file_of_the_folder(path, name):
    change(path, inputs={name: "x"})
    with refused(ArtifactError, meta_path(path), names=[repr(name)]):
        load_meta(path, "make it")


def test_a_long_name_of_an_input_is_refused_and_shortened(path):
    change(path, inputs={"x" * 3_000: "x"})
    with refused(ArtifactError, meta_path(path), fix=["make file --force"]) as raised:
        load_meta(path, "make it")
    assert len(str(raised.value)) < 400 + len(str(path))


def test_files_that_are_inputs_of_each_other_are_refused(tmp_path):
    first = put(tmp_path / "first", b"1")
    second = put(tmp_path / "second", b"2", inputs={"first": first["sha256"]})
    change(tmp_path / "first", inputs={"second": second["sha256"]})
    with refused(ArtifactError, names=["'second'"]):
        load_meta(tmp_path / "second", "make it")


@pytest.mark.parametrize("which", ["content", "meta"])
def test_a_named_pipe_is_refused_without_a_read(path, which):
    pipe = path if which == "content" else meta_path(path)
    pipe.unlink()
    os.mkfifo(pipe)
    with refused(ArtifactError, pipe, fix=["make it"]):
        load_meta(path, "make it")


@pytest.mark.parametrize("content", [None, "[]", "5", DEEP])
def test_a_staged_meta_that_is_damaged_is_ignored(path, content):
    staged = path.with_name(f".{path.name}.meta.json.tmp-0123")
    if content is None:
        os.mkfifo(staged)
    else:
        staged.write_text(content)
    assert load_meta(path, "make it")["size"] == 5
