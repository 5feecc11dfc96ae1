"""`convert`: put the attention of an existing model into random batches, in place, and report what was done."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Callable
from typing import Any, Concatenate, ParamSpec, Protocol, TypeVar, cast, runtime_checkable

from torch import nn

from randbatch._errors import InvalidType, InvalidValue
from randbatch.conversion.adapters import Adapter, ClassRule
from randbatch.conversion.report import ConversionReport, Converted, Skipped, list_skipped
from randbatch.conversion.rules import (
    NEW_SETTINGS,
    REGISTRY,
    Already,
    Ancestors,
    Convertible,
    Refused,
    Rule,
    Unknown,
)
from randbatch.conversion.swap import bare_class
from randbatch.conversion.through_sdpa import through_sdpa
from randbatch.nn.calls import assign_seeds
from randbatch.nn.config import RandomBatchConfig, config_of

__all__ = ["convert", "register"]

Where = Callable[[str, nn.Module], bool]
P = ParamSpec("P")
R = TypeVar("R", covariant=True)


def register(module_class: type[nn.Module]) -> Callable[[Adapter], Adapter]:
    """Teach `convert` a class: `@convert.register(MyAttention)` above an adapter.

    `adapter(module, batches, *args, **kwargs)` stands in for the forward of every converted module of the class, and of
    subclasses that do not override it. `batches` is a `randbatch.conversion.RandomBatches`: `batches.attend(q, k, v)`
    is softmax attention, `batches.apply(function, x)` any function over sets, and `batches.forward(...)` the module's
    own forward.

    Args:
        module_class: a subclass of `torch.nn.Module`.

    Returns:
        A decorator that takes the adapter and returns it.

    Raises:
        TypeError: `module_class` is not a class of modules, or the adapter cannot be called.

    Example:
        >>> import torch, randbatch as rb
        >>> class Attention(torch.nn.Module):
        ...     def forward(self, x):  # [B, N, C]
        ...         return torch.softmax(x @ x.mT, dim=-1) @ x
        >>> @rb.convert.register(Attention)
        ... def attend(module, batches, x):
        ...     return batches.attend(*(3 * [x.unsqueeze(2)]), scale=1.0).squeeze(2)
        >>> _ = rb.convert(model := Attention(), batch_size=64)
        >>> model(torch.randn(1, 1000, 8)).shape
        torch.Size([1, 1000, 8])
    """
    if not (isinstance(module_class, type) and issubclass(module_class, nn.Module)):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise InvalidType(f"module_class must be a subclass of torch.nn.Module, got {module_class!r}")

    def add(adapter: Adapter) -> Adapter:
        if not callable(adapter):
            raise InvalidType(f"adapter must be callable, got {type(adapter).__name__}")
        changes = f"as {getattr(adapter, '__qualname__', repr(adapter))} does it"
        REGISTRY.add(ClassRule(module_class, f"registered for {module_class.__name__}", changes, adapter))
        return adapter

    return add


@runtime_checkable
class _Convert(Protocol[P, R]):
    """A function, and the two that it has as attributes."""

    register: Callable[[type[nn.Module]], Callable[[Adapter], Adapter]]
    through_sdpa: Callable[Concatenate[nn.Module, Any, ...], Any]

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R: ...


def _with_attributes(function: Callable[P, R]) -> _Convert[P, R]:
    vars(function).update(register=register, through_sdpa=through_sdpa)
    return cast("_Convert[P, R]", function)


@_with_attributes
def convert(
    model: nn.Module,
    batch_size: int | RandomBatchConfig,
    *,
    where: str | Where | None = None,
    seed: int | None = None,
    **options: Any,
) -> ConversionReport:
    """Put the attention of a model into random batches of p tokens, in place.

    Parameters, `state_dict` keys, device, dtype, mode and hooks stay as they are. A module that occurs twice is
    converted once. A second call changes the settings of what is converted already. With `batch_size` >= N the
    converted model computes what it computed before.

    It knows torch's `MultiheadAttention` (also inside its encoder layers), torch_geometric's `GPSConv`,
    `PerformerAttention`, `SGFormerAttention` and `PolynormerAttention`, the attentions of Hugging Face encoders and of
    timm, and every class taught by `convert.register`. The report names whatever else looks like attention, and
    attention that is known to be cross-attention, causal, or biased between tokens.

    A converted model can be copied, pickled and sent to another process, where a class taught by `convert.register`
    must be taught first. Weights are those of the unconverted model, and load as before. transformers'
    `from_pretrained` makes full attention of them; the config of each converted part, saved with the weights, holds in
    its `random_batch` what `convert` was told: `convert(model, **model.config.random_batch)` converts again.

    Args:
        model: any module.
        batch_size: p >= 2, tokens in a random batch; or a `randbatch.nn.RandomBatchConfig` with all settings.
        where: which modules to convert: a pattern for paths such as `"layers.*.attn"`, or a function of path and
            module. Default: all that are known.
        seed: fixes the partitions of eval. Each module derives its own seed from its path, and each further call of a
            module in one forward of the model another. Default: 0, or that of the settings given as `batch_size`.
        **options: other options of `randbatch.nn.RandomBatchConfig`, such as `estimator`, `rounds` or `chunk_batches`.
            Linear attentions have no estimator, and take `chunk_batches` as an int.

    Returns:
        A `ConversionReport`. Print it to see what was converted, what that changes, and what was left alone; its method
        `undo` puts the model back.

    Raises:
        TypeError: `model` is not a module, an option is unknown, or an argument that must be an int is not.
        ValueError: nothing was converted (the message says what was left alone, and why), or a number out of range.

    Example:
        >>> import torch, randbatch as rb
        >>> layer = torch.nn.TransformerEncoderLayer(16, 4, batch_first=True)
        >>> report = rb.convert(layer, batch_size=64)
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
    if not isinstance(model, nn.Module):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise InvalidType(f"model must be a torch.nn.Module, got {type(model).__name__}")
    settings = RandomBatchConfig.of(batch_size, options if seed is None else {"seed": seed, **options})
    own, _ = RandomBatchConfig().resolved()
    if settings.resolved()[0] is not own:
        raise InvalidValue(
            f"interaction must be left at {own.name!r}: a converted model keeps the attention that it has, got "
            f"{settings.resolved()[0].name!r}"
        )
    plan = _Plan(_as_predicate(where))
    plan.visit("", model, ())
    if not plan.steps:
        raise InvalidValue(_nothing_to_convert(model, plan.skipped))
    report = ConversionReport([], plan.skipped, settings)
    try:
        _carry_out(plan, model, report)
    except BaseException:
        report.undo()  # all or nothing
        raise
    return report


