"""`convert` on torch's attention and encoders, and how converted models predict."""

import copy

import pytest
import torch
from converting import FLOAT64, ONE_BATCH, PADDING, HandWritten, Linear, check, encoder, make_input
from torch import Tensor, nn

import randbatch as rb
from randbatch.estimators import ESTIMATORS


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_multihead_attention(batch_first: bool, bias: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    def call(model: nn.Module) -> Tensor:
        x = make_input(model, 3, 11)
        x = x if batch_first else x.transpose(0, 1)
        out, weights = model(x, x, x, key_padding_mask=PADDING, need_weights=False)
        assert weights is None
        return (out if batch_first else out.transpose(0, 1))[~PADDING]

    check(
        monkeypatch,
        lambda: nn.MultiheadAttention(16, 4, bias=bias, batch_first=batch_first),
        call,
        modules=1,
        batch_size=3,
    )


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("norm_first", [True, False])
@pytest.mark.parametrize("padded", [True, False])
def test_encoder(norm_first: bool, padded: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """In eval without gradients torch's fast path and nested tensors would skip the converted attention."""

    def call(model: nn.Module) -> Tensor:
        out = model(make_input(model, 3, 11), src_key_padding_mask=PADDING if padded else None)
        return out[~PADDING] if padded else out

    check(monkeypatch, lambda: encoder(norm_first=norm_first), call, modules=2, batch_size=3)


def test_encoder_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    def make() -> nn.Module:
        return nn.TransformerEncoderLayer(16, 4, 32, dropout=0.0, batch_first=True)

    check(monkeypatch, make, lambda model: model(make_input(model, 2, 11)), modules=1, batch_size=3)


class MyEncoder(nn.TransformerEncoder):
    def forward(self, *arguments, **options) -> Tensor:
        return super().forward(*arguments, **options)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_an_encoder_with_a_forward_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    def make() -> nn.Module:
        return MyEncoder(nn.TransformerEncoderLayer(16, 4, 32, dropout=0.0, batch_first=True), 2)

    def call(model: nn.Module) -> Tensor:
        return model(make_input(model, 3, 11), src_key_padding_mask=PADDING)[~PADDING]

    check(monkeypatch, make, call, modules=2, batch_size=3)


def test_cross_attention_of_equal_lengths_is_refused() -> None:
    """Row i of query and key is not one token: the order of what is attended to would matter."""
    attention = nn.MultiheadAttention(16, 4, batch_first=True).eval()
    rb.convert(attention, 3)
    x, memory = torch.randn(2, 1, 12, 16)
    with pytest.raises(ValueError, match="self-attention"):
        attention(x, memory, memory, need_weights=False)
    assert attention(x, x, memory, need_weights=False)[0].shape == x.shape  # a value belongs to its key


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_nested_tensors_are_refused_where_the_encoder_was_not_converted() -> None:
    model = encoder().eval()
    rb.convert(model.layers, 4)
    with torch.no_grad(), pytest.raises(TypeError, match="use_nested_tensor"):
        model(torch.randn(3, 11, 16), src_key_padding_mask=PADDING)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.filterwarnings("ignore")  # what torch itself warns of in its own cases
@pytest.mark.parametrize("name", ["nn.MultiheadAttention", "nn.TransformerEncoderLayer", "nn.TransformerEncoder"])
def test_torchs_own_module_inputs(name: str, training: bool) -> None:
    """Every input that torch's test suite has for these modules: the same answer, or a refusal that says why.

    Those for `MultiheadAttention` are cross-attention, which is refused; with one tensor three times they are not.
    """
    from torch.testing._internal.common_modules import module_db

    info = next(info for info in module_db if info.name == name)
    inputs = info.module_inputs_func(info, device="cpu", dtype=torch.float64, requires_grad=False, training=training)
    answered = refused = 0
    for case in inputs:
        options = case.constructor_input.kwargs
        torch.manual_seed(0)
        original = info.module_cls(*case.constructor_input.args, **options).double().train(training)
        model = copy.deepcopy(original)
        try:
            rb.convert(model, ONE_BATCH)
        except ValueError as error:
            assert "add_bias_kv" in str(error) or "cross-attention" in str(error)
            refused += 1
            continue
        arguments = case.forward_input
        if name == "nn.MultiheadAttention":
            query, *others = arguments.args
            with pytest.raises(ValueError, match=r"self-attention|attn_mask must be None"):
                model(*arguments.args, **arguments.kwargs)
            arguments.args = (query,) * (1 + len(others))
        try:
            got = model(*arguments.args, **arguments.kwargs)
        except ValueError as error:
            assert any(reason in str(error) for reason in ("attn_mask", "need_weights", "is_causal", "self-attention"))
            refused += 1
            continue
        want = original(*arguments.args, **arguments.kwargs)
        got, want = (out[0] if isinstance(out, tuple) else out for out in (got, want))
        padding = arguments.kwargs.get("key_padding_mask", arguments.kwargs.get("src_key_padding_mask"))
        if padding is not None:  # a padded row gives zero here and something of no meaning there
            turn = got.dim() == 3 and not case.constructor_input.kwargs.get("batch_first", options.get("batch_first"))
            got, want = ((out.transpose(0, 1) if turn else out)[~padding] for out in (got, want))
        torch.testing.assert_close(got, want, **FLOAT64)
        answered += 1
    assert answered >= 2
    assert answered + refused == len(inputs)


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("training", [True, False])
def test_estimators_reach_converted_modules(estimator: str, training: bool) -> None:
    """Ragged sets; in the end of the rounds, and in one batch, the converted model is the model."""
    model = encoder().double().train(training)
    x = torch.randn(3, 11, 16, dtype=torch.float64)
    want = model(x, src_key_padding_mask=PADDING)[~PADDING]
    for batch_size, rounds in ((3, 100), (ONE_BATCH, 1)):
        report = rb.convert(model, batch_size, estimator=estimator, rounds=rounds)
        assert estimator in str(report)
        torch.testing.assert_close(model(x, src_key_padding_mask=PADDING)[~PADDING], want, **FLOAT64)
        report.undo()
    rb.convert(model, 3, estimator=estimator)
    assert model(x, src_key_padding_mask=PADDING).isfinite().all()


class TestInference:
    def model(self) -> nn.Module:
        model = nn.Sequential(encoder(), HandWritten(), rb.nn.RandomBatch(Linear(), 4)).double()
        rb.convert(model, 4)
        return model.eval()

    def test_exact_is_the_unconverted_model(self) -> None:
        model = self.model()
        x = torch.randn(2, 21, 16, dtype=torch.float64)
        unconverted = nn.Sequential(encoder(), HandWritten(), Linear()).double().eval()
        unconverted.load_state_dict({key.replace("2.module", "2"): value for key, value in model.state_dict().items()})
        assert rb.set_inference(model, mode="exact") == 4
        torch.testing.assert_close(model(x), unconverted(x), **FLOAT64)
        model.train()
        assert not torch.allclose(model(x), unconverted(x))

    def test_rounds(self) -> None:
        model = self.model()
        x = torch.randn(2, 21, 16, dtype=torch.float64)
        rb.set_inference(model, "exact")
        exact = model(x)
        errors = []
        for rounds in (1, 8):
            assert rb.set_inference(model, "rounds", rounds=rounds, seed=3) == 4
            assert torch.equal(model(x), model(x))
            errors.append((model(x) - exact).norm())
        assert errors[1] < errors[0]
        seeds = [module.randbatch_config.seed for module in model.modules() if hasattr(module, "randbatch_config")]
        assert len(set(seeds)) == 4
        before = model(x)
        rb.set_inference(model, "rounds", rounds=8, seed=4)
        assert not torch.equal(model(x), before)
        rb.set_inference(model, "rounds", rounds=8, seed=3)
        assert torch.equal(model(x), before)

    @pytest.mark.unchecked
    @pytest.mark.parametrize(
        ("options", "error", "message"),
        [
            ({"mode": "exakt"}, ValueError, "Did you mean 'exact'"),
            ({"mode": "exact", "rounds": 2}, ValueError, "rounds must be left out"),
            ({"mode": "rounds", "rounds": 0}, ValueError, "rounds must be at least 1"),
            ({"mode": "rounds", "seed": None}, TypeError, "seed must be an int"),
        ],
    )
    def test_bad_arguments(self, options: dict, error: type[Exception], message: str) -> None:
        with pytest.raises(error, match=message):
            rb.set_inference(self.model(), **options)

    def test_a_model_without_random_batches(self) -> None:
        with pytest.raises(ValueError, match="Linear holds none"):
            rb.set_inference(nn.Linear(2, 2), "exact")
