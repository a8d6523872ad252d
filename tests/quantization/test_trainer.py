"""The trainer from embeddings to the published artifact."""

import json

import numpy as np
import pytest
import torch

from common.artifacts import DatasetFolder, load_codes, publish
from common.checkpoint import Checkpoints
from common.config import resolve
from common.run import Run
from quantization.dataset import Embeddings
from quantization.models import CONFIGS
from quantization.models.abstract_vq import AbstractVQ
from quantization.trainer import Trainer

from .conftest import NUM_ITEMS, WIDTH


class Signs(AbstractVQ):
    """Fits in one call: a level for each column, 1 where it lies above the column's median."""

    def __init__(self, config, input_size):
        super().__init__(config)
        self.register_buffer("medians", torch.zeros(input_size))

    def fit(self, xs, generator):
        self.medians = xs.median(dim=0).values
        return True

    def forward(self, xs):
        return xs, xs.new_zeros(()), self.get_codes(xs)

    def get_codes(self, xs):
        assert not self.training
        return (xs > self.medians).long()

    def compute_loss(self, forward_outputs, original_xs):
        return {"loss_total": forward_outputs[1]}


class Atomic(Signs):
    """Reads no embedding: neighbours by number share a code, and disambiguation does the rest."""

    @classmethod
    def embedding_suffixes(cls, config, suffix):
        return []

    @property
    def codebook_sizes(self):
        return [NUM_ITEMS // 2 + 1]

    def get_codes(self, xs):
        return xs // 2


@pytest.fixture
def folder(tmp_path) -> DatasetFolder:
    folder = DatasetFolder(tmp_path / "data", "Tiny")
    publish(folder.items, lambda path: path.write_bytes(b"items"),
            {"inputs": {}, "num_items": NUM_ITEMS, "items_sha256": "abc"})
    return folder


def embeddings_of(folder: DatasetFolder, xs: torch.Tensor) -> Embeddings:
    none = Embeddings.load(folder, [])
    return none._replace(xs=xs.numpy(), inputs={"td": xs.shape[1]})


@pytest.fixture
def train(tmp_path, folder, close_logs):
    """model, config, embeddings -> the run, the figures and the meta of what was published as `codes-q-td`."""
    def train(model, config, embeddings, command="a command"):
        run = Run(tmp_path / "runs", config.values, embeddings.hashes, command)
        with run.open(force=False):
            trainer = Trainer(model, embeddings, config, run, torch.device("cpu"))
            figures = trainer.train()
            meta = trainer.publish(folder.codes("q", "td", None), command, {"quantizer": "q"})
        return run, figures, meta

    return train


@pytest.fixture
def plain_config(tmp_path):
    """The config of a quantizer whose YAML has nothing but its name."""
    (tmp_path / "plain.yaml").write_text("plain:\n  training_params:\n    eval_batch_size: 7\n")
    return resolve("plain", tmp_path / "plain.yaml", CONFIGS / "defaults.yaml", [])


def test_a_trained_quantizer_publishes_distinct_codes_with_their_meta(make_config, make_model, train, folder, xs):
    config = make_config("rqvae", num_levels=1, codebook_size=4)
    run, figures, _ = train(make_model(config), config, embeddings_of(folder, xs))
    codes, meta = load_codes(folder, "q", "td", None)  # checks the ranges and that no two are alike
    sizes = np.unique(codes[:, 0], return_counts=True)[1]
    assert codes.dtype == np.int32
    assert codes.shape == (NUM_ITEMS, 2)
    assert meta["codebook_sizes"] == [4, sizes.max()]
    assert meta["disambiguation_level"] == 1
    assert meta["collision_rate_before"] == figures["collision_rate"] == 1 - len(sizes) / NUM_ITEMS
    assert meta["collision_rate_after"] == 0.0
    assert meta["items_sha256"] == "abc"
    assert set(meta["inputs"]) == {"items.parquet"}
    assert (meta["quantizer"], meta["command"]) == ("q", "a command")
    assert len(run.metrics.read_text().splitlines()) == 3  # epochs


def test_codes_that_are_distinct_get_no_extra_level(make_config, make_model, train, folder):
    far_apart = torch.eye(WIDTH)[torch.arange(NUM_ITEMS) % WIDTH] * torch.arange(1, NUM_ITEMS + 1).unsqueeze(1)
    config = make_config("rqvae", codebook_size=NUM_ITEMS, epochs=1, lr=1e-6)
    _, figures, meta = train(make_model(config), config, embeddings_of(folder, far_apart))
    assert figures["collision_rate"] == 0.0
    assert meta["codebook_sizes"] == [NUM_ITEMS] * 3
    assert meta["disambiguation_level"] is None


def test_the_published_codes_are_those_of_the_best_checkpoint(make_config, make_model, train, folder, xs):
    config = make_config("rqvae", epochs=6, lr=0.05, select_mode="max")  # the worst loss is an early one
    run, figures, _ = train(make_model(config), config, embeddings_of(folder, xs))
    checkpoints = Checkpoints(run.checkpoints, run.command)
    best, last = make_model(config).eval(), make_model(config).eval()
    best.load_state_dict(checkpoints.load_best()["model"])
    last.load_state_dict(checkpoints.load_newest()["model"])
    codes, _ = load_codes(folder, "q", "td", None)
    records = [json.loads(line)["metrics"]["loss_total"] for line in run.metrics.read_text().splitlines()]
    assert records.index(max(records)) < 5
    assert figures["loss_total"] == pytest.approx(max(records))
    assert codes[:, :3].tolist() == best.get_codes(xs).tolist() != last.get_codes(xs).tolist()


def test_training_is_a_function_of_the_seed(make_config, make_model, train, folder, xs, tmp_path):
    config = make_config("rqvae")
    _, first, _ = train(make_model(config), config, embeddings_of(folder, xs), "one command")
    codes = load_codes(folder, "q", "td", None)[0]
    (tmp_path / "runs").rename(tmp_path / "other_runs")
    _, second, _ = train(make_model(config), config, embeddings_of(folder, xs), "one command")
    assert first == second
    assert np.array_equal(codes, load_codes(folder, "q", "td", None)[0])


def test_a_run_whose_checkpoints_are_all_damaged_starts_from_the_data_again(make_config, make_model, train, folder, xs,
                                                                           tmp_path):
    config = make_config("rqvae")
    run, first, _ = train(make_model(config), config, embeddings_of(folder, xs))
    for path in run.checkpoints.glob("step-*.safetensors"):
        path.write_bytes(b"\0" * path.stat().st_size)
    _, second, _ = train(make_model(config), config, embeddings_of(folder, xs))
    assert second == first


def test_a_quantizer_that_fits_in_one_call_goes_through_the_trainer(plain_config, train, folder, xs):
    model = Signs(plain_config.for_model(), input_size=WIDTH)
    run, figures, meta = train(model, plain_config, embeddings_of(folder, xs))
    codes, _ = load_codes(folder, "q", "td", None)
    assert codes[:, :WIDTH].tolist() == (xs.numpy() > np.median(np.sort(xs, axis=0)[:-1], axis=0)).astype(int).tolist()
    assert meta["codebook_sizes"][:WIDTH] == [2] * WIDTH  # read off the codes
    assert figures["utilization"] == [1.0] * WIDTH
    assert figures["reconstruction_error"] == 0.0
    assert (run.checkpoints / "best.safetensors").exists()


def test_a_quantizer_that_reads_no_embedding_goes_through_the_trainer(plain_config, train, folder):
    embeddings = Embeddings.load(folder, Atomic.embedding_suffixes({}, "td"))
    _, figures, meta = train(Atomic(plain_config.for_model(), input_size=1), plain_config, embeddings)
    codes, _ = load_codes(folder, "q", "td", None)
    assert codes.tolist() == [[item // 2, item % 2] for item in range(NUM_ITEMS)]
    assert meta["codebook_sizes"] == [NUM_ITEMS // 2 + 1, 2]
    assert figures["largest_bucket"] == 2
