"""Dense models as Llama checkpoints, and Llama checkpoints as dense models."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from suite.errors import UserError
from suite.models.precision import is_finite
from suite.models.registry import ModelConfig
from suite.models.sizes import SIZES
from suite.models.transformer import NORM_EPS, Transformer

WEIGHTS, INDEX, CONFIG = "model.safetensors", "model.safetensors.index.json", "config.json"
LAYER_NAMES = {
    "attention_norm.weight": "input_layernorm.weight",
    "feed_forward_norm.weight": "post_attention_layernorm.weight",
    "attention.wq.weight": "self_attn.q_proj.weight",
    "attention.wk.weight": "self_attn.k_proj.weight",
    "attention.wv.weight": "self_attn.v_proj.weight",
    "attention.wo.weight": "self_attn.o_proj.weight",
    "feed_forward.w1.weight": "mlp.gate_proj.weight",
    "feed_forward.w2.weight": "mlp.down_proj.weight",
    "feed_forward.w3.weight": "mlp.up_proj.weight",
}
OUTER_NAMES = {
    "embedding.weight": "model.embed_tokens.weight",
    "norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
SIZES_STATED = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
"""Fields of config.json that must be whole numbers above 0."""
SIZES_IMPLIED = ("num_key_value_heads", "head_dim", "max_position_embeddings")
"""The same, where they are stated at all."""


def llama_name(name: str) -> str:
    """Return the name that a tensor of a dense model has in a Llama checkpoint."""
    if name in OUTER_NAMES:
        return OUTER_NAMES[name]
    _, layer, rest = name.split(".", 2)
    return f"model.layers.{layer}.{LAYER_NAMES[rest]}"


def llama_config(model: Transformer, seq_len: int) -> dict[str, Any]:
    """Return the contents of config.json for a dense model; `seq_len` is the number of tokens per row."""
    size = model.size
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": model.vocab_size,
        "hidden_size": size.dim,
        "intermediate_size": size.ffn_hidden,
        "num_hidden_layers": size.layers,
        "num_attention_heads": size.heads,
        "num_key_value_heads": size.kv_heads,
        "head_dim": size.head_dim,
        "hidden_act": "silu",
        "rms_norm_eps": NORM_EPS,
        "max_position_embeddings": seq_len,
        "rope_parameters": {"rope_type": "default", "rope_theta": size.rope_theta},
        "rope_theta": size.rope_theta,
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": model.output is None,
        "dtype": "float32",
    }


def import_llama(folder: Path | str) -> Transformer:
    """Load a Llama checkpoint (config.json and safetensors, one file or several with an index) as a dense model.

    Raises UserError for missing files and tensors, and for settings that the dense model does not support.
    """
    folder = Path(folder)
    for name in (CONFIG, *_weight_files(folder)):
        if not (folder / name).is_file():
            raise UserError(f"{folder}: {name}: missing; give a folder with {CONFIG} and all safetensors")
    config = read_config(folder)
    try:
        model = Transformer(_imported_config(folder / CONFIG, config), config["vocab_size"])
    except ValueError as error:
        raise UserError(f"{folder / CONFIG}: {error}") from None
    ours = {llama_name(name): tensor for name, tensor in model.state_dict().items()}
    weights = _read_weights(folder)
    extra = {name for name in weights if name not in ours and not name.endswith("rotary_emb.inv_freq")}
    if model.output is None:
        extra.discard("lm_head.weight")
    missing = ours.keys() - weights.keys()
    if extra or missing:
        name = sorted(extra or missing)[0]
        raise UserError(f"{folder}: {name}: {'unknown' if extra else 'missing'} tensor of a Llama model")
    for name, tensor in ours.items():
        if weights[name].shape != tensor.shape:
            actual, stated = [*weights[name].shape], [*tensor.shape]
            raise UserError(f"{folder}: {name}: got a tensor of {actual}, allowed: {stated}, which {CONFIG} states")
        if not is_finite(weights[name]):
            raise UserError(f"{folder}: {name}: contains NaN or infinite values, allowed: finite numbers")
    model.load_state_dict({name: weights[llama_name(name)] for name in model.state_dict()})
    return model.eval()


def read_config(folder: Path) -> dict[str, Any]:
    """Return config.json of a Llama checkpoint.

    Raises UserError if it is of another kind of model, or a size in it is not a whole number above 0.
    """
    config = _read_object(folder / CONFIG)
    if config.get("model_type") != "llama":  # other kinds have other fields, so this is checked before the sizes
        raise UserError(f"{folder / CONFIG}: model_type: got {config.get('model_type')!r}, allowed: llama")
    for field in (*SIZES_STATED, *(name for name in SIZES_IMPLIED if config.get(name) is not None)):
        value = config.get(field)
        if type(value) is not int or value < 1:
            raise UserError(f"{folder / CONFIG}: {field}: got {value!r}, allowed: a whole number above 0")
    return config


def _imported_config(path: Path, config: dict[str, Any]) -> ModelConfig:
    rope = config.get("rope_parameters")
    theta = (rope if isinstance(rope, dict) else {}).get("rope_theta", config.get("rope_theta", 1e4))
    bases = {size.rope_theta: name for name, size in reversed(SIZES.items())}
    allowed: list[tuple[str, object, Callable[[object], bool], str]] = [
        ("hidden_act", config.get("hidden_act", "silu"), lambda v: v == "silu", "silu"),
        ("rms_norm_eps", config.get("rms_norm_eps"), lambda v: v == NORM_EPS, f"{NORM_EPS}"),
        ("attention_bias", config.get("attention_bias", False), lambda v: not v, "false"),
        ("mlp_bias", config.get("mlp_bias", False), lambda v: not v, "false"),
        ("rope_theta", theta, lambda v: isinstance(v, int | float) and v in bases, ", ".join(map(str, bases))),
        ("rope_scaling", config.get("rope_scaling"), _is_plain, "none"),
        ("rope_parameters", config.get("rope_parameters"), _is_plain, "rope_type default"),
        (
            "head_dim",
            config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"],
            lambda v: v == config["hidden_size"] // config["num_attention_heads"],
            "hidden_size / num_attention_heads",
        ),
    ]
    for field, value, is_supported, description in allowed:
        if not is_supported(value):
            raise UserError(f"{path}: {field}: got {value!r}, allowed: {description}")
    return ModelConfig(
        family="dense",
        base=bases[theta],
        tie_embeddings=bool(config.get("tie_word_embeddings", False)),
        layers=config["num_hidden_layers"],
        dim=config["hidden_size"],
        heads=config["num_attention_heads"],
        kv_heads=config.get("num_key_value_heads") or config["num_attention_heads"],
        ffn_hidden=config["intermediate_size"],
    )


def _is_plain(rope: object) -> bool:
    """Return whether rotary positions are unscaled."""
    return not isinstance(rope, dict) or rope.get("rope_type", rope.get("type", "default")) == "default"


def _read_weights(folder: Path) -> dict[str, Tensor]:
    weights = {}
    for name in _weight_files(folder):
        try:
            weights.update(load_file(folder / name))
        except (SafetensorError, OSError) as error:
            raise UserError(f"{folder / name}: not whole safetensors ({error}); copy the file again") from None
    return {name: value.to(torch.float32) for name, value in weights.items()}


def _weight_files(folder: Path) -> list[str]:
    """Return the names of a checkpoint's safetensors: those in its index, if it has one."""
    if not (folder / INDEX).exists():
        return [WEIGHTS]
    names = _read_object(folder / INDEX).get("weight_map")
    if not isinstance(names, dict):
        raise UserError(f"{folder / INDEX}: weight_map: got {names!r}, allowed: a file for every tensor")
    return sorted({str(name) for name in names.values()})


def _read_object(path: Path) -> dict[str, Any]:
    """Return the JSON object in a file. Raises UserError."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: not readable as JSON ({error}); copy the file again") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: got {type(content).__name__}, allowed: a JSON object")
    return content
