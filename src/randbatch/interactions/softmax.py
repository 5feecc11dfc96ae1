"""Softmax attention inside each batch, by the fastest backend that can."""

from __future__ import annotations

from torch import Tensor

from randbatch._shapes import Float
from randbatch.interactions.options import Options
from randbatch.kernels import Problem, pick_backend
from randbatch.partition import Partition


def softmax_attention(
    query: Float[Tensor, "n h d"],
    key: Float[Tensor, "n h d"],
    value: Float[Tensor, "n h dv"],
    part: Partition,
    options: Options,
) -> tuple[Float[Tensor, "n h dv"], Float[Tensor, "n h"] | None]:
    """`y_i = Σ_j softmax_j(scale · q_i·k_j) v_j`, with scale 1/√D by default."""
    problem = Problem.of(query, value, options.scale, options.dropout_p, need_lse=options.need_log_norm)
    return pick_backend(options.backend, problem).attend(query, key, value, part, problem, None)
