"""Synthetic results folders: exactly the files a sweep writes, with learning curves of known E50."""

from __future__ import annotations

import json
import zlib
from pathlib import Path
from typing import Any

import numpy as np

EXPOSURES = np.geomspace(1.0, 64.0, 13)
BITS_MAX = 39.6116 * 300
DENSE_MACS = {"w32": 60_000.0, "w64": 200_000.0}
DENSE_PARAMS = {"w32": 50_000, "w64": 190_000}


def write_json(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


def curve(exposures: np.ndarray, e50: float) -> np.ndarray:
    """Bits learned, linear in log exposure around e50, between 0 and the world's bits."""
    return BITS_MAX * np.clip(0.5 + 0.4 * np.log(exposures / e50), 0.0, 1.0)


def model_block(family: str, base: str, half_keys: int | None, ffn_hidden: int | None) -> dict[str, Any]:
    model: dict[str, Any] = {
        "family": family,
        "base": base,
        "tie_embeddings": False,
        "ffn_hidden": ffn_hidden,
    }
    return model | ({"half_keys": half_keys} if half_keys else {})


def account(base: str, half_keys: int | None, ffn_hidden: int | None) -> dict[str, Any]:
    memory = (half_keys or 0) ** 2 * int(base[1:])
    macs = DENSE_MACS[base] * (1.2 if half_keys or ffn_hidden else 1.0)
    return {
        "params_total": DENSE_PARAMS[base] + memory,
        "params_active": DENSE_PARAMS[base],
        "params_memory": memory,
        "params_embedding": 8000,
        "params": {},
        "macs_per_token": {},
        "macs_total": macs,
        "flops_per_token": 6 * macs,
        "flops_per_token_forward": 2 * macs,
        "bytes_per_token": 4.0 * DENSE_PARAMS[base] * (1.1 if half_keys else 1.0),
    }


def usage_line(rows: int, tokens: int) -> dict[str, Any]:
    """Return the usage that training logs for a table of which more rows are read over time."""
    unread = round(rows * float(np.exp(-tokens / 1e5)))
    return {"tables": [{"layers": [1], "rows": rows, "used": 0.5, "kl_bits": 1.0, "never_read": unread}]}


def write_run(
    results: Path,
    family: str,
    base: str,
    seed: int,
    e50: float,
    *,
    half_keys: int | None = None,
    ffn_hidden: int | None = None,
    control: str | None = None,
    stop_past: bool = True,
    last: float = 64.0,
    state: str = "done",
) -> str:
    """One run directory whose storage bits cross half exactly at `e50`; returns its name."""
    model = model_block(family, base, half_keys, ffn_hidden) | ({"control": control} if control else {})
    cell = {
        "model": model,
        "seed": seed,
        "threads": 1,
        "baseline": None,
        "evaluate": [],
        "data": {
            "kind": "bios",
            "people": 300,
            "world": 7,
            "questions": 0.5,
            "zipf": 0.0,
            "seq_len": 64,
            "tokenizer": {"kind": "word", "vocab_size": None},
        },
        "train": {
            "batch_rows": 8,
            "tokens": None,
            "epochs": 64.0,
            "lr": 0.01 if family == "dense" else 0.008,
        },
    }
    cost = account(base, half_keys, ffn_hidden)
    digest = f"{zlib.crc32(repr((family, base, seed, half_keys, ffn_hidden, *filter(None, [control]))).encode()):08x}"
    name = "-".join(filter(None, [family, base, f"k{half_keys}" if half_keys else "", f"s{seed}", digest]))
    folder = results / "runs" / name
    write_json(
        folder / "cell.json",
        {
            "cell": cell,
            "hash": digest,
            "run": name,
            "account": cost,
            "versions": {"torch": "2.13", "code": "abc"},
            "data_fingerprint": "f00d",
        },
    )
    exposures = EXPOSURES[last * 1.0001 >= EXPOSURES]
    if stop_past:
        past = np.flatnonzero(exposures >= e50)
        exposures = exposures[: int(past[0]) + 2] if len(past) else exposures
    lines = []
    speed = 30_000.0 if family == "dense" else 20_000.0
    for epoch in exposures:
        tokens = int(epoch * 20_000)
        at = {
            "step": int(tokens / 512),
            "tokens": tokens,
            "epoch": float(epoch),
            "train_flops": tokens * cost["flops_per_token"],
            "wall_s": tokens / speed,
        }
        bits = float(curve(np.array([epoch]), e50)[0])
        lines.append(
            at
            | {
                "loss": 5.0 - bits / BITS_MAX,
                "lr": 0.01,
                "value_lr": 0.05,
                "grad_norm": 1.0,
                "value_grad_norm": 0.1,
                "tokens_per_s": speed,
                "memory_bytes": 10,
            }
            | ({"usage": usage_line(half_keys**2, tokens)} if half_keys else {})
        )
        scores = {
            kind: {
                "bits": share * bits,
                "bits_max": BITS_MAX,
                "nll": 4.5761 * (1 - share * bits / BITS_MAX),
                "recall": share * bits / BITS_MAX,
                "n": 1800,
            }
            for kind, share in (("storage", 1.0), ("paraphrase", 0.8), ("extraction", 0.3))
        }
        lines.append(at | {"eval_loss": 4.0 - 2 * bits / BITS_MAX, "probe": scores})
    (folder / "train.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    if state == "done":
        write_json(
            folder / "eval" / "0badcafe.json",
            {
                "eval": {"tasks": ["bios_storage"], "num_fewshot": None, "limit": None},
                "hash": "0badcafe",
                "run": name,
                "step": lines[-1]["step"],
                "versions": {"lm_eval": "0.4.13"},
                "tokenizer": "t",
                "tasks": {
                    "bios_storage": {
                        "version": 1,
                        "few_shot": 0,
                        "n": 1800,
                        "prompt_hash": "p",
                        "data_fingerprint": "f",
                        "metrics": {"bits": {"value": bits, "stderr": 3.0}},
                    }
                },
            },
        )
    if half_keys and state == "done":
        measures = {"rows": half_keys**2, "reads": 4096, "used": 0.9 - 0.02 * seed, "kl_bits": 0.4 + 0.05 * seed}
        rates = {"text": "held-out text", "shares": [0.1, 0.5], "tables": [{"static": [0.3, 0.8], "lru": [0.2, 0.7]}]}
        tables = [{"layers": [1], **measures}]
        usage = {"tokens": 512, "layers": {"1": measures}, "tables": tables, "hit_rates": rates}
        write_json(folder / "usage.json", usage)
    cause = "loss is nan at step 12" if state == "failed" else None
    write_json(folder / "state.json", {"state": state, "progress": 1.0, "eta_s": 0, "cause": cause, "log": "log.txt"})
    return name
