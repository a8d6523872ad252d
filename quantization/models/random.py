"""A baseline with distinct random codes. The codes do not depend on the content of the items."""

import torch
from torch import Tensor

from common.errors import ConfigError
from quantization.codebooks.sizes import at_least_one, codebook_size

from .table import TableVQ

# N items, L levels, K codebook size


class RANDOM(TableVQ):
    """A quantizer that gives every item a distinct random semantic ID. It does not read an embedding.

    There are K^L possible semantic IDs, with K codes in each of L levels.
    """

    def __init__(self, config: dict, input_size: int):
        super().__init__(config)
        params, where, num_items = config["random"]["model_params"], "random.model_params", config["data"]["num_items"]
        self.size = codebook_size(params["codebook_size"], num_items, where)
        num_levels = at_least_one(params["num_levels"], f"{where}.num_levels")
        if self.size ** num_levels < num_items:
            needed = next((n for n in range(1, 64) if self.size ** n >= num_items), None)
            raise ConfigError(f"{where}.num_levels", f"{num_levels} is too small", f"{num_levels} levels of "
                              f"{self.size} codes give only {self.size ** num_levels} distinct IDs, but there are "
                              f"{num_items} items",
                              f"use --num_levels {needed}" if needed else "use --codebook_size auto")
        self.register_buffer("codes", torch.zeros(num_items, num_levels, dtype=torch.long))

    @property
    def codebook_sizes(self) -> list[int]:
        return [self.size] * self.codes.shape[1]

    def fit(self, xs: Tensor, generator: torch.Generator) -> bool:
        """Draw a distinct random semantic ID for each item, store the codes (N, L), and return True."""
        shape, codes = self.codes.shape, torch.zeros(0, self.codes.shape[1], dtype=torch.long)
        if self.size ** shape[1] <= 4 * shape[0]:  # random draws would collide often: shuffle all IDs
            numbers = torch.randperm(self.size ** shape[1], generator=generator)[:shape[0]]
            places = torch.tensor([self.size ** level for level in range(shape[1])])
            codes = numbers.unsqueeze(1) // places % self.size
        while len(codes) < shape[0]:
            codes = torch.cat([codes, torch.randint(self.size, (shape[0] - len(codes), shape[1]), generator=generator)])
            codes = codes.unique(dim=0)
            codes = codes[torch.randperm(len(codes), generator=generator)]
        self.codes.copy_(codes)
        return True
