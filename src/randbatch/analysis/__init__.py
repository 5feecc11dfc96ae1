"""Instruments: how far random batches are from exact attention, and why."""

from randbatch.analysis.errors import AttentionErrors, HeadErrors, LayerErrors, attention_error

__all__ = ["AttentionErrors", "HeadErrors", "LayerErrors", "attention_error"]
