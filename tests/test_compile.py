"""`torch.compile(fullgraph=True)`: what compiled modules compute is what eager ones do, from the same `manual_seed`.

Outputs, all gradients and, but for inductor, the state of the generator afterwards. All run in one process without the
run-time checks of the other tests (`compiling.py`).
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from compiling import CASES, CHECKS, CPP

EVAL = ["flat", "rounds", "a wide seed", "exact", "exact graphs", "padding"]
PLAN = [("aot_eager", True, list(CASES)), ("aot_eager", False, EVAL), ("inductor", True, ["model: sage"])]
KEYS = [f"{name}, {backend}, {'train' if training else 'eval'}" for backend, training, names in PLAN for name in names]


@pytest.fixture(scope="module")
def results() -> dict[str, str | None]:
    command = [sys.executable, str(Path(__file__).with_name("compiling.py")), json.dumps(PLAN if CPP else PLAN[:-1])]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("key", [*CHECKS, *KEYS])
def test_compiled_is_eager(key: str, results: dict[str, str | None]) -> None:
    if "inductor" in key and not CPP:
        pytest.skip("inductor needs g++")
    assert results[key] is None, results[key]
