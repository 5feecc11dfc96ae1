"""States of particles as pictures: on a line, in the plane, on the sphere, with velocities, or by their cosines."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from randbatch._files import write_bytes, write_picture
from randbatch._optional import new_figure, require
from randbatch.cli.studies.cases import Case
from randbatch.particles import Trajectory, cosine_histogram

__all__ = ["draw_strip", "film"]

_COLUMNS = 6
_MOST_PANELS = 60
_BLUE, _RED = "#1f77b4", "#d62728"
_FRAMES_A_SECOND = 12


def draw_strip(found: Trajectory, case: Case, title: str, path: Path) -> None:
    """A panel for each saved time, or for some of many, all with the same axes."""
    count = min(len(found.times), _MOST_PANELS)
    chosen = [round(place * (len(found.times) - 1) / max(1, count - 1)) for place in range(count)]
    columns = min(_COLUMNS, count)
    rows = -(-count // columns)
    shared = {"squeeze": False, "sharex": True, "sharey": case.view in _SHARED}
    figure, grid = new_figure(rows, columns, figsize=(2.6 * columns, 2.7 * rows), axes=shared)
    panels = list(grid.flat)
    for axes, time, state in zip(panels, found.times[chosen].tolist(), found.states[chosen], strict=False):
        _VIEWS[case.view](axes, state.cpu(), found.states.cpu(), case, time)
        axes.set_title(f"t = {time:.3g}", fontsize=9)
    for axes in panels[count:]:
        axes.remove()
    figure.suptitle(title, fontsize=10)
    write_picture(path, figure)


def film(found: Trajectory, case: Case, title: str, path: Path) -> None:
    """A GIF with a frame for each saved time."""
    image: Any = require("PIL.Image")
    frames: list[Any] = []
    figure, axes = new_figure(figsize=(4, 4.2), dpi=90)
    for time, state in zip(found.times.tolist(), found.states, strict=True):
        axes.clear()
        _VIEWS[case.view](axes, state.cpu(), found.states.cpu(), case, time)
        axes.set_title(f"{title}\nt = {time:.2f}", fontsize=8)
        content = io.BytesIO()
        figure.savefig(content, format="png")
        frames.append(image.open(content).convert("P", palette=image.Palette.ADAPTIVE))
    whole = io.BytesIO()
    duration = round(1000 / _FRAMES_A_SECOND)
    frames[0].save(whole, format="GIF", save_all=True, append_images=frames[1:], duration=duration, loop=0)
    write_bytes(path, whole.getvalue())


def _line(axes: Any, state: Tensor, states: Tensor, case: Case, time: float) -> None:
    """The density of places, and the exact one where it is known."""
    last = states[-1].flatten()
    middle, quarter = (torch.quantile(last[:: max(1, len(last) // 2**20)], at).item() for at in (0.5, 0.75))
    low, high = states.min().item(), min(states.max().item(), middle + 10 * (quarter - middle))  # a tail may be long
    if high <= low:  # most particles are in one place
        low, high = low - max(1.0, abs(low)) / 2, low + max(1.0, abs(low)) / 2
    places = state.flatten().numpy()
    share = torch.full(
        (len(places),), 40 / (len(places) * (high - low))
    )  # of all particles, including those out of sight
    axes.hist(places, bins=40, range=(low, high), weights=share.numpy(), color=_BLUE, alpha=0.6)
    if case.law is not None and time > 0:
        along = torch.linspace(low, high, 300, dtype=torch.float64)
        axes.plot(along.numpy(), case.law(time, along).numpy(), color=_RED, linewidth=1)
    axes.set_yticks([])


def _bounds(axes: Any, points: Tensor) -> None:
    """Equal axes that hold the middle 99 % of all points: an outlier does not hide the others."""
    flat = points.flatten(0, -2)
    some = flat[:: max(1, len(flat) // 2**20)]
    ends = torch.tensor([0.005, 0.995], dtype=points.dtype)
    low, high = (torch.quantile(some, end, dim=0) for end in ends)
    middle, half = (low + high) / 2, float((high - low).max()) * 0.55 + 1e-9
    axes.set_xlim(float(middle[0]) - half, float(middle[0]) + half)
    axes.set_ylim(float(middle[1]) - half, float(middle[1]) + half)
    axes.set_aspect("equal")


def _plane(axes: Any, state: Tensor, states: Tensor, case: Case, time: float) -> None:
    axes.scatter(state[:, 0], state[:, 1], s=3, color=_BLUE, linewidths=0)
    _bounds(axes, states[..., :2])


def _arrows(axes: Any, state: Tensor, states: Tensor, case: Case, time: float) -> None:
    x, v = state.chunk(2, dim=-1)
    middle = states.chunk(2, dim=-1)[0].mean(dim=-2, keepdim=True)
    x = x - x.mean(dim=0)  # relative to the flock, which travels
    axes.quiver(x[:, 0], x[:, 1], v[:, 0], v[:, 1], color=_BLUE, width=0.004)
    _bounds(axes, states.chunk(2, dim=-1)[0] - middle)


def _sphere(axes: Any, state: Tensor, states: Tensor, case: Case, time: float) -> None:
    """Seen from the z axis; the far side is faint."""
    turn = torch.linspace(0, 2 * torch.pi, 200)
    axes.plot(turn.cos(), turn.sin(), color="#999999", linewidth=0.7)
    for side, alpha in ((state[:, 2] < 0, 0.2), (state[:, 2] >= 0, 1.0)):
        axes.scatter(state[side, 0], state[side, 1], s=9, color=_BLUE, alpha=alpha, linewidths=0)
    axes.set(xlim=(-1.1, 1.1), ylim=(-1.1, 1.1))
    axes.set_aspect("equal")


def _cosines(axes: Any, state: Tensor, states: Tensor, case: Case, time: float) -> None:
    """How many pairs have which cosine."""
    bins = 50
    share = cosine_histogram(state, bins).numpy()
    middles = (torch.arange(bins) + 0.5).numpy() * (2 / bins) - 1
    axes.bar(middles, share, width=2 / bins, color=_BLUE)
    axes.set(xlim=(-1, 1), ylim=(1e-5, 1), yscale="log", xlabel="cosine of a pair")


_SHARED: dict[str, Callable[[Any, Tensor, Tensor, Case, float], None]] = {
    "plane": _plane, "arrows": _arrows, "sphere": _sphere, "cosines": _cosines,
}  # fmt: skip
"""Views whose panels share their vertical axis."""

_VIEWS = {"line": _line} | _SHARED
"""Name → view: from axes, the state, all states, the case and the time to what is drawn."""
