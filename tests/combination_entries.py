"""The entry points that cases are drawn from: each as the public call, and as the oracle's formula of the same.

Shape letters: N tokens, T tokens of all padded sets, B padded sets, H heads, D head size, C channels.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import oracle
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import randbatch as rb

if TYPE_CHECKING:
    from combination_cases import Case

NUM_SETS = 3  # of padded input
NUM_FEATURES = 5  # of a GraphTransformer's input


@dataclass
class Made:
    """A function of some tensors, those tensors, and the parameters that it depends on besides."""

    call: Callable[..., Tensor]
    inputs: list[Tensor]
    parameters: dict[str, Tensor]

    @property
    def leaves(self) -> dict[str, Tensor]:
        """All of them by name."""
        return {f"input {number}": x for number, x in enumerate(self.inputs)} | self.parameters


class Attention(nn.Module):
    """One head of softmax attention over sets `[B, N, C]`, to be wrapped."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.query, self.key = (nn.Linear(channels, channels, bias=False) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        return torch.softmax(self.query(x) @ self.key(x).mT, dim=-1) @ x


class CallsSDPA(nn.Module):
    """Attention as most models have it."""

    def __init__(self, channels: int, num_heads: int, scale: float | None, dropout: float) -> None:
        super().__init__()
        self.in_proj, self.out_proj = nn.Linear(channels, 3 * channels), nn.Linear(channels, channels)
        self.num_heads, self.scale, self.dropout = num_heads, scale, dropout

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        shape = *x.shape[:2], 3, self.num_heads, -1  # `unflatten` would not be compiled, a defect of `through_sdpa`
        q, k, v = self.in_proj(x).view(shape).transpose(1, 3).unbind(2)
        mask = None if mask is None else mask[:, None, None, :]
        dropout_p = self.dropout if self.training else 0.0
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout_p, scale=self.scale)
        return self.out_proj(out.transpose(1, 2).flatten(2))


rb.convert.register(CallsSDPA)(rb.convert.through_sdpa)


