"""Modules that attend inside random batches."""

from randbatch.nn.attention import RandomBatchAttention
from randbatch.nn.config import RandomBatchConfig
from randbatch.nn.wrapper import RandomBatch

__all__ = ["RandomBatch", "RandomBatchAttention", "RandomBatchConfig"]