def _carry_out(plan: _Plan, model: nn.Module, report: ConversionReport) -> None:
    settings = report.settings
    for path, module, rule in (*plan.steps, *plan.surroundings()):
        kind = bare_class(module).__name__
        report.on_undo(rule.swap(module, settings.copy()))
        report.converted.append(Converted(path, kind, rule.name, rule.changes))
    found = [(path, own) for path, module, _ in plan.steps if (own := config_of(module)) is not None]
    report.on_undo(assign_seeds(model, found, settings.seed))


def _as_predicate(where: str | Where | None) -> Where:
    if where is None:
        return lambda path, module: True
    if isinstance(where, str):
        return lambda path, module: fnmatch.fnmatchcase(path, where)
    if callable(where):
        return where
    raise InvalidType(f"where must be a pattern or a function of (path, module), got {type(where).__name__}")


class _Plan:
    """Which modules are converted by which rules, found before anything is touched."""

    def __init__(self, where: Where) -> None:
        self.steps: list[tuple[str, nn.Module, Rule]] = []
        self.skipped: list[Skipped] = []
        self._dependent: list[tuple[str, nn.Module, Rule]] = []
        self._where = where
        self._seen: dict[nn.Module, bool] = {}

    def visit(self, path: str, module: nn.Module, ancestors: Ancestors) -> bool:
        """Plan for `module` and all inside it; return whether anything there was converted or named."""
        if module not in self._seen:
            self._seen[module] = self._plan(path, module, ancestors)
        return self._seen[module]

    def _plan(self, path: str, module: nn.Module, ancestors: Ancestors) -> bool:
        verdict = REGISTRY.judge(module, ancestors)
        match verdict:
            case Convertible(rule) if rule.depends_on(module) is not None:
                self._dependent.append((path, module, rule))
            case Convertible(rule):
                if self._take(path, module, rule):
                    return True  # what is inside is the rule's concern
            case Already(holds_settings=True):
                self._take(path, module, NEW_SETTINGS)
                return True  # what is inside attends in random batches as it is
            case Refused(reason):
                self._skip(path, module, reason)
            case _:
                pass
        inner = [
            self.visit(f"{path}.{name}" if path else name, child, (*ancestors, module))
            for name, child in module.named_children()
        ]
        if any(inner) or not isinstance(verdict, Unknown):
            return True
        if _looks_like_attention(module):
            kind = type(module).__name__
            self._skip(path, module, f"no rule knows {kind}; teach it with rb.convert.register({kind})")
            return True
        return False

    def _take(self, path: str, module: nn.Module, rule: Rule) -> bool:
        """Convert the module, if `where` says so."""
        if self._where(path, module):
            self.steps.append((path, module, rule))
            return True
        self._skip(path, module, "left out by `where`")
        return False

    def _skip(self, path: str, module: nn.Module, reason: str) -> None:
        self.skipped.append(Skipped(path, bare_class(module).__name__, reason))

    def surroundings(self) -> list[tuple[str, nn.Module, Rule]]:
        """The modules around those that are converted."""
        converted = {module for _, module, _ in self.steps}
        return [
            (path, module, rule)
            for path, module, rule in self._dependent
            if any(inner in converted for inner in rule.depends_on(module) or ())
        ]


def _looks_like_attention(module: nn.Module) -> bool:
    code = getattr(getattr(type(module), "forward", None), "__code__", None)
    calls = code is not None and "scaled_dot_product_attention" in code.co_names
    return calls or re.search("atten|attn", type(module).__name__, flags=re.IGNORECASE) is not None


def _nothing_to_convert(model: nn.Module, skipped: list[Skipped]) -> str:
    name = type(model).__name__
    if not skipped:
        return f"model must hold attention, but nothing in {name} looks like it; teach a class with rb.convert.register"
    rows = "\n".join(list_skipped(skipped))
    return f"nothing in {name} was converted; what looks like attention was left alone:\n{rows}"
