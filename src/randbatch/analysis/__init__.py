"""Instruments: how far random batches are from exact attention, and why."""

from randbatch.analysis.errors import AttentionErrors, HeadErrors, LayerErrors, attention_error
from randbatch.analysis.plan import Plan, PlanRow, plan
from randbatch.analysis.random_force import LayerForce, OutputErrors, output_error, random_force

__all__ = [
    "AttentionErrors",
    "HeadErrors",
    "LayerErrors",
    "LayerForce",
    "OutputErrors",
    "Plan",
    "PlanRow",
    "attention_error",
    "output_error",
    "plan",
    "random_force",
]
