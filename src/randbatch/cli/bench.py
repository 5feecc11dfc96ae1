"""`randbatch bench`: time and memory of a layer's training step against N, beside its peers."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from randbatch._checks import MOST, check_choice, check_integer, check_several
from randbatch._errors import InvalidValue
from randbatch._files import write_text
from randbatch._folders import new_place, open_folder
from randbatch._memory import check_memory
from randbatch._optional import require
from randbatch.cli.command import PICTURES, Command
from randbatch.cli.studies.peers import PEERS
from randbatch.cli.studies.timing import Layer, check_peers, draw_rows, measure_rows, read_rows, table_of
from randbatch.train.machine import check_device, commit, pick_device, versions

__all__ = ["COMMAND", "BenchConfig", "run_bench"]

_MOST_TOKENS = 2**62  # an index of torch


@dataclass(frozen=True)
class BenchConfig:
    """Time and memory of forward and backward of attention layers, ours and others, against N."""

    case: tuple[str, ...] = tuple(PEERS)
    """layer, pieces (layer with chunk_batches=auto), naive, full, performer, sgformer, polynormer."""
    tokens: tuple[int, ...] = (16_384, 32_768, 65_536, 131_072)
    """Numbers of tokens N, multiples of the batch size."""
    channels: int = 64
    """Channels C; a multiple of heads."""
    heads: int = 4
    """Attention heads H."""
    batch_size: int = 128
    """Tokens in a random batch p."""
    most_of_full: int = 16_384
    """Largest N of the cases that take O(N²) time."""
    turns: int = 5
    """Timed steps of each case. The cases take turns; a turn before the first is not counted."""
    device: str = "auto"
    """`cpu`, `cuda`, `cuda:1`, …; `auto` takes a GPU if there is one."""
    out: Path | None = None
    """Folder of the results. Default: runs/bench-<time>."""

    def __post_init__(self) -> None:
        """Check everything that does not depend on the machine."""
        check_several("case", self.case)
        for name in self.case:
            check_choice("case", name, PEERS)
        check_integer("batch_size", self.batch_size, 2, MOST)
        check_several("tokens", self.tokens)
        for size in self.tokens:
            if check_integer("tokens", size, 1, _MOST_TOKENS) % self.batch_size:
                raise InvalidValue(f"tokens must be multiples of the batch size {self.batch_size}, got {size}")
        for name in ("channels", "heads", "turns"):
            check_integer(name, getattr(self, name), 1, MOST)
        if self.channels % self.heads:
            raise InvalidValue(f"channels must be a multiple of heads, got {self.channels} and {self.heads}")
        check_integer("most_of_full", self.most_of_full, 0, _MOST_TOKENS)
        check_device(self.device)


def run_bench(config: BenchConfig, *, say: Callable[[str], None] = print) -> list[dict[str, Any]]:
    """Check, time, measure memory; print the table, write rows (JSONL), table (Markdown) and picture (PNG).

    Raises:
        AssertionError: peers that must agree do not: nothing was timed.
        UserError: a setting that does not fit, a missing package, a folder with other results.
        Interrupted: by Ctrl-C; the rows of every finished N are on the disk.
    """
    device = pick_device(config.device)
    elements = 3 * max(config.tokens) * config.channels  # input, output, gradient
    check_memory("tokens", max(config.tokens), elements * torch.finfo(torch.float32).bits // 8, device)
    layer = Layer(config.channels, config.heads, config.batch_size)
    check_peers(layer, config.case, device)
    settings = {name: value for name, value in asdict(config).items() if name != "out"}
    folder = config.out or new_place("bench")
    places = {kind: folder / f"bench.{kind}" for kind in ("jsonl", "md", "png")}
    with open_folder(folder, settings, say=say):
        rows = read_rows(places["jsonl"])
        missing = sorted(set(config.tokens) - {row["tokens"] for row in rows})
        made = {"date": datetime.now(UTC).date().isoformat(), "commit": commit(), "versions": versions(device)}
        for size in require("tqdm").tqdm(missing, unit="N", disable=None):
            names = [name for name in config.case if not PEERS[name].quadratic or size <= config.most_of_full]
            found = measure_rows(layer, names, size, config.turns, device)
            rows += [row | {"settings": settings} | made for row in found]
            write_text(places["jsonl"], "".join(json.dumps(row) + "\n" for row in rows))
        table = table_of(rows)
        write_text(places["md"], f"{table}\n")
        draw_rows(layer, config.case, rows, places["png"])
    say(f"\n{table}\n\nrows: {places['jsonl']}\ntable: {places['md']}\npicture: {places['png']}")
    return rows


COMMAND = Command(
    "bench", "time and memory of attention layers, ours and others", BenchConfig, run_bench, needs=PICTURES
)
