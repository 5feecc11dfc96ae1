"""Error of every estimator against exact attention, layer by layer and head by head, from a sample of queries.

Shape letters: N tokens, H heads, S sampled queries, D head size of query and key, E of value.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from randbatch._checks import check_integer, check_positive
from randbatch._shapes import Float, Int
from randbatch.analysis.instrument import check_compared, measure_attention
from randbatch.analysis.report import draw, tables
from randbatch.estimators import ESTIMATORS
from randbatch.estimators.probe import Probe, SetsOf, log_attention_of
from randbatch.partition import fold_seed, random_partition
from randbatch.partition.sets import largest_set
from randbatch.tolerance import RoundsChoice, choose_rounds, finite_tokens, sample_tokens

__all__ = ["AttentionErrors", "HeadErrors", "LayerErrors", "attention_error"]


@dataclass(frozen=True)
class HeadErrors:
    """One head.

    Attributes:
        head: its number.
        n_eff: effective number of tokens that a query attends to, `1 / Σ_j a_ij²`, mean over the queries.
        entropy: of a row of the attention matrix, `−Σ_j a_ij log a_ij` in nats, mean over the queries.
        error: relative error `‖ŷ − y‖ / ‖y‖` of this head, by estimator and batch size.
    """

    head: int
    n_eff: float
    entropy: float
    error: dict[str, dict[int, float]]


@dataclass(frozen=True)
class LayerErrors:
    """One attention module.

    Attributes:
        layer: its path in the model.
        num_tokens: N, and of the largest set where there are several.
        heads: each head.
        error: relative error of all heads together, by estimator and batch size.
        batch_size_needed: the p at which the error is expected to reach the tolerance, by estimator: the power law
            `error = c · (1/(p−1) − 1/(N−1))^a` through the measured errors, N where it does not fall.
        rounds_needed: orthogonal rounds of the smallest batch size that were found to reach it; those with a stated
            error above the tolerance were stopped.
    """

    layer: str
    num_tokens: int
    heads: list[HeadErrors]
    error: dict[str, dict[int, float]]
    batch_size_needed: dict[str, int]
    rounds_needed: dict[str, RoundsChoice]


@dataclass(frozen=True)
class AttentionErrors:
    """What `attention_error` found; `print` it for a table, `to_dict` it for JSON, `draw` it for a picture.

    Attributes:
        layers: one entry for each attention module, in the order of the forward pass.
        tolerance: the relative error that `batch_size_needed` and `rounds_needed` are for.
        num_queries: how many queries were compared.
    """

    layers: list[LayerErrors]
    tolerance: float
    num_queries: int

    def to_dict(self) -> dict[str, Any]:
        """Plain dicts, lists, strings and numbers."""
        return asdict(self)

    def draw(self, path: str | Path) -> None:
        """Write a PNG: error against batch size for every layer, and n_eff of every head. Needs matplotlib."""
        draw(self.to_dict(), Path(path))

    def __str__(self) -> str:
        return tables(self.to_dict())


@dataclass(frozen=True)
class _Plan:
    batch_sizes: tuple[int, ...]
    estimators: tuple[str, ...]
    num_queries: int
    draws: int
    tolerance: float
    max_rounds: int
    seed: int


def attention_error(
    model_or_qkv: nn.Module | Sequence[Tensor],
    *inputs: Any,
    named_inputs: Mapping[str, Any] | None = None,
    batch: Int[Tensor, " n"] | None = None,
    scale: float | None = None,
    batch_sizes: Sequence[int] = (64, 128, 256),
    estimators: Sequence[str] | None = None,
    num_queries: int = 256,
    draws: int = 4,
    tolerance: float = 0.1,
    max_rounds: int = 16,
    seed: int = 0,
) -> AttentionErrors:
    """How far each estimator is from exact attention, and what governs it, in every layer and head.

    A model is run once, in eval, on the inputs given; query, key and value of each of its softmax attentions are looked
    at as they pass. The exact attention of `num_queries` sampled queries is compared with what random batches give at
    those queries: O(S N D) and O(S p D) operations, so it works at N = 10⁶.

    Args:
        model_or_qkv: a model with random batches (`RandomBatchAttention`, whatever `convert` made; convert a copy of a
            model that has none), or query, key `[N, H, D]` and value `[N, H, Dv]`.
        *inputs: positional inputs of the model.
        named_inputs: its keyword inputs.
        batch: integers `[N]`, the graph of each token, for query, key and value only. Default: one graph.
        scale: factor of the logits, for query, key and value only. Default: 1/√D.
        batch_sizes: p >= 2 each, at which errors are measured.
        estimators: the names of those to be measured. Default: all that can be known at a few tokens.
        num_queries: S. Default: 256, errors of about 5 %.
        draws: partitions that a mean squared error is over.
        tolerance: relative error > 0 that `batch_size_needed` and `rounds_needed` are for.
        max_rounds: where the search for rounds stops.
        seed: of the sample and the partitions.

    Returns:
        An `AttentionErrors`.

    Raises:
        TypeError: an argument of another type.
        ValueError: a model without softmax attention in random batches, an unknown estimator, a number out of range.

    Example:
        >>> q, k, v = torch.randn(3, 500, 2, 8).unbind()
        >>> found = attention_error((q, k, v), batch_sizes=(32, 64))
        >>> len(found.layers), len(found.layers[0].heads)
        (1, 2)
    """
    plan = _Plan(
        *check_compared(batch_sizes, estimators),
        check_integer("num_queries", num_queries, 1),
        check_integer("draws", draws, 1),
        check_positive("tolerance", tolerance),
        check_integer("max_rounds", max_rounds, 1),
        check_integer("seed", seed),
    )
    layers = measure_attention(
        model_or_qkv, inputs, named_inputs, batch=batch, scale=scale, measure=functools.partial(_measure, plan)
    )
    return AttentionErrors(layers, plan.tolerance, plan.num_queries)


@torch.no_grad()
def _measure(
    plan: _Plan, layer: str, query: Tensor, key: Tensor, value: Tensor, batch: Tensor | None, scale: float | None
) -> LayerErrors:
    num_tokens = query.shape[0]
    largest = largest_set(num_tokens, batch)
    if largest < 2:
        raise ValueError(f"{layer} must attend over at least 2 tokens, got sets of {largest}")
    factor: float = query.shape[-1] ** -0.5 if scale is None else scale
    tokens = sample_tokens(query, plan.num_queries, plan.seed)
    anything = random_partition(num_tokens, num_tokens, batch=batch, device=query.device)
    exact, n_eff, entropy = _attend_and_describe(query, key, value, tokens, SetsOf(anything, tokens), factor)
    usable = finite_tokens(exact)
    tokens, exact, n_eff, entropy = (x[:, usable] for x in (tokens, exact, n_eff, entropy))
    squared = exact.double().square().sum(dim=(1, 2))  # [H]
    missed = {p: _squared_errors((query, key, value), tokens, exact, p, batch, factor, plan) for p in plan.batch_sizes}
    tiny = torch.finfo(torch.float64).tiny
    of_heads = {
        name: {p: (missed[p][name] / squared.clamp(min=tiny)).sqrt().tolist() for p in plan.batch_sizes}
        for name in plan.estimators
    }
    heads = [
        HeadErrors(
            head,
            float(n_eff[head].mean()),
            float(entropy[head].mean()),
            {name: {p: errors[head] for p, errors in by_p.items()} for name, by_p in of_heads.items()},
        )
        for head in range(query.shape[1])
    ]
    error = {
        name: {p: math.sqrt(float(missed[p][name].sum() / squared.sum().clamp(min=tiny))) for p in plan.batch_sizes}
        for name in plan.estimators
    }
    rounds = {
        name: choose_rounds(
            query, key, value, plan.batch_sizes[0], plan.tolerance,
            batch=batch, estimator=name, scale=scale, seed=plan.seed, max_rounds=plan.max_rounds,
        )
        for name in plan.estimators
    }  # fmt: skip
    needed = {name: _batch_size_for(plan.tolerance, by_p, largest) for name, by_p in error.items()}
    return LayerErrors(layer, largest, heads, error, needed, rounds)


def _squared_errors(
    tensors: tuple[Tensor, Tensor, Tensor],
    tokens: Int[Tensor, "h s"],
    exact: Float[Tensor, "h s e"],
    batch_size: int,
    batch: Tensor | None,
    scale: float,
    plan: _Plan,
) -> dict[str, Float[Tensor, " h"]]:
    """Of each estimator, summed over the queries, on average over the draws."""
    num_tokens = tensors[0].shape[0]
    totals: dict[str, Tensor] = {}
    for number in range(plan.draws):
        seed = fold_seed(plan.seed, number)
        part = random_partition(num_tokens, batch_size, batch=batch, seed=seed, device=exact.device)
        sampled = Probe(*tensors, tokens, scale, [ESTIMATORS[name] for name in plan.estimators])
        sampled.add(part)
        for name, out in sampled.outputs().items():
            error = (out - exact).double().square().sum(dim=(1, 2)) / plan.draws
            totals[name] = totals[name] + error if name in totals else error
    return totals


def _attend_and_describe(
    query: Tensor, key: Tensor, value: Tensor, tokens: Int[Tensor, "h s"], sets: SetsOf, scale: float
) -> tuple[Float[Tensor, "h s e"], Float[Tensor, "h s"], Float[Tensor, "h s"]]:
    """Exact attention of the chosen tokens, `1 / Σ_j a_ij²` and `−Σ_j a_ij log a_ij`."""
    values = value.to(torch.promote_types(value.dtype, torch.float32)).transpose(0, 1)  # [H, N, E]
    outs: list[tuple[Tensor, Tensor, Tensor]] = []
    for log_weights in log_attention_of(query, key, tokens, sets, scale):
        weights = log_weights.exp()
        surprise = (weights * log_weights.clamp(min=torch.finfo(weights.dtype).min)).sum(dim=-1)  # 0 · −∞ is 0
        outs.append((weights @ values, 1 / weights.square().sum(dim=-1), -surprise))
    out, n_eff, entropy = (torch.cat(x, dim=1) for x in zip(*outs, strict=True))
    return out, n_eff, entropy


def _batch_size_for(tolerance: float, error: Mapping[int, float], num_tokens: int) -> int:
    """Where the power law through the measured errors meets the tolerance; a square-root law if there is one only."""
    enough = min((p for p, e in error.items() if e <= tolerance), default=num_tokens)
    points = [(1 / (p - 1) - 1 / (num_tokens - 1), e) for p, e in error.items() if p < num_tokens and e > 0]
    if not points:
        return min(enough, num_tokens)
    x, y = ([math.log(point[axis]) for point in points] for axis in (0, 1))
    mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
    spread = sum((a - mean_x) ** 2 for a in x)
    slope = sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True)) / spread if spread > 0 else 0.5
    if slope <= 0:
        return enough
    wanted = math.exp(mean_x + (math.log(tolerance) - mean_y) / slope)
    law = math.ceil(1 + 1 / (wanted + 1 / (num_tokens - 1)) - 1e-6)
    size = max(min(law, enough, num_tokens), 2)
    return -(-num_tokens // (num_tokens // size))  # batches are balanced: between N/2 and N there is no size
