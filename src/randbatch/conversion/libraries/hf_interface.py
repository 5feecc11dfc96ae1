"""What transformers calls: attention functions for `AttentionInterface`, mask functions for `AttentionMaskInterface`.

A mask that says the same to every query is made once and expanded, without memory, to the shape and format that the
model had before. So a module that was left alone, or never asks for an attention function, reads what it always read.

Shape letters: B sets, N tokens, H heads, D head size.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from randbatch._errors import InvalidType, InvalidValue
from randbatch._optional import require
from randbatch._shapes import Shaped
from randbatch.conversion.through_sdpa import key_mask
from randbatch.nn.batches import attend_in_batches
from randbatch.nn.config import RandomBatchConfig, config_of

__all__ = ["attend", "is_over", "name_over", "register_function", "register_over"]

_OVER = "random_batch_over_"
# What transformers and its models hand on to every attention, and what changes no output of it.
_WITHOUT_EFFECT = {
    "deterministic": "which flash kernel runs",
    "num_items_in_batch": "of the loss",
    "output_hidden_states": "what the model returns",
    "output_router_logits": "what the model returns",
    "position_ids": "query and key know their positions; packed sequences come as masks",
    "return_dict": "what the model returns",
    "use_cache": "what the model returns",
}


def attend(
    config: RandomBatchConfig,
    module: nn.Module,
    query: Shaped[Tensor, "b h n d"],
    key: Shaped[Tensor, "b k m d"],
    value: Shaped[Tensor, "b k m e"],
    attention_mask: Tensor | None = None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    output_attentions: bool | None = None,
    causal_unless_said: bool = True,
    **options: Any,
) -> tuple[Shaped[Tensor, "b n h e"], None]:
    """An attention function, for a module whose attention is that of a set.

    `causal_unless_said`: as transformers' sdpa has it, a module without a mask and without `is_causal` is causal; its
    eager attention is not.

    Raises:
        ValueError: it is not, or a keyword came that is not known to leave the output as it is.
    """
    num_sets, num_heads, num_tokens, _ = query.shape
    causal = getattr(module, "is_causal", causal_unless_said) if is_causal is None else is_causal
    if is_causal or (causal and attention_mask is None and num_tokens > 1):
        raise InvalidValue("is_causal must be False: a random batch has no order")
    if output_attentions:
        raise InvalidValue(
            "output_attentions must be False: weights inside a random batch are not those of the whole set"
        )
    for name, option in options.items():
        if option is not None and option is not False and name not in _WITHOUT_EFFECT:
            raise InvalidValue(f"{name} must be None: attention in random batches would not heed it")
    if key.shape[0] != num_sets or key.shape[2] != num_tokens:
        raise InvalidValue(
            f"key must be of the {num_tokens} tokens of query, got {list(key.shape)} for {list(query.shape)}: random "
            "batches are for self-attention"
        )
    if key.shape[1] != num_heads:  # grouped heads arrive unrepeated
        key, value = (tensor.repeat_interleave(num_heads // key.shape[1], dim=1) for tensor in (key, value))
    mask = _as_key_mask(attention_mask, num_sets, num_tokens)
    turned = [tensor.transpose(1, 2) for tensor in (query, key, value)]
    return attend_in_batches(config, module.training, *turned, mask=mask, scale=scaling, dropout_p=dropout), None


def _as_key_mask(mask: Any, num_sets: int, num_tokens: int) -> Tensor | None:
    if mask is not None and not isinstance(mask, Tensor):
        raise InvalidType(f"attention_mask must be a tensor or None, got {type(mask).__name__}")
    if mask is not None and mask.dim() == 2 and not mask.is_floating_point():  # as flash attention gets it
        if list(mask.shape) != [num_sets, num_tokens]:
            raise InvalidValue(f"attention_mask must be {[num_sets, num_tokens]}, got {list(mask.shape)}")
        return mask.bool()
    return key_mask(mask, num_sets, num_tokens, "attention_mask")


def register_function(
    name: str, function: Callable[..., Any], before: str, notice: Callable[[type[Any]], None] | None = None
) -> None:
    """Make `name` an attention implementation whose masks are of the format that `before` takes.

    `notice` is called with the class of every config that a mask is made for.
    """
    transformers = require("transformers")
    transformers.AttentionInterface.register(name, function)
    transformers.AttentionMaskInterface.register(name, _masks_over(before, notice))


def name_over(before: str | None) -> str:
    """The implementation for a config that had `before`: modules with a sampling are served, others as before."""
    masks = require("transformers.masking_utils").ALL_MASK_ATTENTION_FUNCTIONS.valid_keys()
    return f"{_OVER}{before if before in masks else 'sdpa' if before else 'eager'}"


def register_over() -> None:
    """Register an implementation over each that there is."""
    functions = require("transformers.modeling_utils").ALL_ATTENTION_FUNCTIONS
    masks = require("transformers.masking_utils").ALL_MASK_ATTENTION_FUNCTIONS
    for before in {"eager", *functions.valid_keys()}.intersection(masks.valid_keys()):
        name = name_over(before)
        if not before.startswith(_OVER) and name not in functions.valid_keys():
            register_function(name, _attend_over(before, functions), before)


def is_over(name: str | None) -> bool:
    """Whether a config is set to an implementation by `name_over`."""
    return name is not None and name.startswith(_OVER)


def _attend_over(before: str, functions: Any) -> Callable[..., Any]:
    def attend_if_converted(
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None = None,
        **options: Any,
    ) -> Any:
        """Modules that were left alone share their config with those that were converted."""
        config = config_of(module)
        if config is not None:
            options["causal_unless_said"] = before != "eager"
            return attend(config, module, query, key, value, attention_mask, **options)
        function = _eager_of(module) if before == "eager" else functions[before]
        return function(module, query, key, value, attention_mask, **options)

    return attend_if_converted


def _eager_of(module: nn.Module) -> Callable[..., Any]:
    """The module's eager attention: transformers keeps it beside the class."""
    forward: Any = inspect.unwrap(type(module).forward)
    name = next((word for word in forward.__code__.co_names if word.endswith("eager_attention_forward")), None)
    if name is None:
        raise InvalidValue(
            f"{type(module).__name__} has no eager attention that could be found; call set_attn_implementation('sdpa') "
            "before the model is converted"
        )
    return forward.__globals__[name]


def _masks_over(before: str, notice: Callable[[type[Any]], None] | None = None) -> Callable[..., Any]:
    masking = require("transformers.masking_utils")
    make, bidirectional = masking.ALL_MASK_ATTENTION_FUNCTIONS[before], masking.bidirectional_mask_function
    one_row = before in ("eager", "sdpa")

    def make_mask(*, mask_function: Any, **options: Any) -> Any:
        if notice is not None and not torch.compiler.is_compiling():
            notice(type(options.get("config")))
        if not one_row or mask_function is not bidirectional:
            return make(mask_function=mask_function, **options)
        positions = options.get("cache_position")  # transformers 5.0 numbers the queries by it
        num_queries = options["q_length"] if positions is None else positions.shape[0]
        options.update({"q_length": 1} if positions is None else {"cache_position": positions[:1]})
        mask = make(mask_function=mask_function, **options)
        return None if mask is None else mask.expand(-1, -1, num_queries, -1)

    return make_mask
