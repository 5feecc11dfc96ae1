"""Adapters: `adapter(module, batches, *args, **kwargs)` stands in for the forward of a converted module."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from randbatch._shapes import Bool, Int, Shaped
from randbatch.conversion.arguments import Other, other_tokens, refuse_other_tokens
from randbatch.conversion.rules import REGISTRY, Rule, make_subclass
from randbatch.conversion.swap import Undo, bare_class, set_attributes, set_class, undo_each
from randbatch.nn.batches import apply_in_batches, attend_in_batches
from randbatch.nn.config import ATTRIBUTE, RandomBatchConfig

__all__ = ["Adapter", "AdapterRule", "ClassRule", "RandomBatches"]

Adapter = Callable[..., Any]


class RandomBatches:
    """What an adapter works with: the random batches of one call of one module."""

    def __init__(self, module: nn.Module, original: type[nn.Module], others: tuple[Other, ...] = ()) -> None:
        self._module = module
        self._original = original
        self._others = others

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The module's own forward, as its author wrote it."""
        return self._original.forward(self._module, *args, **kwargs)

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
        settings: Any = getattr(self._module, ATTRIBUTE)
        return attend_in_batches(
            settings, self._module.training, query, key, value, mask=mask, batch=batch, scale=scale, dropout_p=dropout_p
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
        settings: Any = getattr(self._module, ATTRIBUTE)
        return apply_in_batches(settings, self._module.training, function, x, mask, batch, owner=self._module)

    def refuse_other_tokens(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Refuse a call of the module's forward that gives it other tokens to attend to than those that ask.

        Raises:
            ValueError: one of `args` and `kwargs` brings them, by its name: `context`, `memory`, `key` or the like.
        """
        refuse_other_tokens(self._original, self._others, args, kwargs)


class AdapterRule(Rule):
    """A rule whose `adapter` stands in for the forward; override it."""

    def adapter(self, module: nn.Module, batches: RandomBatches, /, *args: Any, **kwargs: Any) -> Any:
        """The forward of a converted module, with its random batches."""
        raise NotImplementedError

    def subclass(self, original: type[nn.Module], base: type[nn.Module]) -> type[nn.Module]:
        """The original with another forward."""
        adapter, others = self.adapter, other_tokens(base)

        def forward(module: nn.Module, /, *args: Any, **kwargs: Any) -> Any:
            return adapter(module, RandomBatches(module, base, others), *args, **kwargs)

        return make_subclass((original,), {"forward": forward})

    def swap(self, module: nn.Module, settings: RandomBatchConfig) -> Undo:
        """Give the module the adapter for its forward and, if the rule sets it, its settings."""
        cls = REGISTRY.subclass_of(bare_class(module))
        undo_attributes = set_attributes(module, **({ATTRIBUTE: settings} if ATTRIBUTE in self.sets else {}))
        return undo_each(set_class(module, cls), undo_attributes)


class ClassRule(AdapterRule):
    """A function as the adapter of one class.

    Args:
        cls: the class.
        name: how the report calls the rule.
        changes: what the conversion changes in meaning.
        function: the adapter.
    """

    def __init__(self, cls: type[nn.Module], name: str, changes: str, function: Adapter) -> None:
        self.cls, self.name, self.changes = cls, name, changes
        self._function = function

    def adapter(self, module: nn.Module, batches: RandomBatches, /, *args: Any, **kwargs: Any) -> Any:
        """The function."""
        return self._function(module, batches, *args, **kwargs)
