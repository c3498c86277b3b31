"""Which units of two decompositions have to do with each other, many with many.

An edge joins units i and j whose activities correlate more than chance lets either of them with any unit of the other
decomposition (p = 0.001 for each, see `unit_matching`), and by `cutoff` at least: with many units and much text what is
certain may still be weak.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from nndecomp.evaluation.unit_matching import Compared

P = 0.001


@dataclass(frozen=True)
class Graph:
    """A bipartite graph, groups side by side: edges only within a group."""

    degree: Int[Tensor, " unit"]  # of each unit of the first
    degree_back: Int[Tensor, " other"]  # of each of the second
    components: Int[Tensor, " component"]  # units in each connected component that has an edge, largest first

    @property
    def n_edges(self) -> int:
        return int(self.degree.sum())

    def share_one_to_one(self) -> float:
        """Of the edges: those whose two ends have no other."""
        return (self.components == 2).sum().item() / max(1, self.n_edges)


def graph(compared: Compared, cutoff: float) -> Graph:
    ends = compared.best.threshold(P).clamp(min=cutoff), compared.best_back.threshold(P).clamp(min=cutoff)
    sizes = ([len(each) for each in compared.pairs], [each.shape[1] for each in compared.pairs])
    limits = zip(compared.pairs, ends[0].split(sizes[0]), ends[1].split(sizes[1]), strict=True)
    edges = [(pair > first[:, None]) & (pair > second) for pair, first, second in limits]
    components = torch.cat([connected(each) for each in edges])
    return Graph(
        torch.cat([each.sum(1) for each in edges]),
        torch.cat([each.sum(0) for each in edges]),
        components.sort(descending=True).values,
    )


def connected(edges: Bool[Tensor, "a b"]) -> Int[Tensor, " component"]:
    """Units in each connected component of a bipartite graph that has an edge."""
    from scipy.sparse import coo_matrix  # late: slow to import
    from scipy.sparse.csgraph import connected_components

    n_a, n_b = edges.shape
    rows, columns = edges.nonzero(as_tuple=True)
    ends = rows.numpy(), columns.numpy() + n_a
    joined = coo_matrix((torch.ones(len(rows)).numpy(), ends), shape=(n_a + n_b, n_a + n_b))
    _, label = connected_components(joined, directed=False)
    size = torch.from_numpy(label).long().bincount()
    return size[size > 1]
