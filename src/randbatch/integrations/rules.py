"""How a module of another library is taught to attend in random batches: rules, adapters, and the swap itself.

A rule belongs to a class. Most rules have an *adapter*, `adapter(module, batches, *args, **kwargs)`, which stands in
for the module's forward. The module itself stays: its class is replaced by a subclass whose forward calls the adapter,
so parameters, buffers, hooks, keys and `isinstance` are what they were.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Container, Iterable
from dataclasses import dataclass
from functools import cache
from typing import Any

from torch import Tensor, nn

from randbatch._shapes import Bool, Int, Shaped
from randbatch.integrations.arguments import Other, other_tokens
from randbatch.integrations.swap import Undo, bare_class, set_attributes, set_class, why_taken
from randbatch.nn import former
from randbatch.nn.opaque import attend_opaquely, is_opaque
from randbatch.nn.sampling import ATTRIBUTE, Sampling, apply_in_batches, attend_in_batches, sampling_of

__all__ = [
    "Adapter",
    "Ancestors",
    "RandomBatches",
    "Rule",
    "Undo",
    "add_adapter_rule",
    "add_rule",
    "add_teacher",
    "find_rule",
    "has_random_batches",
    "is_swapped",
    "make_subclass",
    "rule_of_swapped",
    "swap_class",
    "swap_module",
    "swapped_class",
]

Adapter = Callable[..., Any]
Ancestors = tuple[nn.Module, ...]


def _takes_all(module: nn.Module, ancestors: Ancestors) -> str | None:
    return None


@dataclass(frozen=True)
class Rule:
    """How the modules of one class are converted.

    Attributes:
        name: how the report calls it.
        changes: what the swap changes in meaning, for the report.
        swap: does it, and returns how to undo it.
        why_not: why this module cannot be converted; None if it can. It also gets the modules around it, outermost
            first.
        around: for a module that does not attend itself: the modules it depends on. The rule is applied after the
            others, if one of these was converted.
        attributes: names that `swap` sets; a module that has one of them already is left alone.
        any_forward: whether the rule also serves a module whose forward is not that of the class.
        again: what else a module needs that is given new settings.
    """

    name: str
    changes: str
    swap: Callable[[nn.Module, Sampling], Undo]
    why_not: Callable[[nn.Module, Ancestors], str | None] = _takes_all
    around: Callable[[nn.Module], Iterable[nn.Module]] | None = None
    attributes: tuple[str, ...] = (ATTRIBUTE,)
    any_forward: bool = False
    again: Callable[[nn.Module, Sampling], Undo] | None = None


class RandomBatches:
    """What an adapter works with: the random batches of one call of one module."""

    def __init__(self, module: nn.Module, original: type[nn.Module], others: tuple[Other, ...] = ()) -> None:
        self._module = module
        self.original = original
        self.others = others

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The module's own forward, as its author wrote it."""
        return self.original.forward(self._module, *args, **kwargs)

    def attend(
        self,
        query: Shaped[Tensor, "... h d"],
        key: Shaped[Tensor, "... h d"],
        value: Shaped[Tensor, "... h dv"],
        *,
        mask: Bool[Tensor, "b n"] | None = None,
        batch: Int[Tensor, " n"] | None = None,
        scale: float | None = None,
        dropout_p: float = 0.0,
    ) -> Shaped[Tensor, "... h dv"]:
        """Softmax attention, `y_i = Σ_{j∈C(i)} softmax_j(scale · q_i·k_j) v_j`, by the module's estimator and rounds.

        Args:
            query: flat tokens `[N, H, D]` or padded sets `[B, N, H, D]`.
            key: like `query`.
            value: like `query`, with any last size Dv.
            mask: bool `[B, N]`, True = token, for padded sets.
            batch: integers `[N]`, the graph of each token, for flat tokens.
            scale: factor of the logits. Default: 1/√D.
            dropout_p: probability that an attention weight is dropped; it counts in training only.

        Returns:
            The shape of `value`; zeros where there is no token.
        """
        sampling: Any = getattr(self._module, ATTRIBUTE)
        several_sets = mask is not None or batch is not None or (query.dim() == 4 and query.shape[0] > 1)
        opaque = is_opaque(sampling, self._module.training, several_sets=several_sets)
        return (attend_opaquely if opaque else attend_in_batches)(
            sampling, self._module.training, query, key, value, mask=mask, batch=batch, scale=scale, dropout_p=dropout_p
        )

    def apply(
        self,
        function: Callable[[Tensor], Tensor],
        x: Shaped[Tensor, "n c"] | Shaped[Tensor, "b n c"],
        *,
        mask: Bool[Tensor, "b n"] | None = None,
        batch: Int[Tensor, " n"] | None = None,
    ) -> Tensor:
        """Any function over sets, `[M, P, C] -> [M, P, C']`, inside the batches; several rounds are averaged.

        Args:
            function: gets whole batches of equal size, never padding or a mask.
            x: flat tokens `[N, C]` or padded sets `[B, N, C]`.
            mask: bool `[B, N]`, True = token, for padded sets.
            batch: integers `[N]`, the graph of each token, for flat tokens.

        Returns:
            `[N, C']` or `[B, N, C']`; zeros where there is no token.
        """
        sampling: Any = getattr(self._module, ATTRIBUTE)
        return apply_in_batches(
            sampling,
            self._module.training,
            function,
            x,
            mask,
            batch,
            owner=self._module,
        )


