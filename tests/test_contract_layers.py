"""Layers, models and runs with every interaction of the table and with the toys: values and parameters."""

from __future__ import annotations

import copy
import json
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import contract
import pytest
import torch
from compiling_contract import CASES, OF_ESTIMATORS
from contract import (
    GRAPHS,
    WIDTH,
    N,
    close,
    definition,
    every_layered,
    every_learned,
    graphs_or_one,
    layer_of,
    make,
    results,
)
from torch import Tensor

import randbatch as rb

pytestmark = pytest.mark.usefixtures("toys")


# Values


@every_layered
@graphs_or_one
@pytest.mark.parametrize(
    ("training", "batch_size"), [(True, N), (False, N), (False, 4)], ids=["train", "eval", "exact_eval"]
)
def test_a_layer_is_projections_around_the_definition(
    name: str, batch: Tensor | None, training: bool, batch_size: int
) -> None:
    layer = layer_of(make(name), batch_size, exact_eval=batch_size < N).train(training)
    interaction: Any = layer.randbatch_config.interaction
    x = torch.randn(N, WIDTH, dtype=torch.float64, requires_grad=True)
    want = contract.around(layer, x, lambda heads: definition(interaction, heads, batch))
    close(results(layer(x, batch=batch), [x], layer), results(want, [x], layer))


@every_layered
@pytest.mark.parametrize("options", [{}, {"chunk_batches": 2}], ids=str)
def test_rounds_of_a_layer(name: str, options: dict) -> None:
    if name not in contract.MERGING or not contract.takes(make(name), 2, **options):
        pytest.skip("it has nothing to merge, or no chunks")
    layer = layer_of(make(name), 4, rounds=2, estimator="debiased", **options).eval()
    interaction: Any = layer.randbatch_config.interaction
    x = torch.randn(N, WIDTH, dtype=torch.float64, requires_grad=True)
    met = contract.met_in(N, 4, 2, GRAPHS, seed=5)
    want = contract.around(layer, x, lambda heads: contract.estimate(interaction, heads, met, 1.0, GRAPHS))
    close(results(layer(x, batch=GRAPHS), [x], layer), results(want, [x], layer), rtol=1e-10)


@every_layered
@pytest.mark.parametrize("rounds", [1, 2])
@pytest.mark.parametrize("chunk", [None, 2])
def test_padded_sets_are_flat_graphs(name: str, rounds: int, chunk: int | None) -> None:
    """And padding counts for nothing, NaN or not."""
    if not contract.takes(make(name), rounds, chunk):
        pytest.skip("it is refused")
    layer = layer_of(make(name), 4, rounds=rounds, chunk_batches=chunk).eval()
    lengths = torch.tensor([9, 1, 5, 0])
    padding = torch.arange(9) >= lengths.unsqueeze(1)
    x = torch.randn(4, 9, WIDTH, dtype=torch.float64).masked_fill(padding.unsqueeze(-1), torch.nan).requires_grad_()
    out, _ = layer(x, x, x, key_padding_mask=padding)
    flat = x[~padding].detach().requires_grad_()
    want = layer(flat, batch=torch.arange(4).repeat_interleave(lengths))
    assert (out[padding] == 0).all()
    found, expected = results(out[~padding], [x], layer), results(want, [flat], layer)
    assert (found[1][padding] == 0).all()
    found[1] = found[1][~padding]
    close(found, expected)


# Compiled, in a process without the checks of annotations, which no compiler can trace


@pytest.fixture(scope="module")
def compiled() -> dict[str, str | None]:
    command = [sys.executable, str(Path(__file__).with_name("compiling_contract.py"))]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return json.loads(done.stdout.splitlines()[-1])


KEYS = [f"{name}: {case}" for name in contract.LAYERED for case in CASES]
KEYS += [f"{estimator}: {case}" for estimator in contract.ESTIMATOR_NAMES for case in OF_ESTIMATORS]


@pytest.mark.parametrize("key", KEYS)
def test_compiled_layers_are_the_eager_ones(key: str, compiled: dict[str, str | None]) -> None:
    """Outputs and gradients, of inputs and of all parameters."""
    assert compiled[key] is None, compiled[key]


# Parameters


