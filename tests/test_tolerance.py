"""Rounds chosen by tolerance: the stated error against the true one, and against the op at every token."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

import randbatch as rb
from randbatch import tolerance as tolerance_module
from randbatch.estimators import ESTIMATORS
from randbatch.estimators.probe import AtTokens, Probe
from randbatch.partition.orthogonal import draw_rounds


def qkv(num_tokens: int, sharpness: float = 1.0, seed: int = 0, heads: int = 2, size: int = 8) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    query, key, value = torch.randn(3, num_tokens, heads, size, generator=generator, dtype=torch.float64).unbind()
    return sharpness * query, key, value + key


def relative(out: Tensor, exact: Tensor) -> float:
    return float((out - exact).norm() / exact.norm())


@pytest.mark.parametrize("graphs", [1, 3])
@pytest.mark.parametrize("rounds", [1, 4])
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_estimates_at_chosen_tokens_are_those_of_the_op(estimator: str, rounds: int, graphs: int) -> None:
    inputs = qkv(301)
    batch = None if graphs == 1 else torch.arange(301) % 17 // 6
    tokens = torch.tensor([[0, 7, 300], [5, 5, 123]])
    parts = draw_rounds(301, 20, rounds, batch=batch, seed=3)
    sampled = Probe(*inputs, tokens, 8**-0.5, list(ESTIMATORS.values()))
    for part in parts:
        sampled.add(part)
    whole = rb.random_batch_attention(*inputs, batch_size=20, rounds=rounds, batch=batch, estimator=estimator, seed=3)
    want = torch.stack([whole[rows, head] for head, rows in enumerate(tokens)])
    loose = 1e-7 if estimator == "corrected" else 1e-12  # its weights come from normal equations
    torch.testing.assert_close(sampled.outputs()[estimator], want, rtol=loose, atol=loose)


def test_many_tokens_are_looked_at_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs, tokens, part = qkv(200), torch.arange(60).expand(2, -1), rb.random_partition(200, 30, seed=1)
    outs: list[Tensor] = []
    for gathered in (2**24, 2000):
        monkeypatch.setattr("randbatch.estimators.probe._GATHERED", gathered)
        sampled = Probe(*inputs, tokens, 0.3, [ESTIMATORS["debiased"]])
        sampled.add(part)
        outs.append(sampled.outputs()["debiased"])
    torch.testing.assert_close(*outs, rtol=1e-13, atol=1e-14)


def test_the_stated_error_holds_in_nine_of_ten_random_problems() -> None:
    held, problems, names = 0, 200, list(ESTIMATORS)
    for seed in range(problems):
        generator = torch.Generator().manual_seed(seed)

        def draw(*choices: float, generator: torch.Generator = generator) -> float:
            return choices[int(torch.randint(len(choices), (), generator=generator))]

        num_tokens, p = int(draw(900, 1200, 1500)), int(draw(64, 128, 200))
        tolerance, estimator = draw(0.15, 0.3, 0.5), names[seed % len(names)]
        inputs = [x.float() for x in qkv(num_tokens, draw(0.5, 1.0, 2.0), seed, heads=1)]
        choice = rb.choose_rounds(*inputs, p, tolerance, estimator=estimator, seed=seed)
        assert choice.error <= tolerance
        out = rb.random_batch_attention(*inputs, batch_size=p, rounds=choice.rounds, estimator=estimator, seed=seed)
        held += relative(out, rb.full_attention(*inputs)) <= max(choice.error, 1e-5)  # 1e-5: fp32, once all have met
    assert held >= 0.9 * problems, held


def test_one_round_less_would_not_have_done() -> None:
    inputs = qkv(500)  # fewer tokens than are sampled: the error is known, not estimated
    choice = rb.choose_rounds(*inputs, 25, 0.5, estimator="debiased")
    assert not choice.exact
    exact = rb.full_attention(*inputs)
    errors = [
        relative(rb.random_batch_attention(*inputs, batch_size=25, rounds=r, estimator="debiased", seed=0), exact)
        for r in (choice.rounds - 1, choice.rounds)
    ]
    assert errors[1] <= 0.5 < errors[0]
    assert choice.error == pytest.approx(errors[1], rel=1e-6)


def test_the_op_takes_the_rounds_that_are_chosen() -> None:
    inputs = qkv(700)
    choice = rb.choose_rounds(*inputs, 30, 0.2, seed=5)
    assert choice.rounds > 1
    out = rb.random_batch_attention(*inputs, batch_size=30, tolerance=0.2, seed=5)
    torch.testing.assert_close(out, rb.random_batch_attention(*inputs, batch_size=30, rounds=choice.rounds, seed=5))
    torch.manual_seed(0)
    first = rb.random_batch_attention(*inputs, batch_size=30, tolerance=0.2)
    torch.manual_seed(0)
    torch.testing.assert_close(rb.random_batch_attention(*inputs, batch_size=30, tolerance=0.2), first)


def test_gradients_are_those_of_the_rounds() -> None:
    inputs = [x.requires_grad_() for x in qkv(150)]
    rounds = rb.choose_rounds(*inputs, 20, 0.3).rounds
    outs = [
        rb.random_batch_attention(*inputs, batch_size=20, seed=0, **how)
        for how in ({"tolerance": 0.3}, {"rounds": rounds})
    ]
    torch.testing.assert_close(*(torch.autograd.grad(out.square().sum(), inputs) for out in outs))


@pytest.mark.parametrize("batch", [None, torch.arange(120) % 7 // 3])
def test_a_tiny_tolerance_ends_at_full_attention(batch: Tensor | None) -> None:
    inputs = qkv(120)
    choice = rb.choose_rounds(*inputs, 11, 1e-14, batch=batch)
    assert choice.exact and 0 < choice.error < 1e-13
    out = rb.random_batch_attention(*inputs, batch_size=11, tolerance=1e-14, batch=batch, seed=0)
    torch.testing.assert_close(out, rb.full_attention(*inputs, batch=batch), rtol=1e-12, atol=1e-12)


def test_one_batch_is_exact_but_for_rounding() -> None:
    assert rb.choose_rounds(*qkv(0), 16, 0.5) == rb.RoundsChoice(1, 0.0, exact=True)
    for inputs, batch in ((qkv(10), None), (qkv(20), torch.arange(20) // 10)):
        choice = rb.choose_rounds(*inputs, 16, 0.5, batch=batch)
        assert (choice.rounds, choice.exact) == (1, True)
        assert 0 < choice.error < 1e-13


def test_every_stated_error_is_a_number() -> None:
    query, key, value = qkv(100)
    assert rb.choose_rounds(query, key, 0 * value, 10, 0.1) == rb.RoundsChoice(1, 0.0)
    with pytest.raises(ValueError, match="the exact attention of all 100 tokens that were looked at is not"):
        rb.choose_rounds(query, key * math.nan, value, 10, 0.1)
    query[7] = math.nan  # the row of that query is NaN in every estimate, and says nothing of the others
    choice = rb.choose_rounds(query, key, value, 10, 0.5)
    assert choice == rb.choose_rounds(query, key, value, 10, 0.5)
    assert 0 < choice.error <= 0.5
    zeros = torch.zeros_like(query)
    value[50:] = -value[:50]
    choice = rb.choose_rounds(zeros, zeros, value, 10, 0.5)  # exact attention is 0: no estimate has a relative error
    assert choice.exact and math.isfinite(choice.error)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_rounding_is_stated(dtype: torch.dtype) -> None:
    """Exact attention, at once and by all rounds, against numpy's longest numbers."""
    for sharpness in (0.1, 1.0, 10.0, 100.0):
        for offset in (0.0, 30.0):
            query, key, value = (x.to(dtype) for x in qkv(200, sharpness, heads=1))
            value = value + offset
            choice = rb.choose_rounds(query, key, value, 12, 1e-20)
            assert choice.exact
            q, k, v = (x[:, 0].double().numpy().astype(np.longdouble) for x in (query, key, value))
            logits = q @ k.T / np.sqrt(np.longdouble(8))
            weights = np.exp(logits - logits.max(axis=1, keepdims=True))
            exact = torch.from_numpy((weights @ v / weights.sum(axis=1, keepdims=True)).astype(np.float64))
            outs = (
                rb.full_attention(query, key, value),
                rb.random_batch_attention(query, key, value, batch_size=12, rounds=choice.rounds, seed=0),
            )
            for out in outs:
                assert relative(out[:, 0].double(), exact) <= choice.error
            assert choice.error < 1000 * torch.finfo(dtype).eps


