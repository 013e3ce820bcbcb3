"""Runs lm-eval like its users: `lm_eval --model hf`, stock tasks, in a process without a network.

`datasets` prefers a local folder with the name of a data set to the hub, so the stock tasks read local files unchanged.
The metric that humaneval and mbpp load from the hub is replaced by one that runs programs in the sandbox.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet

CODE_EVAL = """
import datasets
import evaluate

from suite.evaluate.sandbox import Sandbox


class CodeEval(evaluate.Metric):
    def _info(self):
        text = datasets.Value("string")
        features = datasets.Features({"predictions": datasets.Sequence(text), "references": text})
        return evaluate.MetricInfo(description="", citation="", features=features)

    def _compute(self, predictions, references, k):
        programs = [f"{first}\\n{test}" for (first,), test in zip(predictions, references, strict=True)]
        passed = [outcome.passed for outcome in Sandbox().run_all(programs)]
        return {"pass@1": sum(passed) / len(passed)}, None
"""


def make_hub(data_root: Path, folder: Path) -> Path:
    """Fill a folder in which `load_dataset` finds the sets of `data_root`, and `evaluate.load` code_eval."""
    for path in data_root.glob("*/*"):
        target = folder / path.relative_to(data_root)
        lines = ["---", "configs:"]
        for config in sorted(path.iterdir()):
            lines += [f"- config_name: {config.name}", "  data_files:"]
            (target / config.name).mkdir(parents=True)
            rows = {file.stem: [*map(json.loads, file.open())] for file in sorted(config.glob("*.jsonl"))}
            # all splits as one table, so that a field that is empty in one split has its type from the others
            table = pyarrow.Table.from_pylist([row for split in rows.values() for row in split])
            start = 0
            for split, of_split in rows.items():
                file = f"{config.name}/{split}.parquet"
                pyarrow.parquet.write_table(table.slice(start, len(of_split)), target / file)
                lines += [f"  - split: {split}", f"    path: {file}"]
                start += len(of_split)
        (target / "README.md").write_text("\n".join([*lines, "---", ""]))
    (folder / "code_eval").mkdir()
    (folder / "code_eval/code_eval.py").write_text(CODE_EVAL)
    return folder


def lm_eval(
    hub: Path, exported: Path, tasks: tuple[str, ...], num_fewshot: int | None, limit: int | None
) -> dict[str, Any]:
    """What `lm_eval --model hf` writes: {"results", ..., "generated": {task: [text of each document]}}."""
    out = hub / f"out-{tasks[0]}"
    shots = [] if num_fewshot is None else ["--num_fewshot", str(num_fewshot)]
    subprocess.run(
        [
            *(sys.executable, "-m", "lm_eval", "--model", "hf", "--device", "cpu", "--batch_size", "4"),
            *("--model_args", f"pretrained={exported},add_bos_token=True,dtype=float32,trust_remote_code=True"),
            *("--tasks", ",".join(tasks), "--limit", str(limit), *shots),
            *("--output_path", str(out), "--log_samples", "--confirm_run_unsafe_code"),
        ],
        cwd=hub,
        env=os.environ | {"HF_HOME": str(hub / ".home"), "HF_HUB_OFFLINE": "1", "HF_ALLOW_CODE_EVAL": "1"},
        check=True,
    )
    (path,) = out.rglob("results_*.json")
    generated = {}
    for task in tasks:
        for samples in out.rglob(f"samples_{task}_*.jsonl"):
            rows = sorted(map(json.loads, samples.read_text().splitlines()), key=lambda row: row["doc_id"])
            generated[task] = [row["resps"][0][0] for row in rows]
    return json.loads(path.read_text()) | {"generated": generated}


def lm_eval_model(export: Path) -> Any:
    """Return an exported model as lm-eval loads it with `--model hf`."""
    from lm_eval.models.huggingface import HFLM

    return HFLM(
        pretrained=str(export),
        trust_remote_code=True,
        device="cpu",
        dtype="float32",
        batch_size=4,
        add_bos_token=True,
    )
