"""The modules against torch's own attention, in train and eval, and against calls counted."""

import copy

import pytest
import torch
from torch import Tensor, nn

import randbatch as rb
from randbatch.nn import RandomBatch, RandomBatchAttention

FLOAT64 = {"rtol": 1e-12, "atol": 1e-12}


def pair(batch_size: int = 1000, **options) -> tuple[nn.MultiheadAttention, RandomBatchAttention]:
    """torch's attention and ours with the same weights, biases not zero."""
    ours = RandomBatchAttention(16, 4, batch_size, dtype=torch.float64, **options)
    for parameter in ours.parameters():
        nn.init.normal_(parameter, std=0.5)
    torchs = nn.MultiheadAttention(
        16, 4, bias=options.get("bias", True), batch_first=options.get("batch_first", True), dtype=torch.float64
    )
    torchs.load_state_dict(ours.state_dict())
    return torchs, ours


def assert_same(ours, theirs, inputs: Tensor, parameters: tuple) -> None:
    """Same outputs and gradients, for the input and every parameter."""
    grads = []
    for function, module in zip((ours, theirs), parameters, strict=True):
        out = function(inputs)
        grads.append((out, *torch.autograd.grad(out.sin().sum(), [inputs, *module.parameters()])))
    torch.testing.assert_close(*grads, **FLOAT64)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("rounds", [1, 2])
def test_one_batch_is_multihead_attention(training: bool, bias: bool, rounds: int) -> None:
    torchs, ours = pair(batch_size=50, bias=bias, rounds=rounds)
    torchs.train(training), ours.train(training)
    flat = torch.randn(50, 16, dtype=torch.float64, requires_grad=True)
    assert_same(ours, lambda x: torchs(x, x, x)[0], flat, (ours, torchs))
    padded = torch.randn(3, 20, 16, dtype=torch.float64, requires_grad=True)
    assert_same(lambda x: ours(x, x, x)[0], lambda x: torchs(x, x, x)[0], padded, (ours, torchs))
    assert_same(ours, lambda x: torchs(x, x, x)[0], padded, (ours, torchs))


@pytest.mark.parametrize("kind", ["bool", "float"])
@pytest.mark.parametrize("batch_first", [True, False])
def test_padding(kind: str, batch_first: bool) -> None:
    torchs, ours = pair(batch_first=batch_first)
    padding = torch.arange(9) >= torch.tensor([9, 4, 1, 7]).unsqueeze(1)
    mask = padding if kind == "bool" else torch.zeros(4, 9, dtype=torch.float64).masked_fill(padding, -torch.inf)
    x = torch.randn(4, 9, 16, dtype=torch.float64)
    x[padding] = torch.nan  # what stands at a padded row must not matter
    clean = x.nan_to_num(3.0)
    turn = (lambda t: t) if batch_first else (lambda t: t.transpose(0, 1))
    out = turn(ours(turn(x), turn(x), turn(x), key_padding_mask=mask)[0])
    want = turn(torchs(turn(clean), turn(clean), turn(clean), key_padding_mask=mask)[0])
    torch.testing.assert_close(out[~padding], want[~padding], **FLOAT64)
    assert (out[padding] == 0).all()


def test_query_key_and_value_may_differ() -> None:
    """As in detection transformers: positions are added to query and key, not to value."""
    torchs, ours = pair()
    x, position = torch.randn(2, 2, 11, 16, dtype=torch.float64)
    torch.testing.assert_close(
        ours(x + position, x + position, x)[0], torchs(x + position, x + position, x)[0], **FLOAT64
    )


def test_random_batches_are_attention_in_each_batch() -> None:
    torchs, ours = pair(batch_size=8)
    ours.eval()
    x = torch.randn(29, 16, dtype=torch.float64)
    part = rb.random_partition(29, 8, seed=ours.randbatch_config.seed)
    want = torch.zeros_like(x)
    for row in range(part.index.shape[0]):
        tokens = part.index[row] if part.mask is None else part.index[row][part.mask[row]]
        want[tokens] = torchs(x[tokens], x[tokens], x[tokens])[0]
    torch.testing.assert_close(ours(x), want, **FLOAT64)


