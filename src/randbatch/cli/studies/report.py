"""Tables as CSV and pictures of what the commands measured."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from randbatch._files import write_picture
from randbatch._optional import new_figure, require
from randbatch.particles.rates import Convergence, Errors

__all__ = ["csv_of", "draw_convergence", "points_csv"]

_STYLES = ("-", "--", "-.", ":")
_MARKS = "osD^vPX*"


def csv_of(rows: Iterable[Mapping[str, Any]]) -> str:
    """Rows with the same keys as CSV, the keys first."""
    rows = list(rows)
    text = io.StringIO()
    writer = csv.DictWriter(text, rows[0].keys(), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def points_csv(found: Convergence) -> str:
    """A row for each method, batch size and step."""
    return csv_of(
        {"system": found.name, "num_particles": found.num_particles, "method": one.label, "batch_size": one.batch_size}
        | {name: getattr(point, name) for name in point.__dataclass_fields__}
        for one in found.errors
        for point in one.points()
    )


def draw_convergence(found: Convergence, path: Path) -> None:
    """Strong and weak error against the step, with 95 % intervals, and lines of the slopes ½ and 1."""
    figure, (left, right) = new_figure(1, 2, figsize=(11, 4.4))
    labels = list(dict.fromkeys(one.label for one in found.errors))
    sizes = list(dict.fromkeys(one.batch_size for one in found.errors))
    palette = require("matplotlib").colormaps["tab10"].colors
    for one in found.errors:
        places = (labels.index(one.label), sizes.index(one.batch_size))
        color, line = places if len(labels) > len(sizes) else reversed(places)  # colours for the longer of both lists
        style = {
            "color": palette[color % len(palette)], "linestyle": _STYLES[line % len(_STYLES)],
            "marker": _MARKS[places[0] % len(_MARKS)], "label": f"{one.label}, p = {one.batch_size}",
            "markersize": 4, "linewidth": 1.2,
        }  # fmt: skip
        _draw_strong(left, one, style)
        _draw_weak(right, one, style)
    for axes, slope, title in ((left, 0.5, "strong error"), (right, 1.0, "weak error")):
        _draw_slope(axes, slope)
        axes.set(xscale="log", yscale="log", xlabel="step τ", ylabel=title)
        axes.spines[["top", "right"]].set_visible(False)
    right.legend(frameon=False, fontsize=8, bbox_to_anchor=(1.0, 1.0), loc="upper left")
    figure.suptitle(f"{found.name}, N = {found.num_particles}; faint: not resolved")
    write_picture(path, figure)


def _draw_strong(axes: Any, errors: Errors, style: Mapping[str, Any]) -> None:
    points = [point for point in errors.points() if point.strong > 0]
    if points:
        strong = [point.strong for point in points]
        below = [point.strong - point.strong_low for point in points]
        above = [point.strong_high - point.strong for point in points]
        axes.errorbar([point.dt for point in points], strong, yerr=[below, above], capsize=2, **style)


def _draw_weak(axes: Any, errors: Errors, style: Mapping[str, Any]) -> None:
    clear = [point for point in errors.points() if point.is_resolved]
    noise = [1.96 * point.weak_standard_error for point in clear]
    axes.errorbar([p.dt for p in clear], [p.weak for p in clear], yerr=noise, capsize=2, **style)
    unclear = [point for point in errors.points() if not point.is_resolved and point.weak > 0]
    axes.plot([p.dt for p in unclear], [p.weak for p in unclear], style["marker"], color=style["color"], alpha=0.25)


def _draw_slope(axes: Any, slope: float) -> None:
    """A grey line of the slope above what is drawn."""
    lines = [line for line in axes.get_lines() if len(line.get_xdata())]
    if not lines:
        return
    low, high = (pick(float(pick(line.get_xdata())) for line in lines) for pick in (min, max))
    top = max(float(max(line.get_ydata())) for line in lines) * 1.6
    axes.plot([low, high], [top * (low / high) ** slope, top], color="#999999", linewidth=1)
    axes.annotate(f"slope {slope:g}", (math.sqrt(low * high), top * (low / high) ** (slope / 2)), color="#666666",
                  ha="right", va="bottom", fontsize=8)  # fmt: skip
