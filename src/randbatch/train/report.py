"""The table and the picture of a sweep."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from randbatch._files import write_picture
from randbatch._optional import new_figure

__all__ = ["draw_curves", "table"]

Run = tuple[dict[str, Any], list[dict[str, Any]]]
"""A result and the lines of its log."""

_COLORS = {"off": "#7f7f7f", "linear": "#2ca02c", "rba": "#d62728", "full": "#1f77b4"}
_OTHERS = ("#9467bd", "#ff7f0e", "#17becf", "#e377c2", "#8c564b", "#bcbd22")


def _color(name: str) -> str:
    """The same in every picture: an attention that has none of its own gets one by its name."""
    return _COLORS.get(name, _OTHERS[sum(name.encode()) % len(_OTHERS)])


def describe(result: dict[str, Any]) -> str:
    """What tells the rows of a table apart."""
    if result.get("batch_size") is None:  # no random batches
        return result["attention"]
    rounds = f", {result['rounds']} rounds" if result["rounds"] > 1 else ""
    return f"{result['attention']} ({result['estimator']}, p = {result['batch_size']}{rounds})"


def _by_row(results: Sequence[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    rows: dict[str, list[dict[str, Any]]] = {}
    for result in results:
        rows.setdefault(describe(result), []).append(result)
    return rows


def _mean_std(values: Sequence[float]) -> str:
    """Percent; the standard deviation over runs where there are several."""
    mean = f"{100 * statistics.mean(values):.2f}"
    return mean if len(values) == 1 else f"{mean} ± {100 * statistics.stdev(values):.2f}"


def table(results: Sequence[dict[str, Any]]) -> str:
    """A Markdown table: a row for each attention, mean ± standard deviation over splits and seeds."""
    first = results[0]
    lines = [
        f"| {first['dataset']}: attention | test {first['metric']} % | val % | runs | s / epoch | peak memory MB |",
        "|---|---|---|---|---|---|",
    ]
    for name, rows in _by_row(results).items():
        seconds = statistics.median(row["seconds_per_epoch"] for row in rows)
        peak = max(row["peak_memory_bytes"] for row in rows) / 1e6
        scores = " | ".join(_mean_std([row[role] for row in rows]) for role in ("test", "val"))
        lines.append(f"| {name} | {scores} | {len(rows)} | {seconds:.2f} | {peak:.0f} |")
    return "\n".join(lines)


def draw_curves(runs: Sequence[Run], path: Path) -> None:
    """Loss and validation score by epoch, and the test score of each attention with its time per epoch."""
    figure, (left, middle, right) = new_figure(1, 3, figsize=(13, 4))
    metric = runs[0][0]["metric"]
    seen: set[str] = set()
    for result, log in runs:
        name = describe(result)
        style = {"color": _color(result["attention"]), "label": None if name in seen else name, "linewidth": 1.2}
        seen.add(name)
        left.plot([line["epoch"] for line in log], [line["loss"] for line in log], **style)
        judged = [line for line in log if "val" in line]
        middle.plot([line["epoch"] for line in judged], [100 * line["val"] for line in judged], **style)
    left.set(xlabel="epoch", ylabel="training loss", ylim=(0, None))
    middle.set(xlabel="epoch", ylabel=f"validation {metric} (%)")
    middle.legend(frameon=False)
    rows = _by_row([result for result, _ in runs])
    for place, results in enumerate(rows.values()):
        scores = [100 * result["test"] for result in results]
        seconds = statistics.median(result["seconds_per_epoch"] for result in results)
        mean = statistics.mean(scores)
        color = _color(results[0]["attention"])
        right.hlines(mean, place - 0.25, place + 0.25, color=color, linewidth=4)
        right.scatter([place] * len(scores), scores, color=color, edgecolors="white", s=36, zorder=3)
        right.annotate(f"{mean:.1f} %\n{seconds:.2f} s/epoch", (place, max(scores)), ha="center", va="bottom",
                       xytext=(0, 7), textcoords="offset points", fontsize=9)  # fmt: skip
    right.margins(x=0.25, y=0.35)
    low, high = right.get_ylim()
    right.set_yticks([tick for tick in right.get_yticks() if low <= tick <= min(high, 100)])  # the room above is text's
    right.set_ylabel(f"test {metric} (%)")
    right.set_xticks(range(len(rows)), [name.replace(" (", "\n(") for name in rows])
    for axes in (left, middle):
        axes.xaxis.get_major_locator().set_params(integer=True)
    for axes in (left, middle, right):
        axes.spines[["top", "right"]].set_visible(False)
    title = f"{runs[0][0]['dataset']}: test score at the epoch with the best validation score"
    figure.suptitle(title, parse_math=False)  # the name of a file may have any sign in it
    write_picture(path, figure)
