"""Batches in pieces: the same numbers as all at once, in less memory."""

import copy
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import randbatch as rb
from randbatch.nn import RandomBatch, RandomBatchAttention
from randbatch.streaming import piece_size

FLOAT64 = {"rtol": 1e-12, "atol": 1e-12}
GRAPHS = torch.tensor([0] * 25 + [3] * 9 + [1] * 17 + [4])[
    torch.randperm(52, generator=torch.Generator().manual_seed(0))
]
PIECES = [1, 3]


def op(batch: Tensor | None = None, **options) -> list[Tensor]:
    """Output and gradients of the op."""
    generator = torch.Generator().manual_seed(0)
    *qkv, grad = torch.randn(4, 52, 2, 4, dtype=torch.float64, generator=generator)
    for tensor in qkv:
        tensor.requires_grad_()
    torch.manual_seed(3)
    out = rb.random_batch_attention(*qkv, batch_size=8, seed=1, batch=batch, **options)
    return [out, *torch.autograd.grad(out, qkv, grad)]


@pytest.mark.parametrize("chunk", PIECES)
@pytest.mark.parametrize("rounds", [1, 3])
@pytest.mark.parametrize("batch", [None, GRAPHS], ids=["one set", "graphs"])
@pytest.mark.parametrize("estimator", ["plain", "debiased"])
def test_the_op_in_pieces_is_the_op(estimator: str, batch: Tensor | None, rounds: int, chunk: int) -> None:
    options = {"batch": batch, "estimator": estimator, "rounds": rounds}
    torch.testing.assert_close(op(**options, chunk_batches=chunk), op(**options), **FLOAT64)


@pytest.mark.parametrize("options", [{"interaction": "linear"}, {"backend": "reference", "scale": 0.3}])
def test_interactions_and_backends(options: dict) -> None:
    torch.testing.assert_close(op(**options, chunk_batches=2), op(**options), **FLOAT64)


