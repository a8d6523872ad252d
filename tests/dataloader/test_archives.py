"""Archives that are malicious, or were damaged in transit."""

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
from tests.errors import refused

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
    """Write an archive with a member whose mode says that it is a link, a device or the like."""
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


def test_only_the_named_folder_of_an_archive_is_copied(file, target):
    write_zip(file, {"package/model/a.json": b"a", "package/model/1_Pooling/b.json": b"b",
                     "package/modelling.py": b"no", "package/__init__.py": b"no", "model/c": b"no"})
    unpack(file, "package/model", target)
    assert tree(target) == {"a.json": b"a", "1_Pooling/b.json": b"b"}
    assert os.listdir(target.parent) == ["model"]


def test_the_needed_member_must_exist(file, target):
    write_zip(file, {"m/modules.json": b"{}", "m/a": b"a", "m/z": b"z"})
    unpack(file, "m", target, needed="modules.json")
    with refused(DataError, file, names=["m/config.json"]):
        unpack(file, "m", target, needed="config.json")
    assert tree(target) == {"modules.json": b"{}", "a": b"a", "z": b"z"}


def test_a_missing_folder_is_an_error(file, target):
    write_zip(file, {"other/a": b"a"})
    with refused(DataError, file, names=["model/"]):
        unpack(file, "model", target)
    assert not target.parent.exists()


def test_a_second_copy_replaces_the_first(file, target):
    unpack(write_zip(file, {"m/a": b"old", "m/b": b"old"}), "m", target)
    unpack(write_zip(file, {"m/a": b"new"}), "m", target)
    assert tree(target) == {"a": b"new"}
    assert os.listdir(target.parent) == ["model"]


HOSTILE = ["../x", "m/../../x", "m/a/..", "/tmp/x", "m/..\\..\\x", "\\x", "C:\\x", "C:x", "m//../../x"]


@pytest.mark.parametrize("name", HOSTILE)
def test_a_member_outside_the_folder_is_refused(file, target, name):
    write_zip(file, {"m/a": b"a", name: b"x"})
    before = sorted(file.parent.rglob("*"))
    for action in (lambda: unpack(file, "m", target), lambda: check(file), lambda: read_member(file, "m/a")):
        with refused(DataError, f"{file}:{name}"):
            action()
    assert sorted(file.parent.rglob("*")) == before


def test_an_absolute_name_after_the_folder_stays_inside(file, target, tmp_path):
    outside = tmp_path / "outside"
    write_zip(file, {f"m/{outside}": b"x", "m/./b": b"b"})
    unpack(file, "m", target)
    assert tree(target) == {str(outside)[1:]: b"x", "b": b"b"}
    assert not outside.exists()


def test_a_name_with_a_hidden_end_is_refused(file, target):
    write_zip(file, {"m/harmless_x": b"x"})
    file.write_bytes(file.read_bytes().replace(b"harmless_x", b"harmless\0x"))
    with refused(DataError, f"{file}:m/harmless"):
        unpack(file, "m", target)


@pytest.mark.parametrize("kind", ["S_IFLNK", "S_IFCHR", "S_IFBLK", "S_IFIFO", "S_IFSOCK"])
def test_links_and_devices_are_refused_by_name(file, target, kind):
    write_special(file, "model/link", getattr(stat, kind))
    for action in (lambda: unpack(file, "model", target), lambda: check(file)):
        with refused(DataError, f"{file}:model/link"):
            action()
    assert not target.parent.exists()
    write_special(file, "model/link", stat.S_IFREG)
    unpack(file, "model", target)


def test_plain_files_and_folders_with_modes_are_accepted(file, target):
    with zipfile.ZipFile(file, "w") as archive:
        archive.mkdir("m/sub")
        member = zipfile.ZipInfo("m/sub/a")
        member.create_system, member.external_attr = 3, (stat.S_IFREG | 0o755) << 16
        archive.writestr(member, b"a")
    unpack(file, "m", target)
    assert tree(target) == {"sub/a": b"a"}
    assert not (target / "sub/a").stat().st_mode & 0o111


