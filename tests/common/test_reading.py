"""Regular files only, and values of the expected types."""

import math
import os
import socket
from pathlib import Path
from typing import TypedDict

import pytest

from common.errors import ArtifactError
from common.reading import AMOUNT, COUNT, SHARE, fits, kind_name, parse_json, read_record, read_text, require_regular
from tests.errors import refused

DEEP = "[" * 100_000 + "]" * 100_000
DIGITS = "9" * 5_000


class Pair(TypedDict):
    a: int
    b: str


def make_pipe(path: Path) -> None:
    os.mkfifo(path)


def make_socket(path: Path) -> None:
    os.chdir(path.parent)  # the path of a socket may be only about 100 bytes long
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(path.name)


@pytest.mark.parametrize("make", [make_pipe, make_socket, Path.mkdir])
def test_only_regular_files_are_read(tmp_path, monkeypatch, make):
    monkeypatch.chdir(tmp_path)
    make(tmp_path / "file")
    (tmp_path / "link").symlink_to("file")
    for name in ("file", "link"):
        with pytest.raises(OSError, match="not a regular file"):
            read_text(tmp_path / name)


def test_a_link_to_a_regular_file_is_read(tmp_path):
    (tmp_path / "file").write_text("é", encoding="utf-8")
    (tmp_path / "link").symlink_to("file")
    assert read_text(tmp_path / "link") == "é"


def test_a_pipe_that_the_shell_opened_is_read():
    reader, writer = os.pipe()
    os.write(writer, b"text")
    os.close(writer)
    try:
        require_regular(Path(f"/dev/fd/{reader}"))
        assert read_text(Path(f"/dev/fd/{reader}")) == "text"
    finally:
        os.close(reader)


@pytest.mark.parametrize("text", ["", "{", DEEP, '{"a":' * 100_000, DIGITS, "\0", "[1,]", "\ufeff{}",
                                  '{"a": 1, "a": 1}'])
def test_a_text_that_is_not_json_is_a_value_error(text):
    with pytest.raises(ValueError):  # noqa: PT011 (the words are those of Python)
        parse_json(text)


@pytest.mark.parametrize(("value", "kind"), [
    (1, int), (1, float), (1.5, float), ("x", str), (True, bool), (None, str | None), ("x", str | None), ([], list),
    ([1, 2], list[int]), ([], list[int]), ([1, None], list[int | None]), ({"a": 1}, dict[str, float]), ({}, dict),
    ({"a": 1, "b": "x", "c": None}, Pair), ({"x": {"a": 1, "b": ""}}, dict[str, Pair]), ([1, "x"], tuple[int, str]),
    (2**63 - 1, float), (0, COUNT), (2**63 - 1, COUNT), (None, COUNT | None), ([0, 3], list[COUNT]), (1, SHARE),
    (0.0, SHARE), (1e300, AMOUNT)])
def test_a_value_of_the_type_fits(value, kind):
    assert fits(value, kind)


@pytest.mark.parametrize(("value", "kind"), [
    (True, int), (True, float), (1.0, int), ("1", int), (None, str), (1, str | None), ({}, list), ([1, "2"], list[int]),
    (None, list[int]), ({"a": "1"}, dict[str, float]), ({1: 1.0}, dict[str, float]), ([], dict), ({"a": 1}, Pair),
    ({"a": "1", "b": "x"}, Pair), ([1], tuple[int, str]), ([1, "x", 2], tuple[int, str]), (["x", 1], tuple[int, str]),
    (0, bool), (math.nan, float), (math.inf, float), (10**400, float), (2**63, int), (-(2**63), int), (-1, COUNT),
    (2**63, COUNT), (1.0, COUNT), (True, COUNT), (-1, COUNT | None), ([0, -3], list[COUNT]), (1.5, SHARE),
    (-0.1, SHARE), (math.nan, SHARE), (math.inf, AMOUNT), (-1, AMOUNT), ("1", SHARE)])
def test_a_value_of_another_type_does_not_fit(value, kind):
    assert not fits(value, kind)


@pytest.mark.parametrize(("kind", "name"), [
    (int, "int"), (list[int], "list[int]"), (str | None, "str | None"), (SHARE, "float from 0 to 1"),
    (list[SHARE], "list[float from 0 to 1]"), (SHARE | None, "float from 0 to 1 | None")])
def test_the_name_of_a_type_by_hand(kind, name):
    assert kind_name(kind) == name


@pytest.mark.parametrize(("text", "named"), [
    (None, ""), ("", ""), ("{", ""), ("[]", "[]"), ("null", "None"), ("3", "3"), (DEEP, ""), (f'{{"a": {DIGITS}}}', ""),
    ("{}", "'a'"), ('{"a": "1"}', "'1'"), ('{"a": null}', "None"), ('{"a": true}', "True"), ('{"a": 1, "b": 2}', "b")])
def test_a_damaged_record_is_an_artifact_error(tmp_path, text, named):
    path = tmp_path / "record.json"
    if text is not None:
        path.write_text(text)
    with refused(ArtifactError, path, names=[named], fix=["make it"]):
        read_record(path, "make it", {"a": int}, {"b": str})


def test_a_record_has_its_keys_and_names_a_missing_one(tmp_path):
    path = tmp_path / "record.json"
    path.write_text('{"a": 1, "c": []}')
    record = read_record(path, "make it", {"a": int}, {"b": str})
    assert record == {"a": 1, "c": []}
    assert record.get("b") is None
    with refused(ArtifactError, path, names=["'b'"], fix=["make it"]):
        record["b"]


def test_an_error_shows_only_the_beginning_of_a_long_value(tmp_path):
    path = tmp_path / "record.json"
    path.write_text('{"a": "' + "x" * 10_000 + '"}')
    with refused(ArtifactError, path) as raised:
        read_record(path, "make it", {"a": int})
    assert len(str(raised.value)) < 400 + len(str(path))
