"""Small models of every family for the tests of suite.models."""

from __future__ import annotations

from typing import Any

import torch

from suite.models import Transformer, build, registry

VOCAB = 50
OPTIONS: dict[str, dict[str, Any]] = {
    "dense": {},
    "moe": {"experts": 4},
    "moe_topk": {"shared_experts": 1},
    "moe_topk softmax": {"router": "softmax", "experts": 8, "top_k": 2},
    "pkm": {"half_keys": 16, "top_k": 8},
    "memory_plus": {"half_keys": 16, "top_k": 8, "qk_norm": True},
    "memory_plus varied": {
        "half_keys": 16,
        "top_k": 8,
        "value_dim": 24,
        "sink": True,
        "scalar_gate": True,
        "share": False,
    },
    "pkm batchnorm": {"half_keys": 16, "top_k": 8, "query_batchnorm": True},
    "peer": {"half_keys": 16, "top_k": 8},
    "ultramem_v2": {"half_keys": 10, "top_k": 8, "memory_heads": 2},
    "memory_plus keep_ffn": {"half_keys": 16, "top_k": 8, "keep_ffn": True, "placement": (1, 2)},
    "token_table stem": {"form": "stem"},
    "token_table tails": {"form": "per_layer_embedding", "row_width": 6},
    "token_table values": {"form": "value_embedding"},
    "engram": {"head_rows": 40, "hash_heads": 2, "zero_kernel": False},
    "engram_moe": {"head_rows": 40, "hash_heads": 2, "zero_kernel": False, "experts": 8, "top_k": 2},
    "engram v4.1": {"form": "v4.1", "head_rows": 40, "hash_heads": 2, "placement": (0, 2), "gate": "sigmoid"},
    "ngram_embedding": {"table_rows": 41, "order_tables": 2},
    "ngram_embedding longcat": {"form": "longcat", "table_rows": 41, "order_tables": 1, "amplify": "norm"},
    "engram beside": {
        "form": "qwen",
        "head_rows": 40,
        "hash_heads": 2,
        "zero_kernel": False,
        "shared_mix": False,
        "prime_rows": False,
        "point": "beside_ffn",
        "gate": "none",
    },
}


def config(case: str, **more: Any) -> registry.ModelConfig:
    family = case.split()[0]
    options = {"family": family, "base": "w32", **OPTIONS.get(case, {}), **more}
    return registry.family(family).config.model_validate(options)


def model(case: str, seed: int = 0, **more: Any) -> Transformer:
    return build(config(case, **more), VOCAB, seed)


def tokens(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, VOCAB, shape, generator=torch.Generator().manual_seed(seed))
