"""The rows: every module and option, small, from the package's own lists, so that a new one is a row at once."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

import randbatch as rb
from randbatch.estimators import ESTIMATORS
from randbatch.interactions import INTERACTIONS
from randbatch.kernels import BACKENDS, Problem
from randbatch.models import ATTENTIONS, CONVOLUTIONS
from randbatch.nn import RandomBatch, RandomBatchAttention, RandomBatchConfig
from randbatch.nn.config import config_of

N, P = 49, 18  # batches of 16 and 17: torch's fused attention on a CPU begins at 16
SMALL = 11, 4  # for checks that take a step for every number
C, H = 8, 2

OP, LAYER, WRAPPER = "random_batch_attention", "nn.RandomBatchAttention", "nn.RandomBatch"
FULL, MODEL, CONVERTED = "full_attention", "models.GraphTransformer", "convert"
Keywords = Callable[[int], dict[str, Any]]
Others = tuple[tuple[Any, ...], dict[str, Any]]
"""What there is beside the inputs: positional, and by name."""


def _nothing(n: int) -> dict[str, Any]:
    return {}


@dataclass(frozen=True)
class Subject:
    """A row.

    Attributes:
        group: what it belongs to, one of the names above.
        name: its options, as the page writes them.
        build: from the batch size to the module, with weights that are the same every time.
        shapes: of the floating-point inputs, from N.
        keywords: the other arguments, from N.
        traits: what refusals go by; a row that draws random batches in training gets "draws".
        backend: a backend asked for by name.
        same: whether the one input is query, key and value.
        named: the keyword of the one input.
        more: positional arguments after the inputs, from N.
    """

    group: str
    name: str
    build: Callable[[int], nn.Module]
    shapes: Callable[[int], list[tuple[int, ...]]]
    keywords: Keywords = _nothing
    traits: frozenset[str] = frozenset()
    backend: str | None = None
    same: bool = False
    named: str | None = None
    more: Callable[[int], tuple[Any, ...]] = field(default=lambda n: ())

    def __post_init__(self) -> None:
        if not self.traits & {"exact", "partition", "full", "settled"}:
            object.__setattr__(self, "traits", self.traits | {"draws"})

    @property
    def key(self) -> str:
        return f"{self.group}: {self.name}"

    def module(self, p: int = P) -> nn.Module:
        torch.manual_seed(0)
        module = self.build(p)
        with torch.no_grad():
            for parameter in module.parameters():  # no zero biases
                parameter.add_(torch.randn_like(parameter), alpha=0.2)
        return module

    @property
    def n(self) -> int:
        """N; what is interpreted gets fewer tokens."""
        return N if self.backend != "triton" else 2 * SMALL[0]

    def inputs(self, n: int | None = None, dtype: torch.dtype = torch.float32, seed: int = 1) -> list[Tensor]:
        """Leaves; those of float64 are the same numbers."""
        generator = torch.Generator().manual_seed(seed)
        drawn = [torch.randn(shape, generator=generator) for shape in self.shapes(self.n if n is None else n)]
        return [x.to(dtype).requires_grad_() for x in drawn]

    def call(self, module: Any, inputs: list[Tensor], others: Others | None = None) -> Tensor:
        """The output; graphs, masks and edges go by the N of the input if they are not given."""
        if others is None:
            n = inputs[0].shape[-2] if self.group not in (OP, FULL) else inputs[0].shape[0]
            others = self.more(n), self.keywords(n)
        arguments = (inputs[0],) * 3 if self.same else tuple(inputs)
        named = {}
        if self.named is not None:
            arguments, named = (), {self.named: inputs[0]}
        out = module(*arguments, *others[0], **others[1], **named)
        return out[0] if isinstance(out, tuple) else out

    def others(self, n: int) -> Others:
        """What there is beside inputs of N tokens."""
        return self.more(n), self.keywords(n)

    def why_not_here(self) -> str | None:
        """Why this machine has not got the row."""
        if self.backend is None:
            return None
        heads = torch.zeros(1, H, C // H)
        return BACKENDS[self.backend].why_not(Problem.of(heads, heads, None))


class Op(nn.Module):
    """The op as a module: in training it draws, in eval its seed is fixed."""

    def __init__(self, function: Callable[..., Tensor], **options: Any) -> None:
        super().__init__()
        self.function, self.options = function, options

    def forward(self, query: Tensor, key: Tensor, value: Tensor, **more: Any) -> Tensor:
        options = self.options | more
        if self.function is rb.random_batch_attention and "partition" not in options:
            options["seed"] = None if self.training else 0
        return self.function(query, key, value, **options)


class TwoProjections(nn.Module):
    """An attention that calls `F.scaled_dot_product_attention`, taught to `convert`."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(C, 3 * C), nn.Linear(C, C)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).reshape(*x.shape[:2], 3, H, C // H).permute(2, 0, 3, 1, 4).unbind(0)
        return self.out(nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


rb.convert.register(TwoProjections)(rb.convert.through_sdpa)


@cache  # so that no random number is drawn inside a transform
def graphs(n: int) -> Tensor:
    """Three graphs of unlike sizes, in no order."""
    return torch.tensor([0, 1, 0, 2, 0, 1])[torch.arange(n) % 6]


@cache
def padding(n: int) -> Tensor:
    """Three sets, the last with one token; True where there is none."""
    return torch.arange(n) >= torch.tensor([n, n // 2, 1]).unsqueeze(1)


@cache
def kept(n: int) -> Tensor:
    """The same, True where there is one."""
    return ~padding(n)


@cache
def kept_as_numbers(n: int) -> Tensor:
    return kept(n).long()


@cache
def partition(n: int) -> rb.Partition:
    return rb.random_partition(n, n // 4 + 1)


@cache
def edges(n: int) -> Tensor:
    return torch.randint(0, n, (2, 3 * n), generator=torch.Generator().manual_seed(2))


def options() -> Iterator[tuple[str, dict[str, Any], set[str]]]:
    """What the op and the layer share: name, keywords, traits."""
    for name in ESTIMATORS:
        yield name, {"estimator": name}, {name}
        yield f"{name}, rounds=2", {"estimator": name, "rounds": 2}, {name, "rounds"}
    for name in [name for name in INTERACTIONS if name != "softmax"]:
        yield name, {"interaction": name}, {name}
        yield f"{name}, rounds=2", {"interaction": name, "rounds": 2}, {name, "rounds"}
    yield "chunk_batches", {"chunk_batches": 2}, {"chunks"}
    yield "chunk_batches, rounds=2", {"chunk_batches": 2, "rounds": 2}, {"chunks", "rounds"}
    yield "dropout", {"dropout": 0.3}, {"dropout"}
    yield "dropout, backend='reference'", {"dropout": 0.3, "backend": "reference"}, {"dropout", "reference"}
    yield "dropout, rounds=2", {"dropout": 0.3, "rounds": 2}, {"dropout", "rounds"}
    yield "dropout, chunk_batches", {"dropout": 0.3, "chunk_batches": 2}, {"dropout", "chunks"}
    yield "batch_size >= N", {"batch_size": 10**6}, {"exact"}
    for name in BACKENDS:
        yield f"backend={name!r}", {"backend": name}, {f"backend {name}"}


def _qkv(n: int) -> list[tuple[int, ...]]:
    return [(n, H, C // H)] * 3


def _flat(n: int) -> list[tuple[int, ...]]:
    return [(n, C)]


def _sets(n: int) -> list[tuple[int, ...]]:
    return [(3, n, C)]


def _op_row(name: str, given: dict[str, Any], traits: set[str], keywords: Keywords = _nothing) -> Subject:
    given = {("dropout_p" if key == "dropout" else key): value for key, value in given.items()}

    def build(p: int) -> nn.Module:
        return Op(rb.random_batch_attention, **({"batch_size": p} | given))

    return Subject(OP, name, build, _qkv, keywords, frozenset(traits | {"op"}), given.get("backend"))


def _ops() -> Iterator[Subject]:
    for row in options():
        yield _op_row(*row)
    yield _op_row("batch", {}, {"graphs"}, lambda n: {"batch": graphs(n)})
    yield _op_row("partition", {}, {"partition"}, lambda n: {"partition": partition(n)})
    yield _op_row("tolerance", {"tolerance": 0.3}, {"tolerance"})
    yield Subject(FULL, "exact", lambda p: Op(rb.full_attention), _qkv, traits=frozenset({"op", "full"}))
    chunked = frozenset({"op", "full", "full chunks"})
    yield Subject(FULL, "chunk_size", lambda p: Op(rb.full_attention, chunk_size=16), _qkv, traits=chunked)


def _layer(given: dict[str, Any]) -> Callable[[int], nn.Module]:
    return lambda p: RandomBatchAttention(C, H, given.get("batch_size", p), seed=3, **_without_size(given))


def _without_size(given: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in given.items() if key != "batch_size"}


def _layer_row(name: str, given: dict[str, Any], traits: set[str], **more: Any) -> Subject:
    traits = traits | {"layer", "mha"}
    return Subject(
        LAYER, name, _layer(given), traits=frozenset(traits), backend=given.get("backend"), **({"shapes": _flat} | more)
    )


def _layers() -> Iterator[Subject]:
    for row in options():
        yield _layer_row(*row)
    yield _layer_row("batch", {}, {"graphs"}, keywords=lambda n: {"batch": graphs(n)})
    yield _layer_row("no bias", {"bias": False}, {"no bias"})
    padded = {"shapes": _sets, "same": True, "keywords": lambda n: {"key_padding_mask": padding(n)}}
    for name, given in {
        "padded sets": {},
        "padded sets, corrected": {"estimator": "corrected"},
        "padded sets, rounds=2": {"rounds": 2},
        "padded sets, chunk_batches": {"chunk_batches": 2},
    }.items():
        kinds = {"padded"} | {given.get("estimator", "plain")} | ({"rounds"} & set(given))
        yield _layer_row(name, given, kinds | ({"chunks"} if "chunk_batches" in given else set()), **padded)


def _encoder_layer() -> nn.Module:
    return nn.TransformerEncoderLayer(C, H, 2 * C, dropout=0.0, batch_first=True)


def _wrappers() -> Iterator[Subject]:
    inner: dict[str, Callable[[], nn.Module]] = {
        "Linear": lambda: nn.Linear(C, C),
        "TransformerEncoderLayer": _encoder_layer,
    }
    for name, make in inner.items():
        for more, given in {"": {}, ", rounds=2": {"rounds": 2}, ", chunk_batches": {"chunk_batches": 2}}.items():

            def build(p: int, make: Any = make, given: Any = given) -> nn.Module:
                return RandomBatch(make(), p, seed=3, **given)

            traits = {"wrapper", f"inner {name}"} | ({"chunks"} if "chunk_batches" in given else set(given))
            yield Subject(WRAPPER, name + more, build, _flat, traits=frozenset(traits))
    traits = frozenset({"wrapper", "padded", "inner Linear"})
    keep: Keywords = lambda n: {"mask": kept(n)}  # noqa: E731
    yield Subject(
        WRAPPER, "Linear, padded sets", lambda p: RandomBatch(nn.Linear(C, C), p, seed=3), _sets, keep, traits
    )


def _kinds(attention: str) -> set[str]:
    kinds = {"no attention"} if attention == "off" else {"mha"}
    return kinds if attention == "rba" else kinds | {"settled"}


def _models() -> Iterator[Subject]:
    kinds: list[tuple[str, str]] = [(local, "rba") for local in CONVOLUTIONS]
    kinds += [("off", attention) for attention in ATTENTIONS if attention != "rba"]
    for local, attention in kinds:

        def build(p: int, local: str = local, attention: str = attention) -> nn.Module:
            given = {"channels": C, "heads": H, "layers": 1, "batch_size": p}
            return rb.models.GraphTransformer(C, 3, local=local, attention=attention, **given)

        traits = frozenset({"model", f"local {local}", *({"linear"} & {attention}), *_kinds(attention)})
        name = f"local={local!r}, attention={attention!r}"
        yield Subject(MODEL, name, build, _flat, traits=traits, more=lambda n: (edges(n),))


def _convert(module: nn.Module, p: int) -> nn.Module:
    if p:  # 0: as it was before
        rb.convert(module, p, seed=3)
    return module


def _bert(p: int) -> nn.Module:
    from transformers import BertConfig, BertModel

    sizes = {"hidden_size": C, "num_hidden_layers": 1, "num_attention_heads": H, "intermediate_size": 2 * C}
    none = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    config = BertConfig(vocab_size=5, max_position_embeddings=128, **sizes, **none)
    return _convert(BertModel(config, add_pooling_layer=False), p)


def _gps(p: int) -> nn.Module:
    from torch_geometric.nn import GPSConv, SAGEConv

    return _convert(GPSConv(C, SAGEConv(C, C), heads=H, norm=None), p)


def _performer(p: int) -> nn.Module:
    from torch_geometric.nn.attention import PerformerAttention

    return _convert(PerformerAttention(C, H, head_channels=C // H), p)


def _converted() -> Iterator[Subject]:
    def row(name: str, build: Callable[[int], nn.Module], *traits: str, **more: Any) -> Subject:
        return Subject(CONVERTED, name, build, traits=frozenset({"converted", *traits}), **more)

    encoder = lambda p: _convert(nn.TransformerEncoder(_encoder_layer(), 1), p)  # noqa: E731
    masked: Keywords = lambda n: {"src_key_padding_mask": padding(n)}  # noqa: E731
    bert: Keywords = lambda n: {"attention_mask": kept_as_numbers(n), "return_dict": False}  # noqa: E731
    yield row("torch TransformerEncoder", encoder, "encoder", "mha", "padded", shapes=_sets, keywords=masked)
    yield row("torch_geometric GPSConv", _gps, "gps", "mha", shapes=_flat, more=lambda n: (edges(n),))
    yield row("torch_geometric PerformerAttention", _performer, "performer", shapes=_sets)
    more = {"shapes": _sets, "keywords": bert, "named": "inputs_embeds"}
    yield row("Hugging Face BertModel", _bert, "bert", "padded", **more)
    yield row("a class through_sdpa", lambda p: _convert(TwoProjections(), p), "sdpa", shapes=_sets)


@cache
def subjects() -> dict[str, Subject]:
    """All rows by key."""
    rows = [*_ops(), *_layers(), *_wrappers(), *_models(), *_converted()]
    return {row.key: row for row in rows}


def samplings(module: nn.Module) -> list[RandomBatchConfig]:
    """The samplings inside."""
    return [found for each in module.modules() if (found := config_of(each)) is not None]


def as_judge(module: nn.Module) -> nn.Module:
    """The same in float64, by the formula in plain torch."""
    for sampling in samplings(module):
        sampling.backend = "auto" if _is_linear(module) else "reference"
    if isinstance(module, Op) and module.function is rb.random_batch_attention and not _is_linear(module):
        module.options = module.options | {"backend": "reference"}
    return module.double()


def _is_linear(module: nn.Module) -> bool:
    if isinstance(module, Op):
        return module.options.get("interaction", "softmax") != "softmax"
    configs = [found for each in module.modules() if (found := config_of(each)) is not None]
    return any(not config.resolved()[0].is_exponential for config in configs)
