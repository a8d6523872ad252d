"""Rows F01 to F08 of the fault matrix: the real command against a server on loopback.

Each fault ends with an exit code and one message that says what, why and what to do; files that were there before
keep their bytes; and once the fault is mended the same command succeeds.
"""

import gzip
import io
import os
import shutil
import signal
import stat
import subprocess
import sys
import threading
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from common.publishing import file_sha256
from dataloader import download, fetch, options, process, text_embedding
from tests.dataloader.helpers import FaultyServer, Reply, closed_port, review, run_here
from tests.dataloader.remote import HTML, OTHER, ROOT, WHOLE, sha256, wait_until
from tests.errors import Outcome

pytestmark = pytest.mark.slow

REVIEWS, META = "reviews_Baby_5.json.gz", "meta_Baby.json.gz"
# Waits that a user has patience for, and a test has not.
SITE = """
import dataloader.fetch
dataloader.fetch.LOOK_EVERY, dataloader.fetch.PATIENCE = 0.01, dataloader.fetch.PATIENCE._replace(first=0.01)
"""


class Command:
    """`python -P -m dataloader.download` for one data root; its mirror is the server."""

    def __init__(self, folder: Path, server: FaultyServer):
        self.data_root, self.server, self.site = folder / "data", server, folder / "site"
        self.site.mkdir()
        (self.site / "sitecustomize.py").write_text(SITE)

    def flags(self, *flags: str) -> list[str]:
        return ["--data_root", str(self.data_root), "--mirror", self.server.url, *flags]

    def run(self, *flags: str) -> Outcome:
        return run_here(download.main, self.flags(*flags), self.data_root.parent)

    def step(self, main: Callable[[list[str]], None], *flags: str) -> Outcome:
        return run_here(main, ["--data_root", str(self.data_root), *flags], self.data_root.parent)

    def start(self, *flags: str, program: tuple[str, str] = ("-m", "dataloader.download")) -> subprocess.Popen:
        """The command in a process of its own."""
        path = os.pathsep.join([str(self.site), str(ROOT)])
        return subprocess.Popen([sys.executable, "-P", *program, *self.flags(*flags)], cwd=self.data_root.parent,
                                env={**os.environ, "PYTHONPATH": path}, text=True, stdout=subprocess.PIPE,
                                stderr=subprocess.PIPE)

    @property
    def raw(self) -> Path:
        return self.data_root / "Baby" / "raw" / "amazon14"

    def serve(self, name: str, *replies: Reply) -> str:
        return self.server.serve(f"/{name}", *replies)

    def ranges(self, name: str) -> list[str | None]:
        """What each request for a file asked to begin with."""
        return [asked.headers.get("Range") for asked in self.server.asked if asked.path == f"/{name}"]


@pytest.fixture
def command(tmp_path, server, monkeypatch) -> Command:
    for name in ("http_proxy", "https_proxy"):
        monkeypatch.setenv(name, closed_port())  # no real host can be reached
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(fetch, "LOOK_EVERY", 0.01)
    monkeypatch.setattr(fetch, "PATIENCE", fetch.PATIENCE._replace(first=0.01))
    command = Command(tmp_path, server)
    command.serve(REVIEWS, Reply(WHOLE))
    command.serve(META, Reply(OTHER))
    return command


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != ".lock"}


def refused(outcome: Outcome, *words: str) -> None:
    """One message on stderr, with a way out, and no traceback."""
    assert outcome.code == 5, outcome
    assert outcome.err.startswith("error: ")
    assert outcome.err.count("\n") == 1
    assert "Traceback" not in outcome.err
    for word in (*words, "Fix:", "--raw_dir DIR", "--mirror"):
        assert word in outcome.err


def mended(command: Command) -> None:
    """Once the server has the files, the same command gets them."""
    command.serve(REVIEWS, Reply(WHOLE))
    command.serve(META, Reply(OTHER))
    outcome = command.run()
    assert outcome.code == 0, outcome.err
    assert file_sha256(command.raw / REVIEWS) == sha256(WHOLE)
    assert file_sha256(command.raw / META) == sha256(OTHER)
    assert contents(command.raw).keys() - {f"{REVIEWS}.bad"} == {REVIEWS, f"{REVIEWS}.meta.json", META,
                                                                 f"{META}.meta.json"}


