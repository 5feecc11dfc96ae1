"""Local message passing: torch_geometric's convolutions by name, and the adjacency each runs fastest on."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from randbatch._autograd import pull_back, refuse_second_derivative, refuse_transforms
from randbatch._checks import check_choice
from randbatch._numerics import has_no_elements
from randbatch._optional import require
from randbatch._shapes import Float, Int

__all__ = ["CONVOLUTIONS", "check_edges", "make_convolution", "pass_messages", "prepare_edges"]


@dataclass(frozen=True)
class Convolution:
    """A kind of message passing.

    Attributes:
        make: from C channels and heads to the module; None for no message passing.
        normalised: whether edges are weighted, and every node gets a loop, as a GCN has it.
        sums: whether it is a weighted sum over neighbours, which a sparse product computes.
    """

    make: Callable[[int, int], nn.Module] | None
    normalised: bool = False
    sums: bool = True


def _gcn(channels: int, heads: int) -> nn.Module:
    # `prepare_edges` normalises, once for all layers
    return require("torch_geometric.nn").GCNConv(channels, channels, normalize=False)


def _sage(channels: int, heads: int) -> nn.Module:
    return require("torch_geometric.nn").SAGEConv(channels, channels)


def _gat(channels: int, heads: int) -> nn.Module:
    return require("torch_geometric.nn").GATConv(channels, channels // heads, heads=heads)


def _gin(channels: int, heads: int) -> nn.Module:
    mlp = nn.Sequential(nn.Linear(channels, 2 * channels), nn.GELU(), nn.Linear(2 * channels, channels))
    return require("torch_geometric.nn").GINConv(mlp, train_eps=True)


CONVOLUTIONS: dict[str, Convolution] = {
    "gcn": Convolution(_gcn, normalised=True),
    "sage": Convolution(_sage),
    "gat": Convolution(_gat, sums=False),
    "gin": Convolution(_gin),
    "off": Convolution(None),
}


def make_convolution(name: str, channels: int, heads: int) -> nn.Module | None:
    """The convolution called `name`, C channels to C channels, or None where there is none.

    It is called as `conv(x, *edges)` with `edges` from `prepare_edges`.
    """
    make = CONVOLUTIONS[check_choice("local", name, CONVOLUTIONS)].make
    return None if make is None else make(channels, heads)


def pass_messages(conv: nn.Module, x: Float[Tensor, "n c"], edges: tuple[Tensor, ...]) -> Float[Tensor, "n c"]:
    """`conv(x, *edges)`; a sparse product, which torch has not in half dtypes, stays in those of the parameters."""
    if edges[0].layout == torch.strided:
        return conv(x, *edges)
    if not torch.compiler.is_compiling():
        refuse_transforms("a sparse product", _STRIDED)
    if not torch.is_autocast_enabled(x.device.type):
        out = conv(x, *edges)
        if getattr(conv, "aggr", None) == "mean" and out.requires_grad:
            out.register_hook(_refuse_recorded)
        return out
    parameters = dict(conv.named_parameters())
    x = x.to(edges[0].dtype)
    out: Any = _WithoutAutocast.apply(conv, edges, tuple(parameters), x, *parameters.values())
    return out


_STRIDED = "say model.prepare_edges(edge_index, num_nodes, sparse=False)"


def _refuse_recorded(grad: Tensor | None) -> None:
    """Torch's mean over neighbours has no second derivative; its own message does not say what does."""
    refuse_second_derivative("the mean over neighbours by a sparse product", _STRIDED)


class _WithoutAutocast(torch.autograd.Function):
    """A convolution outside of autocast, forward and backward, wherever backward is called; backward runs it again."""

    @staticmethod
    def forward(
        ctx: Any, conv: nn.Module, edges: tuple[Tensor, ...], names: tuple[str, ...], x: Tensor, *parameters: Tensor
    ) -> Tensor:
        ctx.conv, ctx.edges, ctx.names = conv, edges, names
        ctx.save_for_backward(x, *parameters)
        with torch.autocast(x.device.type, enabled=False):
            return conv(x, *edges)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        def formula(x: Tensor, *parameters: Tensor) -> Tensor:
            named = dict(zip(ctx.names, parameters, strict=True))
            return torch.func.functional_call(ctx.conv, named, (x, *ctx.edges))

        inputs = ctx.saved_tensors
        with torch.autocast(inputs[0].device.type, enabled=False):
            if not torch.is_grad_enabled():
                inputs = [x.detach().requires_grad_(x.requires_grad) for x in inputs]
            found = pull_back(formula, inputs, grads)
        if not torch.is_grad_enabled():
            found = [None if x is None else x.detach() for x in found]
        return None, None, None, *found


def check_edges(edge_index: Tensor, num_nodes: int) -> None:
    """Check that edges are int64 `[2, E]` between nodes 0 … N−1."""
    if edge_index.dtype != torch.int64:
        raise TypeError(f"edge_index must be int64, got {edge_index.dtype}")
    if edge_index.dim() != 2 or edge_index.shape[0] != 2:
        raise ValueError(f"edge_index must have shape [2, E], got {list(edge_index.shape)}")
    if edge_index.numel() and not (torch.compiler.is_compiling() or has_no_elements(edge_index)):
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

    An edge that is listed twice counts once. gcn, sage and gin multiply by a sparse CSR matrix `[N, N]` (row = target),
    which never stores a message per edge. gcn's edges are normalised and have self-loops. gat weighs each edge, so it
    keeps `[2, E]`. So do all of them if not `sparse`, for `torch.compile`, and on a CPU in half precision or without
    MKL, where torch has no sparse product.
    """
    kind = CONVOLUTIONS[check_choice("local", name, CONVOLUTIONS)]
    check_edges(edge_index, num_nodes)
    with torch.inference_mode(False):  # they are kept, and training may be next to want them
        return _prepare(kind, edge_index.clone() if edge_index.is_inference() else edge_index, num_nodes, dtype, sparse)


def _prepare(
    kind: Convolution, edge_index: Tensor, num_nodes: int, dtype: torch.dtype, sparse: bool
) -> tuple[Tensor, ...]:
    if kind.make is None:
        return (edge_index,)
    if has_no_elements(edge_index):
        return (edge_index, edge_index.new_ones(edge_index.shape[1], dtype=dtype)) if kind.normalised else (edge_index,)
    edge_index = require("torch_geometric.utils").coalesce(edge_index, num_nodes=num_nodes)
    if not kind.sums:
        return (edge_index,)
    weight = None
    if kind.normalised:
        norm = require("torch_geometric.nn.conv.gcn_conv").gcn_norm
        edge_index, weight = norm(edge_index, None, num_nodes, add_self_loops=True, dtype=dtype)
    on_cpu = torch.backends.mkl.is_available() and dtype in (torch.float32, torch.float64)
    if not (sparse and (edge_index.is_cuda or on_cpu)):
        return (edge_index,) if weight is None else (edge_index, weight)
    if weight is None:
        weight = torch.ones(edge_index.shape[1], dtype=dtype, device=edge_index.device)
    with warnings.catch_warnings(), torch.sparse.check_sparse_tensor_invariants(True):
        warnings.filterwarnings("ignore", "Sparse CSR tensor support is in beta", UserWarning)
        csr = require("torch_geometric.utils").to_torch_csr_tensor
        return (csr(edge_index.flip(0), weight, size=(num_nodes, num_nodes)),)
