"""This code computes what the golden values say: the numbers of every case, to the noise of its dtype.

`python tests/scripts/golden.py --check` also tells which of them are the same to the last bit.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from golden_cases import CASES, why_not
from golden_tools import FOLDER, Case, Golden, compare, compute, read, write

SCRIPT = Path(__file__).parent / "scripts" / "golden.py"
GOLDENS = {name: golden for path in sorted(FOLDER.glob("*.safetensors")) for name, golden in read(path).items()}


@pytest.fixture(scope="module")
def compiled() -> dict[str, list[str]]:
    """In a process without the run-time checks of annotations, which no compiler can trace."""
    command = [sys.executable, str(SCRIPT), "--check", "--json", "--only", "compiled: *"]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    assert done.returncode in (0, 1), done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("name", CASES)
def test_golden(name: str, request: pytest.FixtureRequest) -> None:
    case = CASES[name]
    reason = why_not(case)
    if reason is not None:
        pytest.skip(reason)
    if case.compiled:
        far = request.getfixturevalue("compiled")[name]
    else:
        far = [str(each) for each in compare(case, GOLDENS.get(name), compute(case)) if each.of_bound > 1]
    assert not far, "\n".join(far)


def test_the_files_hold_the_table() -> None:
    assert GOLDENS.keys() == CASES.keys()


@pytest.mark.parametrize("change", ["one element", "shape", "dtype", "nan", "gone", "new"])
def test_another_number_is_seen(change: str, tmp_path: Path) -> None:
    case = Case("toy: toy", lambda run: {})
    x = torch.tensor([3.0, -1.0, 0.5])
    write({case.name: Golden({"out": x}, {"out": 2e-7}, "", "")}, tmp_path / "toy.safetensors")
    golden = read(tmp_path / "toy.safetensors")[case.name]
    same, noise = (compare(case, golden, {"out": y})[0] for y in (x.clone(), x + 3e-7))
    assert same.bits
    assert not noise.bits
    assert noise.of_bound < 1
    others = {
        "one element": {"out": x + torch.tensor([0.0, 0.0, 2e-6])},
        "shape": {"out": x.unsqueeze(0)},
        "dtype": {"out": x.double()},
        "nan": {"out": x.masked_fill(x < 0, torch.nan)},
        "gone": {},
        "new": {"out": x, "more": x},
    }
    assert max(each.of_bound for each in compare(case, golden, others[change])) > 1
