"""`RandomBatchConfig`: every option of a module with random batches, listed once and passed whole."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from functools import cache
from itertools import count
from typing import Any, Literal

from torch import Tensor, nn

from randbatch._checks import check_chunk_batches, check_integer, check_positive
from randbatch._errors import InvalidType
from randbatch.estimators import ESTIMATORS, Estimator
from randbatch.execution import Call
from randbatch.execution.call import check_together
from randbatch.interactions import INTERACTIONS, Interaction, Options
from randbatch.interactions.rounds import Projections
from randbatch.kernels import Backend, resolve_backend
from randbatch.nn.calls import Calls, next_seed, notice_shared_seed
from randbatch.tolerance import RoundsChoice

__all__ = ["ATTRIBUTE", "BatchOptions", "RandomBatchConfig", "config_of", "own_config"]

ATTRIBUTE = "randbatch_config"
"""The attribute of every module with random batches that holds its config."""


def option(check: Callable[[Any], Any], **default: Any) -> Any:
    return field(metadata={"check": check}, **default)


def _optional(check: Callable[[Any], Any]) -> Callable[[Any], Any]:
    return lambda value: None if value is None else check(value)


def _check_backend(value: Any) -> Any:
    resolve_backend(value)
    return value


def _check_chunk(value: Any) -> Any:
    check_chunk_batches(value)
    return value


def _check_flag(value: Any) -> bool:
    if not isinstance(value, bool):
        raise InvalidType(f"exact_eval must be a bool, got {type(value).__name__} ({value!r})")
    return value


@cache
def _checks_of(cls: type[Any]) -> dict[str, Callable[[Any], Any]]:
    return {each.name: each.metadata["check"] for each in fields(cls) if "check" in each.metadata}


@dataclass
class BatchOptions:
    """The options that all modules of a model may share: every one but the seed.

    Settings of a command inherit them, `RandomBatchConfig` adds what belongs to one module. Every change is checked.
    """

    batch_size: int = option(lambda value: check_integer("batch_size", value, 2), default=128)
    """p >= 2, tokens in a random batch. With p >= N there is no sampling."""
    interaction: str | Interaction = option(INTERACTIONS.resolve, default="softmax")
    """What a token does with those it meets: a name (`"softmax"`, `"linear"`, …) or an `Interaction`."""
    estimator: str | Estimator = option(ESTIMATORS.resolve, default="plain")
    """How in-batch outputs estimate full attention. `"plain"` is the paper's; `"debiased"` no longer over-counts a
    token's own weight; `"corrected"` adds mean fields, and is the most accurate."""
    rounds: int = option(lambda value: check_integer("rounds", value, 1), default=1)
    """R >= 1 orthogonal partitions per call in training: a token meets R (p − 1) others. Time is proportional to it."""
    eval_rounds: int | None = option(_optional(lambda value: check_integer("eval_rounds", value, 1)), default=None)
    """R in eval. None: the same as `rounds`."""
    backend: str | Backend = option(_check_backend, default="auto")
    """Of softmax attention. `"auto"`: the first that can."""
    exact_eval: bool = option(_check_flag, default=False)
    """In eval, one batch holds each whole set: no sampling at all, O(N²) time."""
    tolerance: float | None = option(_optional(lambda value: check_positive("tolerance", value)), default=None)
    """In eval, as many rounds as keep the relative error of this module's attention below it (see `choose_rounds`),
    instead of `eval_rounds`; for softmax attention only."""
    chunk_batches: int | Literal["auto"] | None = option(_check_chunk, default=None)
    """Batches at a time, computed again in backward: memory is that of input, output, their gradients and one chunk,
    whatever p. `"auto"`: as many as fit into free memory. None: all at once, which takes a fifth to a third less time.
    Not for the estimator `"corrected"`."""

    def __setattr__(self, name: str, value: Any) -> None:
        check = _checks_of(type(self)).get(name)
        object.__setattr__(self, name, value if check is None else check(value))

    def config(self, **changes: Any) -> RandomBatchConfig:
        """The options as the config of a module, with some changes.

        Raises:
            ValueError: options that have no meaning together.
        """
        values = {name: getattr(self, name) for name in _checks_of(BatchOptions)}
        return RandomBatchConfig(**{**values, **changes})


