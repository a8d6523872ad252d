import errno
import os
from pathlib import Path

import pytest

from common import metas, publishing
from common.errors import ArtifactError, DataError, Interrupted
from common.metas import load_meta
from common.metas import verify as verify_artifact
from common.publishing import SCHEMA_VERSION, publish, publish_folder, sweep
from tests.common.helpers import flip_a_bit, names, numbers, put
from tests.errors import refused

SHA256_OF_HELLO = "2cf24dba5fb0a30e26e83b2ac5b9e29e1b161e5c1fa7425e73043362938b9824"


def test_publishing_writes_only_the_file_and_its_meta(tmp_path):
    path = tmp_path / "new" / "greeting"
    meta = put(path, b"hello", num_items=1)
    assert path.read_bytes() == b"hello"
    assert names(path.parent) == {"greeting", "greeting.meta.json"}
    assert meta == {"schema_version": SCHEMA_VERSION, "sha256": SHA256_OF_HELLO, "size": 5, "inputs": {},
                    "num_items": 1, "command": "make greeting"}
    assert load_meta(path, "make it") == meta


def test_a_signal_after_the_first_rename_leaves_the_new_pair(tmp_path, monkeypatch):
    put(tmp_path / "file", b"old")
    replace = os.replace

    def interrupted(source, target):
        replace(source, target)
        raise Interrupted()

    monkeypatch.setattr(os, "replace", interrupted)
    with pytest.raises(Interrupted):
        put(tmp_path / "file", b"hello")
    monkeypatch.setattr(os, "replace", replace)
    assert load_meta(tmp_path / "file", "make it")["sha256"] == SHA256_OF_HELLO
    assert names(tmp_path) == {"file", "file.meta.json"}


