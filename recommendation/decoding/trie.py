"""Which semantic IDs exist, as tensors on the device."""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from recommendation.decoding.top_k import PADDING

# B batch, K beams, J most children of a level's nodes, N items, L levels, S most seen items of a history


class Trie(nn.Module):
    """The existing IDs as compressed rows: the children of a level's nodes lie one after another.

    Node 0 of level 0 is the root. The children of node n of level l are the nodes `starts[n]` up to, not
    including, `starts[n + 1]` of level l + 1, in the order of their codes; the nodes of the last level are IDs,
    each of one item. That is one code and one start a node, and no table of what does not exist. The IDs below a node
    are neighbours, too: `leaves_l` has the first one of each node of level l, and N at its end.
    """

    items: Tensor  # (N,) the item of each ID, in the order of the IDs
    leaf: Tensor   # (N,) the place of each item's ID in that order

    def __init__(self, codes: Tensor, codebook_sizes: list[int]):
        """`codes` (N, L), no two rows alike."""
        super().__init__()
        self.num_levels = len(codebook_sizes)
        table = codes.cpu().numpy().astype(np.int32)
        order = np.lexsort(table.T[::-1])
        ordered = table[order]
        new = np.zeros(len(codes), dtype=bool)  # whether an ID begins another node than the one before it
        new[0] = True
        node = np.zeros(len(codes), dtype=np.int64)  # of each ID, at the current level
        self.max_children: list[int] = []
        self._keep("leaves_0", np.array([0, len(codes)], dtype=np.int32))
        for level, size in enumerate(codebook_sizes):
            new[1:] |= ordered[1:, level] != ordered[:-1, level]
            first = np.flatnonzero(new)  # the first ID of each child
            counts = np.bincount(node[first])
            self.max_children.append(int(counts.max()))
            self._keep(f"starts_{level}", np.concatenate([[0], counts.cumsum()]).astype(np.int32))
            self._keep(f"leaves_{level + 1}", np.append(first, len(codes)).astype(np.int32))
            self._keep(f"codes_{level}", ordered[first, level].astype(np.int16 if size <= 2**15 else np.int32))
            node = new.cumsum() - 1
        self._keep("items", order.astype(np.int32))
        leaf = np.empty(len(codes), dtype=np.int32)
        leaf[order] = np.arange(len(codes), dtype=np.int32)
        self._keep("leaf", leaf)

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

    def has_single_item(self, level: int, nodes: Tensor) -> Tensor:
        """Whether there is one item only below each of the nodes of a level."""
        first = self.get_buffer(f"leaves_{level}")
        return first[nodes + 1] - first[nodes] == 1

    def leaves_of(self, items: Tensor) -> Tensor:
        """Different items (B, S), PADDING among them -> their leaves in order, then N, (B, S + 1) int32."""
        leaves = self.leaf[items].masked_fill(items == PADDING, len(self.leaf))
        return F.pad(leaves.sort(dim=1).values, (0, 1), value=len(self.leaf))

    def all_masked(self, level: int, nodes: Tensor, leaves: Tensor) -> Tensor:
        """Whether all items below each of the nodes of a level, (B, any number), are among a row's `leaves_of`."""
        first = self.get_buffer(f"leaves_{level}")
        begin, end = first[nodes], first[nodes + 1]
        # From the first leaf that is not before the node's on, all are different and in order: if as many as the
        # node has end with the node's last one, they are the node's.
        last = torch.searchsorted(leaves, begin) + (end - begin - 1)
        return leaves.gather(1, last.clamp(max=leaves.shape[1] - 1)) == end - 1

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
