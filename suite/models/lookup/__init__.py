"""Families that read tables in ways of their own: by hashes of token ids, or from a pool that layers share."""
