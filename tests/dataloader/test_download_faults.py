"""Rows F01 to F08 of the fault matrix: the real command against a server on loopback.

Each fault ends with an exit code and one message with a fix; existing files keep their bytes; and the same command
succeeds after the fault is repaired.
"""

import errno
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

from common.errors import LockedError, ResourceError
from common.publishing import file_sha256
from dataloader import download, fetch, flags, options, process, text_embedding
from tests.dataloader.helpers import FaultyServer, Reply, closed_port, mentions, review, run_here
from tests.dataloader.remote import HTML, OTHER, ROOT, WHOLE, reason, sha256, wait_until
from tests.errors import Outcome

pytestmark = pytest.mark.slow

REVIEWS, META = "reviews_Baby_5.json.gz", "meta_Baby.json.gz"
# Shorter waits, for the commands in processes of their own.
SITE = """
import dataloader.fetch
dataloader.fetch.LOOK_EVERY, dataloader.fetch.PATIENCE = 0.01, dataloader.fetch.PATIENCE._replace(first=0.01)
"""


class Command:
    """`python -P -m dataloader.download` for one data root, with the server as the mirror."""

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
        """Start the command in a process of its own."""
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
        """Return the Range header of each request for a file."""
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


def check_failed(outcome: Outcome, tried: dict[str, list], dataset: str = "Baby",
                 files: tuple = (REVIEWS, META)) -> None:
    """The download failed with one line on stderr, which mentions for each address the values and gives the fix."""
    outcome.check_error(ResourceError, dataset, fix=["--raw_dir", "--mirror", *files])
    assert outcome.err.count("\n") == 1
    for address, values in tried.items():
        assert mentions(found := reason(address, outcome.error.what), *values), found


def check_repaired(command: Command) -> None:
    """The same command downloads the files when the server has them."""
    command.serve(REVIEWS, Reply(WHOLE))
    command.serve(META, Reply(OTHER))
    outcome = command.run()
    assert outcome.code == 0, outcome.err
    assert file_sha256(command.raw / REVIEWS) == sha256(WHOLE)
    assert file_sha256(command.raw / META) == sha256(OTHER)
    assert contents(command.raw).keys() - {f"{REVIEWS}.bad"} == {REVIEWS, f"{REVIEWS}.meta.json", META,
                                                                 f"{META}.meta.json"}


def test_f01_the_rerun_continues_after_a_cut(command):
    sixty = len(WHOLE) * 6 // 10
    # Every later answer is cut at once.
    address = command.serve(REVIEWS, Reply(WHOLE, cut=sixty), Reply(WHOLE, cut=0))
    outcome = command.run()
    part = command.raw / f"{REVIEWS}.part"
    got = part.stat().st_size
    check_failed(outcome, {address: [got, len(WHOLE)]})
    assert len(command.ranges(REVIEWS)) == 4
    assert sixty - (1 << 16) <= got <= sixty
    assert part.read_bytes() == WHOLE[:got]
    assert not (command.raw / REVIEWS).exists()
    assert (command.raw / META).read_bytes() == OTHER  # the other file is complete
    asked = len(command.server.asked)
    check_repaired(command)
    [last] = command.server.asked[asked:]
    assert (last.path, last.headers["Range"]) == (f"/{REVIEWS}", f"bytes={got}-")


def test_f01_the_download_continues_after_a_silence(command, monkeypatch):
    monkeypatch.setattr(fetch, "STALL_TIMEOUT", 0.5)
    silence = threading.Event()
    address = command.serve(REVIEWS, Reply(WHOLE, cut=200_000, wait=silence), Reply(WHOLE))
    outcome = command.run()
    silence.set()
    assert outcome.code == 0, outcome.err
    assert any(mentions(line, address, 0.5, len(WHOLE)) for line in outcome.out.splitlines())
    assert command.ranges(REVIEWS)[1] is not None
    assert file_sha256(command.raw / REVIEWS) == sha256(WHOLE)


SECRETS = ("somebody", "pass%20word", "token-1", "signed-2")


def test_secrets_of_an_address_are_not_written(command, tmp_path):
    """The user's name, the password and the token in the query are sent to the mirror, and none is written."""
    host = command.server.url.removeprefix("http://")
    mirror = f"http://{SECRETS[0]}:{SECRETS[1]}@{host}/?token={SECRETS[2]}&X-Signature={SECRETS[3]}"
    query = f"?token={SECRETS[2]}&X-Signature={SECRETS[3]}"
    events = [review(f"u{n % 6}", f"i{n % 5}", n) for n in range(60)]
    reviews = gzip.compress("".join(f"{line}\n" for line in events).encode())
    command.serve(REVIEWS + query, Reply(reviews, cut=100), Reply(reviews, cut=0))  # leaves a part
    command.serve(META + query, Reply(gzip.compress(b"{'asin': 'i1', 'title': 'Cup'}\n")))
    outcomes = [command.run("--mirror", mirror, "--debug")]
    written = [(command.raw / f"{REVIEWS}.part.tag").read_text()]
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
    """Copy the sources' YAMLs and add the checksum of Baby's reviews; return the folder."""
    shutil.copytree(flags.CONFIGS, folder / "configs")
    path = folder / "configs" / "amazon14.yaml"
    config = yaml.safe_load(path.read_text())
    config["files"]["reviews_{dataset}_5.json.gz"] = {
        "addresses": config["files"]["reviews_{dataset}_5.json.gz"], "sha256": {"Baby": sha256(WHOLE)}}
    path.write_text(yaml.safe_dump(config))
    return path.parent


