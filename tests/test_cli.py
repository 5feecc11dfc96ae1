"""The command line: what it needs, what it says, and how it ends."""

import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import randbatch
from randbatch import _memory, _windows
from randbatch._errors import InvalidValue, MissingExtra
from randbatch._optional import new_figure, require
from randbatch.cli import COMMANDS, main
from randbatch.train import machine
from randbatch.train.machine import peak_memory, pick_device, reset_peak_memory
from randbatch.train.report import draw_curves

GRAPHS = ["torch_geometric", "safetensors", "ogb", "ot", "transformers", "timm"]
OPTIONAL = ["numpy", "tyro", "tqdm", "matplotlib", "PIL", *GRAPHS]
BLOCKER = """
import os, sys

class Blocker:
    names = set(os.environ["WITHOUT"].split())

    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in self.names:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Blocker())
"""


@pytest.fixture
def without(tmp_path: Path) -> Any:
    """Run `python -m randbatch` as if some packages were not installed."""
    (tmp_path / "path").mkdir()
    (tmp_path / "path" / "sitecustomize.py").write_text(BLOCKER)

    def run(packages: list[str], *words: str, **environment: str) -> subprocess.CompletedProcess[str]:
        path = os.pathsep.join([str(tmp_path / "path"), *filter(None, [os.environ.get("PYTHONPATH")])])
        variables = os.environ | {"PYTHONPATH": path, "WITHOUT": " ".join(packages)} | environment
        command = [sys.executable, "-m", "randbatch", *words]
        return subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=variables, errors="replace")

    return run


# What a command needs


def test_a_plain_install_tells_its_version_and_its_commands(without: Any) -> None:
    done = without(OPTIONAL, "--version")
    assert done.stdout == f"randbatch {randbatch.__version__} (torch {torch.__version__})\n"
    assert done.returncode == 0
    done = without(OPTIONAL, "--help")
    assert done.returncode == 0
    assert all(f"\n  {name} " in done.stdout for name in COMMANDS)


def test_data_sets_are_listed_without_their_libraries(without: Any) -> None:
    done = without([name for name in OPTIONAL if name != "tyro"], "datasets")
    assert done.returncode == 0
    assert "ogbn-arxiv" in done.stdout


def test_a_plain_install_names_the_extra_in_a_line(without: Any) -> None:
    done = without(OPTIONAL, "train")
    assert (done.returncode, done.stdout) == (2, "")
    *torch_says, line = done.stderr.splitlines()
    assert line == "randbatch: this needs tyro: pip install 'randbatch[train]'"
    assert not torch_says or "Failed to initialize NumPy" in torch_says[0]


def test_systems_of_particles_need_no_graphs(without: Any, tmp_path: Path) -> None:
    done = without(GRAPHS, "simulate", "--num-particles", "10", "--frames", "2", "--t1", "0.4", "--out", "simulation")
    assert (done.returncode, done.stderr) == (0, "")
    small = ["--num-particles", "8", "--realisations", "2", "--batch-size", "2"]
    done = without(GRAPHS, "convergence", *small, "--out", "convergence")
    assert (done.returncode, done.stderr) == (0, "")


def test_a_missing_package_is_told_before_a_folder_is_made(without: Any, tmp_path: Path) -> None:
    for name, package in (("simulate", "tqdm"), ("bench", "torch_geometric"), ("convergence", "matplotlib")):
        done = without([package], name, *(["--tokens", "128"] if name == "bench" else []), "--out", "results")
        assert done.returncode == 2
        assert re.fullmatch(rf"randbatch: this needs {package}: pip install 'randbatch\[\w+\]'\n", done.stderr)
        assert not (tmp_path / "results").exists()


def test_a_broken_package_is_told_from_a_missing_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "ogb.py").write_text("import no_such_package")
    monkeypatch.delitem(sys.modules, "ogb", raising=False)  # another test may have imported the real one
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(MissingExtra, match=r"ogb is installed, but cannot be imported \(No module named 'no_such"):
        require("ogb")
    with pytest.raises(ImportError, match=r"this needs no_such_package: pip install 'no_such_package'") as caught:
        require("no_such_package.part")
    assert caught.value.name == "no_such_package"


# What it says, and the exit code