def test_a_failing_writer_leaves_only_the_old_pair(tmp_path):
    put(tmp_path / "file", b"old")

    def write(staged: Path):
        staged.write_bytes(b"half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        publish(tmp_path / "file", write, {"inputs": {}})
    assert (tmp_path / "file").read_bytes() == b"old"
    assert names(tmp_path) == {"file", "file.meta.json"}
    verify_artifact(tmp_path / "file", "make it")


@pytest.mark.parametrize(("failing_call", "content"), [(1, b"old"), (2, b"new!")])
def test_a_failing_rename_leaves_the_old_or_new_pair(tmp_path, monkeypatch, failing_call, content):
    path = tmp_path / "file"
    put(path, b"old", edition="old")
    calls, replace = [], os.replace

    def replace_or_fail(source, target):
        calls.append(target)
        if len(calls) == failing_call:
            raise OSError("no")
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(publishing.os, "replace", replace_or_fail)
        with pytest.raises(OSError, match="no"):
            put(path, b"new!", edition="new!")
    meta = verify_artifact(path, "make it")
    assert path.read_bytes() == content
    assert meta["edition"].encode() == content
    assert names(tmp_path) == {"file", "file.meta.json"}


KILLED_WRITER = """
import os, sys
from pathlib import Path
from common.publishing import publish
path, deadly_call = Path(sys.argv[1]), int(sys.argv[2])
calls = 0
def lethal(function):
    def call(*arguments):
        global calls
        calls += 1
        if calls == deadly_call:
            os._exit(9)
        return function(*arguments)
    return call
os.replace, os.fsync = lethal(os.replace), lethal(os.fsync)
publish(path, lambda staged: staged.write_bytes(b"new!"), {"inputs": {}, "edition": "new!"})
"""


@pytest.mark.slow
@pytest.mark.parametrize(("deadly_call", "content"), [
    # fsync content, fsync meta, rename content, rename meta, fsync folder
    (1, b"old"), (2, b"old"), (3, b"old"), (4, b"new!"), (5, b"new!")])
def test_a_killed_writer_leaves_the_old_or_new_pair(tmp_path, python, deadly_call, content):
    path = tmp_path / "file"
    put(path, b"old", edition="old")
    assert python(KILLED_WRITER, path, deadly_call).returncode == 9
    meta = verify_artifact(path, "make it")
    assert path.read_bytes() == content
    assert meta["edition"].encode() == content
    put(path, b"third", edition="third")
    assert verify_artifact(path, "make it")["edition"] == "third"
    assert names(tmp_path) == {"file", "file.meta.json"}


@pytest.mark.slow
@pytest.mark.parametrize(("deadly_call", "there"), [(3, False), (4, True)])
def test_a_killed_first_writer_leaves_nothing_or_a_whole_pair(tmp_path, python, deadly_call, there):
    path = tmp_path / "file"
    assert python(KILLED_WRITER, path, deadly_call).returncode == 9
    if there:
        assert verify_artifact(path, "make it")["edition"] == "new!"
    else:
        with refused(DataError, path, fix=["make it"]):
            load_meta(path, "make it")


def test_a_reader_between_the_two_renames_finishes_for_the_writer(tmp_path, monkeypatch):
    path, replace, seen = tmp_path / "file", os.replace, []
    put(path, b"old", edition="old")

    def read_in_between(source, target):
        monkeypatch.setattr(publishing.os, "replace", replace)
        replace(source, target)
        seen.append(load_meta(path, "make it")["edition"])

    monkeypatch.setattr(publishing.os, "replace", read_in_between)
    put(path, b"new!", edition="new!")
    assert seen == ["new!"]
    assert verify_artifact(path, "make it")["edition"] == "new!"


@pytest.mark.slow
def test_two_readers_may_finish_the_same_publishing(tmp_path, python, monkeypatch):
    path, replace = tmp_path / "file", os.replace
    put(path, b"old", edition="old")
    python(KILLED_WRITER, path, 4)

    def second(source, target):
        replace(source, target)
        replace(source, target)

    monkeypatch.setattr(publishing.os, "replace", second)
    assert load_meta(path, "make it")["edition"] == "new!"


@pytest.mark.parametrize("replaces", [False, True])
def test_the_staged_files_of_a_running_writer_stay(tmp_path, replaces):
    path, dead = tmp_path / "file", tmp_path / ".file.tmp-99999999"

    def write(staged: Path) -> None:
        staged.write_bytes(b"outer")
        if replaces:  # as safetensors does
            (tmp_path / "other").write_bytes(b"outer")
            os.replace(tmp_path / "other", staged)
        dead.write_bytes(b"half")
        put(path, b"inner")  # another writer, which sweeps
        assert staged.exists()
        assert not dead.exists()
        assert load_meta(path, "make it")["size"] == 5

    publish(path, write, {"inputs": {}})
    assert path.read_bytes() == b"outer"
    verify_artifact(path, "make it")
    assert names(tmp_path) == {"file", "file.meta.json"}


def test_a_reader_leaves_a_meta_whose_content_is_still_staged(tmp_path, monkeypatch):
    path, replace, seen = tmp_path / "file", os.replace, []
    put(path, b"same", edition="old")

    def read_first(source, target):
        monkeypatch.setattr(publishing.os, "replace", replace)
        seen.append(load_meta(path, "make it")["edition"])
        replace(source, target)

    monkeypatch.setattr(publishing.os, "replace", read_first)
    put(path, b"same", edition="new!")
    assert seen == ["old"]
    assert load_meta(path, "make it")["edition"] == "new!"


@pytest.mark.parametrize("fault", ["no module", errno.ENOTSUP, errno.ENOLCK])
def test_without_locks_files_older_than_a_day_are_removed(tmp_path, monkeypatch, fault):
    fresh, old = tmp_path / ".file.tmp-1", tmp_path / ".file.tmp-2"
    for left, age in ((fresh, 80_000), (old, 90_000)):
        left.write_bytes(b"half")
        os.utime(left, (left.stat().st_mtime - age,) * 2)

    class Refusing:
        LOCK_EX = LOCK_NB = 0

        @staticmethod
        def flock(descriptor, operation):
            raise OSError(fault, os.strerror(fault))

    monkeypatch.setattr("common.lock.fcntl", None if fault == "no module" else Refusing)
    put(tmp_path / "file", b"new")
    assert names(tmp_path) == {"file", "file.meta.json", fresh.name}
    for content in ("one", "two"):
        write_folder(tmp_path / "folder", content)
    assert names(tmp_path) == {"file", "file.meta.json", fresh.name, "folder"}


@pytest.mark.parametrize("write", [lambda path: put(path, b"new"), lambda path: write_folder(path, "new"),
                                   lambda path: publishing.write_text(path, "new")])
def test_a_sweep_between_making_and_locking_is_harmless(tmp_path, monkeypatch, write):
    lock, swept = publishing.lock, []

    def late(descriptor, wait=False):
        if wait and not swept:
            swept.extend(names(tmp_path))
            sweep(tmp_path, "*")
            assert names(tmp_path) == set()
        return lock(descriptor, wait)

    monkeypatch.setattr(publishing, "lock", late)
    write(tmp_path / "it")
    assert len(swept) == 1
    assert names(tmp_path) - {"it.meta.json"} == {"it"}


def test_a_sweep_does_not_take_a_name_as_a_pattern(tmp_path):
    (tmp_path / ".fold1.tmp-1").write_bytes(b"half")
    (tmp_path / ".fold[12].tmp-1").write_bytes(b"half")
    put(tmp_path / "fold[12]", b"new")
    assert names(tmp_path) == {"fold[12]", "fold[12].meta.json", ".fold1.tmp-1"}


def test_a_failed_replacement_leaves_the_old_text(tmp_path, monkeypatch):
    publishing.write_text(tmp_path / "note", "old\n")

    def fail(*_):
        raise OSError("no")

    monkeypatch.setattr(publishing.os, "replace", fail)
    with pytest.raises(OSError, match="no"):
        publishing.write_text(tmp_path / "note", "new\n")
    assert (tmp_path / "note").read_text() == "old\n"
    assert names(tmp_path) == {"note"}


def test_a_path_that_could_not_be_decoded_can_be_recorded(tmp_path):
    path = os.fsdecode(b"caf\xe9")  # as Python reads Latin-1 bytes, and in an ASCII locale UTF-8 as well
    put(tmp_path / "file", b"new", command=f"make {path}")
    assert load_meta(tmp_path / "file", "make it")["command"] == f"make {path}"
    publishing.write_text(tmp_path / "note", path)
    assert (tmp_path / "note").read_text(encoding="utf-8") == r"caf\udce9"


def test_a_missing_artifact_names_the_command_that_makes_it(tmp_path):
    with refused(DataError, tmp_path / "file", fix=["make it"]):
        load_meta(tmp_path / "file", "make it")


def test_a_file_without_a_meta_is_refused(tmp_path):
    (tmp_path / "file").write_bytes(b"hello")
    with refused(ArtifactError, tmp_path / "file", names=["file.meta.json"], fix=["make it"]):
        load_meta(tmp_path / "file", "make it")


@pytest.mark.parametrize("text", [
    "", "{", "[]", "null", "3", '"text"', "{}", b"\xff".decode("latin-1"), '{"schema_version": 2, "size": 5}',
    '{"schema_version": 2, "size": 5, "sha256": "x", "inputs": null}',
    '{"schema_version": 2, "size": 5, "sha256": "x", "inputs": ["a"]}',
    '{"schema_version": 2, "size": 5, "inputs": {}}'])
def test_an_invalid_meta_is_refused(tmp_path, text):
    put(tmp_path / "file", b"hello")
    (tmp_path / "file.meta.json").write_text(text, encoding="latin-1")
    with refused(ArtifactError, tmp_path / "file.meta.json", fix=["make it"]):
        load_meta(tmp_path / "file", "make it")


def test_another_size_is_refused_with_the_recorded_command(tmp_path):
    put(tmp_path / "file", b"hello")
    (tmp_path / "file").write_bytes(b"hell")
    with refused(ArtifactError, tmp_path / "file", fix=["make file --force"]) as raised:
        load_meta(tmp_path / "file", "make it")
    assert numbers(raised) >= {"4", "5"}


@pytest.mark.parametrize("version", [1, SCHEMA_VERSION + 1])
def test_another_schema_version_is_refused(tmp_path, version):
    put(tmp_path / "file", b"hello", schema_version=version)
    with refused(ArtifactError, tmp_path / "file.meta.json", fix=["make file --force"]) as raised:
        load_meta(tmp_path / "file", "make it")
    assert numbers(raised) >= {str(version), str(SCHEMA_VERSION)}


def test_a_flipped_bit_in_the_content_is_found(tmp_path):
    put(tmp_path / "file", b"hello")
    flip_a_bit(tmp_path / "file")
    for check in (load_meta, verify_artifact):
        with refused(ArtifactError, tmp_path / "file", fix=["make file --force"]):
            check(tmp_path / "file", "make it")


def test_an_input_that_changed_under_its_meta_is_found(chain):
    items, _, codes = chain
    flip_a_bit(items)
    with refused(ArtifactError, items, fix=["make items --force"]):
        load_meta(codes, "make it")


def test_one_process_hashes_the_same_version_once(tmp_path, monkeypatch):
    path, hashed = tmp_path / "file", []
    put(path, b"hello")
    monkeypatch.setattr(publishing, "file_sha256", lambda path: hashed.append(path.name) or SHA256_OF_HELLO)
    for _ in range(2):
        load_meta(path, "make it")
        verify_artifact(path, "make it")
    assert hashed == ["file"]


def test_a_large_file_is_hashed_if_its_time_changed(tmp_path, monkeypatch):
    monkeypatch.setattr(publishing, "LARGE", 4)
    path = tmp_path / "file"
    assert put(path, b"hello")["mtime_ns"] == path.stat().st_mtime_ns
    put(tmp_path / "small", b"tiny")
    assert "mtime_ns" not in load_meta(tmp_path / "small", "make it")
    before = path.stat().st_mtime_ns
    flip_a_bit(path)
    os.utime(path, ns=(before, before))  # the size and the time of the damaged file are unchanged
    load_meta(path, "make it")
    with refused(ArtifactError, path):
        verify_artifact(path, "make it")
    os.utime(path)
    with refused(ArtifactError, path, fix=["make file --force"]):
        load_meta(path, "make it")
    flip_a_bit(path)  # a copy of the right content has another time
    load_meta(path, "make it")


def test_a_file_published_during_a_load_is_accepted(tmp_path, monkeypatch):
    put(tmp_path / "file", b"hello")
    read, is_first = metas.read_record, [True]

    def slow(path, *rest):
        content = read(path, *rest)
        if is_first.pop() if is_first else False:
            put(tmp_path / "file", b"other", edition=2)
        return content

    monkeypatch.setattr(metas, "read_record", slow)
    assert load_meta(tmp_path / "file", "make it")["edition"] == 2


@pytest.fixture
def chain(tmp_path):
    """`items` -> `embeddings` -> `codes`: each is an input of the next."""
    items, embeddings, codes = (tmp_path / name for name in ("items", "embeddings", "codes"))
    put(items, b"hello")
    put(embeddings, b"1", inputs={"items": SHA256_OF_HELLO})
    put(codes, b"2", inputs={"embeddings": load_meta(embeddings, "")["sha256"]})
    return items, embeddings, codes


def test_a_stale_artifact_names_the_command_that_rebuilds_it(chain):
    items, embeddings, _ = chain
    put(items, b"other")
    with refused(ArtifactError, embeddings, names=["items"], fix=["make embeddings --force"]):
        load_meta(embeddings, "make it")


def test_staleness_reaches_through_the_whole_chain(chain):
    items, embeddings, codes = chain
    load_meta(codes, "make it")
    put(items, b"other")
    with refused(ArtifactError, embeddings, names=["items"], fix=["make embeddings --force"]):
        load_meta(codes, "make it")


def test_an_input_with_the_same_content_is_still_current(chain):
    items, _, codes = chain
    put(items, b"hello", made="again")
    assert load_meta(codes, "make it")["command"] == "make codes"


def test_an_artifact_whose_input_is_gone_is_refused(chain):
    items, _, codes = chain
    items.unlink()
    with refused(DataError, items):
        load_meta(codes, "make it")


def test_a_text_removes_leftovers_of_its_killed_writers(tmp_path):
    for left in (".note.tmp-999999999", ".other.tmp-999999999"):
        (tmp_path / left).touch()
    publishing.write_text(tmp_path / "note", "new")
    assert names(tmp_path) == {"note", ".other.tmp-999999999"}


def test_a_discarded_folder_disappears_before_its_files(tmp_path, monkeypatch):
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "file").touch()

    def killed(folder: Path, **options) -> None:
        raise Interrupted()

    with monkeypatch.context() as patched:
        patched.setattr(publishing.shutil, "rmtree", killed)
        with pytest.raises(Interrupted):
            publishing.discard_folder(tmp_path / "folder")
    [left] = names(tmp_path)
    assert left != "folder"
    sweep(tmp_path, "folder")
    assert names(tmp_path) == set()


