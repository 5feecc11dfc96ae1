"""The estimators at a few tokens only: S · p operations a round, where all tokens take N · p.

This is how their error becomes known without computing them everywhere. It is for interactions with the weights
`exp(scale · query·key)`.

Shape letters: N tokens, H heads, S tokens looked at for each head, W widest batch, D head size of query and key, E of
value, K values of δ.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from randbatch._numerics import wide_dtype
from randbatch._shapes import Bool, Float, Int
from randbatch.estimators.base import Estimator
from randbatch.estimators.mean_field import of_set, sets_that_meet
from randbatch.interactions.merge import Partial, log_kappa
from randbatch.partition import Partition

__all__ = [
    "AtTokens",
    "Probe",
    "SetsOf",
    "attend_exactly",
    "attend_in_sets",
    "log_attention_of",
    "pad_runs",
    "rows_of",
]

_GATHERED = 2**24  # elements of keys or values that are gathered at a time: 64 MiB in fp32
_LOGITS = 2**24  # held at a time


class AtTokens:
    """In-batch attention and mean fields of chosen tokens `[H, S]`, over all rounds that were added so far.

    Attributes:
        query: `[H, S, D]`, in at least fp32 as all that follows.
        value: `[H, S, E]`, of the tokens themselves.
        num_rounds: how many were added.
    """

    def __init__(
        self,
        query: Float[Tensor, "n h d"],
        key: Float[Tensor, "n h d"],
        value: Float[Tensor, "n h e"],
        tokens: Int[Tensor, "h s"],
        scale: float,
    ) -> None:
        wide = wide_dtype(query)
        self._key, self._value, self._scale, self.tokens = key, value, scale, tokens
        self.query, self.value = rows_of(query, tokens).to(wide), rows_of(value, tokens).to(wide)
        self._own = torch.einsum("hsd,hsd->hs", self.query, rows_of(key, tokens).to(wide)) * scale
        # attention to the others that were met
        self._rest = Partial(torch.zeros_like(self.value), torch.full_like(self._own, -torch.inf))
        self._field = torch.zeros_like(self.value)
        self._met = torch.zeros_like(tokens)
        self._others = torch.zeros_like(tokens)
        self._rounds = torch.zeros_like(tokens)
        self.num_rounds = 0

    def add(self, part: Partition) -> None:
        """Let the tokens meet those of their batches in one more round."""
        position = self.tokens if part.in_order else part.inverse[self.tokens]
        starts, widths = part.starts_and_widths()
        batch = part.spread(torch.arange(part.num_batches, device=position.device))[position]
        start, width = starts[batch], widths[batch]
        chunk = max(1, _GATHERED // (len(self._own) * part.num_slots * max(self.query.shape[2], self.value.shape[2])))
        pieces = zip(*(x.split(chunk, dim=1) for x in (self.tokens, self.query, start, width)), strict=True)
        results = zip(*(self._attend(part, *piece) for piece in pieces), strict=True)
        more, more_lse, field = (torch.cat(result, dim=1) for result in results)
        self._rest = self._rest.merge(Partial(more, more_lse))
        meets = of_set(part, sets_that_meet(part)).expand(part.num_batches)[batch]
        self._field = self._field + torch.where(meets.unsqueeze(-1), field, 0.0)
        self._rounds = self._rounds + meets
        self._met = self._met + width - 1
        self._others = part.unpack(part.count_others())[self.tokens]
        self.num_rounds += 1

    def _attend(
        self, part: Partition, tokens: Tensor, query: Tensor, start: Tensor, width: Tensor
    ) -> tuple[Float[Tensor, "h s e"], Float[Tensor, "h s"], Float[Tensor, "h s e"]]:
        """Attention to the others of the batch, its log-sum-exp, and the mean field of the batch."""
        start, width = start.unsqueeze(-1), width.unsqueeze(-1)  # [H, S, 1]
        slots = torch.arange(part.num_slots, device=tokens.device)
        index = start + torch.minimum(slots, width - 1)
        filled = slots < width
        index = index if part.in_order else part.order[index]
        k, v = rows_of(self._key, index).to(query.dtype), rows_of(self._value, index).to(query.dtype)  # [H, S, W, D]
        share = (filled / width).to(query.dtype)
        logits = torch.einsum("hsd,hswd->hsw", query, k) * self._scale
        response = (logits - (share * logits).sum(dim=-1, keepdim=True)) * share
        logits = logits.masked_fill(~filled | (index == tokens.unsqueeze(-1)), -torch.inf)
        lse = logits.logsumexp(dim=-1)
        weights = (logits - lse.clamp(min=torch.finfo(query.dtype).min).unsqueeze(-1)).exp()
        out, field = (torch.stack([weights, response + share], dim=-2) @ v).unbind(-2)
        return out, lse, field

    @property
    def met_all(self) -> Bool[Tensor, "h s"]:
        """Whether a token met every other of its set."""
        return self._met == self._others

    @property
    def field(self) -> Float[Tensor, "h s e"]:
        """The mean field of the batches, on average over the rounds of the set."""
        return self._field / self._rounds.clamp(min=1).unsqueeze(-1)

    def local(self, debias: float | Tensor) -> Float[Tensor, "... h s e"]:
        """Attention to the tokens that were met and to oneself, with the own logit lowered by δ log κ.

        `debias` is δ, and broadcasts against `[H, S, E]`.
        """
        kappa = log_kappa(self._others, self._met).to(self._own.dtype).unsqueeze(-1)
        rest, lse = self._rest
        assert lse is not None  # softmax normalises
        own = torch.sigmoid((self._own - lse).unsqueeze(-1) - debias * kappa)
        return rest + own * (self.value - rest)


class Probe:
    """What estimators give at chosen tokens `[H, S]`, for the rounds that were added so far.

    Attributes:
        tensors: query, key and value.
        scale: factor of the logits.
        met: in-batch attention and mean fields of the tokens.
        states: what an estimator keeps beside these (`Estimator.observe`).
    """

    def __init__(
        self,
        query: Float[Tensor, "n h d"],
        key: Float[Tensor, "n h d"],
        value: Float[Tensor, "n h e"],
        tokens: Int[Tensor, "h s"],
        scale: float,
        estimators: Sequence[Estimator],
    ) -> None:
        self.tensors, self.scale = (query, key, value), scale
        self.met = AtTokens(query, key, value, tokens, scale)
        self.states: dict[Estimator, Any] = dict.fromkeys(estimators)

    def add(self, part: Partition) -> None:
        """One more round."""
        for estimator in self.states:
            estimator.observe(self, part)
        self.met.add(part)

    def outputs(self) -> dict[str, Float[Tensor, "h s e"]]:
        """What each of the estimators gives, by name."""
        return {estimator.name: estimator.at_tokens(self) for estimator in self.states}

    def exact(self, part: Partition) -> Float[Tensor, "h s e"]:
        """Attention to all keys of the set; any partition of the same tokens says which those are."""
        query, key, value = self.tensors
        sets = SetsOf(part, self.met.tokens)
        rows = rows_of(query, self.met.tokens)
        return attend_exactly(rows, key, value, sets, self.scale).to(self.met.query.dtype)


def rows_of(x: Float[Tensor, "n h d"], index: Int[Tensor, "h ..."]) -> Float[Tensor, "h ... d"]:
    """`x[index[h], h]` for every head; a third of the time of indexing by both."""
    return torch.stack(
        [x[:, head].index_select(0, rows.flatten()).unflatten(0, rows.shape) for head, rows in enumerate(index)]
    )


class SetsOf:
    """Which set the chosen tokens `[H, S]`, and all others, are of.

    Attributes:
        own: `[H, S]`, a number from 0 on.
        of_token: `[N]`; None where there is one set.
    """

    def __init__(self, part: Partition, tokens: Int[Tensor, "h s"]) -> None:
        self.of_token = None if part.set_of_batch is None else part.unpack(part.spread(part.set_of_batch))
        self.own = torch.zeros_like(tokens) if self.of_token is None else self.of_token[tokens]


def attend_exactly(
    query: Float[Tensor, "h s d"],
    key: Float[Tensor, "n h d"],
    value: Float[Tensor, "n h e"],
    sets: SetsOf,
    scale: float,
) -> Float[Tensor, "h s e"]:
    """Attention of the chosen tokens to all keys of their sets."""
    same = None if sets.of_token is None else (sets.own.unsqueeze(-1) == sets.of_token).unsqueeze(0)
    keys, values = (tensor.transpose(0, 1).unsqueeze(0) for tensor in (key, value))
    return F.scaled_dot_product_attention(query.unsqueeze(0), keys, values, attn_mask=same, scale=scale).squeeze(0)


def pad_runs(
    sorted_numbers: Int[Tensor, " s"],
) -> tuple[Int[Tensor, "rows most"], Bool[Tensor, "rows most"], Int[Tensor, " rows"]]:
    """Where equal numbers stand, a row for each number, padded; which places are no padding; and the numbers."""
    numbers, counts = torch.unique_consecutive(sorted_numbers, return_counts=True)
    slots = torch.arange(int(counts.max()) if len(counts) else 0, device=counts.device)
    ends = counts.unsqueeze(1)
    first = (counts.cumsum(0) - counts).unsqueeze(1)
    return first + torch.minimum(slots, ends - 1), slots < ends, numbers


def attend_in_sets(
    query: Float[Tensor, "n h d"],
    key: Float[Tensor, "n h d"],
    value: Float[Tensor, "n h e"],
    tokens: Int[Tensor, "h s"],
    own_set: Int[Tensor, " s"],
    part: Partition,
    scale: float,
) -> Float[Tensor, "h s e"]:
    """Attention of some tokens of each set, set after set, to all of it: no more than `Σ_g S_g n_g` products, twice.

    Sets of about one size are computed together.
    """
    rows = rows_of(query, tokens)
    if part.set_of_batch is None or part.set_sizes is None:
        return attend_exactly(rows, key, value, SetsOf(part, tokens), scale)
    by_set = part.unpack(part.spread(part.set_of_batch)).argsort(stable=True)
    sizes = part.set_sizes
    starts = sizes.cumsum(0) - sizes
    index, filled, sets = pad_runs(own_set)
    out = value.new_empty(*tokens.shape, value.shape[2])
    power = sizes[sets].double().log2().ceil()
    for each in power.unique().tolist():
        together = (power == each).nonzero().squeeze(1)
        slots = torch.arange(int(sizes[sets[together]].max()), device=sizes.device)
        chunk = max(1, _GATHERED // (slots.numel() * key.shape[1] * max(key.shape[2], value.shape[2])))
        for some in together.split(chunk):
            size = sizes[sets[some]].unsqueeze(1)
            others = by_set[starts[sets[some]].unsqueeze(1) + torch.minimum(slots, size - 1)]  # [g, W]
            k, v = (x[others].transpose(1, 2) for x in (key, value))  # [g, H, W, D]
            q = rows[:, index[some]].transpose(0, 1)
            mask = (slots < size)[:, None, None, :]
            found = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale).transpose(0, 1)
            out[:, index[some][filled[some]]] = found[:, filled[some]]
    return out


def log_attention_of(
    query: Float[Tensor, "n h d"], key: Float[Tensor, "n h d"], tokens: Int[Tensor, "h s"], sets: SetsOf, scale: float
) -> Iterator[Float[Tensor, "h c n"]]:
    """Rows `log a_ij` of the attention matrix, some of the chosen tokens `i` at a time, in their order."""
    wide = wide_dtype(query)
    keys, rows = key.to(wide).transpose(0, 1), rows_of(query, tokens).to(wide)  # [H, N, D], [H, S, D]
    chunk = max(1, _LOGITS // (keys.shape[0] * keys.shape[1]))
    for q, own in zip(rows.split(chunk, dim=1), sets.own.split(chunk, dim=1), strict=True):
        logits = (q @ keys.mT) * scale
        if sets.of_token is not None:
            logits = logits.masked_fill(own.unsqueeze(-1) != sets.of_token, -torch.inf)
        yield logits.log_softmax(dim=-1)
