"""What `convert` leaves alone, and that its report names it with the reason."""

import pytest
import torch
import torch.nn.functional as F
from converting import HandWritten, encoder
from torch import Tensor, nn

import randbatch as rb
from randbatch.nn import RandomBatchAttention


class Theirs(nn.MultiheadAttention):
    """A subclass with a forward of its own."""

    def forward(self, *arguments, **options):
        return super().forward(*arguments, **options)


class Holds(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(16, 4)
        self.norm = nn.LayerNorm(16)


class Decodes(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cross_attn = nn.MultiheadAttention(16, 4)


class Probes(Holds):
    def __init__(self) -> None:
        super().__init__()
        self.probe = nn.Parameter(torch.randn(1, 1, 16))

    def forward(self, x: Tensor) -> Tensor:
        probe = self.probe.expand(1, x.shape[1], 16)
        x = self.norm(x)
        return self.attention(probe, x, x)[0]


class Weighs(Holds):
    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x, x, x, need_weights=True)[1]


class Crosses(Holds):
    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        y = self.norm(y)
        return self.attention(x, y, y)[0]


class Blocks(nn.Module):
    """One block is given one set twice, the other one two sets."""

    def __init__(self) -> None:
        super().__init__()
        self.same, self.other = Crosses(), Crosses()
        self.seeds = nn.Parameter(torch.randn(9, 1, 16))

    def forward(self, x: Tensor) -> Tensor:
        return self.other(self.seeds, self.same(x, x))


class LooksLikeAttention(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x


class HiddenSDPA(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(x, x, x)


def test_what_is_left_alone_is_named() -> None:
    replaced = nn.MultiheadAttention(16, 4)
    replaced.forward = lambda *arguments, **options: None
    model = nn.ModuleDict(
        {
            "ours": RandomBatchAttention(16, 4, 5),
            "theirs": Theirs(16, 4),
            "looks": LooksLikeAttention(),
            "hidden": HiddenSDPA(),
            "cross": nn.MultiheadAttention(16, 4, kdim=8),
            "extra": nn.MultiheadAttention(16, 4, add_bias_kv=True),
            "replaced": replaced,
            "decoder": nn.TransformerDecoderLayer(16, 4),
            "wrapped": rb.nn.RandomBatch(nn.TransformerEncoderLayer(16, 4), 5),
            "decodes": Decodes(),
            "probes": Probes(),
            "weighs": Weighs(),
            "crosses": Crosses(),
            "blocks": Blocks(),
            "other": nn.Linear(3, 3),
        }
    )
    report = rb.convert(model, 4)
    assert [row.path for row in report.converted] == ["ours", "wrapped", "blocks.same.attention"]
    reasons = {row.path: row.reason for row in report.left_alone}
    assert "overrides the forward of MultiheadAttention" in reasons.pop("theirs")
    assert "rb.convert.register(LooksLikeAttention)" in reasons.pop("looks")
    assert "rb.convert.register(HiddenSDPA)" in reasons.pop("hidden")
    assert "kdim 8" in reasons.pop("cross")
    assert "add_bias_kv" in reasons.pop("extra")
    assert "replaced on the instance" in reasons.pop("replaced")
    assert "decoder layer" in reasons.pop("decoder.self_attn")
    assert "decoder layer" in reasons.pop("decoder.multihead_attn")
    assert "its name says that it is cross-attention" in reasons.pop("decodes.cross_attn")
    assert "Probes gives it queries that are not the tokens" in reasons.pop("probes.attention")
    assert "Weighs asks it for weights" in reasons.pop("weighs.attention")
    assert "Crosses gives it queries that are not the tokens" in reasons.pop("crosses.attention")
    assert "Crosses gives it queries that are not the tokens" in reasons.pop("blocks.other.attention")
    assert not reasons
    assert model["ours"].randbatch_config.batch_size == model["wrapped"].randbatch_config.batch_size == 4
    text = str(report)
    assert "3 modules in random batches of 4" in text
    assert all(row.reason in text for row in report.left_alone)


def test_where_reaches_inside_what_it_leaves_out() -> None:
    class Outer(HandWritten):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.MultiheadAttention(16, 4)

    model = nn.Sequential(Outer(), rb.nn.RandomBatch(encoder(), 5))
    report = rb.convert(model, 4, where="0.inner")
    assert [row.path for row in report.converted] == ["0.inner"]
    assert [row.path for row in report.left_alone] == ["0", "1"]


@pytest.mark.filterwarnings("ignore:`torch.jit")
def test_scripted_modules_are_not_touched() -> None:
    with pytest.raises(ValueError, match="nothing in Sequential"):
        rb.convert(nn.Sequential(torch.jit.script(nn.MultiheadAttention(16, 4))), 4)


def test_attention_inside_a_wrapper_is_not_converted_again() -> None:
    wrapped = rb.nn.RandomBatch(nn.TransformerEncoderLayer(16, 4), 5)
    rb.convert(wrapped, 7)
    assert type(wrapped.module.self_attn) is nn.MultiheadAttention


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (nn.Linear(3, 3), "nothing in Linear looks like it"),
        (LooksLikeAttention(), r"no rule knows LooksLikeAttention"),
        (Theirs(16, 4), "overrides the forward"),
        (nn.TransformerDecoderLayer(16, 4), "decoder layer"),
    ],
)
def test_nothing_to_convert(model: nn.Module, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        rb.convert(model, 4)
