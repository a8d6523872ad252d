"""Models added to a copy of the program: the examples of docs/extending.md and of the specification."""

import json

import numpy as np

from tests.docs import QUANTIZER, QUANTIZER_CONFIG, RECOMMENDER, RECOMMENDER_CONFIG
from tests.end_to_end.conftest import NUM_KEPT
from tests.text import lines_with

# The specification's example of a new quantizer, completed: a direct subclass without sizes, with codes (B,).
MODEL = '''import torch
import torch.nn.functional as F
from torch import nn

from .abstract_vq import AbstractVQ


class VQVAE(AbstractVQ):
    def __init__(self, config: dict, input_size: int):
        super().__init__(config)
        params = config["vqvae"]["model_params"]
        hidden, width = params["hidden_size"], params["embedding_dim"]
        self.encoder = nn.Sequential(nn.Linear(input_size, hidden), nn.ReLU(), nn.Linear(hidden, width))
        self.decoder = nn.Sequential(nn.Linear(width, hidden), nn.ReLU(), nn.Linear(hidden, input_size))
        self.codebook = nn.Embedding(params["num_embeddings"], width)
        self.commitment_cost = config["vqvae"]["training_params"]["commitment_cost"]

    def forward(self, xs):
        latent = self.encoder(xs)
        codes = torch.cdist(latent, self.codebook.weight).argmin(dim=1)
        codeword = self.codebook(codes)
        vq_loss = F.mse_loss(codeword, latent.detach()) + self.commitment_cost * F.mse_loss(latent, codeword.detach())
        reconstruction = self.decoder(latent + (codeword - latent).detach())
        return reconstruction, vq_loss, codes

    def get_codes(self, xs):
        return torch.cdist(self.encoder(xs), self.codebook.weight).argmin(dim=1)

    def compute_loss(self, forward_outputs, original_xs):
        reconstruction, vq_loss, _ = forward_outputs
        recon_loss = F.mse_loss(reconstruction, original_xs)
        return {"loss_total": recon_loss + vq_loss, "recon_loss": recon_loss}
'''

CONFIG = """
# 通用设置
common:
  device: 'cuda:0'

vqvae:
  model_params:
    hidden_size: 512
    num_embeddings: 4096
    embedding_dim: 256

  training_params:
    batch_size: 512
    epochs: 1000
    lr: 0.001
    optimizer: "AdamW"
    commitment_cost: 0.25
"""


def test_the_quantizer_of_the_page_uses_its_codes(baby):
    (baby.root / "quantization/models/plainvq.py").write_text(QUANTIZER)
    (baby.root / "quantization/configs/plainvq_config.yaml").write_text(QUANTIZER_CONFIG)
    outcome = baby.command("python", "quantization/main.py", "--model_name=plainvq", "--dataset_name=Baby")
    assert outcome.code == 0, outcome.err
    meta = json.loads(baby.data("Baby.codes-plainvq-td.npy.meta.json").read_text())
    assert meta["collapse"] is None
    codes, sizes = np.load(baby.data("Baby.codes-plainvq-td.npy")), meta["codebook_sizes"][:3]
    shares = [len(np.unique(level)) / size for level, size in zip(codes.T[:3], sizes, strict=True)]
    assert min(shares) > 0.5  # common.min_utilization
    assert len(np.unique(codes[:, :3], axis=0)) > 0.5 * NUM_KEPT


def test_the_specifications_example_runs_and_its_collisions_are_resolved(baby):
    (baby.root / "quantization/models/vqvae.py").write_text(MODEL)
    config = baby.root / "quantization/configs/vqvae_config.yaml"
    config.write_text(CONFIG, encoding="utf-8")
    outcome = baby.command("python", "quantization/main.py", "--model_name=vqvae", "--dataset_name=Baby",
                           "--embedding_suffix=td", "--epochs=9", CUDA_VISIBLE_DEVICES="")
    assert outcome.code == 0, outcome.err
    assert lines_with(outcome.err, f"{config}:4", "cuda:0")  # the CPU is used instead
    meta = json.loads(baby.data("Baby.codes-vqvae-td.npy.meta.json").read_text())
    assert meta["collision_rate_after"] == 0
    assert meta["collision_rate_before"] > 0
    assert meta["disambiguation_level"] == 1


def test_the_recommender_of_the_page_gives_all_users_the_same(baby):
    folder = baby.root / "recommendation/models/recently_popular"
    folder.mkdir(exist_ok=True)  # the checkout may have this model as well
    (folder / "model.py").write_text(RECOMMENDER)
    (folder / "config.yaml").write_text(RECOMMENDER_CONFIG)
    outcome = baby.command("python", "recommendation/main.py", "--model=recently_popular")
    assert outcome.code == 0, outcome.err
    [predicted] = baby.root.glob("runs/recommendation/Baby/recently_popular/no-codes/*/predictions.jsonl")
    lines = [json.loads(line) for line in predicted.read_text().splitlines()]
    assert len({tuple(line["items"]) for line in lines}) == 1
    assert len({tuple(line["unseen"]) for line in lines}) > 1  # without the items of the history
