"""A hundred random combinations of all options: each agrees with the float64 oracle or is refused by a sentence."""

import json
import math
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import oracle
import pytest
import torch
import torch.nn.functional as F
from combination_cases import COMPILED, DTYPES, MODULES, NUMBERS, TRANSFORMS, Case, draw
from combination_checks import check
from combination_entries import Entry
from combination_rules import RULES
from torch import Tensor

import randbatch as rb

CASES = [draw(number) for number in NUMBERS]
SCRIPT = Path(__file__).parent / "scripts" / "combinations.py"


@pytest.mark.unchecked
@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.number}-{case}")
def test_it_agrees_or_is_refused(case: Case) -> None:
    check(case)


@pytest.fixture(scope="module")
def compiled() -> dict[int, str]:
    """What became of the compiled ones, in a process of their own: here the package is checked as it runs."""
    done = subprocess.run([sys.executable, SCRIPT, "--compiled"], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return dict(json.loads(line) for line in done.stdout.splitlines())


@pytest.mark.parametrize("case", COMPILED, ids=lambda case: f"{case.number}-{case}")
def test_compiled_it_agrees_or_is_refused(case: Case, compiled: dict[int, str]) -> None:
    assert compiled[case.number] in ("agreed", "refused")


def test_there_are_a_hundred_of_every_kind() -> None:
    cases = [*CASES, *COMPILED]
    assert len({replace(case, number=0) for case in cases}) == 100
    refused = [[rule for rule in RULES if rule.holds(case, Entry(case))] for case in cases]
    alone = {rules[0].reason for rules in refused if len(rules) == 1}
    # a wrapper of several graphs is refused under torch.compile as several of its other options are
    assert alone >= {rule.reason for rule in RULES if rule.argument != "batch"}
    served = [case for case, rules in zip(cases, refused, strict=True) if not rules]
    for name, values in {
        "entry": ("op", *MODULES),
        "estimator": ("plain", "debiased", "corrected"),
        "interaction": ("softmax", "linear"),
        "mode": ("backward", "no_grad", "second", "compile", *TRANSFORMS),
        "backend": ("auto", "cpu", "sdpa", "reference", "triton"),
        "chunk_batches": (None, 1, 3, "auto"),
        "dtype": tuple(DTYPES),
        "rounds_of_call": (1, 2, 5, 999),
        "tolerance": (None, 0.3),
        "graphs": (False, True),
        "padded": (False, True),
        "partition": (False, True),
        "training": (False, True),
        "drops": (False, True),
        "n": (0, 1, 2, 7, 33, 64, 101),
    }.items():
        missing = set(values) - {getattr(case, name) for case in served}
        assert not missing, f"no served case has {name} {missing}"


# ---------------------------------------------------------------------------------------------- the oracle, and its eye


def test_the_formula_is_the_sum_that_it_stands_for() -> None:
    """Plain, debiased and linear, pair by pair, in Python's numbers."""
    query, key, value = torch.randn(3, 5, 1, 3, dtype=torch.float64).unbind()
    met = oracle.met_in(rb.Partition(torch.tensor([3, 0, 4, 1, 2]), ((1, 3), (1, 2))))
    same = oracle.same_graph(None, 5)
    assert [row.nonzero().flatten().tolist() for row in met] == [[3, 4], [2], [1], [0, 4], [0, 3]]

    def product(x: Tensor, y: Tensor) -> float:
        return sum(a * b for a, b in zip(x.flatten().tolist(), y.flatten().tolist(), strict=True))

    def softmax(i: int, j: int) -> float:
        return math.exp(0.7 * product(query[i], key[j]))

    def linear(i: int, j: int) -> float:
        return product(F.elu(query[i]) + 1, F.elu(key[j]) + 1)

    for weight, interaction in ((softmax, "softmax"), (linear, "linear")):
        for estimator in ("plain", "debiased"):
            how = {"interaction": interaction, "estimator": estimator, "scale": 0.7}
            out = oracle.attention(query, key, value, met, same, **how)
            for i in range(5):
                others = met[i].nonzero().flatten().tolist()
                kappa = 4 / len(others) if estimator == "debiased" else 1.0
                terms = {i: weight(i, i)} | {j: kappa * weight(i, j) for j in others}
                for e in range(3):
                    want = sum(w * float(value[j, 0, e]) for j, w in terms.items()) / sum(terms.values())
                    assert math.isclose(float(out[i, 0, e]), want, rel_tol=1e-12, abs_tol=1e-14)


def test_rounds_meet_as_many_others_as_they_say() -> None:
    for num_tokens, batch_size, rounds in ((49, 7, 3), (101, 5, 4), (64, 2, 7), (33, 16, 2)):
        met = oracle.met_in_rounds(num_tokens, batch_size, rounds, None, 0).sum(dim=1)
        assert int(met.min()) >= min(rounds * (batch_size - 1), num_tokens - 1) or batch_size == 2
        assert float(met.double().mean()) >= rounds * (batch_size - 1)


Call = Callable[..., Tensor]


def _more_scale(call: Call, *inputs: Tensor, scale: float | None = None, **options: Any) -> Tensor:
    return call(*inputs, scale=1.001 * (inputs[0].shape[-1] ** -0.5 if scale is None else scale), **options)


def _without(name: str, value: Any, call: Call, *inputs: Tensor, **options: Any) -> Tensor:
    return call(*inputs, **options | {name: value})


def _no_gradient_of_key(call: Call, query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Tensor:
    return call(query, key.detach(), value, **options)


def _fails(call: Call, *inputs: Tensor, **options: Any) -> Tensor:
    raise KeyError("debiased")


def _refuses(call: Call, *inputs: Tensor, **options: Any) -> Tensor:
    raise ValueError("backend must be another")


GRAPHS = Case(graphs=True, dtype="fp64")
WRONG = {
    "scale": (_more_scale, Case()),
    "estimator": (partial(_without, "estimator", "plain"), Case(estimator="debiased")),
    "rounds": (partial(_without, "rounds", 1), Case(rounds=2)),
    "graphs": (partial(_without, "batch", None), GRAPHS),
    "seed": (partial(_without, "seed", 1), GRAPHS),
    "batch size": (partial(_without, "batch_size", 6), Case()),
    "tolerance": (partial(_without, "tolerance", None), Case(tolerance=0.3)),
    "interaction": (partial(_without, "interaction", "softmax"), Case(interaction="linear")),
    "no dropout": (partial(_without, "dropout_p", 0.0), Case(dropout=0.5)),
    "gradient": (_no_gradient_of_key, Case()),
    "error": (_fails, Case()),
    "refused": (_refuses, Case()),
    "served": (partial(_without, "scale", None), Case(interaction="linear", scale=0.3)),
    "served backend": (partial(_without, "backend", "auto"), Case(backend="cpu", dtype="fp64")),
}


@pytest.mark.unchecked
@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong_is_seen(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    wrong, case = WRONG[name]
    check(case)
    monkeypatch.setattr(rb, "random_batch_attention", partial(wrong, rb.random_batch_attention))
    with pytest.raises((AssertionError, KeyError)):
        check(case)
