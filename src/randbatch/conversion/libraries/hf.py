"""Hugging Face transformers: which of its attentions can be put into random batches, and how they are.

A module keeps its forward. It gets settings, and its config an attention implementation that serves modules which hold
some (see `hf_interface`). Its class becomes a subclass that refuses other tokens than the module's own, and that can be
unpickled in another process.
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

from randbatch._errors import InvalidValue
from randbatch.conversion.adapters import AdapterRule, RandomBatches
from randbatch.conversion.arguments import is_cross_by_name, other_tokens, reads_last_row
from randbatch.conversion.libraries.hf_interface import attend, is_over, name_over, register_function, register_over
from randbatch.conversion.rules import Ancestors
from randbatch.conversion.swap import Undo, bare_class, undo_each
from randbatch.nn.config import RandomBatchConfig
from randbatch.partition import fold_seed

__all__ = ["RULES", "register"]

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


def register(batch_size: int | RandomBatchConfig, *, name: str = "random_batch", **options: Any) -> None:
    """Make `name` an attention implementation of transformers: every attention of a model that is set to it.

    Prefer `randbatch.convert`: it looks at the whole model first, can be undone, and gives each layer a seed of its
    own. By name, layers without a `layer_idx` (the vision models have none) share their partitions in eval; what cannot
    be served is refused when it is called; and a class that never asks transformers for an attention function keeps its
    full attention, which a warning names.

    Args:
        batch_size: p >= 2, tokens in a random batch; or a `randbatch.nn.RandomBatchConfig` with all settings.
        name: what `set_attn_implementation` or `attn_implementation=` takes.
        **options: other options of `randbatch.nn.RandomBatchConfig`, such as `estimator`, `rounds` or `seed`. A layer
            with a `layer_idx` derives its own seed.

    Raises:
        ImportError: transformers is not installed.
        TypeError: an unknown option, or an argument that must be an int is not.
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
    default = RandomBatchConfig.of(batch_size, options)

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
            raise InvalidValue(f"attention implementation {name!r} cannot serve {type(module).__name__}: {reason}")
        layer = getattr(module, "layer_idx", None)
        sampling = default if layer is None else default.copy(seed=fold_seed(default.seed, layer))
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


@dataclass
class _Switched:
    """A config that is set to random batches, and how many conversions want it to be."""

    config: ref[Any]
    before: str | None
    record: dict[str, Any] | None
    users: int = 0


_switched: dict[int, _Switched] = {}  # by the id of the config, which has no hash


def _record(settings: RandomBatchConfig) -> dict[str, Any]:
    """What `convert` was told, to be told again: what is not the default, but for the backend of this machine."""
    return {name: value for name, value in settings.changed().items() if name != "backend"}


def _switch(module: Any, sampling: RandomBatchConfig) -> Undo:
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
    previous, record = vars(config).get("random_batch"), _record(sampling)
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


class _Attention(AdapterRule):
    """The module's own forward, which asks transformers for an attention function; see `hf_interface`."""

    name = "transformers attention"
    changes = (
        "a token, special ones like [CLS] too, attends to its random batch; padding takes no part, and its rows are "
        "zero; modules left alone under the same config attend as before; a saved config remembers it as "
        "`random_batch`, but from_pretrained makes full attention: convert again"
    )

    def serves(self, cls: type[nn.Module]) -> bool:
        return _INTERFACE in _words(vars(cls).get("forward"))

    def why_not(self, module: nn.Module, ancestors: Ancestors) -> str | None:
        return _why_not(module, ancestors)

    def adapter(self, module: nn.Module, batches: RandomBatches, /, *args: Any, **kwargs: Any) -> Any:
        batches.refuse_other_tokens(args, kwargs)
        return batches.forward(*args, **kwargs)

    def subclass(self, original: type[nn.Module], base: type[nn.Module]) -> type[nn.Module]:
        register_over()  # what the config of a module that is loaded may name already
        return super().subclass(original, base)

    def swap(self, module: nn.Module, settings: RandomBatchConfig) -> Undo:
        """Convert the module, and switch its config, which other modules may share."""
        return undo_each(super().swap(module, settings), _switch(module, settings))

    def renew(self, module: nn.Module, settings: RandomBatchConfig) -> Undo:
        """As a user may have set another implementation since, the config is switched again."""
        return undo_each(_switch(module, settings), super().renew(module, settings))


RULES = (_Attention(),)
