"""A converted model in another process, which has converted nothing yet: what unpickles it loads what it needs."""

import multiprocessing
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from converting import encoder
from torch import Tensor, nn
from torch_geometric.nn import GPSConv, Polynormer, SGFormer
from torch_geometric.nn.attention import PerformerAttention

import randbatch as rb

SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 32}
EDGES = torch.tensor([[0, 1, 2, 3], [1, 2, 3, 4]])
BATCH = torch.arange(24) // 12


def polynormer() -> nn.Module:
    model = Polynormer(16, 16, 4, local_layers=2, qk_shared=True)
    model._global = True
    return model


def bert() -> nn.Module:
    return transformers.BertModel(transformers.BertConfig(vocab_size=50, **SMALL))


def vit() -> nn.Module:
    return transformers.ViTModel(transformers.ViTConfig(image_size=16, patch_size=4, **SMALL))


TOKENS, NODES = torch.randn(2, 12, 16), torch.randn(24, 16)
MODELS: dict[str, tuple[Callable[[], nn.Module], tuple]] = {
    "attention": (lambda: nn.MultiheadAttention(16, 4, batch_first=True), (TOKENS, TOKENS, TOKENS)),
    "encoder": (encoder, (TOKENS,)),
    "gps": (lambda: GPSConv(16, None, heads=4), (NODES, EDGES, BATCH)),
    "performer": (lambda: PerformerAttention(16, 4, 4), (TOKENS,)),
    "sgformer": (lambda: SGFormer(16, 16, 4), (NODES, EDGES, BATCH)),
    "polynormer": (polynormer, (NODES, EDGES, BATCH)),
    "bert": (bert, (torch.randint(0, 50, (2, 12)), (torch.arange(12) < torch.tensor([[12], [7]])).long())),
    "vit": (vit, (torch.randn(2, 3, 16, 16),)),
}
LOAD = """
import sys, torch
model, arguments, want = torch.load(sys.argv[1], weights_only=False)
out = model(*arguments)
out = out[0] if isinstance(out, tuple) else getattr(out, "last_hidden_state", out)
torch.testing.assert_close(out, want, rtol=1e-4, atol=1e-5)
model.train()
assert not torch.equal(*(model(*arguments)[0] for _ in range(2)))
"""


def run(code: str, *arguments: object, where: Path | None = None) -> str:
    """What a new process says on stderr, the last line of it."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code, *map(str, arguments)], cwd=where, capture_output=True, text=True
    )
    return "" if done.returncode == 0 else done.stderr.strip().splitlines()[-1]


@pytest.mark.parametrize("name", MODELS)
def test_a_new_process_loads_a_converted_model(name: str, tmp_path: Path) -> None:
    make, arguments = MODELS[name]
    model = make().eval()
    rb.convert(model, 3)
    with torch.no_grad():
        out = model(*arguments)
    out = out[0] if isinstance(out, tuple) else getattr(out, "last_hidden_state", out)
    torch.save((model, arguments, out), tmp_path / "model.pt")
    assert run(LOAD, tmp_path / "model.pt") == ""


def _answer(model: nn.Module, x: Tensor, queue) -> None:
    torch.set_num_threads(1)
    with torch.no_grad():
        queue.put(model(x).last_hidden_state.tolist())


def test_a_spawned_worker_is_given_a_converted_model() -> None:
    model = bert().eval()
    rb.convert(model, 3)
    ids = torch.randint(0, 50, (1, 12))
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    worker = context.Process(target=_answer, args=(model, ids, queue))
    worker.start()
    got = torch.tensor(queue.get(timeout=120))
    worker.join()
    torch.testing.assert_close(got, model(ids).last_hidden_state, rtol=1e-4, atol=1e-5)


MINE = """
import torch
class Mine(torch.nn.Module):
    def forward(self, x):
        return x
"""
RULE = """
import randbatch as rb
from mine import Mine
@rb.convert.register(Mine)
def attend(module, batches, x):
    return batches.attend(x, x, x)
"""


def test_a_class_that_was_taught_must_be_taught_again(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(MINE)
    (tmp_path / "rule.py").write_text(RULE)
    save = """
    import rule, mine, torch, randbatch as rb
    rb.convert(model := mine.Mine(), 3)
    torch.save(model, "model.pt")
    """
    load = "import torch; torch.load('model.pt', weights_only=False)(torch.randn(9, 2, 4))"
    assert run(textwrap.dedent(save), where=tmp_path) == ""
    message = "no adapter is registered for Mine: rb.convert.register it before it is loaded"
    assert run(load, where=tmp_path).endswith(f"InvalidValue: {message}")
    assert run(f"import rule; {load}", where=tmp_path) == ""
