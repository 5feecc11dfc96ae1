"""Measured rates: fits with a known answer, closed forms, the commands, and what an interruption leaves."""

import csv
import json
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from randbatch import particles
from randbatch.cli import main
from randbatch.cli.studies import rates
from randbatch.cli.studies.cases import CASES, start_of
from randbatch.cli.studies.frames import draw_strip, film
from randbatch.cli.studies.softmax import AttentionInBatches, softmax_jobs
from randbatch.particles import (
    SPHERE,
    BrownianPath,
    SoftmaxAttention,
    System,
    Trajectory,
    measure_convergence,
    solve,
)
from randbatch.particles.convergence import Job, measure, second_moment
from randbatch.particles.rates import Convergence, Errors, fit_with_interval


def errors_of(strong: Callable[[float], float], weak: Callable[[float], float], noise: float = 0.0) -> Errors:
    """Made errors: the same in every realisation but for a little noise."""
    dts = [2.0**-k for k in range(6)]
    spread = 1 + noise * torch.randn(6, 50, dtype=torch.float64)
    rows = [torch.tensor([law(dt) for dt in dts], dtype=torch.float64).unsqueeze(1) for law in (strong, weak)]
    return Errors("made", 2, dts, rows[0].square() * spread.square(), rows[1] * spread, 0.5, 1.0)


def test_powers_are_found() -> None:
    errors = errors_of(lambda dt: 3 * dt**0.5, lambda dt: -2 * dt)
    strong, weak = errors.strong_rate(), errors.weak_rate()
    assert strong is not None
    assert weak is not None
    assert (strong.value, strong.low, strong.high) == pytest.approx((0.5, 0.5, 0.5))
    assert weak.value == pytest.approx(1.0)
    assert errors.last_slope() == pytest.approx(0.5)
    points = errors.points()
    assert [point.strong for point in points] == pytest.approx([3 * dt**0.5 for dt in errors.dts])
    assert [point.weak for point in points] == pytest.approx([2 * dt for dt in errors.dts])


def test_a_floor_shows_in_the_last_slope() -> None:
    errors = errors_of(lambda dt: 1 + 0.01 * dt, lambda dt: dt)
    assert abs(errors.last_slope()) < 0.01


def test_noise_is_not_taken_for_a_weak_error() -> None:
    """Half the realisations say +1 and half −1: nothing is resolved, and no rate is told."""
    signs = torch.ones(4, 50, dtype=torch.float64)
    signs[:, ::2] = -1
    errors = Errors("made", 2, [1.0, 0.5, 0.25, 0.125], None, signs + 0.01)
    assert errors.weak_rate() is None
    assert errors.strong_rate() is None
    assert math.isnan(errors.points()[0].strong)
    assert "not resolved" in str(Convergence("made", 9, [errors]))


def test_intervals_hold_the_truth_as_often_as_they_say() -> None:
    """Log-normal squared errors of 60 realisations, 200 times: 95 % intervals, asked for at least 87 %."""
    x = [1.0, 0.5, 0.25, 0.125]
    means = torch.tensor(x, dtype=torch.float64).unsqueeze(1)
    hits = 0
    for _ in range(200):
        rate = fit_with_interval(x, means * (0.7 * torch.randn(4, 60, dtype=torch.float64)).exp(), torch.sqrt)
        hits += rate.low <= 0.5 <= rate.high
    assert 0.87 <= hits / 200 <= 0.995


def test_consensus_against_the_closed_form() -> None:
    """E |X̃ − X|² of linear consensus by RBM-1, exactly: see the derivation of the moments in `test_particles`."""
    size, p, t1, dts = 24, 4, 1.0, [0.25, 0.125, 0.0625]
    x0 = torch.randn(400, size, 1, dtype=torch.float64)
    found = measure_convergence(particles.consensus(), x0, t1, dts, batch_sizes=(p,), refine=1)
    spread = (x0 - x0.mean(dim=1, keepdim=True)).square().sum(dim=(1, 2)) / (size - 1)  # s₀² of each start
    n, decay = size // p, math.exp(-size * t1 / (size - 1))
    for point, squared, dt in zip(found.errors[0].points(), found.errors[0].squared, dts, strict=True):  # type: ignore[arg-type]
        q = math.exp(-p * dt / (p - 1))
        rho = ((n - 1) + n * (p - 1) * q**2) / (size - 1)
        a = (size - p) / (p * (size - 1)) + q * size * (p - 1) / (p * (size - 1))
        steps = round(t1 / dt)
        expected = (size - 1) / size * spread * (rho**steps - 2 * a**steps * decay + decay**2)
        off = squared - expected
        assert abs(float(off.mean())) < 3 * float(off.std()) / math.sqrt(len(off))
        assert point.strong_low < math.sqrt(float(expected.mean())) * 1.05
        assert point.strong_high > math.sqrt(float(expected.mean())) / 1.05
    rate = found.errors[0].strong_rate()
    assert rate is not None
    assert rate.value == pytest.approx(0.5, abs=0.1)
    assert "| rbm1 | 4 |" in str(found)


