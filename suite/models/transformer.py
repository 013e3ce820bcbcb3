"""A Llama-style language model: pre-norm RMSNorm, rotary positions, causal attention, and the modules of a family.

The registry provides the modules and the points at which they enter (`attachments`). This is single-device code;
parallelism is applied from outside.

Shapes: B rows, T tokens of the call, L keys (T plus the cached tokens), D model width, H heads, G
key-value heads, K head width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import ClassVar, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kernels import rotary
from suite.models import attachments, document_attention, fused, head_loss, registry
from suite.models.attachments import Attachments, reads_embedding, window_of
from suite.models.cache import Cache, EarlierTokens
from suite.models.cost import Cost, dense_cost
from suite.models.document_attention import Documents
from suite.models.lookup.controls import with_control
from suite.models.lookup.output_scale import with_output_scale
from suite.models.memory_table import MemoryLayer, MemoryTable
from suite.models.precision import product_dtype
from suite.models.registry import ModelConfig
from suite.models.sizes import Size

NORM_EPS = 1e-5


class Attention(nn.Module):
    """Causal self-attention with rotary positions and, where kv_heads < heads, grouped queries."""

    matrices: ClassVar[tuple[str, ...]] = ("wq.weight", "wk.weight", "wv.weight", "wo.weight")

    def __init__(self, size: Size) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = size.heads, size.kv_heads, size.head_dim
        self.wq = nn.Linear(size.dim, self.heads * self.head_dim, bias=False)
        self.wk = nn.Linear(size.dim, self.kv_heads * self.head_dim, bias=False)
        self.wv = nn.Linear(size.dim, self.kv_heads * self.head_dim, bias=False)
        self.wo = nn.Linear(self.heads * self.head_dim, size.dim, bias=False)

    def forward(
        self,
        x_BTD: Tensor,
        rotation: tuple[Tensor, Tensor],
        mask: Tensor | Documents | None,
        cache: Cache | None,
        layer: int,
        values_BTC: Tensor | None = None,
    ) -> Tensor:
        batch, tokens, _ = x_BTD.shape
        projections = (self.wq, self.wk, self.wv)
        if fused.fuses(x_BTD, projections):
            turned, width = (self.heads + self.kv_heads) * self.head_dim, self.kv_heads * self.head_dim
            qk_BTC, v_BTC = fused.together(x_BTD, projections).split((turned, width), -1)
            half = self.head_dim // 2
            cos_TI, sin_TI = rotation[0][:, :half], rotation[1][:, half : 2 * half]
            q_BTC, k_BTC = rotary.rotate(qk_BTC, cos_TI, sin_TI).split((turned - width, width), -1)
        else:
            q_BTC, k_BTC = rotate(self.wq(x_BTD), self.heads, rotation), rotate(self.wk(x_BTD), self.kv_heads, rotation)
            v_BTC = self.wv(x_BTD)
        q_BHTK, k_BGTK = self._split(q_BTC), self._split(k_BTC)
        if values_BTC is not None:
            v_BTC = v_BTC + values_BTC.to(v_BTC.dtype)
        v_BGTK = self._split(v_BTC)
        if cache is not None:
            k_BGTK, v_BGTK = cache.extend(layer, k_BGTK, v_BGTK)
        if isinstance(mask, Documents):
            q_NHK, k_NGK, v_NGK = (part.transpose(1, 2).flatten(0, 1) for part in (q_BHTK, k_BGTK, v_BGTK))
            return self.wo(document_attention.attend(q_NHK, k_NGK, v_NGK, mask).view(batch, tokens, -1))
        if self.kv_heads != self.heads and q_BHTK.is_cuda and (mask is not None or _is_fp32(q_BHTK)):
            # Of grouped heads with a mask or in fp32, some devices have only the kernel that stores all scores.
            k_BGTK, v_BGTK = (part.repeat_interleave(self.heads // self.kv_heads, 1) for part in (k_BGTK, v_BGTK))
        y_BHTK = F.scaled_dot_product_attention(
            q_BHTK,
            k_BGTK,
            v_BGTK,
            attn_mask=mask,
            is_causal=mask is None and tokens > 1,
            enable_gqa=k_BGTK.shape[1] != self.heads,
        )
        return self.wo(y_BHTK.transpose(1, 2).reshape(batch, tokens, -1))

    def _split(self, x_BTC: Tensor) -> Tensor:
        return x_BTC.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)

    def cost(self) -> Cost:
        """Count the four projections; `accounting` adds scores and weighted sums, which depend on the length."""
        weights = sum(linear.weight.numel() for linear in (self.wq, self.wk, self.wv, self.wo))
        return dense_cost("attention", weights, weights)


def _is_fp32(x: Tensor) -> bool:
    return product_dtype(x.dtype, x.device) == torch.float32


class Block(nn.Module):
    """x + attention(norm x), then x + feed_forward(norm x), and the modules that a family attaches to the layer."""

    before_attention: nn.Module | None
    attention_values: nn.Module | None
    skip: nn.Module | None

    def __init__(self, size: Size, modules: Attachments, layer: int) -> None:
        super().__init__()
        skip = modules.skips.get(layer)
        self.skip_to = layer if skip is None else skip.to
        self.before_attention = modules.before_attention.get(layer)
        self.attention_norm = nn.RMSNorm(size.dim, eps=NORM_EPS)
        self.attention_values = modules.attention_values.get(layer)
        self.attention = Attention(size)
        self.feed_forward_norm = nn.RMSNorm(size.dim, eps=NORM_EPS)
        self.feed_forward = modules.feed_forwards[layer]
        self.skip = None if skip is None else skip.module
        self.reads_embedding = any(reads_embedding(module) for module in self.attached().values())

    def attached(self) -> dict[str, nn.Module]:
        """Return the family's modules by point, in the order of their inputs."""
        points = {
            "before_attention": self.before_attention,
            "attention_values": self.attention_values,
            "feed_forward": self.feed_forward,
            "skip": self.skip,
        }
        return {point: module for point, module in points.items() if module is not None}

    def forward(
        self,
        x_BTD: Tensor,
        rotation: tuple[Tensor, Tensor],
        mask: Tensor | Documents | None,
        cache: Cache | None,
        layer: int,
        ids_BTW: Tensor | None = None,
        embedding_BTD: Tensor | None = None,
        earlier: EarlierTokens | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Return the residual stream after the layer and, if the layer has a skip, what `skip` computed."""

        def attached(point: str, module: nn.Module, h_BTD: Tensor) -> Tensor:
            return attachments.call(module, (layer, point), h_BTD, ids_BTW, embedding_BTD, earlier)

        if self.before_attention is not None:
            x_BTD = x_BTD + attached("before_attention", self.before_attention, x_BTD)
        h_BTD = self.attention_norm(x_BTD)
        values = self.attention_values
        values_BTC = None if values is None else attached("attention_values", values, h_BTD)
        x_BTD = x_BTD + self.attention(h_BTD, rotation, mask, cache, layer, values_BTC)
        h_BTD = self.feed_forward_norm(x_BTD)
        x_BTD = x_BTD + attached("feed_forward", self.feed_forward, h_BTD)
        return x_BTD if self.skip is None else (x_BTD, attached("skip", self.skip, h_BTD))

    def cost(self) -> Cost:
        """Count the two norms; attention and the family's modules count themselves."""
        gains = self.attention_norm.weight.numel() + self.feed_forward_norm.weight.numel()
        return dense_cost("norm", gains, 0)


class Transformer(nn.Module):
    """The language model of a configuration, uninitialised (see `initial_weights.build`).

    `tables` holds each memory table once, even if several layers read it. Functions in `before_layers` are called with
    the ids of every pass, [B, T, W], before its first layer, if a module has a `window`. Raises ValueError if the
    configuration is invalid or the family does not provide one distinct module per layer.
    """

    def __init__(self, config: ModelConfig, vocab_size: int) -> None:
        super().__init__()
        if problems := config.problems() or config.vocabulary_problems(vocab_size):
            field, value, allowed = problems[0]
            raise ValueError(f"{field}: got {value!r}, allowed: {allowed}")
        self.config, self.size, self.vocab_size = config, config.size, vocab_size
        modules = with_control(registry.family(config.family).modules(config, vocab_size), config)
        modules = with_output_scale(modules, config)
        self.embedding = nn.Embedding(vocab_size, self.size.dim)
        self.input_embedding = modules.input_embedding
        self.layers = nn.ModuleList(Block(self.size, modules, layer) for layer in range(self.size.layers))
        self.norm = nn.RMSNorm(self.size.dim, eps=NORM_EPS)
        self.output = None if config.tie_embeddings else nn.Linear(self.size.dim, vocab_size, bias=False)
        distinct = {id(table): table for layer in self.memory_layers().values() for table in layer.tables}
        self.tables = nn.ModuleList(distinct.values())
        self.window = max(window_of(module) for module in self.attached().values())
        self.before_layers: list[Callable[[Tensor], None]] = []
        self._of_rows: tuple[tuple[int, torch.device], tuple[Tensor, Tensor]] | None = None

    def forward(
        self,
        tokens_BT: Tensor,
        segments_BT: Tensor | None = None,
        cache: Cache | None = None,
        pad_B: Tensor | None = None,
        documents: Documents | None = None,
    ) -> Tensor:
        """Return the logits [B, T, V] of the next token; arguments as for `hidden`."""
        return self.head(self.hidden(tokens_BT, segments_BT, cache, pad_B, documents))

    def hidden(
        self,
        tokens_BT: Tensor,
        segments_BT: Tensor | None = None,
        cache: Cache | None = None,
        pad_B: Tensor | None = None,
        documents: Documents | None = None,
    ) -> Tensor:
        """Compute the normed residual stream, which `head` turns into logits.

        Args:
            tokens_BT: Token ids, int64.
            segments_BT: Document numbers, int64. A token attends only to its own document. Rotary positions do not
                restart at documents, since they are relative.
            cache: Keys and values of the earlier tokens; those of `tokens_BT` are appended.
            pad_B: Padding tokens at the left of each row, cached ones included. No other token attends to them.
            documents: The boundaries of `segments_BT`, with which attention on a GPU needs no mask in bf16.

        Returns:
            Hidden states [B, T, D].

        Raises:
            ValueError: Both segments and a cache are passed.
        """
        if cache is not None and segments_BT is not None:
            raise ValueError(
                "segments are for packed rows and a cache is for one document per row; pass only one of them"
            )
        past = cache.length if cache is not None else 0
        rotation = self._rotation_of_call(past, tokens_BT)
        mask: Tensor | Documents | None = documents
        if documents is None or not document_attention.takes(tokens_BT.device, self.embedding.weight.dtype):
            mask = document_attention.mask_of(tokens_BT, past, segments_BT, pad_B)
            mask = None if mask is None else document_attention.as_bias(mask, self.embedding.weight.dtype)
        earlier = EarlierTokens(past, segments_BT, cache, pad_B)
        ids_BTW = earlier.windows(tokens_BT, self.window) if self.window else None
        if ids_BTW is not None:
            for listener in self.before_layers:
                listener(ids_BTW)
        x_BTD = embedding_BTD = self.embedding(tokens_BT)
        if self.input_embedding is not None:
            x_BTD = attachments.call(self.input_embedding, "input_embedding", x_BTD, ids_BTW, embedding_BTD, earlier)
        skipped: dict[int, list[Tensor]] = {}
        for index, layer in enumerate(cast(list[Block], list(self.layers))):
            read_BTD = embedding_BTD if layer.reads_embedding else None
            x_BTD = layer(x_BTD, rotation, mask, cache, index, ids_BTW, read_BTD, earlier)
            if layer.skip is not None:
                x_BTD, y_BTD = x_BTD
                skipped.setdefault(layer.skip_to, []).append(y_BTD)
            for y_BTD in skipped.pop(index, []):
                x_BTD = x_BTD + y_BTD
        if cache is not None:
            cache.length += tokens_BT.shape[1]
        return self.norm(x_BTD)

    def head(self, x_BTD: Tensor) -> Tensor:
        """Return the logits [..., V] of hidden states [..., D]."""
        return F.linear(x_BTD, self.output_matrix)

    def loss(self, x_BTD: Tensor, targets_BT: Tensor) -> Tensor:
        """Return the summed cross entropy in nats of hidden states [..., D] with target ids [...] (`head_loss`)."""
        return head_loss.cross_entropy(x_BTD.flatten(0, -2), self.output_matrix, targets_BT.flatten())

    @property
    def output_matrix(self) -> Tensor:
        """The matrix [V, D] of the output head."""
        return self.embedding.weight if self.output is None else self.output.weight

    def new_cache(self, batch: int, max_len: int) -> Cache:
        """Return an empty cache for `batch` rows of at most `max_len` tokens."""
        return Cache(self.size.layers, batch, max_len)

    def attached(self) -> dict[str, nn.Module]:
        """Return the modules of the family by their names in the model, in forward order."""
        first = {} if self.input_embedding is None else {"input_embedding": self.input_embedding}
        return first | {
            f"layers.{index}.{point}": module
            for index, layer in enumerate(cast(list[Block], list(self.layers)))
            for point, module in layer.attached().items()
        }

    def memory_layers(self) -> dict[int | str, MemoryLayer]:
        """Return the memories: by layer index where a layer has one, else by the name of the module in the model."""
        named = {
            f"{name}.{path}".rstrip("."): module
            for name, attached in self.attached().items()
            for path, module in attached.named_modules()
            if isinstance(module, MemoryLayer)
        }
        layers = [int(name.split(".")[1]) if name.startswith("layers.") else None for name in named]
        return {
            name if layer is None or layers.count(layer) > 1 else layer: module
            for layer, (name, module) in zip(layers, named.items(), strict=True)
        }

    def memory_tables(self) -> list[MemoryTable]:
        """Return the distinct tables; the optimizer treats their parameters separately."""
        return cast(list[MemoryTable], list(self.tables))

    def hidden_matrices(self) -> list[str]:
        """Return the names of weight matrices (and stacks of them) that modules declare in `matrices`."""
        declared = [
            f"{path}.{name}" for path, module in self.named_modules() for name in getattr(module, "matrices", ())
        ]
        present = {name for name, _ in self.named_parameters()}
        return [name for name in declared if name in present]

    def auxiliary_losses(self) -> dict[str, tuple[float, Tensor]]:
        """Return the losses that modules add to that of the last training pass: name -> (weight, mean over modules).

        A module sets `auxiliary`, of the same form, in its forward pass. With several processes it is this one's part.
        """
        terms: dict[str, list[tuple[float, Tensor]]] = {}
        for module in self.modules():
            for name, term in getattr(module, "auxiliary", {}).items():
                terms.setdefault(name, []).append(term)
        return {
            name: (of_name[0][0], torch.stack([value for _, value in of_name]).mean())
            for name, of_name in terms.items()
        }

    def after_step(self) -> None:
        """Call `after_step` of the family's modules that have it; the trainer calls this after each optimizer step."""
        for module in self.attached().values():
            after_step = getattr(module, "after_step", None)
            if after_step is not None:
                after_step()

    def parts(self) -> Iterator[tuple[str, nn.Module]]:
        """Yield the modules that count their own cost, with their names; together they own every parameter."""
        yield "", self
        for index, layer in enumerate(self.layers):
            yield f"layers.{index}", layer
            yield f"layers.{index}.attention", cast(nn.Module, layer.attention)
        yield from self.attached().items()
        for index, table in enumerate(self.tables):
            yield f"tables.{index}", table

    def cost(self) -> Cost:
        """Count embedding (one row is read), last norm and output head (a product even if its matrix is tied)."""
        matrix = self.vocab_size * self.size.dim
        own = {} if self.output is None else {"head": matrix}
        head = Cost(own, {"head": matrix}, {"head": matrix})
        embedding = Cost({"embedding": matrix}, {"embedding": self.size.dim})
        return embedding + dense_cost("norm", self.size.dim, 0) + head

    def _rotation_of_call(self, past: int, tokens_BT: Tensor) -> tuple[Tensor, Tensor]:
        """Return `_rotation` for a call; on a GPU, that of training rows is computed once."""
        tokens, device = tokens_BT.shape[1], tokens_BT.device
        if device.type != "cuda" or past or torch.is_inference_mode_enabled() or torch.compiler.is_compiling():
            return self._rotation(past, tokens, device)
        if self._of_rows is None or self._of_rows[0] != (tokens, device):
            self._of_rows = ((tokens, device), self._rotation(0, tokens, device))
        return self._of_rows[1]

    def _rotation(self, start: int, tokens: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """Return cosines and signed sines [T, H*K] of the rotary angles (Su et al. 2021, equation 34)."""
        half = self.size.head_dim // 2
        frequency_K = self.size.rope_theta ** (-torch.arange(half, device=device, dtype=torch.float32) / half)
        position_T = torch.arange(start, start + tokens, device=device, dtype=torch.float32)
        angle_TK = torch.outer(position_T, frequency_K)
        cos_TK, sin_TK = angle_TK.cos(), angle_TK.sin()
        heads = self.size.heads
        return torch.cat((cos_TK, cos_TK), 1).repeat(1, heads), torch.cat((-sin_TK, sin_TK), 1).repeat(1, heads)


def rotate(x_BTC: Tensor, heads: int, rotation: tuple[Tensor, Tensor]) -> Tensor:
    """Rotate the pairs (i, i + K/2) of each head by the angle of the position.

    Args:
        x_BTC: Queries or keys, with the heads concatenated.
        heads: Number of heads in `x_BTC`.
        rotation: Cosines and signed sines [T, H*K] in fp32; the first columns are used.

    Returns:
        The rotated tensor, computed in fp32 and returned in the dtype of `x_BTC`.
    """
    width = x_BTC.shape[-1]
    cos_TC, sin_TC = (part[:, :width] for part in rotation)
    swapped_BTC = x_BTC.unflatten(-1, (heads, 2, -1)).flip(-2).flatten(-3)
    return (x_BTC * cos_TC + swapped_BTC * sin_TC).type_as(x_BTC)
