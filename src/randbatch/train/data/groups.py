"""The embedded data set: hidden groups whose answer only global attention can collect.

Every node belongs to one of K hidden groups, readable, noisily, from its features. Each group of each graph has an
answer bit, drawn anew for every graph, and every node carries weak evidence of its group's bit (right 60 % of the
time). The label of a node is its group's bit. Nodes stand on a ring in random order and are joined to the nearest
ones, but no edge joins two members of a group: L layers of message passing reach L · `reach` nodes to either side,
among them a handful of members. Training graphs say nothing of the test graphs' bits. So the evidence of the whole
group has to be collected, wherever its members are.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from randbatch.train.data.graph import Dataset, Graph

__all__ = ["GroupsOptions", "make_groups"]


@dataclass(frozen=True)
class GroupsOptions:
    """The size and the difficulty of the data.

    Attributes:
        num_nodes: nodes of each graph.
        num_groups: hidden groups K.
        train_graphs: graphs to learn from.
        val_graphs: graphs that choose the epoch.
        test_graphs: graphs that are reported.
        channels: feature channels that tell the group; one more holds the evidence.
        noise: standard deviation of those features around the group's prototype.
        right: probability that a node's evidence is its group's bit.
        reach: a node is joined to so many nodes to either side, if they are of other groups.
    """

    num_nodes: int = 1024
    num_groups: int = 4
    train_graphs: int = 64
    val_graphs: int = 8
    test_graphs: int = 16
    channels: int = 8
    noise: float = 0.5
    right: float = 0.6
    reach: int = 2


def make_groups(seed: int, options: GroupsOptions | None = None) -> Dataset:
    """Generate the data set of a seed.

    Example:
        >>> data = make_groups(0, GroupsOptions(num_nodes=100, train_graphs=2, val_graphs=1, test_graphs=1))
        >>> len(data.graphs), data.graphs[0].x.shape
        (4, torch.Size([100, 9]))
    """
    options = GroupsOptions() if options is None else options
    generator = torch.Generator().manual_seed(seed)
    prototypes = torch.randn(options.num_groups, options.channels, generator=generator)
    counts = {"train": options.train_graphs, "val": options.val_graphs, "test": options.test_graphs}
    graphs = [_make_graph(prototypes, role, generator, options) for role, count in counts.items() for _ in range(count)]
    return Dataset("groups", tuple(graphs), "accuracy", 2)


def _make_graph(prototypes: Tensor, role: str, generator: torch.Generator, options: GroupsOptions) -> Graph:
    num_nodes, num_groups = options.num_nodes, options.num_groups
    group = torch.randint(num_groups, (num_nodes,), generator=generator)
    bits = torch.randint(2, (num_groups,), generator=generator)
    y = bits[group]
    noise = options.noise * torch.randn(num_nodes, options.channels, generator=generator)
    right = torch.rand(num_nodes, generator=generator) < options.right
    evidence = 2.0 * torch.where(right, y, 1 - y) - 1
    x = torch.cat([prototypes[group] + noise, evidence.unsqueeze(1)], dim=1)

    source = torch.arange(num_nodes).repeat(options.reach)
    step = torch.arange(1, options.reach + 1).repeat_interleave(num_nodes)
    target = (source + step) % num_nodes
    apart = group[source] != group[target]
    edges = torch.stack([source[apart], target[apart]])
    masks = {name: torch.full((num_nodes,), name == role) for name in ("train", "val", "test")}
    return Graph(x, torch.cat([edges, edges.flip(0)], dim=1), y, **masks)
