"""`explain`: which strategy and which backend a call takes, and why not the others."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from randbatch._errors import InvalidType, InvalidValue
from randbatch._numerics import as_autocast
from randbatch.execution import Choice, record
from randbatch.nn.config import config_of

__all__ = ["Explanation", "Step", "explain"]


@dataclass(frozen=True)
class Step:
    """One choice of a strategy.

    Attributes:
        where: the path of the module that was called; empty for a function.
        interaction: the name of the interaction.
        estimator: the name of the estimator.
        strategy: the name of the strategy that ran.
        rejected: the strategies before it, each with the reason why it could not.
        backend: the name of the backend; None where the interaction has none.
        backends: the backends before it, each with the reason why it could not.
    """

    where: str
    interaction: str
    estimator: str
    strategy: str
    rejected: tuple[tuple[str, str], ...]
    backend: str | None
    backends: tuple[tuple[str, str], ...]

    def __str__(self) -> str:
        head = f"{self.where or 'call'}: interaction {self.interaction}, estimator {self.estimator}"
        lines = [head, f"  strategy {self.strategy}", *(f"    not {name}: {reason}" for name, reason in self.rejected)]
        if self.backend is not None:
            lines += [f"  backend {self.backend}", *(f"    not {name}: {reason}" for name, reason in self.backends)]
        return "\n".join(lines)


@dataclass(frozen=True)
class Explanation:
    """What happened in a call; print it.

    Attributes:
        steps: in the order in which strategies were chosen. One that only changes the form of a call (padded sets
            become flat tokens) is followed by the one that it leads to.
    """

    steps: tuple[Step, ...]

    def __str__(self) -> str:
        return "\n".join(map(str, self.steps))


def explain(call: Callable[..., Any], *args: Any, **kwargs: Any) -> Explanation:
    """Run a call once and say which strategy and backend computed each interaction, and why each earlier one did not.

    The random state of torch is as before afterwards. With logging at debug level, the logger `randbatch` says the same
    of every call.

    Args:
        call: `random_batch_attention`, a layer, or any function or module that comes to random batches.
        *args: its arguments.
        **kwargs: its named arguments.

    Raises:
        TypeError: `call` cannot be called.
        ValueError: it came to no random batches.

    Example:
        >>> import randbatch as rb
        >>> q, k, v = torch.randn(3, 100, 2, 8, dtype=torch.float64).unbind()
        >>> print(explain(rb.random_batch_attention, q, k, v, batch_size=16, chunk_batches=2))
        call: interaction softmax, estimator plain
          strategy chunked
            not opaque: nothing is compiled
            ...
          backend sdpa
            not triton: 'auto' does not take it on cpu
            not cpu: it takes float32, got torch.float64
    """
    if not callable(call):
        raise InvalidType(f"call must be a function or a module, got {type(call).__name__}")
    choices: list[Choice] = []
    devices = range(torch.cuda.device_count()) if torch.cuda.is_available() else ()
    with torch.random.fork_rng(devices), record(choices.append):
        call(*args, **kwargs)
    if not choices:
        raise InvalidValue(f"call must come to random batches, but {_name(call)} did not")
    paths = {} if not isinstance(call, nn.Module) else {id(m): path for path, m in call.named_modules() if config_of(m)}
    return Explanation(tuple(_step(choice, paths) for choice in choices))


def _name(call: Any) -> str:
    return getattr(call, "__name__", type(call).__name__)


def _step(choice: Choice, paths: dict[int, str]) -> Step:
    call = choice.call
    like, merged = as_autocast(call.first)[0], call.rounds > 1 and not call.exact
    tried = list(call.interaction.backends(like, call.projections.sizes, call.options, merged=merged))
    tried = tried if choice.strategy.computes else []
    taken = next((backend.name for backend, reason in tried if reason is None), None)
    refused = tuple((backend.name, reason) for backend, reason in tried if reason is not None)
    owner = call.projections.owner
    where = paths.get(id(owner), "") if owner is not None else ""
    return Step(
        where, call.interaction.name, call.estimator.name, choice.strategy.name, choice.rejected, taken, refused
    )
