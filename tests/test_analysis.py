"""The instruments against closed forms, the op at every token, and the models that they look into."""

import copy
import json
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import randbatch as rb
from randbatch.analysis import AttentionErrors, attention_error
from randbatch.analysis.errors import _batch_size_for
from randbatch.cli import main
from randbatch.estimators import ESTIMATORS
from randbatch.partition import fold_seed


def qkv(num_tokens: int, seed: int = 0, heads: int = 2, size: int = 8) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    query, key, value = torch.randn(3, num_tokens, heads, size, generator=generator, dtype=torch.float64).unbind()
    return query, key, value + key


def test_n_eff_and_entropy_of_even_and_of_peaked_attention() -> None:
    _, _, value = qkv(50)
    zeros = torch.zeros(50, 2, 8, dtype=torch.float64)
    even = attention_error((zeros, zeros, value), batch_sizes=(10,)).layers[0].heads[1]
    assert even.n_eff == pytest.approx(50)
    assert even.entropy == pytest.approx(math.log(50))
    peaked = torch.nn.functional.one_hot(torch.arange(50), 64).double().unsqueeze(1)
    found = attention_error((1e4 * peaked, peaked, peaked), batch_sizes=(10,)).layers[0]
    assert found.heads[0].n_eff == pytest.approx(1)
    assert found.heads[0].entropy == pytest.approx(0, abs=1e-12)
    assert found.error["plain"][10] == pytest.approx(0, abs=1e-9), "every token looks at itself only"


def test_tokens_without_a_number_say_nothing_of_the_others() -> None:
    query, key, value = qkv(60)
    query[3] = math.nan
    found = attention_error((query, key, value), batch_sizes=(10,)).layers[0]
    for row in found.heads:
        assert math.isfinite(row.n_eff) and math.isfinite(row.entropy)
        assert all(0 < row.error[name][10] < 10 for name in ESTIMATORS)
    with pytest.raises(ValueError, match="query, key and value must be finite"):
        attention_error((query * math.nan, key, value), batch_sizes=(10,))


def test_ids_of_graphs_may_be_large() -> None:
    batch = torch.arange(60) // 20 * 10**14
    found = attention_error(qkv(60), batch=batch, batch_sizes=(8,), estimators=("plain",)).layers[0]
    assert found.num_tokens == 20


def test_n_eff_stays_inside_the_graph() -> None:
    zeros, batch = torch.zeros(60, 1, 4), torch.arange(60) // 20
    found = attention_error((zeros, zeros, torch.randn(60, 1, 4)), batch=batch, batch_sizes=(8,)).layers[0]
    assert found.num_tokens == 20
    assert found.heads[0].n_eff == pytest.approx(20, rel=1e-5)
    assert found.heads[0].entropy == pytest.approx(math.log(20), rel=1e-5)


