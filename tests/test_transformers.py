"""How transformers calls attention, what it hands on, what it saves, and which of its models are converted."""

import subprocess
import sys
import warnings

import pytest
import torch
import torch.nn.functional as F
import transformers
from converting import FLOAT64, ONE_BATCH
from scripts.sweep_transformers import CONFIG_MAPPING, judge, make
from torch import Tensor, nn

import randbatch as rb
from randbatch.conversion import hf
from randbatch.conversion.libraries.hf_interface import attend
from randbatch.nn import RandomBatchConfig

SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 32}
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
IMAGE = {"image_size": 16, "patch_size": 4}
IDS = torch.randint(0, 50, (3, 12), generator=torch.Generator().manual_seed(0))
KEEP = (torch.arange(12) < torch.tensor([[12], [5], [8]])).long()


def bert(**options) -> nn.Module:
    return transformers.BertModel(transformers.BertConfig(vocab_size=50, **SMALL, **NO_DROPOUT, **options)).double()


def git() -> nn.Module:
    vision = dict(SMALL, image_size=16, patch_size=8)
    model = transformers.GitModel(transformers.GitConfig(vocab_size=50, vision_config=vision, **SMALL, **NO_DROPOUT))
    return model.double().eval()


class SelfAttention(nn.Module):
    is_causal = False


