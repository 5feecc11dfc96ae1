"""Who meets: one random partition of the tokens, or several orthogonal ones.

Data flows from `sets` (which token is of which graph) through `partition` (the object) and `draw` (at random) to
`orthogonal` (several rounds) and `traced` (inside `torch.compile`).
"""

from randbatch._seeds import draw_seed, fold_seed
from randbatch.partition.draw import (
    UNTRACEABLE,
    any_partition,
    balanced_groups,
    by_size,
    out_of_inference,
    random_partition,
    random_subsets,
)
from randbatch.partition.orthogonal import OrthogonalRounds, draw_rounds, orthogonal_partitions
from randbatch.partition.partition import Partition, Partitions

__all__ = [
    "UNTRACEABLE",
    "OrthogonalRounds",
    "Partition",
    "Partitions",
    "any_partition",
    "balanced_groups",
    "by_size",
    "draw_rounds",
    "draw_seed",
    "fold_seed",
    "orthogonal_partitions",
    "out_of_inference",
    "random_partition",
    "random_subsets",
]
