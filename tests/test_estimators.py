"""Estimators against formulas written out, exact limits, sampling theory and exact attention."""

import functools
import math

import pytest
import torch
from merging import attend_to_met, by_formula, met_matrix, qkv
from torch import Tensor

import randbatch as rb
from randbatch.estimators import ESTIMATORS, anchors
from randbatch.estimators.anchors import Weights
from randbatch.estimators.mean_field import Moments, add_mean_field
from randbatch.interactions import Options
from randbatch.interactions.merge import log_kappa
from randbatch.kernels import BACKENDS, Problem
from randbatch.partition.orthogonal import OrthogonalRounds, draw_rounds

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
EXACT = {"rtol": 1e-11, "atol": 1e-12}


@pytest.mark.parametrize("debias", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("rounds", [1, 3])
@pytest.mark.parametrize("sets", [1, 3])
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_attention_to_the_met_is_its_formula(debias: float, rounds: int, sets: int, backend: str) -> None:
    inputs, weight = qkv(29), torch.randn(29, 2, 6, dtype=torch.float64)
    batch = None if sets == 1 else torch.arange(29) % 11 // 4
    others = torch.full((29,), 28) if batch is None else torch.bincount(batch)[batch] - 1
    parts = rb.orthogonal_partitions(29, 4, rounds, batch=batch, seed=2)
    out = attend_to_met(*inputs, parts, Options(backend=backend), debias)
    want = by_formula(*inputs, parts, debias, others)
    torch.testing.assert_close(out, want, **EXACT)
    got, expected = (torch.autograd.grad((y * weight).sum(), inputs) for y in (out, want))
    torch.testing.assert_close(got, expected, **EXACT)


@pytest.mark.parametrize("backend", ["sdpa", "reference"])
@pytest.mark.parametrize("value_size", [6, 3])
@pytest.mark.parametrize("sets", [1, 4])
def test_one_round_by_a_shift_of_the_own_logit_is_the_same_formula(backend: str, value_size: int, sets: int) -> None:
    """Batches of 5 and of 4 tokens, δ of each head; sets of many sizes, whose batches have κ of their own."""
    query, key, value = (x.detach() for x in qkv(29))
    inputs = [x.requires_grad_() for x in (query, key, value[..., :value_size].clone())]
    batch = None if sets == 1 else torch.tensor([0] * 9 + [1] * 10 + [2] * 5 + [3] * 4 + [4])
    part, debias = rb.random_partition(29, 5, batch=batch, seed=2), torch.tensor([0.25, 1.0], dtype=torch.float64)
    out = attend_to_met(*inputs, part, Options(backend=backend), debias)
    others = torch.full((29,), 28) if batch is None else torch.bincount(batch)[batch] - 1
    alone = [by_formula(*(x[:, h : h + 1] for x in inputs), [part], debias[h].item(), others) for h in (0, 1)]
    want = torch.cat(alone, dim=1)
    torch.testing.assert_close(out, want, **EXACT)
    got, expected = (torch.autograd.grad(y.sin().sum(), inputs) for y in (out, want))
    torch.testing.assert_close(got, expected, **EXACT)


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize(("num_tokens", "batch_size"), [(49, 7), (50, 8), (97, 10), (1000, 64), (50, 2)])
def test_all_rounds_are_full_attention(estimator: str, num_tokens: int, batch_size: int) -> None:
    inputs = qkv(num_tokens, size=4)
    for batch in (None, torch.randint(0, 4, (num_tokens,))):
        want = rb.full_attention(*inputs, batch=batch)
        rounds = {"batch_size": batch_size, "rounds": 10**6, "batch": batch, "estimator": estimator}
        out = rb.random_batch_attention(*inputs, **rounds)
        torch.testing.assert_close(out, want, **EXACT)
        got, expected = (torch.autograd.grad(y.sin().sum(), inputs) for y in (out, want))
        torch.testing.assert_close(got, expected, **EXACT)


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("num_tokens", [1, 2, 3, 40])
def test_one_batch_is_full_attention(estimator: str, num_tokens: int) -> None:
    inputs = qkv(num_tokens)
    for rounds in (1, 2):
        out = rb.random_batch_attention(*inputs, batch_size=40, estimator=estimator, rounds=rounds)
        torch.testing.assert_close(out, rb.full_attention(*inputs), **EXACT)
    batch = torch.arange(num_tokens) % 3
    out = rb.random_batch_attention(*inputs, batch_size=40, estimator=estimator, batch=batch)
    torch.testing.assert_close(out, rb.full_attention(*inputs, batch=batch), **EXACT)


def test_all_rounds_of_linear_are_linear_attention() -> None:
    inputs = qkv(50)
    want = rb.random_batch_attention(*inputs, batch_size=50, interaction="linear")
    out = rb.random_batch_attention(*inputs, batch_size=7, interaction="linear", rounds=100)
    torch.testing.assert_close(out, want, **EXACT)


# Sampling theory


def test_numerator_and_denominator_of_debiased_are_unbiased_with_the_predicted_variance() -> None:
    """Simple random sampling without replacement: Var of a mean of m of M is (1/m − 1/M) S²."""
    num_tokens, batch_size, seeds = 40, 8, 4000
    query, key, value = (x.detach() for x in qkv(num_tokens, heads=1, size=4))
    problem = Problem.of(query, value, None, need_lse=True, exclude_self=True)
    weights = (torch.einsum("ihd,jhd->ij", query, key) * problem.scale).exp().fill_diagonal_(0)
    terms = torch.cat(
        [weights.unsqueeze(2) * value.transpose(0, 1), weights.unsqueeze(2)], dim=2
    )  # [i, j, numerator | 1]
    samples = []
    for seed in range(seeds):
        part = rb.random_partition(num_tokens, batch_size, seed=seed)
        out, lse = BACKENDS["sdpa"].forward(query, key, value, part, problem)
        kappa = log_kappa(part.unpack(part.count_others()), part.unpack(part.count_met()))
        denominator = (lse + kappa.unsqueeze(1)).exp()
        samples.append(torch.cat([out.squeeze(1) * denominator, denominator], dim=1))
    sampled = torch.stack(samples)  # [seeds, i, E + 1]
    error = sampled.std(dim=0) / math.sqrt(seeds)
    deviation = (sampled.mean(dim=0) - terms.sum(dim=1)) / error
    assert deviation.abs().max() < 4.5  # 200 numbers
    assert abs(deviation.square().mean() - 1) < 0.35
    others = num_tokens - 1
    mean = terms.sum(dim=1, keepdim=True) / others
    off_diagonal = ~torch.eye(num_tokens, dtype=torch.bool)
    spread = ((terms - mean).square() * off_diagonal.unsqueeze(2)).sum(dim=1) / (others - 1)
    predicted = others**2 * (1 / (batch_size - 1) - 1 / others) * spread
    ratio = sampled.var(dim=0) / predicted
    assert abs(ratio.mean() - 1) < 0.03
    assert (ratio - 1).abs().max() < 0.1


def test_orthogonal_rounds_are_sampling_without_replacement() -> None:
    """The error falls as √(1/m − 1/M), faster than 1/√R, down to nothing."""
    inputs = [x.detach() for x in qkv(121, heads=4)]
    exact = rb.full_attention(*inputs)
    for rounds in (2, 4, 8):
        errors = [
            [
                (rb.random_batch_attention(*inputs, batch_size=11, rounds=r, seed=s) - exact).norm().item()
                for s in range(20)
            ]
            for r in (1, rounds)
        ]
        first, last = (math.sqrt(sum(e**2 for e in row) / len(row)) for row in errors)
        predicted = math.sqrt((1 / (10 * rounds) - 1 / 120) / (1 / 10 - 1 / 120))
        assert last / first < predicted * 1.25


# Derivatives, dtypes, memory


@pytest.mark.parametrize("rounds", [1, 3])
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_gradcheck(estimator: str, rounds: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The weights of corrected have no gradient by design: here they are fixed."""
    for batch in (None, torch.arange(13) % 5 // 3):
        rows = torch.rand(3, 1 if batch is None else 2, 2, dtype=torch.float64)
        weights = Weights(rows[0].round(), *rows)
        monkeypatch.setattr("randbatch.estimators.corrected.fit_weights", lambda *_, weights=weights: weights)
        options = {"batch_size": 4, "rounds": rounds, "estimator": estimator, "seed": 1, "batch": batch}
        assert torch.autograd.gradcheck(
            functools.partial(rb.random_batch_attention, **options), qkv(13, size=3), fast_mode=True
        )


def test_the_mean_field_is_its_formula() -> None:
    query, key, value = qkv(23)
    batch = torch.arange(23) % 7 // 4
    part = rb.random_partition(23, 4, batch=batch, seed=3)
    weights = tuple(torch.rand(2, 2, dtype=torch.float64) for _ in range(4))  # of two sets and two heads
    local = torch.randn(23, 2, 6, dtype=torch.float64)

    def moments(rows: Tensor) -> tuple[Tensor, Tensor]:
        k, v = key[rows], value[rows]
        return v.mean(0), torch.einsum("jhd,jhe->hde", k - k.mean(0), v - v.mean(0)) / len(rows)

    want = torch.zeros_like(local)
    for block in part.split(part.order):
        for row in block:
            of_local, alpha, beta, nu = (weight[batch[row[0]]] for weight in weights)
            mean, covariance = moments((batch == batch[row[0]]).nonzero().squeeze(1))
            own_mean, own_covariance = moments(row)
            slope = beta[:, None, None] * covariance - nu[:, None, None] * own_covariance
            shift = alpha[:, None] * mean - nu[:, None] * own_mean
            linear = 0.3 * torch.einsum("ihd,hde->ihe", query[row], slope)
            want[row] = of_local[:, None] * local[row] + shift + linear
    out = add_mean_field(query, key, value, local, Moments.of(part, key, value), 0.3, weights)
    torch.testing.assert_close(out, want, **EXACT)
    weight = torch.randn_like(local)
    got, expected = (torch.autograd.grad((y * weight).sum(), (query, key, value)) for y in (out, want))
    torch.testing.assert_close(got, expected, **EXACT)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", ["sdpa", "reference"])
@pytest.mark.parametrize("rounds", [1, 2])
def test_error_within_twice_the_formulas_own(backend: str, dtype: torch.dtype, rounds: int) -> None:
    parts = rb.orthogonal_partitions(96, 9, rounds, seed=2)
    inputs, weight = qkv(96, size=16, dtype=dtype), torch.randn(96, 2, 16, dtype=torch.float64).to(dtype)
    others = torch.full((96,), 95)

    def run(function, dtype: torch.dtype) -> list[Tensor]:
        leaves = [x.detach().to(dtype).requires_grad_() for x in inputs]
        out = function(*leaves)
        return [out.detach(), *torch.autograd.grad((out * weight.to(dtype)).sum(), leaves)]

    truth = run(lambda *x: by_formula(*x, parts, 1.0, others), torch.float64)
    plain = run(lambda *x: by_formula(*x, parts, 1.0, others), dtype)
    ours = run(lambda *x: attend_to_met(*x, parts, Options(backend=backend), 1.0), dtype)
    for exact, theirs, mine in zip(truth, plain, ours, strict=True):
        assert mine.dtype == dtype
        noise = (theirs.double() - exact).norm().item()
        floor = 4 * torch.finfo(dtype).eps * exact.norm().item()
        assert (mine.double() - exact).norm().item() <= max(2 * noise, floor)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rounds", [1, 3])
def test_corrected_in_every_dtype(dtype: torch.dtype, rounds: int) -> None:
    """The estimate errs by far more than rounding: the same error in every dtype."""
    inputs = [x.detach() + 0.5 for x in qkv(500, size=8)]
    exact = rb.full_attention(*inputs)
    options = {"batch_size": 16, "estimator": "corrected", "seed": 1, "rounds": rounds}
    errors = [
        (rb.random_batch_attention(*(x.to(d) for x in inputs), **options).double() - exact).norm() / exact.norm()
        for d in (torch.float64, dtype)
    ]
    assert abs(errors[1] - errors[0]) < 0.05 * errors[0] + 2 * torch.finfo(dtype).eps


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_what_is_saved_does_not_grow_with_the_rounds(estimator: str) -> None:
    inputs = qkv(400, dtype=torch.float32)

    def saved(rounds: int) -> int:
        """Bytes of distinct storages."""
        found: dict[int, int] = {}

        def count(tensor: Tensor) -> Tensor:
            found[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            out = rb.random_batch_attention(*inputs, batch_size=16, rounds=rounds, estimator=estimator)
        assert out.requires_grad  # and nothing was freed while it was counted
        return sum(found.values())

    assert saved(2) == saved(12) < 9 * inputs[0].numel() * 4


def test_dropout() -> None:
    """The mean over many masks is attention without dropout."""
    query, key, value = (x.detach() for x in qkv(20))
    parts = OrthogonalRounds(20, 4, 2)
    want = attend_to_met(query, key, value, parts, Options(), 1.0)
    outs = torch.stack([attend_to_met(query, key, value, parts, Options(dropout_p=0.3), 1.0) for _ in range(500)])
    deviation = (outs.mean(0) - want) / (outs.std(0) / math.sqrt(len(outs)))
    assert deviation.abs().max() < 5
    assert not torch.allclose(outs[0], want)
    inputs = qkv(9, size=3)
    torch.manual_seed(3)
    state = torch.get_rng_state()

    def replay(*x: Tensor) -> Tensor:
        torch.set_rng_state(state)
        return attend_to_met(*x, OrthogonalRounds(9, 3, 2), Options(dropout_p=0.5), 1.0)

    assert torch.autograd.gradcheck(replay, inputs)


# Accuracy


def families() -> dict[str, tuple[Tensor, Tensor, Tensor]]:
    """Soft and peaked, alike and unlike tokens: `[N, 1, D]` each."""
    num_tokens, size = 1024, 16
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    project = [normal(size, size) / size**0.5 for _ in range(3)]
    clusters = normal(12, size)[torch.arange(num_tokens) % 12] + 0.4 * normal(num_tokens, size)
    plain = normal(num_tokens, size)
    keys = normal(num_tokens, size)
    found = {
        "soft": (0.3 * plain @ project[0], plain @ project[1], plain @ project[2]),
        "gauss": (plain @ project[0], plain @ project[1], plain @ project[2]),
        "clusters": (clusters @ project[0], clusters @ project[1], clusters @ project[2]),
        "alike": (clusters @ project[0], clusters @ project[0], clusters @ project[2]),
        "needle": (2 * keys[torch.randperm(num_tokens, generator=generator)], keys, plain),
        "equal keys": (plain, torch.ones_like(plain), keys + 0.3),
        "equal tokens": (torch.ones_like(plain),) * 3,
        "zeros": (torch.zeros_like(plain),) * 3,
    }
    return {name: tuple(x.unsqueeze(1) for x in inputs) for name, inputs in found.items()}


@pytest.mark.parametrize("name", families())
@pytest.mark.parametrize("rounds", [1, 3])
def test_corrected_is_never_worse_than_debiased(name: str, rounds: int) -> None:
    inputs = families()[name]
    exact = rb.full_attention(*inputs)

    def error(estimator: str) -> float:
        options = {"batch_size": 32, "rounds": rounds, "estimator": estimator}
        outs = (rb.random_batch_attention(*inputs, seed=seed, **options) for seed in range(4))
        return math.sqrt(sum((out - exact).square().mean().item() for out in outs) / 4)

    assert error("corrected") <= 1.05 * error("debiased") + 1e-6
    if name in ("soft", "equal keys"):
        assert error("corrected") < 0.1 * error("debiased")


def test_the_weights_say_what_they_should() -> None:
    """Keys and values jointly Gaussian and soft: the mean field is all there is. Heads have weights of their own."""
    found = families()
    inputs = [torch.cat(pair, dim=1) for pair in zip(found["soft"], found["needle"], strict=True)]
    part = rb.random_partition(1024, 32)
    weights = anchors.fit_weights(*inputs, [part], Moments.of(part, *inputs[1:]), 0.25)
    out = rb.random_batch_attention(*inputs, partition=part, estimator="corrected")
    heads = ([x[:, h : h + 1] for x in inputs] for h in (0, 1))
    alone = [rb.random_batch_attention(*head, partition=part, estimator="corrected") for head in heads]
    torch.testing.assert_close(out, torch.cat(alone, dim=1), rtol=1e-3, atol=1e-4)
    assert weights.mu[0, 0].abs() < 0.05  # the batch adds only noise
    assert all(weight.shape == (1, 2) for weight in (weights.debias, weights.mu, weights.beta, weights.nu))


def test_nothing_is_random_but_the_partition() -> None:
    inputs = qkv(300, grad=False)
    options = {"batch_size": 16, "estimator": "corrected", "seed": 4}
    state = torch.get_rng_state()
    first, second = (rb.random_batch_attention(*inputs, **options) for _ in range(2))
    assert torch.equal(first, second)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("rounds", [1, 3])
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_autocast_rounds_the_input_and_nothing_else(estimator: str, rounds: int) -> None:
    """As `scaled_dot_product_attention` does; no sum or moment on the way is in half precision."""
    inputs = qkv(200, dtype=torch.float32, grad=False)
    options = {"batch_size": 12, "estimator": estimator, "rounds": rounds, "backend": "reference"}
    want = rb.random_batch_attention(*(x.bfloat16() for x in inputs), seed=1, **options)
    with torch.autocast("cpu", torch.bfloat16):
        out = rb.random_batch_attention(*inputs, seed=1, **options)
    torch.testing.assert_close(out, want, rtol=1e-2, atol=1e-3)
    exact, floats = (
        rb.random_batch_attention(*(x.bfloat16().to(dtype) for x in inputs), seed=1, **options).double()
        for dtype in (torch.float64, torch.float32)
    )
    assert (out - exact).norm() < 2 * torch.finfo(torch.bfloat16).eps * exact.norm() + 2 * (floats - exact).norm()


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_extreme_input(estimator: str) -> None:
    options = {"batch_size": 8, "estimator": estimator, "rounds": 2}
    query, key, value = qkv(60, dtype=torch.float32, grad=False)
    assert rb.random_batch_attention(300 * query, 300 * key, value, **options).isfinite().all()
    assert rb.random_batch_attention(query, key + 100, value + 1000, **options).isfinite().all()
    key[5, 0, 0] = torch.nan
    assert rb.random_batch_attention(query, key, value, **options)[:, 0].isnan().any()
    empty = rb.random_batch_attention(*(x[:0] for x in (query, key, value)), **options)
    assert empty.shape == (0, 2, 6)


def test_corrected_linear_attention_is_refused() -> None:
    with pytest.raises(ValueError, match="estimator 'corrected' cannot serve interaction 'linear': its mean field"):
        rb.random_batch_attention(*qkv(9), batch_size=4, estimator="corrected", interaction="linear")


@pytest.mark.parametrize("rounds", [1, 3])
@pytest.mark.parametrize("chunk_batches", [None, 2])
def test_debiased_linear_attention_is_its_formula(rounds: int, chunk_batches: int | None) -> None:
    inputs, batch = qkv(29), torch.arange(29) % 11 // 4
    options = {"batch_size": 4, "rounds": rounds, "batch": batch, "seed": 2, "chunk_batches": chunk_batches}
    out = rb.random_batch_attention(*inputs, estimator="debiased", interaction="linear", **options)
    parts = [rb.random_partition(29, 4, batch=batch, seed=2)]
    if rounds > 1:
        parts = list(draw_rounds(29, 4, rounds, batch=batch, seed=2))
    met = met_matrix(parts, 29).fill_diagonal_(False)
    kappa = (torch.bincount(batch)[batch] - 1).double() / met.sum(1).clamp(min=1)
    query, key, value = inputs
    maps = [torch.nn.functional.elu(x) + 1 for x in (query, key)]
    weights = torch.einsum("ihd,jhd->ijh", *maps)
    weights = weights * (met * kappa.unsqueeze(1) + torch.eye(29, dtype=torch.float64)).unsqueeze(2)
    want = torch.einsum("ijh,jhe->ihe", weights / weights.sum(dim=1, keepdim=True), value)
    torch.testing.assert_close(out, want, **EXACT)
    found, expected = (torch.autograd.grad(y.sin().sum(), inputs) for y in (out, want))
    torch.testing.assert_close(found, expected, **EXACT)


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("rounds", [1, 2])
def test_modules_are_the_op(estimator: str, rounds: int) -> None:
    layer = rb.nn.RandomBatchAttention(16, 2, 8, estimator=estimator, rounds=rounds, seed=3, dtype=torch.float64).eval()
    x, batch = torch.randn(60, 16, dtype=torch.float64), torch.arange(60) % 7 // 3
    q, k, v = (
        t.unflatten(1, (2, 8))
        for t in torch.nn.functional.linear(x, layer.in_proj_weight, layer.in_proj_bias).chunk(3, 1)
    )
    out = rb.random_batch_attention(q, k, v, batch_size=8, batch=batch, estimator=estimator, rounds=rounds, seed=3)
    torch.testing.assert_close(layer(x, batch=batch), layer.out_proj(out.flatten(1)), rtol=1e-9, atol=1e-10)
