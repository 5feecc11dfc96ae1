"""What must hold of any data set, wherever it comes from. Each refusal is one sentence that names the data set."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from randbatch._errors import InvalidValue

if TYPE_CHECKING:
    from randbatch.train.data.graph import Dataset, Graph

__all__ = ["as_mask", "check_dataset"]

_ROLES = ("train", "val", "test")


def as_mask(name: str, mask: Tensor) -> Tensor:
    """A mask as bool; what holds anything but 0 and 1 is none (node numbers, ±1, a share).

    Raises:
        InvalidValue: it holds another number.
    """
    if mask.dtype == torch.bool:
        return mask
    strange = mask[(mask != 0) & (mask != 1)]
    if strange.numel():
        raise InvalidValue(f"{name} must be a mask of 0 and 1, it holds {strange[0].item()}")
    return mask.bool()


def check_dataset(dataset: Dataset) -> None:
    """Check every number that training, evaluation and the choice of the epoch depend on.

    Raises:
        InvalidValue: something is not as `Graph` and `Dataset` say.
    """

    def refuse(what: str) -> None:
        raise InvalidValue(f"data set {dataset.name!r}: {what}")

    if not dataset.graphs:
        refuse("there must be at least one graph, got none")
    width = max(graph.x.shape[-1] for graph in dataset.graphs)
    try:
        for number, graph in enumerate(dataset.graphs):
            where = f" of graph {number}" if len(dataset.graphs) > 1 else ""
            _check_features(graph, width, where)
            _check_edges(graph, where)
            _check_masks(graph, where)
            _check_labels(graph, dataset.num_outputs, where)
        _check_roles(dataset)
    except InvalidValue as error:
        refuse(str(error))


def _check_features(graph: Graph, width: int, where: str) -> None:
    x = graph.x
    if x.dim() != 2 or x.dtype != torch.float32 or 0 in x.shape or x.shape[1] != width:
        want = "float32 [N, F], N and F at least 1 and F the same in all graphs"
        raise InvalidValue(f"features{where} must be {want}, got {_shape(x)}")
    if not all(bool(end.isfinite()) for end in torch.aminmax(x)):  # without a copy of what may be most of the memory
        node = int(x.isfinite().all(dim=1).logical_not().nonzero()[0])
        value = x[node][x[node].isfinite().logical_not()][0].item()
        raise InvalidValue(f"features{where} must be finite in float32, node {node} has {value}")


def _check_edges(graph: Graph, where: str) -> None:
    edges, size = graph.edge_index, len(graph.x)
    if edges.dim() != 2 or edges.shape[0] != 2 or edges.dtype != torch.int64:
        raise InvalidValue(f"edges{where} must be int64 [2, E], got {_shape(edges)}")
    if edges.numel():
        low, high = int(edges.min()), int(edges.max())
        if low < 0 or high >= size:
            raise InvalidValue(f"edges{where} must join nodes 0 to {size - 1}, got node {low if low < 0 else high}")


def _check_masks(graph: Graph, where: str) -> None:
    for role in _ROLES:
        mask: Tensor = getattr(graph, role)
        if mask.dtype != torch.bool or mask.shape != (len(graph.x),):
            raise InvalidValue(f"the {role} mask{where} must be bool [{len(graph.x)}], got {_shape(mask)}")
    for one, other in itertools.combinations(_ROLES, 2):
        both = getattr(graph, one) & getattr(graph, other)
        if bool(both.any()):
            node = int(both.nonzero()[0])
            raise InvalidValue(
                f"no node may be both {one} and {other}, node {node}{where} and {int(both.sum())} in all are"
            )


def _check_labels(graph: Graph, num_outputs: int, where: str) -> None:
    """Labels of nodes with a role; the others need none."""
    y, size = graph.y, len(graph.x)
    if y.dim() == 2:
        if not y.is_floating_point() or y.shape != (size, num_outputs):
            raise InvalidValue(f"labels{where} must be floating-point [{size}, {num_outputs}], got {_shape(y)}")
        strange = y[(y != 0) & (y != 1) & ~y.isnan()]
        if strange.numel():
            raise InvalidValue(f"labels{where} must be 0, 1 or NaN (not known), got {strange[0].item()}")
        return
    if y.dtype != torch.int64 or y.shape != (size,):
        raise InvalidValue(f"labels{where} must be int64 [{size}], got {_shape(y)}")
    used = y[graph.train | graph.val | graph.test]
    if used.numel():
        low, high = int(used.min()), int(used.max())
        if low < 0 or high >= num_outputs:
            raise InvalidValue(f"labels{where} must be 0 to {num_outputs - 1}, got {low if low < 0 else high}")


def _check_roles(dataset: Dataset) -> None:
    """Each role has labels to work with."""
    several = dataset.graphs[0].y.dim() == 2
    total = sum(len(graph.x) for graph in dataset.graphs)
    if not several and not 2 <= dataset.num_outputs <= max(2, total):
        raise InvalidValue(f"classes must be at least 2 and no more than the {total} nodes, got {dataset.num_outputs}")
    for role in _ROLES:
        labels = [graph.y[getattr(graph, role)] for graph in dataset.graphs]
        if not sum(map(len, labels)):
            raise InvalidValue(f"there must be {role} nodes, got none")
        if several and not any(bool((~y.isnan()).any()) for y in labels):
            raise InvalidValue(f"there must be known labels of {role} nodes, got none")
        if role == "train" or dataset.metric == "rocauc":
            _check_both(labels, role)


def _check_both(labels: Sequence[Tensor], role: str) -> None:
    """One class alone teaches nothing, and has no area under a curve; of several tasks, one with both is enough."""
    y = torch.cat(list(labels))
    one = [len(task[~task.isnan()].unique()) < 2 for task in y.reshape(len(y), -1).unbind(1)]
    if all(one):
        raise InvalidValue(
            f"{role} nodes must be of two classes at least, all are of class {y.nan_to_num(-1).max().item():g}"
        )


def _shape(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"
