"""Softmax attention inside random batches in one kernel: gather, attend and scatter, forward and backward.

The kernels read query, key and value where the tokens stand, and write there: no permuted copy is ever made, so a
forward pass moves four tensors through memory and not twelve.
"""

from __future__ import annotations

from importlib.util import find_spec

import torch
from torch import Tensor

from randbatch._shapes import Float
from randbatch.kernels.backend import OwnShift
from randbatch.kernels.problem import Problem
from randbatch.kernels.triton import ops
from randbatch.kernels.triton.tiles import MAX_SIZE
from randbatch.partition import Partition

__all__ = ["attend", "backward", "forward", "why_not"]

_IS_INSTALLED = find_spec("triton") is not None  # looking is slow; importing it would be slower
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def why_not(problem: Problem) -> str | None:
    """NVIDIA GPUs from Ampere on, three dtypes, heads of at most 128 numbers."""
    if not _IS_INSTALLED:
        return "triton is not installed: pip install 'randbatch[triton]'; CUDA builds of torch bring it along"
    reason = _why_not_on(problem.device)
    if reason is not None:
        return reason
    if problem.dtype not in _DTYPES:
        return f"it takes float32, bfloat16 and float16, got {problem.dtype}"
    for name, size in (("query and key", problem.head_size), ("value", problem.value_size)):
        if not 1 <= size <= MAX_SIZE:
            return f"it takes heads of 1 to {MAX_SIZE} numbers, got {size} in {name}"
    return None


@torch.compiler.assume_constant_result  # torch.compile need not understand how devices are asked
def _why_not_on(device: torch.device) -> str | None:
    if device.type != "cuda":
        if ops.is_interpreted():
            return None
        return f"it needs a CUDA device, got {device.type}; TRITON_INTERPRET=1 interprets it there, to test it"
    if not torch.cuda.is_available():
        return "torch sees no CUDA device"
    if torch.version.hip is not None:
        return "its tiles were chosen for NVIDIA GPUs"
    capability = torch.cuda.get_device_capability(device)
    if capability < (8, 0):
        return f"it needs compute capability 8.0, this device has {'.'.join(map(str, capability))}"
    return None


def _batches(part: Partition) -> tuple[Tensor, Tensor, Tensor, list[int]]:
    starts, widths = part.starts_and_widths()
    return part.order, starts, widths, [number for group in part.groups for number in group]


def _shift(query: Tensor, part: Partition, problem: Problem, own_shift: OwnShift | None) -> Tensor | None:
    """Fp32 `[M, H]`; a token that does not attend to itself has −∞ there."""
    shape = part.num_batches, query.shape[1]
    if problem.exclude_self:
        return query.new_full(shape, -torch.inf, dtype=torch.float32)
    if own_shift is None:
        return None
    return torch.cat(
        [shift.expand(rows, -1) for shift, (rows, _) in zip(own_shift, part.groups, strict=True)]
    ).to(torch.float32)  # fmt: skip


def attend(
    query: Float[Tensor, "n h d"],
    key: Float[Tensor, "n h d"],
    value: Float[Tensor, "n h dv"],
    part: Partition,
    problem: Problem,
    own_shift: OwnShift | None,
) -> tuple[Float[Tensor, "n h dv"], Float[Tensor, "n h"] | None]:
    """`softmax_j(scale · q_i·k_j) v_j` inside each batch. Dropout draws its seed from torch's default generator."""
    seed = None
    if problem.dropout_p > 0:  # on the CPU, where activation checkpointing replays it
        seed = torch.randint(2**63 - 1, (1,), device="cpu").to(query.device, non_blocking=True)
    shift = _shift(query, part, problem, own_shift)
    batches = _batches(part)
    out, lse = ops.attend(query, key, value, *batches, shift, seed, problem.scale, problem.dropout_p)
    return out, lse if problem.need_lse else None


def forward(
    query: Float[Tensor, "n h d"],
    key: Float[Tensor, "n h d"],
    value: Float[Tensor, "n h dv"],
    part: Partition,
    problem: Problem,
) -> tuple[Float[Tensor, "n h dv"], Float[Tensor, "n h"]]:
    """Without autograd, with the log-sum-exp, without dropout."""
    shift = _shift(query, part, problem, None)
    with torch.no_grad():
        return ops.attend(query, key, value, *_batches(part), shift, None, problem.scale, 0.0)


def backward(
    grad: Float[Tensor, "n h dv"],
    query: Float[Tensor, "n h d"],
    key: Float[Tensor, "n h d"],
    value: Float[Tensor, "n h dv"],
    out: Float[Tensor, "n h dv"],
    lse: Float[Tensor, "n h"],
    part: Partition,
    problem: Problem,
) -> tuple[Float[Tensor, "n h d"], Float[Tensor, "n h d"], Float[Tensor, "n h dv"]]:
    """`ds_ij = a_ij (g_i·v_j − g_i·y_i)` with `a_ij = exp(s_ij − lse_i)`, and from these the three gradients."""
    shift = _shift(query, part, problem, None)
    tensors = (grad, None, query, key, value, out, lse)
    return ops.backward(*tensors, *_batches(part), shift, None, problem.scale, 0.0)
