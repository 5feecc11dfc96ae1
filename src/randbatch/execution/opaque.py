"""An interaction in random batches as one operator that `torch.compile` does not look into.

For what cannot be traced: several sets, padding, several rounds, chunks, fitted estimators, most interactions. What
surrounds the operator is compiled. Backward computes the interaction once more, with the random state of forward: the
operator saves only its arguments.

Shape letters: N tokens, B padded sets, H heads, D head size.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from randbatch._autograd import refuse_second_derivative
from randbatch._numerics import has_no_elements
from randbatch.execution.call import Call
from randbatch.execution.table import Strategy, run
from randbatch.interactions import Options
from randbatch.interactions.base import object_of_key
from randbatch.interactions.rounds import Projections
from randbatch.kernels import BACKENDS

__all__ = ["Opaque"]

_SETTINGS = (
    "str interaction, str estimator, float? scale, float dropout_p, str backend, SymInt batch_size, SymInt rounds, "
    "SymInt? seed, str chunk_batches, bool exact"
)
_TOKENS = "Tensor[] projected, Tensor[] parameters, Tensor? mask, Tensor? batch"
_NUM_SETTINGS = 10
_TAGS = (torch.Tag.nondeterministic_seeded,)
# `turn`, a fresh empty tensor, keeps the calls of two layers apart, see `randbatch.partition.traced`
torch.library.define(
    "randbatch::attend_opaquely", f"({_TOKENS}, Tensor turn, {_SETTINGS}) -> (Tensor, Tensor)", tags=_TAGS
)
torch.library.define(
    "randbatch::attend_opaquely_backward", f"(Tensor grad, Tensor state, {_TOKENS}, {_SETTINGS}) -> Tensor[]"
)


class Opaque(Strategy):
    """One operator between compiled projections; on meta and fake tensors it knows the shapes."""

    name = "opaque"

    def why_not(self, call: Call) -> str | None:
        """It is for what `torch.compile` could not trace."""
        compiling = torch.compiler.is_compiling()
        if not compiling and not has_no_elements(call.first):
            return "nothing is compiled"
        if call.interaction.is_closed:
            return f"interaction {call.interaction.name!r} is a function that no operator can hold"
        if call.partition is not None and compiling:
            return "the partition is given"
        if not compiling or call.several_sets:
            return None
        traced = call.interaction.can_trace and call.chunk_batches is None
        if traced and (call.exact or (call.rounds == 1 and call.estimator.can_trace and call.tolerance is None)):
            return "torch.compile can look into one round of one set"
        return None

    def run(self, call: Call) -> Tensor:
        """Rows of padded sets without a token are zero, also where they were NaN."""
        unknown = call.observer is not None or call.tolerance is not None
        if unknown and torch.compiler.is_compiling():  # shapes alone do not depend on either
            raise NotImplementedError("torch.compile cannot trace an observer or a tolerance; run them without it")
        projections, interaction, mask = call.projections, call.interaction, call.mask
        tensors = projections.tensors
        if mask is not None:
            keep = mask.unsqueeze(-1)
            tensors = [torch.where(keep.reshape(mask.shape + (1,) * (x.dim() - 2)), x, 0) for x in tensors]
        operator: Any = torch.ops.randbatch.attend_opaquely
        out = operator(
            list(projections.project(*tensors)),
            _parameters(interaction),
            mask,
            call.batch,
            torch.empty(0),
            interaction.key,
            call.estimator.key,
            call.options.scale,
            call.options.dropout_p,
            _name_of_backend(call.options),
            call.batch_size,
            call.rounds,
            call.seed,
            str(call.chunk_batches),
            call.exact,
        )[0]
        out = projections.finish(out)
        return out if mask is None else torch.where(mask.reshape(mask.shape + (1,) * (out.dim() - 2)), out, 0)


def _parameters(interaction: object) -> list[Tensor]:
    """What an interaction has learned: the operator must know it, to be differentiated by it."""
    return list(interaction.parameters()) if isinstance(interaction, nn.Module) else []


def _name_of_backend(options: Options) -> str:
    backend = options.backend
    if isinstance(backend, str):
        return backend
    if BACKENDS.get(backend.name) is not backend:
        raise NotImplementedError(
            f"torch.compile takes backends by name: register {backend.name!r} with randbatch.kernels.register"
        )
    return backend.name


def _compute(projected: Sequence[Tensor], mask: Tensor | None, batch: Tensor | None, settings: Sequence[Any]) -> Tensor:
    """What the operator computes, with torch's random state as it is."""
    interaction, estimator, scale, dropout_p, backend, batch_size, rounds, seed, chunk, exact = settings
    return run(
        Call(
            Projections.of(projected),
            object_of_key(interaction),
            object_of_key(estimator),
            Options(scale, dropout_p, backend),
            batch_size,
            rounds,
            seed,
            chunk_batches=None if chunk == "None" else chunk if chunk == "auto" else int(chunk),
            exact=exact,
            batch=batch,
            padded=projected[0].dim() == 4,
            mask=mask,
        )
    )


