"""Attention for very large sets by random batches (Liu, Ma, Jin, Wang, arXiv 2511.06044).

>>> import torch, randbatch as rb
>>> q, k, v = torch.randn(3, 100_000, 4, 16).unbind()
>>> rb.random_batch_attention(q, k, v, batch_size=128).shape
torch.Size([100000, 4, 16])
"""

from randbatch import analysis, conversion, estimators, integrations, interactions, kernels, models, nn, particles
from randbatch.conversion import ConversionReport, convert
from randbatch.explanation import explain
from randbatch.functional import full_attention, random_batch_attention, random_batch_interaction
from randbatch.nn.inference import set_inference
from randbatch.partition import Partition, random_partition
from randbatch.partition.orthogonal import orthogonal_partitions
from randbatch.tolerance import RoundsChoice, choose_rounds

__version__ = "0.1.0"

__all__ = [
    "ConversionReport",
    "Partition",
    "RoundsChoice",
    "__version__",
    "analysis",
    "choose_rounds",
    "conversion",
    "convert",
    "estimators",
    "explain",
    "full_attention",
    "integrations",
    "interactions",
    "kernels",
    "models",
    "nn",
    "orthogonal_partitions",
    "particles",
    "random_batch_attention",
    "random_batch_interaction",
    "random_partition",
    "set_inference",
]
