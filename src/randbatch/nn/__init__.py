"""Modules that attend inside random batches."""

from randbatch.nn.attention import RandomBatchAttention
from randbatch.nn.sampling import Sampling
from randbatch.nn.wrapper import RandomBatch

__all__ = ["RandomBatch", "RandomBatchAttention", "Sampling"]
