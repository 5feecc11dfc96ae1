"""The settings of `train`, and what they may be."""

import subprocess
import sys

import pytest
import torch

from randbatch.estimators import ESTIMATORS
from randbatch.models import CONVOLUTIONS, attention_names
from randbatch.train import PRESETS, SweepConfig, preset
from randbatch.train.config import Settings
from randbatch.train.machine import pick_device


def test_choices_are_those_of_the_library() -> None:
    """The command line lists message passing as literals, which must not drift from the table; names are resolved."""
    import typing

    assert {*typing.get_type_hints(Settings)["local"].__args__} == set(CONVOLUTIONS)
    for name in ESTIMATORS:
        assert SweepConfig(estimator=name).estimator is ESTIMATORS[name]
    for name in attention_names():
        assert SweepConfig(attention=(name,)).attention == (name,)
    for wrong in ({"estimator": "plane"}, {"attention": ("rab",)}, {"interaction": "softmux"}, {"backend": "gpu"}):
        with pytest.raises(ValueError, match=f"{next(iter(wrong))} must be one of"):
            SweepConfig(**wrong)


def test_presets() -> None:
    for name in PRESETS:
        assert preset(name, "groups").preset == name
    assert preset(None, "groups").attention == ("off", "rba", "full")
    assert preset(None, "tolokers").preset == "tolokers"
    assert preset(None, "questions").preset == "large-graph"


def test_devices() -> None:
    assert pick_device("cpu") == torch.device("cpu")
    if not torch.cuda.is_available():
        assert pick_device("auto") == torch.device("cpu")
        with pytest.raises(ValueError, match="torch finds no GPU"):
            pick_device("cuda")


def test_a_peak_stays_until_it_is_reset() -> None:
    """In a process of its own, whose memory nobody else moves: 400 MB come and go, then 200 MB."""
    code = """
import torch
from randbatch.train.machine import peak_memory, reset_peak_memory
device = torch.device("cpu")
reset_peak_memory(device)
peaks = [peak_memory(device)]
torch.ones(100_000_000)
peaks.append(peak_memory(device))
reset_peak_memory(device)
peaks.append(peak_memory(device))
torch.ones(50_000_000)
peaks.append(peak_memory(device))
print(*peaks)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    start, high, low, again = (int(peak) / 1e6 for peak in done.stdout.split())
    assert high - start == pytest.approx(400, abs=40)
    assert low - start < 40
    assert again - start == pytest.approx(200, abs=40)