def test_a_duplicate_name_is_refused(file, target):
    write_zip(file, {"m/a": b"1", "m/b": b"2"})
    file.write_bytes(file.read_bytes().replace(b"m/b", b"m/a"))
    with refused(DataError, f"{file}:m/a"):
        unpack(file, "m", target)
    with refused(DataError, f"{file}:m/./a"):
        unpack(write_zip(file, {"m/a": b"1", "m/./a": b"2"}), "m", target)


def test_a_name_of_both_file_and_folder_is_refused(file, target):
    with refused(DataError, f"{file}:m/a"):
        unpack(write_zip(file, {"m/a": b"1", "m/a/b": b"2"}), "m", target)


def test_more_bytes_than_the_limit_are_refused(file, target):
    write_zip(file, {"m/a": bytes(600), "m/b": bytes(600)}, zipfile.ZIP_STORED)
    unpack(file, "m", target, limit=1200)
    for action in (lambda: unpack(file, "m", target.with_name("other"), limit=1199), lambda: check(file, limit=1199)):
        with refused(DataError, f"{file}:m/b", names=[1199]):
            action()
    with refused(DataError, f"{file}:m/a", names=[599]):
        read_member(file, "m/a", limit=599)
    assert os.listdir(target.parent) == ["model"]


def test_a_bomb_is_refused_by_its_ratio(file, target, monkeypatch):
    monkeypatch.setattr(archives, "SMALL", 1 << 20)
    write_zip(file, {"m/bomb": bytes(8 << 20)})
    packed = zipfile.ZipFile(file).getinfo("m/bomb").compress_size
    assert 200 * packed < 8 << 20
    for action in (lambda: unpack(file, "m", target), lambda: check(file), lambda: read_member(file, "m/bomb")):
        with refused(DataError, f"{file}:m/bomb", names=[packed, 200 * packed]):
            action()
    assert os.listdir(target.parent) == []


def test_a_small_file_may_have_any_ratio(file):
    assert len(read_member(write_zip(file, {"a": bytes(1 << 20)}), "a")) == 1 << 20


def say_in_directory(file: Path, name: bytes, **values: int) -> None:
    """Write a wrong method or wrong sizes of a member into the archive's directory."""
    content = bytearray(file.read_bytes())
    entry = content.index(name, content.index(b"PK\x01\x02")) - 46
    for key, (form, offset) in {"method": ("<H", 10), "packed": ("<I", 20), "size": ("<I", 24)}.items():
        if key in values:
            struct.pack_into(form, content, entry + offset, values[key])
    file.write_bytes(content)


@pytest.mark.parametrize("lie", [{"packed": 1 << 20}, {"size": 100}])
def test_a_bomb_with_wrong_sizes_is_refused(file, target, monkeypatch, lie):
    monkeypatch.setattr(archives, "SMALL", 1 << 20)
    write_zip(file, {"m/bomb": bytes(8 << 20)})
    say_in_directory(file, b"m/bomb", **lie)
    for action in (lambda: check(file), lambda: unpack(file, "m", target)):
        with refused(DataError, f"{file}:m/bomb"):
            action()
    assert not target.exists()


