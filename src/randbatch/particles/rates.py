"""Rates of convergence: slopes through measured errors, and how well these are known.

Shape letters: R realisations, T steps τ, B resamplings.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from randbatch._shapes import Float

__all__ = ["FEWEST", "Convergence", "Errors", "Point", "Rate", "fit_with_interval", "variance_factor"]

FEWEST = 3
"""Points that a rate needs."""

_RESAMPLES = 1000
_LEVEL = 0.95  # of the confidence intervals


@dataclass(frozen=True)
class Rate:
    """The r of `error ≈ c τʳ`, a slope in logarithms.

    Attributes:
        value: by least squares.
        low: 95 % confidence interval, by resampling the realisations.
        high: its upper end.
    """

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.2f} [{self.low:.2f}, {self.high:.2f}]"


@dataclass(frozen=True)
class Point:
    """The errors at one step.

    Attributes:
        dt: τ.
        strong: `(E |x̃_i − x_i|²)^½`; NaN where the runs are not coupled.
        strong_low: 95 % confidence interval.
        strong_high: its upper end.
        weak: `|E φ(x̃) − E φ(x)|`.
        weak_standard_error: of that.
    """

    dt: float
    strong: float
    strong_low: float
    strong_high: float
    weak: float
    weak_standard_error: float

    @property
    def is_resolved(self) -> bool:
        """Whether the weak error is more than twice its standard error."""
        return self.weak > 2 * self.weak_standard_error


@dataclass(frozen=True, eq=False)
class Errors:
    """Errors of one method and batch size at several steps, realisation by realisation.

    Attributes:
        label: what is measured: a method, an estimator.
        batch_size: p.
        dts: τ, T of them, descending.
        squared: `[T, R]`, mean over the particles of `|x̃_i − x_i|²`. None: the runs are not coupled.
        difference: `[T, R]`, `φ(x̃) − φ(x)`.
        proved_strong: the rate of the theorem. None: nothing is proved.
        proved_weak: of the weak error.
    """

    label: str
    batch_size: int
    dts: Sequence[float]
    squared: Float[Tensor, "t r"] | None
    difference: Float[Tensor, "t r"]
    proved_strong: float | None = None
    proved_weak: float | None = None

    def points(self) -> list[Point]:
        """The errors, and what is known of them."""
        count = self.difference.shape[1]
        weak = self.difference.mean(dim=1).abs().tolist()
        noise = (self.difference.std(dim=1) / math.sqrt(count)).tolist()
        strong = [(math.nan, math.nan, math.nan)] * len(self.dts)
        if self.squared is not None:
            resampled = (_resamplings(count) @ self.squared.T).sqrt()
            means = self.squared.mean(dim=1).sqrt().tolist()
            strong = [(mean, *_interval(resampled[:, t])) for t, mean in enumerate(means)]
        return [Point(dt, *strong[t], weak[t], noise[t]) for t, dt in enumerate(self.dts)]

    def strong_rate(self) -> Rate | None:
        """Slope of the strong error in τ; None where there is no strong error, or none that is not 0."""
        if self.squared is None or bool((self.squared.mean(dim=1) <= 0).any()):
            return None
        return fit_with_interval(self.dts, self.squared, torch.sqrt)

    def last_slope(self) -> float:
        """Slope of the strong error between the two smallest steps: near 0 it has come to a floor."""
        coarse, fine = (point.strong for point in self.points()[-2:])
        if not (coarse > 0 and fine > 0):
            return math.nan
        return math.log(coarse / fine) / math.log(self.dts[-2] / self.dts[-1])

    def weak_rate(self) -> Rate | None:
        """Slope of the weak error in τ, by the steps at which it is resolved; None if these are fewer than three."""
        kept = [number for number, point in enumerate(self.points()) if point.is_resolved]
        if len(kept) < FEWEST:
            return None
        return fit_with_interval([self.dts[number] for number in kept], self.difference[kept], torch.abs)


@dataclass(frozen=True)
class Convergence:
    """Measured errors and rates; `print` it for a table.

    Attributes:
        name: of the system.
        num_particles: N.
        errors: of every method and batch size.
    """

    name: str
    num_particles: int
    errors: list[Errors]

    def batch_size_rate(self, label: str) -> Rate | None:
        """Slope of the strong error in `1/(p−1) − 1/(N−1)` at the smallest step; None for fewer than two p < N."""
        some = [one for one in self.errors if one.label == label and one.batch_size < self.num_particles]
        last = [one.squared[-1] for one in some if one.squared is not None and bool(one.squared[-1].any())]
        if len(last) < 2 or len(last) < len(some):
            return None
        variances = [variance_factor(one.batch_size, self.num_particles) for one in some]
        return fit_with_interval(variances, torch.stack(last), torch.sqrt)

    def __str__(self) -> str:
        smallest = min(one.dts[-1] for one in self.errors)
        lines = [
            f"| {self.name}, N = {self.num_particles} | p | strong error at τ = {smallest:.3g} | strong rate | proved "
            "| between the last two τ | weak rate | proved |",
            "|---|---|---|---|---|---|---|---|",
        ]
        lines += [f"| {' | '.join(_cells(one))} |" for one in self.errors]
        for label in dict.fromkeys(
            one.label for one in self.errors if one.label != "rbmr"
        ):  # has a variance of its own
            rate = self.batch_size_rate(label)
            if rate is not None:
                lines += ["", f"{label}: the strong error grows as 1/(p−1) − 1/(N−1) to the power {rate}; proved: ½"]
        return "\n".join(lines)


def _cells(errors: Errors) -> list[str]:
    strong, weak = errors.strong_rate(), errors.weak_rate()
    last = errors.points()[-1].strong
    proved = ["-" if rate is None else f"{rate:g}" for rate in (errors.proved_strong, errors.proved_weak)]
    return [
        errors.label, str(errors.batch_size), "-" if math.isnan(last) else f"{last:.3g}",
        "-" if strong is None else str(strong), proved[0], "-" if strong is None else f"{errors.last_slope():.2f}",
        "not resolved" if weak is None else str(weak), proved[1],
    ]  # fmt: skip


def _resamplings(realisations: int) -> Float[Tensor, "b r"]:
    """How often each realisation is drawn in R draws, divided by R: rows that sum to 1."""
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randint(realisations, (_RESAMPLES, realisations), generator=generator)
    counts = torch.zeros(_RESAMPLES, realisations, dtype=torch.float64)
    return counts.scatter_add_(1, drawn, torch.ones_like(counts)) / realisations


def _interval(samples: Float[Tensor, " b"]) -> tuple[float, float]:
    ends = torch.tensor([(1 - _LEVEL) / 2, (1 + _LEVEL) / 2], dtype=torch.float64)
    low, high = samples.quantile(ends).tolist()
    return low, high


def variance_factor(batch_size: int, num_particles: int) -> float:
    """`1/(m−1) − 1/(N−1)` of the variance lemma, m the size of N/p batches that are balanced: at most p."""
    size = num_particles / -(-num_particles // batch_size)
    return 1 / (size - 1) - 1 / (num_particles - 1)


def fit_with_interval(
    x: Sequence[float], of_realisations: Float[Tensor, "t r"], error: Callable[[Tensor], Tensor]
) -> Rate:
    """The slope of log error in log x, where the error is a function of the mean over the realisations.

    Args:
        x: T numbers > 0.
        of_realisations: float64 `[T, R]`.
        error: from means to errors >= 0, of any shape.
    """
    log_x = torch.tensor(x, dtype=torch.float64).log()
    off = log_x - log_x.mean()
    weights = off / off.square().sum()
    value = error(of_realisations.mean(dim=1)).log() @ weights
    resampled = error(_resamplings(of_realisations.shape[1]) @ of_realisations.T).log() @ weights
    return Rate(float(value), *_interval(resampled))
