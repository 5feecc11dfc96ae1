"""The one place where optional packages are imported; their absence is explained with the extra to install."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any

from randbatch._errors import MissingExtra

__all__ = ["new_figure", "require"]

_EXTRAS = {
    "PIL": "train",
    "matplotlib": "train",
    "numpy": "train",
    "ogb": "ogb",
    "ot": "particles",
    "safetensors": "train",
    "torch_geometric": "graph",
    "tqdm": "train",
    "transformers": "hf",
    "tyro": "train",
}


def require(module: str) -> Any:
    """Import `module` (a dotted name) of an optional package.

    Raises:
        MissingExtra: the package is not installed, or cannot be imported as it is installed; the message names the
            extra that brings it.

    Example:
        >>> require("torch_geometric.nn").GCNConv.__name__
        'GCNConv'
    """
    package = module.partition(".")[0]
    try:
        return importlib.import_module(module)
    except ImportError as error:
        name = f"randbatch[{_EXTRAS[package]}]" if package in _EXTRAS else package
        missing = isinstance(error, ModuleNotFoundError) and (error.name or "").partition(".")[0] == package
        reason = f"this needs {package}" if missing else f"{package} is installed, but cannot be imported ({error})"
        raise MissingExtra(f"{reason}: pip install '{name}'", name=package) from error


def new_figure(rows: int = 1, columns: int = 1, *, axes: Mapping[str, Any] | None = None, **options: Any) -> Any:
    """A matplotlib figure and its axes, as `pyplot.subplots` gives them, which pyplot and its backend know nothing of.

    Args:
        rows: of axes.
        columns: of axes.
        axes: options of `Figure.subplots`.
        **options: of the figure.

    Returns:
        Figure and axes; nothing has to be closed.

    Raises:
        MissingExtra: matplotlib is not installed.
    """
    figure = require("matplotlib.figure").Figure(layout="constrained", **options)
    require("matplotlib.backends.backend_agg").FigureCanvasAgg(figure)
    return figure, figure.subplots(rows, columns, **(axes or {}))
