"""`convert` on torch_geometric, Hugging Face transformers and timm, each against the unconverted model."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
import torch.nn.functional as F
import transformers
from converting import FLOAT64, ONE_BATCH, Calls, check
from torch import Tensor, nn
from torch_geometric.nn import GCNConv, GINConv, GPSConv, GraphNorm, Polynormer, SGFormer
from torch_geometric.nn.aggr import GraphMultisetTransformer, SetTransformerAggregation
from torch_geometric.nn.attention import PerformerAttention, PolynormerAttention, QFormer, SGFormerAttention

import randbatch as rb

# three graphs of 9 nodes, and three of unlike sizes in any order
PAIRS = torch.cartesian_prod(torch.arange(27), torch.arange(27))
PAIRS = PAIRS[PAIRS[:, 0] != PAIRS[:, 1]]
EDGES = PAIRS[torch.randperm(len(PAIRS), generator=torch.Generator().manual_seed(0))[:80]].T.contiguous()
EQUAL = torch.arange(27) // 9
UNLIKE = (torch.arange(27) // 4).clamp(max=2)[torch.randperm(27, generator=torch.Generator().manual_seed(1))]


def nodes(model: nn.Module, *shape: int, channels: int = 16) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    dtype = next(model.parameters()).dtype
    return torch.randn(*shape, channels, generator=generator, dtype=torch.float64).to(dtype)


@contextmanager
def default_dtype(model: nn.Module) -> Iterator[None]:
    """PyG's SGFormerAttention makes a tensor in the default dtype."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(next(model.parameters()).dtype)
    yield
    torch.set_default_dtype(before)


class GPSNet(nn.Module):
    """PyG's own example of GPSConv in small: two layers on one vector `batch`."""

    def __init__(self, **options) -> None:
        super().__init__()
        mlp = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16))
        self.convs = nn.ModuleList(
            [GPSConv(16, GINConv(mlp), heads=4, **options), GPSConv(16, None, heads=2, **options)]
        )

    def forward(self, x: Tensor, batch: Tensor | None) -> Tensor:
        for conv in self.convs:
            x = conv(x, EDGES, batch)
        return x


@pytest.mark.parametrize("batch", [None, EQUAL, UNLIKE.sort().values], ids=["one", "equal", "unlike"])
@pytest.mark.parametrize("norm", ["batch_norm", "graph_norm", None])
def test_gps(norm: str | None, batch: Tensor | None, monkeypatch: pytest.MonkeyPatch) -> None:
    report = check(
        monkeypatch, lambda: GPSNet(norm=norm), lambda model: model(nodes(model, 27), batch), modules=2, batch_size=3
    )
    assert {row.rule for row in report.converted} == {"torch attention", "pyg GPSConv"}


@pytest.mark.parametrize("batch", [None, EQUAL], ids=["one", "equal"])
def test_gps_with_performer(batch: Tensor | None, monkeypatch: pytest.MonkeyPatch) -> None:
    def make() -> nn.Module:
        return GPSNet(attn_type="performer", attn_kwargs={"head_channels": 8})

    check(monkeypatch, make, lambda model: model(nodes(model, 27), batch), modules=2, batch_size=3)


