"""Softmax attention inside random batches in one kernel on a GPU: gather, attend and scatter, forward and backward.

The kernels read query, key and value where the tokens stand, and write there: no permuted copy is ever made, so a
forward pass moves four tensors through memory and not twelve.
"""

from __future__ import annotations

from importlib.util import find_spec

import torch

from randbatch._compiling import constant
from randbatch.kernels.fused import fused
from randbatch.kernels.problem import Problem
from randbatch.kernels.triton import ops
from randbatch.kernels.triton.tiles import MAX_SIZE

__all__ = ["BACKEND"]

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
    return problem.why_not_of_size(MAX_SIZE)


@constant  # torch.compile need not understand how devices are asked
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


# on a CPU it is only interpreted, which is for tests; on a GPU it is not taken until it was verified on one
BACKEND = fused(
    "triton",
    why_not,
    ops.OPERATORS,
    auto_on=(),
    hint="backend 'auto' does not take 'triton' on a GPU, since its kernels were tested by an interpreter only; run "
    "benchmarks/verify_triton.py there and request it with backend='triton'",
)