def test_f03_a_wrong_checksum_keeps_bad_and_old_file(command, tmp_path, monkeypatch):
    address, configs = command.serve(REVIEWS, Reply(OTHER)), pinned(tmp_path)
    for module in (flags, options, download):
        monkeypatch.setattr(module, "CONFIGS", configs)
    monkeypatch.setattr(options, "source_configs", flags.source_configs.__wrapped__)  # without its cache
    command.raw.mkdir(parents=True)
    (command.raw / REVIEWS).write_bytes(b"old")
    check_failed(command.run(), {address: [sha256(OTHER), sha256(WHOLE), f"{REVIEWS}.bad"]})
    assert (command.raw / f"{REVIEWS}.bad").read_bytes() == OTHER
    assert (command.raw / REVIEWS).read_bytes() == b"old"
    assert not (command.raw / f"{REVIEWS}.meta.json").exists()
    check_repaired(command)


def test_f04_an_error_page_is_named_with_its_first_bytes(command):
    xml = b'<?xml version="1.0"?><Error><Code>AccessDenied</Code></Error>'
    reviews, meta = command.serve(REVIEWS, Reply(HTML)), command.serve(META, Reply(xml))
    check_failed(command.run(), {reviews: ["gzip", repr(HTML[:64])], meta: ["gzip", repr(xml[:64])]})
    assert contents(command.raw) == {}
    check_repaired(command)


CLOSED = os.strerror(errno.ECONNREFUSED)


@pytest.mark.parametrize("faults", [  # of the two files: the answer, the values in the error, the number of attempts
    [(Reply(status=404), [404], 1), (Reply(status=403), [403], 1)],
    [(Reply(status=503), [503], 4), (Reply(status=429, headers={"Retry-After": "7200"}), [429, 7200], 1)],
    [(Reply(hang_up=True), [], 4), (Reply(status=302, headers={"Location": "http://127.0.0.1:9/"}), [CLOSED], 4)],
], ids=["404 and 403", "503 and 429", "no answer and a redirect to a closed port"])
def test_f05_every_address_is_listed_with_its_fault(command, faults):
    tried = {command.serve(name, fault): values
             for name, (fault, values, _) in zip((REVIEWS, META), faults, strict=True)}
    real = "https://snap.stanford.edu/data/amazon/productGraph/categoryFiles"  # behind a proxy with a closed port
    tried |= {f"{real}/{name}": [CLOSED] for name in (REVIEWS, META)}
    check_failed(command.run(), tried)
    assert [len(command.ranges(name)) for name in (REVIEWS, META)] == [num_attempts for _, _, num_attempts in faults]
    check_repaired(command)


def test_f05_a_timeout_and_an_unknown_host_are_listed(command, monkeypatch):
    silence = threading.Event()
    address = command.serve(REVIEWS, Reply(before=lambda: silence.wait(10)))
    with monkeypatch.context() as impatient:
        impatient.setattr(fetch, "STALL_TIMEOUT", 0.2)
        outcome = command.run()
    silence.set()
    check_failed(outcome, {address: [0.2]})
    assert len(command.ranges(REVIEWS)) == 4
    monkeypatch.setenv("no_proxy", "127.0.0.1,nowhere.invalid")
    child = command.start("--mirror", "http://nowhere.invalid")
    out, err = child.communicate(timeout=60)
    check_failed(Outcome(child.returncode, out, err), {f"http://nowhere.invalid/{REVIEWS}": []})
    check_repaired(command)


def test_f06_a_short_file_with_any_length_is_refused(command):
    addresses = [command.serve(REVIEWS, Reply(WHOLE, length="short", cut=200_000)),
                 command.serve(META, Reply(OTHER, length="untold", cut=200_000))]
    check_failed(command.run(), dict.fromkeys(addresses, []))
    assert contents(command.raw) == {}
    check_repaired(command)


