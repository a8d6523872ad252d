"""Step 1 with a server on loopback: the images it keeps, the items it lists, and its continuation after a stop."""

import errno
import hashlib
import logging
import os
import shutil
import signal
import subprocess
import sys
import time
from glob import glob
from pathlib import Path

import pytest
from PIL import Image

from common.artifacts import load_meta
from common.cli import ROOT
from common.errors import ArtifactError, ConfigError, DataError, LockedError, ResourceError
from common.lock import FolderLock
from common.publishing import file_sha256
from dataloader import http
from dataloader import images as images_step
from dataloader.embeddings import image_decoding
from dataloader.images import fetch_images, file_name
from tests.dataloader.dataset import write_dataset
from tests.dataloader.helpers import Reply, closed_port, logged, mentions, table
from tests.dataloader.image_server import HTML, ImageServer, encoded, picture, png
from tests.errors import Outcome, refused

pytestmark = pytest.mark.slow

COMMAND = "bash dataloader/1_load_figure.sh"


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch):
    monkeypatch.setattr(http.Fetcher, "retry_policy", http.Fetcher.retry_policy._replace(first=0.01))


@pytest.fixture
def server():
    server = ImageServer()
    yield server
    server.close()


def shop(tmp_path, urls: list[str | None], *flags: str):
    """Return the options for a dataset with one item for each of these addresses."""
    return write_dataset(tmp_path / "data", [f"text {n}" for n in range(len(urls))], "--image_rate", "500", *flags,
                         image_urls=urls).images


def fetch(options) -> list[tuple]:
    """Run the step; returns (raw_id, status) of every item."""
    fetch_images(options, COMMAND)
    return table(options.folder.image_table, "raw_id, status")


def images(options) -> dict[str, bytes]:
    """Return the files in `images/`, without the lock."""
    return {str(path.relative_to(options.folder.images)): path.read_bytes()
            for path in options.folder.images.rglob("*") if path.is_file() and path.name != ".lock"}


def test_every_item_is_listed_with_the_facts_of_its_image(tmp_path, server):
    urls = [server.serve("/a.png", Reply(png(1, 48, 40))), None, server.serve("/b.jpg", Reply(png(2, 30, 20)))]
    options = shop(tmp_path, urls)
    fetch_images(options, COMMAND)
    a, b = png(1, 48, 40), png(2, 30, 20)
    first, second = (hashlib.sha256(url.encode()).hexdigest()[:32] for url in (urls[0], urls[2]))
    files = [f"{first[:2]}/{first}.png", f"{second[:2]}/{second}.jpg"]
    assert table(options.folder.image_table) == [
        (0, "raw-0", urls[0], files[0], "ok", None, 48, 40, hashlib.sha256(a).hexdigest()),
        (1, "raw-1", None, None, "no address", None, None, None, None),
        (2, "raw-2", urls[2], files[1], "ok", None, 30, 20, hashlib.sha256(b).hexdigest())]
    assert images(options) == {files[0]: a, files[1]: b}
    meta, items = load_meta(options.folder.image_table, ""), load_meta(options.folder.items, "")
    assert meta["counts"] == {"ok": 2, "no address": 1}
    assert meta["inputs"] == {"items.parquet": file_sha256(options.folder.items)}
    assert (meta["items_sha256"], meta["num_items"], meta["command"]) == (items["items_sha256"], 3, COMMAND)


def test_items_with_one_address_share_request_and_file(tmp_path, server):
    [url, other] = server.serve_images(2)
    options = shop(tmp_path, [url, other, url, url])
    assert [status for _, status in fetch(options)] == ["ok"] * 4
    assert server.paths() == ["/0.png", "/1.png"]
    assert len({file for (file,) in table(options.folder.image_table, "file")}) == len(images(options)) == 2


