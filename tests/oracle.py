"""What random batch attention should give: its formulas over all N × N pairs, from the documentation alone.

The package is asked for nothing but partitions, which say who meets whom, and for the number of rounds that a tolerance
takes. The formulas are plain torch in the dtype of their inputs: in float64 they are the judge, and in the dtype of the
call they are what the call's own error is measured by.

Shape letters: N tokens, H heads, D head size of query and key, Dv of value, C channels.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

import randbatch as rb

# --------------------------------------------------------------------------------------------------- who meets whom


def same_graph(batch: Tensor | None, num_tokens: int) -> Tensor:
    """Bool `[N, N]`: the others of a token's own graph."""
    own = torch.zeros(num_tokens, dtype=torch.int64) if batch is None else batch
    return (own[:, None] == own[None, :]).fill_diagonal_(False)


def labels(part: rb.Partition) -> Tensor:
    """int64 `[N]`: the number of each token's batch."""
    widths = torch.tensor([width for rows, width in part.groups for _ in range(rows)], dtype=torch.int64)
    found = torch.empty_like(part.order)
    found[part.order] = torch.arange(len(widths)).repeat_interleave(widths)
    return found


def met_in(part: rb.Partition) -> Tensor:
    """Bool `[N, N]`: the others in a token's batch."""
    return same_graph(labels(part), part.num_tokens)


def met_in_rounds(num_tokens: int, batch_size: int, rounds: int, batch: Tensor | None, seed: int) -> Tensor:
    """Bool `[N, N]`: the others that a token meets in R rounds, where a seed says which.

    One round is `random_partition`. More are the first of `orthogonal_partitions`: of each graph as many as let its
    tokens meet R (p − 1) others, going by the smallest batch that the graph has (by the average where that is one
    token); all of them, where more are needed than there are lines in the first direction.
    """
    if rounds == 1:
        return met_in(rb.random_partition(num_tokens, batch_size, batch=batch, seed=seed))
    parts = rb.orthogonal_partitions(num_tokens, batch_size, 10**9, batch=batch, seed=seed)
    met = torch.zeros(num_tokens, num_tokens, dtype=torch.bool)
    graph = torch.zeros(num_tokens, dtype=torch.int64) if batch is None else batch
    for number in graph.unique().tolist():
        own = graph == number
        sizes = labels(parts[0])[own].unique(return_counts=True)[1]
        smallest = int(sizes.min()) - 1
        others = smallest if smallest > 0 else float((sizes * (sizes - 1)).sum()) / int(sizes.sum())
        wanted = math.ceil(rounds * (batch_size - 1) / others) if others else 1
        for part in parts[: wanted if wanted <= len(sizes) else None]:
            met |= met_in(part) & own[:, None]
    return met


def observe(call: Callable[[Tensor], Tensor], tokens: Tensor) -> Tensor:
    """Bool `[N, N]`: who meets whom in `call`, from tokens `[N, C]` to `[N, …]`: whose output changes with a token.

    For what derives its seeds from something that is not public. Every call must draw the same batches.
    """
    with torch.no_grad():
        before = call(tokens)
        met = torch.zeros(len(tokens), len(tokens), dtype=torch.bool)
        for token in range(len(tokens)):
            changed = tokens.clone()
            changed[token] = 0.5 - tokens[token]
            met[:, token] = (call(changed) != before).flatten(1).any(dim=1)
    return met.fill_diagonal_(False)


def check_met(met: Tensor, batch_size: int, rounds: int, batch: Tensor | None) -> None:
    """That what was observed is random batches as they are documented: balanced, in one graph, R (p − 1) others."""
    num_tokens = len(met)
    same = same_graph(batch, num_tokens)
    assert torch.equal(met, met.T), "a token met another that did not meet it"
    assert not bool((met & ~same).any()), "graphs were mixed"
    if rounds == 1:
        together = met.clone().fill_diagonal_(True)
        assert torch.equal(together, (together.double() @ together.double()) > 0), "batches overlap"
        size = same.sum(dim=1) + 1
        batches = (size + batch_size - 1).div(batch_size, rounding_mode="floor")
        low, high = size.div(batches, rounding_mode="floor"), (size + batches - 1).div(batches, rounding_mode="floor")
        widths = together.sum(dim=1)
        assert bool(((widths >= low) & (widths <= high)).all()), "batches are not balanced"
    else:
        want = met_in_rounds(num_tokens, batch_size, rounds, batch, 0)
        for row in same.clone().fill_diagonal_(True).unique(dim=0):
            counts = [each[row].sum(dim=1).sort().values for each in (met, want)]
            assert torch.equal(*counts), "tokens met another number of others"


