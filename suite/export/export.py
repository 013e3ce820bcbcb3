"""Runs as transformers loads them, and Llama checkpoints as ours.

A dense model is a LlamaForCausalLM: config and weights alone. Every other family comes with its modelling files (see
bundle.py) and loads with `trust_remote_code=True`. The tokenizer goes along; its end of text stands at the beginning
of every text, as in training.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers, processors
from tokenizers import Tokenizer as RustTokenizer
from torch import Tensor

from suite.data.corpus import Corpus
from suite.data.tokenizers import SentencePieceTokenizer, Tokenizer
from suite.errors import UserError
from suite.export.flatten import bundle
from suite.models import registry
from suite.models.registry import ModelConfig
from suite.models.sizes import SIZES
from suite.models.transformer import NORM_EPS, Transformer

WEIGHTS, INDEX, CONFIG = "model.safetensors", "model.safetensors.index.json", "config.json"
MODELING = "modeling_next_parameter"
EOT = "<|endoftext|>"
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


def export(model: Transformer, target: Path, corpus: Corpus | None = None, seq_len: int = 2048) -> list[Path]:
    """Write the model, and the corpus' tokenizer, into a new folder; gives the files.

    Raises UserError if the folder holds something already.
    """
    if target.exists() and not target.is_dir():
        raise UserError(f"--to: got {target}, which is a file, allowed: a new or an empty folder")
    if target.exists() and any(target.iterdir()):
        raise UserError(f"--to: got {target}, which holds files, allowed: a new or an empty folder")
    try:
        target.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--to: got {target}: {error.strerror}, allowed: a new or an empty folder") from None
    if model.config.family == "dense":
        weights = {llama_name(name): value for name, value in model.state_dict().items()}
        config = llama_config(model, seq_len)
    else:
        weights = {f"model.{name}": value for name, value in model.state_dict().items()}
        config = _own_config(model, seq_len)
        _write_sources(model, target)
    save_file(
        {name: value.detach().cpu().contiguous() for name, value in weights.items()},
        target / WEIGHTS,
        metadata={"format": "pt"},
    )
    if corpus is not None:
        config |= {"bos_token_id": corpus.tokenizer.eot_id, "eos_token_id": corpus.tokenizer.eot_id}
        _write_tokenizer(corpus.tokenizer, target, seq_len)
    (target / CONFIG).write_text(json.dumps(config, indent=1) + "\n")
    return sorted(target.iterdir())


def llama_name(name: str) -> str:
    """The name of a dense model's tensor in a Llama checkpoint."""
    if name in OUTER_NAMES:
        return OUTER_NAMES[name]
    _, layer, rest = name.split(".", 2)
    return f"model.layers.{layer}.{LAYER_NAMES[rest]}"


def llama_config(model: Transformer, seq_len: int) -> dict[str, Any]:
    """config.json of a dense model."""
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
    """The dense model of a Llama checkpoint (config.json and safetensors, one file or several with an index).

    Raises UserError for what is not there and for what our dense model has no place for.
    """
    folder = Path(folder)
    for name in (CONFIG, *_weight_files(folder)):
        if not (folder / name).is_file():
            raise UserError(f"{folder}: {name}: missing, allowed: a folder with {CONFIG} and all safetensors")
    config = json.loads((folder / CONFIG).read_text())
    model = Transformer(_imported_config(folder / CONFIG, config), config["vocab_size"])
    ours = {llama_name(name): name for name in model.state_dict()}
    weights = _read_weights(folder)
    extra = {name for name in weights if name not in ours and not name.endswith("rotary_emb.inv_freq")}
    if model.output is None:
        extra.discard("lm_head.weight")
    missing = ours.keys() - weights.keys()
    if extra or missing:
        name = sorted(extra or missing)[0]
        raise UserError(f"{folder}: {name}: {'unknown' if extra else 'missing'}, allowed: the tensors of a Llama model")
    model.load_state_dict({ours[name]: weights[name] for name in ours})
    return model.eval()


def _imported_config(path: Path, config: dict[str, Any]) -> ModelConfig:
    theta = (config.get("rope_parameters") or {}).get("rope_theta", config.get("rope_theta", 1e4))
    bases = {size.rope_theta: name for name, size in reversed(SIZES.items())}
    allowed: list[tuple[str, object, Callable[[object], bool], str]] = [
        ("model_type", config.get("model_type"), lambda v: v == "llama", "llama"),
        ("hidden_act", config.get("hidden_act", "silu"), lambda v: v == "silu", "silu"),
        ("rms_norm_eps", config.get("rms_norm_eps"), lambda v: v == NORM_EPS, f"{NORM_EPS}"),
        ("attention_bias", config.get("attention_bias", False), lambda v: not v, "false"),
        ("mlp_bias", config.get("mlp_bias", False), lambda v: not v, "false"),
        ("rope_theta", theta, lambda v: v in bases, ", ".join(map(str, bases))),
        ("rope_scaling", config.get("rope_scaling"), _is_plain, "none"),
        ("rope_parameters", config.get("rope_parameters"), _is_plain, "rope_type default"),
        (
            "head_dim",
            config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"],
            lambda v: v == config["hidden_size"] // config["num_attention_heads"],
            "hidden_size / num_attention_heads",
        ),
    ]
    for field, value, is_right, words in allowed:
        if not is_right(value):
            raise UserError(f"{path}: {field}: got {value!r}, allowed: {words}")
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
    """Whether rotary positions are turned as they are, without any scaling."""
    return not isinstance(rope, dict) or rope.get("rope_type", rope.get("type", "default")) == "default"


