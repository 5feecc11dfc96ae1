"""Which call of which module this is, within one forward of a model: layers that share their batches do not mix.

In eval a partition depends on a seed. `convert` and `set_inference` know the model: they derive each module's seed from
its path, and count the calls of a module that is used several times, anew in every forward of the model.
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any
from weakref import ref

import torch
from torch import Tensor, nn

from randbatch._autograd import is_backward, is_transformed
from randbatch.partition import fold_seed

if TYPE_CHECKING:
    from randbatch.nn.config import RandomBatchConfig

__all__ = ["Calls", "assign_seeds", "next_seed", "notice_shared_seed"]

_made = 0  # layers of this process that were given no seed


def next_seed() -> int:
    """The seed of a layer that is given none: by its number among such layers of this process."""
    global _made
    _made += 1
    return 0 if _made == 1 else fold_seed(0, _made)


class Calls:
    """How often each path was called in the present forward of a model; None between forwards.

    Attributes:
        counts: calls by path.
        repeated: paths that were called more than once in one forward.
    """

    def __init__(self) -> None:
        self.counts: dict[str, int] | None = None
        self.repeated: set[str] = set()

    def begin(self, module: nn.Module, args: Any) -> None:
        """A forward pre-hook of the model."""
        self.counts = {}

    def end(self, module: nn.Module, args: Any, out: Any) -> None:
        """A forward hook of the model."""
        self.counts = None

    def seed_of(self, path: str, seed: int) -> int:
        """The seed of the next call of a module; its first call, and one outside of the model's forward, has `seed`.

        Raises:
            RuntimeError: activation checkpointing computes one of several calls again, and which is not known.
        """
        if self.counts is None:
            if path in self.repeated and not torch.compiler.is_compiling() and is_backward():
                raise RuntimeError(
                    f"{path} is called several times in a forward, and activation checkpointing cannot compute one of "
                    "these calls again in eval: use train mode, or no checkpointing"
                )
            return seed
        number = self.counts.get(path, 0)
        self.counts[path] = number + 1
        if number == 1:
            self.repeated.add(path)
        return seed if number == 0 else fold_seed(seed, number)


def _counter(root: nn.Module) -> Calls | None:
    """The counter whose hooks a model has."""
    hooks: Any = root._forward_pre_hooks  # pyright: ignore[reportPrivateUsage]
    owners = (getattr(hook, "__self__", None) for hook in hooks.values())
    return next((owner for owner in owners if isinstance(owner, Calls)), None)


def assign_seeds(root: nn.Module, samplings: Iterable[tuple[str, RandomBatchConfig]], seed: int) -> Callable[[], None]:
    """Give each module of `root` a seed that follows from its path, and count its calls in every forward of `root`.

    Returns:
        What removes the hooks of `root` again, if they were made now.
    """
    calls = _counter(root)
    handles = []
    if calls is None:
        calls = Calls()
        handles = [root.register_forward_pre_hook(calls.begin), root.register_forward_hook(calls.end)]
    for path, sampling in samplings:
        sampling.seed = fold_seed(seed, int.from_bytes(hashlib.sha256(path.encode()).digest()[:6]))
        sampling.path, sampling.calls = path, calls

    def undo() -> None:
        for handle in handles:
            handle.remove()

    return undo


_last: tuple[int, Any, Tensor] | None = None
_warned = False
_compared: set[int] = set()  # origins whose copies were called on one input: they are models that somebody compares


def notice_shared_seed(sampling: RandomBatchConfig, seed: int, x: Tensor) -> None:
    """Warn once, when a module and its deep copy in turn draw the same random batches in eval, for other inputs `x`."""
    global _last, _warned
    if _warned or torch.compiler.is_compiling() or is_transformed():
        return
    before, _last = _last, (seed, ref(sampling), x[0].detach().clone())
    if before is None or before[0] != seed:
        return
    other = before[1]()
    if other is None or other is sampling or other.origin != sampling.origin or sampling.origin in _compared:
        return
    if _is_alike(before[2], _last[2]):
        _compared.add(sampling.origin)
    else:
        _warned = True
        warnings.warn(
            "a module and its deep copy drew the same random batches in eval; if they are layers of one model, tokens "
            "of different batches never mix there: call randbatch.set_inference(model, rounds=...), which gives each "
            "module a seed of its own. Two copies of a whole model may share their seeds",
            stacklevel=2,
        )


def _is_alike(old: Tensor, new: Tensor) -> bool:
    """Whether two models are compared on one input, and not two layers called one after the other."""
    return old.shape == new.shape and torch.allclose(old.cpu().float(), new.cpu().float(), rtol=1e-2, atol=1e-3)
