"""`convert` on classes taught by users; the report; what is left alone, refused and undone."""

import copy
import pickle
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from converting import FLOAT64, ONE_BATCH, PADDING, Calls, CallsSDPA, HandWritten, Linear, check, encoder, make_input
from torch import Tensor, nn

import randbatch as rb
from randbatch.conversion.rules import REGISTRY, Rule
from randbatch.nn import RandomBatchAttention, RandomBatchConfig
from randbatch.nn.config import config_of


@pytest.mark.parametrize("cls", [HandWritten, Linear, CallsSDPA])
def test_registered_classes(cls: type[nn.Module], monkeypatch: pytest.MonkeyPatch) -> None:
    def call(model: nn.Module) -> Tensor:
        return model(make_input(model, 3, 11))

    report = check(monkeypatch, cls, call, modules=1, batch_size=3)
    assert report.converted[0].rule == f"registered for {cls.__name__}"


def test_masks_of_keys_reach_sdpa() -> None:
    model = CallsSDPA().double()
    x = make_input(model, 3, 11)
    additive = torch.zeros(3, 1, 1, 11, dtype=torch.float64).masked_fill(PADDING[:, None, None], -torch.inf)
    want = model(x, attn_mask=additive)
    rb.convert(model, ONE_BATCH)
    for mask in (additive, additive.clamp(min=-1e4), ~PADDING[:, None, None]):
        torch.testing.assert_close(model(x, attn_mask=mask)[~PADDING], want[~PADDING], **FLOAT64)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"is_causal": True}, "no order"),
        ({"attn_mask": torch.ones(11, 11).tril().bool()}, r"\[B, 1, 1, N\], got \[11, 11\]"),
        ({"attn_mask": torch.full((1, 1, 1, 11), 0.5)}, "finite bias"),
    ],
)
def test_what_sdpa_is_refused(options: dict, message: str) -> None:
    rb.convert(model := CallsSDPA(), 4)
    with pytest.raises(ValueError, match=message):
        model(torch.randn(3, 11, 16), **options)


def test_one_row_for_all_queries_is_a_mask_of_keys() -> None:
    """However it is laid out: by strides, or written out for every query."""
    model = CallsSDPA().double()
    x = make_input(model, 3, 11)
    rows = ~PADDING[:, None, None].expand(3, 4, 11, 11)
    want = model(x, attn_mask=rows)[~PADDING]
    rb.convert(model, ONE_BATCH)
    for mask in (rows, rows.contiguous()):
        torch.testing.assert_close(model(x, attn_mask=mask)[~PADDING], want, **FLOAT64)
    other = rows.clone()
    other[1, 2, 3, 0] = False
    with pytest.raises(ValueError, match="the same for every query and head"):
        model(x, attn_mask=other)


class Context(nn.Module):
    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        context = x if context is None else context
        return F.scaled_dot_product_attention(x, context, context)


def test_tokens_of_another_set_are_refused() -> None:
    """Of equal length, too: row i of both is not one token."""
    rb.convert.register(Context)(rb.convert.through_sdpa)
    rb.convert(model := Context(), 3)
    x = torch.randn(1, 2, 9, 4)
    assert torch.equal(model.eval()(x, x), model(x))
    for call in (lambda: model(x, x + 1), lambda: model(x, context=x + 1)):
        with pytest.raises(ValueError, match="context of Context must be left out"):
            call()


