"""Local message passing: torch_geometric's convolutions by name, and the adjacency each runs fastest on."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor, nn

from randbatch._checks import check_choice
from randbatch._optional import require
from randbatch._shapes import Int

__all__ = ["CONVOLUTIONS", "check_edges", "make_convolution", "prepare_edges"]

CONVOLUTIONS = ("gcn", "sage", "gat", "gin", "off")


def make_convolution(name: str, channels: int, heads: int) -> nn.Module | None:
    """The convolution called `name`, C channels to C channels, or None for `"off"`.

    It is called as `conv(x, *edges)` with `edges` from `prepare_edges`.
    """
    check_choice("local", name, CONVOLUTIONS)
    if name == "off":
        return None
    pyg = require("torch_geometric.nn")
    if name == "gcn":
        return pyg.GCNConv(channels, channels, normalize=False)  # `prepare_edges` normalises, once for all layers
    if name == "sage":
        return pyg.SAGEConv(channels, channels)
    if name == "gat":
        return pyg.GATConv(channels, channels // heads, heads=heads)
    mlp = nn.Sequential(nn.Linear(channels, 2 * channels), nn.GELU(), nn.Linear(2 * channels, channels))
    return pyg.GINConv(mlp, train_eps=True)


def check_edges(edge_index: Tensor, num_nodes: int) -> None:
    """Check that edges are int64 `[2, E]` between nodes 0 … N−1."""
    if edge_index.dtype != torch.int64:
        raise TypeError(f"edge_index must be int64, got {edge_index.dtype}")
    if edge_index.dim() != 2 or edge_index.shape[0] != 2:
        raise ValueError(f"edge_index must have shape [2, E], got {list(edge_index.shape)}")
    if edge_index.numel() and not torch.compiler.is_compiling():
        low, high = (int(end) for end in torch.aminmax(edge_index))
        if low < 0 or high >= num_nodes:
            raise ValueError(f"edge_index must hold nodes 0 to {num_nodes - 1}, got {low if low < 0 else high}")


def prepare_edges(
    name: str,
    edge_index: Int[Tensor, "2 e"],
    num_nodes: int,
    dtype: torch.dtype = torch.float32,
    *,
    sparse: bool = True,
) -> tuple[Tensor, ...]:
    """What the convolution called `name` takes beside the features, in the form it runs fastest on.

    gcn, sage and gin multiply by a sparse CSR matrix `[N, N]` (row = target), which never stores a message per edge;
    an edge that is listed twice counts once. gcn's edges are normalised and have self-loops. gat weighs each edge, so
    it keeps `[2, E]`. So do all of them if not `sparse`, for `torch.compile`, and on a CPU build of torch without MKL,
    which has no sparse product.
    """
    check_choice("local", name, CONVOLUTIONS)
    check_edges(edge_index, num_nodes)
    if name in ("gat", "off"):
        return (edge_index,)
    weight = None
    if name == "gcn":
        norm = require("torch_geometric.nn.conv.gcn_conv").gcn_norm
        edge_index, weight = norm(edge_index, None, num_nodes, add_self_loops=True, dtype=dtype)
    if weight is None:
        edge_index = require("torch_geometric.utils").coalesce(edge_index, num_nodes=num_nodes)
    if not (sparse and (edge_index.is_cuda or torch.backends.mkl.is_available())):
        return (edge_index,) if weight is None else (edge_index, weight)
    if weight is None:
        weight = torch.ones(edge_index.shape[1], dtype=dtype, device=edge_index.device)
    with warnings.catch_warnings(), torch.sparse.check_sparse_tensor_invariants(True):
        warnings.filterwarnings("ignore", "Sparse CSR tensor support is in beta", UserWarning)
        csr = require("torch_geometric.utils").to_torch_csr_tensor
        return (csr(edge_index.flip(0), weight, size=(num_nodes, num_nodes)),)
