"""Trainings that are ended at any moment, and resumed: the result is that of one that never was.

    python tests/reliability/interrupting.py moments --cases 500 --seed 0
    python tests/reliability/interrupting.py steps
    python tests/reliability/interrupting.py full

`moments`: a signal at a random moment. `steps`: killed before every single step that puts something on the disk.
`full`: the disk is full at every such step. The process imports everything once and forks one that trains for each
case, so that a case takes a fraction of a second. What it prints last is a JSON object with the number of cases; the
exit code is 1 if one of them failed, and each such case is printed with its number, by which `--only` runs it again.
"""

from __future__ import annotations

import argparse
import errno
import json
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tqdm

from randbatch._errors import UserError
from randbatch._files import read_record
from randbatch.cli import main
from randbatch.train.checkpoint import read_tensors

SIGNALS = ("KILL", "TERM", "INT", "STOP")
FLAGS = ["--hidden=8", "--heads=2", "--layers=1", "--batch-size=16", "--dropout=0.1", "--device=cpu"]
NOT_THE_SAME = ("seconds", "seconds_per_epoch", "peak_memory_bytes", "log")


def write_data(path: Path, num_nodes: int = 60) -> None:
    """A data set of a moment: a path of nodes of two classes."""
    rng = np.random.default_rng(0)
    arrays = {
        "node_features": rng.normal(size=(num_nodes, 4)).astype(np.float32),
        "node_labels": np.arange(num_nodes) % 2,
        "edges": np.stack([np.arange(num_nodes - 1), np.arange(1, num_nodes)], axis=1),
    }
    for number, role in enumerate(("train", "val", "test")):
        arrays[f"{role}_masks"] = (np.arange(num_nodes) // 2) % 3 == number
    np.savez(path, **arrays)


# A training in a process of its own


def start(argv: list[str], said: Path, before: Callable[[], None] = lambda: None) -> int:
    """The number of a process that runs a command; what it says goes to the file `said`."""
    sys.stdout.flush()
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
        handle = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(handle, 1)
        os.dup2(handle, 2)
        before()
        code = main(argv)
    except KeyboardInterrupt:  # outside of `main`
        code = 130
    except (UserError, OSError) as error:
        print(f"randbatch: {error}", file=sys.stderr)
        code = 2
    except SystemExit as error:
        code = error.code
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(code)


def wait(pid: int) -> int:
    """The exit code of a process, or the negative number of the signal that ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


class Training:
    """One folder, and the command that fills it."""

    def __init__(self, folder: Path, argv: list[str]) -> None:
        self.folder, self.argv = folder, argv
        self.said = folder.with_suffix(".txt")

    def start(self, before: Callable[[], None] = lambda: None) -> int:
        """Start, or resume as a user would."""
        begun = (self.folder / "sweep.json").exists()
        argv = ["train", "--resume", str(self.folder)] if begun else [*self.argv, "--out", str(self.folder)]
        return start(argv, self.said, before)

    def places(self) -> Iterator[Path]:
        """The folders of its runs."""
        for path in sorted(self.folder.rglob("checkpoint.safetensors")):
            yield path.parent

    def check_whole(self) -> None:
        """Every file is whole, whatever has happened."""
        for path in self.folder.rglob("*"):
            if path.name.startswith(".randbatch-") or path.is_dir():
                continue
            if path.suffix == ".json":
                read_record(path)
            elif path.suffix == ".safetensors":
                read_tensors(path)
            elif path.suffix == ".png":
                content = path.read_bytes()
                assert content.startswith(b"\x89PNG") and content.endswith(b"IEND\xaeB`\x82"), path
            elif path.suffix == ".jsonl":
                for line in path.read_text().splitlines(keepends=True)[:-1]:  # the last one may be cut
                    json.loads(line)
            else:
                assert path.name == "table.md" and path.read_text().startswith("| "), path

    def facts(self) -> dict[str, Any]:
        """All that must not depend on interruptions: names of files, numbers of log and result, every tensor."""
        found: dict[str, Any] = {"files": sorted(str(p.relative_to(self.folder)) for p in self.folder.rglob("*"))}
        for place in self.places():
            log = [json.loads(line) for line in (place / "log.jsonl").read_text().splitlines()]
            about = {}
            for name in ("checkpoint.safetensors", "best.safetensors"):
                tensors, about[name] = read_tensors(place / name)
                found[f"{place.name} {name}"] = {key: tensor.tolist() for key, tensor in tensors.items()}
            found[f"{place.name} rest"] = _without_times([log, about, read_record(place / "result.json")])
        return found


def _without_times(content: Any) -> Any:
    if isinstance(content, dict):
        return {key: _without_times(value) for key, value in content.items() if key not in NOT_THE_SAME}
    return [_without_times(value) for value in content] if isinstance(content, list) else content


# What happens to it


class Cases:
    """Cases in a temporary folder, counted, beside one that nothing happened to."""

    def __init__(self, folder: Path, only: int | None) -> None:
        self.folder, self.only = folder, only
        self.counts: Counter[str] = Counter()
        self.failed: list[str] = []
        self.whole: dict[str, tuple[dict[str, Any], float]] = {}
        write_data(folder / "data.npz")

    def argv(self, epochs: int, seeds: str) -> list[str]:
        """A command that trains one run for each seed."""
        return ["train", "--dataset", str(self.folder / "data.npz"), *FLAGS, "--epochs", str(epochs), "--seed", *seeds]

    def reference(self, argv: list[str]) -> tuple[dict[str, Any], float]:
        """What is right, and how long it takes."""
        key = " ".join(argv)
        if key not in self.whole:
            start_time = time.perf_counter()
            training = Training(self.folder / f"whole{len(self.whole)}", argv)
            code = wait(training.start())
            assert code == 0, training.said.read_text()
            self.whole[key] = (_named(training.facts(), training.folder), time.perf_counter() - start_time)
        return self.whole[key]

    def run(self, number: int, kind: str, argv: list[str], happen: Callable[[Training], None]) -> None:
        """One case: what happens, then a resumption to the end."""
        if self.only is not None and number != self.only:
            return
        right, _ = self.reference(argv)
        training = Training(self.folder / f"case{number}", argv)
        self.counts["cases"] += 1
        self.counts[kind] += 1
        try:
            happen(training)
            code = wait(training.start())
            said = training.said.read_text()
            assert code == 0, f"resumed with exit code {code}"
            assert "Traceback" not in said, "a traceback"
            training.check_whole()
            found = _named(training.facts(), training.folder)
            for name in right.keys() | found.keys():
                assert right.get(name) == found.get(name), f"{name} is not that of a training without interruption"
        except Exception as error:
            self.failed.append(f"case {number}, {kind}: {type(error).__name__}: {error}\n{training.said.read_text()}")
        else:
            shutil.rmtree(training.folder)

    def finish(self) -> int:
        """Say what was seen; the exit code."""
        print("\n".join(self.failed))
        print(json.dumps(dict(self.counts) | {"failed": len(self.failed)}))
        return 1 if self.failed else 0


def _named(facts: dict[str, Any], folder: Path) -> dict[str, Any]:
    """The facts without the name of the folder."""
    return {key.replace(folder.name, "run", 1): value for key, value in facts.items()}


def moments(cases: Cases, count: int, seed: int) -> None:
    """Signals at random moments, in some cases several in a row; half of the cases are of two runs."""
    for number in range(count):
        rng = random.Random(f"{seed} {number}")
        argv = cases.argv(8, "01" if number % 2 else "0")
        name = SIGNALS[number // 2 % len(SIGNALS)]
        times = rng.choice((1, 1, 1, 2, 3))

        def happen(training: Training, rng=rng, argv=argv, name=name, times=times) -> None:
            for _ in range(times):
                pid = training.start()
                time.sleep(rng.uniform(0, 0.95 * cases.reference(argv)[1]))
                if name == "STOP":
                    os.kill(pid, signal.SIGSTOP)
                    time.sleep(0.02)
                    os.kill(pid, signal.SIGCONT)
                else:
                    os.kill(pid, getattr(signal, f"SIG{name}"))
                code = wait(pid)
                allowed = {"KILL": (0, -9), "TERM": (0, 130, -15), "INT": (0, 130), "STOP": (0,)}[name]
                assert code in allowed, f"exit code {code} after {name}"
                cases.counts["ended early"] += code != 0
                cases.counts["in the middle"] += code != 0 and (training.folder / "sweep.json").exists()
                said = training.said.read_text()
                if code == 130 and (training.folder / "sweep.json").exists():  # `picture:` if it was just through
                    assert "resume with: randbatch train --resume" in said or "picture:" in said, said
                if training.folder.exists():
                    training.check_whole()

        cases.run(number, name, argv, happen)


def steps(cases: Cases, fault: Callable[[], None], kind: str, *names: str) -> None:
    """Something happens at the first, the second, … call of functions of `os`, until there are no more of them."""
    argv = cases.argv(2, "0")
    for number in range(1000):
        codes: list[int] = []

        def happen(training: Training, number=number, codes=codes) -> None:
            codes.append(wait(training.start(lambda: _at_call(number, fault, names))))
            assert codes[0] in (0, 2, -9), f"exit code {codes[0]} after {kind}"
            if codes[0] == 2:
                said = [line for line in training.said.read_text().splitlines() if line.startswith("randbatch: ")]
                assert len(said) == 1 and "space" in said[0] and str(training.folder.parent) in said[0], said
                assert not list(training.folder.rglob(".randbatch-*")), "a temporary file is left"
            if training.folder.exists():
                training.check_whole()

        cases.run(number, kind, argv, happen)
        if codes and codes[0] == 0:  # it went through before so many calls
            return


def _at_call(number: int, fault: Callable[[], None], names: tuple[str, ...]) -> None:
    """Patch functions of `os` in this process: before their call of this number, `fault` happens."""
    seen = [0]
    for name in names:
        function = getattr(os, name)

        def patched(*args: Any, real: Callable[..., Any] = function, **options: Any) -> Any:
            seen[0] += 1
            if seen[0] > number:
                fault()
            return real(*args, **options)

        setattr(os, name, patched)


def kill() -> None:
    """The end, without a word."""
    os.kill(os.getpid(), signal.SIGKILL)


def no_space() -> None:
    """What the kernel says of a full disk."""
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def short_files(cases: Cases) -> None:
    """A real refusal of the kernel: files may only become so long."""
    for number, size in enumerate((100, 1000, 4000, 8000, 20000, 30000), 2000):

        def happen(training: Training, size=size) -> None:
            training.said.touch()
            limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))  # noqa: E731
            code = wait(training.start(limit))
            assert code == 2, f"exit code {code} where files may have {size} bytes"
            training.check_whole()

        cases.run(number, "short files", cases.argv(2, "0"), happen)


def run(what: str, count: int, seed: int, only: int | None) -> int:
    """Run cases in a temporary folder; the exit code."""
    torch.set_num_threads(1)
    tqdm.tqdm.monitor_interval = 0  # a process with threads is not to be forked
    with tempfile.TemporaryDirectory() as folder:
        cases = Cases(Path(folder), only)
        warm = Path(folder) / "warm"
        with open(os.devnull, "w") as nothing, redirect_stdout(nothing), redirect_stderr(nothing):  # noqa: PTH123
            code = main([*cases.argv(1, "0"), "--out", str(warm)])  # so that what is imported late is there
        assert code == 0, "a training without interruption"
        if what == "moments":
            moments(cases, count, seed)
        elif what == "steps":
            steps(cases, kill, "killed", "fsync", "replace")
        else:
            steps(cases, no_space, "full disk", "fsync")
            short_files(cases)
        return cases.finish()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("moments", "steps", "full"))
    parser.add_argument("--cases", type=int, default=40)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int, default=None)
    given = parser.parse_args()
    sys.exit(run(given.what, given.cases, given.seed, given.only))
