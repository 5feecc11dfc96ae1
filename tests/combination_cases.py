"""Random combinations of all options of every entry point, sensible or not."""

from __future__ import annotations

import random
from dataclasses import dataclass, fields, replace
from typing import Any

import torch

DTYPES = {"fp64": torch.float64, "fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
MODULES = ("layer", "converted", "sdpa", "model", "wrapper")
TRANSFORMS = ("func.grad", "func.jvp", "func.vmap")


@dataclass(frozen=True)
class Case:
    """A call with all its options; those that an entry point does not have stay at their defaults.

    Attributes:
        entry: what is called, see `Entry`.
        mode: what is asked of it: `backward`, `no_grad`, `second` (derivatives), `compile`, or a transform.
        graphs: whether there are several, by `batch` or as padded sets.
        inner: what `RandomBatch` wraps.
        exact: `set_inference(mode="exact")`.
    """

    number: int = 0
    entry: str = "op"
    mode: str = "backward"
    interaction: str = "softmax"
    estimator: str = "plain"
    rounds: int = 1
    eval_rounds: int | None = None
    tolerance: float | None = None
    exact: bool = False
    scale: float | None = None
    dropout: float = 0.0
    seed: int | None = 0
    graphs: bool = False
    padded: bool = False
    batch_first: bool = True
    bias: bool = True
    partition: bool = False
    backend: str = "auto"
    chunk_batches: Any = None
    dtype: str = "fp32"
    autocast: str | None = None
    training: bool = False
    inner: str = ""
    n: int = 33
    p: int = 5
    heads: int = 2
    d: int = 8
    dv: int = 8

    @property
    def channels(self) -> int:
        return self.heads * self.d

    @property
    def rounds_of_call(self) -> int:
        """R, as train and eval have it."""
        if self.exact:
            return 1
        return self.rounds if self.training or self.eval_rounds is None else self.eval_rounds

    @property
    def drops(self) -> bool:
        """Whether weights are dropped: the op knows no eval."""
        return self.dropout > 0 and (self.training or self.entry == "op")

    @property
    def stored(self) -> torch.dtype:
        """The dtype of inputs and parameters."""
        return DTYPES[self.dtype]

    @property
    def computed(self) -> torch.dtype:
        """The dtype of query, key and value: autocast changes every one but float64."""
        return DTYPES[self.autocast] if self.autocast and self.dtype != "fp64" else self.stored

    def __str__(self) -> str:
        own = {field.name: getattr(self, field.name) for field in fields(self) if field.name not in ("number", "entry")}
        said = [f"{name}={value}" for name, value in own.items() if value != getattr(Case, name)]
        return "-".join([self.entry, *said])


# Of 2000 that were drawn, one that each rule alone refuses, and those that have the most pairs of options among them:
# `python tests/scripts/combinations.py --count 2000 --choose 94` chooses anew.
NUMBERS = (
    1, 5, 7, 11, 14, 20, 25, 37, 75, 86, 89, 90, 110, 113, 118, 119, 153, 168, 174, 180, 190, 195, 242, 247,
    270, 321, 337, 370, 396, 465, 466, 469, 471, 623, 630, 643, 655, 665, 673, 674, 685, 690, 691, 692, 711,
    737, 742, 746, 803, 862, 864, 866, 875, 880, 881, 952, 963, 971, 997, 1021, 1041, 1045, 1050, 1056, 1075,
    1178, 1187, 1219, 1230, 1239, 1244, 1376, 1391, 1415, 1496, 1515, 1522, 1608, 1610, 1648, 1666, 1670, 1709,
    1742, 1744, 1756, 1761, 1770, 1856, 1886, 1892, 1915, 1931, 1945,
)  # fmt: skip
# A compiler takes seconds for each, so they are few.
COMPILED = (
    Case(0, "op", "compile", tolerance=0.3),
    Case(1, "op", "compile", rounds=2),
    Case(2, "layer", "compile", estimator="debiased", rounds=2, graphs=True, training=True, seed=None),
    Case(3, "converted", "compile", graphs=True, padded=True, chunk_batches=3, n=7),
    Case(4, "sdpa", "compile", estimator="corrected", graphs=True, padded=True, training=True),
    Case(5, "wrapper", "compile", rounds=2, inner="attention", training=True),
)


def draw(number: int, salt: int = 0) -> Case:
    """The case of a number, the same on every machine."""
    return _draw(number, random.Random(f"{salt}-{number}"))


def _draw(number: int, rng: random.Random) -> Case:
    def pick(usual: Any, *rest: Any, often: float = 0.6) -> Any:
        return usual if rng.random() < often else rng.choice(rest)

    entry = rng.choices(("op", *MODULES), (40, 25, 10, 9, 7, 9))[0]
    mode = rng.choices(("backward", "no_grad", "second", *TRANSFORMS), (62, 14, 9, 5, 5, 5))[0]
    is_linear = entry in ("op", "layer", "model") and rng.random() < 0.25
    plainly = is_linear or mode in ("second", *TRANSFORMS)  # which else are mostly refused
    named = entry not in ("model", "wrapper") and (not plainly or rng.random() < 0.1)  # a backend is
    some = (2, 5) if entry == "wrapper" else (2, 5, 999)
    case = Case(
        number,
        entry,
        mode,
        interaction="linear" if is_linear else "softmax",
        estimator="plain"
        if entry == "wrapper"
        else pick("plain", "debiased", "corrected", often=0.9 if is_linear else 0.34),
        rounds=pick(1, *some, often=0.6),
        seed=rng.choice((0, 3, -5, 2**70)),
        graphs=rng.random() < 0.4,
        backend=rng.choice(("cpu", "sdpa", "reference", "triton")) if named and rng.random() < 0.4 else "auto",
        chunk_batches=pick(None, 1, 3, "auto", often=0.9 if plainly else 0.7),
        dtype=pick("fp64", "fp32", "fp32", "bf16", "fp16", often=0.35),
        autocast=pick(None, "bf16", "fp16", often=0.85),
        n=rng.choice((0, 1, 2, 7, 33, 33, 64, 101)),
        p=rng.choice((2, 2, 5, 5, 16, 16, 64, 1000)),
        heads=rng.choice((1, 2)),
        d=rng.choice((3, 8, 16, 20)),
        scale=pick(None, 0.1, 0.7, often=0.9 if is_linear else 0.7) if entry in ("op", "sdpa") else None,
        dropout=pick(0.0, 0.1, 0.5, often=0.85) if entry != "wrapper" else 0.0,
    )
    if entry == "op":
        tolerance = pick(None, 0.3, often=0.9)
        case = replace(case, tolerance=tolerance, rounds=case.rounds if tolerance is None else pick(1, 2, often=0.9))
        case = replace(case, partition=rng.random() < 0.12, dv=pick(case.d, 3, 8, 16, 20))
        if rng.random() < 0.3:
            case = replace(case, seed=None)  # drawn, or a partition by hand
    else:
        inference = rng.choices(("", "exact", "tolerance"), (85, 8, 7))[0]
        case = replace(
            case, training=rng.random() < 0.5, eval_rounds=pick(None, 1, *some), dv=case.d, bias=rng.random() < 0.8,
            tolerance=0.3 if inference == "tolerance" and entry != "model" else None,
            padded=entry != "model" and rng.random() < 0.4,
            batch_first=entry not in ("layer", "converted") or rng.random() < 0.7,
            inner=rng.choice(("linear", "attention")) if entry == "wrapper" else "",
        )  # fmt: skip
        case = replace(case, exact=inference == "exact" and not case.training)
        if case.training and rng.random() < 0.3:
            case = replace(case, seed=None)
    return _made_sensible(case)


def _made_sensible(case: Case) -> Case:
    """Without what would say nothing, or take too long."""
    if case.entry in ("converted", "sdpa") and not case.padded:
        case = replace(case, graphs=False)  # flat tokens are one set there
    if case.padded:
        case = replace(case, n=min(max(case.n, 1), 33))
    if case.backend == "triton":  # which is interpreted
        case = replace(case, n=min(case.n, 7))
    if case.entry in ("converted", "sdpa"):
        case = replace(case, n=max(case.n, 1))
    if case.entry == "model" and case.d < 8:  # a norm of three channels makes much of their roundings
        case = replace(case, d=8, dv=8)
    if case.entry == "model" or case.dropout:  # with a bias alone all values can be 1
        case = replace(case, bias=True)
    if case.mode in ("second", *TRANSFORMS):  # in half precision they are sums of roundings
        case = replace(case, dtype="fp64" if case.dtype == "fp64" else "fp32", autocast=None)
    if case.dtype in ("bf16", "fp16"):  # torch's own modules do not take one of them under autocast to the other
        case = replace(case, autocast=None)
    if case.partition and case.seed is None:  # by hand, in one graph
        case = replace(case, graphs=False)
    if case.training:
        case = replace(case, tolerance=None)
    if case.tolerance is not None and case.entry == "op":  # a seed says how many rounds it leads to
        case = replace(case, seed=case.seed or 0)
    elif case.tolerance is not None:  # that of a module is its own: a backend, or chunks, may be asked for in vain
        case = replace(case, backend="auto", chunk_batches=None)
    return case
