"""`set_inference`: how a model with random batches predicts."""

from __future__ import annotations

from torch import nn

from randbatch._checks import check_choice, check_integer, check_positive
from randbatch.nn.calls import assign_seeds
from randbatch.nn.sampling import sampling_of

__all__ = ["set_inference"]


def set_inference(
    model: nn.Module,
    mode: str = "rounds",
    *,
    rounds: int | None = None,
    tolerance: float | None = None,
    seed: int = 0,
) -> int:
    """Choose how a model with random batches predicts in eval; training is not changed.

    Args:
        model: any model that holds such modules (`RandomBatchAttention`, `RandomBatch`, whatever `convert` made).
        mode: `"exact"`: attention over each whole set, O(N²) time and O(N) memory for softmax; `"rounds"`: random
            batches, `rounds` partitions per layer.
        rounds: R >= 1, for `"rounds"` only. Default: 1.
        tolerance: relative error > 0, for `"rounds"` only and instead of `rounds`: every softmax attention takes as
            many rounds as keep its own error below it (see `choose_rounds`), and says so in
            `module.randbatch_config.chosen`. Errors of layers add up on their way to the output.
        seed: the partitions of eval; each module derives its own from its path, and each further call of a module in
            one forward of the model another, so that layers do not share their batches.

    Returns:
        How many modules were set.

    Raises:
        TypeError: `rounds` or `seed` is not an int, or `tolerance` no number.
        ValueError: an unknown mode, `rounds` or `tolerance` given with `"exact"` or both, or no module with random
            batches in the model.

    Example:
        >>> import torch, randbatch as rb
        >>> layer = torch.nn.TransformerEncoderLayer(16, 4, batch_first=True)
        >>> _ = rb.convert(layer, batch_size=8)
        >>> rb.set_inference(layer, mode="exact")
        1
    """
    check_choice("mode", mode, ("exact", "rounds"))
    if mode == "exact":
        for name, given in (("rounds", rounds), ("tolerance", tolerance)):
            if given is not None:
                raise ValueError(f"{name} must be left out with mode 'exact', got {given}")
    if tolerance is not None:
        check_positive("tolerance", tolerance)
        if rounds is not None:
            raise ValueError(f"rounds must be left out when tolerance is given, which chooses them; got {rounds}")
    rounds = check_integer("rounds", 1 if rounds is None else rounds, 1)
    check_integer("seed", seed)
    found = [(path, own) for path, module in model.named_modules() if (own := sampling_of(module)) is not None]
    if not found:
        raise ValueError(f"model must hold a module with random batches, but {type(model).__name__} holds none")
    for _, sampling in found:
        sampling.exact_eval = mode == "exact"
        if mode == "rounds":
            sampling.eval_rounds, sampling.tolerance, sampling.chosen = rounds, tolerance, None
    if mode == "rounds":
        assign_seeds(model, found, seed)
    return len(found)
