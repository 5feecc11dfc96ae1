"""Golden values: what a case is given, how far two machines may differ on it, and the files that hold it.

The numbers of a case are those of the commit that wrote the files, and no truth of their own: they say that a change
of the code changed nothing that it computes. Inputs are uniform numbers, which are the same to the last bit
whatever instructions a CPU has; weights are filled by their names, whatever the order in which a library makes them.
"""

from __future__ import annotations

import json
import math
import zlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor, nn

FOLDER = Path(__file__).parent / "assets" / "golden"
NUDGES = 3  # runs on inputs that are off by an eps
ROOM = 4.0  # two orders of summation both err, and the errors seen are those of a few runs
NAMED_BUFFERS = ("projection_matrix",)  # drawn, so filled as a weight is; statistics of norms keep 0 and 1

Arrays = dict[str, Tensor]


@dataclass(frozen=True)
class Run:
    """What a case computes with.

    Attributes:
        case_dtype: of the case; what the numbers of inputs and weights are rounded to.
        dtype: of this run, the same or a wider one.
        nudge: number of a small random change to inputs and weights; 0 is none.
        compiled: whether `compile` compiles.
    """

    case_dtype: torch.dtype
    dtype: torch.dtype
    nudge: int = 0
    compiled: bool = False

    @property
    def is_wide(self) -> bool:
        """Whether it is the run in float64 that tells the noise of a case in another dtype."""
        return self.dtype != self.case_dtype

    def options(self, **options: Any) -> dict[str, Any]:
        """Options of a layer or the op: where the backend has no float64, the formula in torch."""
        if self.is_wide and options.get("backend") == "cpu":
            options["backend"] = "reference"
        return options

    def tensor(self, name: str, *shape: int, grad: bool = True, size: float = 1.0) -> Tensor:
        """Numbers of mean 0 and standard deviation `size`, decided by name and shape."""
        seed = zlib.crc32(f"{name} {shape}".encode())
        numbers = torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        numbers = ((numbers * 2 - 1) * (3**0.5 * size)).to(self.case_dtype).to(torch.float64)
        return self.nudged(numbers, seed).to(self.dtype).requires_grad_(grad)

    def nudged(self, numbers: Tensor, seed: int) -> Tensor:
        """The numbers, each off by an eps of the case's dtype or none, in this run's own way."""
        if not self.nudge:
            return numbers
        signs = torch.randint(-1, 2, numbers.shape, generator=torch.Generator().manual_seed(seed + self.nudge))
        return (numbers.double() * (1 + signs * torch.finfo(self.case_dtype).eps)).to(self.case_dtype)

    def fill(self, module: nn.Module, *, training: bool = False) -> Any:
        """The module with weights decided by their names: matrices keep the size of what passes them, vectors vary."""
        module = module.to(self.dtype).train(training)
        buffers = [(name, x) for name, x in module.named_buffers() if name.endswith(NAMED_BUFFERS)]
        for name, x in [*module.named_parameters(), *buffers]:
            is_matrix = x.dim() > 1
            numbers = self.tensor(name, *x.shape, grad=False, size=x.shape[-1] ** -0.5 if is_matrix else 0.3)
            is_scale = not is_matrix and "norm" in name.lower() and name.endswith("weight")
            x.data.copy_(numbers + 1 if is_scale else numbers)
        return module

    def compile(self, module: nn.Module) -> Any:
        """Compiled in one graph, by torch's own tracing and no code generator."""
        if not self.compiled:
            return module
        torch._dynamo.reset()
        return torch.compile(module, backend="aot_eager", fullgraph=True)

    def gradients(self, out: Tensor, inputs: dict[str, Tensor], module: nn.Module | None = None) -> Arrays:
        """The output, and the gradients of a sum of it with fixed weights."""
        if not out.requires_grad:
            return {"out": out}
        wanted = dict(inputs) | ({} if module is None else dict(module.named_parameters()))
        weights = self.tensor("weights of the output", *out.shape, grad=False).to(out.dtype)
        found = torch.autograd.grad(out, list(wanted.values()), weights, allow_unused=True)
        pairs = zip(wanted, found, strict=True)
        return {"out": out.detach()} | {f"grad {name}": grad for name, grad in pairs if grad is not None}


Function = Callable[[Run], Arrays]


@dataclass(frozen=True)
class Case:
    """One row of the table.

    Attributes:
        name: unique; up to the colon it names the file.
        compute: the arrays, by name.
        dtype: what it is computed in.
        kernel: whether the compiled CPU kernel must be there, which has dropout masks of its own.
        compiled: whether it calls `Run.compile`.
        same_in_float64: whether a run in float64 draws the same dropout masks.
        data: the data set that must be there.
        bounds: by array, how far it may be, where rounding makes steps.
    """

    name: str
    compute: Function
    dtype: torch.dtype = torch.float32
    kernel: bool = False
    compiled: bool = False
    same_in_float64: bool = True
    data: str | None = None
    bounds: dict[str, float] = field(default_factory=dict)

    @property
    def file(self) -> Path:
        """Where its arrays are."""
        return FOLDER / f"{self.name.split(':')[0]}.safetensors"


def compute(case: Case, run: Run | None = None) -> Arrays:
    """Run a case, in the state in which every case starts."""
    torch.manual_seed(0)
    return {
        name: x.detach() for name, x in case.compute(run or Run(case.dtype, case.dtype, compiled=case.compiled)).items()
    }