def test_no_command_is_help_and_a_mistake(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    assert capsys.readouterr().err.startswith("usage: randbatch COMMAND")
    assert main(["trian"]) == 2
    assert "Did you mean 'train'?" in capsys.readouterr().err


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help_with_its_settings(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main([name, "--help"])
    assert end.value.code == 0
    text = capsys.readouterr().out
    assert f"usage: randbatch {name}" in text
    assert "\x1b" not in text


def test_sizes_beyond_memory_are_refused_before_any_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(_memory, "free_bytes", lambda device: 10**9)
    out = ["--out", str(tmp_path / "out")]
    for words in (
        ["simulate", "--num-particles", "100000000"],
        ["convergence", "--realisations", "10000000"],
        ["bench", "--tokens", "12800000"],
        ["plan", "--nodes", "100000000", "--edges", "1", "--batch-size", "100000000"],
        ["plan", "--nodes", "1000", "--edges", "1000000000000"],
        ["plan", "--nodes", "1000", "--edges", "1000", "--hidden", "65536"],
    ):
        assert main([*words, *out]) == 2
        said = capsys.readouterr().err
        assert re.fullmatch(r"randbatch: [\w ]+ must fit into memory: .* GB are free\n", said), said
        assert not (tmp_path / "out").exists()


def places(tmp_path: Path) -> list[tuple[str, str]]:
    """Where nothing can be written, and what is said of it."""
    (tmp_path / "file").write_text("somebody's")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "file").write_text("somebody's")
    return [
        (str(tmp_path / "file" / "below"), "file"),
        (str(tmp_path / ("n" * 300)), "name too long"),
        (f"{tmp_path}/null\0byte", "null"),
        (str(tmp_path / "folder"), "folder"),
        ("/dev/null", "/dev/null"),
        ("/proc/nothing", "/proc"),
        ("/dev/null/below", "/dev/null"),
    ]


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="places of Linux")
@pytest.mark.parametrize(
    "words",
    [
        ["simulate", "--num-particles", "4", "--frames", "2", "--t1", "0.2"],
        ["convergence", "--num-particles", "4", "--realisations", "2", "--batch-size", "2"],
        ["bench", "--case", "layer", "--tokens", "128", "--turns", "1"],
        ["plan", "--nodes", "100", "--edges", "10", "--layers", "0", "--local", "off", "--batch-size", "16"],
        ["train", "--epochs", "1", "--hidden", "8", "--layers", "1", "--attention", "off"],
    ],
    ids=lambda words: words[0],
)
def test_places_that_cannot_be_written_are_a_line(
    words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for place, told in places(tmp_path):
        assert main([*words, "--out", place]) == 2, place
        said = capsys.readouterr().err
        assert said.startswith("randbatch: ")
        assert said.count("\n") == 1
        assert told in said.lower()
        assert sorted(path.name for path in tmp_path.rglob("*")) == ["file", "file", "folder"]
        shown = {path.read_text() for path in tmp_path.rglob("file") if path.is_file()}
        assert shown == {"somebody's"}
        for path in sorted(tmp_path.rglob("*"), reverse=True):
            path.rmdir() if path.is_dir() else path.unlink()
        places(tmp_path)


# Terminals, pipes and code pages


def test_output_that_cannot_be_encoded_is_replaced(without: Any) -> None:
    done = without([], "plan", "--help", PYTHONIOENCODING="cp1252", PYTHONUTF8="0")  # it says 2³⁰
    assert (done.returncode, done.stderr) == (0, "")
    done = without([], "simulate", "--system", "τ", PYTHONIOENCODING="ascii", PYTHONUTF8="0")
    assert done.returncode == 2
    assert "got '?'" in done.stderr


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a device of Linux")
def test_output_that_nobody_takes_ends_without_a_traceback() -> None:
    command = [sys.executable, "-m", "randbatch", "--help"]
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True)
    assert (done.returncode, done.stderr) == (2, "randbatch: [Errno 28] No space left on device\n")
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, text=True)
    os.close(write)
    assert (done.returncode, done.stderr) == (141, "")


@pytest.mark.skipif(os.name == "nt", reason="pseudo-terminals of Unix")
@pytest.mark.parametrize("colour", [True, False])
def test_colours_are_for_terminals_that_want_them(colour: bool) -> None:
    import pty

    master, slave = pty.openpty()
    environment = {key: value for key, value in os.environ.items() if key != "NO_COLOR"} | {"TERM": "xterm"}
    environment |= {} if colour else {"NO_COLOR": "1"}
    command = [sys.executable, "-m", "randbatch", "datasets", "--help"]
    with subprocess.Popen(command, stdout=slave, stderr=slave, env=environment) as process:
        os.close(slave)
        text = b""
        while True:
            try:
                piece = os.read(master, 10_000)
            except OSError:  # the other end is closed
                break
            if not piece:
                break
            text += piece
    os.close(master)
    assert process.returncode == 0
    assert b"presets" in text
    assert (b"\x1b[" in text) == colour


