"""What a data set is to the training loop."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from randbatch._shapes import Bool, Float, Int, Shaped

__all__ = ["Dataset", "Graph", "Metric", "pick_split", "random_masks"]

Metric = Literal["accuracy", "f1", "rocauc"]


@dataclass(frozen=True, eq=False)
class Graph:
    """One graph with a label and a role for each node.

    Args:
        x: features, float32 `[N, F]`.
        edge_index: int64 `[2, E]`, both directions of every edge.
        y: a class, int64 `[N]`; or several yes-no labels, float32 `[N, T]`.
        train: bool `[N]`, the nodes whose label the loss sees.
        val: bool `[N]`, the nodes that choose the epoch.
        test: bool `[N]`, the nodes that are reported.
    """

    x: Float[Tensor, "n f"]
    edge_index: Int[Tensor, "2 e"]
    y: Shaped[Tensor, "n ..."]
    train: Bool[Tensor, " n"]
    val: Bool[Tensor, " n"]
    test: Bool[Tensor, " n"]

    def to(self, device: torch.device) -> Graph:
        """The same graph on another device."""
        return replace(self, **{name: tensor.to(device) for name, tensor in vars(self).items()})


@dataclass(frozen=True, eq=False)
class Dataset:
    """Graphs, and how predictions on them are judged.

    Args:
        name: of the data set.
        graphs: one graph (transductive), or several with roles of their own (inductive).
        metric: accuracy; area under the ROC curve (of class 1, or the mean over tasks); micro-averaged F1 over tasks.
        num_outputs: classes, or tasks where `y` is `[N, T]`.
    """

    name: str
    graphs: tuple[Graph, ...]
    metric: Metric
    num_outputs: int


def pick_split(name: str, masks: dict[str, Tensor], split: int) -> dict[str, Tensor]:
    """Split `split` of masks that are each `[N]` or `[N, S]`; a mask without splits serves them all."""
    counts = {mask.shape[1] for mask in masks.values() if mask.dim() == 2}
    num_splits = min(counts, default=1)
    if not 0 <= split < num_splits:
        raise ValueError(f"split must lie in 0 … {num_splits - 1} for {name!r}, got {split}")
    return {role: (mask[:, split] if mask.dim() == 2 else mask).bool() for role, mask in masks.items()}


def random_masks(num_nodes: int, split: int) -> dict[str, Tensor]:
    """60 % train, 20 % val, 20 % test at random, for a data set without splits; `split` is the seed."""
    generator = torch.Generator().manual_seed(split)
    order = torch.randperm(num_nodes, generator=generator)
    cuts = (int(0.6 * num_nodes), int(0.8 * num_nodes))
    masks: dict[str, Tensor] = {}
    for role, chosen in zip(("train", "val", "test"), order.tensor_split(cuts), strict=True):
        masks[role] = torch.zeros(num_nodes, dtype=torch.bool).index_fill_(0, chosen, True)
    return masks
