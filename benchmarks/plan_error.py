"""What `randbatch plan` predicts against the peak that is measured, on seven kinds of graph and model.

Run `python benchmarks/plan_error.py`. Every training is a process of its own; its peak is that of the resident memory
above the process before the features were made, after the same model was trained on a tiny graph, so that
libraries have their buffers.
"""

import argparse
import json
import sys
from typing import Any

import torch
import torch.nn.functional as F
from _measure import in_a_process, peak_bytes, write_row

from randbatch.analysis import plan
from randbatch.models import GraphTransformer

CASES: list[dict[str, Any]] = [
    {"nodes": 400_000, "edges": 4_000_000},
    {"nodes": 400_000, "edges": 2_000_000, "batch_size": 512, "local": "gcn", "layers": 2},
    {"nodes": 200_000, "edges": 8_000_000, "hidden": 128, "features": 128, "layers": 2},
    {"nodes": 600_000, "edges": 1_200_000, "local": "off", "batch_size": 256, "features": 32},
    {"nodes": 400_000, "edges": 4_000_000, "chunk_batches": 8},
    {"nodes": 300_000, "edges": 1_500_000, "estimator": "corrected", "local": "gin", "layers": 2},
    {"nodes": 150_000, "edges": 1_500_000, "local": "gat", "layers": 2, "dropout": 0.2},
]
DEFAULTS = {"features": 64, "hidden": 64, "layers": 3, "local": "sage", "batch_size": 128, "estimator": "plain",
            "chunk_batches": None, "dropout": 0.0}  # fmt: skip


def train(case: dict[str, Any]) -> None:
    x = torch.randn(case["nodes"], case["features"])
    y = torch.randint(16, (case["nodes"],))
    edge_index = torch.randint(case["nodes"], (2, case["edges"]))
    names = ("layers", "local", "batch_size", "estimator", "chunk_batches", "dropout")
    settings = {name: case[name] for name in names}
    model = GraphTransformer(case["features"], 16, channels=case["hidden"], **settings)
    optimizer = torch.optim.AdamW(model.parameters())
    edges = model.prepare_edges(edge_index, case["nodes"])
    del edge_index
    for _ in range(2):
        optimizer.zero_grad()
        F.cross_entropy(model(x, edges), y).backward()
        optimizer.step()


def measure(case: dict[str, Any]) -> dict[str, int]:
    train(case | {"nodes": 4096, "edges": 4096})
    before = peak_bytes()
    train(case)
    return {"bytes": peak_bytes() - before}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--case", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.case is not None:
        print(json.dumps(measure(DEFAULTS | CASES[options.case])))
        return
    print("| graph and model | predicted GB | measured GB | off |\n|---|---|---|---|")
    for number, changed in enumerate(CASES):
        case = DEFAULTS | changed
        same = {name: case[name] for name in ("features", "hidden", "layers", "local", "estimator", "dropout")}
        found = plan(case["nodes"], case["edges"], memory="1TB", batch_sizes=(case["batch_size"],),
                     chunk_batches=(case["chunk_batches"],), **same)  # fmt: skip
        predicted = found.rows[0].peak_bytes
        measured = in_a_process(sys.argv[0], "--case", number)["bytes"]
        label = ", ".join(f"{name} {value}" for name, value in changed.items())
        row = f"{predicted / 1e9:.2f} | {measured / 1e9:.2f} | {predicted / measured - 1:+.1%}"
        print(f"| {label} | {row} |", flush=True)
        write_row("plan_error", {"settings": case, "predicted": predicted, "measured": measured})


if __name__ == "__main__":
    main()