@pytest.mark.parametrize("call", ["keyword", "positional"])
def test_flat_tokens_with_graphs(call: str) -> None:
    torchs, ours = pair()
    graph = torch.randint(0, 3, (40,))
    x = torch.randn(40, 16, dtype=torch.float64)
    out = ours(x, batch=graph) if call == "keyword" else ours(x, graph)
    for g in range(3):
        mine = x[graph == g]
        torch.testing.assert_close(out[graph == g], torchs(mine, mine, mine)[0], **FLOAT64)


def test_state_dicts_load_both_ways() -> None:
    ours, torchs = RandomBatchAttention(16, 4, 8), nn.MultiheadAttention(16, 4)
    assert ours.state_dict().keys() == torchs.state_dict().keys()
    ours.load_state_dict(torchs.state_dict())
    torchs.load_state_dict(ours.state_dict())
    assert isinstance(ours, nn.MultiheadAttention)


def test_train_draws_and_eval_is_fixed() -> None:
    ours = RandomBatchAttention(16, 4, 8)
    x = torch.randn(50, 16)
    assert not torch.equal(ours(x), ours(x))
    torch.manual_seed(1)
    first = ours(x)
    torch.manual_seed(1)
    assert torch.equal(first, ours(x))
    ours.eval()
    assert torch.equal(ours(x), ours(x))
    assert torch.equal(ours(x), copy.deepcopy(ours)(x))
    ours.randbatch_config.seed = 1
    other = ours(x)
    ours.randbatch_config.seed = 0
    assert not torch.equal(ours(x), other)


def test_eval_rounds_and_dropout() -> None:
    ours = RandomBatchAttention(16, 4, 8, rounds=1, eval_rounds=12, dropout=0.5)
    x = torch.randn(64, 16)
    exact = RandomBatchAttention(16, 4, 64)
    exact.load_state_dict(ours.state_dict())
    ours.eval(), exact.eval()
    many = (ours(x) - exact(x)).norm()
    ours.randbatch_config.eval_rounds = 1
    assert many < 0.5 * (ours(x) - exact(x)).norm()
    ours.randbatch_config.batch_size = 64
    assert torch.allclose(ours(x), exact(x), atol=1e-6)  # no dropout in eval
    assert not torch.allclose(ours.train()(x), exact(x), atol=1e-3)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("grad", [True, False])
def test_forward_runs_inside_an_encoder_layer(training: bool, grad: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's fast path reads the weights and would skip our forward without a word."""
    layer = nn.TransformerEncoderLayer(16, 4, 32, dropout=0.0, batch_first=True)
    layer.self_attn = RandomBatchAttention(16, 4, 4)
    layer = copy.deepcopy(layer).train(training)
    calls = []
    forward = RandomBatchAttention.forward
    monkeypatch.setattr(RandomBatchAttention, "forward", lambda *a, **k: (calls.append(1), forward(*a, **k))[1])
    with torch.set_grad_enabled(grad):
        layer(torch.randn(2, 20, 16), src_key_padding_mask=torch.arange(20).expand(2, -1) > 15)
    assert len(calls) == 1


def test_x_is_gathered_once_before_the_projection(monkeypatch: pytest.MonkeyPatch) -> None:
    moved = []

    def count(name: str) -> None:
        method = getattr(rb.Partition, name)

        def counted(self: rb.Partition, x: Tensor) -> Tensor:
            if not self.in_order:
                moved.append((name, x.shape[1:]))
            return method(self, x)

        monkeypatch.setattr(rb.Partition, name, counted)

    count("pack"), count("unpack")
    RandomBatchAttention(16, 4, 8, backend="reference")(torch.randn(50, 16))
    assert moved == [("pack", (16,)), ("unpack", (4, 4))]


def test_autocast() -> None:
    ours = RandomBatchAttention(16, 4, 8)
    with torch.autocast("cpu", torch.bfloat16):
        out = ours(torch.randn(50, 16))
    assert out.dtype == torch.bfloat16
    out.float().sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in ours.parameters())


def test_no_tokens() -> None:
    ours = RandomBatchAttention(16, 4, 8)
    assert ours(torch.randn(0, 16)).shape == (0, 16)
    assert ours(torch.randn(1, 16)).shape == (1, 16)
    assert ours(torch.randn(2, 0, 16)).shape == (2, 0, 16)
    all_padded = torch.ones(2, 3, dtype=torch.bool)
    x = torch.randn(2, 3, 16)
    assert (ours(x, x, x, key_padding_mask=all_padded)[0] == 0).all()