@pytest.mark.parametrize("batch", [None, torch.arange(150) % 7 // 3])
def test_errors_are_those_of_the_op_where_every_query_is_looked_at(batch: Tensor | None) -> None:
    inputs = qkv(150)
    found = attention_error(inputs, batch=batch, batch_sizes=(20, 150), num_queries=150, draws=3, seed=4).layers[0]
    exact = rb.full_attention(*inputs, batch=batch)
    for name in ESTIMATORS:
        outs = [
            rb.random_batch_attention(*inputs, batch_size=20, batch=batch, estimator=name, seed=fold_seed(4, number))
            for number in range(3)
        ]
        errors = torch.stack([(out - exact).square().sum(dim=(0, 2)) for out in outs]).mean(dim=0)
        norms = exact.square().sum(dim=(0, 2))
        assert found.error[name][20] == pytest.approx(math.sqrt(errors.sum() / norms.sum()), rel=1e-6)
        for head, row in enumerate(found.heads):
            assert row.error[name][20] == pytest.approx(math.sqrt(errors[head] / norms[head]), rel=1e-6)
            assert row.error[name][150] < 1e-12


def test_a_sample_of_queries_is_close_to_all_of_them() -> None:
    inputs = qkv(3000)
    sample, whole = (attention_error(inputs, batch_sizes=(50,), num_queries=n).layers[0] for n in (256, 3000))
    for name in ESTIMATORS:
        assert sample.error[name][50] == pytest.approx(whole.error[name][50], rel=0.15)
    assert sample.heads[0].n_eff == pytest.approx(whole.heads[0].n_eff, rel=0.15)


def test_the_batch_size_that_is_named_has_that_error() -> None:
    inputs = qkv(2000)
    found = attention_error(inputs, batch_sizes=(32, 64, 128), tolerance=0.3, num_queries=500).layers[0]
    assert set(found.batch_size_needed) == set(ESTIMATORS)
    for name in ("plain", "debiased"):
        p = found.batch_size_needed[name]
        assert p > 256, "a prediction, not one of those measured"
        again = attention_error(inputs, batch_sizes=(p,), num_queries=500).layers[0]
        assert 0.2 < again.error[name][p] < 0.33


def test_the_law_for_the_batch_size() -> None:
    def law(p: float) -> float:
        return 3 * math.sqrt(1 / (p - 1) - 1 / 999)

    assert _batch_size_for(law(250), {p: law(p) for p in (50, 100)}, 1000) == pytest.approx(250, abs=1)
    assert _batch_size_for(law(250), {100: law(100)}, 1000) == pytest.approx(250, abs=1)
    assert _batch_size_for(law(300), {100: law(100)}, 1000) == 334, "three batches of 1000 tokens"
    assert _batch_size_for(law(600), {100: law(100)}, 1000) == 1000, "one batch"
    assert _batch_size_for(0.1, {50: 0.5, 100: 0.6}, 1000) == 1000, "an error that does not fall needs all"
    assert _batch_size_for(0.1, {50: 0.0, 100: 0.0}, 40) == 40
    assert _batch_size_for(0.7, {50: 0.5, 100: 0.6}, 1000) == 50, "measured, whatever the law says"
    assert _batch_size_for(10.0, {50: 0.1, 100: 0.05}, 1000) == 2


def test_rounds_are_those_that_choose_rounds_finds() -> None:
    inputs = qkv(400)
    found = attention_error(inputs, batch_sizes=(20, 40), tolerance=0.2, max_rounds=8, seed=3).layers[0]
    for name, choice in found.rounds_needed.items():
        assert choice == rb.choose_rounds(*inputs, 20, 0.2, estimator=name, max_rounds=8, seed=3)


def test_a_module_is_looked_into_as_it_runs() -> None:
    torch.manual_seed(0)
    layer, x = rb.nn.RandomBatchAttention(16, 2, 20), 2 * torch.randn(120, 16)
    q, k, v = (y.unflatten(1, (2, 8)) for y in torch.nn.functional.linear(x, layer.in_proj_weight).chunk(3, dim=1))
    found = attention_error(layer, x, batch_sizes=(16, 32))
    assert layer.training
    assert layer.randbatch_config.observer is None
    direct = attention_error((q, k, v), batch_sizes=(16, 32))
    assert [row.layer for row in found.layers] == ["RandomBatchAttention"]
    for name in ESTIMATORS:
        assert found.layers[0].error[name] == pytest.approx(direct.layers[0].error[name], rel=1e-4)


def test_looking_changes_no_output() -> None:
    torch.manual_seed(0)
    layer, x = rb.nn.RandomBatchAttention(16, 2, 20).eval(), torch.randn(120, 16)
    want = layer(x)
    seen = []
    layer.randbatch_config.observer = lambda *tensors: seen.append(tensors)
    torch.testing.assert_close(layer(x), want)
    assert len(seen) == 1


def test_every_layer_of_a_converted_model_is_named() -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    rb.convert(model, batch_size=8)
    x, padding = torch.randn(2, 40, 16), torch.arange(40) >= torch.tensor([[40], [30]])
    model.layers[1].eval()
    found = attention_error(model, x, named_inputs={"src_key_padding_mask": padding}, batch_sizes=(8, 16))
    assert [row.layer for row in found.layers] == ["layers.0.self_attn", "layers.1.self_attn"]
    assert {row.num_tokens for row in found.layers} == {40}
    assert model.layers[0].training
    assert not model.layers[1].training


def test_a_module_that_is_called_twice_has_two_rows() -> None:
    attention = rb.nn.RandomBatchAttention(8, 2, 8)
    found = attention_error(nn.Sequential(attention, attention), torch.randn(30, 8), batch_sizes=(8,))
    assert [row.layer for row in found.layers] == ["0", "0, call 2"]


def test_a_model_that_fails_is_left_as_it_was() -> None:
    class Fails(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = rb.nn.RandomBatchAttention(8, 2, 8)

        def forward(self, x: Tensor) -> Tensor:
            self.attention(x)
            raise RuntimeError("no more")

    model = Fails()
    with pytest.raises(RuntimeError, match="no more"):
        attention_error(model, torch.randn(30, 8))
    assert model.training
    assert model.attention.randbatch_config.observer is None
    copy.deepcopy(model)


def test_table_dict_and_picture(tmp_path: Path) -> None:
    found = attention_error(qkv(100), batch_sizes=(8, 16), estimators=("plain", "corrected"))
    text = str(found)
    assert "| layer     | head | n_eff | entropy | plain, p = 8 |" in text
    assert "rounds: corrected" in text
    assert "debiased" not in text
    again = json.loads(json.dumps(found.to_dict()))
    assert again["layers"][0]["heads"][1]["error"]["plain"]["8"] == found.layers[0].heads[1].error["plain"][8]
    found.draw(tmp_path / "new" / "errors.png")
    assert (tmp_path / "new" / "errors.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"batch_sizes": (1,)}, ValueError, "batch_sizes must be at least 2"),
        ({"batch_sizes": ()}, ValueError, "batch_sizes must name at least one"),
        ({"estimators": ("plane",)}, ValueError, "estimators must be one of .* Did you mean 'plain'"),
        ({"num_queries": 0}, ValueError, "num_queries must be at least 1"),
        ({"draws": 0}, ValueError, "draws must be at least 1"),
        ({"tolerance": -0.1}, ValueError, "tolerance must be a finite number > 0"),
        ({"max_rounds": 0}, ValueError, "max_rounds must be at least 1"),
        ({"named_inputs": {"x": 1}}, TypeError, "model_or_qkv must be a model"),
    ],
)
def test_what_is_wrong_is_named(options: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        attention_error(qkv(40), **options)


def test_other_mistakes_are_named() -> None:
    with pytest.raises(ValueError, match="none was called in Linear; convert a copy"):
        attention_error(nn.Linear(4, 4), torch.randn(10, 4))
    with pytest.raises(TypeError, match="model_or_qkv must be a model"):
        attention_error(qkv(40)[:2])
    with pytest.raises(ValueError, match="batch and scale are for query, key and value"):
        attention_error(rb.nn.RandomBatchAttention(8, 2, 8), torch.randn(30, 8), scale=1.0)
    with pytest.raises(ValueError, match="attention must attend over at least 2 tokens, got sets of 1"):
        attention_error(qkv(1))


def test_the_command_analyzes_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small = ["--hidden", "16", "--layers", "2", "--epochs", "1", "--batch-size", "32", "--device", "cpu"]
    assert main(["train", "--attention", "rba", "full", "off", "--out", str(tmp_path), *small]) == 0
    capsys.readouterr()
    run = tmp_path / "rba-split0-seed0"
    assert main(["analyze", str(run), "--batch-size", "16", "32", "--num-queries", "32", "--max-rounds", "2"]) == 0
    printed = capsys.readouterr().out
    assert "layers.1.attention" in printed
    assert f"picture: {run / 'analysis.png'}" in printed
    assert (run / "analysis.md").read_text() in printed + "\n"
    assert len(json.loads((run / "analysis.json").read_text())["layers"]) == 2
    assert main(["analyze", str(tmp_path / "full-split0-seed0"), "--batch-size", "16", "--max-rounds", "1"]) == 0
    capsys.readouterr()
    assert main(["analyze", str(tmp_path / "off-split0-seed0")]) == 2
    assert "model must hold softmax attention" in capsys.readouterr().err
    assert main(["analyze", str(tmp_path)]) == 2
    assert "it holds several, name one: full-split0-seed0, off-split0-seed0, rba" in capsys.readouterr().err
    assert main(["analyze", str(tmp_path / "nothing")]) == 2
    assert "is not a finished run (result.json is missing)" in capsys.readouterr().err


def test_the_result_is_public() -> None:
    assert isinstance(attention_error(qkv(30), batch_sizes=(8,)), AttentionErrors)
    assert rb.analysis.attention_error is attention_error