@pytest.mark.parametrize("attn_type", ["multihead", "performer"])
def test_gps_takes_graphs_in_any_order_and_pads_nothing(attn_type: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """PyG wants sorted graphs and pads them; padding leaks into Performer. Each graph by itself is the oracle."""
    conv = GPSConv(16, None, heads=4, norm=None, attn_type=attn_type).double().eval()
    x = nodes(conv, 27)
    want = torch.zeros(27, 16, dtype=torch.float64)
    for graph in range(3):
        rows = graph == UNLIKE
        want[rows] = conv(x[rows], EDGES, None)
    rb.convert(conv, ONE_BATCH)
    monkeypatch.setattr("torch_geometric.nn.conv.gps_conv.to_dense_batch", None)
    torch.testing.assert_close(conv(x, EDGES, UNLIKE), want, **FLOAT64)


@pytest.mark.filterwarnings("ignore:Sparse")
def test_gps_keeps_what_pyg_promises() -> None:
    """The properties that PyG's own tests ask of GPSConv, on a converted one."""
    conv = GPSConv(16, GCNConv(16, 16), heads=4, norm="batch_norm")
    text, keys = str(conv), list(conv.state_dict())
    rb.convert(conv, ONE_BATCH)
    conv.reset_parameters()
    conv.eval()
    assert str(conv).removeprefix("RandomBatch") == text
    assert list(conv.state_dict()) == keys
    assert isinstance(conv, GPSConv)
    x = torch.randn(27, 16)
    out = conv(x, EDGES)
    assert out.shape == (27, 16)
    adjacency = torch.sparse_coo_tensor(EDGES.flip(0), torch.ones(80), (27, 27)).coalesce().to_sparse_csr()
    torch.testing.assert_close(conv(x, adjacency), out, atol=1e-4, rtol=1e-4)
    assert conv(x, EDGES, EQUAL).shape == (27, 16)
    torch.testing.assert_close(conv(x, adjacency, EQUAL), conv(x, EDGES, EQUAL), atol=1e-4, rtol=1e-4)


def test_a_gps_that_overrides_forward_is_named() -> None:
    class Mine(GPSConv):
        def forward(self, *arguments, **options):
            return super().forward(*arguments, **options)

    conv = Mine(16, None, heads=4)
    report = rb.convert(conv, ONE_BATCH)
    assert [row.path for row in report.converted] == ["attn"]
    assert "Mine overrides the forward of GPSConv" in report.left_alone[0].reason
    assert conv(torch.randn(27, 16), EDGES, EQUAL).shape == (27, 16)  # by dense padding, as before


@pytest.mark.parametrize(
    ("make", "masked"),
    [
        (lambda: PerformerAttention(16, 4, 8), True),
        (lambda: SGFormerAttention(16, 2, 8), True),
        (lambda: PolynormerAttention(16, 2, 8), True),
        (lambda: QFormer(16, 32, 8, 4, 2), False),
    ],
    ids=["performer", "sgformer", "polynormer", "qformer"],
)
def test_attentions_of_pyg(make, masked: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    def call(model: nn.Module) -> Tensor:
        arguments = (torch.ones(3, 11, dtype=torch.bool),) if masked else ()
        with default_dtype(model):
            return model(nodes(model, 3, 11), *arguments)

    check(monkeypatch, make, call, modules=1 if masked else 2, batch_size=3)


@pytest.mark.parametrize("cls", [PerformerAttention, SGFormerAttention, PolynormerAttention])
def test_padding_enters_no_sum(cls: type[nn.Module]) -> None:
    """PyG masks the values and not the keys; converted, a set gives what it gives by itself."""
    attention = cls(16, 2, 8).double().eval()
    x = nodes(attention, 2, 11)
    mask = torch.arange(11) < torch.tensor([[11], [6]])
    with default_dtype(attention):
        alone = attention(x[1:, :6])
        assert not torch.allclose(attention(x, mask)[1, :6], alone[0])
        rb.convert(attention, ONE_BATCH)
        out = attention(x, mask)
    torch.testing.assert_close(out[1, :6], alone[0], **FLOAT64)
    assert (out[1, 6:] == 0).all()


@pytest.mark.parametrize("cls", [SetTransformerAggregation, GraphMultisetTransformer])
def test_pooling_is_left_alone(cls: type[nn.Module]) -> None:
    """Its seeds ask the nodes; the self-attention beside it is converted."""
    options = {"heads": 2} if cls is SetTransformerAggregation else {"heads": 2, "k": 3}
    model = cls(16, **options).double().eval()
    x = nodes(model, 27)
    want = model(x, EQUAL)
    report = rb.convert(model, ONE_BATCH)
    assert {row.path.split(".")[0] for row in report.left_alone} <= {"pma", "pma1", "pma2"}
    assert all("queries that are not the tokens" in row.reason for row in report.left_alone)
    attentions = [name for name, module in model.named_modules() if isinstance(module, nn.MultiheadAttention)]
    assert sorted(row.path for row in (*report.converted, *report.left_alone)) == sorted(attentions)
    torch.testing.assert_close(model(x, EQUAL), want, **FLOAT64)


@pytest.mark.parametrize("name", ["sgformer", "polynormer"])
def test_models_of_pyg(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def make() -> nn.Module:
        if name == "sgformer":
            return SGFormer(16, 16, 4, trans_dropout=0.0, gnn_dropout=0.0)
        model = Polynormer(16, 16, 4, local_layers=2, in_dropout=0.0, dropout=0.0, global_dropout=0.0, qk_shared=True)
        model._global = True
        return model

    def call(model: nn.Module) -> Tensor:
        with default_dtype(model):
            return model(nodes(model, 27), EDGES, EQUAL)

    check(monkeypatch, make, call, modules=2, batch_size=3)


def test_graph_norm_is_given_its_graphs() -> None:
    conv = GPSConv(16, None, heads=4, norm="graph_norm").double()
    assert isinstance(conv.norm1, GraphNorm)
    rb.convert(twin := copy.deepcopy(conv), ONE_BATCH)
    x = nodes(conv, 27)
    torch.testing.assert_close(twin(x, EDGES, EQUAL), conv(x, EDGES, EQUAL), **FLOAT64)
    assert not torch.allclose(twin(x, EDGES), twin(x, EDGES, EQUAL))


# --- transformers ---

IDS = torch.randint(0, 50, (3, 12), generator=torch.Generator().manual_seed(0))
KEEP = (torch.arange(12) < torch.tensor([[12], [5], [8]])).long()
SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 32}
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
IMAGE = {"image_size": 16, "patch_size": 4, "num_channels": 3}


def bert(**options) -> nn.Module:
    return transformers.BertModel(transformers.BertConfig(vocab_size=50, **SMALL, **NO_DROPOUT, **options))


def roberta() -> nn.Module:
    return transformers.RobertaModel(transformers.RobertaConfig(vocab_size=50, **SMALL, **NO_DROPOUT))


def vit() -> nn.Module:
    return transformers.ViTModel(transformers.ViTConfig(**SMALL, **NO_DROPOUT, **IMAGE))


def dinov2() -> nn.Module:
    return transformers.Dinov2Model(transformers.Dinov2Config(**SMALL, **NO_DROPOUT, **IMAGE, mlp_ratio=2))


def clip_vision() -> nn.Module:
    return transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**SMALL, **IMAGE))