def check_likeness(met: Tensor, batch: Tensor | None, *, alike: bool) -> None:
    """That graphs of one size are split alike where a seed is fixed, and independently where it is drawn."""
    graph = torch.zeros(len(met), dtype=torch.int64) if batch is None else batch
    of_size: dict[int, list[Tensor]] = {}
    for number in graph.unique().tolist():
        own = (graph == number).nonzero().squeeze(1)
        split = not bool((met[own][:, own] | torch.eye(len(own), dtype=torch.bool)).all())
        if split and len(own) >= 16:  # smaller ones may be split alike by chance
            of_size.setdefault(len(own), []).append(met[own][:, own])
    for first, *others in of_size.values():
        for other in others:
            assert torch.equal(first, other) == alike, f"two graphs of {len(first)} tokens are {alike=}"


# ----------------------------------------------------------------------------------------------------------- formulas


def log_kappa(met: Tensor, same: Tensor) -> Tensor:
    """`[N]`: log of κ = (n − 1) / |S_i|, n the size of the token's graph, S_i the others that it met."""
    number = met.sum(dim=1)
    return torch.where(number > 0, same.sum(dim=1).double() / number.clamp(min=1), 1.0).log()


def weights(query: Tensor, key: Tensor, met: Tensor, same: Tensor, *, estimator: str, scale: float | None) -> Tensor:
    """`[H, N, N]`: softmax over S_i and i itself; debiased counts each of S_i κ times."""
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    logits = _products(query, key) * scale
    if estimator == "debiased":
        logits = logits + torch.where(met, log_kappa(met, same)[:, None], 0.0).to(logits.dtype)
    return torch.softmax(logits.masked_fill(~_with_itself(met), -math.inf), dim=-1)


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    met: Tensor,
    same: Tensor,
    *,
    interaction: str = "softmax",
    estimator: str = "plain",
    scale: float | None = None,
) -> Tensor:
    """`[N, H, Dv]`, from query and key `[N, H, D]` and value `[N, H, Dv]`."""
    if interaction == "softmax":
        of_pairs = weights(query, key, met, same, estimator=estimator, scale=scale)
    else:
        unnormalised = _products(F.elu(query) + 1, F.elu(key) + 1)
        if estimator == "debiased":
            kappa = torch.where(met, log_kappa(met, same).exp()[:, None], 1.0)
            unnormalised = unnormalised * kappa.to(unnormalised.dtype)
        unnormalised = unnormalised * _with_itself(met)
        of_pairs = unnormalised / unnormalised.sum(dim=-1, keepdim=True)
    return (of_pairs @ value.transpose(0, 1)).transpose(0, 1)


def _products(query: Tensor, key: Tensor) -> Tensor:
    return query.transpose(0, 1) @ key.permute(1, 2, 0)  # [H, N, N]


def _with_itself(met: Tensor) -> Tensor:
    return met | torch.eye(len(met), dtype=torch.bool)


def multi_head(
    tokens: Tensor, parameters: dict[str, Tensor], num_heads: int, attend: Callable[[Tensor, Tensor, Tensor], Tensor]
) -> Tensor:
    """torch's multi-head self-attention `[N, C]` around `attend`, with the names of its parameters."""
    projected = F.linear(tokens, parameters["in_proj_weight"], parameters.get("in_proj_bias"))
    out = attend(*(x.unflatten(1, (num_heads, -1)) for x in projected.chunk(3, dim=1)))
    return F.linear(out.flatten(1), parameters["out_proj.weight"], parameters.get("out_proj.bias"))


