"""Metrics against closed forms."""

import math

import pytest
import torch
from torch import Tensor

from randbatch import particles


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_strong_error_of_a_shift() -> None:
    x = normal(5, 7, 3)
    assert particles.strong_error(x, x + torch.tensor([1.0, 2.0, 2.0])) == pytest.approx(3.0)


def test_weak_error_and_its_standard_error() -> None:
    x, y = normal(1000, 4, 1), normal(1000, 4, 1, seed=1)
    found = particles.weak_error(x, y + 0.3, lambda states: states.mean(dim=(1, 2)))
    assert found.standard_error == pytest.approx(math.sqrt(2 / 4 / 1000), rel=0.1)
    assert abs(found.value - 0.3) < 4 * found.standard_error


def test_w2_of_sorted_samples_and_of_shifts() -> None:
    x, y = normal(40, 1), 2 * normal(40, 1, seed=1)
    assert particles.w2(x, y) == pytest.approx(
        float((x.sort(dim=0).values - y.sort(dim=0).values).square().mean().sqrt())
    )
    cloud = normal(50, 3)
    shift = torch.tensor([1.0, -2.0, 2.0])
    assert particles.w2(cloud, cloud[torch.randperm(50)] + shift) == pytest.approx(3.0)
    sliced = particles.sliced_w2(cloud, cloud + shift, projections=4000)
    assert sliced == pytest.approx(3 / math.sqrt(3), rel=0.03)  # |shift|² / D on average over directions
    assert sliced == particles.sliced_w2(cloud, cloud + shift, projections=4000)
    assert particles.w2(cloud, cloud) == pytest.approx(0, abs=1e-6)


def test_mmd_of_two_normal_laws() -> None:
    """Kernel of width h, N(0, 1) and N(a, 1): 2 h/√(h² + 2) (1 − exp(−a²/(2(h² + 2)))); no bias at a = 0."""
    a, h = 1.0, 0.7
    expected = 2 * h / math.sqrt(h**2 + 2) * (1 - math.exp(-(a**2) / (2 * (h**2 + 2))))
    found, none = [], []
    for seed in range(40):
        x, y = normal(100, 1, seed=seed), normal(150, 1, seed=1000 + seed)
        found.append(particles.mmd(x, y + a, h))
        none.append(particles.mmd(x, y, h))
    for values, truth in ((found, expected), (none, 0.0)):
        sample = torch.tensor(values)
        assert abs(float(sample.mean()) - truth) < 3 * float(sample.std()) / math.sqrt(40)


@pytest.mark.parametrize("pairs", [2**22, 50])
def test_clusters_are_components(pairs: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("randbatch.particles.metrics._PAIRS", pairs)
    centres = torch.tensor([[0.0, 0.0], [10.0, 0.0], [0.0, 10.0]], dtype=torch.float64)
    x = centres.repeat(20, 1) + 0.3 * normal(60, 2).clamp(-1, 1)
    chain = torch.stack([torch.arange(60.0), torch.zeros(60)], dim=1)[torch.randperm(60)].double()
    alone = 100 * normal(60, 2).sign() * torch.arange(60).unsqueeze(1)
    found = particles.cluster_count(torch.stack([x, chain, chain * 2, alone]), radius=1.5)
    assert found.tolist() == [3, 1, 60, 60]
    assert int(particles.cluster_count(x, radius=1.5)) == 3


def test_energies_by_loops(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("randbatch.particles.metrics._PAIRS", 30)
    x = normal(2, 11, 3)
    loops = [sum(1 / float((a[i] - a[j]).norm()) for i in range(11) for j in range(i)) for a in x]
    assert particles.energy(x, torch.rsqrt).tolist() == pytest.approx(loops)
    loops = [sum(math.exp(0.7 * float(a @ b)) for a in one for b in one) / (2 * 0.7 * 121) for one in x]
    assert particles.attention_energy(x, 0.7).tolist() == pytest.approx(loops)


def test_cosines_of_a_uniform_sphere_are_uniform(monkeypatch: pytest.MonkeyPatch) -> None:
    """In three dimensions (Archimedes)."""
    monkeypatch.setattr("randbatch.particles.metrics._PAIRS", 5000)
    found = particles.cosine_histogram(normal(700, 3), bins=10)
    torch.testing.assert_close(found, torch.full((10,), 0.1, dtype=torch.float64), rtol=0.05, atol=0)
    assert float(found.sum()) == pytest.approx(1.0)


@pytest.mark.unchecked
@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: particles.strong_error(x, x[1:]), r"x and y must have one shape, got \[5, 2\] and \[4, 2\]"),
        (lambda x: particles.weak_error(x, x, torch.mean), r"x must have shape \[R, N, D\] with R >= 2, got \[5, 2\]"),
        (lambda x: particles.weak_error(x.view(5, 2, 1), x.view(5, 2, 1), torch.sum), "observable must give one"),
        (lambda x: particles.w2(x, x[:, :1]), r"x and y must have shapes \[N, D\] and \[M, D\], got"),
        (lambda x: particles.sliced_w2(x, x, 0), "projections must be at least 1"),
        (lambda x: particles.mmd(x[:1], x), "x and y must have two rows or more, got 1 and 5"),
        (lambda x: particles.mmd(x, x, 0.0), "bandwidth must be a finite number > 0"),
        (lambda x: particles.cluster_count(x, -1.0), "radius must be a finite number > 0"),
        (lambda x: particles.attention_energy(x, 0.0), "beta must be a finite number > 0"),
        (lambda x: particles.cosine_histogram(x[0]), r"x must have shape \[N, D\] with N >= 2, got \[2\]"),
        (lambda x: particles.cosine_histogram(x, 0), "bins must be at least 1"),
        (lambda _: particles.fit_rate([0.1], [1.0]), "steps and errors must be two or more numbers > 0 each"),
        (lambda _: particles.fit_rate([0.1, 0.2], [1.0, 0.0]), "steps and errors must be two or more numbers > 0"),
    ],
)
def test_bad_input_is_named(call, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call(torch.ones(5, 2))
