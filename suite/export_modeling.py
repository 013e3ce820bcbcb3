"""Our models as transformers knows models; copied into exports, with the modules it needs beside it.

Generation runs the whole text for every token: no key-value cache is kept between calls. Padding must be on the left
or on the right of whole rows, as `attention_mask` says.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput

from suite.models import feedforward, moe, peer, product_key
from suite.models.registry import family
from suite.models.transformer import Transformer

FAMILIES = (feedforward, moe, peer, product_key)
"""The modules that register the families, imported for that."""


class NextParameterConfig(PreTrainedConfig):
    """`cell_model`: the model block of the cell; the other fields are what tools look for."""

    model_type = "next_parameter"

    def __init__(self, cell_model: dict[str, Any] | None = None, vocab_size: int = 0, **kwargs: Any) -> None:
        self.cell_model = cell_model or {}
        self.vocab_size = vocab_size
        super().__init__(**kwargs)


class NextParameterForCausalLM(PreTrainedModel, GenerationMixin):
    """A language model of any family."""

    config_class = NextParameterConfig
    base_model_prefix = "model"
    main_input_name = "input_ids"

    def __init__(self, config: NextParameterConfig) -> None:
        super().__init__(config)
        options = family(config.cell_model["family"]).config.model_validate(config.cell_model)
        self.model = Transformer(options, config.vocab_size)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> CausalLMOutput | tuple[Tensor, ...]:
        """Logits of every position in `input_ids` [B, T], and the mean loss where there are `labels`."""
        pad_B = None
        if attention_mask is not None and not bool(attention_mask[:, 0].all()):
            pad_B = (attention_mask.cumsum(1) == 0).sum(1)
        logits_BTV = self.model(input_ids, pad_B=pad_B)
        loss = None
        if labels is not None:
            loss = F.cross_entropy(logits_BTV[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten())
        if return_dict is False:
            return (logits_BTV,) if loss is None else (loss, logits_BTV)
        return CausalLMOutput(loss=loss, logits=logits_BTV)

    def prepare_inputs_for_generation(self, input_ids: Tensor, **kwargs: Any) -> dict[str, Any]:
        """The whole text so far, every time."""
        return {"input_ids": input_ids, "attention_mask": kwargs.get("attention_mask")}

    def get_input_embeddings(self) -> torch.nn.Module:
        """The embedding of tokens."""
        return self.model.embedding

    def _init_weights(self, module: torch.nn.Module) -> None:
        """Weights come from the export; nothing is drawn."""
