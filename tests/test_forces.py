"""The random force in a layer against the variance lemma, pair by pair; the error of a whole model."""

import copy
import csv
import json
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import randbatch as rb
from randbatch.analysis import output_error, random_force
from randbatch.cli import main
from randbatch.nn.config import config_of


def qkv(num_tokens: int, heads: int = 2, size: int = 4, value: int = 3) -> tuple[Tensor, Tensor, Tensor]:
    shapes = (size, size, value)
    query, key, values = (torch.randn(num_tokens, heads, width, dtype=torch.float64) for width in shapes)
    return query, key, values


def lemma_by_loops(query: Tensor, key: Tensor, value: Tensor, p: int, scale: float) -> float:
    """`mean_i (1/(p−1) − 1/(N−1)) Λ_i`, every pair by itself, relative to `mean_i |y_i|²`."""
    size, heads, _ = query.shape
    total, squared = 0.0, 0.0
    for head in range(heads):
        for i in range(size):
            logits = torch.stack([scale * (query[i, head] @ key[j, head]) for j in range(size)])
            a = torch.softmax(logits, dim=0)
            y = sum(a[j] * value[j, head] for j in range(size))
            pairs = [(size - 1) * a[j] * (value[j, head] - y) for j in range(size) if j != i]
            mean = sum(pairs) / (size - 1)
            spread = sum(float((pair - mean).square().sum()) for pair in pairs) / (size - 2)
            total += spread * (1 / (p - 1) - 1 / (size - 1))
            squared += float(y.square().sum())  # type: ignore[union-attr]
    return math.sqrt(total / squared)


@pytest.mark.parametrize("scale", [0.0, 0.5, 2.0])
def test_the_lemma_pair_by_pair(scale: float) -> None:
    tensors = qkv(24)
    found = random_force(tensors, batch_sizes=(3, 8), num_queries=24, draws=2, scale=scale)[0]
    assert found.num_tokens == 24
    for p in (3, 8):
        assert found.lemma[p] == pytest.approx(lemma_by_loops(*tensors, p, scale), rel=1e-9)


def test_sets_have_lemmas_of_their_own() -> None:
    """Two sets that are copies of one, and the one alone."""
    one = qkv(24)
    both = tuple(torch.cat([tensor, tensor]) for tensor in one)
    batch = torch.arange(2).repeat_interleave(24)
    found = random_force(both, batch=batch, batch_sizes=(6,), num_queries=48, draws=2)[0]
    assert found.lemma[6] == pytest.approx(lemma_by_loops(*one, 6, 0.5), rel=1e-9)
    assert found.num_tokens == 24


def test_attention_without_temperature_follows_the_lemma_to_the_letter() -> None:
    """At scale 0 debiased attention is a mean over the others that are met; plain counts the own value 1/p."""
    found = random_force(qkv(400), batch_sizes=(8, 40), num_queries=400, draws=400, scale=0.0)[0]
    for p in (8, 40):
        assert found.fluctuation["debiased"][p] == pytest.approx(found.lemma[p], rel=0.02)
        assert found.bias["debiased"][p] < 0.1 * found.lemma[p]
        assert found.fluctuation["plain"][p] == pytest.approx(found.lemma[p] * (p - 1) / p, rel=0.02)
        assert found.bias["plain"][p] > 0.8 * found.lemma[p] / math.sqrt(p)  # |v_i − ȳ| (1/p − 1/N), Λ = E |v_i − ȳ|²


def test_softmax_comes_to_the_lemma_as_batches_grow() -> None:
    found = random_force(qkv(2000), batch_sizes=(10, 50, 250), draws=100, scale=0.25)[0]
    off = [abs(found.fluctuation["debiased"][p] / found.lemma[p] - 1) for p in (10, 50, 250)]
    assert off[0] > 2 * off[2]
    assert off[2] < 0.05


def test_whole_sets_have_no_random_force() -> None:
    found = random_force(qkv(60), batch_sizes=(60,), draws=3)[0]
    assert found.lemma[60] == 0.0
    assert max(by_p[60] for by_p in (*found.fluctuation.values(), *found.bias.values())) < 1e-12