def _devices(tensor: Tensor) -> list[torch.device]:
    return [tensor.device] if tensor.is_cuda else []


def _random_state(tensor: Tensor) -> Tensor:
    """The states of the CPU's generator and of the device's."""
    return torch.cat([torch.get_rng_state(), *(torch.cuda.get_rng_state(device) for device in _devices(tensor))])


@torch.library.impl("randbatch::attend_opaquely", "CompositeExplicitAutograd")
def _forward(
    projected: list[Tensor],
    parameters: list[Tensor],
    mask: Tensor | None,
    batch: Tensor | None,
    turn: Tensor,
    *settings: Any,
) -> tuple[Tensor, Tensor]:
    state = _random_state(projected[0])
    with torch.no_grad():
        return _compute(projected, mask, batch, settings).contiguous(), state


@torch.library.impl("randbatch::attend_opaquely_backward", "CompositeExplicitAutograd")
def _backward(
    grad: Tensor,
    state: Tensor,
    projected: list[Tensor],
    parameters: list[Tensor],
    mask: Tensor | None,
    batch: Tensor | None,
    *settings: Any,
) -> list[Tensor]:
    own = torch.get_rng_state().numel()
    devices = _devices(projected[0])
    with torch.random.fork_rng(devices), torch.enable_grad():
        torch.set_rng_state(state[:own])
        for device in devices:
            torch.cuda.set_rng_state(state[own:], device)
        inputs = [tensor.detach().requires_grad_() for tensor in projected]
        out = _compute(inputs, mask, batch, settings)
        # the interaction in this process holds the parameters themselves
        everything = [*inputs, *_parameters(object_of_key(settings[0]))]
        wanted = [tensor for tensor in everything if tensor.requires_grad]
        found = iter(torch.autograd.grad(out, wanted, grad, allow_unused=True, materialize_grads=True))
    return [next(found).contiguous() if x.requires_grad else torch.zeros_like(x) for x in everything]


def _forward_fake(
    projected: list[Tensor],
    parameters: list[Tensor],
    mask: Tensor | None,
    batch: Tensor | None,
    turn: Tensor,
    *settings: Any,
) -> tuple[Tensor, Tensor]:
    size = torch.get_rng_state().numel() + (torch.cuda.get_rng_state().numel() if projected[0].is_cuda else 0)
    return projected[-1].new_empty(projected[-1].shape), torch.empty(size, dtype=torch.uint8)


def _backward_fake(
    grad: Tensor, state: Tensor, projected: list[Tensor], parameters: list[Tensor], *rest: Any
) -> list[Tensor]:
    return [tensor.new_empty(tensor.shape) for tensor in (*projected, *parameters)]


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    projected, parameters, mask, batch, _, *ctx.settings = inputs
    ctx.num_projected, ctx.num_parameters = len(projected), len(parameters)
    ctx.save_for_backward(output[1], mask, batch, *projected, *parameters)


def _differentiate(ctx: Any, grad: Tensor, grad_of_state: Tensor | None) -> tuple[Any, ...]:
    refuse_second_derivative("attention in random batches inside torch.compile", "run it without compiling")
    state, mask, batch, *tensors = ctx.saved_tensors
    projected, parameters = tensors[: ctx.num_projected], tensors[ctx.num_projected :]
    operator: Any = torch.ops.randbatch.attend_opaquely_backward
    grads = operator(grad, state, projected, parameters, mask, batch, *ctx.settings)
    return (
        grads[: ctx.num_projected],
        grads[ctx.num_projected :],
        None,
        None,
        None,
        *(None for _ in range(_NUM_SETTINGS)),
    )


torch.library.register_autograd("randbatch::attend_opaquely", _differentiate, setup_context=_save)
torch.library.register_fake("randbatch::attend_opaquely", _forward_fake)
torch.library.register_fake("randbatch::attend_opaquely_backward", _backward_fake)