def test_f01_a_cut_at_sixty_percent_is_an_error_with_the_bytes_and_the_rerun_continues(command):
    sixty = len(WHOLE) * 6 // 10
    # Every attempt to continue is cut at once.
    address = command.serve(REVIEWS, Reply(WHOLE, cut=sixty), Reply(WHOLE, cut=0))
    outcome = command.run()
    part = command.raw / f"{REVIEWS}.part"
    got = part.stat().st_size
    refused(outcome, f"{address}: cut off after {got} of {len(WHOLE)} bytes (4 attempts)")
    assert sixty - (1 << 16) <= got <= sixty
    assert part.read_bytes() == WHOLE[:got]
    assert not (command.raw / REVIEWS).exists()
    assert (command.raw / META).read_bytes() == OTHER  # the other file came
    asked = len(command.server.asked)
    mended(command)
    [last] = command.server.asked[asked:]
    assert (last.path, last.headers["Range"]) == (f"/{REVIEWS}", f"bytes={got}-")


def test_f01_a_silent_server_is_cut_off_and_continued(command, monkeypatch):
    monkeypatch.setattr(fetch, "STALL_TIMEOUT", 0.5)
    silence = threading.Event()
    command.serve(REVIEWS, Reply(WHOLE, cut=200_000, wait=silence), Reply(WHOLE))
    outcome = command.run()
    silence.set()
    assert outcome.code == 0, outcome.err
    assert "silent for 0.5 s, cut off after" in outcome.out
    assert file_sha256(command.raw / REVIEWS) == sha256(WHOLE)


SECRETS = ("somebody", "pass%20word", "token-1", "signed-2")


def test_no_secret_of_an_address_is_written_anywhere(command, tmp_path):
    """The mirror wants a user's name and password and a token in its query: all are sent, and none is written."""
    host = command.server.url.removeprefix("http://")
    mirror = f"http://{SECRETS[0]}:{SECRETS[1]}@{host}/?token={SECRETS[2]}&X-Signature={SECRETS[3]}"
    query = f"?token={SECRETS[2]}&X-Signature={SECRETS[3]}"
    events = [review(f"u{n % 6}", f"i{n % 5}", n) for n in range(60)]
    reviews = gzip.compress("".join(f"{line}\n" for line in events).encode())
    command.serve(REVIEWS + query, Reply(reviews, cut=100), Reply(reviews, cut=0))  # leaves a part
    command.serve(META + query, Reply(gzip.compress(b"{'asin': 'i1', 'title': 'Cup'}\n")))
    outcomes = [command.run("--mirror", mirror, "--debug")]
    assert (beside := command.raw / f"{REVIEWS}.part.tag").exists()
    written = [beside.read_text()]
    command.serve(REVIEWS + query, Reply(reviews))
    outcomes += [command.step(step, f"--mirror={mirror}", "--debug", *flags) for step, *flags in (
        (download.main,), (process.main,), (text_embedding.main, "--text_model=tfidf"))]
    assert [outcome.code for outcome in outcomes] == [5, 0, 0, 0], outcomes
    assert all(asked.headers["Authorization"].startswith("Basic ") for asked in command.server.asked)
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert {"items.parquet.meta.json", "Baby.emb-td.npy.meta.json", f"{REVIEWS}.meta.json"} <= {f.name for f in files}
    written += [path.read_bytes().decode("latin-1") for path in files] + [o.out + o.err for o in outcomes]
    assert not [secret for secret in SECRETS for text in written if secret in text]
    assert "--mirror=http://***@" in (command.data_root / "Baby" / "items.parquet.meta.json").read_text()


@pytest.mark.parametrize("ranges", ["ignored", "honoured", "blind"])
def test_f02_a_part_is_not_spliced_with_another_file(command, ranges):
    etag = '"first"' if ranges == "ignored" else '"second"'
    command.serve(REVIEWS, Reply(WHOLE, cut=200_000), Reply(OTHER, etag=etag, ranges=ranges))
    outcome = command.run()
    assert outcome.code == 0, outcome.err
    assert file_sha256(command.raw / REVIEWS) == sha256(OTHER)
    assert command.ranges(REVIEWS)[1] is not None


def pinned(folder: Path) -> Path:
    """The sources' YAMLs with the checksum of Baby's reviews."""
    shutil.copytree(options.CONFIGS, folder / "configs")
    path = folder / "configs" / "amazon14.yaml"
    config = yaml.safe_load(path.read_text())
    config["files"]["reviews_{dataset}_5.json.gz"] = {
        "addresses": config["files"]["reviews_{dataset}_5.json.gz"], "sha256": {"Baby": sha256(WHOLE)}}
    path.write_text(yaml.safe_dump(config))
    return path.parent