def noise_of(case: Case, arrays: Arrays) -> dict[str, float]:
    """By array, the largest change of an element that rounding alone makes, as far as a few runs show it.

    That is the distance to runs on inputs and weights that are off by an eps, and of each of these runs, and of the
    case itself, to the same in float64; of a case in float64, from float32 to it, in units of eps.
    """
    low = torch.float32 if case.dtype == torch.float64 else case.dtype
    factor = torch.finfo(case.dtype).eps / torch.finfo(low).eps
    noise = dict.fromkeys(arrays, 0.0)

    def add(ours: Arrays, other: Arrays, factor: float = 1.0) -> None:
        for name in arrays:
            noise[name] = max(noise[name], factor * _distance(ours[name], other[name]))

    first = compute(case, Run(case.dtype, case.dtype))
    for nudge in range(NUDGES + 1):
        add(first, compute(case, Run(case.dtype, case.dtype, nudge)))
        if case.same_in_float64:
            add(compute(case, Run(low, low, nudge)), compute(case, Run(low, torch.float64, nudge)), factor)
    return noise | {name: bound / ROOM for name, bound in case.bounds.items()}


def _largest(x: Tensor) -> float:
    return float(x.abs().double().max()) if x.numel() else 0.0


def _distance(x: Tensor, y: Tensor) -> float:
    return float((x.double() - y.double()).abs().max()) if x.numel() else 0.0


@dataclass(frozen=True)
class Golden:
    """What a file holds of a case: arrays, their noise, and what wrote them."""

    arrays: Arrays
    noise: dict[str, float]
    torch: str
    cpu: str


def write(goldens: dict[str, Golden], path: Path) -> None:
    """A file of several cases, by name. Arrays of one case and dtype are one vector, since headers are long."""
    vectors: Arrays = {}
    about: dict[str, Any] = {}
    for case, golden in goldens.items():
        rows = [[name, str(x.dtype), list(x.shape), golden.noise[name]] for name, x in golden.arrays.items()]
        about[case] = {"torch": golden.torch, "cpu": golden.cpu, "arrays": rows}
        for dtype in {x.dtype for x in golden.arrays.values()}:
            same = [x.flatten() for x in golden.arrays.values() if x.dtype == dtype]
            vectors[f"{case} | {dtype}"] = torch.cat(same)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(save(vectors, metadata={"cases": json.dumps(about)}))


def read(path: Path) -> dict[str, Golden]:
    """The cases of a file, by name; none if there is no file."""
    if not path.exists():
        return {}
    goldens: dict[str, Golden] = {}
    with safe_open(path, "pt") as file:
        for case, about in json.loads(file.metadata()["cases"]).items():
            dtypes = {dtype for _, dtype, _, _ in about["arrays"]}
            left = {dtype: file.get_tensor(f"{case} | {dtype}") for dtype in dtypes}
            golden = Golden({}, {}, about["torch"], about["cpu"])
            for name, dtype, shape, noise in about["arrays"]:
                size = math.prod(shape)
                golden.arrays[name], left[dtype] = left[dtype][:size].reshape(shape), left[dtype][size:]
                golden.noise[name] = noise
            goldens[case] = golden
    return goldens


def record(case: Case) -> Golden:
    """Compute what the file is to hold of a case."""
    arrays = compute(case)
    noise = {name: float(f"{number:.3g}") for name, number in noise_of(case, arrays).items()}
    return Golden(arrays, noise, torch.__version__, torch.backends.cpu.get_cpu_capability())


@dataclass(frozen=True)
class Difference:
    """How far an array is from the golden one.

    Attributes:
        array: its name.
        bits: whether it is the same to the last bit.
        eps: the largest difference, in eps of the dtype times the largest golden number.
        of_bound: the same, as a share of what noise may do; above 1 it is another number.
        problem: why it cannot be compared.
    """

    array: str
    bits: bool = False
    eps: float = float("inf")
    of_bound: float = float("inf")
    problem: str = ""

    def __str__(self) -> str:
        if self.problem:
            return f"{self.array}: {self.problem}"
        return f"{self.array}: {self.eps:.2g} eps, {self.of_bound:.2g} of the bound"


def compare(case: Case, golden: Golden | None, arrays: Arrays) -> list[Difference]:
    """Every array of a case against its golden value."""
    if golden is None:
        return [Difference("all", problem="there is no golden value; run tests/scripts/golden.py")]
    return [
        _compare(case, golden, name, arrays.get(name), golden.arrays.get(name))
        for name in dict.fromkeys([*golden.arrays, *arrays])
    ]


def _compare(case: Case, golden: Golden, name: str, new: Tensor | None, old: Tensor | None) -> Difference:
    if new is None or old is None:
        return Difference(name, problem="it is not computed any more" if new is None else "it has no golden value")
    if (new.shape, new.dtype) != (old.shape, old.dtype):
        return Difference(name, problem=f"{new.dtype} {list(new.shape)}, not {old.dtype} {list(old.shape)}")
    if not torch.equal(new.isfinite(), old.isfinite()):
        return Difference(name, problem="other numbers are finite")
    if torch.equal(new, old):
        return Difference(name, True, 0.0, 0.0)
    unit = torch.finfo(case.dtype).eps * _largest(old)
    distance = _distance(new, old)
    bound = ROOM * max(golden.noise[name], unit)
    return Difference(
        name, False, distance / unit if unit else float("inf"), distance / bound if bound else float("inf")
    )


def worst(differences: Iterable[Difference]) -> Difference:
    """The one that is furthest out."""
    return max(differences, key=lambda each: (each.of_bound, each.eps))
