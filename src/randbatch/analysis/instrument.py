"""Looking at a model while it runs in eval, and leaving it as it was."""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from randbatch._checks import check_batch_vector, check_choice, check_integer, check_qkv, check_several
from randbatch._errors import InvalidType, InvalidValue
from randbatch._optional import require
from randbatch.estimators import ESTIMATORS
from randbatch.nn.config import RandomBatchConfig, config_of

__all__ = ["Measure", "as_it_was", "check_compared", "measure_attention", "progress_bar"]

T = TypeVar("T")

Measure = Callable[[str, Tensor, Tensor, Tensor, Tensor | None, float | None], T]
"""What is done with the attention of a layer: its name, query, key, value, `batch` and scale → a result."""


def check_compared(
    batch_sizes: Sequence[int], estimators: Sequence[str] | None
) -> tuple[tuple[int, ...], tuple[str, ...]]:
    """Batch sizes, ascending, and names of estimators; an `InvalidValue` names what does not fit.

    Without names it is all that can be known at a few tokens.
    """
    if estimators is None:
        estimators = [name for name, estimator in ESTIMATORS.items() if estimator.can_probe]
    sizes = tuple(sorted(check_integer("batch_sizes", p, 2) for p in batch_sizes))
    names = tuple(check_choice("estimators", name, ESTIMATORS) for name in estimators)
    check_several("batch_sizes", sizes)
    check_several("estimators", names)
    return sizes, names


@contextmanager
def progress_bar(unit: str, show: bool, total: int | None = None) -> Generator[Callable[[], object]]:
    """What is to be called after each `unit` of work; a bar on a terminal, if it is wanted."""
    if not show:
        yield lambda: None
        return
    with require("tqdm").tqdm(total=total, unit=unit, disable=None) as bar:
        yield bar.update


@contextmanager
def as_it_was(model: nn.Module) -> Generator[dict[str, RandomBatchConfig]]:
    """The model in eval; yields how its modules draw random batches, by path, to be changed at will."""
    training = {module: module.training for module in model.modules()}
    configs = {
        path or type(model).__name__: config
        for path, module in model.named_modules()
        if (config := config_of(module)) is not None
    }
    kept = {path: {f.name: getattr(config, f.name) for f in fields(config)} for path, config in configs.items()}
    model.eval()
    try:
        with torch.no_grad():
            yield configs
    finally:
        for module, mode in training.items():
            module.training = mode
        for path, values in kept.items():
            for name, value in values.items():
                setattr(configs[path], name, value)


def measure_attention(
    model_or_qkv: nn.Module | Sequence[Tensor],
    inputs: Sequence[Any],
    named_inputs: Mapping[str, Any] | None,
    *,
    batch: Tensor | None,
    scale: float | None,
    measure: Measure[T],
) -> list[T]:
    """`measure` every softmax attention in random batches of a model as it runs once, or the one of three tensors.

    Raises:
        TypeError: neither a model nor three tensors that fit each other.
        ValueError: the model has no such attention, or `batch` or `scale` is given with a model.
    """
    if isinstance(model_or_qkv, nn.Module):
        if batch is not None or scale is not None:
            raise InvalidValue("batch and scale are for query, key and value; give the model's own in named_inputs")
        return _watch(model_or_qkv, inputs, named_inputs or {}, measure)
    if inputs or named_inputs or len(model_or_qkv) != 3:
        raise InvalidType("model_or_qkv must be a model, with its inputs, or the three tensors query, key and value")
    query, key, value = model_or_qkv
    check_qkv(query, key, value)
    check_batch_vector(batch, query.shape[0], query.device)
    with torch.no_grad():
        return [measure("attention", query, key, value, batch, scale)]


def _watch(model: nn.Module, inputs: Sequence[Any], named: Mapping[str, Any], measure: Measure[T]) -> list[T]:
    found: list[T] = []
    calls: dict[str, int] = {}

    def observer_of(path: str) -> Callable[..., None]:
        def observe(query: Tensor, key: Tensor, value: Tensor, batch: Tensor | None, scale: float | None) -> None:
            calls[path] = calls.get(path, 0) + 1
            name = path if calls[path] == 1 else f"{path}, call {calls[path]}"
            found.append(measure(name, query, key, value, batch, scale))

        return observe

    with as_it_was(model) as configs:
        for path, config in configs.items():
            config.observer = observer_of(path)
        model(*inputs, **named)
    if not found:
        raise InvalidValue(
            f"model must hold softmax attention in random batches, but none was called in {type(model).__name__}; "
            "convert a copy of it: randbatch.convert(copy.deepcopy(model), batch_size=...)"
        )
    return found