_RULES: dict[type[nn.Module], Rule] = {}
_TEACHERS: list[Callable[[type[nn.Module]], None]] = []
_FORWARDS: dict[type[nn.Module], Callable[..., Any]] = {}


def add_rule(cls: type[nn.Module], rule: Rule, forward: Callable[..., Any] | None = None) -> None:
    """Convert modules of `cls`, and of subclasses with the same forward, by `rule`; `forward` is for `swap_class`."""
    _RULES[cls] = rule
    if forward is not None:
        _FORWARDS[cls] = forward


def add_adapter_rule(
    cls: type[nn.Module],
    name: str,
    changes: str,
    adapter: Adapter,
    why_not: Callable[[nn.Module, Ancestors], str | None] = _takes_all,
) -> None:
    """Convert modules of `cls` by an adapter in place of their forward."""
    others = other_tokens(cls)

    def forward(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return adapter(module, RandomBatches(module, cls, others), *args, **kwargs)

    add_rule(cls, Rule(name, changes, swap_module, why_not), forward)


def add_teacher(teacher: Callable[[type[nn.Module]], None]) -> None:
    """Let `teacher` add a rule for a class that it recognises when it first meets it, by its name or its code."""
    _TEACHERS.append(teacher)


def _known_base(kind: type[nn.Module], known: Container[type]) -> type[nn.Module] | None:
    for cls in kind.__mro__:
        if cls not in _RULES and issubclass(cls, nn.Module):
            for teacher in _TEACHERS:
                teacher(cls)
        if cls in known:
            return cls
    return None


def find_rule(module: nn.Module, ancestors: Ancestors = ()) -> tuple[Rule | None, str | None]:
    """The rule for a module and None, or why there is none; `(None, None)` for a module that nobody claims."""
    kind = bare_class(module)
    base = _known_base(kind, _RULES)
    if base is None:
        return None, None
    rule = _RULES[base]
    if kind.forward is not base.forward and not rule.any_forward:
        return None, (
            f"{kind.__name__} overrides the forward of {base.__name__}; "
            f"teach it with rb.convert.register({kind.__name__})"
        )
    if "forward" in vars(module) and not rule.any_forward:
        return None, "its forward was replaced on the instance, so a rule for the class would not be called"
    reason = rule.why_not(module, ancestors) or why_taken(module, rule.attributes)
    return (rule, None) if reason is None else (None, reason)


def has_random_batches(module: nn.Module) -> bool:
    """Whether a module attends in random batches, by conversion or by itself, and can be given new settings."""
    kind = bare_class(module)
    base = None if is_swapped(module) else _known_base(kind, _RULES)
    return sampling_of(module) is not None and (base is None or kind.forward is not base.forward)


def rule_of_swapped(module: nn.Module) -> Rule | None:
    """The rule by which a module was converted; None for one that has random batches by itself."""
    original: type[nn.Module] | None = getattr(type(module), "_random_batch_original", None)
    base = None if original is None else _known_base(original, _RULES)
    return None if base is None else _RULES[base]


def swapped_class(original: type[nn.Module]) -> type[nn.Module]:
    """The subclass of `original` whose forward is the one registered for it."""
    base = _known_base(original, _FORWARDS)
    if base is None:
        raise ValueError(
            f"no adapter is registered for {original.__name__}: rb.convert.register it before it is loaded"
        )
    return _make_class(original, _FORWARDS[base])


@cache
def _make_class(original: type[nn.Module], forward: Callable[..., Any]) -> type[nn.Module]:
    return make_subclass((original,), swapped_class, {"forward": forward})


def make_subclass(
    bases: tuple[type[nn.Module], ...], remake: Callable[[Any], type[nn.Module]], namespace: dict[str, Any]
) -> type[nn.Module]:
    """A class made at run time, of the last of `bases`. It has no name to be pickled by: `remake` makes it again."""
    original = bases[-1]

    def reduce(module: nn.Module, protocol: Any) -> tuple[Any, ...]:
        _, _, *state = original.__reduce_ex__(module, protocol)
        return _new, (remake, original), *state

    named = inspect.getattr_static(original, former.NAME, former.FormerName())  # the user's, if there is one
    namespace = {former.NAME: named, **namespace}
    own = {"__doc__": original.__doc__, "__module__": original.__module__, "__reduce_ex__": reduce}
    metaclass: Any = type(original)
    return metaclass(f"RandomBatch{original.__name__}", bases, {**own, "_random_batch_original": original, **namespace})


def _new(remake: Callable[[Any], type[nn.Module]], original: type[nn.Module]) -> nn.Module:
    """What a pickle calls, perhaps in a process where nothing has been converted yet."""
    importlib.import_module("randbatch.integrations").load_rules()
    cls = remake(original)
    return cls.__new__(cls)


def swap_class(module: nn.Module) -> Undo:
    """Give the module the registered forward, in place."""
    return set_class(module, swapped_class(bare_class(module)))


def swap_module(module: nn.Module, sampling: Sampling) -> Undo:
    """Give the module the registered forward and its sampling, in place."""
    undo_attributes = set_attributes(module, **{ATTRIBUTE: sampling})
    undo_class = swap_class(module)

    def undo() -> None:
        undo_class()
        undo_attributes()

    return undo


def is_swapped(module: nn.Module) -> bool:
    """Whether the module's forward is already a registered one."""
    return hasattr(type(module), "_random_batch_original")
