"""Which semantic IDs exist, as tensors on the device."""

import numpy as np
import torch
from torch import Tensor, nn

# B batch, K beams, J most children of a level's nodes, N items, L levels


class Trie(nn.Module):
    """The existing IDs as compressed rows: the children of a level's nodes lie one after another.

    Node 0 of level 0 is the root. The children of node n of level l are the nodes `starts[n]` up to, not
    including, `starts[n + 1]` of level l + 1, in the order of their codes; the nodes of the last level are IDs,
    each of one item. That is one code and one start a node, and no table of what does not exist.
    """

    num_levels: int

    def __init__(self, codes: Tensor, codebook_sizes: list[int]):
        """`codes` (N, L), no two rows alike."""
        super().__init__()
        self.num_levels = len(codebook_sizes)
        codes = codes.cpu().numpy().astype(np.int32)
        order = np.lexsort(codes.T[::-1])
        ordered = codes[order]
        new = np.zeros(len(codes), dtype=bool)  # whether an ID begins another node than the one before it
        new[0] = True
        node = np.zeros(len(codes), dtype=np.int64)  # of each ID, at the current level
        self.max_children: list[int] = []
        for level, size in enumerate(codebook_sizes):
            self._keep(f"alone_{level}", np.bincount(node) == 1)
            new[1:] |= ordered[1:, level] != ordered[:-1, level]
            first = np.flatnonzero(new)  # the first ID of each child
            counts = np.bincount(node[first])
            self.max_children.append(int(counts.max()))
            self._keep(f"starts_{level}", np.concatenate([[0], counts.cumsum()]).astype(np.int32))
            self._keep(f"codes_{level}", ordered[first, level].astype(np.int16 if size <= 2**15 else np.int32))
            node = new.cumsum() - 1
        self._keep("items", order.astype(np.int32))

    def _keep(self, name: str, values: np.ndarray) -> None:
        self.register_buffer(name, torch.from_numpy(values), persistent=False)

    def children_of(self, level: int, nodes: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(B, K) nodes of a level -> their children's codes, the children, and which of them exist, (B, K, J) each.

        Where a node has fewer than J children, some child of another one stands in for those it lacks.
        """
        starts, codes = self.get_buffer(f"starts_{level}"), self.get_buffer(f"codes_{level}")
        begin, end = starts[nodes].unsqueeze(2).long(), starts[nodes + 1].unsqueeze(2)
        child = begin + torch.arange(self.max_children[level], device=nodes.device)
        exists = child < end
        child = child.clamp(max=len(codes) - 1)
        return codes[child].long(), child, exists

    def alone(self, level: int, nodes: Tensor) -> Tensor:
        """Whether there is one item only below each of the nodes of a level."""
        return self.get_buffer(f"alone_{level}")[nodes]

    def first_child(self, level: int, nodes: Tensor) -> Tensor:
        """The child with the smallest code, (B, K)."""
        return self.get_buffer(f"starts_{level}")[nodes].long()

    def level(self, level: int) -> tuple[Tensor, Tensor]:
        """Every child of a level's nodes, in order: its code and its parent."""
        starts = self.get_buffer(f"starts_{level}")
        parents = torch.arange(len(starts) - 1, device=starts.device).repeat_interleave(starts.diff())
        return self.get_buffer(f"codes_{level}").long(), parents

    def paths(self) -> Tensor:
        """The nodes that each item's ID goes through, (N, L + 1) int64; column l is a node of level l."""
        nodes = [torch.arange(len(self.items), device=self.items.device)]
        for level in reversed(range(self.num_levels)):
            nodes.append(self.level(level)[1][nodes[-1]])
        paths = torch.stack(nodes[::-1], dim=1)
        return torch.empty_like(paths).index_copy_(0, self.items.long(), paths)

    def items_of(self, nodes: Tensor) -> Tensor:
        """Nodes of the last level -> their items."""
        return self.items[nodes].long()
