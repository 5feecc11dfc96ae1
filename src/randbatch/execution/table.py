"""The table of strategies: how a call is computed, and why not otherwise.

Each strategy says why it cannot take a call (`why_not`) and computes it (`run`). The first that can is taken. Some only
change the form of a call (padded sets become flat tokens, rounds are chosen) and hand it back to the table.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Generator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

import torch
from torch import Tensor

from randbatch.execution.call import Call

__all__ = ["STRATEGIES", "UNTRACED_FUNCTION", "Choice", "Strategy", "record", "run"]

_log = logging.getLogger("randbatch")

UNTRACED_FUNCTION = (
    "torch.compile cannot trace chunk_batches, or several rounds in training, of a wrapped module: leave them out, or "
    "compile without fullgraph=True"
)


class Strategy:
    """One way to compute a call.

    Attributes:
        name: how explanations call it.
        computes: whether it computes the call; else it only changes its form and hands it back to the table.
    """

    name: str = ""
    computes: bool = True

    def why_not(self, call: Call) -> str | None:
        """Why it cannot take a call; None if it can."""
        raise NotImplementedError

    def run(self, call: Call) -> Tensor:
        """The output, in the form of the input."""
        raise NotImplementedError


STRATEGIES: list[Strategy] = []
"""In the order in which they are tried; the last takes every call."""


@dataclass(frozen=True)
class Choice:
    """The strategy that a call took.

    Attributes:
        call: the call.
        strategy: the strategy.
        rejected: names of those before it, each with the reason why it could not.
    """

    call: Call
    strategy: Strategy
    rejected: tuple[tuple[str, str], ...]


_record: ContextVar[Callable[[Choice], None] | None] = ContextVar("randbatch_record", default=None)


@contextmanager
def record(note: Callable[[Choice], None]) -> Generator[None, None, None]:
    """Within it, `note` gets every choice."""
    token = _record.set(note)
    try:
        yield
    finally:
        _record.reset(token)


def run(call: Call) -> Tensor:
    """Compute a call by the first strategy that can.

    Raises:
        ValueError: interaction, estimator and options that have no meaning together.
    """
    call.check()
    rejected: list[tuple[str, str]] = []
    for strategy in STRATEGIES:
        reason = strategy.why_not(call)
        if reason is None:
            if not torch.compiler.is_compiling():
                _tell(call, strategy, rejected)
            return strategy.run(call)
        rejected.append((strategy.name, reason))
    raise AssertionError("the last strategy takes every call")


def _tell(call: Call, strategy: Strategy, rejected: list[tuple[str, str]]) -> None:
    note = _record.get()
    if note is not None:
        note(Choice(call, strategy, tuple(rejected)))
    if _log.isEnabledFor(logging.DEBUG):
        reasons = "; ".join(f"not {name}: {reason}" for name, reason in rejected)
        _log.debug("interaction %s: %s (%s)", call.interaction.name, strategy.name, reasons)
