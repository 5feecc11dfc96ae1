"""How far two sets of particles are from each other, and what a set looks like.

Shape letters: R realisations, N and M particles, D dimensions.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from randbatch._checks import check_integer, check_positive
from randbatch._optional import require
from randbatch._shapes import Float, Int

__all__ = [
    "WeakError", "attention_energy", "cluster_count", "cosine_histogram", "energy", "fit_rate", "mmd", "sliced_w2",
    "strong_error", "w2", "weak_error",
]  # fmt: skip

_PAIRS = 2**22  # held at a time


def strong_error(x: Float[Tensor, "*r n d"], y: Float[Tensor, "*r n d"]) -> float:
    """Root mean square distance of the same particles in two runs, `(E |x_i − y_i|²)^½`.

    It means something only where the runs are coupled: same start, same noise. (The distance of two empirical measures
    is no substitute: it has a bias of N^(−1/D).)

    Args:
        x: `[N, D]` or `[R, N, D]`.
        y: the same shape.

    Raises:
        ValueError: the shapes differ.

    Example:
        >>> strong_error(torch.zeros(5, 2), torch.ones(5, 2))
        1.4142135...
    """
    _check_same_shape(x, y)
    return float((x - y).double().square().sum(dim=-1).mean().sqrt())


@dataclass(frozen=True)
class WeakError:
    """A weak error and how well it is known.

    Attributes:
        value: `|E φ(x) − E φ(y)|`, the means over the realisations.
        standard_error: of that, from the differences of coupled realisations.
    """

    value: float
    standard_error: float


def weak_error(
    x: Float[Tensor, "r n d"], y: Float[Tensor, "r n d"], observable: Callable[[Tensor], Tensor]
) -> WeakError:
    """Difference of the mean of an observable in two runs, `|E φ(x) − E φ(y)|`.

    Args:
        x: R >= 2 realisations `[R, N, D]`.
        y: the same shape; coupled to x (same start, same noise) the statistical error is smaller.
        observable: φ, from `[R, N, D]` to one number for each realisation, `[R]`.

    Raises:
        ValueError: the shapes differ, fewer than two realisations, or an observable that is not `[R]`.

    Example:
        >>> x = torch.tensor([[[1.0]], [[3.0]]])
        >>> weak_error(x, x + 1, lambda states: states.mean(dim=(1, 2)))
        WeakError(value=1.0, standard_error=0.0)
    """
    _check_same_shape(x, y)
    if x.dim() != 3 or len(x) < 2:
        raise ValueError(f"x must have shape [R, N, D] with R >= 2, got {list(x.shape)}")
    difference = (observable(x) - observable(y)).double()
    if difference.shape != (len(x),):
        raise ValueError(f"observable must give one number for each of {len(x)} realisations, got {difference.shape}")
    return WeakError(float(difference.mean().abs()), float(difference.std()) / math.sqrt(len(x)))


def fit_rate(steps: Sequence[float], errors: Sequence[float]) -> float:
    """The r of `error ≈ c τʳ`: slope of the least-squares line through the logarithms.

    Raises:
        ValueError: fewer than two points, unequal lengths, or a number that is not > 0.

    Example:
        >>> round(fit_rate((0.1, 0.2, 0.4), (1.0, 2.0, 4.0)), 6)
        1.0
    """
    if len(steps) != len(errors) or len(steps) < 2 or min(*steps, *errors) <= 0:
        raise ValueError(f"steps and errors must be two or more numbers > 0 each, got {list(steps)}, {list(errors)}")
    log_steps, log_errors = (torch.tensor(numbers, dtype=torch.float64).log() for numbers in (steps, errors))
    off = log_steps - log_steps.mean()
    return float(off @ log_errors / off.square().sum())


def w2(x: Float[Tensor, "n d"], y: Float[Tensor, "m d"]) -> float:
    """Wasserstein distance W₂ of two empirical measures, exactly: sorting for D = 1, else a linear program O(N³).

    As an estimate of the distance of the laws it carries a bias of N^(−1/D). Needs POT.

    Args:
        x: `[N, D]`.
        y: `[M, D]`.

    Raises:
        ImportError: POT is not installed.
        ValueError: the shapes do not fit.

    Example:
        >>> round(w2(torch.tensor([[0.0], [1.0]]), torch.tensor([[4.0], [3.0]])), 6)
        3.0
    """
    a, b = _samples(x, y)
    ot = require("ot")
    squared = ot.emd2_1d(a, b, metric="sqeuclidean") if x.shape[1] == 1 else ot.emd2([], [], ot.dist(a, b))
    return math.sqrt(max(float(squared), 0.0))


def sliced_w2(x: Float[Tensor, "n d"], y: Float[Tensor, "m d"], projections: int = 200, seed: int = 0) -> float:
    """Sliced W₂ of two empirical measures: root mean square W₂ of random projections to lines, O(N log N). Needs POT.

    Args:
        x: `[N, D]`.
        y: `[M, D]`.
        projections: how many lines. Default: 200, a relative error of a few per cent.
        seed: of the lines.

    Raises:
        ImportError: POT is not installed.
        ValueError: the shapes do not fit, or `projections` < 1.

    Example:
        >>> x = torch.zeros(10, 2)
        >>> abs(sliced_w2(x, x + torch.tensor([1.0, 0.0])) - 0.5**0.5) < 0.1
        True
    """
    a, b = _samples(x, y)
    check_integer("projections", projections, 1)
    distance = require("ot").sliced_wasserstein_distance(a, b, n_projections=projections, seed=seed % 2**32)
    return float(distance)


def mmd(x: Float[Tensor, "n d"], y: Float[Tensor, "m d"], bandwidth: float = 1.0) -> float:
    """Squared maximum mean discrepancy with the kernel `exp(−|x − y|²/(2h²))`, by its U-statistic: no bias.

    `mean_{i≠j} k(x_i, x_j) + mean_{i≠j} k(y_i, y_j) − 2 mean k(x_i, y_j)`; it may be negative.

    Args:
        x: `[N, D]`, N >= 2.
        y: `[M, D]`, M >= 2.
        bandwidth: h > 0.

    Raises:
        ValueError: the shapes do not fit, or h is not > 0.

    Source: Gretton et al., "A kernel two-sample test", JMLR 13 (2012).

    Example:
        >>> x = torch.randn(400, 2, generator=torch.Generator().manual_seed(0))
        >>> abs(mmd(x[:200], x[200:])) < 0.01 < mmd(x[:200], x[200:] + 1)
        True
    """
    _samples(x, y)
    if min(len(x), len(y)) < 2:
        raise ValueError(f"x and y must have two rows or more, got {len(x)} and {len(y)}")
    scale = -0.5 / check_positive("bandwidth", bandwidth) ** 2

    def total(a: Tensor, b: Tensor) -> float:
        return sum(float((squared * scale).exp().sum(dtype=torch.float64)) for _, squared in _distances(a, b))

    n, m = len(x), len(y)
    within = (total(x, x) - n) / (n * (n - 1)) + (total(y, y) - m) / (m * (m - 1))
    return within - 2 * total(x, y) / (n * m)


def cluster_count(x: Float[Tensor, "*r n d"], radius: float) -> Int[Tensor, "*r"]:
    """How many clusters there are: components of the graph that joins particles at most `radius` apart.

    Args:
        x: `[N, D]` or `[R, N, D]`.
        radius: > 0. On the unit sphere `√(2 − 2γ)` joins cosines of at least γ.

    Returns:
        int64, one number for each realisation.

    Raises:
        ValueError: `radius` is not > 0.

    Example:
        >>> cluster_count(torch.tensor([[0.0], [0.9], [1.8], [5.0]]), radius=1.0)
        tensor(2)
    """
    check_positive("radius", radius)
    if x.dim() > 2:
        return torch.stack([cluster_count(one, radius) for one in x])
    label = torch.arange(len(x), device=x.device)
    while True:  # everyone takes the smallest label in reach, and the label of that, until nothing changes
        smallest = [label.where(squared <= radius**2, len(x)).amin(dim=1) for _, squared in _distances(x, x)]
        new = torch.cat(smallest)
        new = torch.minimum(new, new[new])
        if torch.equal(new, label):
            return (label == torch.arange(len(x), device=x.device)).sum()
        label = new


def energy(x: Float[Tensor, "*r n d"], potential: Callable[[Tensor], Tensor]) -> Float[Tensor, "*r"]:
    """Pair energy `Σ_{i<j} u(|x_i − x_j|²)`, in float64.

    Args:
        x: `[N, D]` or `[R, N, D]`.
        potential: u, from squared distances to energies, of any shape; it is not asked at distance 0 of a particle to
            itself.

    Returns:
        One number for each realisation.

    Example:
        >>> energy(torch.tensor([[0.0], [1.0], [2.0]]), lambda squared: squared.rsqrt())  # Coulomb
        tensor(2.5000, dtype=torch.float64)
    """
    if x.dim() > 2:
        return torch.stack([energy(one, potential) for one in x])
    total = torch.zeros((), dtype=torch.float64, device=x.device)
    columns = torch.arange(len(x), device=x.device)
    for start, squared in _distances(x, x):
        rows = torch.arange(start, start + len(squared), device=x.device)
        total += potential(squared[rows.unsqueeze(1) < columns]).sum(dtype=torch.float64)
    return total


def attention_energy(x: Float[Tensor, "*r n d"], beta: float) -> Float[Tensor, "*r"]:
    """`E_β = 1/(2βN²) Σ_ij exp(β ⟨x_i, x_j⟩)`, which grows along self-attention on the sphere (SA and USA).

    Args:
        x: tokens on the unit sphere, `[N, D]` or `[R, N, D]`.
        beta: β > 0.

    Returns:
        One number for each realisation, in float64.

    Raises:
        ValueError: β is not > 0.

    Source: Geshkovski, Letrouit, Polyanskiy, Rigollet, arXiv 2312.10794.

    Example:
        >>> attention_energy(torch.ones(3, 1), beta=1.0)  # e/2
        tensor(1.3591, dtype=torch.float64)
    """
    check_positive("beta", beta)
    if x.dim() > 2:
        return torch.stack([attention_energy(one, beta) for one in x])
    pieces = [(beta * rows @ x.mT).exp().sum(dtype=torch.float64) for rows in x.split(max(1, _PAIRS // len(x)))]
    return torch.stack(pieces).sum() / (2 * beta * len(x) ** 2)


def cosine_histogram(x: Float[Tensor, "n d"], bins: int = 50) -> Float[Tensor, " bins"]:
    """Which share of the pairs i < j has its cosine in each of equal bins of [−1, 1].

    Args:
        x: `[N, D]`, N >= 2.
        bins: how many.

    Returns:
        float64 `[bins]` that sum to 1.

    Raises:
        ValueError: fewer than two particles, or `bins` < 1.

    Example:
        >>> cosine_histogram(torch.tensor([[1.0, 0.0], [2.0, 0.0], [-1.0, 0.0]]), bins=2)
        tensor([0.6667, 0.3333], dtype=torch.float64)
    """
    check_integer("bins", bins, 1)
    if x.dim() != 2 or len(x) < 2:
        raise ValueError(f"x must have shape [N, D] with N >= 2, got {list(x.shape)}")
    unit = F.normalize(x, dim=1)
    counts = torch.zeros(bins, dtype=torch.int64, device=x.device)
    columns = torch.arange(len(x), device=x.device)
    for rows in columns.split(max(1, _PAIRS // len(x))):
        cosines = (unit[rows] @ unit.mT)[rows.unsqueeze(1) < columns]
        place = ((cosines + 1) * (bins / 2)).long().clamp_(0, bins - 1)
        counts += torch.bincount(place, minlength=bins)
    return counts.double() / counts.sum()


def _distances(x: Float[Tensor, "n d"], y: Float[Tensor, "m d"]) -> Iterator[tuple[int, Float[Tensor, "rows m"]]]:
    """Squared distances, some rows at a time, and the number of the first of them."""
    height = max(1, _PAIRS // max(len(y), 1))
    for start in range(0, len(x), height):
        rows = x[start : start + height]
        yield start, torch.cdist(rows, y, compute_mode="donot_use_mm_for_euclid_dist").square_()


def _check_same_shape(x: Tensor, y: Tensor) -> None:
    if x.shape != y.shape:
        raise ValueError(f"x and y must have one shape, got {list(x.shape)} and {list(y.shape)}")


def _samples(x: Tensor, y: Tensor) -> tuple[object, object]:
    """Two samples as POT takes them."""
    if x.dim() != 2 or y.dim() != 2 or x.shape[1] != y.shape[1] or not len(x) or not len(y):
        raise ValueError(f"x and y must have shapes [N, D] and [M, D], got {list(x.shape)} and {list(y.shape)}")
    a, b = (sample.detach().cpu().double() for sample in (x, y))
    middle = a.mean(dim=0)  # POT's distances come from products, which lose digits far from the origin
    return (a - middle).numpy(), (b - middle).numpy()
