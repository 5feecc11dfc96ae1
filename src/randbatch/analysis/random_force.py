"""A trained network as particles: the random force in its layers against the variance lemma, and what comes of it.

Shape letters: N tokens, H heads, S sampled queries, E head size of value, T batch sizes, R draws.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from randbatch._checks import check_integer
from randbatch._errors import InvalidValue
from randbatch._shapes import Float, Int
from randbatch.analysis.instrument import as_it_was, check_compared, measure_attention, progress_bar
from randbatch.estimators import ESTIMATORS
from randbatch.estimators.probe import Probe, SetsOf, log_attention_of, rows_of
from randbatch.particles.rates import Rate, fit_with_interval, variance_factor
from randbatch.partition import Partition, fold_seed, random_partition
from randbatch.partition.sets import largest_set
from randbatch.tolerance import finite_tokens, sample_tokens

__all__ = ["LayerForce", "OutputErrors", "output_error", "random_force"]


@dataclass(frozen=True)
class LayerForce:
    """The random force `χ_i = ŷ_i − y_i` in a layer, relative to the root mean square of `y_i`.

    Attributes:
        layer: its path in the model.
        num_tokens: N, and of the largest set where there are several.
        lemma: `(mean_i (1/(m−1) − 1/(N−1)) Λ_i)^½` by batch size, with `K_ij = (N−1) a_ij (v_j − y_i)`.
        fluctuation: `(mean_i Var χ_i)^½` by estimator and batch size.
        bias: `(mean_i |E χ_i|²)^½` by estimator and batch size; the lemma's is 0.
    """

    layer: str
    num_tokens: int
    lemma: dict[int, float]
    fluctuation: dict[str, dict[int, float]]
    bias: dict[str, dict[int, float]]


@dataclass(frozen=True)
class _Plan:
    batch_sizes: tuple[int, ...]
    estimators: tuple[str, ...]
    num_queries: int
    draws: int
    seed: int


def random_force(
    model_or_qkv: nn.Module | Sequence[Tensor],
    *inputs: Any,
    named_inputs: Mapping[str, Any] | None = None,
    batch: Int[Tensor, " n"] | None = None,
    scale: float | None = None,
    batch_sizes: Sequence[int] = (32, 64, 128, 256, 512),
    estimators: Sequence[str] | None = None,
    num_queries: int = 256,
    draws: int = 16,
    seed: int = 0,
    progress: bool = False,
) -> list[LayerForce]:
    """Variance and bias of the random force in every layer, against the variance lemma of random batches.

    With the exact normaliser, attention by random batches would be a sum over pairs, `y_i + 1/(m−1) Σ_{j∈C, j≠i} K_ij`
    with `K_ij = (N−1) a_ij (v_j − y_i)`, and the lemma would hold to the letter: no bias, and a variance of
    `(1/(m−1) − 1/(N−1)) Λ_i`, `Λ_i = 1/(N−2) Σ_{j≠i} |K_ij − K̄_i|²`. Softmax by estimated normalisers comes to this as
    batches grow, and how near it is says how far the theory reaches. Computed at sampled queries: O(S N D).

    Args:
        model_or_qkv: a model with random batches, or query, key `[N, H, D]` and value `[N, H, Dv]`.
        *inputs: positional inputs of the model.
        named_inputs: its keyword inputs.
        batch: integers `[N]`, the graph of each token, for query, key and value only. Default: one graph.
        scale: factor of the logits, for query, key and value only. Default: 1/√D.
        batch_sizes: p >= 2 each.
        estimators: the names of those to be measured. Default: all that can be known at a few tokens.
        num_queries: S.
        draws: R >= 2 partitions, over which variance and mean are taken.
        seed: of the sample and the partitions.
        progress: whether to show a progress bar on a terminal; needs tqdm.

    Returns:
        A `LayerForce` for each attention module, in the order of the forward pass.

    Raises:
        TypeError: an argument of another type.
        ValueError: a model without softmax attention in random batches, an unknown estimator, a number out of range.

    Source: Jin, Li, Liu, arXiv 1812.10575 (the variance of the random force).

    Example:
        >>> q, k, v = torch.randn(3, 500, 2, 8, generator=torch.Generator().manual_seed(0)).unbind()
        >>> layer = random_force((q, k, v), batch_sizes=(50,))[0]
        >>> 0.8 < layer.fluctuation["debiased"][50] / layer.lemma[50] < 1.1
        True
    """
    plan = _Plan(*check_compared(batch_sizes, estimators), check_integer("num_queries", num_queries, 1),
                 check_integer("draws", draws, 2), check_integer("seed", seed))  # fmt: skip
    with progress_bar("partition", progress) as tick:
        return measure_attention(
            model_or_qkv,
            inputs,
            named_inputs,
            batch=batch,
            scale=scale,
            measure=functools.partial(_measure, plan, tick),
        )


def _measure(
    plan: _Plan,
    tick: Callable[[], object],
    layer: str,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    batch: Tensor | None,
    scale: float | None,
) -> LayerForce:
    num_tokens = query.shape[0]
    largest = largest_set(num_tokens, batch)
    if largest < 3:
        raise ValueError(f"{layer} must attend over at least 3 tokens for a variance, got sets of {largest}")
    factor: float = query.shape[-1] ** -0.5 if scale is None else scale
    tokens = sample_tokens(query, plan.num_queries, plan.seed)
    whole = random_partition(num_tokens, num_tokens, batch=batch, device=query.device)
    exact, spread = _exact_and_spread(query, key, value, tokens, whole, factor)
    usable = finite_tokens(exact)
    tokens, exact, spread = (x[:, usable] for x in (tokens, exact, spread))
    size = math.sqrt(float(exact.square().sum(dim=-1).mean())) or 1.0
    lemma: dict[int, float] = {}
    fluctuation: dict[str, dict[int, float]] = {name: {} for name in plan.estimators}
    bias: dict[str, dict[int, float]] = {name: {} for name in plan.estimators}
    for p in plan.batch_sizes:
        found: dict[str, list[Tensor]] = {name: [] for name in plan.estimators}
        share = torch.zeros_like(spread)
        for draw in range(plan.draws):
            part = random_partition(
                num_tokens, p, batch=batch, seed=fold_seed(plan.seed, draw), device=query.device
            )  # fmt: skip
            sampled = Probe(query, key, value, tokens, factor, [ESTIMATORS[name] for name in plan.estimators])
            sampled.add(part)
            for name, out in sampled.outputs().items():
                found[name].append(out.double())
            share += _share_of_variance(part, tokens) / plan.draws
            tick()
        lemma[p] = math.sqrt(float((share * spread).mean())) / size
        for name, outs in found.items():
            variance, off = _moments(torch.stack(outs), exact)
            fluctuation[name][p], bias[name][p] = math.sqrt(variance) / size, math.sqrt(off) / size
    return LayerForce(layer, largest, lemma, fluctuation, bias)


def _share_of_variance(part: Partition, tokens: Int[Tensor, "h s"]) -> Float[Tensor, "h s"]:
    """`1/(m−1) − 1/(N−1)` of the chosen tokens; 0 for one that is alone in its set."""
    met, others = (
        part.unpack(count)[tokens].clamp(min=1).double() for count in (part.count_met(), part.count_others())
    )
    return 1 / met - 1 / others


def _exact_and_spread(
    query: Tensor, key: Tensor, value: Tensor, tokens: Int[Tensor, "h s"], whole: Partition, scale: float
) -> tuple[Float[Tensor, "h s e"], Float[Tensor, "h s"]]:
    """Exact attention y of the chosen tokens and Λ, both float64."""
    sets = SetsOf(whole, tokens)
    others = whole.unpack(whole.count_others())[tokens].double()
    values = value.double().transpose(0, 1)  # [H, N, E]
    own = rows_of(value, tokens).double()
    exact: list[Tensor] = []
    squares: list[Tensor] = []
    own_weight: list[Tensor] = []
    start = 0
    for log_weights in log_attention_of(query, key, tokens, sets, scale):
        weights = log_weights.double().exp()
        y = weights @ values
        squared = weights.square()
        # Σ_j a_ij² |v_j − y_i|², by its three terms
        terms = (squared @ values.square().sum(dim=-1, keepdim=True)).squeeze(-1)
        terms = terms - 2 * ((squared @ values) * y).sum(dim=-1) + squared.sum(dim=-1) * y.square().sum(dim=-1)
        chosen = tokens[:, start : start + y.shape[1]]
        start += y.shape[1]
        exact.append(y)
        squares.append(terms)
        own_weight.append(weights.gather(2, chosen.unsqueeze(-1)).squeeze(-1))
    y, total, weight = (torch.cat(parts, dim=1) for parts in (exact, squares, own_weight))
    own_pair = weight.square() * (own - y).square().sum(dim=-1)
    # Σ_{j≠i} a_ij (v_j − y_i) = −a_ii (v_i − y_i), whose square over N − 1 is what the mean K̄ takes away
    spread = others.square() * (total - own_pair - own_pair / others.clamp(min=1)) / (others - 1).clamp(min=1)
    return y, spread.clamp(min=0)


def _moments(outs: Float[Tensor, "r h s e"], exact: Float[Tensor, "h s e"]) -> tuple[float, float]:
    """Mean over queries of the variance and of the squared bias, both without bias of their own."""
    draws = len(outs)
    mean = outs.mean(dim=0)
    variance = float((outs - mean).square().sum(dim=-1).mean()) * draws / (draws - 1)
    off = float((mean - exact).square().sum(dim=-1).mean()) - variance / draws
    return variance, max(off, 0.0)


@dataclass(frozen=True)
class OutputErrors:
    """Errors of a whole model against the same with exact attention, by one estimator.

    Attributes:
        estimator: its name.
        error: `‖f̂(x) − f(x)‖ / ‖f(x)‖` over all outputs, root mean square over the draws, by batch size.
        rate: slope of the error in `1/(p−1) − 1/(N−1)`: ½ where it fluctuates as the lemma says, 1 where a bias of
            order 1/p leads. None: fewer than two batch sizes below N, or an error of 0.
    """

    estimator: str
    error: dict[int, float]
    rate: Rate | None


def output_error(
    model: nn.Module,
    *inputs: Any,
    named_inputs: Mapping[str, Any] | None = None,
    batch_sizes: Sequence[int] = (32, 64, 128, 256, 512),
    estimators: Sequence[str] | None = None,
    draws: int = 8,
    seed: int = 0,
    progress: bool = False,
) -> list[OutputErrors]:
    """End-to-end error of a model in random batches against its exact attention, and how it falls with p.

    The model runs in eval, once exactly and then `draws` times for each estimator and batch size, and is left as it
    was. Exact attention takes O(N²) time.

    Args:
        model: a model with random batches whose output is a tensor, or has one first.
        *inputs: its positional inputs.
        named_inputs: its keyword inputs.
        batch_sizes: p >= 2 each.
        estimators: the names of those to be measured. Default: all that can be known at a few tokens.
        draws: R >= 2.
        seed: of the partitions; every layer and draw has its own.
        progress: whether to show a progress bar on a terminal; needs tqdm.

    Returns:
        An `OutputErrors` for each estimator.

    Raises:
        TypeError: an argument of another type, or an output that is no tensor.
        ValueError: a model without random batches, an unknown estimator, a number out of range.

    Example:
        >>> import randbatch as rb
        >>> model = rb.nn.RandomBatchAttention(8, 2, batch_size=8)
        >>> found = output_error(model, torch.randn(200, 8), batch_sizes=(8, 32), estimators=("plain",))
        >>> found[0].error[8] > found[0].error[32]
        True
    """
    sizes, names = check_compared(batch_sizes, estimators)
    check_integer("draws", draws, 2)
    check_integer("seed", seed)
    passes = len(sizes) * len(names) * draws
    with as_it_was(model) as configs, progress_bar("pass", progress, passes) as tick:
        if not configs:
            raise ValueError(f"model must hold a module with random batches, but {type(model).__name__} holds none")
        largest = 0

        def note(query: Tensor, key: Tensor, value: Tensor, batch: Tensor | None, scale: float | None) -> None:
            nonlocal largest
            largest = max(largest, largest_set(len(query), batch))

        for config in configs.values():
            config.exact_eval, config.observer = True, note
        exact = _output(model, inputs, named_inputs)
        norm = float(exact.square().sum())
        if not 0 < norm < math.inf:
            raise InvalidValue(
                f"the output of model must be finite and not all 0 for a relative error, its norm is {norm}"
            )
        for config in configs.values():
            config.exact_eval, config.observer, config.eval_rounds, config.tolerance = False, None, 1, None
        squared = {name: torch.zeros(len(sizes), draws, dtype=torch.float64) for name in names}
        for place, p in enumerate(sizes):
            for name in names:
                for draw in range(draws):
                    for number, config in enumerate(configs.values()):
                        config.batch_size, config.estimator = p, name
                        config.seed = fold_seed(fold_seed(seed, draw), number)
                    off = _output(model, inputs, named_inputs) - exact
                    squared[name][place, draw] = float(off.square().sum()) / norm
                    tick()
    return [_output_errors(name, sizes, squared[name], largest) for name in names]


def _output(model: nn.Module, inputs: Sequence[Any], named_inputs: Mapping[str, Any] | None) -> Float[Tensor, ...]:
    out = model(*inputs, **(named_inputs or {}))
    first = out if isinstance(out, Tensor) else next(iter(out.values())) if isinstance(out, Mapping) else out[0]
    if not isinstance(first, Tensor):
        raise TypeError(f"model must give a tensor, or one first, got {type(out).__name__}")
    return first.double()


def _output_errors(name: str, sizes: Sequence[int], squared: Tensor, num_tokens: int) -> OutputErrors:
    means = squared.mean(dim=1)
    kept = [place for place, p in enumerate(sizes) if p < num_tokens and float(means[place]) > 0]
    variances = [variance_factor(sizes[place], num_tokens) for place in kept]
    rate = fit_with_interval(variances, squared[kept], torch.sqrt) if len(kept) > 1 else None
    return OutputErrors(name, dict(zip(sizes, means.sqrt().tolist(), strict=True)), rate)