def model() -> nn.Module:
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    layers = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    rb.convert(layers, batch_size=8)
    return layers


def test_a_model_is_looked_at_layer_by_layer_and_left_as_it_was() -> None:
    net, x = model().train(), torch.randn(1, 50, 16)
    net.layers[0].self_attn.randbatch_config.eval_rounds = 3  # type: ignore[union-attr, index]
    before = {name: copy.copy(config_of(module)) for name, module in net.named_modules() if config_of(module)}
    found = random_force(net, x, batch_sizes=(8,), draws=2)
    errors = output_error(net, x, batch_sizes=(8, 25, 50), draws=2)
    assert [one.layer for one in found] == ["layers.0.self_attn", "layers.1.self_attn"]
    assert [one.estimator for one in errors] == ["plain", "debiased", "corrected"]
    assert all(module.training for module in net.modules())
    assert before == {name: config_of(module) for name, module in net.named_modules() if config_of(module)}
    for one in errors:
        assert one.error[50] < 1e-6  # whole sets
        assert one.error[8] > one.error[25] > one.error[50]


def test_the_error_of_one_layer_falls_as_the_lemma_says() -> None:
    """Soft attention and a linear map behind it: a fluctuation, so the power is ½."""
    torch.manual_seed(1)
    layer = rb.nn.RandomBatchAttention(16, 2, batch_size=8).double()
    x = torch.randn(1000, 16, dtype=torch.float64)
    found = output_error(layer, x, batch_sizes=(50, 100, 200, 400), estimators=("debiased",), draws=30)[0]
    assert found.rate is not None
    assert found.rate.value == pytest.approx(0.5, abs=0.03)
    assert found.rate.low < found.rate.value < found.rate.high


class Unpacked(nn.Module):
    def forward(self, x: Tensor) -> str:
        return f"{x.shape}"


def test_mistakes_are_named() -> None:
    x = torch.randn(20, 8)
    layer = rb.nn.RandomBatchAttention(8, 2, 4)
    with pytest.raises(ValueError, match="model must hold a module with random batches, but Linear holds none"):
        output_error(nn.Linear(8, 8), x)
    with pytest.raises(TypeError, match="model must give a tensor, or one first, got str"):
        output_error(nn.Sequential(layer, Unpacked()), x)
    with pytest.raises(ValueError, match="the output of model must be finite and not all 0"):
        output_error(nn.Sequential(layer, nn.ReLU6(), nn.Hardshrink(10.0)), x)
    with pytest.raises(ValueError, match="query, key and value must be finite"):
        random_force([tensor * math.nan for tensor in qkv(30)], batch_sizes=(4,))
    with pytest.raises(ValueError, match="draws must be at least 2"):
        output_error(layer, x, draws=1)
    with pytest.raises(ValueError, match="estimators must name at least one"):
        random_force(layer, x, estimators=())
    with pytest.raises(ValueError, match=r"batch_sizes must be at least 2"):
        random_force(layer, x, batch_sizes=(1,))
    with pytest.raises(ValueError, match="attention must attend over at least 3 tokens"):
        random_force(qkv(2))


def test_the_command_measures_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small = ["--hidden", "16", "--layers", "2", "--epochs", "1", "--batch-size", "32", "--device", "cpu"]
    assert main(["train", "--attention", "rba", "--out", str(tmp_path), *small]) == 0
    capsys.readouterr()
    assert main(["convergence", "--run", str(tmp_path), "--batch-size", "16", "64", "--realisations", "2"]) == 0
    printed = capsys.readouterr().out
    assert (tmp_path / "convergence.md").read_text().strip() in printed
    rows = list(csv.DictReader((tmp_path / "convergence.csv").read_text().splitlines()))
    assert len(rows) == (2 + 1) * 3 * 2  # layers and output, estimators, batch sizes
    found = json.loads((tmp_path / "convergence.json").read_text())
    assert [one["layer"] for one in found["layers"]] == ["layers.0.attention", "layers.1.attention"]
    assert (tmp_path / "convergence.png").read_bytes().startswith(b"\x89PNG")
    assert main(["convergence", "--run", str(tmp_path / "nothing")]) == 2
    assert "is not a finished run" in capsys.readouterr().err
