"""The planner against what a run allocates, the benchmark command, and what it compares."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from randbatch.analysis.plan import _Case, _peak_of, parse_memory, peak_allocated, plan
from randbatch.cli import main
from randbatch.cli.studies.peers import PEERS, Peer
from randbatch.nn import RandomBatchAttention


def test_the_peak_is_what_is_held_at_once() -> None:
    """Three tensors one after the other, then two at once; a megabyte each."""

    def one_after_the_other() -> None:
        for _ in range(3):
            torch.zeros(250_000)

    def at_once() -> torch.Tensor:
        return torch.zeros(250_000) + torch.ones(250_000)  # two, and their sum

    assert 1e6 <= peak_allocated(one_after_the_other) < 1.01e6
    assert 3e6 <= peak_allocated(at_once) < 3.01e6


@pytest.mark.parametrize(
    "settings",
    [
        {"local": "sage", "batch_size": 64, "chunk_batches": None},
        {"local": "gcn", "batch_size": 64, "chunk_batches": 4},
        {"local": "off", "batch_size": 64, "chunk_batches": None, "estimator": "corrected"},
    ],
)
def test_the_plan_is_the_peak_of_a_larger_graph(settings: dict[str, object]) -> None:
    """Predicted from 2048 and 4096 nodes, run with 20 000."""
    shared = {"local": settings["local"], "estimator": settings.get("estimator", "plain"), "layers": 2}
    found = plan(20_000, 100_000, memory="1TB", batch_sizes=(64,), chunk_batches=(settings["chunk_batches"],), **shared)  # type: ignore[arg-type]
    whole = {"channels": 64, "heads": 4, "dropout": 0.0} | shared | settings
    measured = _peak_of(_Case(20_000, 100_000, 64, whole, torch.float32, torch.device("cpu")))
    assert found.rows[0].peak_bytes == pytest.approx(measured, rel=0.03)


def test_the_best_is_the_largest_batch_that_fits() -> None:
    sizes = {"batch_sizes": (64, 128), "chunk_batches": (None, 4), "layers": 1}
    everything = plan(50_000, 50_000, memory="1TB", **sizes)  # type: ignore[arg-type]
    assert everything.best == next(
        row for row in everything.rows if row.batch_size == 128 and row.chunk_batches is None
    )
    between = sorted(row.peak_bytes for row in everything.rows)[0] + 2**20  # small partitions are remembered
    some = plan(50_000, 50_000, memory=between, **sizes)  # type: ignore[arg-type]
    assert some.best is not None
    assert some.best.chunk_batches == 4  # pieces are what fits when memory is short
    assert plan(50_000, 50_000, memory="1MB", **sizes).best is None  # type: ignore[arg-type]
    assert "yes, best" in str(everything)


def test_units_of_memory() -> None:
    assert [parse_memory(text) for text in (7, "7B", "2 GB", "1.5gib", "3kB")] == [7, 7, 2 * 10**9, 3 * 2**29, 3000]
    assert parse_memory("0.1GB") == 10**8
    for text in ("much", "16", "1e3GB", "-1GB", "nanGB", "9" * 5000 + "GB"):
        with pytest.raises(ValueError, match="memory must be a number and its unit, such as '24GB'"):
            parse_memory(text)
    with pytest.raises(ValueError, match="memory must be at least 1, got 0"):
        parse_memory("0GB")
    with pytest.raises(ValueError, match="memory's unit must be one of"):
        parse_memory("3 XB")


def test_the_command_plans(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["plan", "--nodes", "20000", "--edges", "40000", "--batch-size", "64", "--layers", "1"]
    assert main([*arguments, "--memory", "1GB", "--out", str(tmp_path / "plan.json")]) == 0
    assert "| 64 | all |" in capsys.readouterr().out
    assert json.loads((tmp_path / "plan.json").read_text())["best"]["batch_size"] == 64
    assert main([*arguments, "--memory", "lots"]) == 2
    assert "memory must be" in capsys.readouterr().err


@pytest.mark.parametrize("name", PEERS)
def test_every_peer_maps_tokens_to_tokens(name: str) -> None:
    module, function = PEERS[name].make(16, 2, 8)
    x = torch.randn(32, 16, requires_grad=True)
    out = function(x)
    assert out.shape == x.shape
    out.sum().backward()
    assert any(parameter.grad is not None for parameter in module.parameters())


def test_the_command_benches(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small = ["--channels", "16", "--heads", "2", "--batch-size", "16", "--turns", "1", "--most-of-full", "64"]
    out = tmp_path / "bench"
    assert main(["bench", "--tokens", "64", "128", *small, "--out", str(out)]) == 0
    rows = [json.loads(line) for line in (out / "bench.jsonl").read_text().splitlines()]
    assert {row["case"] for row in rows if row["tokens"] == 64} == set(PEERS)
    assert {row["case"] for row in rows if row["tokens"] == 128} == set(PEERS) - {"full"}
    assert all(row["peak_bytes"] > 0 and len(row["seconds"]) == 1 and "torch" in row["versions"] for row in rows)
    assert (out / "bench.md").read_text().strip() in capsys.readouterr().out
    assert (out / "bench.png").read_bytes().startswith(b"\x89PNG")
    kept = (out / "bench.jsonl").read_text().splitlines(keepends=True)
    (out / "bench.jsonl").write_text("".join(line for line in kept if json.loads(line)["tokens"] == 64))  # interrupted
    assert main(["bench", "--tokens", "64", "128", *small, "--out", str(out)]) == 0
    again = (out / "bench.jsonl").read_text().splitlines(keepends=True)
    assert again[: len(PEERS)] == kept[: len(PEERS)]
    assert len(again) == len(kept)


def test_nothing_is_timed_that_is_wrong(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def wrong(channels: int, heads: int, batch_size: int) -> tuple[nn.Module, Callable[[Tensor], Tensor]]:
        layer = RandomBatchAttention(channels, heads, batch_size)
        return layer, lambda x: 1.01 * layer(x)

    monkeypatch.setitem(PEERS, "naive", Peer(wrong, same=True))
    assert main(["bench", "--case", "naive", "--tokens", "128", "--out", str(tmp_path / "bench")]) == 1
    assert "AssertionError: naive: " in capsys.readouterr().err
    assert not (tmp_path / "bench").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--case", "layers"], "Did you mean 'layer'?"),
        (["--tokens", "100"], "tokens must be multiples of the batch size 128, got 100"),
        (["--turns", "0"], "turns must be at least 1"),
        (["--tokens", str(128 * 10**13)], "tokens must fit into memory: 1280000000000000 takes at least"),
    ],
)
def test_bad_settings_are_named(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", *arguments]) == 2
    assert message in capsys.readouterr().err
