"""Runs tests in forked processes, each with at most one file of the source replaced.

The parent imports the heavy libraries once and nothing of the source, so that a child begins with its tests. A child
writes nothing into the tree; bytecode of what is not replaced is kept in a folder that goes when the parent ends.
"""

from __future__ import annotations

import atexit
import contextlib
import importlib
import json
import os
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from importlib.machinery import SourceFileLoader
from pathlib import Path
from typing import Any

_MOST_MEMORY = 6 << 30  # bytes that a child may take beyond those of its parent
_ONE_THREAD = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")


@dataclass(frozen=True)
class Job:
    """Tests to run, `replaced` the path of a source file and what is read in its place."""

    root: Path
    tests: Sequence[str]
    leave_out: str
    timeout: float
    replaced: tuple[str, bytes] | None = None
    durations: dict[str, float] = field(default_factory=dict)  # of each test, where known: quick ones are run first
    label: Any = None


@dataclass
class Outcome:
    """What came of a job.

    Attributes:
        status: `passed`, `failed`, `timeout`, or `error` where the tests said nothing.
        seconds: from fork to end.
        test: the first test that failed.
        durations: seconds of each test.
        output: the end of what was printed.
    """

    status: str
    seconds: float
    test: str = ""
    durations: dict[str, float] = field(default_factory=dict)
    output: str = ""


class Observer:
    """A plugin of pytest: quick tests first, how long each takes, which one fails."""

    def __init__(self, durations: dict[str, float]) -> None:
        self.known = durations
        self.durations: dict[str, float] = {}
        self.failed = ""

    def pytest_collection_modifyitems(self, items: list[Any]) -> None:
        items.sort(key=lambda item: self.known.get(item.nodeid, 0.0))

    def pytest_collectreport(self, report: Any) -> None:
        if report.failed:
            self.failed = self.failed or report.nodeid

    def pytest_runtest_logreport(self, report: Any) -> None:
        self.durations[report.nodeid] = self.durations.get(report.nodeid, 0.0) + report.duration
        if report.failed:
            self.failed = self.failed or report.nodeid


def preload(modules: Iterable[str], root: Path) -> None:
    """Import what all children need; none of it may be of the source."""
    os.environ |= dict.fromkeys(_ONE_THREAD, "1")
    os.environ["TRITON_INTERPRET"] = "1"  # as tests/conftest.py has it, before triton is imported
    bytecode = tempfile.mkdtemp(prefix="mutants-bytecode-")
    parent = os.getpid()
    atexit.register(lambda: shutil.rmtree(bytecode, ignore_errors=True) if os.getpid() == parent else None)
    sys.pycache_prefix = os.environ["PYTHONPYCACHEPREFIX"] = bytecode
    sys.dont_write_bytecode = False
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
    for module in ("pytest", *modules):
        importlib.import_module(module)
    own = [name for name, module in sys.modules.items() if _is_below(getattr(module, "__file__", None), root / "src")]
    if own:
        raise RuntimeError(f"children must import the source themselves, but it was imported with {modules}: {own}")


def _is_below(file: str | None, folder: Path) -> bool:
    return file is not None and Path(file).is_relative_to(folder)


