"""Commands that reproduce a theorem, or a system of particles, as numbers and a picture."""

from randbatch.experiments.convergence import ConvergenceConfig, run_convergence
from randbatch.experiments.simulate import SimulateConfig, simulate

__all__ = ["ConvergenceConfig", "SimulateConfig", "run_convergence", "simulate"]
