"""`randbatch convergence --run`: the layers of a trained network as particles."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from randbatch._files import write_json, write_picture, write_text
from randbatch._folders import check_names, locked
from randbatch._optional import new_figure
from randbatch.analysis.random_force import LayerForce, OutputErrors, output_error, random_force
from randbatch.cli.studies.report import csv_of
from randbatch.estimators import ESTIMATORS
from randbatch.train import load_run
from randbatch.train.loop import Trainer

__all__ = ["network_convergence"]

_SIZES = (32, 64, 128, 256, 512)


def network_convergence(
    run: Path,
    root: Path | None,
    batch_sizes: Sequence[int] | None,
    draws: int | None,
    seed: int,
    say: Callable[[str], None],
) -> None:
    """Measure the random force in every layer and the error of the output; write both beside the run.

    Raises:
        MissingFile: the folder holds no finished run.
        InvalidValue: the run has no softmax attention, a number is out of range, or another process writes there.
    """
    places = {kind: run / f"convergence.{kind}" for kind in ("csv", "json", "md", "png")}
    trainer = load_run(run, root)
    with locked(run):
        check_names(run, [place.name for place in places.values()])
        text = _measure(trainer, batch_sizes or _SIZES, 8 if draws is None else draws, seed, places, say)
    say(f"\n{text}\n\npoints: {places['csv']}\nnumbers: {places['json']}\ntable: {places['md']}")
    say(f"picture: {places['png']}")


def _measure(
    trainer: Trainer,
    sizes: Sequence[int],
    number: int,
    seed: int,
    places: Mapping[str, Path],
    say: Callable[[str], None],
) -> str:
    """Measure and write; the table."""
    step = trainer.judged[0]
    inputs = (step.graph.x, step.edges, step.batch)
    say(f"random force in every layer: {number} partitions for each of p = {', '.join(map(str, sizes))}")
    layers = random_force(trainer.model, *inputs, batch_sizes=sizes, draws=number, seed=seed, progress=True)
    say(f"end-to-end error: {number * len(sizes) * len(ESTIMATORS)} forward passes")
    outputs = output_error(trainer.model, *inputs, batch_sizes=sizes, draws=number, seed=seed, progress=True)
    text = _table(layers, outputs)
    write_text(places["csv"], csv_of(_rows(layers, outputs)))
    write_json(places["json"], {"layers": [asdict(one) for one in layers], "output": [asdict(one) for one in outputs]})
    write_text(places["md"], f"{text}\n")
    _draw(layers, outputs, places["png"])
    return text


def _rows(layers: Sequence[LayerForce], outputs: Sequence[OutputErrors]) -> list[dict[str, Any]]:
    rows = [
        {"layer": one.layer, "estimator": name, "batch_size": p, "lemma": one.lemma[p], "fluctuation": fluctuation,
         "bias": one.bias[name][p], "error": (fluctuation**2 + one.bias[name][p] ** 2) ** 0.5}
        for one in layers
        for name, by_p in one.fluctuation.items()
        for p, fluctuation in by_p.items()
    ]  # fmt: skip
    blank = {"lemma": "", "fluctuation": "", "bias": ""}
    return rows + [
        {"layer": "output", "estimator": one.estimator, "batch_size": p, **blank, "error": error}
        for one in outputs
        for p, error in one.error.items()
    ]


def _table(layers: Sequence[LayerForce], outputs: Sequence[OutputErrors]) -> str:
    """Layer by layer at every p: the lemma, and what each estimator does; then the output."""
    names = list(layers[0].fluctuation)
    lines = [
        "Random force relative to the attention: standard deviation by the lemma; measured standard deviation, bias",
        "",
        f"| layer | p | lemma | {' | '.join(names)} |",
        "|---|---|---|" + "---|" * len(names),
    ]
    for one in layers:
        for p, predicted in one.lemma.items():
            cells = [f"{one.fluctuation[name][p]:.3g}, {one.bias[name][p]:.2g}" for name in names]
            lines.append(f"| {one.layer} | {p} | {predicted:.3g} | {' | '.join(cells)} |")
    sizes = list(outputs[0].error)
    lines += [
        "",
        "End-to-end error of the output against exact attention; it goes as 1/(p−1) − 1/(N−1) to the power",
        "",
        f"| estimator | {' | '.join(f'p = {p}' for p in sizes)} | power |",
        "|---|" + "---|" * (len(sizes) + 1),
    ]
    for one in outputs:
        errors = " | ".join(f"{one.error[p]:.3g}" for p in sizes)
        lines.append(f"| {one.estimator} | {errors} | {'-' if one.rate is None else one.rate} |")
    return "\n".join(lines)


def _draw(layers: Sequence[LayerForce], outputs: Sequence[OutputErrors], path: Path) -> None:
    """A panel for each layer, and one for the output."""
    columns = min(4, len(layers) + 1)
    rows = -(-(len(layers) + 1) // columns)
    figure, grid = new_figure(rows, columns, figsize=(3.5 * columns, 3.2 * rows), axes={"squeeze": False})
    panels = list(grid.flat)
    for axes, one in zip(panels, layers, strict=False):
        sizes = list(one.lemma)
        axes.plot(sizes, list(one.lemma.values()), color="black", linewidth=4, alpha=0.25, label="lemma")
        for name, by_p in one.fluctuation.items():
            axes.plot(
                sizes, list(by_p.values()), "o-", color=ESTIMATORS[name].color, markersize=4, label=f"{name}, deviation"
            )
            bias = [one.bias[name][p] or float("nan") for p in sizes]
            axes.plot(sizes, bias, ":", color=ESTIMATORS[name].color, label=f"{name}, bias")
        axes.set_title(one.layer)
    last = panels[len(layers)]
    for one in outputs:
        power = "" if one.rate is None else f": p to the −{one.rate.value:.2f}"
        last.plot(list(one.error), list(one.error.values()), "o-", color=ESTIMATORS[one.estimator].color, markersize=4,
                  label=f"{one.estimator}{power}")  # fmt: skip
    last.set_title("end-to-end error of the output")
    last.legend(frameon=False, fontsize=8)
    panels[0].legend(frameon=False, fontsize=7)
    panels[0].set_ylabel("relative to the attention")
    for axes in panels[: len(layers) + 1]:
        sizes = list(outputs[0].error)
        axes.set(xscale="log", yscale="log", xlabel="batch size p")
        axes.set_xticks(sizes, [str(p) for p in sizes], minor=False)
        axes.minorticks_off()
        axes.title.set_fontsize(9)
        axes.spines[["top", "right"]].set_visible(False)
    for axes in panels[len(layers) + 1 :]:
        axes.remove()
    write_picture(path, figure)
