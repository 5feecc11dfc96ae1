"""Error of every estimator against exact attention: tables, and error against time beside other methods.

Run `python benchmarks/estimators.py`; it draws `docs/error_against_time.png`. Errors are relative, root mean square
over the draws. `best` is the best fixed pair (a, μ) of `G + μ (A + a (G − G_C) − G)`, found with the answer in hand.
"""

import argparse
import math
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import matplotlib
import torch
from _families import MANY, SOFT_TO_SHARP, make
from _measure import write_row
from torch import Tensor

import randbatch as rb
from randbatch.estimators.mean_field import Moments, add_mean_field
from randbatch.interactions import Options, Softmax

matplotlib.use("agg")
import matplotlib.pyplot as plt

PICTURE = Path(__file__).parent.parent / "docs" / "error_against_time.png"
COLUMNS = ("plain", "debiased", "a = μ = 1", "G alone", "best", "corrected")


def relative(out: Tensor, exact: Tensor) -> float:
    """The relative error in the Frobenius norm."""
    return ((out - exact).norm() / exact.norm()).item()


def errors(inputs: tuple[Tensor, Tensor, Tensor], exact: Tensor, part: rb.Partition) -> list[float]:
    """One draw, in the order of `COLUMNS`."""
    query, key, value = inputs
    scale = query.shape[-1] ** -0.5
    moments = Moments.of(part, key, value)

    def field(alpha: float, nu: float) -> Tensor:
        weights = [torch.tensor([weight]) for weight in (0.0, alpha, alpha, nu)]
        return add_mean_field(query, key, value, value, moments, scale, tuple(weights))

    whole, of_batch = field(1.0, 0.0), field(0.0, -1.0)
    local = Softmax().in_batches(part, (query, key, value), Options(), 1.0)
    design = torch.stack([(local - whole).flatten(), (whole - of_batch).flatten()], dim=1).double()
    target = (exact - whole).flatten().double()
    best = whole.double().flatten() + design @ torch.linalg.lstsq(design, target.unsqueeze(1)).solution.squeeze(1)
    ours = [rb.random_batch_attention(*inputs, partition=part, estimator=name) for name in ("plain", "corrected")]
    outs = (ours[0], local, local + whole - of_batch, whole, best.view_as(exact), ours[1])
    return [relative(out, exact) for out in outs]


def table(num_tokens: int, size: int, batch_sizes: list[int], rows: list[tuple[str, float]], draws: int) -> list[dict]:
    """Print one table and return its rows."""
    print(f"\nN = {num_tokens}, D = {size}\n\n| tokens | n_eff | p | {' | '.join(COLUMNS)} |")
    print("|---" * (len(COLUMNS) + 3) + "|")
    found = []
    for name, sharpness in rows:
        inputs = make(name, sharpness, num_tokens, size)
        exact = rb.full_attention(*inputs)
        some = inputs[0][:256, 0] @ inputs[1][:, 0].T / math.sqrt(size)
        effective = (1 / some.softmax(dim=1).square().sum(dim=1)).median().item()
        for batch_size in batch_sizes:
            parts = (rb.random_partition(num_tokens, batch_size, seed=seed) for seed in range(draws))
            drawn = torch.tensor([errors(inputs, exact, part) for part in parts])
            means = drawn.square().mean(dim=0).sqrt().tolist()
            cells = " | ".join(f"{mean:.3f}" for mean in means)
            print(f"| {name} {sharpness:g} | {effective:.0f} | {batch_size} | {cells} |", flush=True)
            errors_of = dict(zip(COLUMNS, means, strict=True))
            found.append(
                {
                    "family": name,
                    "sharpness": sharpness,
                    "n_eff": effective,
                    "p": batch_size,
                    "N": num_tokens,
                    "D": size,
                }
                | errors_of
            )
    return found


def summary(rows: list[dict]) -> dict[str, float]:
    """How corrected stands against the others over all rows; below 1e-5 all is rounding."""
    ratios = {name: [(max(row["corrected"], 1e-5)) / max(row[name], 1e-5) for row in rows] for name in COLUMNS[:-1]}
    best_of_all = [max(row["corrected"], 1e-5) / max(min(row[name] for name in COLUMNS), 1e-5) for row in rows]
    return {
        "worst against debiased": max(ratios["debiased"]),
        "worst against the best column": max(best_of_all),
        "geometric mean against debiased": statistics.geometric_mean(ratios["debiased"]),
        "geometric mean against plain": statistics.geometric_mean(ratios["plain"]),
    }


