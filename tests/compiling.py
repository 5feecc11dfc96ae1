"""Compiled against eager, in a process without the run-time checks of the tests, which no compiler can trace.

Prints a JSON object: for each case None, or what went wrong.
"""

import json
import shutil
import sys
import traceback
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import randbatch as rb
from randbatch.estimators import ESTIMATORS
from randbatch.interactions import INTERACTIONS
from randbatch.models import GraphTransformer
from randbatch.nn import RandomBatch, RandomBatchAttention
from randbatch.partition import random_subsets

CPP = shutil.which("g++") is not None  # inductor needs it
torch.set_num_threads(1)
GRAPHS = torch.arange(52) % 3
EDGES = torch.randint(0, 52, (2, 150), generator=torch.Generator().manual_seed(0))
PADDING = torch.arange(20) >= torch.tensor([20, 7, 0]).unsqueeze(1)

Case = tuple[Callable[[], nn.Module], Callable[[], tuple], dict[str, Any]]


def flat(width: int = 16) -> Tensor:
    return torch.randn(52, width, requires_grad=True)


def sets(number: int = 3) -> tuple[Tensor, Tensor, Tensor]:
    x = torch.randn(number, 20, 16, requires_grad=True)
    return x, x, x


def padded_with_nan() -> tuple[Tensor, Tensor, Tensor]:
    x = torch.randn(3, 20, 16).masked_fill(PADDING.unsqueeze(-1), torch.nan).requires_grad_()
    return x, x, x


def layer(**options: Any) -> Callable[[], nn.Module]:
    return lambda: RandomBatchAttention(16, 4, 8, **options)


def encoder() -> nn.Module:
    model = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True)
    rb.convert(model, 8)
    return model


def gps() -> nn.Module:
    from torch_geometric.nn import GPSConv, SAGEConv

    model = GPSConv(16, SAGEConv(16, 16), heads=4)
    rb.convert(model, 8)
    return model


def performer() -> nn.Module:
    from torch_geometric.nn.attention import PerformerAttention

    model = PerformerAttention(16, 4, head_channels=4)
    rb.convert(model, 8)
    return model


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(16, 48)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).reshape(*x.shape[:2], 3, 4, 4).permute(2, 0, 3, 1, 4).unbind(0)
        return nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


def through_sdpa() -> nn.Module:
    rb.convert.register(Attention)(rb.convert.through_sdpa)
    rb.convert(model := Attention(), 8)
    return model


def exact() -> nn.Module:
    model = RandomBatchAttention(16, 4, 8)
    rb.set_inference(model, mode="exact")
    return model


def graph(local: str, **options: Any) -> Case:
    def inputs() -> tuple:
        model = GraphTransformer(8, 3, channels=16, layers=1, local=local)
        return flat(8), model.prepare_edges(EDGES, 52, sparse=False)

    return lambda: GraphTransformer(8, 3, channels=16, batch_size=8, local=local, layers=2, **options), inputs, {}


CASES: dict[str, Case] = {
    "flat": (layer(), lambda: (flat(),), {}),
    "one batch": (lambda: RandomBatchAttention(16, 4, 100), lambda: (flat(),), {}),
    "dropout": (layer(dropout=0.3), lambda: (flat(),), {}),
    "debiased": (layer(estimator="debiased"), lambda: (flat(),), {}),
    "corrected": (layer(estimator="corrected"), lambda: (flat(),), {}),
    "rounds": (layer(rounds=3, eval_rounds=2), lambda: (flat(),), {}),
    "rounds and dropout": (layer(rounds=2, dropout=0.3), lambda: (flat(),), {}),
    "linear": (layer(interaction="linear"), lambda: (flat(),), {}),
    "pieces": (layer(chunk_batches=2), lambda: (flat(),), {}),
    "a wide seed": (layer(seed=2**70 + 5), lambda: (flat(),), {}),
    "graphs": (layer(dropout=0.3), lambda: (flat(),), {"batch": GRAPHS}),
    "exact": (exact, lambda: (flat(),), {}),
    "exact graphs": (exact, lambda: (flat(),), {"batch": GRAPHS}),
    "one padded set": (layer(), lambda: sets(1), {}),
    "equal sets": (layer(), sets, {}),
    "padding": (layer(), sets, {"key_padding_mask": PADDING}),
    "padding with nan": (layer(), padded_with_nan, {"key_padding_mask": PADDING}),
    "query, key and value": (layer(), lambda: (flat(), flat(), flat()), {"same_tokens": True}),
    "wrapper": (lambda: RandomBatch(nn.Linear(16, 5), 8, rounds=1), lambda: (flat(),), {}),
    "convert: torch": (encoder, lambda: sets()[:1], {}),
    "convert: GPSConv": (gps, lambda: (flat(), EDGES), {}),
    "convert: Performer": (performer, lambda: sets(1)[:1], {}),
    "convert: SDPA": (through_sdpa, lambda: sets()[:1], {}),
    "model": graph("off", order="beside", attention_dropout=0.2, dropout=0.1),
    "model: sage": graph("sage"),
    "model: gcn": graph("gcn"),
    "model: gat": graph("gat"),
    "model: gin": graph("gin"),
}