def _read_weights(folder: Path) -> dict[str, Tensor]:
    files = [load_file(folder / name) for name in _weight_files(folder)]
    return {name: value.to(torch.float32) for file in files for name, value in file.items()}


def _weight_files(folder: Path) -> list[str]:
    """The names of a checkpoint's safetensors: those of its index, if it has one."""
    if not (folder / INDEX).exists():
        return [WEIGHTS]
    return sorted(set(json.loads((folder / INDEX).read_text())["weight_map"].values()))


def _own_config(model: Transformer, seq_len: int) -> dict[str, Any]:
    return {
        "architectures": ["NextParameterForCausalLM"],
        "model_type": "next_parameter",
        "vocab_size": model.vocab_size,
        "auto_map": {
            "AutoConfig": f"{MODELING}.NextParameterConfig",
            "AutoModelForCausalLM": f"{MODELING}.NextParameterForCausalLM",
        },
        "cell_model": model.config.model_dump(mode="json"),
        "max_position_embeddings": seq_len,
        "use_cache": True,
        "hidden_size": model.size.dim,
        "num_hidden_layers": model.size.layers,
        "num_attention_heads": model.size.heads,
        "tie_word_embeddings": False,
        "dtype": "float32",
    }


def _write_sources(model: Transformer, target: Path) -> None:
    """The modelling file and what it imports; the file of a family from outside the package, too."""
    origin = registry.family(model.config.family).path
    extra = {} if origin is None else {"baseline.py": origin.read_text()}
    plain = {"kernels.dispatch": "suite.export.torch_only"}
    for name, source in bundle("suite.export.modeling", MODELING, extra, instead=plain).items():
        (target / name).write_text(source)


def _write_tokenizer(tokenizer: Tokenizer, target: Path, seq_len: int) -> None:
    if isinstance(tokenizer, SentencePieceTokenizer):
        # transformers reads the model's own file.
        (target / "tokenizer.model").write_bytes(base64.b64decode(json.loads(tokenizer.to_json())["model"]))
        (target / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "LlamaTokenizer"}) + "\n")
        return
    made = fast_tokenizer(tokenizer)
    eot = str(made.id_to_token(tokenizer.eot_id))
    made.post_processor = processors.TemplateProcessing(
        single=f"{eot} $A", pair=f"{eot} $A $B", special_tokens=[(eot, tokenizer.eot_id)]
    )
    made.save(str(target / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": eot,
        "eos_token": eot,
        "pad_token": eot,
        "model_max_length": seq_len,
        "clean_up_tokenization_spaces": False,
    }
    (target / "tokenizer_config.json").write_text(json.dumps(config, indent=1) + "\n")


def fast_tokenizer(tokenizer: Tokenizer) -> RustTokenizer:
    """Our tokenizer as one of the `tokenizers` library: the same ids for every text."""
    content = json.loads(tokenizer.to_json())
    if tokenizer.kind == "word":
        words = {word: index for index, word in enumerate(content["words"], start=1)}
        # A word outside the vocabulary is refused, as by our own tokenizer: what would stand for it is no token.
        made = RustTokenizer(models.WordLevel({EOT: 0, **words}, unk_token="<unknown>"))
        made.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(r"[^\S\n]+"), "removed"),
                pre_tokenizers.Split(Regex(r"[\n.?]"), "isolated"),
            ]
        )
    elif tokenizer.kind == "bytes":
        made = RustTokenizer(models.BPE(vocab=_byte_characters(), merges=[]))
        made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        made.decoder = decoders.ByteLevel()
    else:
        made = RustTokenizer.from_str(json.dumps(content["trained"]))
    if made.id_to_token(tokenizer.eot_id) is None or tokenizer.kind == "word":
        made.add_special_tokens([AddedToken(EOT, special=True)])
    assert made.id_to_token(tokenizer.eot_id) is not None
    return made


def _byte_characters() -> dict[str, int]:
    """The characters that stand for the 256 bytes in byte-level vocabularies (GPT-2's table) -> the byte."""
    plain = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in plain]
    return {chr(byte): byte for byte in plain} | {chr(256 + index): byte for index, byte in enumerate(others)}
