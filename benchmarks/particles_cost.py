"""What a step of particles costs: against copies of the states, against N, and the direct sum against plain torch.

Run `python benchmarks/particles_cost.py`. Everything is checked first; timings of one table are interleaved.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from _measure import write_row
from torch import Tensor

from randbatch import particles
from randbatch.particles import RadialForce, System, solve

COPIES = 5


def seconds(functions: dict[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """Median seconds of each, in turns."""
    found: dict[str, list[float]] = {name: [] for name in functions}
    for number in range(repeats + 1):
        for name, function in functions.items():
            start = time.perf_counter()
            function()
            if number:
                found[name].append(time.perf_counter() - start)
    return {name: statistics.median(times) for name, times in found.items()}


def steps(system: System, x: Tensor, count: int, seed: int) -> Tensor:
    """`count` steps by pairs."""
    return solve(system, x, 0.01 * count, 0.01, batch_size=2, seed=seed).final


def copies(x: Tensor, out: Tensor) -> None:
    for _ in range(COPIES):
        out.copy_(x)


def gauss(squared: Tensor) -> Tensor:
    return torch.exp(-squared)


def by_torch(x: Tensor, rows: int) -> Tensor:
    """The same direct sum in the way one would write it: a matrix product for distances, one for the force."""
    squares = x.square().sum(dim=1)
    out = torch.empty_like(x)
    for start in range(0, len(x), rows):
        some = x[start : start + rows]
        distances = torch.addmm(squares[start : start + rows, None] + squares, some, x.T, alpha=-2)
        factors = distances.clamp_(min=0).neg_().exp_()
        out[start : start + rows] = some * factors.sum(dim=1, keepdim=True) - factors @ x
    return out / (len(x) - 1)


def by_cdist(x: Tensor, rows: int) -> Tensor:
    """With `torch.cdist` for the distances."""
    out = torch.empty_like(x)
    for start in range(0, len(x), rows):
        some = x[start : start + rows]
        factors = torch.cdist(some, x).square_().neg_().exp_()
        out[start : start + rows] = some * factors.sum(dim=1, keepdim=True) - factors @ x
    return out / (len(x) - 1)


def cost_of_steps(options: argparse.Namespace) -> dict[str, float]:
    """Seconds of a step of N particles by pairs, and of copying their states."""
    system = particles.consensus()
    x = torch.randn(options.particles, 3)
    out, before = torch.empty_like(x), x.mean(dim=0)
    torch.testing.assert_close(steps(system, x, 1, 0).mean(dim=0), before, rtol=0, atol=1e-4)  # consensus keeps it
    functions: dict[str, Callable[[], object]] = {
        "step": lambda: steps(system, x, 1, 1), "copies": lambda: copies(x, out),
    }  # fmt: skip
    return seconds(functions, options.repeats)


def linear(options: argparse.Namespace) -> dict[int, float]:
    """Nanoseconds of a step for each particle, for each N."""
    system = particles.consensus()
    found: dict[int, list[float]] = {10**power: [] for power in options.log10}
    largest = max(found)
    states = {size: torch.randn(size, 3) for size in found}
    for _ in range(3):
        for size, x in states.items():
            count = max(1, min(200, largest // size // 10))
            steps(system, x, 1, 0)
            start = time.perf_counter()
            steps(system, x, count, 1)
            found[size].append((time.perf_counter() - start) / count / size * 1e9)
    return {size: statistics.median(times) for size, times in found.items()}


def direct(options: argparse.Namespace) -> dict[str, float]:
    """Seconds of one direct sum, ours and the two above, at the better of several heights of their pieces."""
    x = torch.randn(options.direct, 3)
    system = System(RadialForce(gauss))
    ours = (solve(system, x, 1.0, 1.0, "direct").final - x)[:100]
    torch.testing.assert_close(ours, by_torch(x, 100)[:100], rtol=1e-3, atol=1e-5)
    functions: dict[str, Callable[[], object]] = {"randbatch": lambda: solve(system, x, 1.0, 1.0, "direct")}
    for rows in options.rows:
        functions[f"matmul, {rows} rows"] = lambda rows=rows: by_torch(x, rows)
        functions[f"cdist, {rows} rows"] = lambda rows=rows: by_cdist(x, rows)
    return seconds(functions, options.direct_repeats)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--particles", type=int, default=10**6)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--log10", type=int, nargs="+", default=[4, 5, 6, 7])
    parser.add_argument("--direct", type=int, default=10**5)
    parser.add_argument("--direct-repeats", type=int, default=2)
    parser.add_argument("--rows", type=int, nargs="+", default=[3, 30, 300])
    options = parser.parse_args()
    step = cost_of_steps(options)
    print(f"step of {options.particles} particles by pairs: {step['step'] * 1e3:.1f} ms, ", end="")
    print(f"{COPIES} copies: {step['copies'] * 1e3:.1f} ms, ratio {step['step'] / step['copies']:.1f}")
    per_particle = linear(options)
    print("ns a particle and step:", ", ".join(f"N = {size}: {ns:.0f}" for size, ns in per_particle.items()))
    sums = direct(options)
    best = min(value for name, value in sums.items() if name != "randbatch")
    print(f"direct sum, N = {options.direct}: " + ", ".join(f"{name} {value:.1f} s" for name, value in sums.items()))
    print(f"ratio to the best of torch: {sums['randbatch'] / best:.2f}")
    write_row("particles_cost", {"step": step, "ns_per_particle": per_particle, "direct": sums})


if __name__ == "__main__":
    main()