@pytest.mark.slow
def test_a_huge_bomb_is_refused_in_little_memory(tmp_path):
    packer = zlib.compressobj(wbits=-15)
    block = packer.compress(bytes(1 << 20)) + packer.flush(zlib.Z_FULL_FLUSH)  # independent of other blocks
    file = write_zip(tmp_path / "bomb.zip", {"m/bomb": block * 10_240 + b"\x03\x00"}, zipfile.ZIP_STORED)
    say_in_directory(file, b"m/bomb", method=zipfile.ZIP_DEFLATED, size=(1 << 32) - 2)
    assert file.stat().st_size < 12_000_000
    code = ("import resource, sys; from pathlib import Path; from dataloader.archives import unpack\n"
            "used = int(Path('/proc/self/statm').read_text().split()[0]) * resource.getpagesize()\n"
            "resource.setrlimit(resource.RLIMIT_AS, (used + (40 << 20),) * 2)\n"
            "unpack(Path(sys.argv[1]), 'm', Path(sys.argv[2]), limit=200 << 20)")
    done = subprocess.run([sys.executable, "-c", code, str(file), str(tmp_path / "out" / "m")], cwd=ROOT,
                          capture_output=True, text=True, timeout=60, check=False)
    last = done.stderr.splitlines()[-1]
    assert last.startswith(f"common.errors.DataError: {file}:m/bomb: ")
    assert str(200 << 20) in last
    assert os.listdir(tmp_path / "out") == []


@pytest.mark.parametrize("method", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_a_method_with_unbounded_memory_is_refused(file, method):
    write_zip(file, {"a": b"a" * 1000}, method)
    with refused(DataError, f"{file}:a", names=[method]):
        read_member(file, "a")


def test_an_encrypted_member_is_refused(file):
    write_zip(file, {"a": b"a"})
    content = bytearray(file.read_bytes())
    content[content.index(b"PK\x01\x02") + 8] |= 1
    file.write_bytes(content)
    with refused(DataError, f"{file}:a"):
        read_member(file, "a")


def test_a_damaged_member_is_named(file, target):
    write_zip(file, {"m/a": b"a" * 100, "m/b": b"b" * 100}, zipfile.ZIP_STORED)
    file.write_bytes(file.read_bytes().replace(b"b" * 100, b"b" * 99 + b"c"))
    for action in (lambda: check(file), lambda: unpack(file, "m", target), lambda: read_member(file, "m/b")):
        with refused(DataError, f"{file}:m/b"):
            action()
    assert not target.exists()
    assert read_member(file, "m/a") == b"a" * 100


@pytest.mark.parametrize("content", [b"", b"<html>", b"PK\x03\x04 cut short"])
def test_a_file_other_than_an_archive_is_refused(file, content):
    file.write_bytes(content)
    with refused(DataError, file):
        check(file)


def test_the_error_of_a_missing_member_names_the_members(file):
    write_zip(file, {f"ml-1m/{n:02}": b"" for n in range(12)})
    with refused(DataError, f"{file}:ml-1m/ratings.dat", names=["ml-1m/00, ml-1m/01", "ml-1m/09"]) as raised:
        read_member(file, "ml-1m/ratings.dat")
    assert "ml-1m/10" not in str(raised.value)  # ten are enough


def test_a_member_is_read_line_by_line(file):
    write_zip(file, {"a.csv": b"".join(b"%d,x\n" % n for n in range(100_000))})
    with open_member(file, "a.csv") as stream, io.TextIOWrapper(stream, encoding="utf-8") as text:
        assert [next(text), next(text)] == ["0,x\n", "1,x\n"]
        assert sum(1 for _ in text) == 99_998


@pytest.mark.slow
def test_the_next_unpacking_cleans_up_after_a_killed_one(file, target):
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
    with refused(DataError, f"{file}:m/a"):
        unpack(file, "m", target)
    assert tree(target) == {"a": b"old"}
    assert os.listdir(target.parent) == ["model"]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_an_archive_with_any_changed_byte_is_refused_or_correct(file):
    rng = random.Random(0)
    members = {"m/ä.txt": b"hello" * 50, "m/b": rng.randbytes(200)}
    whole = write_zip(file, members).read_bytes()
    num_refused = 0
    for _ in range(600):
        changed = bytearray(whole)
        changed[rng.randrange(len(whole))] = rng.randrange(256)
        file.write_bytes(changed)
        try:
            check(file)
            assert read_member(file, "m/b") == members["m/b"]
        except DataError:
            num_refused += 1
    assert num_refused > 300
