"""The options that every interaction receives."""

from __future__ import annotations

from dataclasses import dataclass, replace

from randbatch.kernels import Backend

__all__ = ["Options"]


@dataclass(frozen=True)
class Options:
    """How to compute an interaction.

    Attributes:
        scale: factor of the logits; None for the interaction's own (1/√D for softmax).
        dropout_p: probability that an attention weight is dropped.
        backend: a name in `randbatch.kernels.BACKENDS`, a backend, or `"auto"`.
    """

    scale: float | None = None
    dropout_p: float = 0.0
    backend: str | Backend = "auto"

    def differentiable(self) -> Options:
        """The same by plain torch, which can be differentiated to every order."""
        return replace(self, backend="reference")
