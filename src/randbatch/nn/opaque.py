"""Attention in random batches as one operator that `torch.compile` does not look into.

For what cannot be traced: several sets, padding, several rounds, the corrected estimator, pieces. What surrounds the
operator is compiled. Backward computes the attention once more, with the random state of forward: the operator keeps
only its arguments.

Shape letters: N tokens, B padded sets, H heads, D head size of query and key, Dv of value.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from randbatch._autograd import refuse_second_derivative
from randbatch._shapes import Bool, Int, Shaped
from randbatch.nn.sampling import Sampling, attend_in_batches

__all__ = ["attend_opaquely", "is_opaque"]

_SETTINGS = (
    "Tensor? mask, Tensor? batch, bool training, str interaction, SymInt batch_size, str estimator, SymInt rounds, "
    "SymInt? eval_rounds, str backend, SymInt seed, bool exact_eval, str chunk_batches, float? scale, float dropout_p"
)
_QKV = "Tensor query, Tensor key, Tensor value"
_NUM_SETTINGS = 14
_TAGS = (torch.Tag.nondeterministic_seeded,)
# `turn` keeps the calls of two layers apart, see `randbatch.tracing`
torch.library.define(
    "randbatch::attend_opaquely", f"({_QKV}, Tensor turn, {_SETTINGS}) -> (Tensor, Tensor)", tags=_TAGS
)
torch.library.define(
    "randbatch::attend_opaquely_backward",
    f"(Tensor grad, Tensor state, {_QKV}, {_SETTINGS}) -> (Tensor, Tensor, Tensor)",
)


def is_opaque(
    sampling: Sampling,
    training: bool,
    *,
    several_sets: bool,
    interaction: str = "softmax",
    numberless: bool = False,
) -> bool:
    """Whether `torch.compile` is at work and could not trace this attention.

    Linear attention is not traced either: torch 2.13 expects other strides of the gradient of `elu` than come. On meta
    and fake tensors, which have no numbers, the operator knows the shapes.
    """
    if numberless or not torch.compiler.is_compiling():
        return numberless
    rounds = sampling.rounds_of(training)
    exact = sampling.exact_eval and not training
    plain = exact or (rounds == 1 and sampling.estimator != "corrected" and sampling.chunk_batches is None)
    return several_sets or not plain or interaction != "softmax"


def attend_opaquely(
    sampling: Sampling,
    training: bool,
    query: Shaped[Tensor, "... h d"],
    key: Shaped[Tensor, "... h d"],
    value: Shaped[Tensor, "... h dv"],
    *,
    mask: Bool[Tensor, "b n"] | None = None,
    batch: Int[Tensor, " n"] | None = None,
    scale: float | None = None,
    dropout_p: float = 0.0,
    interaction: str = "softmax",
) -> Shaped[Tensor, "... h dv"]:
    """As `attend_in_batches`."""
    if sampling.observer is not None or (sampling.tolerance is not None and not training):
        raise NotImplementedError("torch.compile cannot trace an observer or a tolerance; run them without it")
    operator: Any = torch.ops.randbatch.attend_opaquely
    return operator(
        query,
        key,
        value,
        torch.empty(0),
        mask,
        batch,
        training,
        interaction,
        sampling.batch_size,
        sampling.estimator,
        sampling.rounds,
        sampling.eval_rounds,
        sampling.backend,
        sampling.next_seed(query, query.shape[-3], training) or 0,
        sampling.exact_eval,
        str(sampling.chunk_batches),
        scale,
        dropout_p,
    )[0]


def _attend(query: Tensor, key: Tensor, value: Tensor, settings: tuple[Any, ...]) -> Tensor:
    """What the operator computes, with torch's random state as it is."""
    mask, batch, training, interaction, *numbers, scale, dropout_p = settings
    batch_size, estimator, rounds, eval_rounds, backend, seed, exact_eval, chunk = numbers
    sampling = Sampling(batch_size, estimator, rounds, eval_rounds, backend, seed, exact_eval)
    if chunk != "None":
        sampling = replace(sampling, chunk_batches="auto" if chunk == "auto" else int(chunk))
    return attend_in_batches(
        sampling,
        training,
        query,
        key,
        value,
        mask=mask,
        batch=batch,
        scale=scale,
        dropout_p=dropout_p,
        interaction=interaction,
    )


def _devices(tensor: Tensor) -> list[torch.device]:
    return [tensor.device] if tensor.is_cuda else []


def _random_state(tensor: Tensor) -> Tensor:
    """The states of the CPU's generator and of the device's."""
    return torch.cat([torch.get_rng_state(), *(torch.cuda.get_rng_state(device) for device in _devices(tensor))])


@torch.library.impl("randbatch::attend_opaquely", "CompositeExplicitAutograd")
def _forward(query: Tensor, key: Tensor, value: Tensor, turn: Tensor, *settings: Any) -> tuple[Tensor, Tensor]:
    state = _random_state(query)
    with torch.no_grad():
        return _attend(query, key, value, settings).contiguous(), state


@torch.library.impl("randbatch::attend_opaquely_backward", "CompositeExplicitAutograd")
def _backward(
    grad: Tensor, state: Tensor, query: Tensor, key: Tensor, value: Tensor, *settings: Any
) -> tuple[Tensor, Tensor, Tensor]:
    own = torch.get_rng_state().numel()
    with torch.random.fork_rng(_devices(query)), torch.enable_grad():
        torch.set_rng_state(state[:own])
        for device in _devices(query):
            torch.cuda.set_rng_state(state[own:], device)
        inputs = [tensor.detach().requires_grad_() for tensor in (query, key, value)]
        out = _attend(inputs[0], inputs[1], inputs[2], settings)
        grads = torch.autograd.grad(out, inputs, grad, allow_unused=True, materialize_grads=True)
    to_query, to_key, to_value = (tensor.contiguous() for tensor in grads)
    return to_query, to_key, to_value


def _forward_fake(query: Tensor, key: Tensor, value: Tensor, turn: Tensor, *settings: Any) -> tuple[Tensor, Tensor]:
    size = torch.get_rng_state().numel() + (torch.cuda.get_rng_state().numel() if query.is_cuda else 0)
    return value.new_empty(value.shape), torch.empty(size, dtype=torch.uint8)


def _backward_fake(
    grad: Tensor, state: Tensor, query: Tensor, key: Tensor, value: Tensor, *settings: Any
) -> tuple[Tensor, ...]:
    return tuple(tensor.new_empty(tensor.shape) for tensor in (query, key, value))


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    query, key, value, _, mask, batch, *ctx.settings = inputs
    ctx.save_for_backward(output[1], query, key, value, mask, batch)


def _differentiate(ctx: Any, grad: Tensor, grad_of_state: Tensor | None) -> tuple[Any, ...]:
    refuse_second_derivative("attention in random batches inside torch.compile", "run it without compiling")
    operator: Any = torch.ops.randbatch.attend_opaquely_backward
    grads = operator(grad, *ctx.saved_tensors, *ctx.settings)
    return *grads, None, *(None for _ in range(_NUM_SETTINGS))


torch.library.register_autograd("randbatch::attend_opaquely", _differentiate, setup_context=_save)
torch.library.register_fake("randbatch::attend_opaquely", _forward_fake)
torch.library.register_fake("randbatch::attend_opaquely_backward", _backward_fake)