def test_a_plan_says_nothing_on_stderr(without: Any) -> None:
    words = ["--nodes", "100", "--edges", "10", "--layers", "1", "--local", "off", "--batch-size", "16"]
    done = without([], "plan", *words)
    assert (done.returncode, done.stderr) == (0, "")


# Pictures


def test_drawing_leaves_matplotlib_to_the_user(tmp_path: Path) -> None:
    program = """
import sys, matplotlib, torch, randbatch as rb

def settings():  # to look at the backend is to choose one
    return [dict.__getitem__(matplotlib.rcParams, name) for name in sorted(matplotlib.rcParams)]

before = settings()
q, k, v = torch.randn(3, 40, 1, 4).unbind()
rb.analysis.attention_error((q, k, v), batch_sizes=(8, 16)).draw("picture.png")
assert "matplotlib.pyplot" not in sys.modules
assert settings() == before
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")


def test_a_figure_is_drawn_by_agg() -> None:
    figure, axes = new_figure(1, 2, figsize=(2, 1), axes={"squeeze": False})
    assert type(figure.canvas).__name__ == "FigureCanvasAgg"
    assert axes.shape == (1, 2)


def test_a_data_set_may_have_any_name(tmp_path: Path) -> None:
    result = {"dataset": r"a$\x$b.npz", "attention": "off", "metric": "accuracy", "test": 0.5, "seconds_per_epoch": 1.0}
    draw_curves([(result, [{"epoch": 1, "loss": 0.5, "val": 0.5}])], tmp_path / "curves.png")
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")


# Devices and memory


@pytest.mark.parametrize("name", ["mps", "meta", "xpu", "gpu", "cpu:1", "cuda:", "cuda:-1", "cuda:01", "", "cuda:1e9"])
def test_other_devices_are_refused(name: str) -> None:
    with pytest.raises(InvalidValue, match="device must be 'auto', 'cpu', 'cuda' or 'cuda:<number>', got"):
        pick_device(name)


def test_a_gpu_that_is_not_here_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert pick_device("cuda:1") == torch.device("cuda:1")
    with pytest.raises(InvalidValue, match="device 'cuda:2' was asked for, but torch finds 2 GPU"):
        pick_device("cuda:2")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(InvalidValue, match="torch finds no GPU"):
        pick_device("cuda")


def test_a_container_may_forbid_to_start_the_peak_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "_CLEAR_REFS", tmp_path)  # a folder: writing to it is an OSError
    reset_peak_memory(torch.device("cpu"))
    (tmp_path / "status").write_text("Name:\tpython\nVmRSS:\t 12 kB\n")  # no high-water mark
    monkeypatch.setattr(machine, "_STATUS", tmp_path / "status")
    assert peak_memory(torch.device("cpu")) > 10**7
    (tmp_path / "status").write_text("Name:\tpython\nVmHWM:\t 12 kB\n")
    assert peak_memory(torch.device("cpu")) == 12 * 1024


def test_memory_that_linux_does_not_tell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "meminfo").write_text("MemTotal: 100 kB\n")
    monkeypatch.setattr(_memory, "_MEMINFO", tmp_path / "meminfo")
    assert _memory._available() == os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 4
    (tmp_path / "meminfo").write_text("MemTotal: 100 kB\nMemAvailable: 7 kB\n")
    assert _memory._available() == 7 * 1024


def test_windows_is_asked_by_structures_of_the_right_size(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sizes are those of the Windows headers on 64 bits."""

    def global_memory(reference: Any) -> int:
        assert reference._obj.size == 64
        reference._obj.available = 5 * 2**30
        return 1

    def process_memory(process: int, reference: Any, size: int) -> int:
        assert (process, size, reference._obj.size) == (7, 72, 72)
        reference._obj.peak_working_set = 3 * 2**20
        return 1

    kernel = SimpleNamespace(
        GlobalMemoryStatusEx=global_memory, GetCurrentProcess=lambda: 7, K32GetProcessMemoryInfo=process_memory
    )
    for function in (kernel.GetCurrentProcess, process_memory):
        function.restype = function.argtypes = None
    monkeypatch.setattr(_windows, "_kernel", lambda: kernel)
    monkeypatch.setattr(sys, "platform", "win32")
    assert _memory._available() == 5 * 2**30
    assert peak_memory(torch.device("cpu")) == 3 * 2**20
