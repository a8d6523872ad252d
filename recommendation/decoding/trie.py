"""A trie (prefix tree) of the semantic IDs of all items, stored in tensors."""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from recommendation.decoding.top_k import PADDING

# B batch, K beams, J largest number of children of a node of the level, N items, L levels,
# P nodes of the next level, S largest number of seen items in a history


class Trie(nn.Module):
    """A tree of all prefixes of semantic IDs, in a compressed sparse row format.

    The root is node 0 of level 0. Each leaf is the semantic ID of one item. Node n of level l has these children and
    leaves:

    children: nodes `starts_l[n]` to `starts_l[n + 1] - 1` of level l + 1, sorted by their codes
    leaves: nodes `leaves_l[n]` to `leaves_l[n + 1] - 1` of the last level
    """

    items: Tensor  # (N,) item of each leaf
    leaf: Tensor   # (N,) leaf of each item

    def __init__(self, codes: Tensor, codebook_sizes: list[int]):
        """Build the trie.

        codes: (N, L) semantic IDs of the items, all distinct
        codebook_sizes: one per level
        """
        super().__init__()
        self.num_levels = len(codebook_sizes)
        table = codes.cpu().numpy().astype(np.int32)
        order = np.lexsort(table.T[::-1])
        ordered = table[order]
        new = np.zeros(len(codes), dtype=bool)  # True if an ID and the previous ID have different prefixes
        new[0] = True
        node = np.zeros(len(codes), dtype=np.int64)  # node of each ID at the current level
        self.max_children: list[int] = []
        self._keep("leaves_0", np.array([0, len(codes)], dtype=np.int32))
        for level, size in enumerate(codebook_sizes):
            new[1:] |= ordered[1:, level] != ordered[:-1, level]
            first = np.flatnonzero(new)  # index of the first ID in each child
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
        """Return the children of each node as (codes, nodes, exists): (B, K) -> (B, K, J) each.

        If a node has fewer than J children, `exists` is False for the remaining entries. Ignore these entries.
        """
        starts, codes = self.get_buffer(f"starts_{level}"), self.get_buffer(f"codes_{level}")
        begin, end = starts[nodes].unsqueeze(2).long(), starts[nodes + 1].unsqueeze(2)
        child = begin + torch.arange(self.max_children[level], device=nodes.device)
        exists = child < end
        child = child.clamp(max=len(codes) - 1)
        return codes[child].long(), child, exists

    def has_single_item(self, level: int, nodes: Tensor) -> Tensor:
        """Return for each node of a level whether there is only one item below the node."""
        first = self.get_buffer(f"leaves_{level}")
        return first[nodes + 1] - first[nodes] == 1

    def leaves_of(self, items: Tensor) -> Tensor:
        """Return the leaves of the items, in the format that `all_masked` needs: (B, S) -> (B, S + 1) int32.

        Each row is sorted, and ends with the number of items N. The leaf of PADDING is N too. The other items of a row
        must be distinct.
        """
        leaves = self.leaf[items].masked_fill(items == PADDING, len(self.leaf))
        return F.pad(leaves.sort(dim=1).values, (0, 1), value=len(self.leaf))

    def all_masked(self, level: int, nodes: Tensor, leaves: Tensor) -> Tensor:
        """Return for each node whether `leaves` contains all leaves below the node.

        nodes: (B, any size) -> bool, (B, same size)
        leaves: (B, S + 1) result of `leaves_of`
        """
        first = self.get_buffer(f"leaves_{level}")
        begin, end = first[nodes], first[nodes + 1]
        # A node has n = end - begin leaves: `begin` to `end - 1`. `leaves` is sorted and has no duplicates except N.
        # Let i be the index of the first entry >= `begin`. All leaves of the node are in `leaves` if and only if the
        # entry at i + n - 1 is `end - 1`.
        last = torch.searchsorted(leaves, begin) + (end - begin - 1)
        return leaves.gather(1, last.clamp(max=leaves.shape[1] - 1)) == end - 1

    def log_masses(self, log_values: Tensor, seen: Tensor | None) -> list[Tensor]:
        """Return the logarithm of the sum of the values of the leaves below each node, for each level but the last.

        Each result has the shape (B, P). A sum is at least 1e-300 times the largest value.

        log_values: (B, N) the logarithm of a value of each item
        seen: (B, S) items whose values count as 0, or None
        """
        highest = log_values.max(dim=1, keepdim=True).values
        values = (log_values - highest).double().exp()
        if seen is not None:
            kept = torch.where(seen == PADDING, values.gather(1, seen.clamp(min=0)), 0.0)
            values = values.scatter_reduce(1, seen.clamp(min=0), kept, "amin")
        masses, by_leaf = [], values.index_select(1, self.items.long())
        for level in range(self.num_levels):
            first = self.get_buffer(f"leaves_{level}")
            node = torch.repeat_interleave(first.diff(), output_size=len(self.items))          # (N,) node of each leaf
            mass = by_leaf.new_zeros(len(by_leaf), len(first) - 1).index_add_(1, node, by_leaf)
            masses.append((mass.clamp(min=1e-300).log() + highest).float())
        return masses

    def first_child(self, level: int, nodes: Tensor) -> Tensor:
        """For each node, return its child with the smallest code: (B, K) -> (B, K)."""
        return self.get_buffer(f"starts_{level}")[nodes].long()

    def level(self, level: int) -> tuple[Tensor, Tensor]:
        """For each of the P nodes of level `level + 1`, return its code and its parent: (P,) each."""
        starts = self.get_buffer(f"starts_{level}")
        parents = torch.arange(len(starts) - 1, device=starts.device).repeat_interleave(starts.diff())
        return self.get_buffer(f"codes_{level}").long(), parents

    def paths(self) -> Tensor:
        """For each item, return the nodes from the root to its leaf: (N, L + 1) int64, one column per level."""
        nodes = [torch.arange(len(self.items), device=self.items.device)]
        for level in reversed(range(self.num_levels)):
            nodes.append(self.level(level)[1][nodes[-1]])
        paths = torch.stack(nodes[::-1], dim=1)
        return torch.empty_like(paths).index_copy_(0, self.items.long(), paths)

    def siblings(self) -> tuple[Tensor, Tensor]:
        """Return two tables with the codes that can follow the prefixes of each item.

        The first table contains the codes of all nodes except the root. The children of a node are next to each other.
        J zeros follow, so that J entries can be read from any node.

        The second table, (3, L, N) int32, describes the children of the item's prefix at each level. Its three parts
        are the index of the first child in the first table, the number of children, and the item's own child, counted
        from the first child.
        """
        codes, tables, offset, paths = [], [], 0, self.paths().T                             # paths: (L + 1, N)
        for level in range(self.num_levels):
            starts = self.get_buffer(f"starts_{level}")
            first, end = starts[paths[level]], starts[paths[level] + 1]                      # (N,) each
            tables.append(torch.stack([first + offset, end - first, paths[level + 1].int() - first]))
            codes.append(self.get_buffer(f"codes_{level}").long())
            offset += len(codes[-1])
        return F.pad(torch.cat(codes), (0, max(self.max_children))), torch.stack(tables, dim=1)

    def items_of(self, nodes: Tensor) -> Tensor:
        """Return the items of the given leaves."""
        return self.items[nodes].long()
