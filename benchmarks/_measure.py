"""Shared by the benchmarks: a case in a process of its own, rows with what they were made with."""

import json
import os
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from randbatch.train.machine import commit, peak_memory, versions

RESULTS = Path(__file__).with_name("results")


def peak_bytes() -> int:
    """Peak resident memory of this process. On Linux not `ru_maxrss`, which starts at what the parent process held."""
    return peak_memory(torch.device("cpu"))


def in_a_process(script: str, *arguments: object, **environment: str) -> dict[str, Any]:
    """Run `script` with arguments in a fresh process; the JSON of its last line."""
    command = [sys.executable, script, *map(str, arguments)]
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=os.environ | environment)
    return json.loads(done.stdout.splitlines()[-1])


def write_row(name: str, row: dict[str, Any]) -> None:
    """Append a row to `results/NAME.jsonl`."""
    RESULTS.mkdir(exist_ok=True)
    made = {"date": datetime.now(UTC).date().isoformat(), "commit": commit(), "versions": versions(torch.device("cpu"))}
    with (RESULTS / f"{name}.jsonl").open("a") as file:
        file.write(json.dumps(row | made) + "\n")
