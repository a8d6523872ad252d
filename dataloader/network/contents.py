"""Whether the bytes of a download are what its name says: of that kind, and whole."""

import gzip
import zlib
from pathlib import Path

from common.errors import DataError
from dataloader.network import archives
from dataloader.network.transfer import HEAD, Refused

KINDS = {".gz": ("gzip", (b"\x1f\x8b",)), ".zip": ("zip", (b"PK",)), ".whl": ("zip", (b"PK",)),
         ".json": ("JSON", (b"{", b"[")), ".jsonl": ("JSON", (b"{",))}
PAGES = (b"<!doctype", b"<html", b"<head", b"<?xml", b"<error")
CHUNK = 1 << 20


def refuse_other_kind(head: bytes, suffix: str) -> None:
    """Refuse what begins like no file of this kind, such as a page that says that something is missing."""
    if not head:
        raise Refused("an empty file")
    kind, beginnings = KINDS.get(suffix, ("a data file", (b"",)))
    text = head.removeprefix(b"\xef\xbb\xbf").lstrip()
    if text.lower().startswith(PAGES) or not (text if kind == "JSON" else head).startswith(beginnings):
        raise Refused(f"not {kind}; first bytes {head[:HEAD]!r}")


def read_to_the_end(path: Path, suffix: str) -> None:
    """Refuse an archive that is not whole, or hostile. It tells so itself, should a server name a wrong length or none.

    Nothing that is unpacked is kept, so that little memory is needed however much it is.
    """
    try:
        if suffix == ".gz":
            with gzip.open(path) as file:
                while file.read(CHUNK):
                    pass
        elif suffix in (".zip", ".whl"):
            archives.check(path)
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise Refused(f"a damaged or shortened {suffix[1:]} file ({error})") from error
    except DataError as error:
        member = str(error.where).removeprefix(str(path)).lstrip(":")
        raise Refused(f"an archive not to be used: {' '.join(filter(None, (member, error.what)))}"
                      + (f" ({error.why})" if error.why else "")) from error
