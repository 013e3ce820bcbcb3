"""Models by family; importing this package registers the built-in families."""

from suite.models import feedforward, moe, peer, product_key
from suite.models.transformer import Transformer, build

__all__ = ["Transformer", "build", "feedforward", "moe", "peer", "product_key"]
