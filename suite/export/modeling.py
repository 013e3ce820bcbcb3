"""Our models as transformers knows models; copied into exports, with the modules it needs beside it.

Padding must be on the left or on the right of whole rows, as `attention_mask` says; beside a cache it covers the tokens
that are kept, too. Caches are those that grow (DynamicCache, what `generate` takes unless told otherwise).

Shapes: B rows, T tokens of the call, L tokens kept and of the call, G key-value heads, K head width, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer
from transformers.modeling_outputs import CausalLMOutputWithPast

from suite.models import feedforward, moe, peer, product_key, transformer
from suite.models.registry import family

FAMILIES = (feedforward, moe, peer, product_key)
"""The modules that register the families, imported for that."""


class NextParameterConfig(PreTrainedConfig):
    """`cell_model`: the model block of the cell; the other fields are what tools look for."""

    model_type = "next_parameter"

    def __init__(
        self, cell_model: dict[str, Any] | None = None, vocab_size: int = 0, use_cache: bool = True, **kwargs: Any
    ) -> None:
        self.cell_model = cell_model or {}
        self.vocab_size, self.use_cache = vocab_size, use_cache
        super().__init__(**kwargs)


class KeptTokens(transformer.Cache):
    """A cache of transformers', as our models ask for one. Ids of tokens are kept as a layer behind the others."""

    def __init__(self, kept: Cache, layers: int) -> None:
        self.kept, self.layers, self.length = kept, layers, kept.get_seq_length()

    def extend(self, layer: int, k_BGTK: Tensor, v_BGTK: Tensor) -> tuple[Tensor, Tensor]:
        """Keep a layer's new keys and values; returns all of them, [B, G, L, K]."""
        keys, values = self.kept.update(k_BGTK, v_BGTK, layer)
        return keys, values

    def remember(self, tokens_BT: Tensor) -> Tensor:
        """Keep new tokens; returns all of them, [B, L]."""
        if len(self.kept.layers) == self.layers:
            self.kept.layers.append(DynamicLayer())
        ids_B1T1 = tokens_BT[:, None, :, None]
        known_B1L1 = self.kept.update(ids_B1T1, ids_B1T1, self.layers)[0]
        return known_B1L1[:, 0, :, 0]


CACHE = "cache" if hasattr(CausalLMOutputWithPast(), "cache") else "past_key_values"
"""What this release of transformers calls the keys and values of earlier tokens."""


class NextParameterForCausalLM(PreTrainedModel, GenerationMixin):
    """A language model of any family."""

    config_class = NextParameterConfig
    base_model_prefix = "model"
    main_input_name = "input_ids"

    def __init__(self, config: NextParameterConfig) -> None:
        super().__init__(config)
        options = family(config.cell_model["family"]).config.model_validate(config.cell_model)
        self.model = transformer.Transformer(options, config.vocab_size)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        past_key_values: Cache | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        return_dict: bool | None = None,
        cache: Cache | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast | tuple[Any, ...]:
        """Logits [B, T, V] of `input_ids`, which go on from what the cache holds, and the mean loss of `labels`.

        The cache may be given as `cache` or as `past_key_values`. ValueError: a cache of fixed size.
        """
        given = past_key_values if cache is None else cache
        if given is None and (self.config.use_cache if use_cache is None else use_cache):
            given = DynamicCache(config=self.config)
        kept = None
        if given is not None:
            if given.is_compileable:
                raise ValueError(f"{CACHE}: got a {type(given).__name__}, allowed: a DynamicCache")
            kept = KeptTokens(given, self.config.num_hidden_layers)
        pad_B = None
        if attention_mask is not None and not bool(attention_mask[:, 0].all()):
            pad_B = (attention_mask.cumsum(1) == 0).sum(1)
        logits_BTV = self.model(input_ids, cache=kept, pad_B=pad_B)
        loss = None
        if labels is not None:
            loss = F.cross_entropy(logits_BTV[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten())
        said = CausalLMOutputWithPast(loss=loss, logits=logits_BTV, **{CACHE: given})
        return said.to_tuple() if return_dict is False else said

    def get_input_embeddings(self) -> torch.nn.Module:
        """The embedding of tokens."""
        return self.model.embedding

    def _init_weights(self, module: torch.nn.Module) -> None:
        """Weights come from the export; nothing is drawn."""
