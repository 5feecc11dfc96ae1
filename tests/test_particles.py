"""Particles in time: closed forms of the literature, proved rates, and what every method and system must keep."""

import math

import pytest
import torch
from torch import Tensor

import randbatch as rb
from randbatch import particles
from randbatch.particles import BrownianPath, Interaction, LinearForce, RadialForce, Sets, System, solve
from randbatch.particles.interaction import force_on_all
from randbatch.particles.solver import _independent
from randbatch.partition import random_subsets


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def standardised(x: Tensor) -> Tensor:
    """Mean 0 and mean square 1 over the particles of each realisation."""
    x = x - x.mean(dim=-2, keepdim=True)
    return x / x.square().sum(dim=-1, keepdim=True).mean(dim=-2, keepdim=True).sqrt()


# Linear consensus: both second moments of RBM-1 are known exactly.


def consensus_moments(num: int, size: int, tau: float, steps: int) -> tuple[float, float]:
    """E s² = mean square distance to the mean / (N−1)·N, and E ‖X̃ − X‖²/N, after `steps`, from (N−1)/N s₀² = 1."""
    batches, shrink = num / size, math.exp(-size * tau / (size - 1))
    rho = ((batches - 1) + batches * (size - 1) * shrink**2) / (num - 1)
    share = num * (size - 1) / (size * (num - 1))
    mean = (num - size) / (size * (num - 1)) + shrink * share
    exact = math.exp(-num * tau * steps / (num - 1))
    return rho**steps, rho**steps - 2 * mean**steps * exact + exact**2


@pytest.mark.parametrize(("num", "size"), [(24, 2), (24, 4), (30, 15)])
def test_consensus_has_the_exact_moments(num: int, size: int) -> None:
    realisations, steps, tau = 4000, 8, 0.25
    x0 = standardised(normal(realisations, num, 1))
    random = solve(particles.consensus(), x0, steps * tau, tau, "rbm1", batch_size=size, seed=5).final
    direct = solve(particles.consensus(), x0, steps * tau, tau, "direct").final
    for found, expected in zip(
        (random.square().mean(dim=(1, 2)), (random - direct).square().mean(dim=(1, 2))),
        consensus_moments(num, size, tau, steps),
        strict=True,
    ):
        standard_error = float(found.std()) / math.sqrt(realisations)
        assert abs(float(found.mean()) - expected) < 3 * standard_error
        assert standard_error < 0.05 * expected  # the test can fail
    assert random.mean(dim=1).abs().max() < 1e-12  # every batch keeps its mean


def test_consensus_has_strong_rate_a_half_and_weak_rate_one() -> None:
    realisations, num = 1000, 32
    x0 = standardised(normal(realisations, num, 1, seed=1))
    direct = solve(particles.consensus(), x0, 1.0, 1.0, "direct").final
    taus = [2.0**-k for k in range(3, 7)]
    strong, weak = [], []
    for number, tau in enumerate(taus):
        random = solve(particles.consensus(), x0, 1.0, tau, batch_size=4, seed=number).final
        strong.append(particles.strong_error(random, direct))
        weak.append(particles.weak_error(random, direct, lambda x: x.square().mean(dim=(1, 2))).value)
    assert particles.fit_rate(taus, strong) == pytest.approx(0.5, abs=0.1)
    assert particles.fit_rate(taus, weak) == pytest.approx(1.0, abs=0.15)


def test_noise_is_shared_between_methods_and_steps() -> None:
    """Confined, noisy consensus: the mean obeys one scalar equation, the same for every method; errors have rate ½."""
    system = System(LinearForce(), confinement=torch.neg, diffusion=0.7)
    x0, finest = normal(100, 16, 2), 2.0**-9
    noise = BrownianPath(seed=3, dt=finest)
    truth = solve(system, x0, 1.0, finest, "direct", noise=noise).final
    coarse = solve(system, x0, 1.0, 0.25, "rbm1", batch_size=2, noise=noise).final
    again = solve(system, x0, 1.0, 0.25, "direct", noise=noise).final
    torch.testing.assert_close(coarse.mean(dim=1), again.mean(dim=1), rtol=0, atol=1e-12)
    taus = [2.0**-k for k in range(4, 8)]
    errors = [
        particles.strong_error(solve(system, x0, 1.0, tau, batch_size=2, noise=noise, seed=1).final, truth)
        for tau in taus
    ]
    assert particles.fit_rate(taus, errors) == pytest.approx(0.5, abs=0.1)
    other = solve(system, x0, 1.0, 0.25, "direct", seed=4).final
    assert particles.strong_error(again, other) > 3 * particles.strong_error(again, truth)


