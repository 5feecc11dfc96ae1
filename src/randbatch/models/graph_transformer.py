"""`GraphTransformer`: local message passing and global attention in every layer.

Shape letters: N nodes, E edges, F input features, C channels, G graphs, K outputs.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from randbatch._autograd import is_transformed
from randbatch._checks import check_batch_vector, check_choice, check_integer, check_probability
from randbatch._numerics import check_tensor, has_no_elements
from randbatch._shapes import Float, Int
from randbatch.interactions import INTERACTIONS
from randbatch.models.local import make_convolution, pass_messages, prepare_edges
from randbatch.nn import RandomBatchAttention, RandomBatchConfig
from randbatch.partition import fold_seed

__all__ = ["ATTENTIONS", "GraphTransformer", "attention_names", "is_random"]

ATTENTIONS: dict[str, Callable[[RandomBatchConfig], RandomBatchConfig | None]] = {
    "rba": lambda config: config,
    "full": lambda config: RandomBatchConfig(sys.maxsize, backend=config.backend),
    "linear": lambda config: RandomBatchConfig(sys.maxsize, interaction="linear"),
    "off": lambda config: None,
}
"""Name → what becomes of the config. `full` and `linear` are the limit in which one batch holds a whole graph."""


def attention_names() -> list[str]:
    """The names that `attention` takes: those of `ATTENTIONS`, and every interaction, in random batches."""
    return [*ATTENTIONS, *(name for name in INTERACTIONS if name not in ATTENTIONS)]


def is_random(attention: str) -> bool:
    """Whether an attention of this name works in random batches."""
    of_mode = ATTENTIONS.get(attention)
    config = RandomBatchConfig(2)
    return of_mode is None or of_mode(config) is config


@dataclass(frozen=True)
class _LayerOptions:
    channels: int
    heads: int
    local: str
    attention: str
    config: RandomBatchConfig
    order: str
    dropout: float
    attention_dropout: float


def _make_attention(options: _LayerOptions, seed: int) -> RandomBatchAttention | None:
    """Global attention by name."""
    of_mode = ATTENTIONS.get(options.attention)
    config = options.config.copy(interaction=options.attention) if of_mode is None else of_mode(options.config)
    if config is None:
        return None
    interaction, _ = config.resolved()
    dropout = options.attention_dropout if interaction.has_dropout else 0.0
    return RandomBatchAttention(options.channels, options.heads, config.copy(seed=seed), dropout=dropout)


class _Layer(nn.Module):
    """Pre-norm residual branches: message passing, global attention, a two-layer MLP.

    `order="then"`: h += conv(norm(h)), then h += attention(norm(h)). `order="beside"`: both read the same norm(h).
    """

    def __init__(self, options: _LayerOptions, seed: int) -> None:
        super().__init__()
        channels = options.channels
        self.beside = options.order == "beside"
        self.conv = make_convolution(options.local, channels, options.heads)
        self.conv_norm = None if self.conv is None else nn.LayerNorm(channels)
        self.attention = _make_attention(options, seed)
        shared = self.beside and self.conv is not None
        self.attention_norm = None if self.attention is None or shared else nn.LayerNorm(channels)
        self.mlp = nn.Sequential(
            nn.LayerNorm(channels),
            nn.Linear(channels, 2 * channels),
            nn.GELU(),
            nn.Dropout(options.dropout),
            nn.Linear(2 * channels, channels),
        )
        self.dropout = nn.Dropout(options.dropout)

    def forward(self, h: Tensor, edges: tuple[Tensor, ...], batch: Tensor | None) -> Tensor:
        normed = h
        if self.conv is not None and self.conv_norm is not None:
            normed = self.conv_norm(h)
            h = h + self.dropout(pass_messages(self.conv, normed, edges))
        if self.attention is not None:
            normed = normed if self.attention_norm is None else self.attention_norm(h)
            h = h + self.dropout(self.attention(normed, batch=batch))
        return h + self.dropout(self.mlp(h))


class GraphTransformer(nn.Module):
    """A graph transformer: L layers of message passing, global attention and an MLP, then a linear head.

    `h ← h + conv(LN h)`, `h ← h + attention(LN h)`, `h ← h + MLP(LN h)`; the head reads `LN h` of each node, or its
    mean over each graph. It needs the `graph` extra, unless `local="off"`.

    Args:
        in_channels: F.
        out_channels: K, one per class or task.
        channels: C, a multiple of `heads`. Default: 64.
        layers: L. Default: 3; with random batches depth also mixes what the batches know.
        heads: attention heads H. Default: 4.
        local: `"gcn"`, `"sage"` (mean), `"gat"`, `"gin"` or `"off"`. Default: `"sage"`, the cheapest.
        attention: `"rba"` (softmax in random batches), `"full"`, `"linear"` (over each whole graph), `"off"`, or the
            name of any other interaction, in random batches.
        batch_size: p of random batches, or a `RandomBatchConfig`. Default: 128.
        order: attention after message passing (`"then"`) or beside it, on the same input (`"beside"`).
        level: `"node"` or `"graph"`: what is predicted.
        dropout: after each branch and inside the MLP. Default: 0.
        input_dropout: on the input features. Default: 0.
        attention_dropout: on attention weights, where there are some. Default: 0.
        seed: the partitions of eval; each layer derives its own. Default: 0.
        **options: any option of `RandomBatchConfig`, for random batches.

    Raises:
        ValueError: an unknown name, a number out of range.
        ImportError: torch_geometric is not installed and `local` is not `"off"`.

    Example:
        >>> model = GraphTransformer(16, 3, channels=32, batch_size=64)
        >>> edge_index = torch.randint(0, 500, (2, 2000))
        >>> model(torch.randn(500, 16), edge_index).shape
        torch.Size([500, 3])
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        channels: int = 64,
        layers: int = 3,
        heads: int = 4,
        local: str = "sage",
        attention: str = "rba",
        batch_size: int | RandomBatchConfig = 128,
        order: Literal["then", "beside"] = "then",
        level: Literal["node", "graph"] = "node",
        dropout: float = 0.0,
        input_dropout: float = 0.0,
        attention_dropout: float = 0.0,
        seed: int = 0,
        **options: Any,
    ) -> None:
        super().__init__()
        numbers = {"in_channels": in_channels, "out_channels": out_channels, "channels": channels, "heads": heads}
        for name, value in numbers.items():
            check_integer(name, value, 1)
        check_integer("layers", layers, 0)
        if channels % heads:
            raise ValueError(f"channels must be a multiple of heads, got {channels} and {heads}")
        check_choice("attention", attention, attention_names())
        check_choice("order", order, ("then", "beside"))
        check_choice("level", level, ("node", "graph"))
        check_probability("dropout", dropout)
        check_probability("input_dropout", input_dropout)
        config = RandomBatchConfig.of(batch_size, options)
        how = _LayerOptions(channels, heads, local, attention, config, order, dropout, attention_dropout)
        self.local = local
        self.level = level
        self.input_dropout = nn.Dropout(input_dropout)
        self.embed = nn.Linear(in_channels, channels)
        self.layers = nn.ModuleList(_Layer(how, fold_seed(seed, layer)) for layer in range(layers))
        self.norm = nn.LayerNorm(channels)
        self.head = nn.Linear(channels, out_channels)

    def prepare_edges(
        self, edge_index: Int[Tensor, "2 e"], num_nodes: int, *, sparse: bool = True
    ) -> tuple[Tensor, ...]:
        """The edges in the form that `forward` runs fastest on; do it once for a graph that is used often.

        `torch.compile` takes no sparse matrix: for a compiled model say `sparse=False`, which keeps a message per edge.
        """
        return prepare_edges(self.local, edge_index, num_nodes, self.head.weight.dtype, sparse=sparse)

    def forward(
        self,
        x: Float[Tensor, "n f"],
        edge_index: Int[Tensor, "2 e"] | tuple[Tensor, ...],
        batch: Int[Tensor, " n"] | None = None,
        num_graphs: int | None = None,
    ) -> Float[Tensor, "m k"]:
        """Predict.

        Args:
            x: features `[N, F]`.
            edge_index: int64 `[2, E]`, from source to target, or the result of `prepare_edges`.
            batch: integers `[N]`, the graph of each node. Default: one graph.
            num_graphs: G, at graph level, where `batch` numbers the graphs 0 … G−1 and some may have no node; they are
                predicted from zeros. Default: max(batch) + 1, which must then be at most N.

        Returns:
            `[N, K]`, or `[G, K]` at graph level.

        Raises:
            TypeError: a wrong dtype.
            ValueError: a wrong shape, an edge to a node that is not there.
        """
        check_tensor("x", x)
        if x.dim() != 2 or x.shape[1] != self.embed.in_features:
            raise ValueError(f"x must have shape [N, {self.embed.in_features}], got {list(x.shape)}")
        check_batch_vector(batch, x.shape[0], x.device)
        if num_graphs is not None:
            check_integer("num_graphs", num_graphs, 1)
        edges = edge_index
        if not isinstance(edges, tuple):  # no transform knows a sparse product
            edges = self.prepare_edges(edges, x.shape[0], sparse=not is_transformed())
        h = self.embed(self.input_dropout(x))
        for layer in self.layers:
            h = layer(h, edges, batch)
        h = self.norm(h)
        return self.head(h if self.level == "node" else _mean_over_graphs(h, batch, num_graphs))


