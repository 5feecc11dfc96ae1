"""The table of golden cases, `CASES`; those of models, of converted models and of training are made here.

They use the public interface alone. `tests/scripts/golden.py` writes their values, `test_golden.py` compares them.
"""

from __future__ import annotations

import functools
import itertools
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from golden_attention import BATCHES, ESTIMATORS, PADDING, N, case, describe, layers, ops, wrappers
from golden_tools import Arrays, Case, Run
from torch import Tensor, nn

import randbatch as rb

EDGES = torch.randint(0, N, (2, 160), generator=torch.Generator().manual_seed(0))
GRAPHS = BATCHES["unsorted"]
DATA = "RANDBATCH_DATA"  # a folder with one folder for each data set, as `randbatch train --root`


# Graph transformers


def graph_transformer(
    run: Run, *, training: bool = False, batch: str = "", sparse: bool = True, **options: Any
) -> Arrays:
    options = {"channels": 8, "layers": 2, "heads": 2, "batch_size": 8, "seed": 3} | options
    model = run.fill(rb.models.GraphTransformer(5, 3, **options), training=training)
    x = run.tensor("x", N, 5)
    edges = EDGES if sparse else model.prepare_edges(EDGES, N, sparse=False)
    torch.manual_seed(5)
    return run.gradients(model(x, edges, BATCHES.get(batch)), {"x": x}, model)


def models() -> Iterator[Case]:
    locals_, attentions = ("gcn", "sage", "gat", "gin", "off"), ("rba", "full", "linear", "off")
    many: list[dict[str, Any]] = [
        {"local": local, "attention": attention} for local, attention in itertools.product(locals_, attentions)
    ]
    many += [{"training": True, "estimator": estimator} for estimator in ESTIMATORS]
    many += [{"order": "beside"}, {"sparse": False}, {"layers": 0}, {"level": "graph", "batch": "unsorted"}]
    many += [{"rounds": 2, "eval_rounds": 3, "training": training} for training in (True, False)]
    many += [{"attention": attention, "batch": "unsorted"} for attention in attentions[:3]]
    many += [{"chunk_batches": 2, "training": True}, {"dropout": 0.2, "input_dropout": 0.1, "training": True}]
    for options in many:  # masks of nn.Dropout are the same in float64
        yield case("model", describe(options), functools.partial(graph_transformer, **options), {})
    for options in ({"attention_dropout": 0.2}, {"attention_dropout": 0.2, "attention": "full"}):
        function = functools.partial(graph_transformer, training=True, **options)
        yield case("model", describe(options), function, {"dropout": 0.2})
    yield case("model", "rounds 2", functools.partial(graph_transformer, rounds=2), {}, torch.float64)


# Converted models


