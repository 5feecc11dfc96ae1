"""Rules for torch's own modules: `MultiheadAttention`, and the encoder and decoder around it."""

from __future__ import annotations

from functools import cache
from typing import Any

from torch import nn

from randbatch.integrations.arguments import is_cross_by_name, why_not_itself
from randbatch.integrations.rules import Ancestors, Rule, Undo, add_rule, make_subclass
from randbatch.integrations.swap import bare_class, set_attributes, set_class
from randbatch.nn.attention import RandomBatchAttention, no_fast_path
from randbatch.nn.sampling import ATTRIBUTE, Sampling

__all__: list[str] = []


def _why_not(module: nn.Module, ancestors: Ancestors) -> str | None:
    attention: Any = module
    if any(isinstance(ancestor, nn.TransformerDecoderLayer) for ancestor in ancestors):
        return "it belongs to a decoder layer: causal self-attention and cross-attention have no random batches"
    if not attention._qkv_same_embed_dim:
        return f"it is cross-attention: kdim {attention.kdim} or vdim {attention.vdim} is not embed_dim"
    if attention.bias_k is not None or attention.add_zero_attn:
        return "add_bias_kv and add_zero_attn put a token into every set that belongs to no batch"
    if is_cross_by_name(module, ancestors):
        return "its name says that it is cross-attention: random batches are for self-attention"
    return why_not_itself(module, ancestors)


@cache
def _subclass(original: type[Any]) -> type[nn.Module]:
    """`RandomBatchAttention` with the methods of a subclass that leaves torch's forward alone."""
    if original is nn.MultiheadAttention:
        return RandomBatchAttention
    return make_subclass((RandomBatchAttention, original), _subclass, {})


def _swap(module: nn.Module, sampling: Sampling) -> Undo:
    undo_attributes = set_attributes(module, interaction="softmax", **{ATTRIBUTE: sampling})
    undo_class = set_class(module, _subclass(bare_class(module)))
    hook = module.register_forward_pre_hook(no_fast_path)

    def undo() -> None:
        undo_class()
        undo_attributes()
        hook.remove()

    return undo


def _no_nested_tensors(module: nn.Module, sampling: Sampling) -> Undo:
    encoder: Any = module
    before = encoder.use_nested_tensor
    encoder.use_nested_tensor = False

    def undo() -> None:
        encoder.use_nested_tensor = before

    return undo


add_rule(
    nn.MultiheadAttention,
    Rule(
        "torch attention",
        "a token attends to its random batch; weights, causal masks and masks between tokens are refused when called",
        _swap,
        _why_not,
        attributes=(ATTRIBUTE, "interaction"),
    ),
)
add_rule(
    nn.TransformerEncoder,
    Rule(
        "torch encoder",
        "no nested tensors and no fused fast path in eval; padded rows come out as the layers make them, not as zeros",
        _no_nested_tensors,
        around=lambda module: module.modules() if module.use_nested_tensor else (),
        attributes=(),
        any_forward=True,
    ),
)
