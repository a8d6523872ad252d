"""Output files of the user: what they may replace, and that devices and links stay what they are."""

import os
import socket
import threading
from pathlib import Path

import pytest

from common.errors import ConfigError
from common.targets import append_line, check_new_folder, check_target, check_targets, write_target
from tests.common.helpers import put
from tests.errors import refused


def check(path: Path, root: Path) -> None:
    check_target("--output", path, [root / "data", root / "runs"], lambda line: line == "ours")


@pytest.fixture
def root(tmp_path) -> Path:
    for folder in ("data/shop", "runs/recommendation/shop/markov/no-codes/0a"):
        (tmp_path / folder).mkdir(parents=True)
    return tmp_path


@pytest.mark.parametrize("content", [None, "", "ours", "ours\nmore"])
def test_a_new_file_or_an_earlier_output_is_written(root, content):
    path = root / "new" / "answers" if content is None else root / "answers"
    if content is not None:
        path.write_text(content)
    check(path, root)
    write_target(path, "text\n")
    assert path.read_text() == "text\n"


@pytest.mark.parametrize("content", [b"my notes\n", b"\xff\x00\n", b"\nours\n", b'{"items": []}'])
@pytest.mark.parametrize("link", [False, True])
def test_a_file_of_the_user_is_not_replaced(root, content, link):
    file = path = root / "notes"
    file.write_bytes(content)
    if link:
        path = root / "link"
        path.symlink_to(file)
    with refused(ConfigError, f"--output {path}"):
        check(path, root)


@pytest.mark.parametrize("name", [
    "data/shop/items.parquet", "data/shop/shop.emb-td.npy", "data/shop/shop.codes-rqvae-td-x.npy.meta.json",
    "data/shop/source.yaml", "data/shop/card.md", "data/shop/.work", "data/shop/.work/x", "data/shop/.a.tmp-0123",
    "data/shop/images/1.jpg", "data/shop/raw/local/x", "data/.models/x", "data/shop/.lock",
    *(f"runs/recommendation/shop/markov/no-codes/{name}" for name in (
        "latest", "0a/metrics.json", "0a/config.yaml", "0a/run.log", "0a/predictions.jsonl", "0a/finished.json",
        "0a/checkpoints/x", "0a/../latest", "seeds.json")),
    "runs/recommendation/shop/compare.md", "runs/quantization/shop/rqvae-td/explain.html"])
@pytest.mark.parametrize("content", [None, "ours"])
def test_a_name_of_the_program_is_refused_in_its_folders(root, name, content):
    path = root / name
    if content is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    with refused(ConfigError, f"--output {path}"):
        check(path, root)


def test_the_same_names_are_free_elsewhere(root, monkeypatch):
    for name in ("metrics.json", "latest", "data/shop/answers.jsonl", "runs/answers.txt"):
        check(root / name, root)
    monkeypatch.chdir(root / "runs/recommendation/shop/markov/no-codes")
    with refused(ConfigError, "--output latest"):
        check(Path("latest"), root)


def test_an_artifact_is_refused_in_any_folder(root):
    put(root / "ours", b"ours")
    (root / "link").symlink_to(root / "ours")
    for name in ("ours", "link"):
        with refused(ConfigError, f"--output {root / name}"):
            check(root / name, root)


def test_folders_sockets_and_paths_below_files_are_refused(root, monkeypatch):
    (root / "file").touch()
    monkeypatch.chdir(root)  # the path of a socket must be short
    server = socket.socket(socket.AF_UNIX)
    server.bind("socket")
    for path in (root, root / "file" / "below", root / "socket"):
        with refused(ConfigError, f"--output {path}"):
            check(path, root)
    server.close()


def test_a_pipe_gets_the_text_and_stays_a_pipe(root):
    pipe, received = root / "pipe", []
    os.mkfifo(pipe)
    reader = threading.Thread(target=lambda: received.append(pipe.read_text()))
    reader.start()
    check(pipe, root)
    write_target(pipe, "text\n")
    reader.join(10)
    assert received == ["text\n"]
    assert pipe.is_fifo()


def test_a_link_gets_the_text_and_stays_a_link(root):
    link = root / "link"
    link.symlink_to(root / "target")
    check(link, root)
    write_target(link, "text\n")
    assert link.is_symlink()
    assert (root / "target").read_text() == "text\n"


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["w", "a"])
def test_standard_output_keeps_the_text_before_and_after(command, root, mode):
    (root / "log").write_text("before\n" if mode == "a" else "")
    with (root / "log").open(mode) as log:
        done = command("from common.targets import check_target, write_target\n"
                       "path = Path('/dev/stdout')\nprint('first')\n"
                       "check_target('--output', path, [], lambda line: False)\nwrite_target(path, 'text\\n')\n"
                       "print('last')", stdout=log)
    assert (done.returncode, done.stderr) == (0, "")
    assert (root / "log").read_text() == "before\n" * (mode == "a") + "first\ntext\nlast\n"


@pytest.mark.parametrize(("files", "allowed"), [
    ({}, True), ({"first": "ours"}, True), ({"first": "ours", "second": "anything"}, True),
    ({"second": "anything"}, False), ({"first": "theirs"}, False), ({"second": ""}, True)])
def test_a_folder_keeps_files_of_other_programs(root, files, allowed):
    (root / "out").mkdir()
    for name, content in files.items():
        (root / "out" / name).write_text(content)

    def check_out():
        check_targets("--export", root / "out", [root / "data"], "first", ["second"], lambda line: line == "ours")

    if allowed:
        check_out()
    else:
        with refused(ConfigError, f"--export {root / 'out' / max(files)}"):
            check_out()


@pytest.mark.parametrize("make", [os.mkfifo, lambda path: path.symlink_to("elsewhere"), Path.mkdir])
def test_a_folder_keeps_pipes_links_and_folders(root, make):
    make(root / "second")
    with refused(ConfigError, f"--export {root / 'second'}"):
        check_targets("--export", root, [], "first", ["second"], lambda line: True)


def test_a_folder_of_a_dataset_is_not_a_target(root):
    check_new_folder("--export_t5", root / "data" / "shop" / "t5", [root / "data"])
    with refused(ConfigError, f"--export_t5 {root / 'data/shop/images'}"):
        check_new_folder("--export_t5", root / "data/shop/images", [root / "data"])


@pytest.mark.parametrize(("before", "after"), [(None, "x\n"), ("", "x\n"), ("a\n", "a\nx\n"), ("a", "a\nx\n")])
def test_a_line_is_appended_below_the_last_one(tmp_path, before, after):
    if before is not None:
        (tmp_path / "list").write_text(before)
    append_line(tmp_path / "list", "x")
    assert (tmp_path / "list").read_text() == after


def test_a_link_to_itself_is_an_error_of_its_path(root):
    path = root / "loop"
    path.symlink_to(path)
    check(path, root)
    with pytest.raises(OSError, match="symbolic links") as raised:
        write_target(path, "text\n")
    assert raised.value.filename == str(path)
