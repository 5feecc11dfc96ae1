"""The one place where optional packages are imported; their absence is explained with the extra to install."""

from __future__ import annotations

import importlib
from typing import Any

__all__ = ["pyplot", "require"]

_EXTRAS = {
    "PIL": "train",
    "matplotlib": "train",
    "numpy": "train",
    "ogb": "ogb",
    "ot": "particles",
    "safetensors": "train",
    "torch_geometric": "graph",
    "torchmetrics": "train",
    "tqdm": "train",
    "transformers": "hf",
    "tyro": "train",
}


def require(module: str) -> Any:
    """Import `module` (a dotted name) of an optional package.

    Raises:
        ImportError: the package is not installed; the message names the extra that brings it.

    Example:
        >>> require("torch_geometric.nn").GCNConv.__name__
        'GCNConv'
    """
    package = module.partition(".")[0]
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] != package:
            raise  # the package is there; something that it needs is not
        extra = _EXTRAS[package]
        raise ImportError(f"this needs {package}: pip install 'randbatch[{extra}]'", name=package) from error


def pyplot() -> Any:
    """`matplotlib.pyplot`, without windows.

    Raises:
        ImportError: matplotlib is not installed.
    """
    require("matplotlib").use("agg")
    return require("matplotlib.pyplot")