class TestCalls:
    """Sets `[B, H, N, D]` in, `[B, N, H, D]` out, by each convention that the models of transformers have."""

    query, key, value = torch.randn(3, 2, 4, 9, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    mask = torch.arange(9) < torch.tensor([[9], [5]])

    def call(self, *args, **options) -> Tensor:
        out, weights = attend(RandomBatchConfig(ONE_BATCH), SelfAttention().eval(), *args, **options)
        assert weights is None
        return out

    def test_masks_come_by_position_and_by_keyword(self) -> None:
        rows = self.mask[:, None, None].expand(2, 1, 9, 9)
        want = F.scaled_dot_product_attention(self.query, self.key, self.value, rows).transpose(1, 2)[self.mask]
        tokens = (self.query, self.key, self.value)
        floats = torch.zeros(2, 1, 1, 9, dtype=torch.float64).masked_fill(~rows[:, :, :1], -torch.inf)
        for mask in (self.mask, self.mask.long(), rows, rows.contiguous(), floats, floats.expand(2, 1, 9, 9)):
            torch.testing.assert_close(self.call(*tokens, mask)[self.mask], want, **FLOAT64)
            torch.testing.assert_close(self.call(*tokens, attention_mask=mask)[self.mask], want, **FLOAT64)
        named = dict(zip(("query", "key", "value"), tokens, strict=True))
        torch.testing.assert_close(self.call(**named, attention_mask=rows)[self.mask], want, **FLOAT64)

    def test_grouped_heads_arrive_unrepeated(self) -> None:
        key, value = self.key[:, :2], self.value[:, :2]
        want = F.scaled_dot_product_attention(self.query, key, value, enable_gqa=True).transpose(1, 2)
        torch.testing.assert_close(self.call(self.query, key, value), want, **FLOAT64)

    def test_what_changes_no_output_is_taken(self) -> None:
        want = self.call(self.query, self.key, self.value)
        options = {
            "position_ids": torch.arange(9),
            "deterministic": True,
            "use_cache": True,
            "output_attentions": False,
        }
        got = self.call(self.query, self.key, self.value, None, softcap=None, position_bias=None, **options)
        assert torch.equal(got, want)

    @pytest.mark.unchecked
    @pytest.mark.parametrize(
        ("options", "message"),
        [
            *(({name: torch.ones(1)}, f"{name} must be None") for name in ("position_bias", "s_aux", "cu_seq_lens_q")),
            ({"softcap": 30.0}, "softcap must be None"),
            ({"sliding_window": 4}, "sliding_window must be None"),
            ({"a_word_of_the_future": 1}, "a_word_of_the_future must be None"),
            ({"is_causal": True}, "no order"),
            ({"output_attentions": True}, "output_attentions must be False"),
            ({"attention_mask": torch.ones(9, 9).tril().bool()[None, None]}, "the same for every query"),
            ({"attention_mask": torch.ones(2, 8).long()}, r"attention_mask must be \[2, 9\], got \[2, 8\]"),
        ],
    )
    def test_what_is_not_heeded_is_refused(self, options: dict, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            self.call(self.query, self.key, self.value, **options)

    @pytest.mark.unchecked
    def test_other_tokens_are_refused(self) -> None:
        for key in (self.key[:, :, :5], self.key[:1]):
            with pytest.raises(ValueError, match="self-attention"):
                self.call(self.query, key, key)

    def test_without_a_mask_silence_means_causal(self) -> None:
        """As in transformers' sdpa."""
        with pytest.raises(ValueError, match="no order"):
            attend(RandomBatchConfig(4), nn.Identity(), self.query, self.key, self.value, None)


def _keep_mask(masks: list[Tensor]):
    def hook(module: nn.Module, args: tuple, kwargs: dict) -> None:
        masks.append(kwargs["attention_mask"] if "attention_mask" in kwargs else args[1])

    return hook


def test_masks_of_padding_take_no_memory_and_keep_their_shape() -> None:
    """A module that was left alone reads the same numbers from them."""
    for implementation in ("sdpa", "eager"):
        model = bert().eval()
        model.set_attn_implementation(implementation)
        masks = []
        hook = _keep_mask(masks)
        model.encoder.layer[0].attention.self.register_forward_pre_hook(hook, with_kwargs=True)
        model(IDS, attention_mask=KEEP)
        rb.convert(model, ONE_BATCH, where="*layer.1.*")
        model(IDS, attention_mask=KEEP)
        assert masks[1].shape == masks[0].shape == (3, 1, 12, 12)
        assert masks[1].dtype == masks[0].dtype
        assert torch.equal(masks[0], masks[1])
        assert masks[1].stride(2) == 0


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_modules_left_out_attend_as_before(implementation: str) -> None:
    """Eager attention is the module's own, and knows of what sdpa does not."""
    model = bert().eval()
    model.set_attn_implementation(implementation)
    want = model(IDS, attention_mask=KEEP).last_hidden_state
    report = rb.convert(model, ONE_BATCH, where="*layer.1.*")
    seen = []
    scope = sys.modules[type(model).__module__].__dict__
    eager = scope["eager_attention_forward"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(
            scope, "eager_attention_forward", lambda *args, **kwargs: seen.append(1) or eager(*args, **kwargs)
        )
        got = model(IDS, attention_mask=KEEP).last_hidden_state
    assert len(seen) == (implementation == "eager")
    torch.testing.assert_close(got[KEEP.bool()], want[KEEP.bool()], **FLOAT64)
    report.undo()
    assert model.config._attn_implementation == implementation


def test_a_setting_by_the_user_is_switched_back_by_a_second_call() -> None:
    model = bert().eval()
    rb.convert(model, 3)
    want = model(IDS).last_hidden_state
    model.set_attn_implementation("sdpa")
    assert not torch.allclose(model(IDS).last_hidden_state, want)
    rb.convert(model, 3)
    assert torch.equal(model(IDS).last_hidden_state, want)


def test_parts_under_one_config_are_undone_in_any_order() -> None:
    """A part that is still converted keeps its random batches."""
    model = bert().eval()
    full = model(IDS).last_hidden_state
    first = rb.convert(model, 3, where="*layer.0.*")
    second = rb.convert(model, 4, where="*layer.1.*")
    first.undo()
    assert not torch.allclose(model(IDS).last_hidden_state, full)
    assert model.config.random_batch["batch_size"] == 4
    third = rb.convert(model, 5, where="*layer.1.*")
    second.undo()
    third.undo()
    assert torch.equal(model(IDS).last_hidden_state, full)
    assert model.config._attn_implementation == "sdpa"
    assert not hasattr(model.config, "random_batch")


def test_a_saved_model_remembers_its_batches(tmp_path) -> None:
    """`from_pretrained` makes full attention; the config says what `convert` was told."""
    model = bert()
    report = rb.convert(model, 3, rounds=2, seed=4, backend="reference")
    assert model.config.random_batch == {"batch_size": 3, "rounds": 2, "seed": 4}  # the backend is of this machine
    model.save_pretrained(tmp_path)
    loaded = transformers.BertModel.from_pretrained(tmp_path, dtype=torch.float64).eval()
    again = rb.convert(loaded, **loaded.config.random_batch)
    assert (again.settings.batch_size, again.settings.rounds) == (3, 2)
    assert torch.equal(loaded(IDS).last_hidden_state, model.eval()(IDS).last_hidden_state)
    assert "convert again" in str(report)
    report.undo()
    assert not hasattr(model.config, "random_batch")
    model.save_pretrained(tmp_path)
    assert not hasattr(transformers.BertConfig.from_pretrained(tmp_path), "random_batch")


def test_configs_inside_are_not_switched() -> None:
    """A config holds others, of models that are left alone."""
    model = git()
    before = model.config._attn_implementation, model.config.vision_config._attn_implementation
    report = rb.convert(model, 3)
    assert model.config._attn_implementation == before[0]
    assert {row.kind for row in report.converted} == {"GitVisionAttention"}
    report.undo()
    assert model.config.vision_config._attn_implementation == before[1]


def test_by_name_a_mask_stays_causal_where_attention_is_not_asked_for() -> None:
    """GIT's text attention is written out by hand, and adds the mask to its logits."""
    model = git()
    pixels = torch.randn(3, 3, 16, 16, dtype=torch.float64)
    want = model(IDS, KEEP, pixel_values=pixels).last_hidden_state
    hf.register(batch_size=ONE_BATCH)
    hf._warn_of_those_that_never_ask.cache_clear()
    model.set_attn_implementation("random_batch")
    with pytest.warns(UserWarning, match="the code of GitSelfAttention asks transformers for no attention function"):
        got = model(IDS, KEEP, pixel_values=pixels).last_hidden_state
    torch.testing.assert_close(got, want, rtol=1e-7, atol=1e-7)  # GIT's own softmax over its image is float32
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        bert().set_attn_implementation("random_batch")
        model(IDS, KEEP, pixel_values=pixels)  # once is enough


def test_by_name_what_may_be_cross_attention_is_refused() -> None:
    config = transformers.BartConfig(
        vocab_size=50, d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=4,
        decoder_attention_heads=4, encoder_ffn_dim=32, decoder_ffn_dim=32, max_position_embeddings=32,
    )  # fmt: skip
    model = transformers.BartModel(config).double().eval()
    hf.register(batch_size=3)
    model.set_attn_implementation("random_batch")
    with pytest.raises(ValueError, match=r"other tokens to attend to \(key_value_states\)"):
        model(IDS)
    model.set_attn_implementation("sdpa")
    want = model(IDS, KEEP).last_hidden_state
    report = rb.convert(model, ONE_BATCH)
    assert [row.path for row in report.converted] == ["encoder.layers.0.self_attn"]
    torch.testing.assert_close(model(IDS, KEEP).last_hidden_state, want, **FLOAT64)
    attention, x = model.encoder.layers[0].self_attn, torch.randn(1, 9, 16, dtype=torch.float64)
    with pytest.raises(ValueError, match="key_value_states of BartAttention must be left out"):
        attention(x, key_value_states=x + 1)
    assert torch.equal(attention(x, key_value_states=x)[0], attention(x)[0])


# what becomes of each: `equal` to the unconverted model in one batch, or `left` alone with a reason
MODELS = {
    "albert": ("equal", "1 AlbertAttention"),
    "bart": ("equal", "BartAttention: it is causal"),
    "beit": ("equal", "2 BeitAttention"),
    "bert": ("equal", "2 BertSelfAttention"),
    "bigbird_pegasus": ("left", "makes a causal mask"),
    "blip_2_qformer": ("equal", "it is cross-attention"),
    "clip": ("equal", "makes a causal mask"),
    "convbert": ("left", "no rule knows"),
    "deit": ("equal", "2 DeiTAttention"),
    "dinov3_vit": ("equal", "2 DINOv3ViTAttention"),
    "distilbert": ("equal", "2 DistilBertSelfAttention"),
    "git": ("equal", "no rule knows GitSelfAttention"),
    "gpt2": ("left", "causal"),
    "hubert": ("equal", "2 HubertAttention"),
    "layoutlm": ("equal", "2 LayoutLMSelfAttention"),
    "llama": ("left", "causal"),
    "markuplm": ("equal", "2 MarkupLMSelfAttention"),
    "mbart": ("equal", "causal"),
    "mobilebert": ("equal", "2 MobileBertSelfAttention"),
    "modernbert": ("equal", "it attends inside a sliding window"),
    "pixtral": ("left", "mask between tokens"),
    "segformer": ("left", "`sequence_reduction`"),
    "siglip": ("equal", "reads the last row"),
    "t5": ("left", "position bias"),
    "vit": ("equal", "2 ViTAttention"),
    "whisper": ("equal", "causal"),
}


@pytest.mark.parametrize("name", MODELS)
def test_a_model_gives_what_it_gave_or_is_left_alone(name: str) -> None:
    """Some of those that `scripts/sweep_transformers.py` goes through."""
    made = make(CONFIG_MAPPING[name])
    assert not isinstance(made, str), made
    verdict, notes = judge(*made)
    assert (verdict, MODELS[name][1] in "; ".join(notes)) == (MODELS[name][0], True), notes


def swin() -> nn.Module:
    sizes = {"embed_dim": 16, "depths": [1], "num_heads": [2], "window_size": 4}
    return transformers.SwinModel(transformers.SwinConfig(image_size=16, patch_size=2, **sizes))


def beit() -> nn.Module:
    return transformers.BeitModel(transformers.BeitConfig(use_relative_position_bias=True, **IMAGE, **SMALL))


def mask_decoder() -> nn.Module:
    config = transformers.SamMaskDecoderConfig(hidden_size=32, mlp_dim=32, num_attention_heads=4)
    return transformers.models.sam.modeling_sam.SamMaskDecoder(config)


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (swin, "bias between tokens (`relative_position_bias`)"),
        (beit, "bias between tokens (`relative_position_bias`)"),
        (mask_decoder, "must be given key, which need not be its own tokens"),
    ],
)
def test_what_could_never_run_is_left_alone(make, reason: str) -> None:
    with pytest.raises(ValueError, match=r"nothing in .* was converted") as error:
        rb.convert(make(), 4)
    assert reason in str(error.value)


@pytest.mark.parametrize("cls", ["Blip2VisionModel", "Qwen2VisionTransformerPretrainedModel"])
def test_masks_by_keyword(cls: str) -> None:
    """And packed images, which are split into sets before attention."""
    if cls == "Blip2VisionModel":
        model = transformers.Blip2VisionModel(transformers.Blip2VisionConfig(**IMAGE, **SMALL))
        inputs = {"pixel_values": torch.randn(2, 3, 16, 16, dtype=torch.float64)}
    else:
        module = transformers.models.qwen2_vl.modeling_qwen2_vl
        sizes = {"embed_dim": 16, "hidden_size": 16, "num_heads": 2, "patch_size": 4, "depth": 2}
        model = getattr(module, cls)(module.Qwen2VLVisionConfig(**sizes))
        grid = torch.tensor([[1, 4, 4], [1, 2, 4]])
        inputs = {"hidden_states": torch.randn(24, 3 * 2 * 4 * 4, dtype=torch.float64), "grid_thw": grid}
    model = model.double().eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    want = model(**inputs).last_hidden_state
    report = rb.convert(model, ONE_BATCH)
    assert len(report.converted) == 2
    torch.testing.assert_close(model(**inputs).last_hidden_state, want, **FLOAT64)
    rb.convert(model, 3)
    assert not torch.allclose(model(**inputs).last_hidden_state, want)


@pytest.mark.parametrize("lengths", [[12], [12, 12, 12], [12, 5, 8]])
def test_a_converted_model_compiles_as_one_graph(lengths: list[int]) -> None:
    """In a process of its own: the checks of shapes while tests run cannot be compiled."""
    code = f"""
import torch, transformers, randbatch as rb
config = transformers.BertConfig(
    vocab_size=50, hidden_size=16, num_hidden_layers=1, num_attention_heads=4, intermediate_size=32)
model = transformers.BertModel(config).double().eval()
keep = torch.arange(12) < torch.tensor({lengths})[:, None]
inputs = {{"input_ids": torch.randint(0, 50, keep.shape), "attention_mask": keep.long()}}
full = model(**inputs).last_hidden_state
rb.convert(model, 3)
want = model(**inputs).last_hidden_state
assert not torch.allclose(want[keep], full[keep])
compiled = torch.compile(model, fullgraph=True, backend="eager")
torch.testing.assert_close(compiled(**inputs).last_hidden_state[keep], want[keep])
"""
    subprocess.run([sys.executable, "-c", code], check=True)
