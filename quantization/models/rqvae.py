"""RQ-VAE as in TIGER (Rajput et al. 2023, arXiv 2305.05065)."""

from quantization.codebooks.residual import ResidualQuantizer
from quantization.codebooks.sizes import at_least_one, codebook_size

from .autoencoder import AutoencoderVQ


class RQVAE(AutoencoderVQ):
    """An autoencoder whose latent is quantized by residual quantization."""

    section = "rqvae"
    quantizer: ResidualQuantizer

    def make_quantizer(self) -> ResidualQuantizer:
        size = codebook_size(self.params["codebook_size"], self.config["data"]["num_items"], self.where)
        num_levels = at_least_one(self.params["num_levels"], f"{self.where}.num_levels")
        return ResidualQuantizer(num_levels, size, self.latent_size, self.params["codebook"],
                                 f"{self.where}.codebook")
