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
from randbatch.interactions.rounds import Projections

__all__ = ["STRATEGIES", "UNTRACED_FUNCTION", "Choice", "Strategy", "Whole", "record", "run"]

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


class Whole(Strategy):
    """All batches at once; backward keeps what it needs."""

    name = "whole"

    def why_not(self, call: Call) -> str | None:
        """It takes every call."""
        return None

    def run(self, call: Call) -> Tensor:
        """Without a projection tokens stay where they stand, and a backend gathers them itself."""
        projections, interaction, estimator, options = call.projections, call.interaction, call.estimator, call.options
        if torch.compiler.is_compiling() and call.rounds > 1 and call.seed is None and not call.exact:
            raise NotImplementedError(UNTRACED_FUNCTION)
        rounds = call.draw()
        part = rounds.only
        if rounds.num_tokens == 0 if part is None else not part.groups:  # which asks nothing of an N that is a symbol
            out = interaction.of_nothing(projections.project(*projections.tensors))
        elif part is None:
            projected = projections.project(*projections.tensors)
            out = estimator.over_rounds(interaction, Projections(projected, projections.sizes), rounds, options)
        elif projections.is_projected:
            out = estimator.in_batches(interaction, projections.tensors, part, options)
        else:
            # moving C channels before the projection costs a third of moving queries, keys and values later
            projected = projections.project(*(part.pack(x) for x in projections.tensors))
            out = part.unpack(estimator.in_batches(interaction, projected, part.packed(), options))
        return projections.finish(out)


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
