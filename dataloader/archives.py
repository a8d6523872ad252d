"""Checks of downloaded files, and safe reading and unpacking of zip archives."""

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

LIMIT = 8 << 30    # maximum number of bytes unpacked from one archive
MAX_RATIO = 200    # maximum ratio of a member's unpacked size to its packed size
SMALL = 16 << 20   # bytes; MAX_RATIO does not apply up to this unpacked size, because small files are often repetitive
CHUNK = 1 << 20
# bzip2 and LZMA are not allowed, because a few packed bytes could fill the memory before any output is counted.
METHODS = {zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED}
KINDS = {stat.S_IFLNK: "a symbolic link", stat.S_IFCHR: "a device", stat.S_IFBLK: "a device", stat.S_IFIFO: "a pipe",
         stat.S_IFSOCK: "a socket"}
# Exceptions that zipfile raises for damaged archives, for example for an invalid name, version or offset.
DAMAGE = (zipfile.BadZipFile, zlib.error, EOFError, UnicodeDecodeError, NotImplementedError, OSError)
# suffix -> (kind of file, possible first bytes)
BEGINNINGS = {".gz": ("gzip", (b"\x1f\x8b",)), ".zip": ("zip", (b"PK",)), ".whl": ("zip", (b"PK",)),
              ".json": ("JSON", (b"{", b"[")), ".jsonl": ("JSON", (b"{",))}
PAGES = (b"<!doctype", b"<html", b"<head", b"<?xml", b"<error")  # first bytes of error pages
HEAD = 64          # number of bytes that identify the kind of a file
DISTRUST = "do not use this archive; get the data from another source"
AGAIN = "delete the archive and download it again"


def check_head(head: bytes, suffix: str) -> None:
    """Raise PermanentFailure if the first bytes of a file do not match its suffix.

    For example, a server may send an HTML error page instead of the file.
    """
    if not head:
        raise PermanentFailure("the file is empty")
    kind, beginnings = BEGINNINGS.get(suffix, ("a data file", (b"",)))
    text = head.removeprefix(b"\xef\xbb\xbf").lstrip()
    if text.lower().startswith(PAGES) or not (text if kind == "JSON" else head).startswith(beginnings):
        raise PermanentFailure(f"the file is not {kind}; its first bytes are {head[:HEAD]!r}")


def check_archive(path: Path, suffix: str) -> None:
    """Read an archive to the end, and raise PermanentFailure if the archive is damaged, truncated or unsafe.

    This check finds a truncated download even if the server sent no length or a wrong length.
    """
    try:
        if suffix == ".gz":
            with gzip.open(path) as file:
                while file.read(CHUNK):
                    pass
        elif suffix in (".zip", ".whl"):
            check(path)
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise PermanentFailure(f"the {suffix[1:]} file is damaged or truncated ({error})") from error
    except DataError as error:
        member = str(error.where).removeprefix(str(path)).lstrip(":")
        raise PermanentFailure(f"archive check failed: {' '.join(filter(None, (member, error.what)))}"
                      + (f" ({error.why})" if error.why else "")) from error


def unpack(file: Path, folder_inside: str, target: Path, needed: str = "", limit: int = LIMIT) -> None:
    """Copy the folder `folder_inside` of a zip archive to `target`, completely or not at all.

    Raises DataError if the archive is damaged or unsafe, or unpacks to more than `limit` bytes. Also raises DataError
    if the archive lacks the folder, or if the folder lacks the file `needed`.
    """
    with _opened(file, limit) as archive:
        # Compare paths, not strings. As a string, the name `folder//x` without the prefix `folder/` would be the
        # absolute path `/x`.
        paths = {PurePosixPath(m.filename): m for m in archive.infolist() if not m.is_dir()}
        folder = PurePosixPath(folder_inside)
        members = {path.relative_to(folder): m for path, m in paths.items() if folder in path.parents}
        if not members or (needed and PurePosixPath(needed) not in members):
            raise DataError(file, f"does not contain {folder_inside}/{needed}", fix=DISTRUST)

        def write(staged: Path) -> None:
            for path, member in members.items():
                (staged / path).parent.mkdir(parents=True, exist_ok=True)
                with _Member(archive, member) as stream, (staged / path).open("xb") as out:
                    shutil.copyfileobj(stream, out, CHUNK)

        publish_folder(target, write)


