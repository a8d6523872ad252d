"""Residual vector quantization without an autoencoder, as in SoundStream (arXiv 2107.03312)."""

from torch import Tensor

from quantization.codebooks.layers import Standardizer
from quantization.codebooks.residual import ResidualQuantizer, squared_distance
from quantization.codebooks.sizes import at_least_one, codebook_size

from .autoencoder import LatentVQ

# B batch, D input width, L levels


class RVQ(LatentVQ):
    """Residual quantization of the embeddings. Only the codewords are trained, by default with moving averages."""

    def __init__(self, config: dict, input_size: int):
        super().__init__(config)
        params, where = config["rvq"]["model_params"], "rvq.model_params"
        size = codebook_size(params["codebook_size"], config["data"]["num_items"], where)
        num_levels = at_least_one(params["num_levels"], f"{where}.num_levels")
        self.standardizer = Standardizer(input_size, params["standardize"])
        self.quantizer = ResidualQuantizer(num_levels, size, input_size, params["codebook"], f"{where}.codebook")

    def latent(self, xs: Tensor) -> Tensor:
        return self.standardizer(xs)

    def forward(self, xs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        quantized = self.quantizer(self.latent(xs))
        return self.standardizer.undo(quantized.latent), quantized.codebook_loss, quantized.codes

    def compute_loss(self, forward_outputs: tuple, original_xs: Tensor) -> dict[str, Tensor]:
        """Return the losses. With `update: ema`, the losses have no gradient and only show the training progress."""
        reconstruction, codebook_loss, _ = forward_outputs
        recon_loss = squared_distance(self.standardizer.scale(reconstruction),
                                      self.standardizer.scale(original_xs)).detach()
        return {"loss_total": recon_loss + codebook_loss, "recon_loss": recon_loss}
