"""The project's models as transformers models; copied into exports together with the modules that it imports.

`attention_mask` may mark padding at the left or at the right of rows; with a cache, the mask also covers the cached
tokens. Only growing caches work (DynamicCache, the default of `generate`).

Shapes: B rows, T tokens of the call, L tokens of the cache and the call, G key-value heads, K head width, V vocabulary.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from transformers import GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils import SAFE_WEIGHTS_NAME

from suite import models
from suite.inference.tables.prefetch import add_prefetch
from suite.inference.tables.reading import expect_reduced, place_tables
from suite.inference.tables.stores import Source
from suite.models import transformer
from suite.models.memory_table import MemoryLayer, RowForm
from suite.models.registry import family


class NextParameterConfig(PreTrainedConfig):
    """`cell_model` is the model block of the cell, `quantised` the form of its tables' rows, and `kept_rows` the share
    of them that is retained; other tools read the other fields."""

    model_type = "next_parameter"

    def __init__(
        self,
        cell_model: dict[str, Any] | None = None,
        vocab_size: int = 0,
        use_cache: bool = True,
        quantised: RowForm | None = None,
        kept_rows: float | None = None,
        **kwargs: Any,
    ) -> None:
        self.cell_model, self.quantised, self.kept_rows = cell_model or {}, quantised, kept_rows
        self.vocab_size, self.use_cache = vocab_size, use_cache
        super().__init__(**kwargs)


class CacheAdapter(transformer.Cache):
    """Gives a transformers cache the interface of `transformer.Cache`.

    Every sequence that modules store is one additional layer, in the order in which a forward pass stores them.
    """

    def __init__(self, cache: Cache, layers: int) -> None:
        self.cache, self.length, self._next = cache, cache.get_seq_length(), layers

    def extend(self, layer: int, k_BGTK: Tensor, v_BGTK: Tensor) -> tuple[Tensor, Tensor]:
        """See transformer.Cache."""
        keys, values = self.cache.update(k_BGTK, v_BGTK, layer)
        return keys, values

    def remember(self, slot: Hashable, x_BTC: Tensor, last: int) -> Tensor:
        """See transformer.Cache."""
        if len(self.cache.layers) == self._next:
            self.cache.layers.append(DynamicLayer())
        rows_BLC = self.cache.update(x_BTC[:, None], x_BTC[:, None, :, :0], self._next)[0][:, 0]
        self._next += 1
        return rows_BLC[:, max(0, self.length - last) :]


CACHE = "cache" if hasattr(CausalLMOutputWithPast(), "cache") else "past_key_values"
"""The name of the cache in the outputs of the installed transformers."""


class NextParameterForCausalLM(PreTrainedModel, GenerationMixin):
    """A language model of any family."""

    config_class = NextParameterConfig
    base_model_prefix = "model"
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True

    def __init__(self, config: NextParameterConfig) -> None:
        super().__init__(config)
        options = family(config.cell_model["family"]).config.model_validate(config.cell_model)
        self.model = models.Transformer(options, config.vocab_size)
        if config.quantised is not None or config.kept_rows is not None:
            expect_reduced(self.model, config.quantised, config.kept_rows)
        self.gradient_checkpointing = False
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
        num_items_in_batch: int | Tensor | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast | tuple[Any, ...]:
        """Compute logits [B, T, V] and, with `labels`, the mean loss.

        Args:
            input_ids: Token ids [B, T], which follow the cached tokens.
            attention_mask: 1 for tokens, 0 for padding, [B, L].
            past_key_values: The cache; `cache` is another name for it.
            labels: Target ids [B, T], which are shifted here.
            use_cache: Whether to create a cache if there is none; None: the configuration's `use_cache`.
            return_dict: False returns a tuple.
            cache: The cache.
            num_items_in_batch: Targets over which the loss is a mean, as trainers give it when they accumulate
                gradients; None: the targets of the call.
            **kwargs: Ignored.

        Returns:
            Logits, loss and cache.

        Raises:
            ValueError: The cache has a fixed size, or blocks are recomputed, which would extend a cache twice.
        """
        past = past_key_values if cache is None else cache
        recomputes = self.gradient_checkpointing and self.training
        if past is not None and recomputes:
            raise ValueError(f"{CACHE}: cannot be used in training with gradient checkpointing; leave it out")
        if past is None and not recomputes and (self.config.use_cache if use_cache is None else use_cache):
            past = DynamicCache(config=self.config)
        adapter = None
        if past is not None:
            if past.is_compileable:
                raise ValueError(f"{CACHE}: got a {type(past).__name__}, allowed: a DynamicCache")
            adapter = CacheAdapter(past, self.config.num_hidden_layers)
        pad_B = None
        if attention_mask is not None and not bool(attention_mask[:, 0].all()):
            pad_B = (attention_mask.cumsum(1) == 0).sum(1)
        logits_BTV = self.model(input_ids, cache=adapter, pad_B=pad_B)
        loss = None
        if labels is not None:
            reduction = "mean" if num_items_in_batch is None else "sum"
            logits_NV, targets_N = logits_BTV[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten()
            loss = F.cross_entropy(logits_NV, targets_N, reduction=reduction)
            loss = loss if num_items_in_batch is None else loss / num_items_in_batch
        output = CausalLMOutputWithPast(loss=loss, logits=logits_BTV, **{CACHE: past})
        return output.to_tuple() if return_dict is False else output

    def place_tables(self, folder: str | Path, source: Source = "file", prefetch: bool = False) -> None:
        """Leave the value tables in the file of an export, or in host memory, and release those loaded.

        Args:
            folder: The folder of the export.
            source: The place.
            prefetch: Whether rows that follow from token ids are read before their layer runs.

        Raises:
            ValueError: Rows are to be prefetched, and those of no table follow from token ids.
        """
        path = Path(folder) / SAFE_WEIGHTS_NAME
        with safe_open(path, framework="pt") as file:  # tensors are mapped from the file
            names = [name for name in file.keys() if name.startswith("model.tables.")]  # noqa: SIM118
            saved = {name.removeprefix("model."): file.get_tensor(name) for name in names}
        place_tables(self.model, saved, source, path, self.config.quantised)
        self.model.before_layers.clear()
        if prefetch:
            add_prefetch(self.model)

    def get_input_embeddings(self) -> torch.nn.Module:
        """Return the token embedding."""
        return self.model.embedding

    def set_input_embeddings(self, value: torch.nn.Embedding) -> None:
        """Replace the token embedding, whose size becomes that of the vocabulary."""
        for module in self.model.modules():
            resize_vocabulary = getattr(module, "resize_vocabulary", None)
            if resize_vocabulary is not None:
                resize_vocabulary(value.num_embeddings)
        self.model.embedding = value
        self.model.vocab_size = value.num_embeddings

    def get_output_embeddings(self) -> torch.nn.Module | None:
        """Return the output head; None if it is the token embedding."""
        return self.model.output

    def set_output_embeddings(self, new_embeddings: torch.nn.Linear) -> None:
        """Replace the output head."""
        self.model.output = new_embeddings

    def _set_gradient_checkpointing(
        self,
        enable: bool = True,
        gradient_checkpointing_func: Callable[..., Any] = checkpoint,
        every_n_layers: int = 1,
    ) -> None:
        """Recompute blocks without a memory in the backward pass, as the project's own training does."""
        self.gradient_checkpointing = enable
        for index, block in enumerate(self.model.layers):
            vars(block).pop("forward", None)
            has_memory = any(isinstance(module, MemoryLayer) for module in block.modules())
            if enable and index % every_n_layers == 0 and not has_memory:
                block.forward = functools.partial(_recomputed_in_training, gradient_checkpointing_func, block)

    def _init_weights(self, module: torch.nn.Module) -> None:
        """Do nothing, since all weights come from the export."""


def _recomputed_in_training(recompute: Callable[..., Any], block: torch.nn.Module, *arguments: Any) -> Any:
    plain = functools.partial(type(block).forward, block)
    return recompute(plain, *arguments) if block.training else plain(*arguments)