@dataclass
class RandomBatchConfig(BatchOptions):
    """How a module draws its random batches and what it computes in them.

    It is the attribute `randbatch_config` of every module with random batches. Its fields may be changed at any time;
    every change is checked, and the next call follows it. In training every call draws fresh partitions from torch's
    default CPU generator; in eval they depend on `seed` alone.

    Raises:
        TypeError: an option of another type, or an unknown option.
        ValueError: an option out of range, an unknown name, or options that have no meaning together.

    Example:
        >>> config = RandomBatchConfig(batch_size=128, estimator="debiased")
        >>> config.rounds, config.estimator.name
        (1, 'debiased')
    """

    seed: int = option(lambda value: check_integer("seed", value), default=0)
    """The partitions of eval. What a graph gets depends on the graph and this alone, not on what else is in the
    mini-batch."""

    chosen: RoundsChoice | None = field(default=None, init=False, repr=False, compare=False)
    """What `tolerance` led to in the last call."""
    observer: Callable[..., None] | None = field(default=None, init=False, repr=False, compare=False)
    """Called with query, key, value, `batch` and the scale of every softmax attention of the module."""
    path: str = field(default="", init=False, repr=False, compare=False)
    """Where the module is in the model whose calls are counted."""
    origin: int = field(default_factory=count().__next__, init=False, repr=False, compare=False)
    """Shared by deep copies alone."""
    calls: Calls | None = field(default=None, init=False, repr=False, compare=False)
    """Of that model: a module that is called several times in its forward draws other partitions each time."""

    def __post_init__(self) -> None:
        self.check()

    @classmethod
    def of(cls, batch_size: int | RandomBatchConfig, options: dict[str, Any]) -> RandomBatchConfig:
        """A config of its own from what a caller was given: p and some options, or a config and changes to it.

        Args:
            batch_size: p, or a config.
            options: by name.

        Raises:
            TypeError: there is no option of some name.
        """
        known = _checks_of(cls)
        unknown = [name for name in options if name not in known]
        if unknown:
            raise InvalidType(f"there is no option {unknown[0]!r}; the options are {', '.join(known)}")
        if isinstance(batch_size, RandomBatchConfig):
            return batch_size.copy(**options)
        return cls(batch_size, **options)

    def copy(self, **changes: Any) -> RandomBatchConfig:
        """The same options with some changes, for another module; an interaction with parameters is copied."""
        if "interaction" not in changes and isinstance(self.interaction, nn.Module):
            changes["interaction"] = copy.deepcopy(self.interaction)
        return replace(self, **changes)

    def check(self, dropout_p: float = 0.0) -> None:
        """Refuse options that have no meaning together, in a module that drops weights with this probability.

        Raises:
            ValueError: one of them means nothing beside the others.
        """
        interaction, estimator = self.resolved()
        check_together(
            interaction, estimator, Options(None, dropout_p, self.backend), batch_size=self.batch_size,
            rounds=max(self.rounds, self.eval_rounds or 1), tolerance=self.tolerance, chunk_batches=self.chunk_batches,
        )  # fmt: skip

    def resolved(self) -> tuple[Interaction, Estimator]:
        """Interaction and estimator; names become objects when they are set."""
        found: Any = self.interaction, self.estimator
        return found

    def rounds_of(self, training: bool) -> int:
        """R of a call."""
        return self.rounds if training or self.eval_rounds is None else self.eval_rounds

    def next_seed(self, x: Tensor, num_tokens: int, training: bool) -> int | None:
        """The seed of the next call, for an input of N tokens; None in training, where one is drawn."""
        if training:
            return None
        seed = self.seed if self.calls is None else self.calls.seed_of(self.path, self.seed)
        if num_tokens > self.batch_size and not self.exact_eval:
            notice_shared_seed(self, seed, x)
        return seed

    def call(
        self,
        projections: Projections,
        training: bool,
        *,
        scale: float | None = None,
        dropout_p: float = 0.0,
        padded: bool = False,
        **sets: Any,
    ) -> Call:
        """What is asked for when a module is called.

        Args:
            projections: the tokens.
            training: whether the module is in training mode.
            scale: factor of the logits.
            dropout_p: probability that an attention weight is dropped; it counts in training only.
            padded: whether the tokens stand in padded sets.
            **sets: `batch`, `mask` and `mask_name` of the call.
        """
        tokens = projections.tensors[0]
        interaction, estimator = self.resolved()
        num_tokens = tokens.shape[0] * tokens.shape[1] if padded else tokens.shape[0]
        return Call(
            projections,
            interaction,
            estimator,
            Options(scale, dropout_p if training else 0.0, self.backend),
            self.batch_size,
            self.rounds_of(training),
            self.next_seed(tokens[0] if padded else tokens, num_tokens, training),
            self.chunk_batches,
            self.exact_eval and not training,
            None if training else self.tolerance,
            padded=padded,
            observer=self.observer if interaction.is_exponential else None,
            on_choice=self._note_choice,
            **sets,
        )

    def _note_choice(self, choice: RoundsChoice) -> None:
        self.chosen = choice

    def changed(self) -> dict[str, Any]:
        """p, and every option that is not the default; objects by their names."""
        default, found = RandomBatchConfig(), {"batch_size": self.batch_size}
        for name in _checks_of(RandomBatchConfig):
            value = getattr(self, name)
            if name != "batch_size" and value != getattr(default, name):
                found[name] = getattr(value, "name", value)
        return found

    def describe(self) -> str:
        """What `print(module)` shows."""
        return ", ".join(f"{name}={value!r}" for name, value in self.changed().items())


def own_config(batch_size: int | RandomBatchConfig, options: dict[str, Any]) -> RandomBatchConfig:
    """The config of a layer, from what it was given; without a seed it gets the next one of this process."""
    options = {name: value for name, value in options.items() if (name, value) != ("seed", None)}
    config = RandomBatchConfig.of(batch_size, options)
    if not isinstance(batch_size, RandomBatchConfig) and "seed" not in options:
        config.seed = next_seed()
    return config


def config_of(module: nn.Module) -> RandomBatchConfig | None:
    """How `module` draws its random batches; None if it has none."""
    config = getattr(module, ATTRIBUTE, None)
    return config if isinstance(config, RandomBatchConfig) else None
