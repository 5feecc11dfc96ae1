"""Compiled layers against eager ones for every interaction and estimator, in a process without run-time checks.

Prints a JSON object: for each case None, or what went wrong.
"""

from __future__ import annotations

import json
import traceback
from collections.abc import Iterator
from typing import Any

import contract
import torch
from toys import registered

Case = tuple[dict[str, Any], torch.Tensor | None]
CASES: dict[str, Case] = {
    "one set": ({}, None),
    "graphs": ({"estimator": "debiased"}, contract.GRAPHS),
    "rounds": ({"rounds": 2}, None),
    "rounds of graphs, in chunks": ({"rounds": 2, "estimator": "debiased", "chunk_batches": 2}, contract.GRAPHS),
}
"""Of every interaction; one that does not take an option goes without."""
OF_ESTIMATORS: dict[str, Case] = {"one set": ({}, None), "rounds of graphs": ({"rounds": 2}, contract.GRAPHS)}


def compare(interaction: str, options: dict[str, Any], batch: torch.Tensor | None) -> None:
    """Two layers, one after the other: neither reuses what was kept of the other."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    made = (contract.layer_of(contract.make(interaction), 4, seed=seed, **options) for seed in range(2))
    model = torch.nn.ModuleList(made)
    x = torch.randn(contract.N, contract.WIDTH, dtype=torch.float64, requires_grad=True)

    def forward(x: torch.Tensor) -> torch.Tensor:
        return model[1](model[0](x, batch=batch), batch=batch)

    compiled = torch.compile(forward, fullgraph=True, backend="aot_eager")
    found = []
    for function in (forward, compiled):
        torch.manual_seed(1)
        found.append(contract.results(function(x), [x], model))
    torch.testing.assert_close(found[1], found[0], **contract.EXACT)


def plan() -> Iterator[tuple[str, str, dict[str, Any], torch.Tensor | None]]:
    """Key, interaction, options and graphs of every case."""
    for name in contract.LAYERED:
        for case, (options, batch) in CASES.items():
            merges, takes = name in contract.MERGING, contract.takes(contract.make(name), **options)
            left = {k: v for k, v in options.items() if takes or k == "estimator"} if merges else {}
            yield f"{name}: {case}", name, left, batch
    for estimator in contract.ESTIMATOR_NAMES:
        for case, (options, batch) in OF_ESTIMATORS.items():
            yield f"{estimator}: {case}", "softmax", {"estimator": estimator, **options}, batch


def main() -> None:
    results: dict[str, str | None] = {}
    with registered():
        for key, interaction, options, batch in plan():
            try:
                compare(interaction, options, batch)
                results[key] = None
            except Exception:
                results[key] = traceback.format_exc()
    print(json.dumps(results))


if __name__ == "__main__":
    main()
