"""What benchmarks/gpu_speed.py measures: the events of a shop, a generator, and a quantizer."""

from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

GENERATOR = {"num_encoder_layers": 4, "num_decoder_layers": 4, "d_model": 128, "d_ff": 1024, "d_kv": 64,
             "num_heads": 6, "dropout": 0.1, "max_history": 20, "encoder_positions": "code",
             "train_on": "every_position", "normalize_over": "codebook", "num_beams": 20}
RQVAE = {"hidden_sizes": [512, 256, 128], "latent_size": 32, "num_levels": 3, "codebook_size": 256,
         "commitment_cost": 0.25, "batch_size": 2048, "eval_every": 500}
# Beauty, 5-core: the number of users with 5, 6, ..., 30 events, and with about 35, 45, ... events.
NUM_USERS = [7162, 4221, 2680, 1811, 1366, 881, 695, 558, 439, 361, 262, 207, 213, 141, 118, 112, 117, 84, 66, 73, 74,
             61, 54, 44, 44, 38]
LONG_USERS = {35: 231, 45: 97, 55: 62, 70: 49, 90: 25, 130: 17}
NUM_ITEMS, CODEBOOK_SIZES = 12_101, [256, 256, 256, 256, 3]


class Data(NamedTuple):
    """The events and the semantic IDs."""

    sequences: Any  # recommendation.dataset.Sequences
    catalogue: Any  # recommendation.models.abstract_model.Catalogue
    origin: str


def load(data_root: Path, device, num_users: int | None) -> Data:
    """Return Beauty with LETTER's IDs. If it is missing or cannot be read, return generated events and IDs."""
    from recommendation.dataset import Sequences
    from recommendation.models.abstract_model import Catalogue

    reason = "generated, in smoke tests" if num_users else missing_beauty(data_root)
    if not reason:
        from common.artifacts import DatasetFolder, load_codes

        folder = DatasetFolder(data_root, "Beauty")
        codes, meta = load_codes(folder, "imported", "td", None)
        return Data(Sequences.load(folder, device),
                    Catalogue(len(codes), torch.from_numpy(codes).long(), meta["codebook_sizes"]), "Beauty")
    item, user, split, codes = generated_shop(num_users)
    return Data(Sequences(item, user, split, device),
                Catalogue(len(codes), torch.from_numpy(codes), CODEBOOK_SIZES), reason)


def missing_beauty(data_root: Path) -> str:
    """Return why Beauty with LETTER's IDs cannot be read, or "" if it can."""
    folder = data_root / "Beauty"
    if find_spec("duckdb") is None:
        return "generated, because DuckDB is not installed"
    if not (folder / "interactions.parquet").exists() or not (folder / "Beauty.codes-imported-td.npy").exists():
        return "generated, because --data_root has no Beauty with imported semantic IDs"
    return ""


def generated_shop(num_users: int | None) -> tuple:
    """Return events and semantic IDs with the sizes of Beauty: item, user and split of each event, and codes (N, 5).

    num_users: keep only this number of users, and fewer items
    """
    rng = np.random.default_rng(0)
    lengths = np.repeat([*range(5, 5 + len(NUM_USERS)), *LONG_USERS], [*NUM_USERS, *LONG_USERS.values()])
    lengths = rng.permutation(lengths)[:num_users]
    num_items = NUM_ITEMS if num_users is None else num_users
    user = np.repeat(np.arange(len(lengths)), lengths)
    item = (num_items * rng.random(len(user)) ** 2).astype(np.int64)  # some items are popular
    to_end = np.repeat(np.cumsum(lengths), lengths) - np.arange(len(user))
    split = np.where(to_end == 1, 2, np.where(to_end == 2, 1, 0)).astype(np.int8)
    codes = np.column_stack([rng.integers(size, size=num_items) for size in CODEBOOK_SIZES])
    assert len(np.unique(codes, axis=0)) == num_items
    return item, user, split, codes


def generator_config(keys: dict):
    """Return the configuration of the generator. `keys` replace the values of `GENERATOR`."""
    from common.config import resolve
    from recommendation.models import DEFAULTS, config_path

    keys = {**GENERATOR, "lr_schedule": "constant", "warmup_steps": 100, "patience": "null", **keys}
    return resolve("encoder_decoder", config_path("encoder_decoder"), DEFAULTS,
                   [(key, str(value)) for key, value in keys.items()])


def generator(config, data: Data):
    """Return an untrained generator on the device of the data."""
    from recommendation.models import find_class

    torch.manual_seed(0)
    model = find_class("encoder_decoder")(config.for_model(), data.catalogue)
    return model.to(data.sequences.device_items.device)


def generator_task(data: Data, keys: dict, graphs):
    """Return the training of a generator."""
    from recommendation.trainer import RecommenderTask

    config = generator_config(keys)
    return RecommenderTask(generator(config, data).train(), data.sequences, config.training_params, 0, config.name,
                           graphs)


def empty_task(data: Data, epochs: int):
    """Return a training whose steps do nothing."""
    from recommendation.models.abstract_model import AbstractRecommender, Catalogue
    from recommendation.trainer import RecommenderTask

    class Nothing(AbstractRecommender):
        training_unit = "sequence"

        def __init__(self):
            super().__init__({}, Catalogue(5, None, []))
            self.register_buffer("loss", torch.zeros(()))

        def recommend(self, histories, top_k):
            raise NotImplementedError

        def compute_loss(self, windows):
            return {"loss_total": self.loss}

    class Task(RecommenderTask):
        def evaluate(self):
            return {"ndcg@10": 1.0}

    params = generator_config({"epochs": epochs, "eval_every": epochs, "batch_size": 256, "max_steps": "null",
                               "checkpoint_seconds": 3600}).training_params
    return Task(Nothing(), data.sequences, params, 0, "nothing")


def quantizer_task(xs: np.ndarray, device: torch.device, keys: dict):
    """Return the training of an RQ-VAE that is initialized, but not trained."""
    from common.config import resolve
    from quantization.evaluate import EvaluationData
    from quantization.models import CONFIGS, config_path, find_class
    from quantization.trainer import QuantizerTask

    config = resolve("rqvae", config_path("rqvae"), CONFIGS / "defaults.yaml",
                     [(key, str(value)) for key, value in {**RQVAE, **keys}.items()])
    torch.manual_seed(0)
    model = find_class("rqvae")(config.for_model(num_items=len(xs), inputs={"td": xs.shape[1]}, folder=None),
                                xs.shape[1]).to(device)
    rows = torch.from_numpy(xs).to(device)
    model.initialize(rows, torch.Generator().manual_seed(0))
    return QuantizerTask(model, rows, config.training_params, 0, "rqvae", EvaluationData(xs, None))