@pytest.mark.parametrize("rounds", [1, 3])
@pytest.mark.parametrize("estimator", ["plain", "debiased"])
@pytest.mark.parametrize("batch", [None, GRAPHS], ids=["one set", "graphs"])
def test_dropout_is_replayed(estimator: str, rounds: int, batch: Tensor | None) -> None:
    """One piece draws what the op draws all at once; several are differentiated numerically."""
    options = {"batch": batch, "estimator": estimator, "rounds": rounds, "dropout_p": 0.4}
    torch.testing.assert_close(op(**options, chunk_batches=1000), op(**options), **FLOAT64)

    def dropped(*qkv: Tensor) -> Tensor:
        torch.manual_seed(5)
        mine = None if batch is None else batch[:11]
        return rb.random_batch_attention(*qkv, batch_size=4, seed=1, chunk_batches=1, **(options | {"batch": mine}))

    qkv = [torch.randn(11, 1, 2, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    assert torch.autograd.gradcheck(dropped, qkv)
    before = torch.get_rng_state()
    out = rb.random_batch_attention(*qkv, batch_size=4, chunk_batches=1, dropout_p=0.4, seed=1)
    after = torch.get_rng_state()
    out.sum().backward()
    assert not torch.equal(before, after)
    assert torch.equal(after, torch.get_rng_state())  # backward draws, but takes nothing from what comes later


def layers(**options) -> tuple[RandomBatchAttention, RandomBatchAttention]:
    """The same layer, all at once and in pieces."""
    whole = RandomBatchAttention(16, 4, 8, dtype=torch.float64, **options)
    for parameter in whole.parameters():
        nn.init.normal_(parameter, std=0.5)
    pieces = copy.deepcopy(whole)
    pieces.randbatch_config.chunk_batches = 2
    return whole, pieces


def run(module: nn.Module, *inputs: Tensor, **options) -> list[Tensor]:
    """Output and gradients, by the inputs and by every parameter."""
    torch.manual_seed(2)
    out = module(*inputs, **options)
    out = out[0] if isinstance(out, tuple) else out
    return [out, *torch.autograd.grad(out.sin().sum(), [*dict.fromkeys(inputs), *module.parameters()])]


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("options", [{}, {"rounds": 3}, {"estimator": "debiased"}, {"bias": False}])
def test_the_layer_in_pieces_is_the_layer(options: dict, training: bool) -> None:
    whole, pieces = (layer.train(training) for layer in layers(**options))
    x, y, z = torch.randn(3, 52, 16, dtype=torch.float64).requires_grad_().unbind()
    torch.testing.assert_close(run(pieces, x), run(whole, x), **FLOAT64)
    torch.testing.assert_close(run(pieces, x, batch=GRAPHS), run(whole, x, batch=GRAPHS), **FLOAT64)
    same = [run(layer, x, y, z, same_tokens=True) for layer in (pieces, whole)]
    torch.testing.assert_close(*same, **FLOAT64)
    torch.testing.assert_close(run(pieces, x, x, y), run(whole, x, x, y), **FLOAT64)
    sets = torch.randn(3, 20, 16, dtype=torch.float64, requires_grad=True)
    padding = torch.arange(20) >= torch.tensor([20, 7, 0]).unsqueeze(1)
    same = [run(layer, sets, sets, sets, key_padding_mask=padding) for layer in (pieces, whole)]
    torch.testing.assert_close(*same, **FLOAT64)
    want = run(pieces, x)[0]
    with torch.no_grad():
        torch.manual_seed(2)
        assert torch.equal(pieces(x), want)


def test_only_what_is_needed_is_differentiated() -> None:
    whole, pieces = layers()
    x = torch.randn(52, 16, dtype=torch.float64)
    for layer in (whole, pieces):
        layer.in_proj_weight.requires_grad_(False)
        torch.manual_seed(0)
        layer(x).sin().sum().backward()
    assert pieces.in_proj_weight.grad is None
    torch.testing.assert_close(pieces.out_proj.weight.grad, whole.out_proj.weight.grad, **FLOAT64)
    torch.testing.assert_close(pieces.in_proj_bias.grad, whole.in_proj_bias.grad, **FLOAT64)


@pytest.mark.parametrize("rounds", [1, 2])
def test_autocast_is_replayed(rounds: int) -> None:
    whole, pieces = (layer.float() for layer in layers(rounds=rounds))
    x = torch.randn(52, 16, requires_grad=True)
    exact = run(whole, x)
    with torch.autocast("cpu", torch.bfloat16):
        torch.manual_seed(2)
        outs = [layer(x) for layer in (whole, pieces) if torch.manual_seed(2)]
    grads = [
        torch.autograd.grad(out.float().sin().sum(), [x, *layer.parameters()])
        for out, layer in zip(outs, (whole, pieces), strict=True)
    ]
    assert outs[1].dtype == torch.bfloat16
    for want, once, again in zip(exact, (outs[0], *grads[0]), (outs[1], *grads[1]), strict=True):
        noise = (once.float() - want).norm()
        assert (again.float() - want).norm() <= 2 * noise  # no further from fp32 than all at once


def test_parameters_that_are_exchanged_are_missed() -> None:
    _, pieces = layers()
    x = torch.randn(52, 16, dtype=torch.float64)
    other = {name: parameter.detach().clone().requires_grad_() for name, parameter in pieces.named_parameters()}
    out = torch.func.functional_call(pieces, other, (x,))
    with pytest.raises(RuntimeError, match="parameters are others by now"):
        out.sum().backward()


class SetModule(nn.Module):
    """Attention with dropout and a change of width."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(16, 4, batch_first=True, dtype=torch.float64)
        self.out = nn.Linear(16, 5, dtype=torch.float64)
        self.sizes: list[int] = []

    def forward(self, x: Tensor) -> Tensor:
        self.sizes.append(len(x))
        return self.out(x + self.attention(x, x, x, need_weights=False)[0])


@pytest.mark.parametrize("rounds", [1, 3])
def test_the_wrapper_in_pieces(rounds: int) -> None:
    whole = RandomBatch(SetModule(), 8, rounds=rounds)
    pieces = RandomBatch(copy.deepcopy(whole.module), 8, rounds=rounds, chunk_batches=2)
    x = torch.randn(52, 16, dtype=torch.float64, requires_grad=True)
    torch.testing.assert_close(run(pieces, x), run(whole, x), **FLOAT64)
    torch.testing.assert_close(run(pieces, x, batch=GRAPHS), run(whole, x, batch=GRAPHS), **FLOAT64)
    assert max(pieces.module.sizes) == 2


def test_converted_modules() -> None:
    outs = []
    for chunk in (None, 1):
        torch.manual_seed(0)
        model = nn.TransformerEncoderLayer(16, 4, 32, dropout=0.0, batch_first=True)
        rb.convert(model, 8, chunk_batches=chunk)
        outs.append(run(model, torch.ones(2, 20, 16).cumsum(1).sin().requires_grad_()))
    torch.testing.assert_close(*outs, rtol=1e-5, atol=1e-5)


def test_pieces_cover_every_batch_once() -> None:
    part = rb.random_partition(52, 8, batch=GRAPHS, seed=0)
    for num in (1, 2, 3, 5, 100):
        rows, pieces = zip(*part.chunks(num), strict=True)
        assert torch.equal(torch.cat(rows), part.order)
        assert [piece.num_batches for piece in pieces][:-1] == [num] * (len(pieces) - 1)
        assert torch.equal(torch.cat([piece.count_others() for piece in pieces]), part.count_others())
        assert torch.equal(torch.cat([piece.count_met() for piece in pieces]), part.count_met())
        assert not any(piece.is_whole for piece in pieces)


def test_auto_follows_free_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    part = rb.random_partition(1000, 10)
    monkeypatch.setattr("randbatch.streaming.free_bytes", lambda device: 8000)
    assert piece_size("auto", part, 100) == 4  # half of it holds 4 batches of 10 tokens of 100 bytes
    assert piece_size("auto", part, 10**6) == 1
    assert piece_size(7, part, 10**6) == 7
    monkeypatch.undo()
    assert piece_size("auto", part, 1) > 100
    torch.testing.assert_close(op(chunk_batches="auto"), op(), **FLOAT64)


def test_no_tokens() -> None:
    layer = RandomBatchAttention(16, 4, 8, chunk_batches=2)
    assert layer(torch.randn(0, 16)).shape == (0, 16)
    assert layer(torch.randn(1, 16)).shape == (1, 16)
    layer.randbatch_config.rounds = 3
    assert layer(torch.randn(0, 16)).shape == (0, 16)


@pytest.mark.unchecked
def test_bad_input() -> None:
    x = torch.randn(52, 16)
    for value, error in ((0, ValueError), ("all", ValueError), (2.0, TypeError)):
        with pytest.raises(error, match="chunk_batches"):
            op(chunk_batches=value)
        with pytest.raises(error, match="chunk_batches"):
            RandomBatchAttention(16, 4, 8, chunk_batches=value)
    with pytest.raises(ValueError, match="chunk_batches must be None with estimator 'corrected'"):
        op(chunk_batches=2, estimator="corrected")
    layer = RandomBatchAttention(16, 4, 8, estimator="corrected")
    layer.randbatch_config.chunk_batches = 2
    with pytest.raises(ValueError, match="chunk_batches must be None with estimator 'corrected'"):
        layer(x)
    with pytest.raises(ValueError, match="chunk_batches must be None with several rounds of interaction 'linear'"):
        op(chunk_batches=2, interaction="linear", rounds=2)
    wrapped = RandomBatch(nn.Identity(), 8)
    wrapped.randbatch_config.chunk_batches = "auto"
    with pytest.raises(ValueError, match="chunk_batches must be an int or None here"):
        wrapped(x)


def test_memory_does_not_depend_on_the_number_of_tokens() -> None:
    """A process of its own: what a step of a quarter of a million tokens needs beside its tokens, below 64 MB."""
    script = Path(__file__).parent.parent / "benchmarks" / "streaming_memory.py"
    command = [sys.executable, str(script), "--case", "18", "auto", "128"]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    assert json.loads(done.stdout.splitlines()[-1])["bytes"] < 64e6