def test_the_strong_error_grows_with_the_variance_of_the_random_force() -> None:
    x0 = torch.randn(100, 24, 1, dtype=torch.float64)
    found = measure_convergence(particles.consensus(), x0, 0.5, [0.125, 0.0625, 1 / 32], batch_sizes=(2, 4, 8, 24))
    rate = found.batch_size_rate("rbm1")
    assert rate is not None
    assert rate.value == pytest.approx(0.5, abs=0.05)
    whole = found.errors[-1].points()[-1]  # one batch of all is the direct sum, and the flow is exact
    assert whole.strong < 1e-12


def test_random_batches_with_noise_of_their_own_have_no_strong_error() -> None:
    x0 = torch.ones(20, 8, 1, dtype=torch.float64)
    found = measure_convergence(particles.wealth(), x0, 0.5, [0.25, 0.125, 0.0625], methods=("rbm1", "rbmr"))
    assert found.errors[0].strong_rate() is not None
    assert found.errors[1].strong_rate() is None
    assert found.errors[1].proved_strong is None


@pytest.mark.unchecked
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dts": [0.5, 0.25]}, "dts must be at least 3 different steps"),
        ({"dts": [0.5, 0.25, -1.0]}, "dts must be a finite number > 0"),
        ({"methods": ("direct",)}, "methods must be one of 'rbm1', 'rbmr'"),
        ({"batch_sizes": (1,)}, "batch_sizes must be at least 2"),
        ({"observable": lambda x: x.mean()}, "one number for each of 5 realisations"),
        ({"x0": torch.zeros(5, 2)}, "x0 must have shape"),
        ({"refine": 0}, "refine must be at least 1"),
    ],
)
def test_bad_input_is_named(change: dict[str, object], message: str) -> None:
    settings: dict[str, object] = {"x0": torch.zeros(5, 4, 1), "dts": [0.5, 0.25, 0.125]} | change
    x0, dts = settings.pop("x0"), settings.pop("dts")
    with pytest.raises(ValueError, match=message):
        measure_convergence(particles.consensus(), x0, 1.0, dts, **settings)  # type: ignore[arg-type]


# Softmax: the op that models use, as a force.


@pytest.mark.parametrize(("size", "rounds"), [(16, 1), (4, 5)])
def test_whole_sets_and_all_rounds_are_the_flow(size: int, rounds: int) -> None:
    x0 = start_of(CASES["sphere_softmax"], 3, 16, 0)
    direct = solve(System(SoftmaxAttention(2.0), manifold=SPHERE), x0, 1.0, 0.25, "direct").final
    system = AttentionInBatches(SoftmaxAttention(2.0), manifold=SPHERE, batch_size=size, rounds=rounds)
    torch.testing.assert_close(solve(system, x0, 1.0, 0.25, "direct").final, direct, rtol=0, atol=1e-12)


def test_the_op_is_as_far_from_the_flow_as_the_solver() -> None:
    """Two ways to the same law: `random_batch_attention` inside a direct step, and RBM-1 with `SoftmaxAttention`."""
    x0 = start_of(CASES["sphere_softmax"], 200, 32, 0)
    system = System(SoftmaxAttention(2.0), manifold=SPHERE)
    truth = solve(system, x0, 0.5, 0.125, "direct").final
    noise = BrownianPath(0, 0.125)
    for estimator in ("plain", "debiased"):
        flow = System(SoftmaxAttention(2.0, estimator=estimator), manifold=SPHERE)
        by_solver = solve(flow, x0, 0.5, 0.125, batch_size=8, noise=noise, seed=1).final
        by_op = AttentionInBatches(SoftmaxAttention(2.0), manifold=SPHERE, batch_size=8, estimator=estimator)
        errors = [particles.strong_error(x, truth) for x in (by_solver, solve(by_op, x0, 0.5, 0.125, "direct").final)]
        assert errors[0] == pytest.approx(errors[1], rel=0.03)