def run(jobs: Iterable[Job], side_by_side: int = 1) -> Iterator[tuple[Job, Outcome]]:
    """The outcomes of jobs, as they end; at most so many processes at once, and none is left where this one ends."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that what follows is cleaned up
    waiting, running = iter(jobs), list[_Child]()
    try:
        while True:
            while len(running) < side_by_side and (job := next(waiting, None)) is not None:
                running.append(_Child(job))
            if not running:
                return
            ended = [(child, outcome) for child in running if (outcome := child.poll()) is not None]
            for child, outcome in ended:
                running.remove(child)
                yield child.job, outcome
            if not ended:
                time.sleep(0.02)
    finally:
        for child in running:
            child.end()


class _Child:
    def __init__(self, job: Job) -> None:
        self.job = job
        self.folder = Path(tempfile.mkdtemp(prefix="mutant-"))
        self.started = time.monotonic()
        sys.stdout.flush()
        sys.stderr.flush()
        self.pid = os.fork()
        if self.pid == 0:
            _be_child(job, self.folder)

    def poll(self) -> Outcome | None:
        """What came of it, once it has ended or its time is over."""
        seconds = time.monotonic() - self.started
        pid, status = os.waitpid(self.pid, os.WNOHANG)
        if pid:
            outcome = self._read(os.waitstatus_to_exitcode(status), seconds)
            self._clean()
            return outcome
        if seconds > self.job.timeout:
            self.end()
            return Outcome("timeout", seconds)
        return None

    def end(self) -> None:
        """Kill it and what it started."""
        os.kill(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)
        self._clean()

    def _clean(self) -> None:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.pid, signal.SIGKILL)  # processes that it left behind
        shutil.rmtree(self.folder, ignore_errors=True)

    def _read(self, code: int, seconds: float) -> Outcome:
        output = (self.folder / "output").read_text(errors="replace")[-4000:]
        report = self.folder / "report"
        if code < 0:
            return Outcome("failed", seconds, f"ended by {signal.Signals(-code).name}", output=output)
        if not report.exists():
            return Outcome("error", seconds, output=output)
        told = json.loads(report.read_text())
        # 0: all pass, 1: some failed, 2: interrupted, by a module that could not be imported
        status = {0: "passed", 1: "failed", 2: "failed"}.get(told["code"], "error")
        if self.job.replaced is not None and not told["read"]:
            status, output = "error", "the tests did not import the file that was replaced"
        return Outcome(status, seconds, told["failed"], told["durations"], output)


def _be_child(job: Job, folder: Path) -> None:
    """All that a child does; it never returns."""
    code = 70
    try:
        os.setsid()
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        out = os.open(folder / "output", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        for stream in (1, 2):
            os.dup2(out, stream)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        limit = _memory_in_use() + _MOST_MEMORY
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        _settle(job.root, folder)
        was_read = _serve(*job.replaced) if job.replaced is not None else list
        told = _test(job, folder)
        (folder / "report").write_text(json.dumps(told | {"read": bool(was_read())}))
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(code)


def _memory_in_use() -> int:
    return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()


def _settle(root: Path, folder: Path) -> None:
    """The source of `root` comes first, here and in processes that tests start; nothing is written but in `folder`."""
    source = str(root / "src")
    os.environ |= {"PYTHONPATH": source, "TMPDIR": str(folder)}
    os.environ["HYPOTHESIS_STORAGE_DIRECTORY"] = str(folder / "hypothesis")
    tempfile.tempdir = None
    sys.path.insert(0, source)
    os.chdir(root)
    if "hypothesis" in sys.modules:
        from hypothesis import Phase, settings

        quick = {"database": None, "deadline": None, "derandomize": True, "phases": [Phase.explicit, Phase.generate]}
        settings.register_profile("mutants", **quick)
        settings.load_profile("mutants")


def _serve(file: str, data: bytes) -> Callable[[], list[bool]]:
    """Whoever imports this file gets `data`, through any loader of files; bytecode of it is neither read nor kept."""
    read: list[bool] = []
    get_data, path_stats = SourceFileLoader.get_data, SourceFileLoader.path_stats

    def get_mutant(self: SourceFileLoader, path: str) -> bytes:
        if path != file:
            return get_data(self, path)
        read.append(True)
        return data

    def get_stats(self: SourceFileLoader, path: str) -> Any:
        if path == file:
            raise OSError("a mutant has no bytecode")
        return path_stats(self, path)

    SourceFileLoader.get_data = get_mutant  # type: ignore[method-assign, assignment]
    SourceFileLoader.path_stats = get_stats  # type: ignore[method-assign]
    return lambda: read


def _test(job: Job, folder: Path) -> dict[str, Any]:
    import pytest

    observer = Observer(job.durations)
    options = ["-x", "-q", "-p", "no:cacheprovider", "--tb=short", f"--basetemp={folder / 'tests'}"]
    options += ["-W", "ignore:Module already imported:pytest.PytestAssertRewriteWarning"]  # it is, in the parent
    if job.leave_out:
        options += ["-k", f"not ({job.leave_out})"]
    code = pytest.main([*options, *job.tests], plugins=[observer])
    return {"code": int(code), "failed": observer.failed, "durations": observer.durations}
