"""A copy of the program, a generated dataset served from localhost, and the real commands as subprocesses."""

import functools
import gzip
import http.server
import json
import os
import random
import shutil
import subprocess
import sys
import threading
from pathlib import Path
from typing import NamedTuple

import pytest

from common.lock import FolderLock
from tests.errors import Outcome

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = ("common", "dataloader", "quantization", "recommendation")
NUM_USERS, NUM_ITEMS = 150, 130
NUM_KEPT = 128  # items with five events or more


class Tree(NamedTuple):
    """A copy of the program, with its data and runs inside."""

    root: Path

    def command(self, *words: str, cwd: Path | None = None, **environment: str) -> Outcome:
        done = subprocess.run(words, cwd=cwd or self.root, env=self.environment(**environment), capture_output=True,
                              text=True, timeout=400, check=False)
        return Outcome(done.returncode, done.stdout, done.stderr)

    def start(self, *words: str, **environment: str) -> subprocess.Popen:
        return subprocess.Popen(words, cwd=self.root, env=self.environment(**environment), stdout=subprocess.PIPE,
                                stderr=subprocess.PIPE, text=True)

    def environment(self, **extra: str) -> dict[str, str]:
        path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
        base = {key: value for key, value in os.environ.items() if key not in ("PYTHON", "PYTHONPATH")}
        return {**base, "PATH": path, **extra}

    def data(self, name: str) -> Path:
        return self.root / "data" / "Baby" / name

    def written(self) -> dict[Path, int]:
        """Return the time of the last write of every data file and of the files of finished runs.

        If a command reuses a file, this time does not change.
        """
        runs = self.root / "runs"
        files = [*(self.root / "data").rglob("*"), *runs.rglob("finished.json"), *runs.rglob("*.safetensors")]
        return {path: path.stat().st_mtime_ns for path in files if path.is_file()}


def copy_program(target: Path) -> Tree:
    for folder in FOLDERS:
        shutil.copytree(ROOT / folder, target / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for file in (*ROOT.glob("*.sh"), *ROOT.glob("*.txt"), *ROOT.glob("*.py"), *ROOT.glob("*.toml")):
        shutil.copy(file, target)
    return Tree(target)


def write_baby(folder: Path) -> None:
    """Write reviews and metadata in the format of Amazon 2014.

    The next item of a user is close to the previous one, so that models can learn.
    """
    rng = random.Random(7)
    kinds = ("bottle", "stroller", "blanket", "monitor", "toy", "bib", "crib", "seat")
    colours = ("red", "blue", "green", "white", "grey")
    with gzip.open(folder / "meta_Baby.json.gz", "wt", encoding="utf-8") as file:
        for item in range(NUM_ITEMS):
            kind, colour = kinds[item * len(kinds) // NUM_ITEMS], colours[item % len(colours)]
            record = {"asin": f"{item:010d}", "title": f"{colour.title()} {kind} No. {item} <b>'new'</b>",
                      "description": f"A {colour} {kind} for your baby &amp; you, size {item % 7}.",
                      "price": 9.5, "categories": [["Baby", kind]], "imUrl": "http://127.0.0.1/none.jpg"}
            file.write(repr(record) + "\n")
    with gzip.open(folder / "reviews_Baby_5.json.gz", "wt", encoding="utf-8") as file:
        for user in range(NUM_USERS):
            item = rng.randrange(NUM_ITEMS)
            for step in range(rng.randrange(6, 14)):
                file.write(json.dumps({"reviewerID": f"A{user:05d}", "asin": f"{item:010d}", "overall": 5.0,
                                       "unixReviewTime": 1_400_000_000 + 86_400 * step}) + "\n")
                item = (item + rng.choice((1, 1, 2, 5))) % NUM_ITEMS


@pytest.fixture(scope="session")
def mirror(tmp_path_factory):
    """The address of a local server with Baby's two files."""
    folder = tmp_path_factory.mktemp("served")
    write_baby(folder)

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=folder))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


def shorten_training(config: Path) -> None:
    """Set fewer epochs and less frequent validation. With so few users, validation takes most of the time."""
    text = config.read_text()
    assert "    epochs: 60\n" in text
    config.write_text(text.replace("    epochs: 60\n", "    epochs: 12\n    eval_every: 4\n"))


@pytest.fixture(scope="session")
def whole_run(tmp_path_factory, worker_id, mirror) -> tuple[Tree, Outcome]:
    """The first command of a user, in a fresh copy of the program, with a short training. It runs only once.

    All test processes share the copy and the outcome.
    """
    folder = tmp_path_factory.getbasetemp()
    folder = (folder if worker_id == "master" else folder.parent) / "whole run"
    tree, ended = Tree(folder / "program"), folder / "outcome.json"
    with FolderLock(folder, wait=True):
        if not ended.exists():
            copy_program(tree.root)
            shorten_training(tree.root / "recommendation/models/encoder_decoder/config.yaml")
            models = ROOT / "data" / ".models"
            if models.exists():  # the text model, which is then not downloaded again
                shutil.copytree(models, tree.root / "data" / ".models")
            outcome = tree.command("bash", "run_pipeline.sh", "--dataset", "Baby", "--mirror", mirror)
            ended.write_text(json.dumps(outcome))
    return tree, Outcome(*json.loads(ended.read_text()))


@pytest.fixture
def baby(whole_run, tmp_path) -> Tree:
    """A copy of the program and its data that a test may change, without semantic IDs and runs."""
    tree, outcome = whole_run
    assert outcome.code == 0, outcome.err
    copy = copy_program(tmp_path / "copy of the program")
    shutil.copytree(tree.root / "data", copy.root / "data",
                    ignore=shutil.ignore_patterns("*.codes-*", ".models", "raw"))
    return copy