def graph_transformer(
    tokens: Tensor, parameters: dict[str, Tensor], num_heads: int, attend: Callable[[Tensor, Tensor, Tensor], Tensor]
) -> Tensor:
    """`GraphTransformer` of one layer without message passing: h + attention(LN h), h + MLP(LN h), head(LN h)."""

    def linear(x: Tensor, name: str) -> Tensor:
        return F.linear(x, parameters[f"{name}.weight"], parameters[f"{name}.bias"])

    def norm(x: Tensor, name: str) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], parameters[f"{name}.weight"], parameters[f"{name}.bias"])

    prefix = "layers.0.attention."
    own = {name.removeprefix(prefix): x for name, x in parameters.items() if name.startswith(prefix)}
    h = linear(tokens, "embed")
    h = h + multi_head(norm(h, "layers.0.attention_norm"), own, num_heads, attend)
    h = h + linear(F.gelu(linear(norm(h, "layers.0.mlp.0"), "layers.0.mlp.1")), "layers.0.mlp.4")
    return linear(norm(h, "norm"), "head")


def averaged(tokens: Tensor, blocks: Sequence[Tensor], rounds: int, apply: Callable[[Tensor], Tensor]) -> Tensor:
    """`RandomBatch`: a function of sets `[M, P, C]` on every batch of tokens, and the mean of R rounds."""
    total = apply(tokens[None])[0] * 0  # of the right shape
    for block in blocks:
        total = total.index_add(0, block.flatten(), apply(tokens[block]).flatten(0, 1).to(total.dtype))
    return total / rounds


# ------------------------------------------------------------------------------------------------------------- errors

Results = dict[str, Tensor]
"""Outputs and derivatives by name; the first word is their kind."""

# In the last place, beside twice the error of the plain formula. What is computed exactly is rounded once. Where an
# exponential is computed again from a log-sum-exp, a logit of 10 has 10 of them, which half precision, whose sums are
# of float32, does not see; and where a gradient cancels (a token alone), what is left is of the size of its terms.
UNITS = {torch.float64: 64, torch.float32: 8, torch.bfloat16: 2, torch.float16: 2}


@dataclass
class Rounded:
    """What the plain formula gives in a dtype of torch, and what it gives there in float64."""

    plain: Results
    exact: Results

    def error(self, name: str) -> float:
        """As a norm."""
        return float((self.plain[name].double() - self.exact[name]).norm())

    def relative_error(self, name: str) -> float:
        """The same for an error of the size of its result."""
        return relative_error(self.plain[name], self.exact[name])


def relative_error(found: Tensor, exact: Tensor) -> float:
    """`‖ŷ − y‖ / ‖y‖`; 0 where there is nothing."""
    size = float(exact.norm())
    return float((found.double() - exact).norm()) / size if size > 0 else 0.0


def check_errors(found: Results, exact: Results, rounded: Rounded) -> None:
    """That each error is at most twice that of the plain formula in the same dtype, and some units in the last place.

    For float64 the plain formula is rounded in float32, in units of that. A derivative may vanish where what it is the
    sum of does not: the units are those of the largest of its kind, of a second derivative also those of the first.
    """
    assert list(found) == list(exact) == list(rounded.plain)
    sizes: dict[str, float] = {}
    for name, x in exact.items():
        kind = name.split()[0]
        sizes[kind] = max(sizes.get(kind, 0.0), float(x.norm()))
    if "second" in sizes:
        sizes["second"] = max(sizes["second"], sizes["gradient"])
    for name, ours in found.items():
        truth, theirs = exact[name], rounded.plain[name]
        single = ours.dtype == torch.float64 and theirs.dtype == torch.float32
        assert single or ours.dtype == theirs.dtype, f"{name} is {ours.dtype}; torch makes it {theirs.dtype}"
        assert ours.shape == truth.shape, f"{name} has shape {list(ours.shape)}, not {list(truth.shape)}"
        assert bool(ours.isfinite().all()), f"{name} is not finite"
        error = float((ours.double() - truth).norm())
        of_plain = rounded.error(name) * torch.finfo(ours.dtype).eps / torch.finfo(theirs.dtype).eps
        unit = max(UNITS[x.dtype] * torch.finfo(x.dtype).eps for x in found.values())  # the coarsest, under autocast
        size = sizes[name.split()[0]]
        limit = 2 * of_plain + unit * size + torch.finfo(ours.dtype).tiny
        assert error <= limit, f"{name} is off by {error:.2e}, limit {limit:.2e}, plain {of_plain:.2e}, size {size:.2e}"


