"""A data set from one `.npz` file, in the layout of the heterophilous-graphs benchmark."""

from __future__ import annotations

import math
import zipfile
from pathlib import Path
from typing import Any, BinaryIO

import torch

from randbatch._errors import InvalidValue
from randbatch._files import open_regular
from randbatch._optional import require
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

    Edges are undirected, each listed once or twice. Labels are classes 0 … K−1. Masks are bool, or 0 and 1. The metric
    is accuracy. Nothing is unpickled: a file from anywhere may be read.

    Raises:
        MissingFile: there is no such file.
        InvalidValue: the file is not a whole npz, an array is missing (which one, and the shape it must have), has
            another shape or dtype, or holds what `Dataset` refuses.
    """
    np = require("numpy")
    with open_regular(path, links=True) as file:
        arrays = _read_arrays(path, file)
    num_nodes = arrays["node_features"].shape[0] if arrays["node_features"].ndim else 0
    _check_arrays(path, arrays, num_nodes)
    edges = np.concatenate([arrays["edges"], arrays["edges"][:, ::-1]])
    edges = np.unique(edges, axis=0) if len(edges) else edges
    masks: dict[str, torch.Tensor] = {}
    for role in ("train", "val", "test"):
        mask = np.atleast_2d(arrays[f"{role}_masks"]).T
        masks[role] = torch.from_numpy(mask if mask.dtype.kind == "b" else mask.astype(np.int64))
    with np.errstate(over="ignore"):  # what is too large for float32 is inf, and is refused by name
        features = arrays["node_features"].astype(np.float32)
    graph = Graph(
        torch.from_numpy(features),
        torch.from_numpy(edges.T.astype(np.int64).copy()),
        torch.from_numpy(arrays["node_labels"].astype(np.int64)),
        **pick_split(path.name, masks, split),
    )
    return Dataset(path.stem, (graph,), "accuracy", int(graph.y.max()) + 1)


def _read_arrays(path: Path, file: BinaryIO) -> dict[str, Any]:
    try:
        with zipfile.ZipFile(file) as archive:
            arrays = {name: _read_array(archive, name) for name in _ARRAYS if f"{name}.npy" in archive.namelist()}
    except Exception as error:  # zipfile and numpy meet a damaged file with almost any of them
        raise InvalidValue(f"{path} is not a whole npz file: {error}") from error
    missing = [f"{name} {shape}" for name, shape in _ARRAYS.items() if name not in arrays]
    if missing:
        raise InvalidValue(f"{path} lacks the array {', '.join(missing)}")
    return arrays


def _read_array(archive: zipfile.ZipFile, name: str) -> Any:
    """One array, if the file is as long as its header says: memory is not asked for on its word alone."""
    np = require("numpy")
    with archive.open(f"{name}.npy") as member:
        major, _ = np.lib.format.read_magic(member)
        read_header = np.lib.format.read_array_header_1_0 if major == 1 else np.lib.format.read_array_header_2_0
        shape, _, dtype = read_header(member)
        if dtype.kind not in "biuf":
            raise ValueError(f"{name} must hold numbers, it has dtype {dtype}")
        says, holds = math.prod(shape) * dtype.itemsize, archive.getinfo(f"{name}.npy").file_size - member.tell()
    if says != holds:
        raise ValueError(f"{name} has {holds} bytes, not the {says} of its shape {list(shape)}")
    with archive.open(f"{name}.npy") as member:
        return np.lib.format.read_array(member, allow_pickle=False)


def _check_arrays(path: Path, arrays: dict[str, Any], num_nodes: int) -> None:
    def refuse(name: str, want: str) -> None:
        array = arrays[name]
        raise InvalidValue(f"{path}: {name} must be {want}, got shape {list(array.shape)}, dtype {array.dtype}")

    if arrays["node_features"].ndim != 2 or not num_nodes or arrays["node_features"].dtype.kind not in "fiub":
        refuse("node_features", "numbers [N, F]")
    if arrays["node_labels"].shape != (num_nodes,) or arrays["node_labels"].dtype.kind not in "iub":
        refuse("node_labels", f"integers [N] with N = {num_nodes}")
    low, high = int(arrays["node_labels"].min()), int(arrays["node_labels"].max())
    if low < 0 or high >= max(2, num_nodes):
        bad = low if low < 0 else high
        raise InvalidValue(f"{path}: node_labels must be classes >= 0, no more than there are nodes, got {bad}")
    edges = arrays["edges"]
    if edges.ndim != 2 or edges.shape[1] != 2 or edges.dtype.kind not in "iu":
        refuse("edges", "integers [E, 2]")
    if edges.size and (edges.min() < 0 or edges.max() >= num_nodes):
        bad = edges.min() if edges.min() < 0 else edges.max()
        raise InvalidValue(f"{path}: edges must join nodes 0 to {num_nodes - 1}, got node {bad}")
    for name in ("train_masks", "val_masks", "test_masks"):
        mask = arrays[name]
        if mask.ndim not in (1, 2) or mask.shape[-1] != num_nodes or mask.dtype.kind not in "biu":
            refuse(name, f"bool [S, N] or [N] with N = {num_nodes}")
