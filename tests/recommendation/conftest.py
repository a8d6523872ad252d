"""A catalogue with semantic IDs, users' sequences, and recommenders with small sizes."""

import itertools
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import numpy as np
import pytest
import torch

from common.artifacts import DatasetFolder
from common.capture import Graphs
from common.config import Config
from common.table_files import SPLITS
from recommendation.counting.neighbours import neighbours_of_vectors
from recommendation.dataset import Sequences
from recommendation.inputs import Choice
from recommendation.models import DEFAULTS, config_path, find_class, names
from recommendation.models.abstract_model import PADDING, Catalogue, ItemNeighbours, Teacher, Windows
from recommendation.pipeline import Pipeline
from recommendation.trainer import RecommenderTask
from tests.small import small_config

NUM_ITEMS, SIZES = 30, [4, 5, 3]
SMALL = {
    "num_encoder_layers": "2", "num_decoder_layers": "2", "num_layers": "2",
    "d_model": "16", "d_ff": "24", "d_kv": "4", "num_heads": "2",
    "dropout": "0.0", "num_buckets": "8", "max_distance": "16", "train_on": "target", "num_beams": "10",
    "normalize_over": "codebook", "encoder_positions": "code",
    "pair_distance": "3", "distance_decay": "0.8", "backward": "0.3", "source_exponent": "0.5",
    "popularity_exponent": "0.1", "neighbour_weight": "0.5", "num_newest": "4", "recency": "0.6",
    "batch_size": "16", "epochs": "2", "lr": "0.01", "lr_schedule": "constant", "warmup_steps": "0",
    "max_history": "5", "eval_batch_size": "7", "label_smoothing": "0.0", "patience": "null", "prior": "none",
}


def random_codes(num_items: int, sizes: list[int], seed: int = 0) -> torch.Tensor:
    """Return distinct semantic IDs (N, L), drawn at random from all possible IDs."""
    numbers = np.random.default_rng(seed).permutation(int(np.prod(sizes)))[:num_items]
    return torch.from_numpy(np.stack(np.unravel_index(numbers, sizes), axis=1))


def leave_one_out(histories: list[list[int]]) -> Sequences:
    """Split the histories: the last item of a user is a test event, and the item before it is a validation event.

    Users with fewer than three items have only training events.
    """
    split = [([0] * (len(items) - 2) + [1, 2]) if len(items) > 2 else [0] * len(items) for items in histories]
    assert SPLITS == ("train", "valid", "test")
    user = np.repeat(np.arange(len(histories)), [len(items) for items in histories])
    return Sequences(np.array(sum(histories, []), dtype=np.int64), user, np.array(sum(split, []), dtype=np.int8))


def windows_of(*rows: list[int], width: int = 0) -> Windows:
    """Rows of items, padded at the end to the longest row or to `width`."""
    width = max(width, *map(len, rows))
    return Windows(torch.tensor([row + [PADDING] * (width - len(row)) for row in rows]),
                   torch.tensor([len(row) for row in rows]))


def catalogue_for(model_class, of: Catalogue) -> Catalogue:
    """The parts of a catalogue that a model uses. Items with similar indices are neighbours."""
    angle = np.arange(of.num_items) / of.num_items
    found = neighbours_of_vectors(np.stack([np.cos(angle), np.sin(angle)], axis=1))
    neighbours = {"td": ItemNeighbours(*map(torch.from_numpy, found))} if model_class.needs_neighbours else None
    return of._replace(neighbours=neighbours) if model_class.needs_codes else Catalogue(of.num_items, None, [],
                                                                                        neighbours)


def padded(*rows: list[int]) -> torch.Tensor:
    """Rows of items (B, S), padded at the end."""
    width = max(1, *map(len, rows))
    return torch.tensor([row + [PADDING] * (width - len(row)) for row in rows])


@pytest.fixture
def catalogue() -> Catalogue:
    return Catalogue(NUM_ITEMS, random_codes(NUM_ITEMS, SIZES), SIZES)


@pytest.fixture
def sequences() -> Sequences:
    """Twenty users with 1 to 12 of the catalogue's items."""
    rng = np.random.default_rng(0)
    return leave_one_out([rng.integers(NUM_ITEMS, size=size).tolist() for size in rng.integers(1, 13, size=20)])


@pytest.fixture
def make_config():
    """name, key=value, ... -> Config with the values of `SMALL` for the keys that the recommender uses."""
    def make(name: str, **own: object) -> Config:
        return small_config(name, config_path(name), DEFAULTS, SMALL | own)

    return make


@pytest.fixture
def make_model(make_config, catalogue):
    """name, key=value, ... -> a seeded recommender for the catalogue."""
    def make(name: str, of: Catalogue = catalogue, **own: object):
        model_class = find_class(name)
        torch.manual_seed(0)
        return model_class(make_config(name, **own).for_model(), catalogue_for(model_class, of))

    return make


class Trained(NamedTuple):
    """A dataset with a finished run."""

    folder: DatasetFolder
    run_root: Path
    run: Path

    def argv(self, *words: str) -> list[str]:
        """The arguments of a command that reads the dataset."""
        return [f"--dataset={self.folder.name}", f"--data_root={self.folder.data_root}", f"--run_root={self.run_root}",
                *words]


@pytest.fixture
def train(tmp_path, make_config):
    """name, histories, key=value, ... -> a dataset with these histories and a finished run."""
    from .test_pipeline import HISTORIES, write_data  # it imports this file

    def run(name: str, histories: list[list[int]] = HISTORIES, *, force: bool = False, **own: object) -> Trained:
        folder, run_root = write_data(tmp_path, histories), tmp_path / "runs"
        config = make_config(name, epochs=1, **{"top_k": 20} | own)
        pipeline = Pipeline(config, folder, Choice(name), run_root, "the training command")
        pipeline.execute(force)
        return Trained(folder, run_root, pipeline.run.folder)

    return run


