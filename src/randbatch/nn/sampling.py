"""What a module with random batches holds besides its weights, and what it does with it.

Shape letters: N tokens, B padded sets, H heads, D head size of query and key, Dv of value, C channels.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from itertools import count
from typing import Any

import torch
from torch import Tensor, nn

from randbatch._checks import (
    check_batch_vector,
    check_choice,
    check_chunk_batches,
    check_integer,
    check_positive,
    check_qkv,
)
from randbatch._errors import InvalidType
from randbatch._numerics import as_autocast, check_tensor, has_no_numbers
from randbatch._shapes import Bool, Int, Shaped
from randbatch.estimators import ESTIMATORS
from randbatch.estimators.in_pieces import check_streams
from randbatch.functional import estimate, full_attention
from randbatch.interactions import Options
from randbatch.kernels import BACKENDS
from randbatch.nn._sets import PaddedSets
from randbatch.nn.calls import Calls, notice_shared_seed
from randbatch.orthogonal import Rounds, draw_rounds
from randbatch.partition import Partition, balanced_groups, fold_seed, random_partition
from randbatch.streaming import ChunkBatches, stream
from randbatch.tolerance import RoundsChoice, choose_rounds
from randbatch.tracing import UNTRACEABLE

__all__ = ["ATTRIBUTE", "Sampling", "apply_in_batches", "attend_in_batches", "sampling_of", "settings_from"]

ATTRIBUTE = "randbatch_config"
"""Where a module holds its `Sampling`, whether it is ours or was converted: a name that no user's module has."""

Observer = Callable[[Tensor, Tensor, Tensor, Tensor | None, float | None], None]