def test_softmax_has_a_floor_and_the_unnormalised_flow_has_none() -> None:
    x0 = start_of(CASES["sphere_softmax"], 64, 32, 0)  # of 8 realisations the last slope is known to 0.1 only
    dts = [0.125, 0.0625, 1 / 32, 1 / 64, 1 / 128]
    noise = BrownianPath(0, dts[-1])
    last: dict[str, float] = {}
    for system, jobs in softmax_jobs(x0, 1.0, (8,), noise, 0):
        reference = solve(system, x0, 1.0, noise.dt, "direct", noise=noise).final
        for job in jobs:
            if job.label in ("plain", "debiased", "unnormalised"):
                errors = measure(job, reference, dts, second_moment)
                last[job.label] = errors.last_slope()
                last[f"{job.label} error"] = errors.points()[-1].strong
    assert last["plain"] < 0.15
    assert last["debiased"] > 2 * last["plain"]
    assert last["unnormalised"] == pytest.approx(0.5, abs=0.1)
    assert last["debiased error"] < 0.6 * last["plain error"]


def test_a_job_leaves_the_generator_of_torch_alone() -> None:
    x0 = start_of(CASES["sphere_softmax"], 2, 8, 0)
    job = softmax_jobs(x0, 0.5, (4,), BrownianPath(0, 0.25), 0)[0][1][0]
    before = torch.get_rng_state()
    first, again, other = job.final(0, 0.25), job.final(0, 0.25), job.final(1, 0.25)
    assert torch.get_rng_state().equal(before)
    assert first.equal(again)
    assert not first.equal(other)


# The commands.

SMALL = ["--realisations", "6", "--num-particles", "12", "--batch-size", "2", "4", "--method", "rbm1"]


