"""Corpora, tokenizers and the loader. `prepare(config, cache)` gives everything a run needs."""

from suite.data.corpus import Corpus, prepare
from suite.data.loader import Batch, Loader

__all__ = ["Batch", "Corpus", "Loader", "prepare"]