def _mean_over_graphs(
    h: Float[Tensor, "n c"], batch: Int[Tensor, " n"] | None, num_graphs: int | None
) -> Float[Tensor, "g c"]:
    if batch is None:
        batch = torch.zeros(len(h), dtype=torch.int64, device=h.device)
        num_graphs = 1 if num_graphs is None else num_graphs
    if not torch.compiler.is_compiling() or num_graphs is None:
        num_graphs = _count_graphs(batch, num_graphs)
    counts = h.new_zeros(num_graphs).index_add(0, batch, h.new_ones(len(h)))
    total = h.new_zeros(num_graphs, h.shape[1]).index_add(0, batch, h)
    return total / counts.clamp(min=1).unsqueeze(1)  # an empty graph is zero


def _count_graphs(batch: Int[Tensor, " n"], num_graphs: int | None) -> int:
    """G, checked: there is a row for each of 0 … G−1, so numbers must not be ids of any size."""
    if has_no_elements(batch):
        if num_graphs is None:
            raise ValueError("num_graphs must be given where batch is a meta or fake tensor")
        return num_graphs
    largest = int(batch.max()) if len(batch) else -1
    if num_graphs is None and largest >= max(len(batch), 1):
        raise ValueError(
            f"batch must number the graphs 0, 1, 2, …, got {largest} for {len(batch)} nodes; see num_graphs"
        )
    if num_graphs is not None and largest >= num_graphs:
        raise ValueError(f"batch must hold graphs 0 to {num_graphs - 1}, as num_graphs says, got {largest}")
    return largest + 1 if num_graphs is None else num_graphs
