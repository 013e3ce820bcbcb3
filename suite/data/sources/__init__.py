"""Kinds of data, one file each. Importing this package registers them."""

from suite.data.sources import bios, text_files, hub, mixture, new_facts, tokenizer_only  # isort: skip  (error messages list them in this order)

__all__ = ["bios", "hub", "mixture", "new_facts", "text_files", "tokenizer_only"]