def test_the_sample_is_random_and_of_the_seed_alone() -> None:
    query = torch.empty(1000, 2, 4)
    tokens = tolerance_module.sample_tokens(query, 100, 3)
    assert tokens.shape == (2, 100)
    assert torch.equal(tokens[0], tokens[1])
    assert tokens[0].unique().numel() == 100
    assert torch.equal(tokens, tolerance_module.sample_tokens(query.double() + 1, 100, 3))
    times = torch.zeros(1000)
    for seed in range(500):
        times[tolerance_module.sample_tokens(query, 100, seed)[0]] += 1
    spread = (times - 50).square().sum() / (500 * 0.1 * 0.9)  # chi-squared of 1000, for it is without repetition
    assert 850 < spread < 1150
    assert tolerance_module.sample_tokens(query, 2000, 0)[0].sort().values.tolist() == list(range(1000))


@pytest.mark.parametrize("heavy", [False, True])
def test_the_stated_error_holds_for_ordered_graphs(heavy: bool) -> None:
    """Small graphs first and large ones last, of values unlike in size, and in some with heavy tails."""
    held, problems = 0, 60
    for seed in range(problems):
        generator = torch.Generator().manual_seed(seed)
        sizes = torch.cat([torch.randint(5, 60, (25,), generator=generator), torch.tensor([300, 500])])
        batch = torch.arange(27).repeat_interleave(sizes)
        query, key, value = torch.randn(3, len(batch), 1, 8, generator=generator).unbind()
        value = value * torch.randn(27, generator=generator).exp()[batch][:, None, None] + key
        if heavy:
            value = value / torch.rand(len(batch), 1, 1, generator=generator).clamp(min=1e-3).sqrt()
        estimator = list(ESTIMATORS)[seed % 3]
        options = {"batch": batch, "estimator": estimator, "seed": seed}
        choice = rb.choose_rounds(query, key, value, 32, 0.3, **options)
        out = rb.random_batch_attention(query, key, value, batch_size=32, rounds=choice.rounds, **options)
        held += relative(out, rb.full_attention(query, key, value, batch=batch)) <= choice.error <= 0.3
    assert held >= (0.9 if heavy else 0.95) * problems, held


