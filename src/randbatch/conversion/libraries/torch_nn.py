"""Rules for torch's own modules: `MultiheadAttention`, and the encoder and decoder around it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn

from randbatch.conversion.arguments import is_cross_by_name, why_not_itself
from randbatch.conversion.rules import REGISTRY, Ancestors, Rule, make_subclass
from randbatch.conversion.swap import Undo, bare_class, set_attributes, set_class, undo_each
from randbatch.nn.attention import RandomBatchAttention, no_fast_path
from randbatch.nn.config import ATTRIBUTE, RandomBatchConfig

__all__ = ["RULES"]


class _Attention(Rule):
    """It becomes `RandomBatchAttention`, with the methods of a subclass that leaves torch's forward alone."""

    name = "torch attention"
    changes = (
        "a token attends to its random batch; weights, causal masks and masks between tokens are refused when called"
    )
    cls = nn.MultiheadAttention

    def why_not(self, module: Any, ancestors: Ancestors) -> str | None:
        if any(isinstance(ancestor, nn.TransformerDecoderLayer) for ancestor in ancestors):
            return "it belongs to a decoder layer: causal self-attention and cross-attention have no random batches"
        if not module._qkv_same_embed_dim:
            return f"it is cross-attention: kdim {module.kdim} or vdim {module.vdim} is not embed_dim"
        if module.bias_k is not None or module.add_zero_attn:
            return "add_bias_kv and add_zero_attn put a token into every set that belongs to no batch"
        if is_cross_by_name(module, ancestors):
            return "its name says that it is cross-attention: random batches are for self-attention"
        return why_not_itself(module, ancestors)

    def subclass(self, original: type[nn.Module], base: type[nn.Module]) -> type[nn.Module]:
        return RandomBatchAttention if original is base else make_subclass((RandomBatchAttention, original), {})

    def swap(self, module: nn.Module, settings: RandomBatchConfig) -> Undo:
        cls = REGISTRY.subclass_of(bare_class(module))
        undo_attributes = set_attributes(module, **{ATTRIBUTE: settings})
        undo_class = set_class(module, cls)
        hook = module.register_forward_pre_hook(no_fast_path)
        return undo_each(undo_class, undo_attributes, hook.remove)


class _Encoder(Rule):
    name = "torch encoder"
    changes = (
        "no nested tensors and no fused fast path in eval; padded rows come out as the layers make them, not as zeros"
    )
    cls = nn.TransformerEncoder
    sets = ()
    any_forward = True

    def depends_on(self, module: Any) -> Iterable[nn.Module]:
        return module.modules() if module.use_nested_tensor else ()

    def swap(self, module: Any, settings: RandomBatchConfig) -> Undo:
        before = module.use_nested_tensor
        module.use_nested_tensor = False

        def undo() -> None:
            module.use_nested_tensor = before

        return undo


RULES = (_Attention(), _Encoder())
