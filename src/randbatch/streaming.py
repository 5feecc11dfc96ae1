"""A few random batches at a time, computed again in backward: memory is that of one piece, whatever N and p.

Batches are independent, and a piece of them is a contiguous range of batch order. Its rows are gathered, computed and
written to their place; nothing of it is kept. In backward the same is done once more, with the gradient. The gather and
the scatter are inside the piece, so that no permuted copy of all tokens is ever made.

`torch.utils.checkpoint` around each piece would not do: the backward of a gather of some rows is as large as all
tokens, once for each piece.

Shape letters: N tokens, n tokens of a piece, M batches, H heads, D head size.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import get_device_states, set_device_states

from randbatch._autograd import refuse_second_derivative, refuse_transforms
from randbatch._memory import free_bytes
from randbatch._rows import gather_rows, scatter_rows
from randbatch._shapes import Int
from randbatch.closure import Closure, mark
from randbatch.partition import Partition

__all__ = ["CHUNKS_ONCE", "ChunkBatches", "Gradients", "Replay", "piece_size", "refuse_chunks", "stream"]

ChunkBatches = int | Literal["auto"] | None
"""Batches at a time; `"auto"` as many as fit; None all at once, without recomputation."""

_ENOUGH = {"cpu": 2**25}  # bytes of a piece: larger ones are not faster, and on a CPU they fall out of its cache
_ENOUGH_ELSEWHERE = 2**29
_SHARE = 0.5  # of the free memory, for an estimate that knows nothing of the allocator


def piece_size(chunk_batches: ChunkBatches, part: Partition, bytes_per_token: int) -> int:
    """How many batches are computed at a time: what is asked for, or for `"auto"` as many as fit into free memory.

    A piece grows to 32 MiB on a CPU and to 512 MiB elsewhere, if half of the free memory is as much: more would not
    make it faster.
    """
    assert chunk_batches is not None
    if isinstance(chunk_batches, int):
        return chunk_batches
    device = part.order.device
    room = min(_SHARE * free_bytes(device), _ENOUGH.get(device.type, _ENOUGH_ELSEWHERE))
    return max(1, int(room / (bytes_per_token * max(part.num_slots, 1))))


CHUNKS_ONCE = "set chunk_batches to None"


def refuse_chunks(owner: nn.Module | None) -> None:
    """Refuse what a module cannot be computed again in.

    Raises:
        NotImplementedError: a transform of torch.func is at work, or a module inside the owner is sharded by
            `fully_shard`, which gathers its parameters for one forward and one backward only.
    """
    refuse_transforms("chunk_batches", CHUNKS_ONCE)
    fsdp: Any = sys.modules.get("torch.distributed.fsdp")
    sharded: Any = getattr(fsdp, "FSDPModule", None)
    if owner is None or sharded is None:
        return
    for path, module in owner.named_modules():
        if path and isinstance(module, sharded):
            raise NotImplementedError(
                f"chunk_batches cannot compute {path} again in backward, which fully_shard has sharded: shard the "
                f"module around it instead, or {CHUNKS_ONCE}"
            )


@dataclass
class Replay:
    """The random state, the autocast and the mode of a forward pass, so that backward can do the same again."""

    tensors: Sequence[Tensor]
    owner: nn.Module | None = None
    _modes: list[tuple[nn.Module, bool]] = field(init=False)
    _state: Tensor = field(init=False)
    _of_devices: tuple[Any, Any] = field(init=False)
    _autocast: dict[str, Any] = field(init=False)

    def __post_init__(self) -> None:
        kind = self.tensors[0].device.type
        self._state = torch.get_rng_state()
        self._of_devices = get_device_states(*self.tensors)
        # no cache: what autocast casts without a gradient here would be used where one is needed
        self._autocast = {
            "device_type": kind,
            "enabled": torch.is_autocast_enabled(kind),
            "dtype": torch.get_autocast_dtype(kind),
            "cache_enabled": False,
        }
        self.tensors = ()
        self._modes = [] if self.owner is None else [(module, module.training) for module in self.owner.modules()]

    @contextmanager
    def first(self) -> Generator[None, None, None]:
        """Around the forward pass."""
        with torch.autocast(**self._autocast):
            yield

    @contextmanager
    def again(self) -> Generator[None, None, None]:
        """Around the backward pass."""
        devices, states = self._of_devices
        kind = self._autocast["device_type"]
        with (
            torch.random.fork_rng(devices, device_type="cuda" if kind == "cpu" else kind),
            torch.autocast(**self._autocast),
        ):
            torch.set_rng_state(self._state)
            set_device_states(devices, states, device_type=kind)
            changed = [(module, module.training) for module, mode in self._modes if module.training != mode]
            for module, mode in changed:  # train() and eval() between forward and backward are none of its business
                module.training = not mode
            try:
                yield
            finally:
                for module, mode in changed:
                    module.training = mode


class Gradients:
    """The gradients of tokens and of parameters, added up piece by piece."""

    def __init__(
        self, tensors: Sequence[Tensor], parameters: Sequence[Tensor], needed: Sequence[bool], *, several: bool = False
    ) -> None:
        self._tensors = tensors
        self._of_tokens = needed[: len(tensors)]
        self._parameters = parameters
        self._needed = needed
        everything = [*tensors, *parameters]
        # what has several terms is added up in at least fp32: a parameter's gradient, and a token's over several rounds
        once = 0 if several else len(tensors)
        self._totals = [
            torch.zeros_like(x, dtype=x.dtype if i < once else torch.promote_types(x.dtype, torch.float32))
            if need
            else None
            for i, (x, need) in enumerate(zip(everything, needed, strict=True))
        ]
        self._dtypes = [x.dtype for x in everything]

    def rows(self, rows: Int[Tensor, " n"] | None) -> list[Tensor]:
        """The tokens of a chunk (None: all, in their order), to be differentiated by."""
        taken = [x.detach() if rows is None else gather_rows(x.detach(), rows) for x in self._tensors]
        return [x.requires_grad_() if need else x for x, need in zip(taken, self._of_tokens, strict=True)]

    def add(
        self,
        rows: Int[Tensor, " n"] | None,
        inputs: Sequence[Tensor],
        outputs: Sequence[Tensor],
        grads: Sequence[Tensor],
        closure: Closure | None,
    ) -> None:
        """Pull `grads` back from `outputs` to the tokens `rows`, which were `inputs`, and to what `closure` found."""
        known = [(x, g) for x, g in zip(outputs, grads, strict=True) if x.requires_grad]
        if not known:
            return
        everything = [*inputs, *self._parameters]
        counts = [True] * len(inputs) + ([] if closure is None else closure.used(outputs, inputs))
        wanted = [i for i, total in enumerate(self._totals) if total is not None and counts[i]]
        found: Any = torch.autograd.grad(
            [x for x, _ in known], [everything[i] for i in wanted], [g for _, g in known], allow_unused=True
        )
        for position, more in zip(wanted, found, strict=True):
            total = self._totals[position]
            if total is None or more is None:  # of what was not used there is no gradient
                continue
            if position < len(self._tensors) and rows is not None:
                total.index_add_(0, rows, more.to(total.dtype))
            else:
                total.add_(more)

    def all(self) -> list[Tensor | None]:
        """In the order of tokens and parameters, None where none was needed."""
        pairs = zip(self._totals, self._dtypes, strict=True)
        return [None if total is None else total.to(dtype) for total, dtype in pairs]


@dataclass
class _Pieces:
    """What is computed piece by piece."""

    function: Callable[..., Tensor]
    part: Partition
    chunk_batches: int
    num_tensors: int
    replay: Replay
    closure: Closure
    out: Tensor | None = None

    def compute(self, tensors: Sequence[Tensor]) -> Tensor:
        """All pieces; the graph of the first says what there is to differentiate by."""
        wanted = torch.is_grad_enabled()
        out: Tensor | None = None
        with self.replay.first():
            self.closure.prepare()
            for rows, piece in self.part.chunks(self.chunk_batches):
                with torch.set_grad_enabled(wanted and out is None):
                    own = [gather_rows(x.detach(), rows).requires_grad_(x.requires_grad) for x in tensors]
                    since = mark() if wanted else 0
                    more = self.function(piece, *own)
                if out is None:
                    if wanted:
                        self.closure.find([more], own, since)
                    out = more.new_empty(self.part.num_tokens, *more.shape[1:])
                with torch.no_grad():
                    scatter_rows(out, rows, more.detach().to(out.dtype))  # a module may depend on the mode of autograd
        assert out is not None  # there is at least one batch
        return out


class _Stream(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, job: _Pieces, *saved: Tensor) -> Tensor:
        assert job.out is not None
        out, job.out = job.out, None
        ctx.save_for_backward(*saved)
        ctx.job = job
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        refuse_second_derivative("chunk_batches", CHUNKS_ONCE)
        job: _Pieces = ctx.job
        tensors = ctx.saved_tensors[: job.num_tensors]  # read once: hooks may unpack once only
        totals = Gradients(tensors, job.closure.tensors, ctx.needs_input_grad[1:])
        with job.replay.again():
            for rows, piece in job.part.chunks(job.chunk_batches):
                with torch.enable_grad():
                    inputs = totals.rows(rows)
                    out = job.function(piece, *inputs)
                totals.add(rows, inputs, [out], [gather_rows(grads[0], rows)], job.closure)
        return None, *totals.all()


def stream(
    function: Callable[..., Tensor],
    part: Partition,
    tensors: Sequence[Tensor],
    chunk_batches: int,
    owner: nn.Module | None = None,
) -> Tensor:
    """`function(piece, *rows)` for a few batches at a time, in place of `function(part, *tensors)` for all of them.

    Args:
        function: from the partition of a piece and the rows `[n, …]` of its tokens, in its order, to `[n, …]`.
        part: the batches.
        tensors: `[N, …]` each, in token order.
        chunk_batches: batches in a piece.
        owner: the module that the function belongs to. By which tensors to differentiate beside `tensors` is read from
            the graph of the first piece.

    Returns:
        `[N, …]`, in token order. What is random in `function` is the same again in backward.

    Raises:
        NotImplementedError: inside a transform of torch.func, or around a module that `fully_shard` has sharded.
        RuntimeError: `function` depends on a tensor whose gradient would be lost.
    """
    if part.num_tokens == 0:
        return function(part, *tensors)
    refuse_chunks(owner)
    job = _Pieces(function, part, chunk_batches, len(tensors), Replay(tensors, owner), Closure(owner))
    out = job.compute(tensors)
    everything = (*tensors, *job.closure.tensors)
    if not (torch.is_grad_enabled() and any(x.requires_grad for x in everything)):
        return out
    job.out = out
    result: Any = _Stream.apply(job, *everything)
    return result
