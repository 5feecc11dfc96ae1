"""What a conversion rule declares, and the one registry in which rules are found.

A rule is one object. Those for the modules of a library stand in one file of `randbatch.conversion.libraries`, as its
`RULES`; any other is handed to `REGISTRY.add`.

A converted module stays the object that it was. Its class becomes a subclass, so parameters, buffers, hooks, keys and
`isinstance` are what they were.
"""

from __future__ import annotations

import importlib
import inspect
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from typing import Any

from torch import nn

from randbatch._errors import InvalidValue
from randbatch.conversion.swap import Undo, bare_class, why_taken
from randbatch.nn import former
from randbatch.nn.config import ATTRIBUTE, RandomBatchConfig, config_of

__all__ = [
    "NEW_SETTINGS",
    "REGISTRY",
    "Already",
    "Ancestors",
    "Convertible",
    "Refused",
    "Registry",
    "Rule",
    "Unknown",
    "Verdict",
    "make_subclass",
]

Ancestors = tuple[nn.Module, ...]
"""The modules around a module, outermost first."""

_ORIGINAL = "_random_batch_original"  # of a class that was made here: the class before conversion


class Rule:
    """How the modules of a class, or of the classes that it recognises, are converted.

    It also serves subclasses that leave the forward alone.

    Attributes:
        name: how the report calls it.
        changes: what the conversion changes in meaning, for the report.
        cls: the class it serves; None for a rule whose `serves` recognises classes.
        sets: names of the attributes that `swap` gives to a module; a module that has one already is left alone.
        any_forward: whether it also serves a module whose forward is not that of the class.
    """

    name: str
    changes: str
    cls: type[nn.Module] | None = None
    sets: tuple[str, ...] = (ATTRIBUTE,)
    any_forward: bool = False

    def serves(self, cls: type[nn.Module]) -> bool:
        """Whether it is for this class; override it to recognise classes by their names or their code."""
        return cls is self.cls

    def why_not(self, module: nn.Module, ancestors: Ancestors) -> str | None:
        """Why this module cannot be converted; None if it can."""
        return None

    def depends_on(self, module: nn.Module) -> Iterable[nn.Module] | None:
        """For a module that does not attend itself: it is converted if one of these modules was, after them."""
        return None

    def subclass(self, original: type[nn.Module], base: type[nn.Module]) -> type[nn.Module]:
        """The class of a converted module; `base` is the class that the rule serves, `original` it or a subclass."""
        raise NotImplementedError(f"{self.name} gives no class to a module")

    def swap(self, module: nn.Module, settings: RandomBatchConfig) -> Undo:
        """Convert the module in place; return what undoes it."""
        raise NotImplementedError

    def renew(self, module: nn.Module, settings: RandomBatchConfig) -> Undo:
        """Give other settings to a module that is converted already; return what undoes it."""
        before = getattr(module, ATTRIBUTE)
        setattr(module, ATTRIBUTE, settings)

        def undo() -> None:
            if config_of(module) is settings:  # else the conversion itself, or a later call, was undone otherwise
                setattr(module, ATTRIBUTE, before)

        return undo


@dataclass(frozen=True)
class Convertible:
    """The module can be converted by this rule."""

    rule: Rule


@dataclass(frozen=True)
class Refused:
    """There is a rule for modules of its kind, and this one cannot be converted."""

    reason: str


@dataclass(frozen=True)
class Already:
    """It was converted before, or has random batches by itself.

    Attributes:
        holds_settings: whether it takes new settings; a module around attention holds none.
    """

    holds_settings: bool


@dataclass(frozen=True)
class Unknown:
    """No rule is for modules of its kind."""


Verdict = Convertible | Refused | Already | Unknown


@dataclass(frozen=True)
class _Claim:
    """The rule for a class, and the class in its ancestry that the rule serves."""

    rule: Rule
    base: type[nn.Module]