@every_learned
def test_a_layer_owns_the_parameters_of_its_interaction(name: str) -> None:
    first, second = (layer_of(name, 4) for _ in range(2))
    own = [f"interaction.{each}" for each, _ in make(name).named_parameters()]
    assert own
    assert set(own) <= set(first.state_dict())
    assert set(own) <= {each for each, _ in first.named_parameters()}
    first.load_state_dict(second.state_dict())
    x = torch.randn(N, WIDTH, dtype=torch.float64)
    close(first.eval()(x), second.eval()(x))
    for one, other in zip(parameters(first), parameters(second), strict=True):
        assert one is not other  # each layer has its own


def parameters(layer: Any) -> list[Tensor]:
    return list(layer.interaction.parameters())


@every_learned
def test_a_layer_makes_its_interaction_where_and_as_it_is_told(name: str) -> None:
    layer = rb.nn.RandomBatchAttention(WIDTH, 2, 4, interaction=name, device="meta", dtype=torch.float64)
    assert {(p.device.type, p.dtype) for p in layer.parameters()} == {("meta", torch.float64)}


@every_learned
def test_an_interaction_that_is_set_later_is_owned_or_refused(name: str) -> None:
    """Never parameters that no optimizer sees."""
    layer = layer_of("softmax", 4)
    try:
        layer.randbatch_config.interaction = name
        layer(torch.randn(N, WIDTH, dtype=torch.float64))
    except (ValueError, TypeError) as error:
        assert "interaction" in str(error)
        return
    owned = {id(p) for p in layer.parameters()}
    used: Any = layer.randbatch_config.interaction
    assert all(id(p) in owned for p in used.parameters())


@every_layered
def test_a_copy_says_what_it_is(name: str) -> None:
    """Copied or sent to another process: equal options, and the same words."""
    for options in ({}, {"rounds": 2, "estimator": "debiased"} if name in contract.MERGING else {}):
        layer = layer_of(name, 4, **options)
        for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
            assert repr(other) == repr(layer)
            if name not in contract.LEARNED:
                assert other.randbatch_config == layer.randbatch_config


@every_learned
def test_a_copy_of_a_layer_is_independent(name: str) -> None:
    layer = layer_of(name, 4).eval()
    x = torch.randn(N, WIDTH, dtype=torch.float64)
    before, other = layer(x).detach(), copy.deepcopy(layer)
    config = layer.randbatch_config.copy()
    close(other(x), before)
    with torch.no_grad():
        for parameter in parameters(other):
            parameter.add_(1.0)
    assert not torch.allclose(other(x), before)
    close(layer(x), before)
    mine: Any = config.interaction
    assert all(p is not q for p, q in zip(mine.parameters(), parameters(layer), strict=True))


@every_learned
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_layer_takes_its_interaction_to_another_dtype(name: str, dtype: torch.dtype) -> None:
    layer = layer_of(name, 4).to(dtype)
    assert {p.dtype for p in parameters(layer)} == {dtype}
    for rounds in (1, 2):
        layer.randbatch_config.rounds = rounds
        layer(torch.randn(N, WIDTH, dtype=dtype)).sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() and p.grad.any() for p in parameters(layer))


@every_learned
@pytest.mark.parametrize("options", contract.MODES.values(), ids=contract.MODES)
def test_training_changes_the_parameters(name: str, options: dict) -> None:
    if not contract.takes(make(name), **options):
        pytest.skip("it is refused")
    layer = layer_of(name, 4, **options)
    before = [p.detach().clone() for p in parameters(layer)]
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    x = torch.randn(N, WIDTH, dtype=torch.float64)
    layer(x).square().sum().backward()
    optimizer.step()
    assert all(not torch.equal(p, q) for p, q in zip(parameters(layer), before, strict=True))


# Models and runs


@every_layered
def test_train_takes_every_interaction(name: str, tmp_path: Path) -> None:
    """`randbatch train --attention NAME`, with an option of random batches."""
    rounds = "2" if name in contract.MERGING else "1"
    assert contract.TinyRun(tmp_path, "--attention", name, "--rounds", rounds).result()["attention"] == name


@every_layered
def test_a_model_takes_every_interaction(name: str) -> None:
    options: dict[str, Any] = {"channels": 8, "heads": 2, "layers": 2, "local": "off", "batch_size": 4}
    model = rb.models.GraphTransformer(3, 2, attention=name, rounds=2 if name in contract.MERGING else 1, **options)
    out = model(torch.randn(N, 3), torch.zeros(2, 0, dtype=torch.int64), GRAPHS)
    out.square().sum().backward()
    assert all(p.grad is not None for p in model.parameters())