def write_folder(path: Path, content: str) -> None:
    publish_folder(path, lambda staged: (staged / "file").write_text(content))


@pytest.mark.parametrize("exchange", [True, False])
def test_a_published_folder_replaces_the_old_one(tmp_path, monkeypatch, exchange):
    if not exchange:
        monkeypatch.setattr(publishing, "_exchange", lambda one, other: False)
    for content in ("old", "new"):
        write_folder(tmp_path / "in" / "folder", content)
        assert (tmp_path / "in" / "folder" / "file").read_text() == content
        assert names(tmp_path / "in") == {"folder"}


def test_a_failed_folder_leaves_the_old_one(tmp_path):
    write_folder(tmp_path / "folder", "old")

    def fail(staged: Path) -> None:
        (staged / "file").write_text("half")
        raise Interrupted()

    with pytest.raises(Interrupted):
        publish_folder(tmp_path / "folder", fail)
    assert (tmp_path / "folder" / "file").read_text() == "old"
    assert names(tmp_path) == {"folder"}


def test_only_leftovers_of_killed_folder_writers_are_removed(tmp_path):
    for left in (".folder.tmp-999999999", ".folder.old-999999999", ".folder.mine-1"):
        (tmp_path / left).mkdir()

    def write(staged: Path) -> None:
        (staged / "in").mkdir()
        (staged / "in" / "file").write_text("outer")
        write_folder(tmp_path / "folder", "inner")

    publish_folder(tmp_path / "folder", write)
    assert (tmp_path / "folder" / "in" / "file").read_text() == "outer"
    assert names(tmp_path) == {"folder", ".folder.mine-1"}


