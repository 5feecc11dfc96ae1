"""The tables and the picture of `attention_error`, from its dict."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from randbatch._files import write_picture
from randbatch._optional import new_figure
from randbatch.estimators import ESTIMATORS

__all__ = ["draw", "tables"]

_COLUMNS = 4


def tables(found: dict[str, Any]) -> str:
    """Two Markdown tables: every head, and what every layer needs."""
    layers, tolerance = found["layers"], found["tolerance"]
    error = layers[0]["error"]
    columns = [(name, p) for name, by_p in error.items() for p in by_p]
    head = ["layer", "head", "n_eff", "entropy", *(f"{name}, p = {p}" for name, p in columns)]
    rows = [
        [row["layer"], str(one["head"]), f"{one['n_eff']:.1f}", f"{one['entropy']:.2f}"]
        + [_relative(one["error"][name][p]) for name, p in columns]
        for row in layers
        for one in row["heads"]
    ]
    smallest = min(next(iter(error.values())))
    needs = ["layer", "tokens", *(f"p: {name}" for name in error), *(f"rounds: {name}" for name in error)]
    need_rows = [
        [row["layer"], str(row["num_tokens"])]
        + [str(row["batch_size_needed"][name]) for name in error]
        + [_rounds(row["rounds_needed"][name], tolerance) for name in error]
        for row in layers
    ]
    return "\n".join([
        f"Relative error against exact attention, {found['num_queries']} queries",
        "", *_markdown(head, rows), "",
        f"For an error of {tolerance:g}: batch size (by the law through those measured), or rounds of p = {smallest}",
        "", *_markdown(needs, need_rows),
    ])  # fmt: skip


def _relative(error: float) -> str:
    return f"{error:.3f}" if error >= 0.01 else f"{error:.1e}"


def _rounds(choice: dict[str, Any], tolerance: float) -> str:
    return str(choice["rounds"]) if choice["error"] <= tolerance else f"> {choice['rounds']}"


def _markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    lines = [" | ".join(map(str.ljust, row, widths)) for row in (head, *rows)]
    return [f"| {line} |" for line in (lines[0], " | ".join("-" * width for width in widths), *lines[1:])]


def draw(found: dict[str, Any], path: Path) -> None:
    """Error against batch size, a panel for each layer (thin: heads, thick: together), and n_eff of every head."""
    layers = found["layers"]
    columns = min(_COLUMNS, len(layers) + 1)
    rows = math.ceil((len(layers) + 1) / columns)
    figure, grid = new_figure(rows, columns, figsize=(3.4 * columns, 3.1 * rows), axes={"squeeze": False})
    panels = list(grid.flat)
    first = panels[0]
    for axes in panels[1 : len(layers)]:
        axes.sharey(first)
    for axes, row in zip(panels, layers, strict=False):
        for place, (name, by_p) in enumerate(row["error"].items()):
            style = {"color": ESTIMATORS[name].color}
            width = 2 if place else 4  # the first is often hidden behind the second
            for one in row["heads"]:
                axes.plot(list(by_p), list(one["error"][name].values()), linewidth=0.7, alpha=0.5, **style)
            axes.plot(list(by_p), list(by_p.values()), "o-", linewidth=width, markersize=2 + width, label=name, **style)
        axes.axhline(found["tolerance"], color="black", linewidth=0.8, linestyle=":")
        sizes = list(next(iter(row["error"].values())))
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xticks(sizes, [str(p) for p in sizes])
        axes.set(title=row["layer"], xlabel="batch size p")
    first.set_ylabel("relative error")
    first.legend(frameon=False, fontsize=8)
    last = panels[len(layers)]
    for place, row in enumerate(layers):
        last.scatter([place] * len(row["heads"]), [one["n_eff"] for one in row["heads"]], color="#555555", s=22)
    for p in next(iter(layers[0]["error"].values())):
        last.axhline(p, color="black", linewidth=0.6, linestyle=":")
    last.axhline(layers[0]["num_tokens"], color="black", linewidth=0.8)
    last.set_yscale("log")
    last.set(title="n_eff of each head; dotted: p, line: N", xlabel="layer")
    last.set_xticks(range(len(layers)))
    last.margins(x=0.2)
    for axes in panels[len(layers) + 1 :]:
        axes.remove()
    for axes in panels[: len(layers) + 1]:
        axes.spines[["top", "right"]].set_visible(False)
        axes.title.set_fontsize(9)
    write_picture(path, figure)