def test_f03_a_wrong_checksum_names_both_and_keeps_the_file_as_bad_and_the_old_one(command, tmp_path,
                                                                                           monkeypatch):
    address, configs = command.serve(REVIEWS, Reply(OTHER)), pinned(tmp_path)
    for module in (options, download):
        monkeypatch.setattr(module, "CONFIGS", configs)
    monkeypatch.setattr(options, "source_configs", options.source_configs.__wrapped__)  # without its memory
    command.raw.mkdir(parents=True)
    (command.raw / REVIEWS).write_bytes(b"old")
    refused(command.run(), f"{address}: sha256 {sha256(OTHER)} is not the expected {sha256(WHOLE)}; "
            f"kept as {REVIEWS}.bad")
    assert (command.raw / f"{REVIEWS}.bad").read_bytes() == OTHER
    assert (command.raw / REVIEWS).read_bytes() == b"old"
    assert not (command.raw / f"{REVIEWS}.meta.json").exists()
    mended(command)


def test_f04_an_error_page_is_named_with_its_address_and_first_bytes(command):
    xml = b'<?xml version="1.0"?><Error><Code>AccessDenied</Code></Error>'
    reviews, meta = command.serve(REVIEWS, Reply(HTML)), command.serve(META, Reply(xml))
    refused(command.run(), f"{reviews}: not gzip; first bytes {HTML[:64]!r}",
            f"{meta}: not gzip; first bytes {xml[:64]!r}")
    assert contents(command.raw) == {}
    mended(command)


@pytest.mark.parametrize(("faults", "words"), [
    ((Reply(status=404), Reply(status=403)), ("answered 404 Not Found", "answered 403 Forbidden")),
    ((Reply(status=503), Reply(status=429, headers={"Retry-After": "7200"})),
     ("answered 503 Service Unavailable (4 attempts)", "answered 429 Too Many Requests, and asks to wait for 7200 s")),
    ((Reply(hang_up=True), Reply(status=302, headers={"Location": "http://127.0.0.1:9/"})),
     ("cannot connect: Remote end closed connection without response (4 attempts)", "cannot connect: "))])
def test_f05_an_address_that_fails_is_listed_with_all_others_and_the_way_out(command, faults, words):
    addresses = [command.serve(name, fault) for name, fault in zip((REVIEWS, META), faults, strict=True)]
    outcome = command.run()
    real = "https://snap.stanford.edu/data/amazon/productGraph/categoryFiles"
    refused(outcome, f"({REVIEWS}, {META})",
            *(f"{address}: {said}" for address, said in zip(addresses, words, strict=True)),
            *(f"{real}/{name}: cannot connect to the proxy: Connection refused" for name in (REVIEWS, META)))
    assert all(outcome.err.count(f"{address}: ") == 1 for address in addresses)
    mended(command)


def test_f05_a_timeout_and_an_unknown_host_are_listed(command, monkeypatch):
    silence = threading.Event()
    address = command.serve(REVIEWS, Reply(before=lambda: silence.wait(10)))
    with monkeypatch.context() as impatient:
        impatient.setattr(fetch, "STALL_TIMEOUT", 0.2)
        outcome = command.run()
    silence.set()
    refused(outcome, f"{address}: no answer within 0.2 s (4 attempts)")
    monkeypatch.setenv("no_proxy", "127.0.0.1,nowhere.invalid")
    child = command.start("--mirror", "http://nowhere.invalid")
    out, err = child.communicate(timeout=60)
    refused(Outcome(child.returncode, out, err), f"http://nowhere.invalid/{REVIEWS}: cannot connect: ")
    mended(command)


def test_f06_a_wrong_or_missing_length_does_not_pass_for_the_whole_file(command):
    addresses = [command.serve(REVIEWS, Reply(WHOLE, length="short", cut=200_000)),
                 command.serve(META, Reply(OTHER, length="untold", cut=200_000))]
    refused(command.run(), *(f"{address}: a damaged or shortened gz file" for address in addresses))
    assert contents(command.raw) == {}
    mended(command)


@pytest.mark.parametrize("manifests", [(None, b""), (b'{"size": 1000}', b"[]")])
def test_f07_a_partial_file_under_the_final_name_is_fetched_again(command, manifests):
    command.raw.mkdir(parents=True)
    for name, body, manifest in zip((REVIEWS, META), (WHOLE, OTHER), manifests, strict=True):
        (command.raw / name).write_bytes(body[:1000])
        if manifest is not None:
            (command.raw / f"{name}.meta.json").write_bytes(manifest)
    mended(command)
    asked = len(command.server.asked)
    assert "reusing the raw files" in command.run().out
    assert len(command.server.asked) == asked


