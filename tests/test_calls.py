"""Layers, and calls of one layer, draw different random batches in eval; the same model draws the same anywhere."""

import copy
import io
import subprocess
import sys
import warnings

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import randbatch as rb
from randbatch.nn import calls


@pytest.fixture(autouse=True)
def _fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calls, "_warned", False)
    monkeypatch.setattr(calls, "_last", None)
    monkeypatch.setattr(calls, "_compared", set())


def reached(model: nn.Module, num_tokens: int = 64) -> int:
    """How many tokens the output of token 0 depends on."""
    x = torch.randn(1, num_tokens, 16, dtype=torch.float64, requires_grad=True)
    (grad,) = torch.autograd.grad(model.double().eval()(x)[0, 0, 0], x)
    return int((grad[0].abs().sum(dim=1) > 1e-12).sum())


def encoder(layers: int = 4) -> nn.Module:
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, dropout=0.0)
    return nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)


class Shared(nn.Module):
    """One attention, called several times."""

    def __init__(self, depth: int = 4) -> None:
        super().__init__()
        self.attention = rb.nn.RandomBatchAttention(16, 2, 8)
        self.depth = depth

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(self.depth):
            x = x + self.attention(x, x, x)[0]
        return x


def test_layers_made_by_hand_differ() -> None:
    layers = [rb.nn.RandomBatchAttention(16, 2, 8) for _ in range(3)] + [rb.nn.RandomBatch(nn.Identity(), 8)]
    assert len({layer.randbatch_config.seed for layer in layers}) == 4


def test_the_same_program_has_the_same_seeds() -> None:
    code = (
        "import randbatch as rb; print([rb.nn.RandomBatchAttention(8, 2, 4).randbatch_config.seed for _ in range(3)])"
    )
    first, second = (
        subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
        for _ in range(2)
    )
    assert first == second


def test_deep_copies_are_told_apart_by_set_inference() -> None:
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, dropout=0.0)
    rb.convert(layer, 8)
    model = nn.TransformerEncoder(layer, 4, enable_nested_tensor=False)
    assert len({each.self_attn.randbatch_config.seed for each in model.layers}) == 1
    with pytest.warns(UserWarning, match=r"set_inference\(model"):
        assert reached(model) == 8
    rb.set_inference(model)
    assert reached(model) == 64


def test_comparing_copies_is_no_reason_to_warn() -> None:
    layer = rb.nn.RandomBatchAttention(16, 2, 8).eval()
    twin = rb.nn.RandomBatchAttention(16, 2, 8, seed=layer.randbatch_config.seed).eval()
    x = torch.randn(64, 16)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        layer(x)
        twice = copy.deepcopy(layer)
        twice(x.clone())
        layer(3 * x)
        twice(3 * x)
        twin(torch.randn(64, 16))
        layer(x)
        layer(2 * x)


def test_converted_layers_differ() -> None:
    model = encoder()
    rb.convert(model, 8)
    assert reached(model) == 64


def test_a_shared_module_draws_anew_in_each_call() -> None:
    model = Shared()
    assert reached(model) == 8
    rb.set_inference(model)
    assert reached(model) > 56


def test_eval_is_a_function_of_the_model_and_its_input() -> None:
    model = Shared().eval()
    rb.set_inference(model, seed=3)
    x = torch.randn(1, 64, 16)
    out = model(x)
    assert torch.equal(model(x), out)
    assert torch.equal(copy.deepcopy(model)(x), out)
    part = model.attention(x, x, x)[0]  # by itself it is no further call
    assert torch.equal(model.attention(x, x, x)[0], part)
    assert torch.equal(model(x), out)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    assert torch.equal(torch.load(file, weights_only=False)(x), out)
    other = Shared().eval()
    other.load_state_dict(model.state_dict())
    rb.set_inference(other, seed=3)
    assert torch.equal(other(x), out)
    rb.set_inference(model, seed=4)
    assert not torch.equal(model(x), out)


def test_set_inference_twice_counts_once() -> None:
    model = Shared().eval()
    x = torch.randn(1, 64, 16)
    rb.set_inference(model)
    out = model(x)
    rb.set_inference(model)
    assert torch.equal(model(x), out)
    assert len(model._forward_pre_hooks) == len(model._forward_hooks) == 1


def test_a_call_that_failed_does_not_count() -> None:
    model = Shared().eval()
    rb.set_inference(model)
    x = torch.randn(1, 64, 16)
    out = model(x)
    with pytest.raises(ValueError, match="query must be"):
        model(x[..., :3])
    assert torch.equal(model(x), out)


def test_checkpointing_a_shared_module_in_eval_raises() -> None:
    """Which of the calls is computed again is not known; other batches would be a silently wrong gradient."""

    class Checkpointed(Shared):
        def forward(self, x: Tensor) -> Tensor:
            for _ in range(self.depth):
                x = x + checkpoint(lambda x: self.attention(x, x, x)[0], x, use_reentrant=False)
            return x

    model = Checkpointed().eval()
    rb.set_inference(model)
    out = model(torch.randn(1, 64, 16, requires_grad=True))
    with pytest.raises(RuntimeError, match="checkpointing cannot compute"):
        out.sum().backward()
    model.train()(torch.randn(1, 64, 16, requires_grad=True)).sum().backward()


@pytest.mark.parametrize("options", [{}, {"rounds": 3}, {"estimator": "debiased"}, {"chunk_batches": 2}])
def test_a_graph_in_eval_is_as_if_it_were_alone(options: dict) -> None:
    layer = rb.nn.RandomBatchAttention(16, 2, 8, **options).double().eval()
    sizes = (13, 40, 29, 9)
    graphs = [torch.randn(size, 16, dtype=torch.float64) for size in sizes]
    batch = torch.tensor([5, 9, 10**12, 10**13]).repeat_interleave(torch.tensor(sizes))
    together = layer(torch.cat(graphs), batch=batch).split(sizes)
    for graph, out in zip(graphs, together, strict=True):
        torch.testing.assert_close(out, layer(graph), rtol=1e-10, atol=1e-10)
    padded = nn.utils.rnn.pad_sequence(graphs, batch_first=True)
    padding = torch.arange(40) >= torch.tensor(sizes).unsqueeze(1)
    out = layer(padded, padded, padded, key_padding_mask=padding)[0]
    for row, graph in zip(out, graphs, strict=True):
        torch.testing.assert_close(row[: len(graph)], layer(graph), rtol=1e-10, atol=1e-10)


def test_equal_graphs_share_no_batches_in_training() -> None:
    layer = rb.nn.RandomBatchAttention(16, 2, 8).train()
    graph = torch.randn(32, 16)
    batch = torch.arange(6).repeat_interleave(32)
    outs = layer(graph.repeat(6, 1), batch=batch).view(6, 32, 16)
    assert all(not torch.allclose(outs[0], outs[number]) for number in range(1, 6))


def test_cross_attention_of_equal_lengths_is_refused() -> None:
    layer = rb.nn.RandomBatchAttention(16, 2, 8).eval()
    x, memory = torch.randn(2, 3, 40, 16)
    with pytest.raises(ValueError, match="same_tokens=True"):
        layer(x, memory, memory)
    assert layer(x, x, memory)[0].shape == x.shape  # values belong to the keys
    assert layer(x, x + 1, x, same_tokens=True)[0].shape == x.shape
    assert torch.equal(layer(x, x.clone(), x)[0], layer(x, x, x)[0])