class Entry:
    """One case: its inputs in float64, and what is made of them.

    Attributes:
        batch: int64 `[T]`, the graph of each token, or the padded set it is in; None where there is one.
        keep: bool `[B, N]`, True where a padded set has a token; None where tokens are flat.
        same: bool `[T, T]`, the others of a token's own graph.
    """

    def __init__(self, case: Case) -> None:
        self.case = case
        self.random = torch.Generator().manual_seed(case.number)
        self.batch, self.keep = self._graphs()
        self.num_tokens = case.n if self.batch is None else len(self.batch)
        self.same = oracle.same_graph(self.batch, self.num_tokens)
        # values are not centred: what is said of them by their mean has to be right
        self.inputs = [torch.randn(shape, generator=self.random, dtype=torch.float64) for shape in self._shapes()]
        self.inputs[-1] += 1.0
        self.partition = self._partition() if case.partition else None

    def _graphs(self) -> tuple[Tensor | None, Tensor | None]:
        case = self.case
        if case.padded:
            sizes = torch.randint(0, case.n + 1, (NUM_SETS if case.graphs else 1,), generator=self.random)
            sizes[: 2 - case.number % 2] = case.n  # two of one size, every other time
            keep = torch.arange(case.n) < sizes[:, None]
            keep = keep.gather(1, torch.rand(keep.shape, generator=self.random).argsort(dim=1))  # padding anywhere
            return keep.nonzero()[:, 0], keep
        if not case.graphs:
            return None, None
        ids = torch.tensor([0, 7, 2**40, 2**62 + 1])
        number = torch.randint(0, 4, (case.n,), generator=self.random)
        if case.number % 2 == 0:  # graphs of one size, but for one
            number = torch.arange(case.n)[torch.randperm(case.n, generator=self.random)] % 4
        return ids[number], None

    def _shapes(self) -> list[tuple[int, ...]]:
        case = self.case
        if case.entry == "op":
            return [(case.n, case.heads, size) for size in (case.d, case.d, case.dv)]
        channels = NUM_FEATURES if case.entry == "model" else case.channels
        return [(case.n, channels) if self.keep is None else (*self.keep.shape, channels)]

    def _partition(self) -> rb.Partition:
        """Of the package, or by hand, of batches as unequal as can be."""
        case = self.case
        if case.seed is not None:
            return rb.random_partition(case.n, case.p, batch=self.batch, seed=case.seed)
        order = torch.randperm(case.n, generator=self.random)
        first = case.n - case.n // 3
        return rb.Partition(order, tuple((1, width) for width in (first, case.n - first) if width))

    @property
    def largest(self) -> int:
        """The size of the largest graph."""
        return int(self.same.sum(dim=1).max()) + 1 if self.num_tokens else 0

    @cached_property
    def choice(self) -> rb.RoundsChoice | None:
        """What the op's tolerance leads to."""
        case = self.case
        if case.entry != "op" or case.tolerance is None or case.seed is None or case.interaction != "softmax":
            return None
        inputs = [x.to(case.stored).to(case.computed) for x in self.inputs]
        how = {"batch": self.batch, "estimator": case.estimator, "scale": case.scale, "seed": case.seed}
        return rb.choose_rounds(*inputs, case.p, case.tolerance, **how)

    @property
    def is_settled(self) -> bool:
        """Whether a tolerance is met by full attention."""
        return self.choice is not None and self.choice.exact

    # ------------------------------------------------------------------------------------------------ the public call

    def subject(self, dtype: torch.dtype, *, sums: str = "", small: float = 1.0, **changes: Any) -> Made:
        """What a user would call.

        With `sums` all values are 1, so that its output is the sum of its weights: `weighted`, or `even`, which makes
        all queries 0. With `small` queries no weight is too small to be seen.
        """
        case = replace(self.case, **changes)
        inputs = [x.to(dtype, copy=True) for x in self.inputs]
        if case.entry == "op":
            inputs[2] = torch.ones_like(inputs[2]) if sums else inputs[2]
            inputs[0] *= 0.0 if sums == "even" else small
            return Made(lambda *x: rb.random_batch_attention(*x, **self._op_options(case)), inputs, {})
        module = self._module(case, sums, small).to(dtype).train(case.training)
        self._put_in_batches(module, case)
        return Made(lambda x: self._call(module, x), inputs, dict(module.named_parameters()))

    def _op_options(self, case: Case) -> dict[str, Any]:
        names = (
            "interaction", "estimator", "rounds", "tolerance", "scale", "seed", "backend", "chunk_batches",
        )  # fmt: skip
        named = {name: getattr(case, name) for name in names}
        named |= {"batch": self.batch, "dropout_p": case.dropout, "batch_size": case.p}
        if self.partition is not None:
            named |= {"partition": self.partition, "batch_size": 2}  # which says nothing then
        return named

    def _module(self, case: Case, sums: str = "", small: float = 1.0) -> Any:
        """The module in float64, with weights that are the same every time; not yet converted."""
        torch.manual_seed(case.number)
        module: Any
        if case.entry == "layer":
            module = rb.nn.RandomBatchAttention(
                case.channels, case.heads, case.p, dropout=case.dropout, bias=case.bias, estimator=case.estimator,
                rounds=case.rounds, eval_rounds=case.eval_rounds, interaction=case.interaction, backend=case.backend,
                seed=case.seed, chunk_batches=case.chunk_batches, batch_first=case.batch_first,
            )  # fmt: skip
        elif case.entry == "converted":
            module = nn.MultiheadAttention(
                case.channels, case.heads, case.dropout, case.bias, batch_first=case.batch_first
            )
        elif case.entry == "sdpa":
            module = CallsSDPA(case.channels, case.heads, case.scale, case.dropout)
        elif case.entry == "model":
            module = rb.models.GraphTransformer(
                NUM_FEATURES, 3, channels=case.channels, layers=1, heads=case.heads, local="off",
                attention="linear" if case.interaction == "linear" else "rba", batch_size=case.p,
                estimator=case.estimator, rounds=case.rounds, eval_rounds=case.eval_rounds,
                attention_dropout=case.dropout, chunk_batches=case.chunk_batches, seed=case.seed or 0,
            )  # fmt: skip
        else:
            inner = Attention(case.channels) if case.inner == "attention" else nn.Linear(case.channels, case.channels)
            module = rb.nn.RandomBatch(
                inner, case.p, rounds=case.rounds, eval_rounds=case.eval_rounds, seed=case.seed,
                chunk_batches=case.chunk_batches,
            )  # fmt: skip
        module = module.double()
        with torch.no_grad():
            for parameter in module.parameters():  # no zero biases
                parameter.add_(torch.randn_like(parameter), alpha=0.2)
            for name, parameter in module.named_parameters():
                if "in_proj" in name:  # queries come first
                    parameter.chunk(3)[0].mul_(small)
            if sums or case.tolerance is not None:
                _pass_on(module, sums)
        return module

    def _put_in_batches(self, module: nn.Module, case: Case) -> None:
        if case.entry in ("converted", "sdpa"):
            rb.convert(
                module, case.p, estimator=case.estimator, rounds=case.rounds, eval_rounds=case.eval_rounds,
                backend=case.backend, chunk_batches=case.chunk_batches, seed=case.seed or 0,
            )  # fmt: skip
        if case.tolerance is not None:
            rb.set_inference(module, tolerance=case.tolerance, seed=case.seed or 0)
        elif case.exact:
            rb.set_inference(module, mode="exact")

    def _call(self, module: Any, x: Tensor) -> Tensor:
        case, keep = self.case, self.keep
        if case.entry == "model":
            return module(x, torch.empty(2, 0, dtype=torch.int64), self.batch)
        if case.entry == "wrapper":
            return module(x, batch=self.batch) if keep is None else module(x, keep)
        if case.entry == "sdpa":
            return module(x[None])[0] if keep is None else module(x, keep)
        if keep is None:
            return module(x, batch=self.batch) if case.entry == "layer" else module(x, x, x, need_weights=False)[0]
        x = x if case.batch_first else x.transpose(0, 1)
        out = module(x, x, x, key_padding_mask=~keep, need_weights=False)[0]
        return out if case.batch_first else out.transpose(0, 1)

    # --------------------------------------------------------------------------------------------------- the formula

    def formula(self, dtype: torch.dtype, of: Made, met: Tensor | list[Tensor]) -> Made:
        """The same from the tensors of `of`, rounded as they are, in another dtype."""
        inputs = [x.detach().to(dtype, copy=True) for x in of.inputs]
        parameters = {name: x.detach().to(dtype, copy=True) for name, x in of.parameters.items()}
        return Made(lambda *x: self._formula(x, parameters, met), inputs, parameters)

    def attend(self, query: Tensor, key: Tensor, value: Tensor, met: Tensor) -> Tensor:
        """The oracle's attention, by the case's options."""
        case = self.case
        how = {"interaction": case.interaction, "estimator": case.estimator, "scale": case.scale}
        return oracle.attention(query, key, value, met, self.same, **how)

    def _formula(self, inputs: Any, parameters: dict[str, Tensor], met: Any) -> Tensor:
        case = self.case
        if case.entry == "op":
            return self.attend(*inputs, met)
        x = inputs[0] if self.keep is None else inputs[0][self.keep]

        def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            return self.attend(query, key, value, met)

        padding = 0
        if case.entry == "wrapper":
            out = oracle.averaged(x, met, case.rounds_of_call, self._inner(parameters))
        elif case.entry == "model":
            out = oracle.graph_transformer(x, parameters, case.heads, attend)
        else:
            names = {"in_proj.weight": "in_proj_weight", "in_proj.bias": "in_proj_bias"}
            parameters = {names.get(name, name): x for name, x in parameters.items()}
            out = oracle.multi_head(x, parameters, case.heads, attend)
            if case.entry == "sdpa":  # attention is zero where there is no token; its projection is not
                padding = parameters["out_proj.bias"].to(out.dtype)
        if self.keep is None:
            return out
        places = torch.where(self.keep.flatten(), self.keep.flatten().cumsum(0) - 1, self.num_tokens)
        rows = torch.cat([out, out.new_zeros(1, out.shape[-1]) + padding])
        return rows[places].unflatten(0, self.keep.shape)

    def offset(self, of: Made) -> Tensor:
        """What an output has beside attention: the bias of the last projection, where there is a token at least."""
        bias = of.parameters.get("out_proj.bias")
        if bias is None:
            return torch.zeros((), dtype=torch.float64)
        known = torch.tensor(1.0) if self.keep is None or self.case.entry == "sdpa" else self.keep[..., None]
        return bias.detach().double() * known

    def pair_weights(self, of: Made) -> Tensor:
        """The weights `[H, T, T]` of softmax, in float64."""
        case, found = self.case, []

        def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            found.append(oracle.weights(query, key, self.met, self.same, estimator=case.estimator, scale=case.scale))
            return value

        inputs = [x.detach().double() for x in of.inputs]
        if case.entry == "op":
            attend(*inputs)
        else:
            parameters = {name.replace("proj.", "proj_", 1): x.detach().double() for name, x in of.parameters.items()}
            x = inputs[0] if self.keep is None else inputs[0][self.keep]
            projected = F.linear(x, parameters["in_proj_weight"], parameters["in_proj_bias"]).chunk(3, dim=1)
            attend(*(y.unflatten(1, (case.heads, -1)) for y in projected))
        return found[0]

    def _inner(self, parameters: dict[str, Tensor]) -> Callable[[Tensor], Tensor]:
        """The wrapped module, written out."""
        if self.case.inner == "linear":
            return lambda x: F.linear(x, parameters["module.weight"], parameters["module.bias"])

        def attend(x: Tensor) -> Tensor:
            query, key = (F.linear(x, parameters[f"module.{name}.weight"]) for name in ("query", "key"))
            return torch.softmax(query @ key.mT, dim=-1) @ x

        return attend

    # ------------------------------------------------------------------------------------------------ who meets whom

    @cached_property
    def met(self) -> Any:
        """Whom each token met, bool `[T, T]`; for the wrapper the batches of all rounds, int64 `[M, P]` each."""
        case = self.case
        if case.entry == "wrapper":
            return self._batches()
        if self.partition is not None:
            return oracle.met_in(self.partition)
        rounds, known = case.rounds_of_call, case.entry == "op" or (case.entry == "layer" and not case.training)
        if self.choice is not None:
            rounds = self.choice.rounds
        if (
            case.p >= self.largest
            or rounds >= 999
            or case.exact
            or self.is_settled
            or (case.entry, case.interaction) == ("model", "linear")
        ):
            return self.same
        if known and case.seed is not None:
            return oracle.met_in_rounds(self.num_tokens, case.p, rounds, self.batch, case.seed)
        met = self._observe()
        oracle.check_met(met, case.p, rounds, self.batch)
        oracle.check_likeness(met, self.batch, alike=not case.training and case.entry != "op")
        return met

    def _observe(self) -> Tensor:
        """As the oracle does: of the same call, but for what has no part in drawing."""
        made = self.subject(torch.float64, small=1e-3, backend="auto", chunk_batches=None, dropout=0.0)
        *others, last = made.inputs

        def call(tokens: Tensor) -> Tensor:
            x = tokens.view(last.shape) if self.keep is None else last.clone()
            if self.keep is not None:
                x[self.keep] = tokens
            torch.manual_seed(self.case.number)
            out = made.call(*others, x)
            return out if self.keep is None else out[self.keep]

        return oracle.observe(call, last.flatten(1) if self.keep is None else last[self.keep])

    def _batches(self) -> list[Tensor]:
        """The batches that the wrapped module is given, and that they are as documented."""
        case = self.case
        unchunked = replace(case, chunk_batches=None)
        module: Any = self._module(unchunked).train(case.training)
        self._put_in_batches(module, unchunked)
        batch_size = self.num_tokens + 2 if case.exact else case.p
        seen: list[Tensor] = []
        module.module.register_forward_pre_hook(lambda _, args: seen.append(args[0].detach()))
        torch.manual_seed(case.number)
        self._call(module, self.inputs[0])
        tokens = self.inputs[0] if self.keep is None else self.inputs[0][self.keep]
        batches = [(block[..., None, :] == tokens).all(dim=-1).long().argmax(dim=-1) for block in seen if block.numel()]
        rounds = [torch.zeros_like(self.same) for _ in range(case.rounds_of_call)]
        met_so_far = torch.zeros(self.num_tokens, dtype=torch.int64)
        for block in batches:
            for batch in block:
                number = int(met_so_far[batch[0]])
                rounds[number][batch[:, None], batch] = True
                met_so_far[batch] += 1
        for together in rounds:
            oracle.check_met(together.fill_diagonal_(False), batch_size, 1, self.batch)
        assert bool((met_so_far == case.rounds_of_call).all()), "a token was in another number of rounds"
        if case.seed is not None and not case.training and not case.exact and case.rounds_of_call == 1:
            drawn = rb.random_partition(self.num_tokens, case.p, batch=self.batch, seed=case.seed)
            assert torch.equal(rounds[0], oracle.met_in(drawn)), "eval does not follow the seed"
        return batches


def _pass_on(module: nn.Module, sums: str) -> None:
    """Let the output be the attention itself, and with `sums` as `Entry.subject` says."""
    for name, parameter in module.named_parameters():
        if name.endswith("out_proj.weight"):
            parameter.copy_(torch.eye(len(parameter)))
        elif name.endswith("out_proj.bias"):
            parameter.zero_()
        elif sums and "in_proj" in name:
            query, _, value = parameter.chunk(3)
            value.fill_(1.0 if name.endswith("bias") else 0.0)
            if sums == "even":
                query.zero_()