def test_brownian_increments_are_brownian() -> None:
    path = BrownianPath(seed=0, dt=0.1)
    one, two, both = (path.increment(*steps, (100_000,), torch.float64) for steps in ((0, 3), (3, 7), (0, 7)))
    torch.testing.assert_close(one + two, both)
    assert float(one.var()) == pytest.approx(0.3, rel=0.02)
    assert float(two.var()) == pytest.approx(0.4, rel=0.02)
    assert abs(float(torch.corrcoef(torch.stack([one, two]))[0, 1])) < 0.01


# Random batches: what RBM's lemma says, of every unbiased interaction, on the real partitions.


def gauss(squared: Tensor) -> Tensor:
    return (-squared).exp()


def by_loops(x: Tensor, force: RadialForce, weights: Tensor | None = None, species: Tensor | None = None) -> Tensor:
    """Pair by pair, no formula shared with the code."""
    out = torch.zeros_like(x)
    for i in range(len(x)):
        for j in range(len(x)):
            if i != j:
                difference = x[i] - x[j]
                factor = force.profile(difference @ difference)
                factor = factor if weights is None else factor * weights[j]
                factor = factor if species is None else factor * force.strength[species[i], species[j]]
                out[i] += factor * difference / (len(x) - 1)
    return out


@pytest.mark.parametrize("singular", [False, True])
@pytest.mark.parametrize("pairs", [2**18, 40, 7])
def test_a_radial_force_is_the_sum_over_pairs(singular: bool, pairs: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("randbatch.particles.interaction._PAIRS", pairs)  # all sets at once, some rows, one row
    monkeypatch.setattr("randbatch.particles.interaction._ROWS", 1)
    monkeypatch.setattr("randbatch.particles.pair_forces._FEW", 10)
    x, weights, species = normal(3, 11, 2), normal(3, 11, seed=1).exp(), torch.arange(33).view(3, 11) % 2
    force = RadialForce(gauss, singular, strength=torch.tensor([[1.0, -2.0], [0.5, 3.0]], dtype=torch.float64))
    found = force_on_all(force, Sets(x, 11, weights, species))
    expected = torch.stack([by_loops(*one) for one in zip(x, [force] * 3, weights, species, strict=True)])
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("size", [2, 5])
def test_in_batch_forces_are_unbiased_with_the_variance_of_the_lemma(size: int) -> None:
    """E χ = 0 and Var χ_i = (1/(p−1) − 1/(N−1)) Λ_i: weights and species included."""
    num, draws, tau = 20, 20_000, 1.0
    x, weights, species = normal(num, 2), normal(num, seed=1).exp(), torch.arange(num) % 2
    strength = torch.tensor([[1.0, -2.0], [0.5, 3.0]], dtype=torch.float64)
    force = RadialForce(gauss, strength=strength)
    system = System(force, weights=weights, species=species)
    moved = solve(system, x.expand(draws, -1, -1), tau, tau, batch_size=size, seed=2).final
    chi = moved - x - by_loops(x, force, weights, species)
    z = chi.mean(dim=0) / (chi.std(dim=0) / math.sqrt(draws))
    assert z.abs().max() < 4.5  # 40 of them
    difference = x.unsqueeze(1) - x
    pair = (gauss(difference.square().sum(-1)) * weights * strength[species][:, species]).unsqueeze(-1) * difference
    spread = (pair - pair.sum(dim=1, keepdim=True) / (num - 1)).square().sum(-1)
    spread = (spread.sum(dim=1) - spread.diagonal()) / (num - 2)
    expected = (1 / (size - 1) - 1 / (num - 1)) * spread
    squares = chi.square().sum(-1)
    z = (squares.mean(dim=0) - expected) / (squares.std(dim=0) / math.sqrt(draws))
    assert z.abs().max() < 4
    assert float(squares.std(dim=0).div(squares.mean(dim=0)).max()) / math.sqrt(draws) < 0.03  # the test can fail


SYSTEMS = {
    "consensus": particles.consensus(),
    "opinion": particles.opinion(radius=3.0),
    "cucker_smale": particles.cucker_smale(),
    "dyson": System(particles.PowerRepulsion(2.0)),
    "thomson": particles.thomson(),
    "sa": particles.sphere_attention(particles.SoftmaxAttention(beta=2.0)),
    "sa_debiased": particles.sphere_attention(particles.SoftmaxAttention(beta=2.0, estimator="debiased")),
    "usa": particles.sphere_attention(particles.UnnormalisedAttention(beta=2.0)),
    "langevin": particles.Langevin(RadialForce(gauss), friction=1.0, temperature=0.3),
    "wealth": particles.wealth(),
}


def start_of(name: str, *shape: int) -> Tensor:
    x = normal(*shape, 1 if name == "dyson" else 4)
    return torch.nn.functional.normalize(x, dim=-1) if SYSTEMS[name].manifold is particles.SPHERE else x


@pytest.mark.parametrize("name", SYSTEMS)
def test_one_batch_of_all_is_the_direct_sum(name: str) -> None:
    system, x0 = SYSTEMS[name], start_of(name, 3, 7)
    direct = solve(system, x0, 0.03, 0.01, "direct", seed=1).final
    torch.testing.assert_close(solve(system, x0, 0.03, 0.01, "rbm1", batch_size=7, seed=1).final, direct)
    if not system.noise_columns(4):
        torch.testing.assert_close(solve(system, x0, 0.03, 0.01, "rbmr", batch_size=7).final, direct)


@pytest.mark.parametrize("name", SYSTEMS)
@pytest.mark.parametrize("method", ["direct", "rbm1", "rbmr"])
def test_a_seed_is_a_trajectory_in_any_dtype(name: str, method: str) -> None:
    system, x0 = SYSTEMS[name], start_of(name, 2, 7)
    size = None if method == "direct" else 2
    path = solve(system, x0, 0.03, 0.01, method, batch_size=size, seed=3, save_at=(0.0, 0.01, 0.03))
    assert path.states.shape == (3, *x0.shape)
    assert path.times.tolist() == [0, 0.01, 0.03]
    assert torch.equal(path.states[0], x0)
    assert torch.equal(path.final, solve(system, x0, 0.03, 0.01, method, batch_size=size, seed=3).final)
    narrow = solve(system, x0.float(), 0.03, 0.01, method, batch_size=size, seed=3).final
    assert narrow.dtype == torch.float32
    if not system.noise_columns(4):  # torch draws other numbers in another dtype
        torch.testing.assert_close(narrow.double(), path.final, rtol=1e-3, atol=1e-4)
    if method != "direct":
        assert not torch.equal(path.final, solve(system, x0, 0.03, 0.01, method, batch_size=size, seed=4).final)
        assert not torch.equal(path.final[0] - x0[0], path.final[1] - x0[1])


def test_realisations_have_partitions_of_their_own_and_never_mix() -> None:
    x0 = normal(1, 12, 1).expand(50, -1, -1)
    moved = solve(particles.consensus(), x0, 0.1, 0.1, batch_size=2, seed=1).final
    assert len({tuple(one.flatten().tolist()) for one in moved}) == 50
    far = torch.cat([x0[:1], x0[:1] + 1000])
    moved = solve(particles.consensus(), far, 0.1, 0.1, batch_size=5, seed=1).final
    torch.testing.assert_close(moved.mean(dim=1), far.mean(dim=1))


def test_one_realisation_is_the_partition_of_the_seed() -> None:
    """RBM-1 by hand on `random_partition`: no partition of its own."""
    x = x0 = normal(10, 3)
    for step in range(4):
        for row in rb.random_partition(10, 5, seed=rb.partition.fold_seed(7, step)).index:
            x = x.index_copy(0, row, x[row] + 0.1 * by_loops(x[row], RadialForce(gauss)))
    torch.testing.assert_close(solve(System(RadialForce(gauss)), x0, 0.4, 0.1, batch_size=5, seed=7).final, x)


# RBM-r


def test_subsets_are_uniform_and_have_no_token_twice() -> None:
    draws = 30_000
    sets = random_subsets(6, 3, draws, seed=1)
    assert bool((sets.sort(dim=1).values.diff(dim=1) > 0).all())
    codes = (2**sets).sum(dim=1)
    counts = codes.unique(return_counts=True)[1].double()
    assert len(counts) == 20  # all 6!/(3! 3!)
    assert float(((counts - draws / 20) ** 2 / (draws / 20)).sum()) < 19 + 4 * math.sqrt(38)
    assert torch.equal(random_subsets(5, 5, 4).sort(dim=1).values, torch.arange(5).expand(4, 5))
    assert torch.equal(sets, random_subsets(6, 3, draws, seed=1))


def test_draws_in_groups_are_the_draws_one_after_the_other() -> None:
    sets = random_subsets(40, 4, 60, seed=2)
    groups = list(_independent(sets, 40))
    assert sorted(torch.cat(groups).tolist()) == list(range(60))
    assert len(groups) < 30
    x0 = normal(40, 2)
    x = x0.clone()
    for row in random_subsets(40, 4, 10, seed=rb.partition.fold_seed(9, 0)):
        x[row] += 0.1 * by_loops(x[row], RadialForce(gauss))
    found = solve(System(RadialForce(gauss)), x0, 0.1, 0.1, "rbmr", batch_size=4, seed=9).final
    torch.testing.assert_close(found, x)


@pytest.mark.parametrize(("num", "size"), [(24, 2), (22, 4)])  # 22 is not a multiple of 4
def test_consensus_with_replacement_has_the_exact_second_moment(num: int, size: int) -> None:
    """One draw multiplies E Σ(x − mean)² by 1 − (p−1)/(N−1) (1 − q²): a random set holds that share of it."""
    realisations, steps, tau = 4000, 6, 0.25
    x0 = standardised(normal(realisations, num, 1))
    draws = -(-num // size)
    shrink = math.exp(-size * tau * num / (draws * size) / (size - 1))
    expected = (1 - (size - 1) / (num - 1) * (1 - shrink**2)) ** (draws * steps)
    found = solve(particles.consensus(), x0, steps * tau, tau, "rbmr", batch_size=size, seed=1).final
    squares = found.square().mean(dim=(1, 2))
    assert abs(float(squares.mean()) - expected) < 3 * float(squares.std()) / math.sqrt(realisations)


def test_noise_with_replacement_has_the_right_variance() -> None:
    """No interaction left but noise: after time t a particle has variance σ² t on average over its draws."""

    class Nothing(Interaction):
        def force(self, sets: Sets, rows: slice) -> Tensor:
            return torch.zeros_like(sets.x[:, rows])

    x = solve(System(Nothing(), diffusion=0.5), torch.zeros(400, 51, 1), 2.0, 0.1, "rbmr", batch_size=4).final
    assert float(x.var()) == pytest.approx(0.25 * 2.0, rel=0.03)


# Errors


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"dt": 0.0}, ValueError, "dt must be a finite number > 0, got 0.0"),
        ({"dt": -0.1}, ValueError, "dt must be a finite number > 0"),
        ({"dt": "a"}, TypeError, "dt must be a number, got str"),
        ({"dt": 0.3}, ValueError, "t1 must be a whole multiple of dt = 0.3, got 1.0"),
        ({"batch_size": 1}, ValueError, "batch_size must be at least 2, got 1"),
        ({"batch_size": 11}, ValueError, "batch_size must be at most the number of particles 10, got 11"),
        ({"batch_size": None}, TypeError, "batch_size must be given with method 'rbm1'"),
        ({"method": "direct"}, ValueError, "batch_size must be None with method 'direct'"),
        ({"method": "rbm2"}, ValueError, "method must be one of 'direct', 'rbm1', 'rbmr'; got 'rbm2'. Did you mean"),
        ({"x0": torch.zeros(10)}, ValueError, r"x0 must have shape \[N, S\] or \[R, N, S\] with N >= 2, got \[10\]"),
        ({"x0": torch.zeros(1, 2)}, ValueError, r"x0 must have shape .* got \[1, 2\]"),
        ({"x0": torch.zeros(10, 2, dtype=torch.int64)}, TypeError, "x0 must be a floating-point tensor"),
        ({"x0": torch.zeros(10, 2).index_fill(0, torch.tensor(4), torch.nan)}, ValueError, "x0 must be finite.*le 4"),
        ({"save_at": ()}, ValueError, "save_at must be ascending times from 0 to t1 = 1"),
        ({"save_at": (0.5, 0.2)}, ValueError, "save_at must be ascending"),
        ({"save_at": (0.55,)}, ValueError, "save_at must be a whole multiple of dt = 0.1, got 0.55"),
        ({"save_at": (2.0,)}, ValueError, "save_at must be ascending times from 0 to t1 = 1, got"),
        ({"noise": BrownianPath(0, 0.03)}, ValueError, "dt must be a whole multiple of the noise's step 0.03, got 0.1"),
        ({"seed": 1.5}, TypeError, "seed must be an int, got float"),
        ({"system": System(RadialForce(gauss), weights=torch.ones(9))}, ValueError, r"weights must have shape \[10\]"),
        ({"system": particles.Langevin(LinearForce()), "x0": torch.zeros(10, 3)}, ValueError, "even number of columns"),
    ],
)
@pytest.mark.unchecked
def test_bad_input_is_named(change: dict, error: type[Exception], message: str) -> None:
    arguments = {"system": particles.consensus(), "x0": torch.zeros(10, 2), "t1": 1.0, "dt": 0.1, "batch_size": 2}
    with pytest.raises(error, match=message):
        solve(**{**arguments, **change})


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: System(LinearForce(), weights=torch.ones(3)), "weights must be None: LinearForce does not look"),
        (lambda: System(LinearForce(), diffusion=math.nan), "diffusion must be finite, got nan"),
        (lambda: System(RadialForce(gauss), species=torch.ones(3, 1).long()), r"species must have shape \[N\]"),
        (lambda: particles.Langevin(LinearForce(), friction=-1.0), "friction must be a finite number >= 0, got -1"),
        (lambda: particles.Langevin(LinearForce(), diffusion=1.0), "Langevin takes friction and temperature"),
        (lambda: particles.SoftmaxAttention(estimator="debias"), "estimator must be one of .* Did you mean 'debiased'"),
        (lambda: particles.SoftmaxAttention(query=torch.ones(2, 2)), "query must have shape"),
        (lambda: particles.SoftmaxAttention(query=torch.ones(2, 2, 2), key=torch.ones(3, 2, 2)), "as many heads"),
        (lambda: particles.wealth(-1.0), "exchange must be a finite number > 0"),
        (lambda: particles.opinion(0.0), "radius must be a finite number > 0"),
        (lambda: particles.dyson(1), "num_particles must be at least 2"),
    ],
)
@pytest.mark.unchecked
def test_bad_systems_are_named(make, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_a_force_that_is_not_finite_names_particle_and_step() -> None:
    """Particles 1 and 2 are pulled into one point, exactly, in step 0, and meet with an infinite force in step 1."""
    x0 = torch.tensor([[9.0], [1.0], [-1.0]]).expand(2, 3, 1).clone()
    x0[0, 1] = 0.5
    force = RadialForce(lambda squared: torch.where(squared > 5, 0.0, -(squared**-0.5) * 2.0), singular=True)
    with pytest.raises(ValueError, match=r"got \[nan\] for particle 1 of realisation 1 in step 1 \(t = 1 to 2\)"):
        solve(System(force), x0, 4.0, 1.0, "direct")


def test_large_numbers_are_not_called_infinite() -> None:
    x0 = torch.full((4, 1), 3e38)
    assert torch.equal(solve(particles.consensus(), x0[:2] * 0.3, 1.0, 0.5, batch_size=2).final, x0[:2] * 0.3)
    solve(System(RadialForce(torch.zeros_like)), x0 * torch.tensor([[1.0], [1.0], [1.0], [0.5]]), 1.0, 0.5, "direct")


def test_the_start_is_not_changed_and_nothing_is_recorded() -> None:
    for method, size in (("direct", None), ("rbm1", 2), ("rbmr", 2)):
        x0 = normal(6, 2).requires_grad_()
        kept = x0.detach().clone()
        assert not solve(particles.consensus(), x0, 0.2, 0.1, method, batch_size=size).final.requires_grad
        assert torch.equal(x0.detach(), kept)


def test_a_bar_is_shown_on_request(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Not on a pipe, not on a short run; the steps are the same."""
    quiet = solve(particles.consensus(), normal(6, 2), 1.0, 0.1, batch_size=2).final
    assert torch.equal(solve(particles.consensus(), normal(6, 2), 1.0, 0.1, batch_size=2, progress=True).final, quiet)
    assert capsys.readouterr().err == ""
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    monkeypatch.setattr("randbatch.particles.solver._BAR_AFTER", 0.0)
    solve(particles.consensus(), normal(6, 2), 1.0, 0.1, batch_size=2, progress=True)
    assert "10/10" in capsys.readouterr().err


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("name", [name for name, system in SYSTEMS.items() if not system.noise_columns(4)])
def test_same_on_the_gpu(name: str) -> None:
    """Without noise: another device draws another."""
    system, x0 = SYSTEMS[name], start_of(name, 3, 30)
    for method, size in (("direct", None), ("rbm1", 4), ("rbmr", 4)):
        cpu, gpu = (solve(system, x0.to(d), 0.1, 0.01, method, batch_size=size).final for d in ("cpu", "cuda"))
        torch.testing.assert_close(gpu.cpu(), cpu, rtol=1e-8, atol=1e-8)