def test_one_large_graph_behind_many_small_ones_is_seen() -> None:
    batch = torch.cat([torch.arange(60).repeat_interleave(10), torch.full((400,), 60)])
    inputs = qkv(1000)
    choice = rb.choose_rounds(*inputs, 32, 0.05, batch=batch)
    out = rb.random_batch_attention(*inputs, batch_size=32, rounds=choice.rounds, batch=batch, seed=0)
    assert relative(out, rb.full_attention(*inputs, batch=batch)) <= choice.error <= 0.05


@pytest.mark.parametrize("unlike", [False, True])
def test_what_cannot_be_reached_is_left_to_exact_attention(unlike: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before much was looked at: fewer products than the exact attention of the sample takes."""
    looked = 0
    add = AtTokens.add

    def count(self: AtTokens, part: rb.Partition) -> None:
        nonlocal looked
        looked += self.tokens.shape[1] * part.num_slots
        add(self, part)

    monkeypatch.setattr(AtTokens, "add", count)
    inputs, batch = qkv(3000), torch.arange(3000) // 1700 if unlike else None
    choice = rb.choose_rounds(*inputs, 20, 0.01, batch=batch)
    assert choice.exact and choice.error <= 0.01
    assert looked < 0.1 * 512 * 3000
    out = rb.random_batch_attention(*inputs, batch_size=20, rounds=choice.rounds, batch=batch, seed=0)
    assert relative(out, rb.full_attention(*inputs, batch=batch)) <= choice.error


def test_max_rounds_states_what_is_left() -> None:
    choice = rb.choose_rounds(*qkv(400), 10, 0.01, max_rounds=3)
    assert choice.rounds == 3
    assert choice.error > 0.01


def test_the_bound_is_the_error_plus_three_standard_errors() -> None:
    torch.manual_seed(0)
    out, exact = torch.randn(2, 1, 400, 3, dtype=torch.float64).unbind()
    e, y = ((x * x).sum((0, 2)) for x in (out - exact, exact))
    ratio = e.mean() / y.mean()
    spread = (e - ratio * y).std() / y.mean() / 20
    assert tolerance_module.relative_error_bound(out, exact, 10**9) == pytest.approx(
        math.sqrt(ratio + 3 * spread), rel=1e-6
    )
    assert tolerance_module.relative_error_bound(out, exact, 400) == pytest.approx(relative(out, exact), rel=1e-12)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"tolerance": 0.0}, ValueError, "tolerance must be a finite number > 0, got 0.0"),
        ({"tolerance": math.nan}, ValueError, "tolerance must be"),
        ({"tolerance": 0.1, "rounds": 2}, ValueError, "rounds must be left at 1"),
        ({"tolerance": 0.1, "dropout_p": 0.1}, ValueError, "dropout_p must be 0"),
        ({"tolerance": 0.1, "interaction": "linear"}, ValueError, "tolerance must be None with interaction 'linear'"),
        ({"tolerance": 0.1, "partition": rb.random_partition(40, 8)}, ValueError, "partition must be left out"),
        ({"tolerance": 0.1, "estimator": "plane"}, ValueError, "Did you mean 'plain'"),
    ],
)
def test_what_does_not_go_together_is_named(options: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        rb.random_batch_attention(*qkv(40), batch_size=8, **options)


def attention(**options) -> rb.nn.RandomBatchAttention:
    torch.manual_seed(0)
    return rb.nn.RandomBatchAttention(16, 2, 20, **options).eval()


def test_modules_choose_their_rounds_in_eval() -> None:
    layer, x = attention(), 3 * torch.randn(400, 16)
    assert rb.set_inference(layer, tolerance=0.05) == 1
    out = layer(x)
    choice = layer.randbatch_config.chosen
    assert choice is not None and choice.rounds > 1 and choice.error <= 0.05
    rb.set_inference(layer, rounds=choice.rounds)
    torch.testing.assert_close(layer(x), out)
    assert layer.randbatch_config.chosen is None
    rb.set_inference(layer, tolerance=0.05)
    layer.train()
    layer(x)
    assert layer.randbatch_config.chosen is None, "training draws what `rounds` says"


def test_converted_models_choose_their_rounds_layer_by_layer() -> None:
    torch.manual_seed(0)
    layer = torch.nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    model = torch.nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval()
    x, padding = 2 * torch.randn(2, 90, 16), torch.arange(90) >= torch.tensor([[90], [60]])
    want = model(x, src_key_padding_mask=padding)
    rb.convert(model, batch_size=8)
    rb.set_inference(model, tolerance=1e-9)
    out = model(x, src_key_padding_mask=padding)
    torch.testing.assert_close(out[~padding], want[~padding], rtol=1e-5, atol=1e-5)
    chosen = [block.self_attn.randbatch_config.chosen for block in model.layers]
    assert all(choice.exact and 0 < choice.error < 1e-4 for choice in chosen)


def test_what_has_no_known_error_refuses_a_tolerance() -> None:
    wrapped = rb.nn.RandomBatch(torch.nn.Identity(), 8).eval()
    rb.set_inference(wrapped, tolerance=0.1)
    with pytest.raises(ValueError, match="it is for softmax attention"):
        wrapped(torch.randn(50, 4))
    linear = attention(interaction="linear")
    rb.set_inference(linear, tolerance=0.1)
    with pytest.raises(ValueError, match="it is for softmax attention"):
        linear(torch.randn(50, 16))


@pytest.mark.parametrize(
    "options", [{"mode": "exact", "tolerance": 0.1}, {"rounds": 2, "tolerance": 0.1}, {"tolerance": -1.0}]
)
def test_set_inference_names_what_does_not_fit(options: dict) -> None:
    with pytest.raises(ValueError, match="tolerance"):
        rb.set_inference(attention(), **options)
