"""A data set from one `.npz` file, in the layout of the heterophilous-graphs benchmark."""

from __future__ import annotations

import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch

from randbatch.train.data.graph import Dataset, Graph, pick_split

__all__ = ["load_npz"]

_ARRAYS = {
    "node_features": "[N, F]",
    "node_labels": "[N]",
    "edges": "[E, 2]",
    "train_masks": "[S, N] or [N]",
    "val_masks": "[S, N] or [N]",
    "test_masks": "[S, N] or [N]",
}


def load_npz(path: Path, split: int) -> Dataset:
    """Read arrays `node_features [N, F]`, `node_labels [N]`, `edges [E, 2]` and three masks `[S, N]` or `[N]`.

    Edges are undirected, each listed once or twice. Labels are classes 0 … K−1. The metric is accuracy.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is not a whole npz, an array is missing (which one, and the shape it must have), has
            another shape, or holds a node that does not exist.
    """
    arrays = _read_arrays(path)
    num_nodes = len(arrays["node_features"])
    _check_arrays(path, arrays, num_nodes)
    edges = np.concatenate([arrays["edges"], arrays["edges"][:, ::-1]])
    edges = np.unique(edges, axis=0) if len(edges) else edges
    masks = {role: torch.from_numpy(np.atleast_2d(arrays[f"{role}_masks"]).astype(bool).T) for role in
             ("train", "val", "test")}  # fmt: skip
    graph = Graph(
        torch.from_numpy(arrays["node_features"].astype(np.float32)),
        torch.from_numpy(edges.T.astype(np.int64).copy()),
        torch.from_numpy(arrays["node_labels"].astype(np.int64)),
        **pick_split(path.name, masks, split),
    )
    return Dataset(path.stem, (graph,), "accuracy", int(graph.y.max()) + 1 if num_nodes else 1)


def _read_arrays(path: Path) -> dict[str, Any]:
    if not path.exists():
        raise FileNotFoundError(f"dataset {path} does not exist")
    if not zipfile.is_zipfile(path):
        raise ValueError(f"{path} is not a whole npz file")
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files if name in _ARRAYS}
    except (zipfile.BadZipFile, zlib.error, EOFError, OSError, ValueError) as error:
        raise ValueError(f"{path} is not a whole npz file: {error}") from error
    missing = [f"{name} {shape}" for name, shape in _ARRAYS.items() if name not in arrays]
    if missing:
        raise ValueError(f"{path} lacks the array {', '.join(missing)}")
    return arrays


def _check_arrays(path: Path, arrays: dict[str, Any], num_nodes: int) -> None:
    def refuse(name: str, want: str) -> None:
        array = arrays[name]
        raise ValueError(f"{path}: {name} must be {want}, got shape {list(array.shape)}, dtype {array.dtype}")

    if arrays["node_features"].ndim != 2 or arrays["node_features"].dtype.kind not in "fiub":
        refuse("node_features", "numbers [N, F]")
    if arrays["node_labels"].shape != (num_nodes,) or arrays["node_labels"].dtype.kind not in "iub":
        refuse("node_labels", f"integers [N] with N = {num_nodes}")
    if num_nodes and arrays["node_labels"].min() < 0:
        raise ValueError(f"{path}: node_labels must be classes >= 0, got {arrays['node_labels'].min()}")
    edges = arrays["edges"]
    if edges.ndim != 2 or edges.shape[1] != 2 or edges.dtype.kind not in "iu":
        refuse("edges", "integers [E, 2]")
    if edges.size and (edges.min() < 0 or edges.max() >= num_nodes):
        bad = edges.min() if edges.min() < 0 else edges.max()
        raise ValueError(f"{path}: edges must join nodes 0 to {num_nodes - 1}, got node {bad}")
    for name in ("train_masks", "val_masks", "test_masks"):
        mask = arrays[name]
        if mask.ndim not in (1, 2) or mask.shape[-1] != num_nodes or mask.dtype.kind not in "biu":
            refuse(name, f"bool [S, N] or [N] with N = {num_nodes}")
