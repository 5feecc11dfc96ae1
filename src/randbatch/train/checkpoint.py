"""Weights and resumable checkpoints: safetensors files, written in one step, read without pickle."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from randbatch._files import write_bytes
from randbatch._optional import require

__all__ = ["load_checkpoint", "load_weights", "read_tensors", "save_checkpoint", "save_tensors"]


def save_tensors(path: Path, tensors: Mapping[str, Tensor], about: Mapping[str, Any]) -> None:
    """Write tensors and a JSON document about them as one safetensors file, in one step."""
    whole = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    write_bytes(path, require("safetensors.torch").save(whole, metadata={"about": json.dumps(about)}))


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read what `save_tensors` wrote.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is truncated or no such file of ours.
    """
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist")
    safetensors = require("safetensors")
    try:
        with safetensors.safe_open(str(path), framework="pt") as file:
            about = json.loads((file.metadata() or {})["about"])
            return {name: file.get_tensor(name) for name in file.keys()}, about  # noqa: SIM118
    except (safetensors.SafetensorError, KeyError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is not a whole checkpoint of randbatch: {error}") from error


def load_weights(model: nn.Module, weights: Mapping[str, Tensor], source: Path) -> None:
    """Put weights into a model.

    Raises:
        ValueError: they are another model's; the message names the first parameter that differs. The model stays as
            it was.
    """
    own = model.state_dict()
    for name in sorted(own.keys() | weights.keys()):
        ours = list(own[name].shape) if name in own else "nothing"
        theirs = list(weights[name].shape) if name in weights else "nothing"
        if ours != theirs:
            raise ValueError(f"{source} is of another model: {name} is {theirs} there and {ours} here")
    model.load_state_dict(dict(weights))


def save_checkpoint(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer, about: Mapping[str, Any]) -> None:
    """Write all that the next epoch depends on: weights, optimizer, random number generators, `about`."""
    tensors = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    for number, state in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{number}.{name}": tensor for name, tensor in state.items()}
    tensors["rng.cpu"] = torch.get_rng_state()
    device = next(model.parameters()).device
    if device.type == "cuda":
        tensors["rng.cuda"] = torch.cuda.get_rng_state(device)
    save_tensors(path, tensors, about)


def load_checkpoint(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Restore what `save_checkpoint` wrote, and return its `about`.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is truncated, or the checkpoint is of another model.
    """
    tensors, about = read_tensors(path)
    parts: dict[str, dict[str, Tensor]] = {"model": {}, "optimizer": {}, "rng": {}}
    for name, tensor in tensors.items():
        part, _, rest = name.partition(".")
        parts[part][rest] = tensor
    load_weights(model, parts["model"], path)
    state: dict[int, dict[str, Tensor]] = {}
    for name, tensor in parts["optimizer"].items():
        number, _, rest = name.partition(".")
        state.setdefault(int(number), {})[rest] = tensor
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
    torch.set_rng_state(parts["rng"]["cpu"])
    if "cuda" in parts["rng"]:
        torch.cuda.set_rng_state(parts["rng"]["cuda"], next(model.parameters()).device)
    return about
