"""Hugging Face transformers: which of its attentions can be put into random batches, and how they are.

A module keeps its forward; it gets a sampling, and its config an attention implementation that serves modules with one
(see `hf_interface`). Its class becomes a subclass that refuses other tokens than the module's own, and that knows where
it comes from when a copy is unpickled.
"""

from __future__ import annotations

import inspect
import re
import sys
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from types import CodeType
from typing import Any
from weakref import ref

from torch import Tensor, nn

from randbatch.integrations.arguments import is_cross_by_name, other_tokens, reads_last_row, refuse_other_tokens
from randbatch.integrations.hf_interface import attend, is_over, name_over, register_function, register_over
from randbatch.integrations.rules import Ancestors, Rule, Undo, add_rule, add_teacher, swap_module
from randbatch.integrations.swap import bare_class
from randbatch.nn.sampling import Sampling
from randbatch.partition import fold_seed

__all__ = ["register"]

_INTERFACE = "ALL_ATTENTION_FUNCTIONS"
# Keywords that an attention hands to its function, which no random batch can heed.
_KEYWORDS = {
    "attention_similarity": "it takes a bias between tokens",
    "block_indices": "it attends to blocks of its own choice",
    "indices": "it attends to tokens of its own choice",
    "position_bias": "it adds a position bias between tokens",
    "s_aux": "its softmax has a sink",
    "sinks": "its softmax has a sink",
}
_BIAS = re.compile(r"rel(ative)?_?pos|position_bias|relative_(attention|k)|attention_bias(es)?$|decay", re.IGNORECASE)
_REDUCED = re.compile(r"sequence_reduction$|^sr$|(kv|key|k)_?pool")
_CAUSAL = re.compile(r"(create|make|prepare|update)\w*_causal\w*_mask")
_BLOCKS = {"generate_block_attention_mask"}


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

    Prefer `randbatch.convert`: it looks at the whole model first, can be undone, and gives each layer a seed of its
    own. By name, layers without a `layer_idx` (the vision models have none) share their partitions in eval; what cannot
    be served is refused when it is called; and a class that never asks transformers for an attention function keeps its
    full attention, which a warning names.

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
    default = Sampling(
        batch_size, estimator=estimator, rounds=rounds, eval_rounds=eval_rounds, backend=backend, seed=seed
    )

    def attend_by_name(
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None = None,
        **options: Any,
    ) -> Any:
        reason = _why_not(module, ()) or _why_not_by_name(type(module))
        if reason is not None:
            raise ValueError(f"attention implementation {name!r} cannot serve {type(module).__name__}: {reason}")
        layer = getattr(module, "layer_idx", None)
        sampling = default if layer is None else default.copy(seed=fold_seed(seed, layer))
        return attend(sampling, module, query, key, value, attention_mask, **options)

    register_function(name, attend_by_name, before="eager", notice=_warn_of_those_that_never_ask)


def _why_not_by_name(kind: type[nn.Module]) -> str | None:
    others = ", ".join(other.name for other in other_tokens(kind))
    return (
        f"it may be given other tokens to attend to ({others}), which does not show here; randbatch.convert checks it"
        if others
        else None
    )


@cache
def _warn_of_those_that_never_ask(kind: type[Any]) -> None:
    """Name the attentions beside a class of configs that are written out by hand."""
    beside = sys.modules.get(kind.__module__.replace(".configuration_", ".modeling_"))
    silent = [name for name, cls in vars(beside).items() if _is_by_hand(cls)] if beside is not None else []
    if silent:
        warnings.warn(
            f"the code of {', '.join(silent)} asks transformers for no attention function: in a model that holds it, "
            "it attends to all tokens, as before",
            stacklevel=2,
        )


def _is_by_hand(cls: Any) -> bool:
    if not (isinstance(cls, type) and issubclass(cls, nn.Module)) or "attention" not in cls.__name__.lower():
        return False
    words = _words(cls.forward)
    return _INTERFACE not in words and bool({"softmax", "scaled_dot_product_attention"} & words)


@cache
def _words(forward: Any) -> frozenset[str]:
    """The names and the keywords in the code of a forward, below its decorators."""
    code = getattr(inspect.unwrap(forward), "__code__", None) if callable(forward) else None
    return frozenset() if code is None else frozenset(_words_of(code))


def _words_of(code: CodeType) -> Iterator[str]:
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _words_of(constant)
        for word in constant if isinstance(constant, tuple) else (constant,):
            if isinstance(word, str):
                yield word