def hostile_zip(name: str, content: bytes = b"x", kind: int = 0) -> bytes:
    buffer = io.BytesIO()
    member = zipfile.ZipInfo(name)
    member.create_system, member.external_attr, member.compress_type = 3, (kind | 0o644) << 16, zipfile.ZIP_DEFLATED
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("ml-32m/ratings.csv", b"userId,movieId,rating,timestamp\n")
        archive.writestr(member, content)
    return buffer.getvalue()


@pytest.mark.parametrize(("archive", "words"), [
    (hostile_zip("../x"), "../x points outside the archive's folder"),
    (hostile_zip("/tmp/x"), "/tmp/x points outside the archive's folder"),
    (hostile_zip("ml-32m/link", b"/etc/passwd", stat.S_IFLNK), "ml-32m/link is a symbolic link"),
    (hostile_zip("ml-32m/null", b"", stat.S_IFCHR), "ml-32m/null is a device"),
    (hostile_zip("ml-32m/bomb", bytes(64 << 20)), "ml-32m/bomb unpacks to too much (The limit is 16777216 bytes")],
    ids=["up", "absolute", "symlink", "device", "bomb"])
def test_f08_a_hostile_archive_is_refused_and_nothing_lies_outside(command, tmp_path, archive, words):
    address = command.serve("ml-32m.zip", Reply(archive))
    before = set(tmp_path.rglob("*"))
    refused(command.run("--dataset", "ml-32m"), f"{address}: an archive not to be used: {words}")
    raw = command.data_root / "ml-32m" / "raw" / "movielens"
    there = {path for path in tmp_path.rglob("*") if path.is_file() and path.suffix != ".pyc"}
    assert there - before == {raw / ".lock"}


def test_f08_a_good_archive_in_place_of_a_hostile_one_is_taken(command):
    hostile, good = hostile_zip("../x"), hostile_zip("ml-32m/movies.csv", b"movieId,title,genres\n")
    command.serve("ml-32m.zip", Reply(hostile), Reply(good))
    assert [command.run("--dataset", "ml-32m").code for _ in range(2)] == [5, 0]
    assert file_sha256(command.data_root / "ml-32m" / "raw" / "movielens" / "ml-32m.zip") == sha256(good)


def test_a_failed_renewal_changes_no_byte_of_what_is_there(command):
    mended(command)
    before = contents(command.raw)
    command.serve(REVIEWS, Reply(HTML))
    command.serve(META, Reply(status=404))
    refused(command.run("--force"), "not gzip", "answered 404 Not Found")
    assert contents(command.raw) == before


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGKILL, -9)])
def test_a_download_that_is_stopped_keeps_its_part_and_the_rerun_continues(command, number, code):
    silence, part = threading.Event(), command.raw / f"{REVIEWS}.part"
    command.serve(REVIEWS, Reply(WHOLE, cut=200_000, wait=silence), Reply(WHOLE))
    child = command.start()
    wait_until(lambda: part.exists() and part.stat().st_size > 100_000)
    child.send_signal(number)
    _, err = child.communicate(timeout=20)
    silence.set()
    assert child.returncode == code
    assert "Traceback" not in err
    assert ("Fix: the same command again continues from here" in err) == (code > 0)
    got = part.stat().st_size
    mended(command)
    assert command.ranges(REVIEWS) == [None, f"bytes={got}-"]


def test_a_second_command_in_the_same_folder_is_refused(command):
    silence, part = threading.Event(), command.raw / f"{REVIEWS}.part"
    command.serve(REVIEWS, Reply(WHOLE, cut=200_000, wait=silence))
    child = command.start()
    wait_until(lambda: part.exists() and part.stat().st_size)
    outcome = command.run()
    silence.set()
    assert outcome.code == 7
    assert f"is in use by process {child.pid}" in outcome.err
    child.communicate(timeout=20)
    assert child.returncode == 0


def test_a_full_disk_is_named_with_the_file_and_what_came_is_kept(command):
    code = ("import resource, runpy; resource.setrlimit(resource.RLIMIT_FSIZE, (150_000, 150_000)); "
            "runpy.run_module('dataloader.download', run_name='__main__')")
    child = command.start(program=("-c", code))
    _, err = child.communicate(timeout=60)
    assert child.returncode == 5, err
    assert err.startswith(f"error: {command.raw}/")
    assert ".part: File too large. Fix: free space there" in err
    assert "Traceback" not in err
    mended(command)
    assert any(asked.headers.get("Range") for asked in command.server.asked)