@pytest.mark.parametrize("manifests", [(None, b""), (b'{"size": 1000}', b"[]")])
def test_f07_a_partial_file_with_the_final_name_is_replaced(command, manifests):
    command.raw.mkdir(parents=True)
    for name, body, manifest in zip((REVIEWS, META), (WHOLE, OTHER), manifests, strict=True):
        (command.raw / name).write_bytes(body[:1000])
        if manifest is not None:
            (command.raw / f"{name}.meta.json").write_bytes(manifest)
    check_repaired(command)
    asked = len(command.server.asked)
    assert command.run().code == 0
    assert len(command.server.asked) == asked


def zip_with(name: str, content: bytes = b"x", kind: int = 0) -> bytes:
    buffer = io.BytesIO()
    member = zipfile.ZipInfo(name)
    member.create_system, member.external_attr, member.compress_type = 3, (kind | 0o644) << 16, zipfile.ZIP_DEFLATED
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("ml-32m/ratings.csv", b"userId,movieId,rating,timestamp\n")
        archive.writestr(member, content)
    return buffer.getvalue()


@pytest.mark.parametrize(("member", "content", "kind", "values"), [
    ("../x", b"x", 0, []), ("/tmp/x", b"x", 0, []), ("ml-32m/link", b"/etc/passwd", stat.S_IFLNK, []),
    ("ml-32m/null", b"", stat.S_IFCHR, []), ("ml-32m/bomb", bytes(64 << 20), 0, [16 << 20]),
], ids=["up", "absolute", "symlink", "device", "bomb"])
def test_f08_a_malicious_archive_is_refused(command, tmp_path, member, content, kind, values):
    address = command.serve("ml-32m.zip", Reply(zip_with(member, content, kind)))
    before = set(tmp_path.rglob("*"))
    outcome = command.run("--dataset", "ml-32m")
    check_failed(outcome, {address: [member, *values]}, "ml-32m", ("ml-32m.zip",))
    raw = command.data_root / "ml-32m" / "raw" / "movielens"
    files = {path for path in tmp_path.rglob("*") if path.is_file() and path.suffix != ".pyc"}
    assert files - before == {raw / ".lock"}


def test_f08_a_good_archive_after_a_malicious_one_is_accepted(command):
    malicious, good = zip_with("../x"), zip_with("ml-32m/movies.csv", b"movieId,title,genres\n")
    command.serve("ml-32m.zip", Reply(malicious), Reply(good))
    assert [command.run("--dataset", "ml-32m").code for _ in range(2)] == [5, 0]
    assert file_sha256(command.data_root / "ml-32m" / "raw" / "movielens" / "ml-32m.zip") == sha256(good)


def test_a_failed_update_changes_no_file(command):
    check_repaired(command)
    before = contents(command.raw)
    reviews, meta = command.serve(REVIEWS, Reply(HTML)), command.serve(META, Reply(status=404))
    check_failed(command.run("--force"), {reviews: [repr(HTML[:64])], meta: [404]})
    assert contents(command.raw) == before


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGKILL, -9)])
def test_the_rerun_continues_a_stopped_download(command, number, code):
    silence, part = threading.Event(), command.raw / f"{REVIEWS}.part"
    command.serve(REVIEWS, Reply(WHOLE, cut=200_000, wait=silence), Reply(WHOLE))
    child = command.start()
    wait_until(lambda: part.exists() and part.stat().st_size > 100_000)
    child.send_signal(number)
    _, err = child.communicate(timeout=20)
    silence.set()
    assert child.returncode == code
    assert "Traceback" not in err
    if number != signal.SIGKILL:
        [line] = err.splitlines()
        assert line.startswith("error: ")
        assert "Fix: " in line
    got = part.stat().st_size
    check_repaired(command)
    assert command.ranges(REVIEWS) == [None, f"bytes={got}-"]


def test_a_second_command_in_the_same_folder_is_refused(command):
    silence, part = threading.Event(), command.raw / f"{REVIEWS}.part"
    command.serve(REVIEWS, Reply(WHOLE, cut=200_000, wait=silence))
    child = command.start()
    wait_until(lambda: part.exists() and part.stat().st_size)
    outcome = command.run()
    silence.set()
    outcome.check_error(LockedError, command.raw, names=[child.pid])
    child.communicate(timeout=20)
    assert child.returncode == 0


def test_a_full_disk_is_named_and_the_part_is_kept(command):
    code = ("import resource, runpy; resource.setrlimit(resource.RLIMIT_FSIZE, (150_000, 150_000)); "
            "runpy.run_module('dataloader.download', run_name='__main__')")
    child = command.start(program=("-c", code))
    out, err = child.communicate(timeout=60)
    outcome = Outcome(child.returncode, out, err)
    part = outcome.error.where  # of the file that was first to reach the limit
    assert part in [f"{command.raw / name}.part" for name in (REVIEWS, META)]
    outcome.check_error(ResourceError, part, names=[os.strerror(errno.EFBIG)])
    check_repaired(command)
    assert any(asked.headers.get("Range") for asked in command.server.asked)
