"""Step 4 as a command: stopped and continued, and started in any folder."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from common.artifacts import load_embeddings, load_mask
from common.cli import ROOT
from common.errors import Interrupted
from dataloader.embeddings import clip
from dataloader.image_embedding import embed
from tests.dataloader.dataset import write_dataset
from tests.dataloader.image_server import ImageServer, picture, png
from tests.dataloader.image_shop import COMMAND, count_readings, oracle, shop
from tests.dataloader.processing import prints, version
from tests.dataloader.test_images import copied
from tests.dataloader.tiny_clip import write_clip


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return write_clip(tmp_path_factory.mktemp("models") / "clip")


@pytest.fixture
def server():
    server = ImageServer()
    yield server
    server.close()


# Step 4 with shards of eight images and a pause after each, so that a signal arrives during the work.
SLOW = """
import sys
import time

from common.command import run_command
from dataloader import image_embedding
from dataloader.embeddings import cache as vector_cache
from dataloader.embeddings import clip

clip.SHARD = {"cpu": 8}
write = vector_cache.VectorCache.write
vector_cache.VectorCache.write = lambda *args: (write(*args), time.sleep(0.3))
sys.exit(run_command(image_embedding.main))
"""


@pytest.mark.slow
def test_a_killed_run_continues_and_ends_with_the_same_bytes(tmp_path, server, model, monkeypatch):
    bodies = [png(n) for n in range(60)]
    monkeypatch.setattr(clip, "SHARD", {"cpu": 8})
    straight = shop(tmp_path / "straight", server, model, bodies)
    embed(straight, COMMAND)
    options = shop(tmp_path / "killed", server, model, bodies)
    (tmp_path / "slow.py").write_text(SLOW)
    process = subprocess.Popen(
        [sys.executable, str(tmp_path / "slow.py"), "--data_root", str(options.folder.data_root),
         "--image_model", str(model), "--device", "cpu"],
        env={**os.environ, "PYTHONPATH": str(ROOT)}, stderr=subprocess.PIPE, text=True)
    wait_for_shards(options, 3, process)
    process.kill()
    _, err = process.communicate(timeout=30)
    assert process.returncode == -signal.SIGKILL, err
    check_continues(options, straight, monkeypatch)


@pytest.mark.slow
def test_a_stopped_run_keeps_its_shards_and_continues(tmp_path, server, model, monkeypatch):
    bodies = [png(n) for n in range(60)]
    monkeypatch.setattr(clip, "SHARD", {"cpu": 8})
    straight = shop(tmp_path / "straight", server, model, bodies)
    embed(straight, COMMAND)
    options, network = shop(tmp_path / "stopped", server, model, bodies), clip.ClipEncoder.encode

    def stopped(self, images, done):  # in place of the signal's handler
        if len(shards(options)) == 3:
            raise Interrupted()
        return network(self, images, done)

    monkeypatch.setattr(clip.ClipEncoder, "encode", stopped)
    with pytest.raises(Interrupted):
        embed(options, COMMAND)
    monkeypatch.setattr(clip.ClipEncoder, "encode", network)
    check_continues(options, straight, monkeypatch)


def shards(options) -> list[Path]:
    return list((options.folder.data_root / ".embeddings").rglob("*.safetensors"))


def wait_for_shards(options, number: int, process: subprocess.Popen) -> None:
    deadline = time.monotonic() + 100
    while len(shards(options)) < number and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.01)


def check_continues(options, straight, monkeypatch) -> None:
    """Check that the next run encodes the rest of the 60 images, with the bytes of an undisturbed run."""
    assert not options.folder.embeddings("image").exists()
    num_shards = len(shards(options))
    assert 3 <= num_shards < 8
    read = count_readings(monkeypatch)
    embed(options, COMMAND)
    assert len(read) == 60 - 8 * num_shards
    assert options.folder.embeddings("image").read_bytes() == straight.folder.embeddings("image").read_bytes()


@pytest.mark.slow
def test_both_scripts_run_in_any_folder(tmp_path, server, model):
    root, elsewhere = copied(tmp_path), tmp_path / "elsewhere"
    elsewhere.mkdir()
    urls = [*server.serve_images(3), None, server.url + "/none.png"]
    options = write_dataset(root / "data", [f"text {n}" for n in range(5)], image_urls=urls)
    run_script("1_load_figure.sh", root / "dataloader", "--image_rate", "1000")
    out = run_script("4_get_image_emb.sh", root / "dataloader", "--image_model", str(model))
    assert prints(out, "Baby.emb-image.npy", 5, 12, 2)  # items, dimensions, missing images
    assert load_mask(options.folder, "image").tolist() == [True, True, True, False, False]
    vectors = load_embeddings(options.folder, "image")
    np.testing.assert_allclose(vectors[:3], oracle(model, [picture(n) for n in range(3)]), atol=2e-6)
    server.paths()
    written = version(options.folder.embeddings("image"))
    out = run_script(str(root / "dataloader/1_load_figure.sh"), elsewhere)
    assert prints(out, 3, 4)  # images that were fetched before, images in total
    assert server.paths() == ["/none.png"]
    run_script(str(root / "dataloader/4_get_image_emb.sh"), elsewhere, "--image_model", str(model))
    assert version(options.folder.embeddings("image")) == written
    assert list(elsewhere.iterdir()) == []


def run_script(script: str, cwd: Path, *flags: str) -> str:
    """The stdout of a script. Its stderr has only lines of progress and the warning about missing images."""
    done = subprocess.run(["bash", script, *flags], cwd=cwd, capture_output=True, text=True, timeout=200, check=False,
                          env={**os.environ, "PYTHON": sys.executable, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    expected = re.compile(r"[\w ]+: \d+/\d+ |.*\bimages\.parquet\b")
    assert [line for line in done.stderr.splitlines() if not expected.match(line)] == []
    return done.stdout