@pytest.mark.parametrize("make", [bert, roberta])
@pytest.mark.parametrize("padded", [True, False])
def test_text_encoders(make, padded: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    def call(model: nn.Module) -> Tensor:
        out = model(IDS, attention_mask=KEEP if padded else None)
        return torch.cat([out.last_hidden_state[KEEP.bool()], out.pooler_output])

    report = check(monkeypatch, make, call, modules=2, batch_size=3)
    assert {row.rule for row in report.converted} == {"transformers attention"}


@pytest.mark.parametrize("make", [vit, dinov2, clip_vision])
def test_image_encoders(make, monkeypatch: pytest.MonkeyPatch) -> None:
    def call(model: nn.Module) -> Tensor:
        return model(nodes(model, 2, 3, 16)).last_hidden_state

    check(monkeypatch, make, call, modules=2, batch_size=3)


def test_masked_language_model_loss_and_tokens_at_padding() -> None:
    """What stands at padded positions changes nothing: neither sdpa's output nor that of random batches."""
    config = transformers.BertConfig(vocab_size=50, **SMALL, **NO_DROPOUT)
    model = transformers.BertForMaskedLM(config).double().eval()
    want = model(IDS, attention_mask=KEEP).logits
    rb.convert(model, ONE_BATCH)
    torch.testing.assert_close(model(IDS, attention_mask=KEEP).logits[KEEP.bool()], want[KEEP.bool()], **FLOAT64)
    rb.set_inference(model, "rounds", rounds=2)
    other = torch.where(KEEP.bool(), IDS, 7)
    first, second = (model(ids, attention_mask=KEEP).logits[KEEP.bool()] for ids in (IDS, other))
    torch.testing.assert_close(first, second, rtol=0, atol=0)


def test_undo_and_saved_models(tmp_path) -> None:
    model = bert().double().eval()
    want = model(IDS, attention_mask=KEEP).last_hidden_state
    report = rb.convert(model, 3)
    assert not torch.allclose(model(IDS, attention_mask=KEEP).last_hidden_state, want)
    model.save_pretrained(tmp_path)
    report.undo()
    torch.testing.assert_close(model(IDS, attention_mask=KEEP).last_hidden_state, want, rtol=0, atol=0)
    loaded = transformers.BertModel.from_pretrained(tmp_path, dtype=torch.float64).eval()
    torch.testing.assert_close(loaded(IDS, attention_mask=KEEP).last_hidden_state, want, **FLOAT64)


def test_a_copy_is_converted_too() -> None:
    model = bert().eval()
    rb.convert(model, 3)
    twin = copy.deepcopy(model)
    torch.testing.assert_close(twin(IDS).last_hidden_state, model(IDS).last_hidden_state, rtol=0, atol=0)
    rb.set_inference(twin, "exact")
    assert not torch.allclose(twin(IDS).last_hidden_state, model(IDS).last_hidden_state)


def test_modules_left_out_attend_as_before(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both layers share one config; the one that was left out still attends to everything."""
    model = bert().double().eval()
    want = model(IDS, attention_mask=KEEP).last_hidden_state
    rb.convert(model, ONE_BATCH, where="encoder.layer.1.*")
    calls = Calls(monkeypatch)
    out = model(IDS, attention_mask=KEEP).last_hidden_state
    assert calls.count == 1
    torch.testing.assert_close(out[KEEP.bool()], want[KEEP.bool()], **FLOAT64)


def test_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    rb.conversion.hf.register(batch_size=ONE_BATCH)
    model = bert().double().eval()
    want = model(IDS, attention_mask=KEEP).last_hidden_state
    model.set_attn_implementation("random_batch")
    calls = Calls(monkeypatch)
    out = model(IDS, attention_mask=KEEP).last_hidden_state
    assert calls.count == 2
    torch.testing.assert_close(out[KEEP.bool()], want[KEEP.bool()], **FLOAT64)
    rb.conversion.hf.register(batch_size=3, name="random_batch_of_3")
    model.set_attn_implementation("random_batch_of_3")
    small = model(IDS, attention_mask=KEEP).last_hidden_state
    assert not torch.allclose(small[KEEP.bool()], want[KEEP.bool()])
    torch.testing.assert_close(model(IDS, attention_mask=KEEP).last_hidden_state, small, rtol=0, atol=0)


def test_a_decoder_is_refused_however_it_is_asked() -> None:
    config = transformers.BertConfig(vocab_size=50, is_decoder=True, add_cross_attention=True, **SMALL)
    model = transformers.BertLMHeadModel(config)
    with pytest.raises(ValueError, match="it is causal"):
        rb.convert(model, 3)
    rb.conversion.hf.register(batch_size=3)
    model.set_attn_implementation("random_batch")
    with pytest.raises(ValueError, match="cannot serve BertSelfAttention: it is causal"):
        model(IDS)


def test_clip_converts_its_images_and_names_its_texts() -> None:
    text = transformers.CLIPTextConfig(vocab_size=50, **SMALL)
    vision = transformers.CLIPVisionConfig(**SMALL, **IMAGE)
    model = transformers.CLIPModel(transformers.CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict()))
    model = model.double().eval()
    pixels = nodes(model, 2, 3, 16)
    want = model(IDS, pixels).logits_per_image
    report = rb.convert(model, ONE_BATCH)
    assert all(row.path.startswith("vision_model") for row in report.converted)
    assert len(report.left_alone) == 2
    assert all("causal mask" in row.reason for row in report.left_alone)
    torch.testing.assert_close(model(IDS, pixels).logits_per_image, want, **FLOAT64)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"attention_mask": torch.ones(3, 1, 12, 12).tril().bool()},
            r"attention_mask must be the same for every query",
        ),
        ({"output_attentions": True}, "output_attentions must be False"),
    ],
)
def test_what_a_converted_model_refuses(options: dict, message: str) -> None:
    model = bert()
    rb.convert(model, 3)
    with pytest.raises(ValueError, match=message):
        model(IDS, **options)


# --- timm: it imports torchvision, which does not import beside every build of torch, so a stand-in has its shape ---


class TimmAttention(nn.Module):
    """The attributes and the forward of timm's attention: a fused qkv, norms of query and key, two paths."""

    def __init__(self, dim: int = 16, num_heads: int = 4) -> None:
        super().__init__()
        self.num_heads, self.head_dim = num_heads, dim // num_heads
        self.scale = self.head_dim**-0.5
        self.fused_attn = False
        self.qkv = nn.Linear(dim, dim * 3)
        self.q_norm, self.k_norm, self.norm = nn.LayerNorm(self.head_dim), nn.LayerNorm(self.head_dim), nn.Identity()
        self.attn_drop, self.proj_drop = nn.Dropout(0.0), nn.Dropout(0.0)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        sets, tokens, channels = x.shape
        qkv = self.qkv(x).reshape(sets, tokens, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)
        q, k = self.q_norm(q), self.k_norm(k)
        if self.fused_attn:
            dropout_p = self.attn_drop.p if self.training else 0.0
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=attn_mask, dropout_p=dropout_p, is_causal=is_causal)
        else:
            weights = (q * self.scale @ k.mT).softmax(dim=-1)
            out = self.attn_drop(weights) @ v
        return self.proj_drop(self.proj(self.norm(out.transpose(1, 2).reshape(sets, tokens, channels))))


TimmAttention.__module__, TimmAttention.__qualname__ = "timm.layers.attention", "Attention"


def test_timm(monkeypatch: pytest.MonkeyPatch) -> None:
    def call(model: nn.Module) -> Tensor:
        return model(nodes(model, 3, 11))

    report = check(monkeypatch, TimmAttention, call, modules=1, batch_size=3)
    assert report.converted[0].rule == "timm attention"


def test_timm_refusals() -> None:
    rb.convert(model := TimmAttention(), 4)
    with pytest.raises(ValueError, match="no order"):
        model(torch.randn(1, 9, 16), is_causal=True)
    assert model.fused_attn is False
    model = TimmAttention()
    model.relative_position_bias_table = nn.Parameter(torch.zeros(3))
    with pytest.raises(ValueError, match="relative position bias"):
        rb.convert(model, 4)
