"""Columns: data parallel and sharded, two processes by gloo; every process gets data of its own.

As a program (`rank`, a file to meet at): rank 0 prints JSON, for each row and column "yes", "error: …" or "wrong: …".
The judge is one process: the mean of the gradients on both data sets.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import traceback
import warnings
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

os.environ["TRITON_INTERPRET"] = "1"

import torch
import torch.distributed as dist
from subjects import CONVERTED, FULL, LAYER, MODEL, OP, WRAPPER, Subject, subjects
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

WORLD = 2


def backward(subject: Subject, module: Any, rank: int) -> Tensor:
    torch.manual_seed(5)
    out = subject.call(module, subject.inputs(seed=40 + rank))
    out.sin().sum().backward()
    return out.detach()


def alone(subject: Subject, rank: int) -> tuple[Tensor, dict[str, Tensor]]:
    """This rank's output, and the mean of both ranks' gradients."""
    outs, grads = [], []
    for each in range(WORLD):
        module = subject.module()
        outs.append(backward(subject, module, each))
        grads.append({name: x.grad for name, x in module.named_parameters() if x.grad is not None})
    return outs[rank], {name: (grads[0][name] + grads[1][name]) / WORLD for name in grads[0]}


def compare(subject: Subject, rank: int, out: Tensor, module: nn.Module) -> None:
    want, grads = alone(subject, rank)
    torch.testing.assert_close(out, want, rtol=1e-4, atol=1e-5)
    for name, parameter in module.named_parameters():
        grad: Any = parameter.grad
        if name not in grads:
            assert grad is None or not (grad.full_tensor() if isinstance(grad, DTensor) else grad).any()
            continue
        assert grad is not None, f"{name} has no gradient"
        grad = grad.full_tensor() if isinstance(grad, DTensor) else grad
        torch.testing.assert_close(grad, grads[name], rtol=1e-4, atol=1e-4, msg=lambda m, name=name: f"{name}: {m}")


def data_parallel(subject: Subject, rank: int) -> None:
    """`DistributedDataParallel`."""
    module = subject.module()
    unused = subject.group == CONVERTED  # the embeddings of tokens, where their vectors are given
    out = backward(subject, DistributedDataParallel(module, find_unused_parameters=unused), rank)
    compare(subject, rank, out, module)


def sharded(subject: Subject, rank: int) -> None:
    """`fully_shard` of the module."""
    module = subject.module()
    fully_shard(module)
    out = backward(subject, module, rank)
    compare(subject, rank, out, module)


def sharded_inside(subject: Subject, rank: int) -> None:
    """`fully_shard` of every child with parameters, then of the module."""
    module = subject.module()
    for child in module.children():
        if any(True for _ in child.parameters()):
            fully_shard(child) if not isinstance(child, nn.ModuleList) else [fully_shard(each) for each in child]
    fully_shard(module)
    out = backward(subject, module, rank)
    compare(subject, rank, out, module)


COLUMNS: dict[str, Callable[[Subject, int], None]] = {
    "DDP": data_parallel,
    "fully_shard": sharded,
    "fully_shard inside": sharded_inside,
}


def rows() -> list[Subject]:
    """Those with parameters."""
    groups = {LAYER, WRAPPER, MODEL, CONVERTED} - {OP, FULL}
    return [subject for subject in subjects().values() if subject.group in groups]


def in_two_processes(folder: Path, *more: str) -> dict[str, dict[str, str]]:
    command = [sys.executable, __file__]
    ranks = [
        subprocess.Popen(
            [*command, str(rank), str(folder / "store"), *more],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"},
        )
        for rank in range(WORLD)
    ]
    outs = [rank.communicate(timeout=300) for rank in ranks]
    assert all(rank.returncode == 0 for rank in ranks), outs
    found = [json.loads(out.splitlines()[-1]) for out, _ in outs]
    for key, columns in found[1].items():  # both must say so
        for name, status in columns.items():
            if found[0][key][name] == "yes":
                found[0][key][name] = status
    return found[0]


def main(rank: int, store: str, columns: list[str]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=WORLD, timeout=timedelta(seconds=20)
    )
    found: dict[str, dict[str, str]] = {}
    for subject in rows():
        if subject.why_not_here() is not None:
            continue
        found[subject.key] = {}
        for name in columns or COLUMNS:
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    COLUMNS[name](subject, rank)
                status = "yes"
            except AssertionError as error:
                status = f"wrong: {error}"
            except Exception as error:
                status = f"error: {type(error).__name__}: {error}"
                traceback.print_exc()
            found[subject.key][name] = status
    dist.barrier()
    print(json.dumps(found), flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2], sys.argv[3:])
