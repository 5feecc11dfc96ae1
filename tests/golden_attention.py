"""The golden cases of the op, the layer and the wrapper, by their public interface alone.

Every case is small; what a name says is all that is not the default. p is 8 where nothing else is said. Where torch's
fused attention is to be reached, which is not taken for fewer than 16 keys, it is 20: 33 tokens make batches of 17 and
16, and 320 tokens lines of 17 and 16.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from golden_tools import Arrays, Case, Function, Run
from torch import Tensor, nn

import randbatch as rb

N, C = 33, 12
ESTIMATORS = ("plain", "debiased", "corrected")
BACKENDS = ("cpu", "sdpa", "reference")
ALL = 1000  # more rounds than there are: every pair meets
WIDE = {"batch_size": 20, "seed": 3}
NAMES = {torch.float64: "fp64", torch.float32: "fp32", torch.bfloat16: "bf16"}
BATCHES = {
    "sorted": torch.tensor([0] * 14 + [1] * 11 + [2] * 7 + [3]),
    "unsorted": torch.tensor([0, 1, 0, 1, 2, 0, 1] * 4 + [3, 0, 0, 0, 1]),
    "large ids": torch.tensor([10**12, 5, 10**12, 7, 5] * 6 + [7, 2**62, 7]),
}
PADDING = torch.arange(21) >= torch.tensor([21, 9, 0, 14]).unsqueeze(1)


def is_of_kernel(options: dict[str, Any], dtype: torch.dtype) -> bool:
    """Whether the CPU kernel draws the dropout mask, or is asked for by name."""
    backend = options.get("backend", "auto")
    drops = options.get("dropout_p") or options.get("dropout")
    return backend == "cpu" or bool(drops and backend == "auto" and dtype == torch.float32)


def describe(options: dict[str, Any]) -> str:
    words = (("all rounds" if value == ALL else f"{name} {value}") for name, value in options.items() if name != "seed")
    return ", ".join(words) or "defaults"


def case(kind: str, text: str, function: Function, options: dict[str, Any], dtype=torch.float32, **more: Any) -> Case:
    kernel = is_of_kernel(options, dtype)
    drops = bool(options.get("dropout_p") or options.get("dropout"))
    more = {"kernel": kernel, "same_in_float64": not (kernel and drops)} | more
    return Case(f"{kind}: {text}, {NAMES[dtype]}", function, dtype, **more)


# The op


def inputs_of(run: Run, tokens: int, size: int, value_size: int) -> dict[str, Tensor]:
    heads = 2 if tokens * size < 1000 else 1
    inputs = {name: run.tensor(name, tokens, heads, size) for name in ("query", "key")}
    return inputs | {"value": run.tensor("value", tokens, heads, value_size)}


def op(
    run: Run,
    *,
    tokens: int = N,
    size: int = 6,
    value_size: int | None = None,
    batch: str = "",
    second: bool = False,
    **options,
) -> Arrays:
    """The output and its gradients of query, key and value; `second`: these gradients, and their gradients."""
    inputs = inputs_of(run, tokens, size, value_size or size)
    graphs = BATCHES.get(batch)
    torch.manual_seed(5)
    out = rb.random_batch_attention(*inputs.values(), batch=graphs, **run.options(**options))
    if not second:
        return run.gradients(out, inputs)
    weights = run.tensor("weights of the output", *out.shape, grad=False)
    first = torch.autograd.grad(out, list(inputs.values()), weights, create_graph=True)
    return run.gradients(torch.cat([grad.flatten() for grad in first]), inputs)


def op_options() -> Iterator[tuple[dict[str, Any], torch.dtype]]:
    """Options of the op beside `batch_size`, and what it is computed in."""
    half, single, double = torch.bfloat16, torch.float32, torch.float64
    for estimator, rounds in itertools.product(ESTIMATORS, (1, 3, ALL)):
        many = {"estimator": estimator, "rounds": rounds, "seed": 3}
        yield many, single
        yield from ((many, dtype) for dtype in (double, half) if rounds == 3 or estimator == "plain")
    for estimator, rounds, backend in itertools.product(ESTIMATORS, (1, 3), BACKENDS):
        sizes = {} if rounds == 1 else {"tokens": 320, "size": 3}
        yield WIDE | sizes | {"estimator": estimator, "rounds": rounds, "backend": backend}, single
    for estimator, rounds in itertools.product(ESTIMATORS, (1, 3)):
        for backend in ("auto", "reference"):
            yield {"estimator": estimator, "rounds": rounds, "backend": backend, "dropout_p": 0.3}, single
        for batch in BATCHES:
            yield {"estimator": estimator, "rounds": rounds, "batch": batch, "seed": 3}, single
    for backend in BACKENDS:
        yield WIDE | {"backend": backend, "dropout_p": 0.3}, single
        yield WIDE | {"backend": backend, "value_size": 3}, single
        yield WIDE | {"backend": backend, "size": 32}, single
    for estimator, rounds, chunk in itertools.product(ESTIMATORS[:2], (1, 3), (2, "auto")):
        yield {"estimator": estimator, "rounds": rounds, "chunk_batches": chunk, "seed": 3}, single
    for more in ({"dropout_p": 0.3}, {"backend": "reference"}, {"batch": "unsorted"}, {"value_size": 3}, {"rounds": 3}):
        yield {"chunk_batches": 2, "seed": 3} | more, double if "rounds" in more else single
    yield {"chunk_batches": 2, "rounds": 3, "dropout_p": 0.3, "backend": "reference"}, single
    for estimator in ESTIMATORS:
        yield {"estimator": estimator}, single  # a partition drawn from manual_seed
        yield {"estimator": estimator, "rounds": 2}, single
        yield {"estimator": estimator, "value_size": 3, "rounds": 3, "seed": 3}, single
        yield from (({"estimator": estimator, "tokens": n, "rounds": 3, "seed": 3}, single) for n in (1, 5, 8, 56))
        yield {"estimator": estimator, "batch_size": 200, "seed": 3}, single
    yield {"scale": 0.2, "seed": 3}, single
    yield {"scale": -1.5, "rounds": 3, "seed": 3, "estimator": "debiased"}, single
    for rounds, dtype in itertools.product((1, 3, ALL), (single, double, half)):
        yield {"interaction": "linear", "rounds": rounds, "seed": 3}, dtype
    for more in ({"batch": "unsorted"}, {"batch": "large ids", "rounds": 3}, {"chunk_batches": 2}, {"value_size": 3}):
        yield {"interaction": "linear", "seed": 3} | more, single
    for estimator, dtype in itertools.product(ESTIMATORS[:2], (single, double)):
        yield {"estimator": estimator, "backend": "reference", "second": True, "seed": 3}, dtype
    for more in ({}, {"batch": "unsorted"}, {"estimator": "debiased"}):
        yield {"tolerance": 0.5, "seed": 3} | more, single


def full(run: Run, *, value_size: int = 6, batch: str = "", **options) -> Arrays:
    inputs = inputs_of(run, N, 6, value_size)
    return run.gradients(rb.full_attention(*inputs.values(), batch=BATCHES.get(batch), **options), inputs)


def chosen(run: Run, **options) -> Arrays:
    query, key, value = (run.tensor(name, 400, 1, 4, grad=False) for name in ("query", "key", "value"))
    choice = rb.choose_rounds(query, key, value + 1, batch_size=20, tolerance=0.2, **options)
    return {"rounds and error": torch.tensor([choice.rounds, choice.error, choice.exact], dtype=torch.float64)}


def ops() -> Iterator[Case]:
    for options, dtype in op_options():
        function = functools.partial(op, **{"batch_size": 8} | options)
        yield case("op", describe(options), function, options, dtype)
    many = [{"batch": name} for name in BATCHES]
    for options in (
        {},
        *many,
        {"chunk_size": 7},
        {"value_size": 3},
        {"scale": 0.2},
        {"batch": "sorted", "chunk_size": 7},
    ):
        yield case("full", describe(options), functools.partial(full, **options), {})
    for dtype in (torch.float64, torch.bfloat16):
        yield case("full", "defaults", full, {}, dtype)
    for estimator in ESTIMATORS:
        yield case("choose", estimator, functools.partial(chosen, estimator=estimator), {})


# Layers

Change = Callable[[nn.Module], object]


def layer(
    run: Run,
    *,
    shape: str = "flat",
    training: bool = False,
    calls: int = 1,
    no_grad: bool = False,
    autocast: bool = False,
    change: Change | None = None,
    **options,
) -> Arrays:
    """Of the layer on `flat` tokens, one of `BATCHES`, or padded sets: output, gradients of input and parameters."""
    first = shape != "sets, tokens first"
    options = {"batch_size": 8, "seed": 3, "batch_first": first} | run.options(**options)
    model = run.fill(rb.nn.RandomBatchAttention(C, 2, **options), training=training)
    if change is not None:
        change(model)
    inputs, keywords = layer_inputs(run, shape)
    call = run.compile(model)
    torch.manual_seed(5)
    with contextlib.ExitStack() as stack:
        if no_grad:
            stack.enter_context(torch.no_grad())
        if autocast and not run.is_wide:
            stack.enter_context(torch.autocast("cpu", torch.bfloat16))
        outs = [call(*inputs, **keywords) for _ in range(calls)]
    found = [out[0] if isinstance(out, tuple) else out for out in outs]
    return run.gradients(torch.cat(found), {f"input {i}": x for i, x in enumerate(dict.fromkeys(inputs))}, model)


def layer_inputs(run: Run, shape: str) -> tuple[tuple[Tensor, ...], dict[str, Any]]:
    if shape == "query, key, value":
        return tuple(run.tensor(name, N, C) for name in ("query", "key", "value")), {"same_tokens": True}
    if shape in BATCHES:
        return (run.tensor("x", N, C),), {"batch": BATCHES[shape]}
    if shape == "one padded set":
        return 3 * (run.tensor("x", 21, C),), {"key_padding_mask": PADDING[3]}
    if shape == "sets, tokens first":
        return 3 * (run.tensor("x", 21, 4, C),), {"key_padding_mask": PADDING}
    if shape.startswith("sets"):
        ignored = torch.zeros(PADDING.shape, dtype=run.dtype).masked_fill(PADDING, -torch.inf)
        masks = {"sets": None, "sets, padded": PADDING, "sets, mask of -inf": ignored}
        return 3 * (run.tensor("x", 4, 21, C),), {"key_padding_mask": masks[shape]}
    return (run.tensor("x", int(shape.removeprefix("flat") or N), C),), {}


def layer_options() -> Iterator[tuple[dict[str, Any], torch.dtype]]:
    half, single, double = torch.bfloat16, torch.float32, torch.float64
    train = {"training": True}
    for estimator, rounds, training in itertools.product(ESTIMATORS, (1, 3), (True, False)):
        yield {"estimator": estimator, "rounds": rounds, "training": training}, single
    for estimator, rounds in itertools.product(ESTIMATORS, (1, 3)):
        for shape in ("unsorted", "sets, padded"):
            yield {"estimator": estimator, "rounds": rounds, "shape": shape}, single
        yield {"estimator": estimator, "rounds": rounds, "no_grad": True}, single
        for backend in BACKENDS[:2] if rounds == 1 else ():
            yield {"estimator": estimator, "backend": backend, "batch_size": 20}, single
    for rounds, dtype in itertools.product((1, 3), (double, half)):
        yield {"rounds": rounds, "estimator": "debiased"}, dtype
        yield {"rounds": rounds, "training": True}, dtype
    yield {"backend": "reference"}, single
    yield {"backend": "reference", "estimator": "corrected", "rounds": 3}, double
    shapes = ("sorted", "large ids", "sets", "sets, mask of -inf", "sets, tokens first", "one padded set")
    for shape in (*shapes, "query, key, value", "flat 1", "flat 8", "flat 56"):
        yield {"shape": shape}, single
        yield {"shape": shape, "rounds": 2, "training": True}, single
    for backend in BACKENDS[:2]:
        yield {"estimator": "debiased", "rounds": 3, "backend": backend, "batch_size": 20, "shape": "flat 320"}, single
    yield {"rounds": ALL}, single
    yield {"rounds": 2, "eval_rounds": 4}, single
    yield {"bias": False, "rounds": 2}, single
    yield {"bias": False}, single
    yield {"calls": 2, "training": True}, single
    yield {"autocast": True}, half
    yield {"autocast": True, "rounds": 3, "estimator": "debiased"}, half
    for estimator, rounds, chunk in itertools.product(ESTIMATORS[:2], (1, 3), (2, "auto")):
        yield {"estimator": estimator, "rounds": rounds, "chunk_batches": chunk}, single
    for more in ({"shape": "unsorted"}, {"shape": "sets, padded"}, {"shape": "query, key, value"}, {"no_grad": True}):
        yield {"chunk_batches": 2} | more, single
    yield {"chunk_batches": 2, "rounds": 3, "shape": "unsorted"}, double
    for more in ({}, {"rounds": 3}, {"chunk_batches": 2}, {"shape": "sets, padded"}, {"backend": "reference"}):
        yield {"dropout": 0.3} | train | more, single
    for estimator in ESTIMATORS[1:]:
        yield {"dropout": 0.3, "estimator": estimator} | train, single
    yield {"dropout": 0.3, "backend": "sdpa", "batch_size": 20} | train, single
    for rounds, more in itertools.product((1, 3), ({}, train, {"shape": "unsorted"}, {"shape": "sets, padded"})):
        yield {"interaction": "linear", "rounds": rounds} | more, single
    yield {"interaction": "linear", "chunk_batches": 2}, single
    yield {"interaction": "linear", "rounds": 3}, double


INFERENCE: dict[str, dict[str, Any]] = {
    "exact": {"mode": "exact"},
    "4 rounds": {"rounds": 4, "seed": 9},
    "tolerance": {"tolerance": 0.5},
}


def layers() -> Iterator[Case]:
    for options, dtype in layer_options():
        more = {"same_in_float64": False} if options.get("dropout") and "backend" not in options else {}
        yield case("layer", describe(options), functools.partial(layer, **options), options, dtype, **more)
    for (name, options), shape in itertools.product(INFERENCE.items(), ("flat", "unsorted", "sets, padded")):
        change = functools.partial(rb.set_inference, **options)
        yield case(
            "layer", f"set_inference to {name}, {shape}", functools.partial(layer, shape=shape, change=change), {}
        )
    shapes = ("flat", "unsorted", "sets, padded")
    compiled: list[dict[str, Any]] = [{"shape": shape, "training": True} for shape in shapes]
    compiled += [{"shape": shape, "rounds": 2} for shape in shapes]
    compiled += [{"estimator": estimator} for estimator in ESTIMATORS[1:]]
    compiled += [{"interaction": "linear"}, {"chunk_batches": 2}, {"no_grad": True}]
    compiled += [{"dropout": 0.3, "training": True, "backend": "reference"}]
    for options in compiled:
        yield case("compiled", describe(options), functools.partial(layer, **options), options, compiled=True)


class Mixer(nn.Module):
    """A set function that is no attention: every token and the mean of its set."""

    def __init__(self) -> None:
        super().__init__()
        self.own, self.mean = nn.Linear(C, 5), nn.Linear(C, 5)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.own(x) + self.mean(x.mean(1, keepdim=True)))


def wrapped(run: Run, *, inner: str = "mixer", shape: str = "flat", training: bool = False, **options) -> Arrays:
    module = Mixer() if inner == "mixer" else nn.TransformerEncoderLayer(C, 2, 16, dropout=0.0, batch_first=True)
    model = run.fill(rb.nn.RandomBatch(module, **{"batch_size": 8, "seed": 3} | options), training=training)
    inputs, keywords = layer_inputs(run, shape)
    torch.manual_seed(5)
    batch, mask = keywords.get("batch"), keywords.get("key_padding_mask")
    out = model(inputs[0], None if mask is None else ~mask, batch=batch)
    return run.gradients(out, {"input": inputs[0]}, model)


def wrappers() -> Iterator[Case]:
    shapes = [{"shape": "unsorted"}, {"shape": "sets, padded"}, {"shape": "sets"}]
    rest = [{"rounds": 3}, {"rounds": 3, "training": True}, {"chunk_batches": 2}, {"inner": "encoder", "rounds": 2}]
    for options in ({}, {"training": True}, *shapes, *rest, {"chunk_batches": 2, "rounds": 2, "shape": "unsorted"}):
        yield case("wrapper", describe(options), functools.partial(wrapped, **options), {})