def faults(server) -> list[tuple[str, str]]:
    """Return addresses, each with its expected status."""
    cut, exif = encoded(picture(3), "JPEG"), Image.Exif()
    exif[0x0112] = 6
    frames = [picture(number).quantize(16) for number in (4, 5)]
    corrupt = bytearray(png(6))
    corrupt[60:90] = bytes(30)
    replies = [
        ("ok", Reply(encoded(picture(0).convert("CMYK"), "JPEG"))),
        ("ok", Reply(encoded(frames[0], "GIF", save_all=True, append_images=[frames[1]]))),
        ("ok", Reply(encoded(picture(1), "JPEG", exif=exif))),
        ("ok", Reply(status=500), Reply(png(7))),
        ("ok", Reply(status=429, headers={"Retry-After": "0"}), Reply(png(8))),
        ("ok", Reply(png(9), cut=40), Reply(png(9))),
        ("ok", Reply(png(10), status=200, length="chunked", headers={"Content-Type": "text/html"})),
        ("placeholder", Reply(encoded(Image.new("RGB", (1, 1)), "GIF"))),
        ("placeholder", Reply(png(11, 200, 9))),
        ("not an image", Reply(bytes(corrupt))),
        ("not an image", Reply(cut[:-300])),
        ("not an image", Reply(HTML)),
        ("not an image", Reply(b"")),
        ("too large", Reply(encoded(Image.new("1", (20_000, 20_000))))),
        ("too large", Reply(b"\xff" * 3_000_000, length="untold")),
        ("unreachable", Reply(HTML, status=404)),
        ("unreachable", Reply(status=503)),
        ("unreachable", Reply(png(12), cut=40)),
        ("bad address", Reply(status=302, headers={"Location": "file:///etc/passwd"})),
    ]
    addresses = [(server.serve(f"/{number}", *rest), status) for number, (status, *rest) in enumerate(replies)]
    return [*addresses, ("ftp://127.0.0.1/a.png", "bad address"), (closed_port() + "/a.png", "unreachable"),
            (None, "no address"), ("", "no address")]


def test_every_fault_has_its_status_and_leaves_no_file(tmp_path, server, monkeypatch):
    monkeypatch.setattr(http, "MAX_BYTES", 100_000)
    urls, expected = zip(*faults(server), strict=True)
    options = shop(tmp_path, list(urls))
    found = table(options.folder.image_table, "status, file, detail") if fetch(options) else []
    assert [status for status, _, _ in found] == list(expected)
    kept = [file for status, file, _ in found if status in ("ok", "placeholder")]
    assert None not in kept
    assert sorted(images(options)) == sorted(kept)
    assert all(detail for status, _, detail in found if status not in ("ok", "no address"))
    [detail] = [detail for status, file, detail in found if (status, file) == ("placeholder", kept[8])]
    assert mentions(detail, 200, 9)


def test_missing_images_are_counted_and_ten_are_named(tmp_path, server, caplog):
    caplog.set_level(logging.INFO)
    options = shop(tmp_path, [*server.serve_images(3), *[f"{server.url}/none-{n}" for n in range(11)], None])
    fetch(options)
    assert logged(caplog, options.folder.image_table, 15, 11, "unreachable", 3, "ok", 1, "no address")
    assert all(logged(caplog, f"raw-{n}", "unreachable", 404) for n in range(3, 13))
    assert "raw-13" not in caplog.text
    assert logged(caplog, 12, options.folder.image_table.name, level=logging.WARNING)


def test_a_second_run_requests_only_deleted_images(tmp_path, server):
    urls = [*server.serve_images(5), None]
    options = shop(tmp_path, urls)
    fetch(options)
    server.paths()
    before = options.folder.image_table.read_bytes(), images(options)
    written = options.folder.image_table.stat().st_mtime_ns
    fetch(options)
    assert server.paths() == []
    assert options.folder.image_table.stat().st_mtime_ns == written
    (options.folder.images / file_name(urls[2])).unlink()
    fetch(options)
    assert server.paths() == ["/2.png"]
    assert (options.folder.image_table.read_bytes(), images(options)) == before


def test_the_next_run_retries_failed_images_but_no_placeholders(tmp_path, server):
    urls = [*server.serve_images(2), server.serve("/late", Reply(status=404), Reply(png(9))),
            server.serve("/tiny", Reply(png(8, 2, 2))), "ftp://127.0.0.1/a"]
    options = shop(tmp_path, urls)
    assert [s for _, s in fetch(options)] == ["ok", "ok", "unreachable", "placeholder", "bad address"]
    server.paths()
    assert [s for _, s in fetch(options)] == ["ok", "ok", "ok", "placeholder", "bad address"]
    assert server.paths() == ["/late"]
    fetch(options)
    assert server.paths() == []


def test_addresses_that_no_network_can_reach_are_an_error_of_the_data(tmp_path):
    options = shop(tmp_path, [f"pictures/{item}.png" for item in range(5)])
    with refused(DataError, options.folder.items, names=["5 images: bad address", "pictures/0.png"],
                 fix=["http", "--check --adopt"]):
        fetch(options)


