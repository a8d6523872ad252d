"""Files from elsewhere: of the kind that their name says, and whole; zip archives read within limits and unpacked."""

import gzip
import io
import re
import shutil
import stat
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import BinaryIO

from common.errors import DataError
from common.publishing import publish_folder
from dataloader.http import PermanentFailure

LIMIT = 8 << 30    # bytes that what is asked for may unpack to
MAX_RATIO = 200    # how many times its packed size a member may unpack to …
SMALL = 16 << 20   # … if these are more bytes; little files are often very repetitive
CHUNK = 1 << 20
# bzip2 and LZMA would let a few bytes fill the memory before the first byte can be counted.
METHODS = {zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED}
KINDS = {stat.S_IFLNK: "a symbolic link", stat.S_IFCHR: "a device", stat.S_IFBLK: "a device", stat.S_IFIFO: "a pipe",
         stat.S_IFSOCK: "a socket"}
# What zipfile raises where bytes are wrong: also for a name, a version or an offset that makes no sense.
DAMAGE = (zipfile.BadZipFile, zlib.error, EOFError, UnicodeDecodeError, NotImplementedError, OSError)
BEGINNINGS = {".gz": ("gzip", (b"\x1f\x8b",)), ".zip": ("zip", (b"PK",)), ".whl": ("zip", (b"PK",)),
              ".json": ("JSON", (b"{", b"[")), ".jsonl": ("JSON", (b"{",))}
PAGES = (b"<!doctype", b"<html", b"<head", b"<?xml", b"<error")
HEAD = 64          # bytes; they tell what kind of file begins
DISTRUST = "do not use this archive; get it from elsewhere"
AGAIN = "fetch it again"


def check_head(head: bytes, suffix: str) -> None:
    """Refuse what begins like no file of this kind, such as a page that says that something is missing."""
    if not head:
        raise PermanentFailure("an empty file")
    kind, beginnings = BEGINNINGS.get(suffix, ("a data file", (b"",)))
    text = head.removeprefix(b"\xef\xbb\xbf").lstrip()
    if text.lower().startswith(PAGES) or not (text if kind == "JSON" else head).startswith(beginnings):
        raise PermanentFailure(f"not {kind}; first bytes {head[:HEAD]!r}")


def check_archive(path: Path, suffix: str) -> None:
    """Refuse an archive that is hostile or not whole, also if the server named a wrong length or none."""
    try:
        if suffix == ".gz":
            with gzip.open(path) as file:
                while file.read(CHUNK):
                    pass
        elif suffix in (".zip", ".whl"):
            check(path)
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise PermanentFailure(f"a damaged or shortened {suffix[1:]} file ({error})") from error
    except DataError as error:
        member = str(error.where).removeprefix(str(path)).lstrip(":")
        raise PermanentFailure(f"an archive not to be used: {' '.join(filter(None, (member, error.what)))}"
                      + (f" ({error.why})" if error.why else "")) from error


def unpack(file: Path, folder_inside: str, target: Path, needed: str = "", limit: int = LIMIT) -> None:
    """Copy an archive's folder to `target`, whole or not at all. Raises DataError if `needed` is missing."""
    with _opened(file, limit) as archive:
        # As paths: what follows `folder/` in `folder//x` is an absolute name.
        paths = {PurePosixPath(m.filename): m for m in archive.infolist() if not m.is_dir()}
        folder = PurePosixPath(folder_inside)
        members = {path.relative_to(folder): m for path, m in paths.items() if folder in path.parents}
        if not members or (needed and PurePosixPath(needed) not in members):
            raise DataError(file, f"has no {folder_inside}/{needed}", fix=DISTRUST)

        def write(staged: Path) -> None:
            for path, member in members.items():
                (staged / path).parent.mkdir(parents=True, exist_ok=True)
                with _Member(archive, member) as stream, (staged / path).open("xb") as out:
                    shutil.copyfileobj(stream, out, CHUNK)

        publish_folder(target, write)


