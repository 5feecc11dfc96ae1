"""The options that every interaction receives."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Options:
    """How to compute an interaction.

    Attributes:
        scale: factor of the logits; None for the interaction's own (1/√D for softmax).
        dropout_p: probability that an attention weight is dropped.
        backend: a name in `randbatch.kernels.BACKENDS`, or `"auto"`.
        need_log_norm: whether the logarithm of the denominator is wanted.
    """

    scale: float | None = None
    dropout_p: float = 0.0
    backend: str = "auto"
    need_log_norm: bool = False