def test_another_smallest_side_needs_no_request(tmp_path, server):
    urls = [server.serve("/small", Reply(png(0, 12, 12))), server.serve("/large", Reply(png(1, 90, 90)))]
    options = shop(tmp_path, urls)
    assert [s for _, s in fetch(options)] == ["ok", "ok"]
    server.paths()
    assert [s for _, s in fetch(shop(tmp_path, urls, "--min_image_side", "13"))] == ["placeholder", "ok"]
    assert [s for _, s in fetch(options)] == ["ok", "ok"]
    assert server.paths() == []


def test_only_images_of_new_items_are_requested(tmp_path, server):
    urls = server.serve_images(4)
    fetch(shop(tmp_path, urls[:3]))
    server.paths()
    options = shop(tmp_path, [urls[3], *urls[:3]])
    with refused(ArtifactError, options.folder.image_table, names=["items.parquet"], fix=[f"{COMMAND} --force"]):
        load_meta(options.folder.image_table, COMMAND)
    assert [s for _, s in fetch(options)] == ["ok"] * 4
    assert server.paths() == ["/3.png"]


def test_force_checks_every_pixel_and_fetches_damaged_images(tmp_path, server):
    urls = server.serve_images(3)
    options = shop(tmp_path, urls)
    fetch(options)
    server.paths()
    before = options.folder.image_table.read_bytes()
    (options.folder.images / file_name(urls[1])).write_bytes(png(1)[:-60])  # with the head of an image
    fetch(options._replace(force=True))
    assert server.paths() == ["/1.png"]
    assert options.folder.image_table.read_bytes() == before
    assert images(options)[file_name(urls[1])] == png(1)


@pytest.mark.parametrize("damage", [b"", b"PAR1", None], ids=["empty", "cut", "gone"])
def test_a_missing_list_is_made_from_the_files(tmp_path, server, damage):
    options = shop(tmp_path, server.serve_images(3))
    fetch(options)
    server.paths()
    before = options.folder.image_table.read_bytes()
    options.folder.image_table.unlink()
    if damage is not None:
        options.folder.image_table.write_bytes(damage)
    fetch(options)
    assert options.folder.image_table.read_bytes() == before
    assert server.paths() == []


def test_a_damaged_image_is_fetched_again(tmp_path, server):
    urls = server.serve_images(2)
    options = shop(tmp_path, urls)
    fetch(options)
    server.paths()
    options.folder.image_table.unlink()
    (options.folder.images / file_name(urls[1])).write_bytes(b"gone")
    assert [s for _, s in fetch(options)] == ["ok", "ok"]
    assert server.paths() == ["/1.png"]


def test_missing_images_can_be_an_error_at_the_end(tmp_path, server):
    urls = [*server.serve_images(2), None, f"{server.url}/none"]
    options = shop(tmp_path, urls, "--missing_images", "error")
    fix = [f"{COMMAND} --dataset Baby --data_root {options.folder.data_root}", "--missing_images mask"]
    for _ in range(2):
        with refused(DataError, options.folder.image_table, fix=fix) as raised:
            fetch_images(options, COMMAND)
        assert mentions(raised.value.what, 2)
        assert mentions(raised.value.why, "raw-2", "no address", "raw-3", "unreachable")
        assert [s for (s,) in table(options.folder.image_table, "status")] == ["ok", "ok", "no address", "unreachable"]
    server.serve("/none", Reply(png(5)))
    repaired = shop(tmp_path, [*urls[:2], urls[0], urls[3]], "--missing_images", "error")
    assert [s for _, s in fetch(repaired)] == ["ok"] * 4


def test_without_any_image_the_old_list_stays(tmp_path, server):
    options = shop(tmp_path, server.serve_images(1))
    fetch(options)
    before = options.folder.image_table.read_bytes()
    dead = closed_port()
    urls = [*[f"{server.url}/none-{n}" for n in range(3)], server.serve("/page", Reply(HTML)), f"{dead}/a.png"]
    with refused(ResourceError, options.folder.images) as raised:
        fetch_images(shop(tmp_path, urls), COMMAND)
    assert mentions(raised.value.what, 5)
    assert mentions(raised.value.why, 3, "unreachable", 404, f"{server.url}/none-0", 1, "not an image", repr(HTML[:20]),
                    os.strerror(errno.ECONNREFUSED), f"{dead}/a.png")
    assert options.folder.image_table.read_bytes() == before


def test_items_without_any_address_are_an_error(tmp_path):
    options = shop(tmp_path, [None, None])
    with refused(DataError, options.folder.items, fix=["--source"]):
        fetch_images(options, COMMAND)