def check(file: Path, limit: int = LIMIT) -> None:
    """Raise DataError if a zip archive is damaged or unsafe, or unpacks to more than `limit` bytes."""
    with _opened(file, limit) as archive:
        for member in archive.infolist():
            with _Member(archive, member) as stream:
                while stream.read(CHUNK):
                    pass


@contextmanager
def open_member(file: Path, name: str, limit: int = LIMIT) -> Iterator[BinaryIO]:
    """Open the member `name` of a zip archive for reading.

    Raises DataError if the archive does not contain this member. Later, reading raises DataError if the member is
    damaged or unpacks to more than `limit` bytes.
    """
    with _opened(file, limit) as archive:
        if name not in (names := sorted(archive.namelist())):
            raise DataError(f"{file}:{name}", "not found in the archive",
                            f"The archive contains: {', '.join(names[:10])}{', …' * (len(names) > 10)}", AGAIN)
        with io.BufferedReader(_Member(archive, archive.getinfo(name)), CHUNK) as stream:
            yield stream


class _Archive(zipfile.ZipFile):
    """A zip archive whose members may unpack to at most `limit` bytes in total."""

    def __init__(self, content: BinaryIO, limit: int):
        super().__init__(content)
        self.limit = self.left = limit


@contextmanager
def _opened(file: Path, limit: int) -> Iterator[_Archive]:
    """Open a zip archive and check that every member is a file or folder with a safe, unique name."""
    with file.open("rb") as content:
        with _damage_as_data_error(file, "is not a complete zip archive"):
            archive = _Archive(content, limit)
        with archive:
            files, folders = set(), set()
            for member in archive.infolist():
                path = PurePosixPath(member.filename)
                if fault := _fault(member) or ("occurs twice in the archive" if path in files else ""):
                    raise DataError(f"{file}:{member.filename}", fault, fix=DISTRUST)
                if not member.is_dir():
                    files.add(path)
                folders.update(path.parents)
            for path in files & folders:
                raise DataError(f"{file}:{path}", "is both a file and a folder", fix=DISTRUST)
            yield archive


@contextmanager
def _damage_as_data_error(where: object, what: str = "is damaged") -> Iterator[None]:
    try:
        yield
    except DAMAGE as error:
        raise DataError(where, what, str(error) or "The data ends too early", AGAIN) from error


def _fault(member: zipfile.ZipInfo) -> str:
    """Return why a member must not be read, or "" if its header is acceptable."""
    name = member.filename
    if not name:
        return "has no name"
    if name != member.orig_filename or ".." in re.split(r"[/\\]", name) or re.match(r"[/\\]|[A-Za-z]:", name):
        return "points outside the archive"
    kind = stat.S_IFMT(member.external_attr >> 16)
    if kind not in (0, stat.S_IFREG, stat.S_IFDIR):
        return f"is {KINDS.get(kind, 'neither a file nor a folder')}"
    if member.flag_bits & 1:
        return "is encrypted"
    if member.compress_type not in METHODS:
        return f"uses compression method {member.compress_type}; only stored and deflate are supported"
    return ""


class _Member(io.RawIOBase):
    """A stream of the unpacked bytes of one member of an archive.

    The stream counts the bytes that are read, because the size in the header may be too small.
    """

    def __init__(self, archive: _Archive, member: zipfile.ZipInfo):
        self.archive, self.packed, self.count = archive, member.compress_size, 0
        self.where = f"{archive.filename}:{member.filename}"
        with _damage_as_data_error(self.where):
            self.stream = archive.open(member)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        with _damage_as_data_error(self.where):
            data = self.stream.read(len(buffer))
        self.count += len(data)
        self.archive.left -= len(data)
        by_ratio = max(SMALL, MAX_RATIO * self.packed)
        if self.count > by_ratio or self.archive.left < 0:
            limit = (f"{by_ratio} bytes for {self.packed} packed bytes" if self.count > by_ratio else
                     f"{self.archive.limit} bytes in total")
            raise DataError(self.where, "unpacks to too many bytes", f"The limit is {limit}", DISTRUST)
        buffer[:len(data)] = data
        return len(data)
