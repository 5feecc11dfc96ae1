"""Columns: copies of a module, by `copy`, by pickle into a new process, and by its state.

As a program: reads a folder of pickles and prints which of them compute there what they computed here, as JSON.
"""

from __future__ import annotations

import copy
import json
import pickle
import subprocess
import sys
import traceback
from pathlib import Path

import torch
from subjects import C, H, Subject, samplings, subjects
from torch import nn

import randbatch as rb


def deep(subject: Subject) -> None:
    """`copy.deepcopy`: the same in eval, and trained apart."""
    module = subject.module().eval()
    copied = copy.deepcopy(module)
    with torch.no_grad():
        want = subject.call(module, subject.inputs())
        torch.testing.assert_close(subject.call(copied, subject.inputs()), want, rtol=0, atol=0)
        for parameter in copied.parameters():
            parameter.add_(1.0)
        for sampling in samplings(copied):
            sampling.seed += 1
        torch.testing.assert_close(subject.call(module, subject.inputs()), want, rtol=0, atol=0)


def state(subject: Subject) -> None:
    """`state_dict` to torch's `MultiheadAttention` and back; in one batch both compute the same (softmax)."""
    ours = subject.module().eval()
    assert isinstance(ours, rb.nn.RandomBatchAttention)
    bias = ours.in_proj_bias is not None
    theirs = nn.MultiheadAttention(C, H, batch_first=True, bias=bias).eval()
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    theirs.load_state_dict(ours.state_dict())
    again = subject.build(10**6).eval()
    again.load_state_dict(theirs.state_dict())
    assert isinstance(again, rb.nn.RandomBatchAttention)
    for name, parameter in again.named_parameters():
        assert torch.equal(parameter, ours.get_parameter(name))
    if again.randbatch_config.resolved()[0].is_exponential:
        x = torch.randn(2, 9, C)
        torch.testing.assert_close(again(x), theirs(x, x, x)[0], rtol=1e-4, atol=1e-5)


COLUMNS = {"deepcopy": deep}
COLUMNS_OF_LAYER = {"state_dict of MultiheadAttention": state}


def in_a_new_process(folder: Path) -> dict[str, str]:
    """What pickles do in a process that has never seen the modules: "yes", or what happened."""
    for number, (key, subject) in enumerate(subjects().items()):
        if subject.why_not_here() is None:
            module = subject.module().eval()
            torch.manual_seed(5)
            with torch.no_grad():
                out = subject.call(module, subject.inputs())
            (folder / f"{number}.pkl").write_bytes(pickle.dumps((key, module, out)))
    command = [sys.executable, __file__, str(folder)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    found: dict[str, str] = {}
    for number, (key, subject) in enumerate(subjects().items()):
        path = folder / f"{number}.pkl"
        if not path.exists():
            continue
        try:
            name, module, want = pickle.loads(path.read_bytes())
            assert name == key
            assert not module.training
            torch.manual_seed(5)
            with torch.no_grad():
                torch.testing.assert_close(subject.call(module, subject.inputs()), want, rtol=1e-6, atol=1e-6)
            found[key] = "yes"
        except Exception:
            found[key] = traceback.format_exc()
    print(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
