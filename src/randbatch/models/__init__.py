"""Reference models."""

from randbatch.models.graph_transformer import ATTENTIONS, GraphTransformer, attention_names
from randbatch.models.local import CONVOLUTIONS

__all__ = ["ATTENTIONS", "CONVOLUTIONS", "GraphTransformer", "attention_names"]
