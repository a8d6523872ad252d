"""Quantizers with small sizes, and random items for them."""

import functools
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from common.artifacts import DatasetFolder, ids_sha256
from common.capture import Graphs
from common.config import Config, load_yaml, resolve
from common.publishing import publish
from quantization.evaluate import EvaluationData
from quantization.models import CONFIGS, config_path, find_class
from quantization.trainer import QuantizerTask

WIDTH, NUM_ITEMS = 6, 40
NUM_TRAINED = 200  # items of a training, in batches of 48
SMALL = {
    "hidden_sizes": "[8]", "latent_size": "4", "num_levels": "3", "codebook_size": "4", "kmeans_iterations": "5",
    "iterations": "5", "rotation_iterations": "3", "num_groups": "2", "group_iterations": "3", "num_values": "[3, 2]",
    "batch_size": "16", "eval_batch_size": "7", "epochs": "3", "eval_every": "1", "lr": "0.01", "patience": "null",
    "lr_schedule": "constant", "warmup_steps": "0", "weight_decay": "0.0", "clip_norm": "0.0",
    "commitment_cost": "0.25", "select_by": "loss_total", "select_mode": "min",
}
GUIDE = (Path(__file__).resolve().parents[2] / "docs" / "semantic_ids.md").read_text(encoding="utf-8")
TABLES = re.findall(r"(?:^\|.*\n)+", GUIDE, flags=re.MULTILINE)
[TABLE] = [table for table in TABLES if "\n| `rqvae` |" in table]
# The quantizers in the table of docs/semantic_ids.md keep more rules than the interface requires of a plug-in: they
# state the sizes of their codebooks, return codes (B, L), give an item the same codes in every batch, and check the
# values of their keys.
DOCUMENTED = sorted(name for row in TABLE.splitlines() for name in re.findall(r"`(\w+)`", row.split("|")[1]))
# All quantizers that are trained by gradient descent, with the options that change a training step.
OPTIONS = [*((name, {}) for name in DOCUMENTED), ("rqvae", {"update": "ema"}), ("rqvae", {"distance": "cosine"}),
           ("rqvae", {"gradient": "rotation"}), ("rqvae", {"gradient": "gumbel"}),
           ("rqvae", {"sinkhorn_levels": "[0, -1]"}), ("rqvae", {"standardize": "true"}),
           ("rqvae", {"clip_norm": 0.1, "lr_schedule": "cosine", "warmup_steps": 3}), ("rqvae", {"optimizer": "Adam"}),
           ("letter", {"sinkhorn_levels": "[-1]"}), ("rvq", {"update": "gradient"}), ("vqvae", {"update": "ema"})]
NUM_INDEXED = 512  # items in the `index_file`


@pytest.fixture(scope="session")
def index_file(tmp_path_factory):
    """A file with distinct semantic IDs of the items `raw-0` to `raw-511`: three levels, 8 codes per level."""
    path = tmp_path_factory.mktemp("index") / "index.json"
    path.write_text(json.dumps({f"raw-{item}": [f"<a_{item % 8}>", f"<b_{item // 8 % 8}>", f"<c_{item // 64}>"]
                                for item in range(NUM_INDEXED)}))
    return path


@pytest.fixture(scope="session")
def make_folder(tmp_path_factory):
    """Number of items -> a dataset with only its items, whose raw IDs are `raw-<item>`."""
    root = tmp_path_factory.mktemp("folders")

    def make(num_items: int) -> DatasetFolder:
        folder = DatasetFolder(root, f"Items{num_items}")
        if not folder.items.exists():
            duckdb = pytest.importorskip("duckdb")  # a machine with a GPU may not have it
            items = duckdb.sql(f"SELECT range::INT AS item, 'raw-' || range AS raw_id, '' AS title, '' AS text "
                               f"FROM range({num_items})")
            publish(folder.items, lambda staged: items.write_parquet(str(staged)),
                    {"inputs": {}, "num_items": num_items,
                     "items_sha256": ids_sha256(f"raw-{item}" for item in range(num_items))})
        return folder

    return make


