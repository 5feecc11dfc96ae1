"""OGB's node-property data sets. All that is particular to the `ogb` package stays in this file."""

from __future__ import annotations

import os
import warnings
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from randbatch._errors import InvalidValue
from randbatch._optional import require
from randbatch.train.data.graph import Dataset, Graph, Metric
from randbatch.train.data.reading import check_regular_files, reading

__all__ = ["OGB_DATASETS", "load_ogb"]

OGB_DATASETS = ("ogbn-arxiv", "ogbn-papers100M", "ogbn-products", "ogbn-proteins")


def load_ogb(name: str, root: Path, split: int) -> Dataset:
    """Load a data set of `OGB_DATASETS`, downloading it under `root` if it is not there.

    Edges are made undirected. ogbn-proteins has features on its edges only; each node gets their mean. The unlabelled
    nodes of ogbn-papers100M have no role.

    ogb unpickles files under `root`, which runs any code that lies there: load from a folder of your own.

    Raises:
        MissingExtra: ogb is not installed.
        MissingFile: the files are not under `root` and cannot be downloaded.
        InvalidValue: `split` is not 0, OGB has one split; or the files are damaged.
    """
    if split != 0:
        raise InvalidValue(f"split must be 0 for {name!r}, which has one official split, got {split}")
    dataset_class = require("ogb.nodeproppred").NodePropPredDataset
    to_undirected = require("torch_geometric.utils").to_undirected
    check_regular_files(root, name)
    with reading(name, root):
        with _pickles_of_ogb():
            dataset = dataset_class(name=name, root=str(root))
            graph, labels = dataset[0]
            roles = dataset.get_idx_split()
        num_nodes = int(graph["num_nodes"])
        edge_index = torch.from_numpy(graph["edge_index"]).long()
        x = graph["node_feat"]
        features = _mean_of_edges(edge_index, graph, num_nodes) if x is None else torch.from_numpy(x).float()
        several = name == "ogbn-proteins"
        y = torch.tensor(labels)
        y = y.float() if several else y.squeeze(1).nan_to_num(nan=-1.0).long()
        masks: dict[str, Tensor] = {}
        for role, ours in (("train", "train"), ("valid", "val"), ("test", "test")):
            chosen = torch.tensor(roles[role])
            masks[ours] = torch.zeros(num_nodes, dtype=torch.bool).index_fill_(0, chosen, True)
        edge_index = to_undirected(edge_index, num_nodes=num_nodes)
        metric: Metric = "rocauc" if several else "accuracy"
        num_outputs = y.shape[1] if several else int(y.max()) + 1
        return Dataset(name, (Graph(features, edge_index, y, **masks),), metric, num_outputs)


def _mean_of_edges(edge_index: Tensor, graph: dict[str, Any], num_nodes: int) -> Tensor:
    edge_feat = torch.from_numpy(graph["edge_feat"]).float()
    total = torch.zeros(num_nodes, edge_feat.shape[1]).index_add_(0, edge_index[1], edge_feat)
    return total / torch.bincount(edge_index[1], minlength=num_nodes).clamp(min=1).unsqueeze(1)


@contextmanager
def _pickles_of_ogb() -> Generator[None]:
    """Let `torch.load` read the files that ogb itself has written, as it did before torch 2.6."""
    name = "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"
    before = os.environ.get(name)
    os.environ[name] = "1"
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", f"Environment variable {name} detected", UserWarning)
            yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before
