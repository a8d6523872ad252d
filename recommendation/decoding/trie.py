"""A trie of the semantic IDs of all items, as tensors on the device."""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from recommendation.decoding.top_k import PADDING

# B batch, K beams, J largest number of children of a level's nodes, N items, L levels, P children of a level's nodes,
# S largest number of seen items of a history


class Trie(nn.Module):
    """A trie in a compressed sparse row format.

    Node 0 of level 0 is the root. The children of node n of level l are the nodes `starts_l[n]` to
    `starts_l[n + 1] - 1` of level l + 1, sorted by their codes. The nodes of the last level are the leaves; each leaf
    is the semantic ID of one item. The trie stores one code and one start per node, and nothing for prefixes that do
    not exist. The leaves below a node are consecutive too: `leaves_l` has the first leaf below each node of level l,
    followed by N.
    """

    items: Tensor  # (N,) item of each leaf
    leaf: Tensor   # (N,) leaf of each item

    def __init__(self, codes: Tensor, codebook_sizes: list[int]):
        """Build the trie of the semantic IDs `codes` (N, L), which must be distinct."""
        super().__init__()
        self.num_levels = len(codebook_sizes)
        table = codes.cpu().numpy().astype(np.int32)
        order = np.lexsort(table.T[::-1])
        ordered = table[order]
        new = np.zeros(len(codes), dtype=bool)  # whether an ID is in another node than the previous ID
        new[0] = True
        node = np.zeros(len(codes), dtype=np.int64)  # node of each ID at the current level
        self.max_children: list[int] = []
        self._keep("leaves_0", np.array([0, len(codes)], dtype=np.int32))
        for level, size in enumerate(codebook_sizes):
            new[1:] |= ordered[1:, level] != ordered[:-1, level]
            first = np.flatnonzero(new)  # first ID of each child
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
        """Return the children's codes, the children, and which of them exist: (B, K) -> (B, K, J) each.

        If a node has fewer than J children, the rest of its row has children of other nodes, marked as not existing.
        """
        starts, codes = self.get_buffer(f"starts_{level}"), self.get_buffer(f"codes_{level}")
        begin, end = starts[nodes].unsqueeze(2).long(), starts[nodes + 1].unsqueeze(2)
        child = begin + torch.arange(self.max_children[level], device=nodes.device)
        exists = child < end
        child = child.clamp(max=len(codes) - 1)
        return codes[child].long(), child, exists

    def has_single_item(self, level: int, nodes: Tensor) -> Tensor:
        """Return whether there is only one item below each of these nodes of a level."""
        first = self.get_buffer(f"leaves_{level}")
        return first[nodes + 1] - first[nodes] == 1

    def leaves_of(self, items: Tensor) -> Tensor:
        """Return the sorted leaves of the items, followed by N: (B, S) -> (B, S + 1) int32.

        The items of a row must be different, except for PADDING, whose leaf is N.
        """
        leaves = self.leaf[items].masked_fill(items == PADDING, len(self.leaf))
        return F.pad(leaves.sort(dim=1).values, (0, 1), value=len(self.leaf))

    def all_masked(self, level: int, nodes: Tensor, leaves: Tensor) -> Tensor:
        """Return whether all leaves below each node, (B, any number), are among `leaves`, a result of `leaves_of`."""
        first = self.get_buffer(f"leaves_{level}")
        begin, end = first[nodes], first[nodes + 1]
        # `leaves` is sorted, and its entries below N are distinct. So it contains all n leaves of a node if the n-th
        # entry, counted from the first one that is at least `begin`, is the node's last leaf.
        last = torch.searchsorted(leaves, begin) + (end - begin - 1)
        return leaves.gather(1, last.clamp(max=leaves.shape[1] - 1)) == end - 1

    def first_child(self, level: int, nodes: Tensor) -> Tensor:
        """Return the child with the smallest code of each node: (B, K) -> (B, K)."""
        return self.get_buffer(f"starts_{level}")[nodes].long()

    def level(self, level: int) -> tuple[Tensor, Tensor]:
        """Return the codes and the parents of all children of a level's nodes, in order, (P,) each."""
        starts = self.get_buffer(f"starts_{level}")
        parents = torch.arange(len(starts) - 1, device=starts.device).repeat_interleave(starts.diff())
        return self.get_buffer(f"codes_{level}").long(), parents

    def paths(self) -> Tensor:
        """Return the nodes on the path from the root to each item, (N, L + 1) int64; column l is a node of level l."""
        nodes = [torch.arange(len(self.items), device=self.items.device)]
        for level in reversed(range(self.num_levels)):
            nodes.append(self.level(level)[1][nodes[-1]])
        paths = torch.stack(nodes[::-1], dim=1)
        return torch.empty_like(paths).index_copy_(0, self.items.long(), paths)

    def items_of(self, nodes: Tensor) -> Tensor:
        """Return the items of nodes of the last level."""
        return self.items[nodes].long()
