"""Steps 3 and 4 with torchrun: two processes publish the same bytes as one, and report an error once."""

import random
import shutil
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest

from common.cli import command_line
from common.errors import DataError
from dataloader import image_embedding, text_embedding
from dataloader.embeddings.cache import text_keys
from dataloader.images import load_image_table
from tests.dataloader.dataset import write_dataset
from tests.dataloader.helpers import make_options
from tests.dataloader.image_server import ImageServer, png
from tests.dataloader.image_shop import shop
from tests.dataloader.tiny_clip import write_clip
from tests.dataloader.tiny_model import WORDS, save_tiny_model
from tests.end_to_end.conftest import ROOT
from tests.end_to_end.torchrun import in_two_processes
from tests.text import lines_with

NUM_TEXTS, NUM_IMAGES = 3100, 530  # four shards of at most 1024 texts, and three shards of at most 256 images

class Step(NamedTuple):
    """A step, and the folder `alone` in which one process has made its embedding."""

    alone: Path
    script: str
    flags: list[str]

    @property
    def words(self) -> list[str]:
        return [str(ROOT / "dataloader" / self.script), *self.flags]

    def copy(self, folder: Path) -> Path:
        """Copy the dataset without its embedding and without the cached vectors."""
        ignored = shutil.ignore_patterns("Baby.*.npy*", "*.safetensors")
        return shutil.copytree(self.alone, folder / "copy", ignore=ignored)

    def check_same_bytes(self, folder: Path) -> None:
        ours, theirs = published(folder), published(self.alone)
        assert ours.keys() == theirs.keys()
        assert [name for name in ours if ours[name].read_bytes() != theirs[name].read_bytes()] == []


def published(folder: Path) -> dict[str, Path]:
    """Return the files of the embedding: name -> path."""
    return {path.name: path for path in (folder / "data" / "Baby").glob("Baby.*.npy*")}


def cached(folder: Path) -> list[Path]:
    return sorted((folder / "data" / ".embeddings").rglob("*.safetensors"))


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Step:
    alone, rng = tmp_path_factory.mktemp("text") / "alone", random.Random(0)
    model = save_tiny_model(tmp_path_factory.mktemp("model"))
    texts = [" ".join(rng.choices(WORDS, k=rng.randint(1, 9)) + [str(number)]) for number in range(NUM_TEXTS)]
    flags = ["--data_root=data", f"--text_model={model}", "--device=cpu"]
    options = write_dataset(alone / "data", texts, *flags[1:]).text
    text_embedding.embed(options, command_line("bash dataloader/3_get_text_emb.sh", flags))
    assert len(cached(alone)) == 4
    return Step(alone, "text_embedding.py", flags)


@pytest.fixture(scope="module")
def image(tmp_path_factory) -> Step:
    alone, model = tmp_path_factory.mktemp("image") / "alone", write_clip(tmp_path_factory.mktemp("models") / "clip")
    flags = ["--data_root=data", f"--image_model={model}", "--device=cpu"]
    server = ImageServer()
    options = shop(alone, server, model, [None, *(png(number) for number in range(NUM_IMAGES))])
    server.close()
    image_embedding.embed(options, command_line("bash dataloader/4_get_image_emb.sh", flags))
    assert len(cached(alone)) == 3
    assert len(published(alone)) == 4  # with the mask
    return Step(alone, "image_embedding.py", flags)


def test_two_processes_continue_like_one(text, tmp_path):
    folder, [kept, *_] = text.copy(tmp_path), cached(text.alone)
    shutil.copyfile(kept, folder / kept.relative_to(text.alone))  # as if a run had been stopped after its first shard
    done = in_two_processes(text.words, folder)
    assert done.returncode == 0, done.stderr
    assert len(lines_with(done.stdout, NUM_TEXTS)) == 2  # texts to encode, and vectors: only one process reports
    text.check_same_bytes(folder)
    assert len(cached(folder)) == 4


def test_a_bad_image_of_one_process_is_one_error(image, tmp_path):
    folder = image.copy(tmp_path)
    table = load_image_table(make_options(folder / "data").folder)
    hashes = table.sha256[table.present]
    second = np.argsort(text_keys(hashes))[256 + 7]  # the second shard, which is encoded by the second process
    raw_id, file = (column[table.present][second] for column in (table.raw_id, table.file))
    path = folder / "data" / "Baby" / "images" / file
    content = path.read_bytes()
    path.write_bytes(b"no image")
    done = in_two_processes(image.words, folder)
    assert done.returncode != 0
    [error] = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert f"item {raw_id}" in error
    assert lines_with(done.stderr, f"exitcode: {DataError.exit_code}")
    assert published(folder) == {}
    assert len(cached(folder)) == 1  # the shard of the first process is kept
    path.write_bytes(content)
    options = make_options(folder / "data", *image.flags[1:]).image
    image_embedding.embed(options, command_line("bash dataloader/4_get_image_emb.sh", image.flags))
    image.check_same_bytes(folder)
    assert len(cached(folder)) == 3
