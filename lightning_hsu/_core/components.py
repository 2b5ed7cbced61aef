"""Groups of similar neurons: connected components, in memory of the number of neurons."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


class Components:
    """Connected components of a graph whose edges are added in parts.

    Args:
        n: Number of nodes.
        device: Where the edges are.

    Attributes:
        label: The smallest node of each node's component, int64, shape (n,).

    Example:
        >>> components = Components(5, torch.device("cpu"))
        >>> components.add(torch.tensor([1, 4]), torch.tensor([4, 3]))
        >>> components.label.tolist()
        [0, 1, 2, 1, 1]
    """

    def __init__(self, n: int, device: torch.device) -> None:
        self.label = torch.arange(n, device=device)

    def add(self, first: Tensor, second: Tensor) -> None:
        """Add edges between nodes ``first`` and ``second``, (m,) each.

        Each pass over them joins at least half of the components that they connect.
        """
        while True:
            one = self.label[first]
            other = self.label[second]
            apart = one != other
            if not bool(apart.any()):
                return
            first = first[apart]
            second = second[apart]
            low = torch.minimum(one, other)[apart]
            high = torch.maximum(one, other)[apart]
            self.label.scatter_reduce_(0, high, low, "amin")
            self._follow()

    def add_block(self, near: Tensor, row: int, col: int) -> None:
        """Add the edges of a block of the matrix of all pairs; those within a component cost little.

        Args:
            near: Where there is an edge, bool, shape (k, m).
            row: The node of the first row.
            col: The node of the first column.
        """
        of_rows = self.label[row : row + near.shape[0], None]
        of_cols = self.label[col : col + near.shape[1]]
        first, second = (near & (of_rows != of_cols)).nonzero(as_tuple=True)
        self.add(first + row, second + col)

    def labels_among(self, places: Tensor, n: int) -> Tensor:
        """The labels (n,) if the nodes are at ``places``, in ascending order, among n nodes."""
        label = torch.arange(n, device=places.device)
        label[places] = places[self.label]
        return label

    def _follow(self) -> None:
        """Let every label be the smallest node of its component, which has itself as label."""
        while True:
            further = self.label[self.label]
            if torch.equal(further, self.label):
                return
            self.label = further


@dataclass(frozen=True)
class Groups:
    """Components of more than one node.

    Args:
        count: How many there are.
        nodes: How many nodes are in them.
        largest: The nodes of the largest, in ascending order, the largest component first.
    """

    count: int
    nodes: int
    largest: list[Tensor]


def largest_groups(label: Tensor, keep: int) -> Groups:
    """Count the components of more than one node, and list the nodes of the largest.

    Args:
        label: The smallest node of each node's component, int64, shape (n,).
        keep: How many components to list.

    Example:
        >>> found = largest_groups(torch.tensor([0, 1, 2, 1, 1, 0]), keep=1)
        >>> found.count, found.nodes, found.largest
        (2, 5, [tensor([1, 3, 4])])
    """
    sizes = torch.bincount(label, minlength=len(label))
    first = (sizes > 1).nonzero().squeeze(1)
    nodes = int(sizes[first].sum())
    order = sizes[first].argsort(descending=True, stable=True)[:keep]
    rank = torch.full_like(label, len(order))  # of a component, by its smallest node
    rank[first[order]] = torch.arange(len(order), device=label.device)
    rank_of_node = rank[label]
    listed = (rank_of_node < len(order)).nonzero().squeeze(1)
    listed = listed[rank_of_node[listed].argsort(stable=True)]
    largest = torch.split(listed, sizes[first[order]].tolist())
    return Groups(len(first), nodes, list(largest) if len(order) else [])
