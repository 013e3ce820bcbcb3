"""Runs made of checkpoints that were trained elsewhere: `suite import`.

The run is known by the content of the checkpoint: the same weights in other files, or elsewhere on disk, are the same
run, unless the tokenizer or the longest text differs. It can be evaluated, exported and started from like any other.
Its cell is marked as `imported`, and its `train` block states nothing.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from suite.atomic import write_text
from suite.cells import Cell, TrainConfig, flat
from suite.data.corpus import prepare
from suite.data.sources.tokenizer_only import TokenizerData
from suite.data.tokenizer_config import TokenizerConfig
from suite.data.tokenizer_files import name_of_token
from suite.errors import UserError
from suite.export.llama import CONFIG, import_llama, read_config
from suite.identity import identity
from suite.launch.provenance import versions
from suite.launch.scoring import set_done
from suite.models.accounting import account
from suite.models.transformer import Transformer
from suite.records import RunDir, run_dir
from suite.train import checkpoint
from suite.train.parallel import World

NOT_TRAINED = TrainConfig(batch_rows=1, tokens=0, lr=1.0)


def import_checkpoint(folder: Path, results: Path, seq_len: int | None = None) -> RunDir:
    """Make a run of a Llama checkpoint and its tokenizer; an existing run of the same content is completed.

    Args:
        folder: A folder with config.json, safetensors and a tokenizer.
        results: The results folder.
        seq_len: Longest text that is scored at once; None: the checkpoint's max_position_embeddings.

    Returns:
        The run.

    Raises:
        UserError: The checkpoint or its tokenizer cannot be read or is not supported.
    """
    if not folder.is_dir():
        raise UserError(f"DIR: got {str(folder)!r}, allowed: a folder with {CONFIG}, safetensors and a tokenizer")
    model = import_llama(folder)
    config = read_config(folder)
    seq_len = seq_len or config.get("max_position_embeddings")
    if seq_len is None:
        raise UserError(f"{folder / CONFIG}: max_position_embeddings: missing; give --seq-len N")
    tokenizer = TokenizerConfig(
        kind="file", path=str(folder.resolve()), eot=_first_token(folder, config), entries=model.vocab_size
    )
    data = TokenizerData(kind="tokenizer", seq_len=seq_len, tokenizer=tokenizer)
    cell = Cell(model=model.config, data=data.identified(), train=NOT_TRAINED, imported=fingerprint(model))
    corpus = prepare(cell.data, results / "cache")
    run = run_dir(results, cell)
    with run.lock():
        run.write_cell(
            cell,
            account=account(cell.model, corpus.vocab_size, cell.data.seq_len).to_json(),
            versions=versions(),
            data_fingerprint=corpus.fingerprint,
            tokenizer=corpus.tokenizer.fingerprint,
            imported_from=str(folder.resolve()),
        )
        write_text(run.tokenizer_path, corpus.tokenizer.to_json())
        if not checkpoint.steps_saved(run):
            position = {"step": 0, "train_s": 0.0, "finished": True, "past": False}
            checkpoint.save(run, 0, {"model": model.state_dict(), "optimizer": {}}, position, 1, World())
        run.set_state("running", trained=True)
        set_done(run)
    return run


def differences(run: RunDir) -> dict[str, list[str]]:
    """Return the other undamaged runs of the same weights by name, each with the fields that make it another run."""
    cell = run.read_cell()
    ours = flat(identity(cell, current_names=True))
    others = {}
    for path in sorted(run.path.parent.glob(f"{cell.slug}-*")):
        if RunDir(path).damage() is not None:
            continue
        other = RunDir(path).read_cell()
        if other.imported == cell.imported and other.hash8 != cell.hash8:
            theirs = flat(identity(other, current_names=True))
            others[path.name] = sorted(name for name in ours | theirs if ours.get(name) != theirs.get(name))
    return others


def _first_token(folder: Path, config: dict[str, Any]) -> str | None:
    """Return the name of the token before every text; None if config.json states none. Raises UserError."""
    bos = config.get("bos_token_id")
    if bos is None:
        return None
    if type(bos) is not int or bos < 0:
        raise UserError(f"{folder / CONFIG}: bos_token_id: got {bos!r}, allowed: the number of a token, or null")
    try:
        return name_of_token(folder, bos)
    except UserError:
        raise
    except Exception as error:  # the Rust and C++ libraries raise bare Exception and RuntimeError
        cause = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(
            f"{folder}: its tokenizer is not readable ({cause}), allowed: a tokenizer that transformers loads"
        ) from None


def fingerprint(model: Transformer) -> str:
    """Return the sha256 of the names, shapes and fp32 values of a model's tensors."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {[*tensor.shape]}\n".encode())
        digest.update(tensor.detach().float().contiguous().numpy())
    return digest.hexdigest()
