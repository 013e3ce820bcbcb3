"""Families that read tables in ways of their own: by token ids or their hashes, or from a pool that layers share."""