class Own(nn.Module):
    """Attention as one finds it in repositories, with a call of torch's own or without."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(8, 24)

    def split(self, x: Tensor) -> tuple[Tensor, ...]:
        return self.qkv(x).unflatten(-1, (3, 2, 4)).unbind(-3)


class ThroughSDPA(Own):
    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (y.transpose(1, 2) for y in self.split(x))
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


class Attends(Own):
    def forward(self, x: Tensor) -> Tensor:
        raise NotImplementedError


class Applies(Own):
    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.split(x)
        weights = q.sigmoid().flatten(2) @ k.sigmoid().flatten(2).mT
        return weights @ v.flatten(2) / weights.sum(-1, keepdim=True)


rb.convert.register(ThroughSDPA)(rb.convert.through_sdpa)
rb.convert.register(Attends)(lambda module, batches, x: batches.attend(*module.split(x)).flatten(-2))
rb.convert.register(Applies)(lambda module, batches, x: batches.apply(batches.forward, x))


def sets(run: Run) -> tuple[Tensor, ...]:
    return (run.tensor("x", 4, 21, 8),)


def encoder() -> nn.Module:
    each = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    return nn.TransformerEncoder(each, 2, enable_nested_tensor=False)


def gps(attention: str) -> nn.Module:
    from torch_geometric.nn import GPSConv, SAGEConv

    options = {"attn_kwargs": {"head_channels": 4}} if attention == "performer" else {}
    return GPSConv(8, SAGEConv(8, 8), heads=2, attn_type=attention, **options)


SMALL = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}
IDS = torch.randint(0, 30, (4, 21), generator=torch.Generator().manual_seed(0))


def bert(dropout: float = 0.0) -> nn.Module:
    from transformers import BertConfig, BertModel

    drops = {"hidden_dropout_prob": dropout, "attention_probs_dropout_prob": dropout}
    config = BertConfig(vocab_size=30, max_position_embeddings=21, **SMALL, **drops)
    return BertModel(config, add_pooling_layer=False)


def vit() -> nn.Module:
    from transformers import ViTConfig, ViTModel

    drops = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    return ViTModel(ViTConfig(image_size=20, patch_size=4, num_channels=2, **SMALL, **drops), add_pooling_layer=False)


def images(run: Run) -> tuple[Tensor, ...]:
    return (run.tensor("image", 2, 2, 20, 20),)


def nodes(run: Run) -> tuple[Tensor, ...]:
    return run.tensor("x", N, 8), EDGES


KEEP = (~PADDING).long()
KEEP[2, 0] = 1  # a text without a token is none
MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[Run], tuple[Tensor, ...]], dict[str, Any]]] = {
    "torch encoder": (encoder, sets, {}),
    "torch encoder, padded": (encoder, sets, {"src_key_padding_mask": PADDING}),
    "GPSConv": (functools.partial(gps, "multihead"), nodes, {}),
    "GPSConv, graphs": (functools.partial(gps, "multihead"), nodes, {"batch": GRAPHS.sort().values}),
    "GPSConv of Performer": (functools.partial(gps, "performer"), nodes, {}),
    "GPSConv of Performer, graphs": (functools.partial(gps, "performer"), nodes, {"batch": GRAPHS.sort().values}),
    "BertModel": (bert, lambda run: (IDS,), {}),
    "BertModel, padded": (bert, lambda run: (IDS,), {"attention_mask": KEEP}),
    "BertModel with dropout": (functools.partial(bert, 0.2), lambda run: (IDS,), {}),
    "ViTModel": (vit, images, {}),
    "through_sdpa": (ThroughSDPA, sets, {}),
    "batches.attend": (Attends, sets, {}),
    "batches.apply": (Applies, sets, {}),
}


def converted(run: Run, name: str, *, training: bool = False, **options: Any) -> Arrays:
    make, inputs_of, keywords = MODELS[name]
    model = run.fill(make(), training=training)
    rb.convert(model, **{"batch_size": 8} | options)
    inputs = inputs_of(run)
    torch.manual_seed(5)
    out = model(*inputs, **keywords)
    out = getattr(out, "last_hidden_state", out)
    wanted = {f"input {i}": x for i, x in enumerate(inputs) if x.requires_grad}
    return run.gradients(out, wanted, model)


def conversions() -> Iterator[Case]:
    for name in MODELS:
        soft = not any(word in name for word in ("Performer", "apply"))
        many: list[dict[str, Any]] = [{}, {"training": True}, {"rounds": 2}, {"chunk_batches": 2}]
        many += [{"estimator": "debiased"}, {"estimator": "corrected"}] if soft and "," not in name else []
        if "dropout" in name:
            many = [{"training": True}, {"training": True, "chunk_batches": 2}]
        for options in many:
            drops = {"dropout": 0.2} if "dropout" in name else {}
            text = name if not options else f"{name}, {describe(options)}"
            yield case("convert", text, functools.partial(converted, name=name, **options), drops)


# Training


def find_data(name: str) -> Path | None:
    """The folder of a data set, if it is there."""
    root = Path(os.environ.get(DATA) or Path(__file__).parents[1] / "data")
    return root / name if (root / name / "raw").is_dir() else None


def curve(run: Run, *, dataset: str = "groups", **options: Any) -> Arrays:
    """Loss and scores of every epoch; a run in float64 there is not, since training is in float32."""
    from randbatch.train import RunConfig, train_run
    from randbatch.train.data import GroupsOptions, load_dataset, make_groups

    with tempfile.TemporaryDirectory() as folder:
        if dataset == "groups":
            sizes = GroupsOptions(num_nodes=100, num_groups=2, train_graphs=6, val_graphs=2, test_graphs=2)
            data = make_groups(0, sizes)
        else:
            found = find_data(dataset)
            assert found is not None, f"set {DATA} to the folder of {dataset}"
            shutil.copytree(found / "raw", Path(folder) / dataset / "raw", copy_function=shutil.copyfile)
            data = load_dataset(dataset, Path(folder))
        graphs = tuple(replace(graph, x=run.nudged(graph.x, seed)) for seed, graph in enumerate(data.graphs))
        small = {"hidden": 16, "heads": 2, "layers": 2, "batch_size": 16, "graphs_per_step": 2, "lr": 5e-3}
        config = RunConfig(dataset=dataset, device="cpu", **small | options)
        train_run(config, replace(data, graphs=graphs), Path(folder) / "run")
        lines = [json.loads(line) for line in (Path(folder) / "run" / "log.jsonl").read_text().splitlines()]
    return {name: torch.tensor([line[name] for line in lines], dtype=torch.float64) for name in ("loss", "val", "test")}


def curves() -> Iterator[Case]:
    attentions: list[dict[str, Any]] = [{"attention": attention} for attention in ("off", "rba", "full", "linear")]
    more: list[dict[str, Any]] = [{"rounds": 2, "estimator": "debiased"}, {"estimator": "corrected"}]
    more += [{"dropout": 0.2, "order": "beside"}, {"chunk_batches": 2}]
    for options in [*attentions, *more]:
        function = functools.partial(curve, epochs=3, **options)
        # of 200 nodes two may be near the border
        yield case(
            "train",
            f"groups, {describe(options)}",
            function,
            {},
            bounds=dict.fromkeys(("val", "test"), 0.01),
            same_in_float64=False,
        )
    for options in (attentions[1], attentions[3], more[0]):
        function = functools.partial(curve, dataset="minesweeper", epochs=2, **{"batch_size": 128} | options)
        bounds = dict.fromkeys(("val", "test"), 1e-5)  # of 1000 × 1000 pairs, ten
        yield case(
            "train",
            f"minesweeper, {describe(options)}",
            function,
            {},
            bounds=bounds,
            same_in_float64=False,
            data="minesweeper",
        )


CASES: dict[str, Case] = {}
for _case in itertools.chain(ops(), layers(), wrappers(), models(), conversions(), curves()):
    assert _case.name not in CASES, _case.name
    CASES[_case.name] = _case


def has_kernel() -> bool:
    """Whether the compiled CPU kernel is there, which needs a C++ compiler."""
    try:
        rb.random_batch_attention(*torch.zeros(3, 4, 2, 6).unbind(), batch_size=2, backend="cpu")
    except ValueError:
        return False
    return True


def why_not(case: Case) -> str | None:
    """Why a case cannot be computed here, if so."""
    if case.kernel and not has_kernel():
        return "the CPU kernel needs a C++ compiler"
    if case.data is not None and find_data(case.data) is None:
        return f"{case.data} is not there: set {DATA} to the folder that holds it"
    return None