def run(module: Callable[..., Any], model: nn.Module, inputs: tuple, options: dict[str, Any]) -> list[Tensor]:
    """Output and gradients, of the inputs and of every parameter."""
    torch.manual_seed(1)
    out = module(*inputs, **options)
    out = out[0] if isinstance(out, tuple) else out
    wanted = [x for x in dict.fromkeys(x for x in inputs if isinstance(x, Tensor)) if x.requires_grad]
    grads = torch.autograd.grad(out.sin().sum(), [*wanted, *model.parameters()], allow_unused=True)
    return [out, *(grad for grad in grads if grad is not None), torch.get_rng_state()]


def compare(name: str, training: bool, backend: str) -> None:
    torch._dynamo.reset()
    torch.manual_seed(0)
    make, inputs_of, options = CASES[name]
    model, inputs = make().train(training), inputs_of()
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    results = run(model, model, inputs, options), run(compiled, model, inputs, options)
    if backend != "aot_eager":
        results = results[0][:-1], results[1][:-1]  # inductor draws dropout in its own way
    torch.testing.assert_close(results[1], results[0], rtol=1e-5, atol=1e-5, equal_nan="nan" in name)
    if "nan" in name:
        assert results[1][0].isfinite().all()
        assert all(grad.isfinite().all() for grad in results[1][2:-1])  # of every parameter


def check_operators() -> None:
    """torch's own checks of an operator: schema, shapes and strides, autograd."""
    qkv = [torch.randn(52, 2, 4, requires_grad=True) for _ in range(3)]
    interaction, estimator = INTERACTIONS["softmax"].key, ESTIMATORS["corrected"].key
    settings = (interaction, estimator, None, 0.0, "auto", 8, 2, 3, "None", False)
    tests = ("test_schema", "test_faketensor", "test_autograd_registration")
    args = (qkv, [], None, GRAPHS, torch.empty(0), *settings)
    torch.library.opcheck(torch.ops.randbatch.attend_opaquely, args, test_utils=tests)
    order = (torch.empty(0), 52, 3, torch.device("cpu"))
    torch.library.opcheck(torch.ops.randbatch.random_order, order, test_utils=tests)
    torch.library.opcheck(torch.ops.randbatch.random_keys, order[1:], test_utils=tests)


def check_sizes() -> None:
    """Other numbers of tokens, without compiling for each of them; other seeds."""
    torch._dynamo.reset()
    model = RandomBatchAttention(16, 4, 8).eval()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager", dynamic=True)
    with torch._dynamo.config.patch(error_on_recompile=False):
        for size, seed in ((52, 0), (60, 1), (61, 2), (44, 2**62 + 5), (7, 3)):
            model.randbatch_config.seed = seed
            x = torch.randn(size, 16)
            torch.testing.assert_close(compiled(x), model(x), rtol=1e-5, atol=1e-5)


def check_partitions() -> None:
    """Drawn inside a compiled function they are those of eager code: of one set, of several, subsets, rounds."""
    graphs = torch.arange(52) % 3
    draws: list[Callable[[], Tensor]] = [
        lambda: rb.random_partition(52, 9, seed=1).order,
        lambda: rb.random_partition(52, 9, batch=graphs, seed=-5).order,
        lambda: random_subsets(52, 9, 4, seed=2**62 + 5),
        lambda: torch.cat([part.order for part in rb.orthogonal_partitions(52, 9, 2, seed=1)]),
    ]
    for backend in ("inductor", "aot_eager") if CPP else ("aot_eager",):
        for draw in draws:
            torch._dynamo.reset()
            assert torch.equal(torch.compile(draw, backend=backend)(), draw())


def check_refusals() -> None:
    """Several sets in the wrapper: named by fullgraph, left to eager code without it."""
    torch._dynamo.reset()
    model, x = RandomBatch(nn.Linear(16, 5), 8).eval(), torch.randn(52, 16)
    try:
        torch.compile(model, fullgraph=True, backend="aot_eager")(x, batch=GRAPHS)
    except Exception as error:
        assert "random batches of several sets" in str(error), error
    else:
        raise AssertionError("several sets were traced")
    torch._dynamo.reset()
    broken = torch.compile(model, backend="aot_eager")
    torch.testing.assert_close(broken(x, batch=GRAPHS), model(x, batch=GRAPHS))


CHECKS = {
    "operators": check_operators,
    "sizes": check_sizes,
    "partitions": check_partitions,
    "refusals": check_refusals,
}


def main() -> None:
    found: dict[str, str | None] = {}
    for name, check in CHECKS.items():
        try:
            check()
            found[name] = None
        except Exception:
            found[name] = traceback.format_exc()
    for backend, training, names in json.loads(sys.argv[1]):
        for name in names or CASES:
            key = f"{name}, {backend}, {'train' if training else 'eval'}"
            try:
                compare(name, training, backend)
                found[key] = None
            except Exception:
                found[key] = traceback.format_exc()
    print(json.dumps(found))


if __name__ == "__main__":
    main()
