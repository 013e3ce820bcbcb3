"""`engram_moe`: experts in every feed-forward and memories of n-grams, as in Engram-27B (arXiv 2601.07372, 4.1).

One budget of parameters that a token does not read can be divided between the two: section 3.1 there.
"""

from __future__ import annotations

from dataclasses import replace

from suite.models.attachments import Attachments
from suite.models.lookup.engram import EngramConfig, engram_modules
from suite.models.moe import MoETopKConfig, token_choice_feed_forwards
from suite.models.registry import Family, Problem, register


class EngramMoEConfig(EngramConfig, MoETopKConfig):
    """`engram_moe`: the options of `engram` for the memories, and those of `moe_topk` for the feed-forwards."""

    def family_problems(self) -> list[Problem]:
        return EngramConfig.family_problems(self) + MoETopKConfig.family_problems(self)


def engram_moe_modules(config: EngramMoEConfig, vocab_size: int) -> Attachments:
    """Return the modules of `engram` with mixtures of experts as feed-forwards."""
    return replace(engram_modules(config, vocab_size), feed_forwards=token_choice_feed_forwards(config))


register(Family("engram_moe", EngramMoEConfig, engram_moe_modules, has_memory=True))