def check(file: Path, limit: int = LIMIT) -> None:
    """Read an archive to its end. Raises DataError if it is damaged, hostile, or unpacks to more than `limit` bytes."""
    with _opened(file, limit) as archive:
        for member in archive.infolist():
            with _Member(archive, member) as stream:
                while stream.read(CHUNK):
                    pass


@contextmanager
def open_member(file: Path, name: str, limit: int = LIMIT) -> Iterator[BinaryIO]:
    """The bytes of one member; reading raises DataError where they are damaged, or more than `limit`."""
    with _opened(file, limit) as archive:
        if name not in (there := sorted(archive.namelist())):
            raise DataError(f"{file}:{name}", "is not in the archive",
                            f"there are: {', '.join(there[:10])}{', …' * (len(there) > 10)}", AGAIN)
        with io.BufferedReader(_Member(archive, archive.getinfo(name)), CHUNK) as stream:
            yield stream


class _Archive(zipfile.ZipFile):
    """An archive whose members may unpack to `limit` bytes together."""

    def __init__(self, content: BinaryIO, limit: int):
        super().__init__(content)
        self.limit = self.left = limit


@contextmanager
def _opened(file: Path, limit: int) -> Iterator[_Archive]:
    """The archive, after a check that every member is a file or a folder inside it."""
    with file.open("rb") as content:
        with _naming_damage(file, "is not a whole zip archive"):
            archive = _Archive(content, limit)
        with archive:
            files, folders = set(), set()
            for member in archive.infolist():
                path = PurePosixPath(member.filename)
                if fault := _fault(member) or ("stands there twice" if path in files else ""):
                    raise DataError(f"{file}:{member.filename}", fault, fix=DISTRUST)
                if not member.is_dir():
                    files.add(path)
                folders.update(path.parents)
            for path in files & folders:
                raise DataError(f"{file}:{path}", "is a file and a folder", fix=DISTRUST)
            yield archive


@contextmanager
def _naming_damage(where: object, what: str = "is damaged") -> Iterator[None]:
    try:
        yield
    except DAMAGE as error:
        raise DataError(where, what, str(error) or "it ends early", AGAIN) from error


def _fault(member: zipfile.ZipInfo) -> str:
    """Why a member shall not be touched, or the empty string. Said of the header; the bytes are counted later."""
    name = member.filename
    if not name:
        return "has no name"
    if name != member.orig_filename or ".." in re.split(r"[/\\]", name) or re.match(r"[/\\]|[A-Za-z]:", name):
        return "points outside the archive's folder"
    kind = stat.S_IFMT(member.external_attr >> 16)
    if kind not in (0, stat.S_IFREG, stat.S_IFDIR):
        return f"is {KINDS.get(kind, 'neither a file nor a folder')}"
    if member.flag_bits & 1:
        return "is encrypted"
    if member.compress_type not in METHODS:
        return f"is compressed by method {member.compress_type}, and only deflate is read"
    return ""


class _Member(io.RawIOBase):
    """The bytes of a member. They are counted as they come, because its header may promise less."""

    def __init__(self, archive: _Archive, member: zipfile.ZipInfo):
        self.archive, self.packed, self.count = archive, member.compress_size, 0
        self.where = f"{archive.filename}:{member.filename}"
        with _naming_damage(self.where):
            self.stream = archive.open(member)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        with _naming_damage(self.where):
            data = self.stream.read(len(buffer))
        self.count += len(data)
        self.archive.left -= len(data)
        by_ratio = max(SMALL, MAX_RATIO * self.packed)
        if self.count > by_ratio or self.archive.left < 0:
            limit = (f"{by_ratio} bytes for {self.packed} packed ones" if self.count > by_ratio else
                     f"{self.archive.limit} bytes for all that is unpacked")
            raise DataError(self.where, "unpacks to too much", f"The limit is {limit}", DISTRUST)
        buffer[:len(data)] = data
        return len(data)
