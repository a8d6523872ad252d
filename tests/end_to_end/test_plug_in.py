"""The seed guide's own example, filled in, dropped into a copy of the tree."""

import json

MODEL = '''
from .abstract_vq import AbstractVQ
import torch
import torch.nn.functional as F
from torch import nn

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


def add_plug_in(tree, model=MODEL, config=CONFIG):
    (tree.root / "quantization/models/vqvae.py").write_text(model)
    (tree.root / "quantization/configs/vqvae_config.yaml").write_text(config, encoding="utf-8")


def test_the_guides_example_runs_as_it_stands_and_gets_collisions_resolved(baby):
    add_plug_in(baby)
    outcome = baby.command("python", "quantization/main.py", "--model_name=vqvae", "--dataset_name=Baby",
                           "--embedding_suffix=td", "--epochs=30", CUDA_VISIBLE_DEVICES="")
    assert outcome.code == 0, outcome.err
    assert "cuda:0, which is not there: running on the CPU" in outcome.err
    meta = json.loads(baby.data("Baby.codes-vqvae-td.npy.meta.json").read_text())
    assert meta["collision_rate_after"] == 0
    assert meta["collision_rate_before"] > 0
    assert meta["disambiguation_level"] == 1


def test_a_plug_ins_codes_train_a_recommender(baby):
    add_plug_in(baby)
    assert baby.command("python", "quantization/main.py", "--model_name", "vqvae", "--epochs", "3").code == 0
    outcome = baby.command("python", "recommendation/main.py", "--quantizer_name", "vqvae", "--epochs", "1")
    assert outcome.code == 0, outcome.err
    assert (baby.root / "runs/recommendation/Baby/encoder_decoder/vqvae-td/latest").exists()


def test_a_model_key_that_nobody_reads_is_an_error_before_training(baby):
    add_plug_in(baby, config=CONFIG.replace("hidden_size: 512", "hidden_size: 512\n    hiden_sizes: 3"))
    outcome = baby.command("python", "quantization/main.py", "--model_name", "vqvae")
    assert outcome.code == 2
    assert "vqvae_config.yaml:10" in outcome.err
    assert "hiden_sizes is read by nobody" in outcome.err
    assert not (baby.root / "runs").exists()


def test_codes_that_break_the_contract_are_named(baby):
    add_plug_in(baby, model=MODEL.replace("return torch.cdist(self.encoder(xs), self.codebook.weight).argmin(dim=1)",
                                          "return self.encoder(xs)"))
    outcome = baby.command("python", "quantization/main.py", "--model_name", "vqvae", "--epochs", "1", "--eval_every", "1")
    assert outcome.code == 2
    assert "VQVAE.get_codes" in outcome.err
