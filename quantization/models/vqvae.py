"""VQ-VAE (van den Oord et al. 2017, arXiv 1711.00937) on item embeddings."""

from quantization.codebooks.residual import ResidualQuantizer
from quantization.codebooks.sizes import codebook_size

from .autoencoder import AutoencoderVQ

LARGEST_AUTO = 4096  # maximum for `codebook_size: auto`


class VQVAE(AutoencoderVQ):
    """An autoencoder with one codebook. The latent of each item is replaced by the nearest codeword."""

    section = "vqvae"

    def make_quantizer(self) -> ResidualQuantizer:
        size = codebook_size(self.params["codebook_size"], self.config["data"]["num_items"], self.where, LARGEST_AUTO)
        return ResidualQuantizer(1, size, self.latent_size, self.params["codebook"], f"{self.where}.codebook")