def test_without_pillow_nothing_is_requested(tmp_path, server, monkeypatch):
    monkeypatch.setattr(image_decoding, "find_spec", lambda name: None)
    with refused(ConfigError, "pillow", fix=["pip install -r requirements-images.txt"]):
        fetch_images(shop(tmp_path, server.serve_images(1)), COMMAND)
    assert server.paths() == []


def test_a_second_process_is_refused(tmp_path, server):
    options = shop(tmp_path, server.serve_images(1))
    with FolderLock(options.folder.images), refused(LockedError, options.folder.images, names=[os.getpid()]):
        fetch_images(options, COMMAND)


def test_a_failed_write_leaves_no_partial_file(tmp_path, server, monkeypatch):
    options = shop(tmp_path, server.serve_images(3))

    def full(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patched:
        patched.setattr(images_step.os, "fsync", full)
        with pytest.raises(OSError, match=os.strerror(errno.ENOSPC)):
            fetch_images(options, COMMAND)
    assert images(options) == {}
    assert [s for _, s in fetch(options)] == ["ok"] * 3


def start(options, *flags: str, script: Path = ROOT / "dataloader" / "1_load_figure.sh", cwd: Path = ROOT):
    """Start the real command in a process of its own."""
    return subprocess.Popen(
        ["bash", str(script), "--data_root", str(options.folder.data_root), "--image_rate", "500", *flags], cwd=cwd,
        env={**os.environ, "PYTHON": sys.executable}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def wait_for(options, num_images: int) -> None:
    deadline = time.monotonic() + 60
    # Names only: a temporary file can be renamed before it is read. glob's "*" leaves these hidden files out.
    while (there := len(glob(f"{options.folder.images}/*/*.png"))) < num_images and time.monotonic() < deadline:
        time.sleep(0.01)
    assert there >= num_images


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_the_run_after_a_stop_fetches_only_missing_images(tmp_path, server, number):
    urls = server.serve_images(40)
    options = shop(tmp_path, urls)
    server.seconds = 0.05
    process = start(options)
    wait_for(options, 5)
    server.seconds = 20.0  # later requests hang
    begun = time.monotonic()
    process.send_signal(number)
    _, err = process.communicate(timeout=30)
    assert time.monotonic() - begun < 5
    assert process.returncode == (143 if number == signal.SIGTERM else -signal.SIGKILL)
    assert "Traceback" not in err
    if number == signal.SIGTERM:
        [line] = [line for line in err.splitlines() if line.startswith("error: ")]
        assert "Fix: " in line
    assert not options.folder.image_table.exists()
    there = {name for name in images(options) if ".tmp-" not in name}
    missing = sorted(f"/{n}.png" for n, url in enumerate(urls) if file_name(url) not in there)
    assert 0 < len(missing) <= 35
    server.seconds = 0.0
    server.paths()
    assert [s for _, s in fetch(options)] == ["ok"] * 40
    assert set(server.paths()) == set(missing)  # a request of the dead process may arrive late
    assert images(options) == {file_name(url): png(n) for n, url in enumerate(urls)}


def copied(tmp_path) -> Path:
    """Copy the program to another folder, so that nothing depends on this checkout."""
    target = tmp_path / "a copy"
    for folder in ("common", "dataloader"):
        shutil.copytree(ROOT / folder, target / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for file in [*ROOT.glob("*.sh"), *ROOT.glob("requirements*.txt")]:
        shutil.copy(file, target)
    return target


@pytest.mark.parametrize("where", ["dataloader", "elsewhere"])
def test_the_script_runs_from_any_folder(tmp_path, server, where):
    root = copied(tmp_path)
    options = shop(root, [*server.serve_images(2), None])
    (tmp_path / "elsewhere").mkdir()
    if where == "dataloader":
        process = start(options, script=Path("1_load_figure.sh"), cwd=root / "dataloader")
    else:
        process = start(options, script=root / "dataloader" / "1_load_figure.sh", cwd=tmp_path / "elsewhere")
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    assert any(mentions(line, options.folder.image_table, 3, 2, "ok", 1, "no address") for line in out.splitlines())
    assert any(mentions(line, "raw-2", "no address") for line in out.splitlines())
    assert [s for (s,) in table(options.folder.image_table, "status")] == ["ok", "ok", "no address"]


def test_the_command_fails_with_one_line(tmp_path, server):
    options = shop(tmp_path, [server.url + "/none"])
    process = start(options)
    out, err = process.communicate(timeout=60)
    outcome = Outcome(process.returncode, out, err)
    outcome.check_error(ResourceError, options.folder.images, names=["unreachable", 404, f"{server.url}/none"])
    assert err.count("\n") == 1
