"""Seeds, and the hash of token numbers that a partition is sorted by."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from randbatch._autograd import is_batched, is_transformed
from randbatch._numerics import has_no_elements
from randbatch._shapes import Int

__all__ = ["draw_seed", "fold_seed", "hash_positions", "random_keys"]

_GOLDEN = 0x9E3779B97F4A7C15  # 2^64 / golden ratio: the stride of splitmix64's counter
_MIX = ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB))  # splitmix64's shifts and multipliers
_LAST_SHIFT = 31
_WORD = 1 << 64


def _mix(word: int) -> int:
    """Splitmix64's finalizer on a Python int: a bijection of 64-bit words whose output bits look independent."""
    for shift, factor in _MIX:
        word = ((word ^ (word >> shift)) * factor) % _WORD
    return word ^ (word >> _LAST_SHIFT)


def _signed(word: int) -> int:
    return word - _WORD if word >= _WORD // 2 else word


def fold_seed(seed: int, position: int) -> int:
    """A seed for the `position`-th draw that belongs to `seed` (a round, a layer), unrelated to its neighbours.

    >>> fold_seed(0, 0) != fold_seed(0, 1)
    True
    """
    return _mix((_mix(seed % _WORD) + (position + 1) * _GOLDEN) % _WORD) >> 1


def draw_seed() -> int:
    """A fresh seed from torch's default CPU generator.

    The default generator is what `torch.manual_seed` sets and what activation checkpointing replays; a private
    generator would not be replayed, and gradients would be silently wrong.
    """
    drawn = torch.randint(0, 2**63 - 1, (), device="cpu")
    if has_no_elements(drawn):
        return 0  # under a mode of fake tensors
    if is_transformed() and is_batched(drawn):
        raise NotImplementedError(
            "torch.func.vmap cannot draw other random batches for each sample: say randomness='same', which draws once "
            "for all"
        )
    return int(drawn.item())


def random_keys(num_tokens: int, seed: int, device: torch.device) -> Int[Tensor, " n"]:
    """Hash token numbers to int64 keys in [0, 2^63): splitmix64 started at the hashed seed."""
    start = _signed(_mix(seed % _WORD))
    if not torch.compiler.is_compiling():
        return _random_keys(num_tokens, start, device)
    operator: Any = torch.ops.randbatch.random_keys
    return operator(num_tokens, start, device)


def hash_positions(positions: Int[Tensor, " n"], seed: int, salt: Int[Tensor, " n"] | None = None) -> Tensor:
    """Hash any numbers as `random_keys` hashes 0 … N−1; tokens of one position and another `salt` differ."""
    start = _signed(_mix(seed % _WORD))
    counters = positions * _signed(_GOLDEN) + start
    return _finish(counters if salt is None else counters.add_(salt))


def _random_keys(num_tokens: int, start: int, device: torch.device) -> Tensor:
    keys = torch.arange(num_tokens, dtype=torch.int64, device=device)
    return _finish(keys.mul_(_signed(_GOLDEN)).add_(start))  # int64 arithmetic wraps, on every device


def _finish(keys: Tensor) -> Tensor:
    """Splitmix64's finalizer, in place; int64 in [0, 2^63)."""

    def xor_shift(keys: Tensor, shift: int) -> Tensor:
        # torch shifts int64 arithmetically; the mask makes the shift logical
        return keys.bitwise_xor_((keys >> shift).bitwise_and_((1 << (64 - shift)) - 1))

    for shift, factor in _MIX:
        xor_shift(keys, shift).mul_(_signed(factor))
    return xor_shift(keys, _LAST_SHIFT).bitwise_and_((1 << 63) - 1)


def _random_keys_fake(num_tokens: int, start: int, device: torch.device) -> Tensor:
    return torch.empty(num_tokens, dtype=torch.int64, device=device)


# The compiler must not look into it: what inductor (2.13) makes of it on a CPU are other keys than eager code's.
torch.library.define("randbatch::random_keys", "(SymInt num_tokens, int start, Device device) -> Tensor")
torch.library.impl("randbatch::random_keys", "CompositeExplicitAutograd", _random_keys)
torch.library.register_fake("randbatch::random_keys", _random_keys_fake)
