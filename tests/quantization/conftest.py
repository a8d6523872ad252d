"""Quantizers with small sizes, and random items for them."""

import logging

import numpy as np
import pytest
import torch
from hypothesis import settings

from common.config import Config
from quantization.models import CONFIGS, config_path, find_class
from tests.small import small_config

settings.register_profile("certain", derandomize=True, deadline=None, max_examples=50)
settings.load_profile("certain")

WIDTH, NUM_ITEMS = 6, 40
SMALL = {
    "hidden_sizes": "[8]", "latent_size": "4", "num_levels": "3", "codebook_size": "4", "kmeans_iterations": "5",
    "batch_size": "16", "eval_batch_size": "7", "epochs": "3", "eval_every": "1", "lr": "0.01", "patience": "null",
    "lr_schedule": "constant", "warmup_steps": "0", "weight_decay": "0.0", "clip_norm": "0.0",
    "commitment_cost": "0.25", "select_by": "loss_total", "select_mode": "min",
}


@pytest.fixture
def make_config():
    """name, key=value, ... -> Config, small wherever the quantizer's YAML has a key of `SMALL`."""
    def make(name: str, **own: object) -> Config:
        return small_config(name, config_path(name), CONFIGS / "defaults.yaml", SMALL | own)

    return make


@pytest.fixture
def make_model():
    """Config -> its seeded model; each embedding that it reads is `WIDTH` wide."""
    def make(config: Config, num_items: int = NUM_ITEMS):
        model_class = find_class(config.name)
        inputs = dict.fromkeys(model_class.embedding_suffixes(config.values, "td"), WIDTH)
        torch.manual_seed(0)
        return model_class(config.for_model(num_items=num_items, inputs=inputs), input_size=WIDTH * len(inputs))

    return make


@pytest.fixture
def make_rqvae(make_config, make_model):
    """key=value, ... -> a small RQVAE."""
    def make(num_items: int = NUM_ITEMS, **own: object):
        return make_model(make_config("rqvae", **own), num_items)

    return make


@pytest.fixture
def xs() -> torch.Tensor:
    """(40, 6)"""
    return torch.from_numpy(np.random.default_rng(0).normal(size=(NUM_ITEMS, WIDTH)).astype(np.float32))


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


@pytest.fixture
def close_logs():
    """A run's log file leaves the root logger with the test."""
    before = list(logging.getLogger().handlers)
    yield
    for handler in set(logging.getLogger().handlers) - set(before):
        logging.getLogger().removeHandler(handler)
        handler.close()