def nystrom(query: Tensor, key: Tensor, value: Tensor, landmarks: int) -> Tensor:
    """Nyström attention, segment means as landmarks, an exact pseudo-inverse (Xiong et al., arXiv 2102.03902)."""
    q, k, v = (x.transpose(0, 1) for x in (query, key, value))
    rows = q.shape[1] // landmarks * landmarks
    few = [x[:, :rows].unflatten(1, (landmarks, -1)).mean(dim=2) for x in (q, k)]
    scale = q.shape[-1] ** -0.5
    left, middle, right = ((a @ b.mT * scale).softmax(dim=-1) for a, b in ((q, few[1]), (few[0], few[1]), (few[0], k)))
    return (left @ (torch.linalg.pinv(middle) @ (right @ v))).transpose(0, 1)


def performer(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """torch_geometric's `PerformerAttention`, its attention step alone, on the same query, key and value."""
    from torch_geometric.nn.attention.performer import PerformerProjection

    torch.manual_seed(0)
    q, k, v = (x.transpose(0, 1).unsqueeze(0) for x in (query, key, value))
    return PerformerProjection(query.shape[-1])(q, k, v)[0].transpose(0, 1)


def methods() -> dict[str, list[tuple[str, Callable[..., Tensor]]]]:
    """Curves of the picture: a dial from cheap to dear."""

    def ours(estimator: str, **options: int) -> Callable[..., Tensor]:
        return lambda *inputs: rb.random_batch_attention(*inputs, estimator=estimator, seed=1, **options)

    sizes, many = (32, 64, 128, 256, 512, 1024), (1, 2, 4, 8, 16)
    curves = {
        name: [(f"p = {p}", ours(name, batch_size=p)) for p in sizes] for name in ("plain", "debiased", "corrected")
    }
    curves["plain, rounds of 64"] = [(f"R = {r}", ours("plain", batch_size=64, rounds=r)) for r in many]
    curves["corrected, rounds of 64"] = [(f"R = {r}", ours("corrected", batch_size=64, rounds=r)) for r in many]
    landmarks = (16, 32, 64, 128, 256)
    curves["Nyström"] = [(f"{m} landmarks", lambda *x, m=m: nystrom(*x, m)) for m in landmarks]
    curves["linear (elu + 1)"] = [
        ("", lambda *x: rb.random_batch_attention(*x, batch_size=10**9, interaction="linear"))
    ]
    curves["PerformerAttention (PyG)"] = [("", performer)]
    return curves


def error_against_time(num_tokens: int, size: int, repeats: int) -> list[dict]:
    """Forward only, four heads of one kind; methods interleaved, medians."""
    kinds = [("gauss", 0.3), ("clusters", 1.0), ("clusters_alike", 1.0), ("needle", 1.0)]
    figure, axes = plt.subplots(1, len(kinds), figsize=(15, 4), layout="constrained", sharex=True)
    rows = []
    for axis, (name, sharpness) in zip(axes, kinds, strict=True):
        heads = [make(name, sharpness, num_tokens, size, seed) for seed in range(4)]
        inputs = [torch.cat(parts, dim=1) for parts in zip(*heads, strict=True)]
        exact = rb.full_attention(*inputs)
        curves = methods()
        times: dict[tuple[str, str], list[float]] = {(c, d): [] for c, points in curves.items() for d, _ in points}
        found: dict[tuple[str, str], float] = {}
        for _ in range(repeats + 1):
            for curve, points in curves.items():
                for dial, function in points:
                    start = time.perf_counter()
                    out = function(*inputs)
                    times[curve, dial].append(time.perf_counter() - start)
                    found[curve, dial] = relative(out, exact)
        for position, (curve, points) in enumerate(curves.items()):
            xs = [statistics.median(times[curve, dial][1:]) * 1e3 for dial, _ in points]
            ys = [found[curve, dial] for dial, _ in points]
            axis.loglog(xs, ys, "-o" if len(xs) > 1 else "s", color=f"C{position}", label=curve, markersize=4)
            for (dial, _), x, y in zip(points, xs, ys, strict=True):
                rows.append(
                    {"family": name, "sharpness": sharpness, "method": curve, "dial": dial, "ms": x, "error": y}
                )
        axis.set(title=f"{name.replace('_', ' ')} {sharpness:g}", xlabel="ms, forward")
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("relative error")
    axes[-1].legend(fontsize=7, frameon=False)
    figure.savefig(PICTURE, dpi=110)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--draws", type=int, default=4, help="partitions for each row of the tables")
    parser.add_argument("--repeats", type=int, default=3, help="timed calls for each point of the picture")
    options = parser.parse_args()
    rows = table(8192, 32, [64, 256], SOFT_TO_SHARP, options.draws)
    rows += table(6016, 24, [64], MANY, options.draws)
    totals = summary(rows)
    print("\n" + "\n".join(f"{name}: {value:.3f}" for name, value in totals.items()))
    curves = error_against_time(16_384, 32, options.repeats)
    write_row("estimators", {"settings": vars(options), "rows": rows, "summary": totals, "curves": curves})


if __name__ == "__main__":
    main()
