"""Trainings that end at any moment resume to the numbers of one that never ended. `interrupting.py` says how."""

import json
import os
import subprocess
import sys
from pathlib import Path


def count(*arguments: str) -> dict[str, int]:
    """The cases of a call of the program; a failed one fails the test."""
    program = Path(__file__).with_name("interrupting.py")
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, str(program), *arguments], capture_output=True, text=True, env=environment, timeout=600
    )
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_signals_at_random_moments() -> None:
    """SIGKILL, SIGTERM, SIGINT, and SIGSTOP with SIGCONT; most come while files are written."""
    cases = count("moments", "--cases", os.environ.get("RANDBATCH_INTERRUPTIONS", "40"))
    assert cases["cases"] >= 40
    assert cases["failed"] == 0
    assert min(cases[name] for name in ("KILL", "TERM", "INT", "STOP")) >= cases["cases"] // 4
    assert cases["in the middle"] >= cases["cases"] // 2


def test_killed_before_every_step() -> None:
    """Before every sync and every move of a training: five of an epoch that is the best, and those around."""
    cases = count("steps")
    assert cases["failed"] == 0
    assert cases["killed"] >= 25


def test_full_disk_at_every_step() -> None:
    """One line that says so, exit code 2, no temporary file; with space again the training resumes."""
    cases = count("full")
    assert cases["failed"] == 0
    assert cases["full disk"] >= 15
    assert cases["short files"] == 6
