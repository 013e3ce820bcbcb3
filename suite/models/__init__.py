"""Models by family; importing this package registers the built-in families."""

from suite.models import feedforward, moe, peer, product_key
from suite.models.initial_weights import build
from suite.models.lookup import engram, engram_moe, ngram_embedding, token_table, ultramem
from suite.models.transformer import Transformer

__all__ = [
    "Transformer",
    "build",
    "engram",
    "engram_moe",
    "feedforward",
    "moe",
    "ngram_embedding",
    "peer",
    "product_key",
    "token_table",
    "ultramem",
]