def _why_not(module: Any, ancestors: Ancestors) -> str | None:
    kind = bare_class(module)
    config = getattr(module, "config", None)
    if config is None:
        return "it has no config, by which transformers finds its attention function"
    keywords = _words(kind.forward) & set(_KEYWORDS)
    if keywords:
        return _KEYWORDS[min(keywords)]
    for name in _held(module):
        if _BIAS.search(name):
            return f"it adds a bias between tokens (`{name}`)"
        if "softcap" in name:
            return f"it caps its logits (`{name}`)"
        if _REDUCED.search(name):
            return f"its tokens attend to fewer, reduced ones (`{name}`)"
    return _why_not_a_set(module, ancestors) or _why_other_tokens(module, kind, ancestors)


def _held(module: nn.Module) -> list[str]:
    """The names of what a module holds, without what is None or off."""
    inside = (*module.named_parameters(recurse=False), *module.named_children())
    return [name for name, value in (*vars(module).items(), *inside) if value is not None and value is not False]


def _why_not_a_set(module: Any, ancestors: Ancestors) -> str | None:
    if getattr(module, "is_causal", False) or getattr(module.config, "is_decoder", False):
        return "it is causal: a random batch has no order"
    # a model makes the masks of those that share its config
    sharing = [ancestor for ancestor in ancestors if getattr(ancestor, "config", None) is module.config]
    bias = next((name for ancestor in ancestors for name in _held(ancestor) if "position_bias" in name), None)
    if bias is not None:
        return f"the model around it adds a bias between tokens (`{bias}`)"
    around = [_words(bare_class(ancestor).forward) for ancestor in sharing]
    if any(_CAUSAL.search(word) for words in around for word in words):
        return "the model around it makes a causal mask: a random batch has no order"
    if any(words & _BLOCKS for words in around):
        return "the model around it makes a mask between tokens"
    if any(reads_last_row(bare_class(ancestor)) for ancestor in sharing):
        return "the model around it reads the last row, which may be padding, and such rows are zero in random batches"
    if getattr(module, "sliding_window", None) is not None:
        return "it attends inside a sliding window already"
    return None


def _why_other_tokens(module: Any, kind: type[nn.Module], ancestors: Ancestors) -> str | None:
    if is_cross_by_name(module, ancestors) or getattr(module, "is_cross_attention", False):
        return "it is cross-attention: random batches are for self-attention"
    if "pool" in kind.__name__.lower():
        return "it pools: its queries are not the tokens it attends to"
    needed = [other.name for other in other_tokens(kind) if other.must]
    if needed:
        return f"it must be given {' and '.join(needed)}, which need not be its own tokens"
    return None


def _swap(module: Any, sampling: Sampling) -> Undo:
    """Give the module its sampling, and switch its config, which other modules may share."""
    undo_module = swap_module(module, sampling)
    undo_config = _switch(module, sampling)

    def undo() -> None:
        undo_module()
        undo_config()

    return undo


@dataclass
class _Switched:
    """A config that is set to random batches, and how many conversions want it to be."""

    config: ref[Any]
    before: str | None
    record: dict[str, Any] | None
    users: int = 0


_switched: dict[int, _Switched] = {}  # by the id of the config, which has no hash


def _switch(module: Any, sampling: Sampling) -> Undo:
    """Let the config name an implementation that serves the module, and say what it is; undone with its last user."""
    register_over()
    config: Any = module.config
    shared = _switched.get(id(config))
    if shared is None or shared.config() is not config:
        shared = _Switched(ref(config), config._attn_implementation, vars(config).get("random_batch"))
        _switched[id(config)] = shared
    shared.users += 1
    if not is_over(config._attn_implementation):
        # not the property, which would switch the configs inside it too
        config._attn_implementation_internal = name_over(config._attn_implementation)
    names = ("batch_size", "estimator", "rounds", "eval_rounds", "chunk_batches")
    previous, record = (
        vars(config).get("random_batch"),
        {name: getattr(getattr(sampling, name), "name", getattr(sampling, name)) for name in names},
    )
    config.random_batch = record

    def undo() -> None:
        shared.users -= 1
        last = shared.users == 0
        if last:
            _switched.pop(id(config), None)
            config._attn_implementation_internal = shared.before
        back = shared.record if last else previous
        if not last and vars(config).get("random_batch") is not record:
            return  # a later conversion has said what it is
        if back is None:
            vars(config).pop("random_batch", None)
        else:
            config.random_batch = back

    return undo


_RULE = Rule(
    "transformers attention",
    "a token, special ones like [CLS] too, attends to its random batch; padding takes no part, and its rows are zero; "
    "modules left alone under the same config attend as before; a saved config remembers it as `random_batch`, but "
    "from_pretrained makes full attention: convert again",
    _swap,
    _why_not,
    again=_switch,
)


def _teach(cls: type[nn.Module]) -> None:
    if _INTERFACE not in _words(vars(cls).get("forward")):
        return
    register_over()

    others = other_tokens(cls)

    def forward(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        refuse_other_tokens(cls, others, args, kwargs)
        return cls.forward(module, *args, **kwargs)

    add_rule(cls, _RULE, forward)


add_teacher(_teach)
