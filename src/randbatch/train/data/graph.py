"""What a data set is to the training loop."""

from __future__ import annotations

import functools
import hashlib
import json
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from randbatch._errors import InvalidValue
from randbatch._shapes import Bool, Float, Int, Shaped
from randbatch.train.checksum import update_hash
from randbatch.train.data.check import as_mask, check_dataset

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

    Raises:
        InvalidValue: features that are not finite, labels out of range, an edge to a node that is not there, roles that
            overlap or that nobody has, training nodes of one class only.
    """

    name: str
    graphs: tuple[Graph, ...]
    metric: Metric
    num_outputs: int

    def __post_init__(self) -> None:
        """Check it here, so that no loader has to."""
        check_dataset(self)

    @functools.cached_property
    def fingerprint(self) -> str:
        """SHA-256 of every number and of how it is judged: equal for equal data, wherever it lies."""
        found = hashlib.sha256(json.dumps([self.metric, self.num_outputs, len(self.graphs)]).encode())
        for graph in self.graphs:
            for name, tensor in sorted(vars(graph).items()):
                update_hash(found, name, tensor)
        return found.hexdigest()


def pick_split(name: str, masks: dict[str, Tensor], split: int) -> dict[str, Tensor]:
    """Split `split` of masks that are each `[N]` or `[N, S]`; a mask without splits serves them all.

    Raises:
        InvalidValue: there is no such split, or a mask holds another number than 0 and 1.
    """
    counts = {mask.shape[1] for mask in masks.values() if mask.dim() == 2}
    num_splits = min(counts, default=1)
    if not 0 <= split < num_splits:
        raise InvalidValue(f"split must lie in 0 … {num_splits - 1} for {name!r}, got {split}")
    chosen = {role: mask[:, split] if mask.dim() == 2 else mask for role, mask in masks.items()}
    return {role: as_mask(f"{name}: {role}_mask", mask) for role, mask in chosen.items()}


def random_masks(num_nodes: int, split: int) -> dict[str, Tensor]:
    """60 % train, 20 % val, 20 % test at random, for a data set without splits; `split` is the seed."""
    generator = torch.Generator().manual_seed(split)
    order = torch.randperm(num_nodes, generator=generator)
    cuts = (int(0.6 * num_nodes), int(0.8 * num_nodes))
    masks: dict[str, Tensor] = {}
    for role, chosen in zip(("train", "val", "test"), order.tensor_split(cuts), strict=True):
        masks[role] = torch.zeros(num_nodes, dtype=torch.bool).index_fill_(0, chosen, True)
    return masks
