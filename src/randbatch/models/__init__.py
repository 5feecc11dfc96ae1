"""Reference models."""

from randbatch.models.graph_transformer import ATTENTIONS, GraphTransformer
from randbatch.models.local import CONVOLUTIONS

__all__ = ["ATTENTIONS", "CONVOLUTIONS", "GraphTransformer"]