class Registry:
    """All conversion rules. The newest one comes first, those of the libraries come last."""

    def __init__(self) -> None:
        self._added: list[Rule] = []
        self._of_libraries: list[Rule] = []
        self._loaded: set[str] = set()
        self._claims: dict[type[nn.Module], _Claim | None] = {}

    def add(self, rule: Rule) -> None:
        """Take one more rule, before all others."""
        self._added.insert(0, rule)
        self._claims.clear()

    def rules(self) -> tuple[Rule, ...]:
        """The rules in the order in which they are asked, with those of every library that is loaded."""
        libraries: dict[str, str | None] = importlib.import_module("randbatch.conversion.libraries").LIBRARIES
        for name, package in libraries.items():
            if name not in self._loaded and (package is None or sys.modules.get(package) is not None):
                self._of_libraries += importlib.import_module(f"randbatch.conversion.libraries.{name}").RULES
                self._loaded.add(name)
        return *self._added, *self._of_libraries

    def judge(self, module: nn.Module, ancestors: Ancestors = ()) -> Verdict:
        """Whether and how a module is converted."""
        kind, holds_settings = bare_class(module), config_of(module) is not None
        if _original_of(module) is not None:
            return Already(holds_settings)
        claim = self._claim(kind)
        if claim is None:
            return Already(True) if holds_settings else Unknown()
        rule, has_own = claim.rule, kind.forward is not claim.base.forward
        if has_own and holds_settings:
            return Already(True)
        if has_own and not rule.any_forward:
            name = kind.__name__
            return Refused(
                f"{name} overrides the forward of {claim.base.__name__}; teach it with rb.convert.register({name})"
            )
        if "forward" in vars(module) and not rule.any_forward:
            return Refused("its forward was replaced on the instance, so a rule for the class would not be called")
        reason = rule.why_not(module, ancestors) or why_taken(module, rule.sets)
        return Convertible(rule) if reason is None else Refused(reason)

    def subclass_of(self, original: type[nn.Module]) -> type[nn.Module]:
        """The class that a converted module of class `original` has.

        Raises:
            ValueError: no rule knows it, as in a process that loads a module of a class that it was not taught.
        """
        claim = self._claim(original)
        if claim is None:
            raise InvalidValue(
                f"no adapter is registered for {original.__name__}: rb.convert.register it before it is loaded"
            )
        return _make_class(claim, original)

    def rule_of(self, converted: nn.Module) -> Rule | None:
        """The rule by which a module was converted; None for one that has random batches by itself."""
        original = _original_of(converted)
        claim = None if original is None else self._claim(original)
        return None if claim is None else claim.rule

    def _claim(self, kind: type[nn.Module]) -> _Claim | None:
        rules = self.rules()
        if kind not in self._claims:
            classes = [cls for cls in kind.__mro__ if issubclass(cls, nn.Module)]
            found = (_Claim(rule, cls) for cls in classes for rule in rules if rule.serves(cls))
            self._claims[kind] = next(found, None)
        return self._claims[kind]


REGISTRY = Registry()


@cache
def _make_class(claim: _Claim, original: type[nn.Module]) -> type[nn.Module]:
    return claim.rule.subclass(original, claim.base)


def _original_of(module: nn.Module) -> type[nn.Module] | None:
    """The class of a module before it was converted; None if its class was not made here."""
    return getattr(type(module), _ORIGINAL, None)


def make_subclass(bases: tuple[type[nn.Module], ...], namespace: dict[str, Any]) -> type[nn.Module]:
    """A class made at run time, of the last of `bases`. It has no name to be pickled by: the registry makes it again.

    A user's own attribute of the settings' former name stays what it is.
    """
    original = bases[-1]

    def reduce(module: nn.Module, protocol: Any) -> tuple[Any, ...]:
        _, _, *state = original.__reduce_ex__(module, protocol)
        return _new, (original,), *state

    own = {
        "__doc__": original.__doc__,
        "__module__": original.__module__,
        "__reduce_ex__": reduce,
        _ORIGINAL: original,
        former.NAME: inspect.getattr_static(original, former.NAME, former.FormerName()),
    }
    metaclass: Any = type(original)
    return metaclass(f"RandomBatch{original.__name__}", bases, {**own, **namespace})


def _new(original: type[nn.Module]) -> nn.Module:
    """What a pickle calls, perhaps in a process where nothing has been converted yet."""
    cls = REGISTRY.subclass_of(original)
    return cls.__new__(cls)


class _NewSettings(Rule):
    name = "random batches already"
    changes = "it takes the new settings"

    def swap(self, module: nn.Module, settings: RandomBatchConfig) -> Undo:
        rule = REGISTRY.rule_of(module) or self
        return rule.renew(module, settings)


NEW_SETTINGS = _NewSettings()
"""For a module that has random batches already."""
