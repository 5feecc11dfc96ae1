"""What the contract tests share: the names of all entries, the toys' among them, and formulas from definitions alone.

`attend` of an interaction on one block that is a whole set, in float64, is its definition. All else follows from it:
with indicators for values it gives the weights `[N, H, N]`, and with these every estimate from tokens that were met.

Shape letters: N tokens, H heads, D head size.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from toys import registered

import randbatch as rb
from randbatch.cli import main
from randbatch.estimators import ESTIMATORS
from randbatch.interactions import INTERACTIONS, Block, Interaction, Kind, Options, Sets, Softmax
from randbatch.kernels import BACKENDS
from randbatch.nn import RandomBatchAttention
from randbatch.partition import Partition, draw_rounds

with registered():
    INTERACTION_NAMES, ESTIMATOR_NAMES, BACKEND_NAMES = list(INTERACTIONS), list(ESTIMATORS), list(BACKENDS)
    MERGING = [name for name in INTERACTIONS if INTERACTIONS[name].can_merge]
    LAYERED = [name for name in INTERACTIONS if INTERACTIONS[name].projections == Softmax.projections]
    AVERAGING = [name for name in INTERACTIONS if INTERACTIONS[name].averages]
    LEARNED = [name for name in INTERACTIONS if isinstance(INTERACTIONS[name], nn.Module)]
    PAIRS = [(e, i) for e in ESTIMATORS for i in INTERACTIONS]
    SERVED = [(e, i) for e, i in PAIRS if ESTIMATORS[e].why_not(INTERACTIONS[i]) is None]
    REFUSED = [pair for pair in PAIRS if pair not in SERVED]

DELTA = {"plain": 0.0, "halfway": 0.5, "debiased": 1.0}
"""δ of the estimators that have one."""
GRAPHS = torch.tensor([4, 0, 0, 7, 0, 4, 0, 2, 0, 4, 9, 0, 4, 0, 9, 4, 0, 9, 0])  # of 9, 5, 3, 1 and 1 tokens
N = len(GRAPHS)
WIDTH, HEADS = 8, 2  # of layers
EXACT = {"rtol": 1e-11, "atol": 1e-12}

every = pytest.mark.parametrize("name", INTERACTION_NAMES)
every_merging = pytest.mark.parametrize("name", MERGING)
every_layered = pytest.mark.parametrize("name", LAYERED)
every_learned = pytest.mark.parametrize("name", LEARNED)
graphs_or_one = pytest.mark.parametrize("batch", [None, GRAPHS], ids=["one set", "graphs"])


def close(found: Any, want: Any, **bounds: float) -> None:
    torch.testing.assert_close(found, want, **(EXACT | bounds))


MODES: dict[str, dict[str, Any]] = {
    "all at once": {},
    "rounds": {"rounds": 2},
    "chunks": {"chunk_batches": 1},
    "rounds in chunks": {"rounds": 2, "chunk_batches": 1},
}
"""How a call may be computed."""


def make(name: str, dtype: torch.dtype = torch.float64) -> Any:
    """The interaction of a name; parameters of a new one are no longer those of its beginning."""
    found: Any = INTERACTIONS[name]
    if isinstance(found, nn.Module):
        found.to(dtype)
        with torch.no_grad():
            for parameter in found.parameters():
                parameter.add_(0.3)
    return found


def takes(interaction: Interaction, rounds: int = 1, chunk_batches: int | None = None, **_: Any) -> bool:
    """Whether there is a rule for so many rounds, and for some batches at a time; else it is refused."""
    several = rounds == 1 or interaction.can_merge or interaction.averages
    return several and not (chunk_batches and interaction.statistics)


def parameters_of(module: object) -> list[Tensor]:
    return list(module.parameters()) if isinstance(module, nn.Module) else []


def inputs_of(interaction: Interaction, n: int = N, size: int = 4, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """Leaves `[N, H, D]`, one for each projection."""
    drawn = [torch.randn(n, HEADS, size, dtype=torch.float64) for _ in interaction.projections]
    return [x.to(dtype).requires_grad_() for x in drawn]


def layer_of(interaction: str | Interaction, batch_size: int, **options: Any) -> RandomBatchAttention:
    """A layer whose biases are not zero."""
    options = {"dtype": torch.float64, "seed": 5} | options
    layer = RandomBatchAttention(WIDTH, HEADS, batch_size, interaction=interaction, **options).to(options["dtype"])
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.2)
    return layer


def results(out: Tensor, inputs: Iterable[Tensor], *modules: object) -> list[Tensor]:
    """The output, and the gradients of inputs and of parameters."""
    wanted = [*inputs, *(p for module in modules for p in parameters_of(module))]
    grads = torch.autograd.grad(out.sin().sum(), wanted, allow_unused=True, materialize_grads=True)
    return [out, *grads]


def sets_of(batch: Tensor | None, n: int) -> Iterator[Tensor]:
    """The rows of each set."""
    if batch is None:
        yield torch.arange(n)
    else:
        yield from ((batch == number).nonzero().squeeze(1) for number in batch.unique())


def whole_block(interaction: Interaction, projected: list[Tensor], options: Options | None = None) -> Block:
    """What is known of batches of the set that these tokens are."""
    size = torch.tensor([len(projected[0])])
    statistics = interaction.measure(Sets(None, size), *projected) if interaction.statistics else ()
    return Block(options or Options(), size, None, statistics)


def definition(
    interaction: Interaction, projected: list[Tensor], batch: Tensor | None = None, options: Options | None = None
) -> Tensor:
    """The interaction over whole sets."""
    outs, rows = [], list(sets_of(batch, len(projected[0])))
    for some in rows:
        own = [x[some] for x in projected]
        block = whole_block(interaction, own, options)
        outs.append(interaction.attend(block, *(x.unsqueeze(0) for x in own)).squeeze(0))
    return torch.cat(outs)[torch.cat(rows).argsort()]


def in_batches(interaction: Interaction, projected: list[Tensor], part: Partition) -> Tensor:
    """The interaction over every batch of one set, which is not the same as the estimate by some estimators."""
    block = Block(Options(), torch.tensor([len(projected[0])]), None, whole_block(interaction, projected).statistics)
    blocks = zip(*(part.split(part.pack(x)) for x in projected), strict=True)
    return part.unpack(part.join([interaction.attend(block, *each) for each in blocks]))


def weights(interaction: Interaction, projected: list[Tensor], batch: Tensor | None = None) -> Tensor:
    """`[N, H, N]`: what each value counts in each output of the full interaction."""
    *others, value = projected
    everyone = torch.eye(len(value), dtype=value.dtype).unsqueeze(1).expand(-1, value.shape[1], -1)
    return definition(interaction, [*others, everyone], batch)


def met_matrix(parts: Iterable[Partition], n: int) -> Tensor:
    """Which two different tokens shared a batch."""
    met = torch.zeros(n, n, dtype=torch.bool)
    for part in parts:
        for block in part.split(part.order):
            for row in block:
                met[row.unsqueeze(1), row] = True
    return met.fill_diagonal_(False)


def estimate(
    interaction: Interaction, projected: list[Tensor], met: Tensor, delta: float, batch: Tensor | None = None
) -> Tensor:
    """`(κ^δ Σ_{met} w_ij v_j + w_ii v_i) / (c_i + κ^δ Σ_{met} w_ij + w_ii)`; of a sum the numerator."""
    full = weights(interaction, projected, batch)
    same = torch.ones_like(met) if batch is None else batch.unsqueeze(1) == batch
    kappa = (same.sum(1) - 1).double() / met.sum(1).clamp(min=1)
    factor = met * (kappa.to(full.dtype) ** delta).unsqueeze(1) + torch.eye(len(met), dtype=full.dtype)
    numerator = full * factor.unsqueeze(1)
    out = torch.einsum("ihj,jhe->ihe", numerator, projected[-1])
    if interaction.kind is Kind.SUM:
        return out
    constant = 1 - full.sum(-1)  # c_i, in the unit in which the weights of the full interaction are given
    return out / (constant + numerator.sum(-1)).unsqueeze(-1)


def met_in(n: int, batch_size: int, rounds: int, batch: Tensor | None, seed: int, *, averages: bool = False) -> Tensor:
    """Who shares a batch in the rounds of a call; where outputs are averaged, these are independent."""
    parts = draw_rounds(n, batch_size, rounds, batch=batch, seed=seed)
    return met_matrix(parts.independent() if averages else parts, n)


def op(interaction: str | Interaction, projected: list[Tensor], **options: Any) -> Tensor:
    return rb.random_batch_interaction(interaction, *projected, **({"batch_size": 4, "seed": 3} | options))


def around(layer: RandomBatchAttention, x: Tensor, inner: Callable[[list[Tensor]], Tensor]) -> Tensor:
    """What a layer computes with `inner` between its projections."""
    query, key, value = F.linear(x, layer.in_proj_weight, layer.in_proj_bias).chunk(3, dim=-1)
    heads = [part.unflatten(-1, (layer.num_heads, -1)) for part in (query, key, value)]
    return F.linear(inner(heads).flatten(-2), layer.out_proj.weight, layer.out_proj.bias)


class TinyRun:
    """`randbatch train` for a second, on a data set of sixty nodes whose label is the sign of a feature."""

    def __init__(self, folder: Path, *words: str) -> None:
        features, number = np.random.default_rng(0).standard_normal((60, 3)), np.arange(60)
        arrays = {f"{role}_masks": number % 3 == turn for turn, role in enumerate(("train", "val", "test"))}
        edges = np.stack([number, (number + 1) % 60], axis=1)
        labels = (features[:, 0] > 0).astype(np.int64)
        np.savez(folder / "sign.npz", node_features=features, node_labels=labels, edges=edges, **arrays)
        self.out = folder / "run"
        self.code = main([
            "train", "--dataset", str(folder / "sign.npz"), "--batch-size", "16", "--hidden", "8", "--heads", "2",
            "--layers", "1", "--epochs", "2", "--local", "off", "--device", "cpu", "--out", str(self.out), *words,
        ])  # fmt: skip

    def result(self) -> dict[str, Any]:
        assert self.code == 0
        return json.loads((self.out / "result.json").read_text())