@pytest.fixture(scope="session")
def make_config(index_file):
    """name, key=value, ... -> Config with the small sizes of `SMALL` for the keys in the quantizer's YAML."""
    plain_of = functools.cache(lambda name: resolve(name, config_path(name), CONFIGS / "defaults.yaml", []))

    def make(name: str, **own: object) -> Config:
        sizes, plain = SMALL | {"file": index_file} | own, plain_of(name)
        sections = {"training_params": plain.training_params, "model_params": plain[name]["model_params"],
                    "model_params.codebook": plain[name]["model_params"].get("codebook", {})}
        if plain.origins[f"{name}.training_params.commitment_cost"].startswith(str(CONFIGS / "defaults.yaml")):
            del sizes["commitment_cost"]
        overrides = [(f"{name}.{section}.{key}", str(value)) for section, params in sections.items()
                     for key, value in sizes.items() if key in params and plain.has_key(f"{name}.{section}.{key}")]
        return resolve(name, config_path(name), CONFIGS / "defaults.yaml", overrides)

    return make


@pytest.fixture(scope="session")
def make_model(make_folder):
    """Config -> a seeded model; each input embedding has the width `WIDTH`."""
    def make(config: Config, num_items: int = NUM_ITEMS):
        model_class = find_class(config.name)
        inputs = dict.fromkeys(model_class.embedding_suffixes(config.values, "td"), WIDTH)
        folder = None if inputs else make_folder(num_items)
        torch.manual_seed(0)
        return model_class(config.for_model(num_items=num_items, inputs=inputs, folder=folder),
                           input_size=WIDTH * len(inputs) or 1)

    return make


@pytest.fixture(scope="session")
def make_rqvae(make_config, make_model):
    """key=value, ... -> a small RQVAE; by default with Euclidean distance and an input that is not standardized."""
    def make(num_items: int = NUM_ITEMS, **own: object):
        plain = {"distance": "euclidean", "standardize": "false"}
        return make_model(make_config("rqvae", **plain | own), num_items)

    return make


@pytest.fixture
def make_task(make_config, make_model):
    """name, graphs, device, key=value, ... -> the training of a small quantizer with batches of two sizes."""
    def make(name: str, graphs: Graphs | None = None, device: torch.device | str = "cpu",
             **own: object) -> QuantizerTask:
        config = make_config(name, **{"batch_size": 48, "epochs": 20, "lr": 0.003, "codebook_size": 8} | own)
        torch.manual_seed(0)
        model = make_model(config, NUM_TRAINED)
        if not model.trained_by_gradient():
            pytest.skip("fits in one call")
        width = WIDTH * len(model.embedding_suffixes(model.config, "td"))
        xs = torch.randn(NUM_TRAINED, width, generator=seeded(1)).to(device)
        model.to(device).initialize(xs, seeded())
        return QuantizerTask(model.train(), xs, config.training_params, 0, name, EvaluationData(None, None), graphs)

    return make


def take(task: QuantizerTask, steps: range) -> list[float]:
    """Take the steps, and return their losses. The seed of a step is its number."""
    losses = []
    with task.descent.stream():
        for number in steps:
            torch.manual_seed(number)
            epoch, index = divmod(number, task.num_steps)
            losses.append(task.step(epoch, index)["loss_total"].item())
            if index == task.num_steps - 1:
                task.end_epoch(epoch)
                task.descent.check_addresses()
    return losses


@pytest.fixture
def write(tmp_path):
    """name, content -> its path. The content is bytes, a text, or a value to write as JSON."""
    def write(name: str, content: object):
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else
                         (content if isinstance(content, str) else json.dumps(content)).encode())
        return path

    return write


@pytest.fixture
def xs() -> torch.Tensor:
    """Random items, (40, 6)."""
    return torch.from_numpy(np.random.default_rng(0).normal(size=(NUM_ITEMS, WIDTH)).astype(np.float32))


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def codebook_options(**own: object) -> dict:
    """The defaults of `codebook:`, updated with `own`."""
    return load_yaml(CONFIGS / "defaults.yaml")[0]["codebook"] | own


def numbers(text: str) -> list[str]:
    """The numbers and percentages in a text, in their order."""
    return re.findall(r"(?<!\w)-?\d+(?:\.\d+)?%?", text)


def shown(value: object) -> str:
    """A value of the command line as an error shows it."""
    return repr(yaml.safe_load(str(value)))
