"""Exports of runs that transformers loads.

A dense model is exported as a LlamaForCausalLM, with config and weights only. Other families come with their modelling
files (see flatten.py) and load with `trust_remote_code=True`. The tokenizer is included; it puts the end-of-text token
before every text, as in training.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file

from suite.atomic import writing
from suite.data.corpus import Corpus
from suite.errors import UserError
from suite.export.flatten import bundle
from suite.export.llama import CONFIG, WEIGHTS, llama_config, llama_name
from suite.export.tokenizer import write_tokenizer
from suite.models import registry
from suite.models.memory_table import RowForm
from suite.models.precision import is_finite
from suite.models.transformer import Transformer

MODELING = "modeling_next_parameter"


def export(
    model: Transformer,
    target: Path,
    corpus: Corpus | None = None,
    seq_len: int = 2048,
    quantised: RowForm | None = None,
    kept_rows: float | None = None,
) -> list[Path]:
    """Write a model and the tokenizer of its corpus into a new folder.

    Args:
        model: The model, with the weights to export.
        target: A folder that does not exist or is empty.
        corpus: The corpus; None: no tokenizer is written.
        seq_len: Tokens per row, the maximum length that the configuration states.
        quantised: The form of the model's tables; None: fp32.
        kept_rows: The share of their rows that is retained; None: all.

    Returns:
        The files, sorted.

    Raises:
        UserError: The folder cannot be created or is not empty, a weight is NaN or infinite, or a file cannot be
            written, for example because the disk is full; the folder is then empty.
    """
    damaged = [name for name, value in model.state_dict().items() if not is_finite(value)]
    if damaged:
        raise UserError(
            f"{', '.join(damaged[:3])}: {len(damaged)} tensors of the model contain NaN or infinite values, which are"
            " never exported; train the cell again, for example with a smaller learning rate"
        )
    if target.exists() and not target.is_dir():
        raise UserError(f"--to: got {target}, which is a file, allowed: a new or empty folder")
    if target.exists() and any(target.iterdir()):
        raise UserError(f"--to: got {target}, which holds files, allowed: a new or empty folder")
    try:
        target.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--to: got {target}: {error.strerror}, allowed: a new or empty folder") from None
    try:
        with writing(target):
            _write(model, target, corpus, seq_len, quantised, kept_rows)
    except BaseException:
        for path in target.iterdir():  # so that no part of an export is taken for a whole one
            path.unlink()
        raise
    return sorted(target.iterdir())


def _write(
    model: Transformer,
    target: Path,
    corpus: Corpus | None,
    seq_len: int,
    quantised: RowForm | None,
    kept_rows: float | None,
) -> None:
    """Write the files of `export` into an empty folder."""
    if model.config.family == "dense":
        weights = {llama_name(name): value for name, value in model.state_dict().items()}
        config = llama_config(model, seq_len)
    else:
        weights = {f"model.{name}": value for name, value in model.state_dict().items()}
        stored = {"quantised": quantised, "kept_rows": kept_rows}
        config = _own_config(model, seq_len) | {name: value for name, value in stored.items() if value is not None}
        _write_sources(model, target)
    contiguous = {name: value.detach().cpu().contiguous() for name, value in weights.items()}
    try:
        save_file(contiguous, target / WEIGHTS, metadata={"format": "pt"})
    except SafetensorError as error:  # of the file system, such as a full disk
        raise UserError(f"{target / WEIGHTS}: cannot be written: {error}; correct it, and repeat the command") from None
    if corpus is not None:
        config |= {"bos_token_id": corpus.tokenizer.eot_id, "eos_token_id": corpus.tokenizer.eot_id}
        write_tokenizer(corpus.tokenizer, target, seq_len)
    (target / CONFIG).write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
    (target / WEIGHTS).chmod((target / CONFIG).stat().st_mode)  # save_file lets nobody else read it


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
    """Write the modelling file, the modules it imports and, for an external family, the baseline's file."""
    origin = registry.family(model.config.family).path
    extra = {} if origin is None else {"baseline.py": origin.read_text(encoding="utf-8")}
    replacements = {"kernels.dispatch": "suite.export.torch_only"}
    for name, source in bundle("suite.export.modeling", MODELING, extra, replacements).items():
        (target / name).write_text(source, encoding="utf-8")