def check_range(out: Tensor, value: Tensor, same: Tensor) -> None:
    """`corrected` is a weighted mean of the values of a token's graph, or brought back to their range."""
    slack = torch.finfo(out.dtype).eps * value.abs().max() if value.numel() else 0.0
    for token, row in enumerate(_with_itself(same)):
        low, high = value[row].amin(dim=0) - slack, value[row].amax(dim=0) + slack
        assert bool(((out[token] >= low) & (out[token] <= high)).all()), f"token {token} lies beyond all values"


def mean_field(query: Tensor, key: Tensor, value: Tensor, sets: Tensor, scale: float | None) -> tuple[Tensor, Tensor]:
    """`G = v̄ + scale · Cov(v, k) q` and v̄ of the set of each token, which is a row of `sets`; `[N, H, Dv]` each."""
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    share = sets.to(query.dtype) / sets.sum(dim=1, keepdim=True)
    mean_key, mean_value = (torch.einsum("ij,jhd->ihd", share, x) for x in (key, value))
    covariance = torch.einsum("ij,jhd,jhe->ihde", share, key, value)
    covariance = covariance - mean_key.unsqueeze(3) * mean_value.unsqueeze(2)
    return mean_value + scale * torch.einsum("ihd,ihde->ihe", query, covariance), mean_value


def check_combined(
    out: Tensor, query: Tensor, key: Tensor, value: Tensor, met: Tensor, same: Tensor, scale: float | None
) -> None:
    """In float64, `corrected` in one round is what it says, `v̄ + μ (A_δ − v̄) + β (G − v̄) + ν (G − G_C)`.

    δ, μ, β and ν of each graph and head are not known, but the same for all its tokens and channels.
    """
    of_set, mean = mean_field(query, key, value, _with_itself(same), scale)
    of_batch, _ = mean_field(query, key, value, _with_itself(met), scale)
    local = [attention(query, key, value, met, same, estimator=name, scale=scale) for name in ("plain", "debiased")]
    for row in _with_itself(same).unique(dim=0):
        low, high = value[row].amin(dim=0), value[row].amax(dim=0)
        for head in range(out.shape[1]):
            inside = ((out[row] > low) & (out[row] < high))[:, head]  # the rest was brought back
            target = (out - mean)[row][:, head][inside]
            residuals = []
            for each in local:
                terms = [x[row][:, head][inside] for x in (each - mean, of_set - mean, of_set - of_batch)]
                design = torch.stack(terms, dim=1)
                weights = torch.linalg.lstsq(design, target.unsqueeze(1), driver="gelsd").solution
                residuals.append(float((design @ weights - target.unsqueeze(1)).norm()))
            limit = 1e-9 * float(value[row].norm())
            assert min(residuals) <= limit, f"no weights give it: {min(residuals):.1e} is left, limit {limit:.1e}"


def check_kept(out: Tensor, of_pairs: Tensor, dropout_p: float) -> None:
    """With all values 1, the mean of the kept weights / (1 − p) `[N, H]` is 1, within six of its standard errors."""
    squares = float(of_pairs.double().square().sum())
    number = of_pairs.shape[0] * of_pairs.shape[1]
    error = math.sqrt(squares * dropout_p / (1 - dropout_p)) / number
    mean = float(out.double().mean())
    limit = 6 * error + torch.finfo(out.dtype).eps
    assert abs(mean - 1) <= limit, f"the mean of kept weights is {mean:.4f}, standard error {error:.4f}"


def check_steps(out: Tensor, of_pairs: Tensor, dropout_p: float) -> None:
    """With all values 1 and all logits equal, an output is a number of others' weights / (1 − p), and maybe its own.

    So p is seen exactly; not in half precision.
    """
    if torch.finfo(out.dtype).eps > 1e-6:
        return
    own = of_pairs.diagonal(dim1=1, dim2=2).T  # [N, H], as the output is
    others = (of_pairs - torch.diag_embed(own.T)).amax(dim=2).T.clamp(min=1e-300)
    kept = out.double() * (1 - dropout_p)
    steps = torch.stack([kept, kept - own]) / others
    off = torch.where(others > 1e-200, (steps - steps.round()).abs(), torch.stack([kept, kept - own])).amin(dim=0)
    assert float(off.max()) < 1e-4, f"kept weights are not 1 / (1 − {dropout_p}) of what they were"