@pytest.fixture
def shop(tmp_path, make_config):
    """A dataset, the folder of its runs, and `pipeline(name, key=value)`."""
    from .test_pipeline import HISTORIES, write_data  # it imports this file

    folder, run_root = write_data(tmp_path, HISTORIES), tmp_path / "runs"

    def pipeline(name: str, **own: object) -> Pipeline:
        return Pipeline(make_config(name, **own), folder, Choice(name), run_root, f"python main.py {name}")

    return folder, run_root, pipeline


# All pairs of a model and a loss. Models that can normalize over the valid items have two losses.
LOSSES = [*((name, "codebook") for name in names()),
          *((name, "valid_items") for name in ("encoder_decoder", "decoder_only", "encoder_retrieve"))]
# All models that are trained by gradient descent, with the options that change a training step.
OPTIONS = [*((name, {"normalize_over": over}) for name, over in LOSSES),
           ("encoder_decoder", {"train_on": "every_position"}),
           ("encoder_decoder", {"train_on": "every_position", "label_smoothing": 0.1}),
           ("encoder_decoder", {"train_on": "every_position", "normalize_over": "valid_items", "label_smoothing": 0.1}),
           ("encoder_decoder", {"encoder_positions": "item"}),
           ("encoder_decoder", {"encoder_positions": "item", "train_on": "every_position"}),
           ("decoder_only", {"label_smoothing": 0.1}), ("sasrec", {"label_smoothing": 0.1}),
           ("encoder_retrieve", {"label_smoothing": 0.1}),
           ("encoder_retrieve", {"normalize_over": "valid_items", "label_smoothing": 0.1}),
           ("decoder_only", {"optimizer": "Adam", "clip_norm": 0.0, "lr_schedule": "cosine", "warmup_steps": 5})]
GENERATORS = {"target": ("encoder_decoder", {"train_on": "target"}),
              "every_position": ("encoder_decoder", {"train_on": "every_position"}),
              "target, by item": ("encoder_decoder", {"train_on": "target", "encoder_positions": "item"}),
              "every_position, by item": ("encoder_decoder", {"train_on": "every_position",
                                                              "encoder_positions": "item"}),
              "decoder_only": ("decoder_only", {})}


@pytest.fixture
def make_task(make_config, make_model, sequences):
    """name, graphs, device, teacher, key=value, ... -> the training of a small recommender with dropout."""
    def make(name: str, graphs: Graphs | None = None, device: torch.device | str = "cpu",
             teacher: Teacher | None = None, **own: object) -> RecommenderTask:
        own = {"dropout": 0.2, "epochs": 20, "lr": 0.003} | own
        model = make_model(name, **own).to(device).train()
        data = Sequences(sequences.item, sequences.user, sequences.split, device)
        if model.fit(data.training_sequences(), data.validation_events()):
            pytest.skip("fits in one call")
        return RecommenderTask(model, data, make_config(name, **own).training_params, 0, name, graphs, teacher)

    return make


def take(task: RecommenderTask, steps: range) -> list[float]:
    """Take the steps, and return their losses. The seed of a step is its number."""
    losses = []
    with task.descent.stream():
        for number in steps:
            torch.manual_seed(number)
            losses.append(task.step(*divmod(number, task.num_steps))["loss_total"].item())
    return losses


@pytest.fixture(params=GENERATORS)
def model(request, make_model):
    """A generator in evaluation mode, with biases large enough to matter."""
    name, own = GENERATORS[request.param]
    model = make_model(name, **own).eval()
    randomize(model)
    return model


@pytest.fixture(params=itertools.product(["every_position", "every_position, by item", "decoder_only"],
                                         ["codebook", "valid_items"]), ids="-".join)
def everywhere(request, make_model):
    """A generator whose targets are all items of a window except the first, with each of the two normalizations."""
    generator, normalize_over = request.param
    name, own = GENERATORS[generator]
    model = make_model(name, **own, normalize_over=normalize_over).eval()
    randomize(model)
    return model


@torch.no_grad()
def randomize(model: torch.nn.Module) -> None:
    """Set norms to other values than one, and position biases to values as large as the other scores."""
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if "norm" in name:
            parameter.copy_(0.5 + torch.rand(parameter.shape, generator=generator))
        elif "bias" in name:
            parameter.copy_(torch.randn(parameter.shape, generator=generator))


def logits_of(model, windows) -> list[torch.Tensor]:
    """For each level, return the logits (P, C) that `compute_loss` computes for the P targets, without padding."""
    found: list[torch.Tensor] = []
    with mock.patch.object(model, "logits", lambda hidden: found.append(type(model).logits(model, hidden)) or found[0]):
        model.compute_loss(windows)
    num_rows, sizes = len(windows.items), model.catalogue.codebook_sizes
    by_row = found[0].detach().unflatten(1, (-1, num_rows)).transpose(1, 2).flatten(1, 2)
    if model.training_unit == "sequence":
        by_row = by_row[:, windows.items[:, 1:].flatten() != PADDING]
    return [level[:, :size] for level, size in zip(by_row, sizes, strict=True)]


def teacher_forced(model, history: list[int], items: list[int]) -> list[torch.Tensor]:
    """For each level, return the log-probabilities (items, C) of the codes, computed without a cache.

    Each item is the target after the history.
    """
    logits = logits_of(model, windows_of(*([*history, item] for item in items)))
    num_targets = len(logits[0]) // len(items)  # of each row; the last one follows the whole history
    return [level[num_targets - 1::num_targets].log_softmax(dim=-1) for level in logits]
