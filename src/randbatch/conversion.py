"""`convert`: put the attention of a model that exists into random batches, in place, and say what was done."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from torch import nn

from randbatch._checks import check_integer
from randbatch.integrations import load_rules
from randbatch.integrations.rules import (
    Adapter,
    Rule,
    add_adapter_rule,
    find_rule,
    has_random_batches,
    is_swapped,
    rule_of_swapped,
)
from randbatch.integrations.sdpa import through_sdpa
from randbatch.integrations.swap import Undo, bare_class
from randbatch.nn.calls import assign_seeds
from randbatch.nn.sampling import ATTRIBUTE, Sampling, sampling_of

__all__ = ["ConversionReport", "Convert", "Converted", "LeftAlone", "convert"]

Where = Callable[[str, nn.Module], bool]


@dataclass(frozen=True)
class Converted:
    """A module that was converted.

    Attributes:
        path: where it is in the model; empty for the model itself.
        kind: its class before.
        rule: what converted it.
        changes: what that changes in meaning.
    """

    path: str
    kind: str
    rule: str
    changes: str


@dataclass(frozen=True)
class LeftAlone:
    """A module that looks like attention and was not converted.

    Attributes:
        path: where it is in the model.
        kind: its class.
        reason: why.
    """

    path: str
    kind: str
    reason: str


@dataclass
class ConversionReport:
    """What `convert` did; print it to see a table.

    Attributes:
        converted: one row per module.
        left_alone: one row per module that looks like attention and was not converted.
        settings: the settings of the converted modules; each has a seed of its own.
    """

    converted: list[Converted]
    left_alone: list[LeftAlone]
    settings: Sampling
    _undo: list[Undo] = field(default_factory=list[Undo], repr=False)

    def undo(self) -> None:
        """Put everything back as it was before this conversion. Parameters keep their present values."""
        while self._undo:
            self._undo[-1]()
            self._undo.pop()

    def __str__(self) -> str:
        modules = "1 module" if len(self.converted) == 1 else f"{len(self.converted)} modules"
        s = self.settings
        rounds = f"rounds {s.rounds}" + ("" if s.eval_rounds is None else f" (eval {s.eval_rounds})")
        lines = [f"{modules} in random batches of {s.batch_size}, estimator {s.estimator}, {rounds}"]
        lines += _table(["path", "class", "rule"], [[row.path, row.kind, row.rule] for row in self.converted])
        lines += ["", "what changes in meaning"]
        lines += [f"  {rule}: {changes}" for rule, changes in {row.rule: row.changes for row in self.converted}.items()]
        if self.left_alone:
            lines += ["", "left alone"]
            lines += _table(["path", "class", "why"], [[row.path, row.kind, row.reason] for row in self.left_alone])
        return "\n".join(lines)


def _table(head: list[str], rows: list[list[str]]) -> list[str]:
    rows = [[path or "(model)", *rest] for path, *rest in rows]
    widths = [max(len(cell) for cell in column) for column in zip(head, *rows, strict=True)]
    return ["  " + "  ".join(map(str.ljust, row, widths)).rstrip() for row in [head, *rows]]


class Convert:
    """`randbatch.convert`: put the attention of a model into random batches of p tokens, in place.

    Parameters, `state_dict` keys, device, dtype, mode and hooks stay as they are; a module that occurs twice is
    converted once; a second call changes the settings of what is converted already. With `batch_size` >= N the
    converted model computes what it computed before.

    Known are torch's `MultiheadAttention` (also inside its encoder layers), torch_geometric's `GPSConv`,
    `PerformerAttention`, `SGFormerAttention` and `PolynormerAttention`, the attentions of Hugging Face encoders and of
    timm, and every class taught by `convert.register`. Whatever else looks like attention is named in the report; so is
    what is known to be cross-attention, causal, or biased between tokens.

    A converted model can be copied, pickled and sent to another process, where a class taught by `convert.register`
    must be taught first. Weights are those of the unconverted model, and load as before. With them transformers'
    `from_pretrained` makes full attention; the config of each converted part, saved with it, says in its `random_batch`
    what `convert` was told: `convert(model, **model.config.random_batch)` converts again.

    Args:
        model: any module.
        batch_size: p >= 2, tokens in a random batch.
        where: which modules: a pattern for paths such as `"layers.*.attn"`, or a function of path and module. Default:
            all that are known.
        estimator: how in-batch softmax attention estimates full attention. Default: `"plain"`, the paper's.
        rounds: partitions per call in training. Default: 1.
        eval_rounds: partitions per call in eval. Default: the same as `rounds`.
        backend: of softmax attention. Default: the first that can.
        chunk_batches: batches at a time, computed again in backward, which saves memory; torch's attention is then
            projected in pieces too. Linear attentions take an int, not `"auto"`. Default: None, all at once.
        seed: the partitions of eval; each module derives its own from its path, and each further call of a module in
            one forward of the model another.

    Returns:
        A `ConversionReport`: print it to see what was converted, what that changes and what was left alone; its method
        `undo` puts the model back.

    Raises:
        TypeError: `model` is not a module, or an argument that must be an int is not.
        ValueError: nothing was converted (the message says what was left alone, and why), or a number out of range.

    Example:
        >>> import torch
        >>> layer = torch.nn.TransformerEncoderLayer(16, 4, batch_first=True)
        >>> report = convert(layer, batch_size=64)
        >>> print(report)
        1 module in random batches of 64, estimator plain, rounds 1
          path       class               rule
          self_attn  MultiheadAttention  torch attention
        <BLANKLINE>
        what changes in meaning
          torch attention: a token attends to its random batch; ...
        >>> layer(torch.randn(1, 10_000, 16)).shape
        torch.Size([1, 10000, 16])
        >>> report.undo()
    """

    through_sdpa = staticmethod(through_sdpa)

    def __call__(
        self,
        model: nn.Module,
        batch_size: int,
        *,
        where: str | Where | None = None,
        estimator: str = "plain",
        rounds: int = 1,
        eval_rounds: int | None = None,
        backend: str = "auto",
        chunk_batches: int | Literal["auto"] | None = None,
        seed: int = 0,
    ) -> ConversionReport:
        """Convert, as the class says."""
        if not isinstance(model, nn.Module):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
        settings = Sampling(
            batch_size,
            estimator,
            rounds,
            eval_rounds,
            backend,
            check_integer("seed", seed),
            chunk_batches=chunk_batches,
        )
        load_rules()
        plan = _Plan(_as_predicate(where))
        plan.visit("", model, ())
        if not plan.steps:
            raise ValueError(_nothing_to_convert(model, plan.left_alone))
        plan.add_surroundings(model)
        report = ConversionReport([], plan.left_alone, settings)
        try:
            for path, module, rule in plan.steps:
                kind = bare_class(module).__name__
                report._undo.append(rule.swap(module, replace(settings)))  # pyright: ignore[reportPrivateUsage]
                report.converted.append(Converted(path, kind, rule.name, rule.changes))
            found = [(path, own) for path, module, _ in plan.steps if (own := sampling_of(module)) is not None]
            report._undo.append(assign_seeds(model, found, seed))  # pyright: ignore[reportPrivateUsage]
        except BaseException:
            report.undo()  # all or nothing
            raise
        return report

    @staticmethod
    def register(module_class: type[nn.Module]) -> Callable[[Adapter], Adapter]:
        """Teach `convert` a class: `@convert.register(MyAttention)` above an adapter.

        `adapter(module, batches, *args, **kwargs)` stands in for the forward of every converted module of the class
        (and of subclasses that do not override it). `batches` is a `RandomBatches`: `batches.attend(q, k, v)` is
        softmax attention, `batches.apply(function, x)` any function over sets, and `batches.forward(...)` the module's
        own forward.

        Args:
            module_class: a subclass of `torch.nn.Module`.

        Returns:
            A decorator that takes the adapter and returns it.

        Raises:
            TypeError: `module_class` is not a class of modules, or the adapter cannot be called.

        Example:
            >>> import torch
            >>> class Attention(torch.nn.Module):
            ...     def forward(self, x):  # [B, N, C]
            ...         return torch.softmax(x @ x.mT, dim=-1) @ x
            >>> @convert.register(Attention)
            ... def attend(module, batches, x):
            ...     return batches.attend(*(3 * [x.unsqueeze(2)]), scale=1.0).squeeze(2)
            >>> _ = convert(model := Attention(), batch_size=64)
            >>> model(torch.randn(1, 1000, 8)).shape
            torch.Size([1, 1000, 8])
        """
        if not (isinstance(module_class, type) and issubclass(module_class, nn.Module)):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise TypeError(f"module_class must be a subclass of torch.nn.Module, got {module_class!r}")

        def add(adapter: Adapter) -> Adapter:
            if not callable(adapter):
                raise TypeError(f"adapter must be callable, got {type(adapter).__name__}")
            name = f"registered for {module_class.__name__}"
            add_adapter_rule(
                module_class, name, f"as {getattr(adapter, '__qualname__', repr(adapter))} does it", adapter
            )
            return adapter

        return add


convert = Convert()


def _as_predicate(where: str | Where | None) -> Where:
    if where is None:
        return lambda path, module: True
    if isinstance(where, str):
        return lambda path, module: fnmatch.fnmatchcase(path, where)
    if callable(where):
        return where
    raise TypeError(f"where must be a pattern or a function of (path, module), got {type(where).__name__}")


class _Plan:
    """Which modules are converted by what, found before anything is touched."""

    def __init__(self, where: Where) -> None:
        self.steps: list[tuple[str, nn.Module, Rule]] = []
        self.left_alone: list[LeftAlone] = []
        self._where = where
        self._seen: dict[nn.Module, bool] = {}

    def visit(self, path: str, module: nn.Module, ancestors: tuple[nn.Module, ...]) -> bool:
        """Plan for `module` and all inside it; return whether anything there was converted or named."""
        if module not in self._seen:
            self._seen[module] = self._plan(path, module, ancestors)
        return self._seen[module]

    def _plan(self, path: str, module: nn.Module, ancestors: tuple[nn.Module, ...]) -> bool:
        rule, reason = (_AGAIN, None) if has_random_batches(module) else find_rule(module, ancestors)
        around = rule is not None and rule.around is not None
        if rule is not None and not around:
            if self._where(path, module):
                self.steps.append((path, module, rule))
                return True  # what is inside is the rule's concern
            reason = "left out by `where`"
        if reason is not None and not is_swapped(module):
            self._leave(path, module, reason)
        if rule is _AGAIN:
            return True  # what is inside attends in random batches as it is
        inner = [
            self.visit(f"{path}.{name}" if path else name, child, (*ancestors, module))
            for name, child in module.named_children()
        ]
        if any(inner) or reason is not None or around:
            return True
        if _looks_like_attention(module):
            kind = type(module).__name__
            self._leave(path, module, f"no rule knows {kind}; teach it with rb.convert.register({kind})")
            return True
        return False

    def add_surroundings(self, model: nn.Module) -> None:
        """Rules for modules around those that are converted."""
        converted = {module for _, module, _ in self.steps}
        for path, module in model.named_modules():
            rule, _ = find_rule(module)
            if rule is None or rule.around is None or is_swapped(module):
                continue
            if any(inner in converted for inner in rule.around(module)):
                self.steps.append((path, module, rule))

    def _leave(self, path: str, module: nn.Module, reason: str) -> None:
        self.left_alone.append(LeftAlone(path, bare_class(module).__name__, reason))


def _change_settings(module: Any, sampling: Sampling) -> Undo:
    before: Sampling = getattr(module, ATTRIBUTE)
    rule = rule_of_swapped(module)
    undo_more = None if rule is None or rule.again is None else rule.again(module, sampling)
    setattr(module, ATTRIBUTE, sampling)

    def undo() -> None:
        if undo_more is not None:
            undo_more()
        if sampling_of(module) is sampling:  # else the conversion itself, or a later call, was undone otherwise
            setattr(module, ATTRIBUTE, before)

    return undo


_AGAIN = Rule("random batches already", "it takes the new settings", _change_settings)


def _looks_like_attention(module: nn.Module) -> bool:
    code = getattr(getattr(type(module), "forward", None), "__code__", None)
    calls = code is not None and "scaled_dot_product_attention" in code.co_names
    return calls or re.search("atten|attn", type(module).__name__, flags=re.IGNORECASE) is not None


def _nothing_to_convert(model: nn.Module, left: list[LeftAlone]) -> str:
    name = type(model).__name__
    if not left:
        return f"model must hold attention, but nothing in {name} looks like it; teach a class with rb.convert.register"
    rows = "\n".join(_table(["path", "class", "why"], [[row.path, row.kind, row.reason] for row in left]))
    return f"nothing in {name} was converted; what looks like attention was left alone:\n{rows}"
