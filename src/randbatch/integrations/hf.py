"""Hugging Face transformers: random batches behind `AttentionInterface` and `AttentionMaskInterface`.

Shape letters: B sets, N tokens, H heads, D head size.
"""

from __future__ import annotations

import inspect
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from randbatch._optional import require
from randbatch._shapes import Shaped
from randbatch.integrations.rules import Ancestors, Rule, Undo, add_rule, add_teacher
from randbatch.integrations.sdpa import key_mask
from randbatch.nn.sampling import Sampling, attend_in_batches, sampling_of
from randbatch.partition import fold_seed

__all__ = ["register"]

_CONVERTED = "random_batch_converted"  # modules with a Sampling of their own; others under the same config run sdpa
_REFUSED = ("position_bias", "softcap", "sliding_window", "s_aux", "head_mask", "cache")


def register(
    batch_size: int,
    *,
    name: str = "random_batch",
    estimator: str = "plain",
    rounds: int = 1,
    eval_rounds: int | None = None,
    backend: str = "auto",
    seed: int = 0,
) -> None:
    """Make `name` an attention implementation of transformers: every attention of a model that is set to it.

    `randbatch.convert` does the same for one model, module by module, can be undone, and gives each layer a seed of its
    own; by name, layers without a `layer_idx` (the vision models have none) share their partitions in eval.

    Args:
        batch_size: p >= 2, tokens in a random batch.
        name: what `set_attn_implementation` or `attn_implementation=` takes.
        estimator: how in-batch outputs estimate full attention.
        rounds: partitions per call in training.
        eval_rounds: partitions per call in eval. Default: the same as `rounds`.
        backend: of softmax attention.
        seed: the partitions of eval; a layer with a `layer_idx` derives its own.

    Raises:
        ImportError: transformers is not installed.
        TypeError: an argument that must be an int is not.
        ValueError: a number out of range or an unknown name.

    Example:
        >>> import torch
        >>> from transformers import BertConfig, BertModel
        >>> register(batch_size=64)
        >>> config = BertConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=32)
        >>> model = BertModel(config)
        >>> model.set_attn_implementation("random_batch")
        >>> model(torch.randint(0, 100, (2, 300))).last_hidden_state.shape
        torch.Size([2, 300, 32])
    """
    default = Sampling(batch_size, estimator, rounds, eval_rounds, backend, seed)

    def attend(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **options: Any
    ) -> Any:
        reason = _why_not(module, ())
        if reason is not None:
            raise ValueError(f"attention implementation {name!r} cannot serve {type(module).__name__}: {reason}")
        layer = getattr(module, "layer_idx", None)
        sampling = default if layer is None else replace(default, seed=fold_seed(seed, layer))
        return _attend(sampling, module, query, key, value, mask, **options)

    _register(name, attend)


def _register(name: str, attend: Any) -> None:
    transformers = require("transformers")
    transformers.AttentionInterface.register(name, attend)
    transformers.AttentionMaskInterface.register(name, _make_mask)


def _make_mask(*, mask_function: Any, attention_mask: Tensor | None = None, **options: Any) -> Tensor | None:
    """The padding mask as it came, `[B, N]`, True = token; any other mask as sdpa gets it, `[B, 1, Q, N]`."""
    masking = require("transformers.masking_utils")
    if mask_function is masking.bidirectional_mask_function:
        return attention_mask
    return masking.sdpa_mask(mask_function=mask_function, attention_mask=attention_mask, **options)


def _attend(
    sampling: Sampling,
    module: nn.Module,
    query: Shaped[Tensor, "b h n d"],
    key: Shaped[Tensor, "b k m d"],
    value: Shaped[Tensor, "b k m e"],
    mask: Tensor | None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    output_attentions: bool | None = None,
    **options: Any,
) -> tuple[Shaped[Tensor, "b n h e"], None]:
    """What `AttentionInterface` calls, for a module whose attention is that of a set."""
    if is_causal:
        raise ValueError("is_causal must be False: a random batch has no order")
    if output_attentions:
        raise ValueError(
            "output_attentions must be False: weights inside a random batch are not those of the whole set"
        )
    for name in _REFUSED:
        if options.get(name) is not None:
            raise ValueError(f"{name} must be None: random batches take no mask, bias or cap between tokens")
    num_sets, num_heads, num_tokens, _ = query.shape
    if key.shape[2] != num_tokens:
        raise ValueError(f"key has {key.shape[2]} tokens and query {num_tokens}: random batches are for self-attention")
    if key.shape[1] != num_heads:  # grouped heads arrive unrepeated
        key, value = (tensor.repeat_interleave(num_heads // key.shape[1], dim=1) for tensor in (key, value))
    if mask is not None and mask.dim() != 2:
        mask = key_mask(mask, num_sets, num_tokens, "attention_mask")
    turned = [tensor.transpose(1, 2) for tensor in (query, key, value)]
    return attend_in_batches(sampling, module.training, *turned, mask=mask, scale=scaling, dropout_p=dropout), None


def _attend_if_converted(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **options: Any
) -> Any:
    """A module that was left alone shares its config with converted ones: it attends by sdpa."""
    sampling = sampling_of(module)
    if sampling is not None:
        return _attend(sampling, module, query, key, value, mask, **options)
    if mask is not None and mask.dim() == 2:
        mask = mask[:, None, None, :]
    sdpa = require("transformers.modeling_utils").ALL_ATTENTION_FUNCTIONS["sdpa"]
    return sdpa(module, query, key, value, mask, **options)


def _names(forward: Any) -> tuple[str, ...]:
    """The names that the code of a forward uses, below its decorators."""
    code = getattr(inspect.unwrap(forward), "__code__", None) if callable(forward) else None
    return () if code is None else code.co_names


def _why_not(module: Any, ancestors: Ancestors) -> str | None:
    if getattr(module, "is_causal", False) or getattr(module.config, "is_decoder", False):
        return "it is causal: a random batch has no order"
    if any("create_causal_mask" in _names(getattr(type(ancestor), "forward", None)) for ancestor in ancestors):
        return "the model around it makes a causal mask: a random batch has no order"
    if "cross" in type(module).__name__.lower() or getattr(module, "is_cross_attention", False):
        return "it is cross-attention: random batches are for self-attention"
    if getattr(module, "sliding_window", None) is not None:
        return "it attends inside a sliding window already"
    return None


def _swap(module: Any, sampling: Sampling) -> Undo:
    """Give the module its sampling and switch its config, which other modules may share."""
    _register(_CONVERTED, _attend_if_converted)
    config = module.config
    before = config._attn_implementation
    config._attn_implementation = _CONVERTED
    module.sampling = sampling

    def undo() -> None:
        config._attn_implementation = before
        del module.sampling

    return undo


_RULE = Rule(
    "transformers attention",
    "a token, special ones like [CLS] too, attends to its random batch; padding takes no part, and its rows are zero; "
    "modules left alone under the same config attend by sdpa",
    _swap,
    _why_not,
)


def _teach(cls: type[nn.Module]) -> None:
    if "ALL_ATTENTION_FUNCTIONS" in _names(vars(cls).get("forward")):
        add_rule(cls, _RULE)


add_teacher(_teach)