def test_the_command_writes_points_table_and_picture(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["convergence", *SMALL, "--dt", "0.5", "0.25", "0.125", "--out", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert (tmp_path / "convergence.md").read_text().strip() in printed
    rows = list(csv.DictReader((tmp_path / "convergence.csv").read_text().splitlines()))
    assert len(rows) == 2 * 3
    assert {row["method"] for row in rows} == {"rbm1"}
    assert [float(row["dt"]) for row in rows[:3]] == [0.5, 0.25, 0.125]
    assert (tmp_path / "convergence.png").read_bytes().startswith(b"\x89PNG")


def test_an_interrupted_command_resumes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    assert main(["convergence", *SMALL, "--out", str(whole)]) == 0
    jobs: list[Job] = []

    def measure_once(job: Job, *args: object) -> Errors:
        jobs.append(job)
        if len(jobs) == 2:
            raise KeyboardInterrupt
        return measure(job, *args)  # type: ignore[arg-type]

    monkeypatch.setattr(rates, "measure", measure_once)
    assert main(["convergence", *SMALL, "--out", str(broken)]) == 130
    assert f"resume with: the same command and --out {broken}" in capsys.readouterr().err
    assert len(json.loads((broken / "errors.json").read_text())["errors"]) == 1
    assert main(["convergence", *SMALL, "--out", str(broken)]) == 0
    assert [job.batch_size for job in jobs] == [2, 4, 4]
    assert (broken / "convergence.csv").read_text() == (whole / "convergence.csv").read_text()
    assert main(["convergence", *SMALL, "--seed", "1", "--out", str(broken)]) == 2
    assert f"seed: {broken} was made with 0, got 1" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["convergence", "--system", "consensos"], "Did you mean 'consensus'?"),
        (["convergence", "--system", "thomson"], "has no rates to measure: the repulsion is singular"),
        (["convergence", "--batch-size", "100"], "batch_size must be at most the number of particles 64, got 100"),
        (["convergence", "--system", "softmax", "--method", "rbm1"], "method is for particles"),
        (["convergence", "--run", "somewhere", "--dt", "0.1"], "dt is for systems of particles"),
        (["convergence", "--realisations", "1"], "realisations must be at least 2"),
        (["convergence", "--dt", "0.5", "0.25", "0.3"], "t1 must be a whole multiple of dt = 0.3"),
        (["convergence", "--dt", "0.5", "0.25", "0.2"], "dt must be a whole multiple of the smallest = 0.2"),
        (["convergence", "--dt", "0.5", "0.25"], "dt must name at least 3, got 2"),
        (["convergence", "--root", "data"], "root is for the data set of a run"),
        (["simulate", "--system", "opinions"], "Did you mean 'opinion'?"),
        (["simulate", "--frames", "1"], "frames must be at least 2"),
        (["simulate", "--t1", "1", "--dt", "0.5", "--frames", "4"], "frames must be at most"),
        (["simulate", "--method", "rbm2"], "method must be one of"),
        (["simulate", "--method", "direct", "--batch-size", "2"], "batch_size must be left out with method 'direct'"),
        (["simulate", "--batch-size", "0"], "batch_size must be at least 2, got 0"),
    ],
)
def test_bad_settings_are_one_line(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*arguments, "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", CASES)
def test_every_system_is_simulated_and_drawn(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    settings = ["--num-particles", "30", "--dt", str(case.dt), "--t1", str(4 * case.dt), "--frames", "3"]
    assert main(["simulate", "--system", name, *settings, "--out", str(tmp_path), "--film"]) == 0
    stored = np.load(tmp_path / "trajectory.npz")
    x0 = start_of(case, 1, 30, 0)[0]
    times = (0.0, 2 * case.dt, 4 * case.dt)
    expected = solve(case.system(30), x0, 4 * case.dt, case.dt, batch_size=case.batch_size, save_at=times)
    assert stored["times"] == pytest.approx(times)
    np.testing.assert_array_equal(stored["states"], expected.states.numpy())
    assert (tmp_path / "frames.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "film.gif").read_bytes().startswith(b"GIF8")


@pytest.mark.parametrize("name", ["wealth", "dyson", "consensus", "thomson", "cucker_smale"])
@pytest.mark.parametrize("stray", [0.0, 5.0])
def test_particles_in_one_place_are_drawn(name: str, stray: float, tmp_path: Path) -> None:
    case = CASES[name]
    columns = start_of(case, 1, 2, 0).shape[-1]
    states = torch.full((2, 10, columns), 3.0, dtype=torch.float64)
    states[1, 0] += stray  # one of ten
    found = Trajectory(torch.tensor([0.0, 1.0], dtype=torch.float64), states)
    draw_strip(found, case, name, tmp_path / "frames.png")
    film(found, case, name, tmp_path / "film.gif")
    assert (tmp_path / "frames.png").read_bytes().startswith(b"\x89PNG")


def test_a_strip_of_many_frames_shows_some(tmp_path: Path) -> None:
    """The first, the last and some between: a picture of thousands of panels is none."""
    states = torch.randn(1000, 3, 2, dtype=torch.float64)
    found = Trajectory(torch.arange(1000, dtype=torch.float64), states)
    draw_strip(found, CASES["consensus"], "many", tmp_path / "frames.png")
    with Image.open(tmp_path / "frames.png") as picture:
        assert picture.size == (round(120 * 2.6 * 6), round(120 * 2.7 * 10))


def test_known_laws_are_densities() -> None:
    """They integrate to one; the semicircle has the second moment s/2, wealth the mean 1."""
    x = torch.linspace(-2, 2, 40_001, dtype=torch.float64)
    law = CASES["dyson"].law
    assert law is not None
    for time in (0.1, 1.0):
        assert float(torch.trapezoid(law(time, x), x)) == pytest.approx(1.0, abs=1e-4)
        expected = -math.expm1(-2 * time) / 2
        assert float(torch.trapezoid(law(time, x) * x.square(), x)) == pytest.approx(expected, abs=1e-4)
    places: Tensor = torch.logspace(-3, 5, 100_001, dtype=torch.float64)
    law = CASES["wealth"].law
    assert law is not None
    assert float(torch.trapezoid(law(5.0, places), places)) == pytest.approx(1.0, abs=1e-4)
    assert float(torch.trapezoid(law(5.0, places) * places, places)) == pytest.approx(1.0, abs=1e-4)
