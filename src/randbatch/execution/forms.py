"""The strategies that bring a call into another form, and the one that is the full interaction."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import Tensor

from randbatch._autograd import refuse_transforms
from randbatch._numerics import as_autocast
from randbatch.execution.call import Call
from randbatch.execution.padding import PaddedSets
from randbatch.execution.table import Strategy, run
from randbatch.interactions.rounds import Projections
from randbatch.partition import draw_seed
from randbatch.tolerance import choose_rounds

__all__ = ["Exact", "Flattened", "Observed"]


class Flattened(Strategy):
    """Padded sets become flat tokens with a set each, and rows again; a row without a token comes back as zeros."""

    name = "flattened"
    computes = False

    def why_not(self, call: Call) -> str | None:
        """It is for padded sets."""
        return None if call.padded else "the tokens are flat already"

    def run(self, call: Call) -> Tensor:
        """Flatten, compute, restore."""
        sets = PaddedSets.of(call.first, call.mask, call.mask_name)
        flat = replace(call.projections, tensors=[sets.flatten(x) for x in call.projections.tensors])
        return sets.restore(run(call.but(projections=flat, batch=sets.batch, padded=False, mask=None)))


class Observed(Strategy):
    """All tokens are projected first: somebody looks at them, or rounds are chosen by what they are."""

    name = "observed"
    computes = False

    def why_not(self, call: Call) -> str | None:
        """It is for calls with an observer or a tolerance."""
        return "there is no observer and no tolerance" if call.observer is None and call.tolerance is None else None

    def run(self, call: Call) -> Tensor:
        """Project, look, and compute the rest."""
        if call.tolerance is not None:
            refuse_transforms("tolerance", "give rounds instead")
        projections = call.projections
        query, key, value = as_autocast(*projections.project(*projections.tensors))
        scale, batch = call.options.scale, call.batch
        if call.observer is not None:
            call.observer(query, key, value, batch, scale)
        changes: dict[str, Any] = {"rounds": call.rounds, "exact": call.exact, "seed": call.seed}
        if call.tolerance is not None and not call.exact:
            seed = draw_seed() if call.seed is None else call.seed
            choice = choose_rounds(
                query, key, value, call.batch_size, call.tolerance, batch=batch, estimator=call.estimator, scale=scale,
                seed=seed,
            )  # fmt: skip
            changes = {"rounds": choice.rounds, "exact": choice.exact, "seed": seed}
            if call.on_choice is not None:
                call.on_choice(choice)
        inner = Projections((query, key, value), projections.sizes, elements=projections.elements)
        return projections.finish(run(call.but(projections=inner, observer=None, tolerance=None, **changes)))


class Exact(Strategy):
    """One batch holds each whole set: no sampling at all, O(N²) time."""

    name = "exact"

    def why_not(self, call: Call) -> str | None:
        """It is for calls that ask for it."""
        return None if call.exact else "random batches are asked for"

    def run(self, call: Call) -> Tensor:
        """The full interaction."""
        projections = call.projections
        whole = call.draw().first
        projected = projections.project(*projections.tensors)
        interaction = call.interaction
        if whole.num_tokens == 0:
            return projections.finish(interaction.of_nothing(projected))
        return projections.finish(interaction.in_full(whole, projected, call.options))