def failing(number: int, *, folders_only: bool = False):
    """Stand for a call of `os` on a file system that does not have it, or on a broken disk."""
    def call(descriptor, *_, **options):
        if not folders_only or Path(f"/proc/self/fd/{descriptor}").is_dir():
            raise OSError(number, os.strerror(number))
    return call


WRITERS = [lambda path: put(path, b"new"), lambda path: write_folder(path, "new"),
           lambda path: publishing.write_text(path, "new")]


@pytest.mark.parametrize("write", WRITERS)
@pytest.mark.parametrize(("number", "folders_only"), [(errno.EINVAL, True), (errno.EINVAL, False), (errno.ENOSYS, True),
                                                      (errno.EOPNOTSUPP, True)])
def test_a_file_system_without_fsync_is_written_all_the_same(tmp_path, monkeypatch, write, number, folders_only):
    monkeypatch.setattr(os, "fsync", failing(number, folders_only=folders_only))
    write(tmp_path / "it")
    assert names(tmp_path) - {"it.meta.json"} == {"it"}


@pytest.mark.parametrize("write", WRITERS)
def test_a_failed_sync_names_a_path(tmp_path, monkeypatch, write):
    monkeypatch.setattr(os, "fsync", failing(errno.EIO))
    with pytest.raises(OSError, match=str(tmp_path)) as raised:
        write(tmp_path / "it")
    assert raised.value.errno == errno.EIO
    assert names(tmp_path) == set()


@pytest.mark.parametrize("write", WRITERS[:2])
@pytest.mark.parametrize("number", [errno.EPERM, errno.ENOSYS])
def test_a_file_system_without_modes_is_written_all_the_same(tmp_path, monkeypatch, write, number):
    monkeypatch.setattr(os, "chmod", failing(number))
    write(tmp_path / "it")
    assert names(tmp_path) - {"it.meta.json"} == {"it"}


def test_a_full_disk_is_named_by_the_final_path(tmp_path):
    def write(staged: Path):
        raise OSError(errno.ENOSPC, "No space left on device")  # as `write` of an open file raises it

    with pytest.raises(OSError, match="No space") as raised:
        publish(tmp_path / "file", write, {"inputs": {}}, size=9)
    assert raised.value.filename == str(tmp_path / "file")
    assert raised.value.__notes__ == ["9 bytes are needed"]
