"""Commands that measure: theorems, systems of particles, time and memory."""

from randbatch.experiments.bench import BenchConfig, run_bench
from randbatch.experiments.convergence import ConvergenceConfig, run_convergence
from randbatch.experiments.planning import PlanConfig, run_plan
from randbatch.experiments.simulate import SimulateConfig, simulate

__all__ = [
    "BenchConfig",
    "ConvergenceConfig",
    "PlanConfig",
    "SimulateConfig",
    "run_bench",
    "run_convergence",
    "run_plan",
    "simulate",
]