def test_an_adapter_that_finds_no_sdpa_says_so() -> None:
    class NeverCalls(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x

    rb.convert.register(NeverCalls)(rb.convert.through_sdpa)
    rb.convert(model := NeverCalls(), 4)
    with pytest.raises(RuntimeError, match=r"never called F\.scaled_dot_product_attention"):
        model(torch.randn(1, 2, 3, 4))


def snapshot(model: nn.Module) -> list:
    """All that conversion could touch."""
    return [
        (name, type(module), sorted(vars(module)), len(module._forward_pre_hooks), module.training)
        for name, module in model.named_modules()
    ]


def test_conversion_keeps_everything_and_undo_restores_it() -> None:
    model = nn.Sequential(encoder(), HandWritten(), nn.MultiheadAttention(16, 2)).double().eval()
    model[1].register_forward_hook(lambda *arguments: None)
    model[2].register_forward_pre_hook(lambda *arguments: None)
    before, state = snapshot(model), {key: value.clone() for key, value in model.state_dict().items()}
    pointers = [parameter.data_ptr() for parameter in model.parameters()]
    report = rb.convert(model, 4)
    assert [row.path for row in report.converted] == [
        "0.layers.0.self_attn", "0.layers.1.self_attn", "1", "2", "0",
    ]  # fmt: skip
    assert [parameter.data_ptr() for parameter in model.parameters()] == pointers
    assert isinstance(model[1], HandWritten)
    assert len(model[1]._forward_hooks) == 1
    torch.testing.assert_close(model.state_dict(), state, rtol=0, atol=0)
    report.undo()
    assert snapshot(model) == before
    assert model[0].use_nested_tensor
    report.undo()  # nothing is left to undo
    assert snapshot(model) == before


def test_state_dicts_go_both_ways() -> None:
    original, model = encoder().double(), encoder().double()
    rb.convert(model, ONE_BATCH)
    x = torch.randn(2, 11, 16, dtype=torch.float64)
    original.load_state_dict(model.state_dict())
    torch.testing.assert_close(original(x), model(x), **FLOAT64)
    for parameter in original.parameters():
        nn.init.normal_(parameter, std=0.2)
    model.load_state_dict(original.state_dict())
    torch.testing.assert_close(original(x), model(x), **FLOAT64)


def test_converting_twice_changes_the_settings_only() -> None:
    model = nn.Sequential(encoder(), HandWritten())
    first = rb.convert(model, 4)
    settings = [copy.copy(found) for found in map(config_of, model.modules()) if found]
    classes = snapshot(model)
    again = rb.convert(model, 4)
    assert snapshot(model) == classes
    assert [*filter(None, map(config_of, model.modules()))] == settings
    assert {row.rule for row in again.converted} == {"random batches already"}
    last = rb.convert(model, 8, rounds=2)
    assert model[1].randbatch_config == RandomBatchConfig(8, rounds=2, seed=settings[-1].seed)
    last.undo()
    assert model[1].randbatch_config == settings[-1]
    again.undo()
    first.undo()
    assert type(model[1]) is HandWritten


def test_a_shared_module_is_converted_once(monkeypatch: pytest.MonkeyPatch) -> None:
    shared = HandWritten()
    model = nn.Sequential(shared, shared)
    report = rb.convert(model, 4)
    assert [row.path for row in report.converted] == ["0"]
    calls = Calls(monkeypatch)
    model(torch.randn(1, 9, 16))
    assert calls.count == 2


def test_each_module_has_its_own_eval_seed() -> None:
    model = encoder(layers=4)
    rb.convert(model, 4, seed=5)
    seeds = [layer.self_attn.randbatch_config.seed for layer in model.layers]
    assert len(set(seeds)) == 4
    other = encoder(layers=4)
    rb.convert(other, 4, seed=5)
    assert [layer.self_attn.randbatch_config.seed for layer in other.layers] == seeds


@pytest.mark.parametrize("where", ["layers.1.*", lambda path, module: path.startswith("layers.1")])
def test_where(where) -> None:
    model = encoder()
    report = rb.convert(model, 4, where=where)
    assert type(model.layers[0].self_attn) is nn.MultiheadAttention
    assert type(model.layers[1].self_attn) is RandomBatchAttention
    assert [(row.path, row.reason) for row in report.left_alone] == [("layers.0.self_attn", "left out by `where`")]


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
@pytest.mark.parametrize(
    "cls", [HandWritten, Linear, CallsSDPA, lambda: nn.MultiheadAttention(16, 4), lambda: Mine(16, 4)]
)
def test_copies_are_converted_too(cls, copied) -> None:
    model = cls().eval()
    rb.convert(model, 4)
    twin = copied(model)
    assert type(twin) is type(model)
    arguments = (torch.randn(13, 1, 16),) * (3 if isinstance(model, nn.MultiheadAttention) else 1)
    torch.testing.assert_close(twin(*arguments), model(*arguments), rtol=0, atol=0)
    twin.randbatch_config.batch_size = 9
    assert model.randbatch_config.batch_size == 4


class Mine(nn.MultiheadAttention):
    """A subclass that leaves forward alone."""

    def helper(self) -> int:
        return 7


def test_a_subclass_keeps_its_methods(monkeypatch: pytest.MonkeyPatch) -> None:
    def call(model: nn.Module) -> Tensor:
        assert model.helper() == 7
        x = make_input(model, 3, 11)
        return model(x, x, x, need_weights=False)[0]

    check(monkeypatch, lambda: Mine(16, 4, batch_first=True), call, modules=1, batch_size=3)


def test_compiled_code_is_made_anew() -> None:
    """In a process of its own: the checks of shapes while tests run cannot be compiled."""
    code = """
import torch, randbatch as rb
model = torch.nn.TransformerEncoderLayer(16, 4, dropout=0.0, batch_first=True).eval()
compiled = torch.compile(model, backend="eager")
x = torch.randn(1, 40, 16)
before = compiled(x)
rb.convert(model, 3)
assert not torch.allclose(compiled(x), before)
rb.set_inference(model, "exact")
torch.testing.assert_close(compiled(x), before)
"""
    subprocess.run([sys.executable, "-c", code], check=True)


class Breaks(nn.Module):
    pass


class Fails(Rule):
    name, changes, cls = "breaks", "nothing", Breaks

    def swap(self, module: nn.Module, settings: RandomBatchConfig) -> None:
        raise RuntimeError("a rule that fails")


def test_a_failure_leaves_the_model_as_it_was() -> None:
    REGISTRY.add(Fails())
    model = nn.Sequential(HandWritten(), nn.MultiheadAttention(16, 4), encoder(), Breaks())
    before = snapshot(model)
    with pytest.raises(RuntimeError, match="a rule that fails"):
        rb.convert(model, 4)
    assert snapshot(model) == before


@pytest.mark.parametrize("value", ["mine", RandomBatchConfig(5)])
def test_a_name_that_is_taken_is_left_to_its_owner(value: object) -> None:
    name = "randbatch_config"
    model = nn.Sequential(HandWritten(), HandWritten(), nn.MultiheadAttention(16, 4))
    for module in (model[1], model[2]):
        setattr(module, name, value)
    report = rb.convert(model, 4)
    assert [row.path for row in report.left_alone] == ["1", "2"]
    assert all(f"it has an attribute `{name}` of its own" in row.reason for row in report.left_alone)
    report.undo()
    assert all(getattr(module, name) is value for module in (model[1], model[2]))
    assert not hasattr(model[0], "randbatch_config")


def test_undo_in_any_order_leaves_nothing_behind() -> None:
    model = nn.Sequential(encoder(), HandWritten())
    before = snapshot(model)
    first, second = rb.convert(model, 4), rb.convert(model, 8)
    first.undo()
    second.undo()
    assert snapshot(model) == before


@pytest.mark.unchecked
@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        ((3, 4), {}, TypeError, "model must be a torch.nn.Module, got int"),
        ((HandWritten(), 1), {}, ValueError, "batch_size must be at least 2, got 1"),
        ((HandWritten(), 4.0), {}, TypeError, "batch_size must be an int"),
        ((HandWritten(), 4), {"estimator": "plane"}, ValueError, "Did you mean 'plain'"),
        ((HandWritten(), 4), {"rounds": 0}, ValueError, "rounds must be at least 1"),
        ((HandWritten(), 4), {"backend": "spda"}, ValueError, "Did you mean 'sdpa'"),
        ((HandWritten(), 4), {"seed": "x"}, TypeError, "seed must be an int"),
        ((HandWritten(), 4), {"where": 3}, TypeError, "where must be a pattern or a function"),
    ],
)
def test_bad_arguments(arguments: tuple, options: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        rb.convert(*arguments, **options)


@pytest.mark.unchecked
def test_bad_registrations() -> None:
    with pytest.raises(TypeError, match="module_class must be a subclass"):
        rb.convert.register(HandWritten())
    with pytest.raises(TypeError, match="adapter must be callable"):
        rb.convert.register(HandWritten)(3)