@dataclass
class Sampling:
    """How a module draws its random batches: the attribute `randbatch_config` of every module that has some.

    The fields may be changed at any time, and the next call follows them. In training every call draws fresh
    partitions from torch's default CPU generator; in eval they depend on `seed` alone.

    Args:
        batch_size: p >= 2, tokens in a random batch.
        estimator: how in-batch softmax attention estimates full attention.
        rounds: R >= 1, partitions per call in training.
        eval_rounds: R in eval. Default: the same as `rounds`.
        backend: of softmax attention.
        seed: the partitions of eval. What a graph gets depends on the graph and this alone, not on what else is in the
            mini-batch.
        exact_eval: in eval, one batch holds each whole set: no sampling at all.
        tolerance: in eval, as many rounds as keep the relative error of this module's attention below it (see
            `choose_rounds`), instead of `eval_rounds`; for softmax attention only.
        chunk_batches: batches at a time, computed again in backward; `"auto"`: as many as fit into free memory.
            Default: None, all at once. Not for the estimator `"corrected"`.

    Attributes:
        chosen: what `tolerance` led to in the last call.
        observer: called with query, key, value, `batch` and the scale of every softmax attention of the module.
        path: where the module is in the model whose calls are counted.
        origin: shared by deep copies alone.
        calls: of that model: a module that is called several times in its forward draws other partitions each time.

    Raises:
        TypeError: an argument that must be an int is not.
        ValueError: a number out of range or an unknown name.
    """

    batch_size: int
    estimator: str = "plain"
    rounds: int = 1
    eval_rounds: int | None = None
    backend: str = "auto"
    seed: int = 0
    exact_eval: bool = False
    tolerance: float | None = None
    chunk_batches: ChunkBatches = None
    chosen: RoundsChoice | None = field(default=None, init=False, repr=False, compare=False)
    observer: Observer | None = field(default=None, init=False, repr=False, compare=False)
    path: str = field(default="", init=False, repr=False, compare=False)
    origin: int = field(default_factory=count().__next__, init=False, repr=False, compare=False)
    calls: Calls | None = field(default=None, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        self.batch_size = check_integer("batch_size", self.batch_size, 2)
        check_choice("estimator", self.estimator, ESTIMATORS)
        self.rounds = check_integer("rounds", self.rounds, 1)
        if self.eval_rounds is not None:
            self.eval_rounds = check_integer("eval_rounds", self.eval_rounds, 1)
        check_choice("backend", self.backend, ["auto", *BACKENDS])
        self.seed = check_integer("seed", self.seed)
        if self.tolerance is not None:
            check_positive("tolerance", self.tolerance)
        check_chunk_batches(self.chunk_batches)
        check_streams(self.chunk_batches, self.estimator)

    def wants_tokens(self, training: bool) -> bool:
        """Whether query, key and value must be there, in token order, before partitions are drawn."""
        return self.observer is not None or (not training and (self.exact_eval or self.tolerance is not None))

    def rounds_of(self, training: bool) -> int:
        """R of a call."""
        return self.rounds if training or self.eval_rounds is None else self.eval_rounds

    def next_seed(self, x: Tensor | None, num_tokens: int, training: bool) -> int | None:
        """The seed of the next call, for an input of N tokens; None in training, where one is drawn."""
        if training:
            return None
        seed = self.seed if self.calls is None else self.calls.seed_of(self.path, self.seed)
        if x is not None and num_tokens > self.batch_size and not self.exact_eval:
            notice_shared_seed(self, seed, x)
        return seed

    def draw(
        self,
        num_tokens: int,
        training: bool,
        *,
        batch: Int[Tensor, " n"] | None = None,
        device: torch.device | None = None,
        x: Tensor | None = None,
    ) -> Rounds:
        """The partitions of one call, whose input is `x`."""
        check_batch_vector(batch, num_tokens, torch.device("cpu") if device is None else device)
        exact = self.exact_eval and not training
        if self.tolerance is not None and not training and not exact:
            raise ValueError(
                "tolerance is for softmax attention, whose error is known; give set_inference `rounds` instead, or set "
                "`randbatch_config.tolerance` of this module to None"
            )
        return draw_rounds(
            num_tokens,
            max(num_tokens, 2) if exact else self.batch_size,
            1 if exact else self.rounds_of(training),
            batch=batch,
            seed=self.next_seed(x, num_tokens, training),
            device=device,
        )

    def describe(self) -> str:
        """What `print(module)` shows."""
        rounds = f"{self.rounds}" if self.eval_rounds is None else f"{self.rounds}, eval_rounds={self.eval_rounds}"
        more = ", exact_eval=True" if self.exact_eval else ""
        more += "" if self.tolerance is None else f", tolerance={self.tolerance}"
        more += "" if self.chunk_batches is None else f", chunk_batches={self.chunk_batches!r}"
        return f"batch_size={self.batch_size}, estimator={self.estimator!r}, rounds={rounds}, seed={self.seed}{more}"


def attend_in_batches(
    sampling: Sampling,
    training: bool,
    query: Shaped[Tensor, "... h d"],
    key: Shaped[Tensor, "... h d"],
    value: Shaped[Tensor, "... h dv"],
    *,
    mask: Bool[Tensor, "b n"] | None = None,
    batch: Int[Tensor, " n"] | None = None,
    scale: float | None = None,
    dropout_p: float = 0.0,
    interaction: str = "softmax",
) -> Shaped[Tensor, "... h dv"]:
    """Attention of projected tokens, as `sampling` says; `dropout_p` counts in training only.

    Query, key and value are flat tokens `[N, H, D]` with `batch`, or padded sets `[B, N, H, D]` with `mask`
    (True = token); rows without a token come back as zeros.
    """
    check_tensor("query", query)
    if query.dim() == 4:
        if batch is not None:
            raise ValueError("batch is for flat tokens [N, H, D]; padded sets [B, N, H, D] take mask")
        sets = PaddedSets.of(query, mask, "mask")
        flat = [sets.flatten(tensor) for tensor in (query, key, value)]
        out = attend_in_batches(
            sampling, training, *flat, batch=sets.batch, scale=scale, dropout_p=dropout_p, interaction=interaction
        )
        return sets.restore(out)
    if mask is not None:
        raise ValueError("mask is for padded sets [B, N, H, D]; flat tokens [N, H, D] take batch")
    query, key, value = as_autocast(query, key, value)
    softmax = interaction == "softmax"
    if softmax and sampling.observer is not None:
        sampling.observer(query, key, value, batch, scale)
    if softmax and sampling.exact_eval and not training:
        return full_attention(query, key, value, batch=batch, scale=scale)
    check_qkv(query, key, value)
    device = query.device
    if not softmax or sampling.tolerance is None or training:
        rounds = sampling.draw(query.shape[0], training, batch=batch, device=device, x=query)
    else:
        p, seed = sampling.batch_size, sampling.next_seed(query, query.shape[0], training) or 0
        sampling.chosen = choose_rounds(
            query, key, value, p, sampling.tolerance, batch=batch, estimator=sampling.estimator, scale=scale, seed=seed
        )
        if sampling.chosen.exact:
            return full_attention(query, key, value, batch=batch, scale=scale)
        rounds = draw_rounds(query.shape[0], p, sampling.chosen.rounds, batch=batch, seed=seed, device=device)
    options = Options(scale, dropout_p if training else 0.0, sampling.backend)
    return estimate(query, key, value, rounds, sampling.estimator, interaction, options, sampling.chunk_batches)


def apply_in_batches(
    sampling: Sampling,
    training: bool,
    function: Callable[[Tensor], Tensor],
    x: Shaped[Tensor, "n c"] | Shaped[Tensor, "b n c"],
    mask: Bool[Tensor, "b n"] | None = None,
    batch: Int[Tensor, " n"] | None = None,
    owner: nn.Module | None = None,
) -> Tensor:
    """A function over sets, `[M, P, C] -> [M, P, C']`, inside random batches; several rounds are averaged.

    It gets whole batches of equal size, never padding. `x` is flat tokens `[N, C]` with `batch`, or padded sets
    `[B, N, C]` with `mask` (True = token); rows without a token come back as zeros. `owner` is the
    module that the function belongs to.
    """
    check_tensor("x", x)
    if x.dim() == 3:
        if batch is not None:
            raise ValueError("batch is for flat tokens [N, C]; padded sets [B, N, C] take mask")
        if mask is not None and mask.dtype != torch.bool:
            raise TypeError(f"mask must be bool, got {mask.dtype}")
        sets = PaddedSets.of(x, mask, "mask")
        flat = sets.flatten(x)
        return sets.restore(apply_in_batches(sampling, training, function, flat, batch=sets.batch, owner=owner))
    if x.dim() != 2:
        raise ValueError(f"x must be [N, C] or [B, N, C], got {list(x.shape)}")
    if mask is not None:
        raise ValueError("mask is for padded sets [B, N, C]; flat tokens [N, C] take batch")
    chunk = sampling.chunk_batches
    if torch.compiler.is_compiling() and (chunk is not None or (training and sampling.rounds > 1)):
        raise NotImplementedError(
            "torch.compile cannot trace chunk_batches, or several rounds in training, of a wrapped module: leave them "
            "out, or compile without fullgraph=True"
        )
    if chunk == "auto":
        raise ValueError("chunk_batches must be an int or None here: what any function needs of memory is not known")

    def apply(part: Partition) -> Tensor:
        if chunk is None:
            return _apply(function, x, part)

        def of_piece(piece: Partition, rows: Tensor) -> Tensor:
            return _apply(function, rows, piece)

        return stream(of_piece, part, [x], chunk, owner)

    if has_no_numbers(x):
        return _apply(function, x, _any_partition(x, sampling.batch_size, batch))
    rounds = sampling.draw(x.shape[0], training, batch=batch, device=x.device, x=x)
    if isinstance(rounds, Partition):
        return apply(rounds)
    # Outputs are averaged, not merged: whole batches of p each time serve that better than smaller orthogonal ones.
    seeds = (fold_seed(rounds.seed, position) for position in range(rounds.rounds))
    parts = (
        random_partition(
            x.shape[0], rounds.batch_size, batch=batch, seed=s, device=x.device, independent=rounds.independent
        )
        for s in seeds
    )
    total = apply(next(parts))
    for part in parts:
        total = total + apply(part)
    return total / rounds.rounds


def _any_partition(x: Tensor, batch_size: int, batch: Tensor | None) -> Partition:
    """Batches of the right sizes of tokens without numbers, in any order."""
    if batch is not None:
        raise NotImplementedError(UNTRACEABLE)
    groups = balanced_groups(x.shape[0], min(batch_size, max(x.shape[0], 1)))
    return Partition(torch.arange(x.shape[0], device=x.device), groups, in_order=True, is_checked=True)


def _apply(function: Callable[[Tensor], Tensor], x: Tensor, part: Partition) -> Tensor:
    blocks = part.split(part.pack(x)) or [x.unsqueeze(0)]  # no token: the function still decides the output's width
    outs = [function(block) for block in blocks]
    for block, out in zip(blocks, outs, strict=True):
        if out.shape[:2] != block.shape[:2]:
            raise ValueError(f"the module must map {list(block.shape)} to [B, N, C'], it returned {list(out.shape)}")
    return part.unpack(part.join(outs))


def sampling_of(module: nn.Module) -> Sampling | None:
    """How `module` draws its random batches; None if it has none."""
    sampling = getattr(module, ATTRIBUTE, None)
    return sampling if isinstance(sampling, Sampling) else None


def settings_from(batch_size: int | Sampling, options: Mapping[str, Any]) -> Sampling:
    """The settings with these `options`, which are fields of `Sampling`; `batch_size` may be settings as a whole.

    Raises:
        TypeError: there is no such option, or one has the wrong type.
        ValueError: a number out of range or an unknown name.
    """
    taken = [each.name for each in fields(Sampling) if each.init and each.name != "batch_size"]
    unknown = next((name for name in options if name not in taken), None)
    if unknown is not None:
        raise InvalidType(f"unexpected option {unknown!r}; the options of random batches are {', '.join(taken)}")
    return replace(batch_size, **options) if isinstance(batch_size, Sampling) else Sampling(batch_size, **options)
