"""Weights and resumable checkpoints: safetensors files, written in one step, read without pickle.

A checksum over names, shapes, numbers and the document beside them is part of every file: what is read is what was
written.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from randbatch._errors import InvalidValue
from randbatch._files import json_text, naming, open_regular, parse_json, write_bytes
from randbatch._optional import require
from randbatch.train.checksum import update_hash

__all__ = ["Checkpoint", "check_weights", "load_weights", "read_checkpoint", "read_tensors", "save_checkpoint",
           "save_tensors"]  # fmt: skip


def save_tensors(path: Path, tensors: Mapping[str, Tensor], about: Mapping[str, Any]) -> None:
    """Write tensors and a JSON document about them as one safetensors file, in one step."""
    whole = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    text = json_text(about)
    metadata = {"about": text, "sha256": _checksum(whole, text)}
    write_bytes(path, require("safetensors.torch").save(whole, metadata=metadata))


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read what `save_tensors` wrote.

    Raises:
        MissingFile: there is no such file.
        InvalidValue: the file is truncated, was changed, or is no such file of ours.
    """
    torch_files = require("safetensors.torch")
    with open_regular(path) as file, naming(path):
        try:
            size = os.fstat(file.fileno()).st_size
            start = file.read(8)
            start += file.read(min(int.from_bytes(start, "little"), size))
            header = json.loads(start[8:])
            metadata = header.pop("__metadata__", {})
            ends = [entry["data_offsets"][1] for entry in header.values()]
            if size != len(start) + max(ends, default=0):  # memory is not asked for on the header's word alone
                raise ValueError(f"it has {size} bytes, not {len(start) + max(ends, default=0)}")
            # Not `safe_open`: it runs Python inside, where Ctrl-C would become an error of the file.
            tensors = torch_files.load(start + file.read())
        except OSError:
            raise
        except Exception as error:  # almost any, of a damaged header
            raise InvalidValue(f"{path} is not a whole checkpoint of randbatch: {error}") from error
    if not isinstance(metadata, dict) or not {"about", "sha256"} <= metadata.keys():
        raise InvalidValue(f"{path} is not a whole checkpoint of randbatch: it holds no checksum")
    if metadata["sha256"] != _checksum(tensors, metadata["about"]):
        raise InvalidValue(f"{path} is not a whole checkpoint of randbatch: it was changed since it was written")
    about = parse_json(metadata["about"], path)
    if not isinstance(about, dict):
        raise InvalidValue(f"{path} is not a whole checkpoint of randbatch: it says nothing about itself")
    return tensors, about


def _checksum(tensors: Mapping[str, Tensor], about: str) -> str:
    found = hashlib.sha256(about.encode())
    for name, tensor in sorted(tensors.items()):
        update_hash(found, name, tensor)
    return found.hexdigest()


def check_weights(model: nn.Module, weights: Mapping[str, Tensor], source: Path) -> None:
    """Check that weights are those of a model, by their names, shapes and dtypes.

    Raises:
        InvalidValue: they are another model's; the message names the first parameter that differs.
    """
    own = model.state_dict()
    for name in sorted(own.keys() | weights.keys()):
        ours, theirs = _form(own.get(name)), _form(weights.get(name))
        if ours != theirs:
            raise InvalidValue(f"{source} is of another model: {name} is {theirs} there and {ours} here")


def load_weights(model: nn.Module, weights: Mapping[str, Tensor], source: Path) -> None:
    """Put weights into a model.

    Raises:
        InvalidValue: they are another model's. The model stays as it was.
    """
    check_weights(model, weights, source)
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


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """What `save_checkpoint` wrote, read and not yet used.

    Attributes:
        path: of the file.
        about: the document.
        model: weights by name.
        optimizer: the state of each parameter by its number; nothing before the first step.
        rng: states of random number generators by device.
    """

    path: Path
    about: dict[str, Any]
    model: dict[str, Tensor]
    optimizer: dict[int, dict[str, Tensor]]
    rng: dict[str, Tensor]

    def check(self, model: nn.Module, *, stepped: bool) -> None:
        """Check that it is one of `model`, and whole.

        Args:
            model: on any device, the meta device too.
            stepped: whether the optimizer has made a step, so that every parameter has a state.

        Raises:
            InvalidValue: a weight, a state of the optimizer or of a generator is not there, or is another one's.
        """
        check_weights(model, self.model, self.path)
        parameters = dict(enumerate(model.parameters())) if stepped else {}
        for number in sorted(parameters.keys() | self.optimizer.keys()):
            shape = list(parameters[number].shape) if number in parameters else None
            state = self.optimizer.get(number, {})
            want = {} if shape is None else {"step": [], "exp_avg": shape, "exp_avg_sq": shape}
            if {name: list(tensor.shape) for name, tensor in state.items()} != want:
                raise InvalidValue(
                    f"{self.path} is not a whole checkpoint: the optimizer's state {number} is not whole"
                )
        cpu = self.rng.get("cpu")
        if _form(cpu) != _form(torch.get_rng_state()) or not self.rng.keys() <= {"cpu", "cuda"}:
            raise InvalidValue(
                f"{self.path} is not a whole checkpoint: the random number generator's state is not whole"
            )

    def restore(self, model: nn.Module, optimizer: torch.optim.Optimizer, *, stepped: bool) -> None:
        """Put it into a model, its optimizer and the random number generators.

        Raises:
            InvalidValue: as `check`; nothing is changed.
        """
        self.check(model, stepped=stepped)
        try:
            torch.set_rng_state(self.rng["cpu"])
        except RuntimeError as error:
            raise InvalidValue(f"{self.path} is not a whole checkpoint: {error}") from error
        model.load_state_dict(self.model)
        state = {number: dict(sorted(of.items())) for number, of in sorted(self.optimizer.items())}
        optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
        device = next(model.parameters()).device
        if device.type == "cuda" and "cuda" in self.rng:
            torch.cuda.set_rng_state(self.rng["cuda"], device)


def read_checkpoint(path: Path) -> Checkpoint:
    """Read what `save_checkpoint` wrote.

    Raises:
        MissingFile: there is no such file.
        InvalidValue: the file is truncated, was changed, or is no checkpoint.
    """
    tensors, about = read_tensors(path)
    found = Checkpoint(path, about, {}, {}, {})
    for name, tensor in tensors.items():
        part, _, rest = name.partition(".")
        number, _, kind = rest.partition(".")
        if part == "model":
            found.model[rest] = tensor
        elif part == "rng":
            found.rng[rest] = tensor
        elif part == "optimizer" and number.isdecimal():
            found.optimizer.setdefault(int(number), {})[kind] = tensor
        else:
            raise InvalidValue(f"{path} is no checkpoint to resume from: it holds {name}")
    return found


def _form(tensor: Tensor | None) -> str:
    return "nothing" if tensor is None else f"{list(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"
