"""One request for an image, and what its answer means for the next one."""

import time
from email.utils import parsedate_to_datetime
from typing import NamedTuple
from urllib.parse import urljoin, urlsplit

import requests
import urllib3

AGENT = "semantic-ids/1.0 (generative recommendation with semantic IDs; fetches the images of a catalogue once)"
MAX_BYTES = 20_000_000
MAX_SECONDS = 60      # for the body of one answer, however steadily it drips
TIMEOUT = (10, 15)    # seconds to connect, and between two packets
CHUNK = 1 << 16
HEADERS = {"User-Agent": AGENT, "Accept": "image/*,*/*;q=0.5", "Accept-Encoding": "identity"}
PASSING = (408, 425, 429, 500, 502, 503, 504)  # may be better next time
OVERLOADED = (429, 503)


class Answer(NamedTuple):
    """What came of an address: `fetched` with its body, or why there is none."""

    status: str  # fetched, unreachable, too large, bad address
    detail: str = ""
    body: bytes = b""


class Later(NamedTuple):
    """No answer yet: the address is to be asked again after a pause."""

    detail: str
    heard: bool = True          # whether the host said anything at all
    pause: float | None = None  # seconds that the host asked for
    overloaded: bool = False    # the host means all its addresses


class Moved(NamedTuple):
    address: str


def host_of(address: str) -> str | None:
    """Host and port of an http or https address; None if it is none."""
    try:
        parts = urlsplit(address)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            return None
        return f"{parts.hostname}:{parts.port}" if parts.port else parts.hostname
    except ValueError:
        return None


def ask(session: requests.Session, url: str) -> Answer | Later | Moved:
    """One request; a redirect is not followed, since it needs a turn of its own."""
    try:
        with session.get(url, stream=True, timeout=TIMEOUT, allow_redirects=False) as response:
            if response.is_redirect:
                return Moved(urljoin(url, response.headers["Location"]))
            code = response.status_code
            if code in PASSING:
                return Later(f"HTTP {code}", pause=_retry_after(response), overloaded=code in OVERLOADED)
            return _read(response) if code == 200 else Answer("unreachable", f"HTTP {code}")
    except ValueError as error:  # requests, urllib3 and Python each have their own kinds of it
        return Answer("bad address", str(error)[:200])
    except requests.Timeout:
        return Later("timed out", heard=False)
    except requests.ConnectionError as error:
        failed = "no secure connection" if isinstance(error, requests.exceptions.SSLError) else "cannot connect"
        return Later(failed, heard=False)
    except (requests.RequestException, urllib3.exceptions.HTTPError):
        return Later("cut off")


def _read(response: requests.Response) -> Answer:
    length = response.headers.get("Content-Length", "")
    if length.isdecimal() and int(length) > MAX_BYTES:
        return Answer("too large", f"{int(length)} bytes")
    body, deadline = bytearray(), time.monotonic() + MAX_SECONDS
    # read1 gives what has come; read would wait for a full chunk, however slowly it drips.
    while chunk := response.raw.read1(CHUNK, decode_content=True):
        body += chunk
        if len(body) > MAX_BYTES:
            return Answer("too large", f"more than {MAX_BYTES} bytes")
        if time.monotonic() > deadline:
            return Answer("unreachable", f"not done after {MAX_SECONDS} s")
    return Answer("fetched", body=bytes(body))


def _retry_after(response: requests.Response) -> float | None:
    """Seconds, from a number or a date; None if the host names neither."""
    text = response.headers.get("Retry-After", "").strip()
    if text.isdecimal():
        return float(text)
    try:
        return max(parsedate_to_datetime(text).timestamp() - time.time(), 0.0)
    except (TypeError, ValueError, OverflowError):
        return None
