"""Modules of other libraries, and how their attention is put into random batches.

One file per library holds its rules; `randbatch.convert` applies them. `randbatch.integrations.hf.register` adds an
attention implementation to Hugging Face transformers by name.
"""

from __future__ import annotations

import importlib
import sys

from randbatch.integrations import hf, timm, torch_nn
from randbatch.integrations.rules import RandomBatches

__all__ = ["RandomBatches", "hf", "load_rules", "timm", "torch_nn"]


def load_rules() -> None:
    """Load the rules that need the library itself, if it is loaded: a model cannot hold its modules otherwise."""
    if sys.modules.get("torch_geometric") is not None:
        importlib.import_module("randbatch.integrations.pyg")