X = torch.randn(6, 16)
SETS = torch.randn(2, 3, 16)


@pytest.mark.unchecked
@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        ((X[:, :5],), {}, ValueError, r"query must be \[N, 16\] or \[B, N, 16\], got \[6, 5\]"),
        ((X.long(),), {}, TypeError, "query must be a floating-point tensor"),
        ((X, X[:3], X[:3]), {}, ValueError, "key has shape .* random batches are for self-attention"),
        ((X, X, X), {"need_weights": True}, ValueError, "need_weights must be False"),
        ((X, X, X), {"attn_mask": torch.zeros(6, 6)}, ValueError, "attn_mask must be None"),
        ((X, X, X), {"is_causal": True}, ValueError, "is_causal must be False"),
        (
            (X,),
            {"key_padding_mask": torch.zeros(6, dtype=torch.bool), "batch": torch.zeros(6, dtype=torch.int64)},
            ValueError,
            "batch is for flat tokens",
        ),
        ((X,), {"batch": torch.zeros(5, dtype=torch.int64)}, ValueError, r"batch must have shape \[6\]"),
        ((X,), {"batch": torch.zeros(6)}, TypeError, "batch must be an int64 or int32 tensor"),
        ((SETS,), {"batch": torch.zeros(2, dtype=torch.int64)}, ValueError, "batch is for flat tokens"),
        ((SETS,), {"key_padding_mask": torch.zeros(2, 4, dtype=torch.bool)}, ValueError, r"must have shape \[2, 3\]"),
        ((SETS,), {"key_padding_mask": torch.ones(2, 3)}, ValueError, "key_padding_mask must be 0 or -inf"),
        ((SETS,), {"key_padding_mask": torch.ones(2, 3).long()}, TypeError, "key_padding_mask must be bool or float"),
    ],
)
def test_bad_input(arguments: tuple, options: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        RandomBatchAttention(16, 4, 8)(*arguments, **options)


@pytest.mark.unchecked
@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        ((16, 3, 8), {}, ValueError, "embed_dim must be a multiple of num_heads, got 16 and 3"),
        ((16, 4, 1), {}, ValueError, "batch_size must be at least 2"),
        ((16, 4, "8"), {}, TypeError, "batch_size must be an int, got str"),
        ((16, 4, 8), {"dropout": 1.5}, ValueError, "dropout must lie in"),
        ((16, 4, 8), {"rounds": 0}, ValueError, "rounds must be at least 1"),
        ((16, 4, 8), {"eval_rounds": 0}, ValueError, "eval_rounds must be at least 1"),
        ((16, 4, 8), {"estimator": "x"}, ValueError, "estimator must be one of"),
        ((16, 4, 8), {"interaction": "x"}, ValueError, "interaction must be one of"),
        ((16, 4, 8), {"backend": "x"}, ValueError, "backend must be one of"),
    ],
)
def test_bad_settings(arguments: tuple, options: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        RandomBatchAttention(*arguments, **options)


# The wrapper


class SetModule(nn.Module):
    """Attention with a residual and a change of width; it counts its calls and refuses a mask."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(16, 4, batch_first=True, dtype=torch.float64)
        self.out = nn.Linear(16, 5, dtype=torch.float64)
        self.shapes: list[tuple[int, ...]] = []

    def forward(self, x: Tensor) -> Tensor:
        self.shapes.append(tuple(x.shape))
        return self.out(x + self.attention(x, x, x, need_weights=False)[0])


@pytest.mark.parametrize("training", [True, False])
def test_wrapper_with_one_batch_is_the_module(training: bool) -> None:
    module = SetModule().train(training)
    wrapped = RandomBatch(module, 50).train(training)
    x = torch.randn(50, 16, dtype=torch.float64, requires_grad=True)
    assert_same(wrapped, lambda x: module(x.unsqueeze(0)).squeeze(0), x, (wrapped, module))
    sets = torch.randn(3, 20, 16, dtype=torch.float64, requires_grad=True)
    assert_same(wrapped, module, sets, (wrapped, module))
    keep = torch.arange(20) < torch.tensor([20, 7, 0]).unsqueeze(1)
    out = wrapped(sets, keep)
    torch.testing.assert_close(out[1, :7], module(sets[1:2, :7]).squeeze(0), **FLOAT64)
    assert (out[~keep] == 0).all()


def test_wrapper_never_pads() -> None:
    module = SetModule()
    wrapped = RandomBatch(module, 8).eval()
    x = torch.randn(29, 16, dtype=torch.float64)
    out = wrapped(x)
    assert module.shapes == [(1, 8, 16), (3, 7, 16)]
    part = rb.random_partition(29, 8, seed=wrapped.randbatch_config.seed)
    tokens = part.index[0]
    torch.testing.assert_close(out[tokens], module(x[tokens].unsqueeze(0)).squeeze(0), **FLOAT64)
    assert torch.equal(out, wrapped(x))
    assert wrapped(x[:0]).shape == (0, 5)
    graph = torch.randint(0, 3, (29,))
    alone = RandomBatch(module, 29)(x, batch=graph)[graph == 1]
    torch.testing.assert_close(alone, module(x[graph == 1].unsqueeze(0)).squeeze(0), **FLOAT64)


def test_rounds_of_the_wrapper_are_whole_batches() -> None:
    """R calls of batches of p, also where p > √N and orthogonal rounds would have smaller ones; their mean."""
    sizes = []

    class Mean(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            sizes.append(x.shape[1])
            return x.mean(dim=1, keepdim=True).expand_as(x)

    x = torch.randn(90, 3, dtype=torch.float64)

    def error(rounds: int) -> float:
        outs = (RandomBatch(Mean(), 30, rounds=rounds, seed=seed).eval()(x) for seed in range(20))
        return sum((out - x.mean(0)).square().sum().item() for out in outs)

    once, often = error(1), error(16)
    assert sizes == [30] * (20 + 20 * 16)
    # of the squared error 1/16 is left, and what a token's own presence in every batch adds, (1/30 − 1/90)²
    assert often < once * (1 / 16 + (1 / 30 - 1 / 90) + 0.05)


def test_wrapper_leaves_the_weights_alone() -> None:
    module = SetModule()
    wrapped = RandomBatch(module, 8)
    assert wrapped.module is module
    assert {f"module.{name}" for name in module.state_dict()} == wrapped.state_dict().keys()
    assert "batch_size=8" in repr(wrapped)


def test_wrapper_takes_published_attentions() -> None:
    """torch_geometric's linear attentions over sets, with no adapter."""
    from torch_geometric.nn.attention import PerformerAttention, PolynormerAttention, SGFormerAttention

    x = torch.randn(29, 16)
    for module, width in (
        (PerformerAttention(16, 4, head_channels=4), 16),
        (SGFormerAttention(16, 2, head_channels=16), 16),
        (PolynormerAttention(16, 2, head_channels=8), 16),
    ):
        out = RandomBatch(module, 8)(x)
        assert out.shape == (29, width)
        whole = RandomBatch(module.eval(), 29).eval()(x)
        torch.testing.assert_close(whole, module(x.unsqueeze(0)).squeeze(0), rtol=1e-5, atol=1e-6)


@pytest.mark.unchecked
def test_bad_input_of_the_wrapper() -> None:
    wrapped = RandomBatch(SetModule(), 8)
    x = torch.randn(2, 20, 16, dtype=torch.float64)
    with pytest.raises(TypeError, match=r"module must be a torch.nn.Module, got function"):
        RandomBatch(lambda x: x, 8)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="batch_size must be at least 2"):
        RandomBatch(SetModule(), 1)
    with pytest.raises(ValueError, match=r"x must be \[N, C\] or \[B, N, C\]"):
        wrapped(x[0, 0])
    with pytest.raises(ValueError, match="mask is for padded sets"):
        wrapped(x[0], torch.ones(20, dtype=torch.bool))
    with pytest.raises(ValueError, match="batch is for flat tokens"):
        wrapped(x, batch=torch.zeros(2, dtype=torch.int64))
    with pytest.raises(TypeError, match=r"mask must be bool, got torch.float32"):
        wrapped(x, torch.ones(2, 20))
    with pytest.raises(ValueError, match=r"mask must have shape \[2, 20\]"):
        wrapped(x, torch.ones(2, 19, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"module must map \[2, 8, 16\] to \[B, N, C'\], it returned \[2, 16\]"):
        RandomBatch(Mean(), 8)(torch.randn(16, 16))


class Mean(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.mean(1)
