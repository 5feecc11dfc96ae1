"""Far from the origin, in float32: forces, flows and distances are those of the same numbers in float64."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from randbatch import particles
from randbatch.particles.interaction import Interaction, Sets, force_on_all

SHIFTS = [0.0, 1e3, 1e4, 1e5]


def far(count: int, size: int, columns: int, shift: float) -> Tensor:
    """Particles on a domain of 6, as float32 has them so far away."""
    generator = torch.Generator().manual_seed(0)
    return (6 * torch.rand(count, size, columns, generator=generator, dtype=torch.float64) + shift).float()


def soft(squared: Tensor) -> Tensor:
    return (-squared).exp()


FORCES: dict[str, Callable[[], Interaction]] = {
    "linear": particles.LinearForce,
    "opinion": lambda: particles.opinion().interaction,
    "radial": lambda: particles.RadialForce(soft),
    "singular": lambda: particles.RadialForce(lambda squared: 1 / (squared + 0.1), singular=True),
    "repulsion": lambda: particles.PowerRepulsion(1.0),
    "alignment": lambda: particles.cucker_smale().interaction,
}


@pytest.mark.parametrize("name", FORCES)
@pytest.mark.parametrize("columns", [2, 24])
@pytest.mark.parametrize("size", [8, 200])
@pytest.mark.parametrize("shift", SHIFTS)
def test_forces_of_far_particles(name: str, columns: int, size: int, shift: float) -> None:
    x, force = far(3, size, columns, shift), FORCES[name]()
    want = force_on_all(force, Sets(x.double(), size))
    got = force_on_all(force, Sets(x, size))
    # the sum of many terms of one size is known to a few units in the last place of that size
    scale = float(want.abs().max()) + float((want != 0).any())
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=2e-5 * scale)


@pytest.mark.parametrize("size", [2, 8, 200])
@pytest.mark.parametrize("shift", SHIFTS)
def test_flows_of_far_particles(size: int, shift: float) -> None:
    """No more is lost than the states cannot hold."""
    x, flow = far(4, size, 2, shift), particles.LinearForce()
    got, want = (flow.flow(Sets(start, size), 0.3) for start in (x, x.double()))
    assert got is not None and want is not None
    unit = torch.nextafter(got, torch.tensor(torch.inf)) - got
    room = 0.6 * unit.double() + 1e-6  # the move itself is known to 1e-7 of the domain
    assert bool(((got.double() - want).abs() <= room).all())


@pytest.mark.parametrize(
    ("system", "columns"),
    [
        (particles.consensus(), 2),
        (particles.opinion(), 2),
        (particles.lennard_jones(friction=1.0), 4),
        (particles.cucker_smale(), 4),
    ],
)
@pytest.mark.parametrize("method", ["direct", "rbm1"])
@pytest.mark.parametrize("shift", SHIFTS)
def test_systems_move_as_near_the_origin(system: particles.System, columns: int, method: str, shift: float) -> None:
    """Starts on a grid that float32 holds at every shift, and one step, which is long enough to be seen."""
    grid = torch.cartesian_prod(torch.arange(6.0), torch.arange(6.0)) * 1.25
    start = torch.cat([grid, torch.zeros(36, columns - 2)], dim=1)
    start[:, -2:] += torch.randint(-8, 8, (36, 2)) / 64
    away = torch.zeros(columns)
    away[:2] = shift
    options = {} if method == "direct" else {"batch_size": 20, "seed": 1}
    want = particles.solve(system, start.double(), 1 / 64, 1 / 64, method, **options).final
    got = particles.solve(system, start + away, 1 / 64, 1 / 64, method, **options).final.double() - away.double()
    unit = float(torch.finfo(torch.float32).eps) * max(shift, 8.0)
    torch.testing.assert_close(got[:, 2:], want[:, 2:], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(got[:, :2], want[:, :2], rtol=0, atol=2 * unit)


@pytest.mark.parametrize("shift", SHIFTS)
def test_metrics_of_far_particles(shift: float) -> None:
    x, y = far(1, 80, 3, shift)[0], far(2, 60, 3, shift)[1]
    x64, y64 = (z.double() - shift for z in (x, y))  # exact
    assert particles.mmd(x, y) == pytest.approx(particles.mmd(x64, y64), abs=1e-6)
    assert particles.w2(x, y) == pytest.approx(particles.w2(x64, y64), rel=1e-9)
    assert particles.w2(x[:, :1], y[:, :1]) == pytest.approx(particles.w2(x64[:, :1], y64[:, :1]), rel=1e-9)
    assert particles.sliced_w2(x, y) == pytest.approx(particles.sliced_w2(x64, y64), rel=1e-9)
    assert particles.strong_error(x[:60], y) == pytest.approx(particles.strong_error(x64[:60], y64), rel=1e-6)
    assert int(particles.cluster_count(x, 0.7)) == int(particles.cluster_count(x64, 0.7))
    assert float(particles.energy(x, soft)) == pytest.approx(float(particles.energy(x64, soft)), rel=1e-5)
