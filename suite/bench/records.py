"""CPU time and peak memory of reading many finished runs: status, dry run, frame and report.

The runs are synthetic: nothing is trained. Cells, accounts, versions, key usage and the form of the scores come from
the same code as those of trained runs; losses and bits learned follow a logistic curve in the logarithm of exposures.
"""

from __future__ import annotations

import copy
import json
import math
import os
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from suite import models
from suite.cells import Cell
from suite.data.corpus import prepare
from suite.evaluate.harness import evaluate
from suite.evaluate.usage import key_usage
from suite.grids import Grid, find_grid, load_grid
from suite.launch.preparation import write_grid
from suite.launch.provenance import versions
from suite.models import registry
from suite.models.accounting import account
from suite.records import RunDir, run_dir
from suite.train.loop import probe_steps, total_steps
from suite.yaml_input import read_mapping

GRID = "records"
CPU_LIMIT_S = 900
"""A command that needs more CPU time than this is stopped; its row then has no figures."""

COMMANDS = {
    "suite status": ("suite.cli.main", "status", "{grid}", "--results", "{results}"),
    "suite sweep --dry-run": ("suite.cli.main", "sweep", "{grid}", "--results", "{results}", "--dry-run"),
    "analysis frame, first": ("analysis", "frame", "--results", "{results}", "--grid", GRID, "--out", "{frame}"),
    "analysis frame, again": ("analysis", "frame", "--results", "{results}", "--grid", GRID, "--out", "{frame}"),
    "analysis report, again": ("analysis", "report", "--results", "{results}", "--grid", GRID),
}
"""The commands, in order of measurement; the report uses the cache that the frame has written."""


def record_costs(folder: Path, runs: int) -> list[dict[str, Any]]:
    """Measure every command on at least `runs` finished runs below `folder`; missing ones are made.

    Returns:
        Rows of command, runs, cpu_s (user and system), wall_s and peak_mb; the figures are None where the command
        failed or used more than `CPU_LIMIT_S`.
    """
    grid = write_runs(folder, runs)
    places = {"grid": str(grid.source), "results": str(folder / "results"), "frame": str(folder / "frame.csv")}
    rows = []
    for name, arguments in COMMANDS.items():
        measured = _measure(["-m", *(part.format(**places) for part in arguments)])
        rows.append({"command": name, "runs": len(grid.cells), **measured})
    return rows


MEASURE = """
import json, os, resource, sys, time
resource.setrlimit(resource.RLIMIT_CPU, (int(sys.argv[1]),) * 2)
started = time.perf_counter()
pid = os.posix_spawn(sys.executable, [sys.executable, *sys.argv[2:]], os.environ,
                     file_actions=[(os.POSIX_SPAWN_DUP2, 2, 1)])
_, status, usage = os.wait4(pid, 0)
print(json.dumps([status, usage.ru_utime + usage.ru_stime, time.perf_counter() - started, usage.ru_maxrss]))
"""
"""A program that runs a command and prints its costs. It has its own process, because Linux starts the peak memory of a
process at the size of its parent at the fork, and this process has loaded torch."""


def _measure(command: list[str]) -> dict[str, float | None]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.run(
        [sys.executable, "-c", MEASURE, str(CPU_LIMIT_S), *command],
        stdout=subprocess.PIPE,
        env=environment,
        text=True,
        check=True,
    )
    status, cpu_s, wall_s, peak_kb = json.loads(process.stdout)
    if status:
        return {"cpu_s": None, "wall_s": None, "peak_mb": None}
    return {"cpu_s": round(cpu_s, 2), "wall_s": round(wall_s, 2), "peak_mb": round(peak_kb / 1024, 1)}


def write_runs(folder: Path, runs: int) -> Grid:
    """Write the laptop grid with more seeds, at least `runs` cells, and a finished run of each; returns the grid.

    Existing runs are not changed.
    """
    source = folder / f"{GRID}.yaml"
    folder.mkdir(parents=True, exist_ok=True)
    source.write_text(yaml.safe_dump(_with_seeds(runs), sort_keys=False), encoding="utf-8")
    grid, results = load_grid(str(source)), folder / "results"
    write_grid(results, grid)
    templates: dict[str, _Template] = {}
    for cell in grid.cells:
        run = run_dir(results, cell)
        if not run.state_path.exists():
            kind = cell.model_copy(update={"seed": 0}).hash8
            if kind not in templates:
                templates[kind] = _Template.of(cell, results / "cache", templates.values())
            templates[kind].write(run, cell)
    return grid


def _with_seeds(runs: int) -> dict[str, Any]:
    """Return the laptop grid with enough seeds in each block for `runs` cells."""
    laptop = find_grid("laptop")
    content = read_mapping(laptop)
    variants = {cell.model_copy(update={"seed": 0}).hash8 for cell in load_grid(str(laptop)).cells}
    for block in content["blocks"]:
        block["axes"]["seed"] = list(range(math.ceil(runs / len(variants))))
    return content


@dataclass(frozen=True)
class _Template:
    """The contents that all runs of a variant share.

    `usage` is usage.json's content without run and step, `line_usage` the `usage` of a line of train.jsonl as JSON
    text, `scores` the content of each evaluation's file, and `exposures` the exposures at half of the bits.
    """

    facts: dict[str, Any]
    steps: int
    rows_per_epoch: float
    usage: dict[str, Any]
    line_usage: str
    scores: dict[str, dict[str, Any]]
    exposures: float

    @classmethod
    def of(cls, cell: Cell, cache: Path, others: Iterable[_Template]) -> _Template:
        """Build the template from an untrained model of the cell, reusing scores of the templates in `others`."""
        corpus = prepare(cell.data, cache=cache)
        loader = corpus.loader(cell.seed, cell.train.batch_rows)
        accounted = account(cell.model, corpus.vocab_size, cell.data.seq_len).to_json()
        model = models.build(cell.model, corpus.vocab_size, cell.seed)
        usage = key_usage(model, corpus)
        line_usage = {key: usage[key] for key in ("layers", "tables")} if usage else {}
        for table in line_usage.get("tables", []):
            table["never_read"] = 0
        scores = {hash8: content for other in others for hash8, content in other.scores.items()}
        for config in cell.evaluate:
            if config.hash8 not in scores:
                scores[config.hash8] = evaluate(model, corpus, config)
        memory_rows = accounted["params_memory"] / 32
        return cls(
            facts={"account": accounted, "versions": versions(), "data_fingerprint": corpus.fingerprint},
            steps=total_steps(cell.train, loader, cell.data.seq_len),
            rows_per_epoch=loader.rows_per_epoch,
            usage=usage,
            line_usage=json.dumps(line_usage),
            scores={config.hash8: scores[config.hash8] for config in cell.evaluate},
            exposures=30.0 / (1.0 + 0.1 * math.log1p(memory_rows)),
        )

    def write(self, run: RunDir, cell: Cell) -> None:
        """Write the finished run: cell.json, train.jsonl, eval/, usage.json, one empty checkpoint and state.json."""
        generator = np.random.default_rng([cell.seed, int(cell.hash8, 16)])
        exposures = self.exposures * float(np.exp(0.1 * generator.standard_normal()))
        (run.path / "eval").mkdir(parents=True, exist_ok=True)
        run.write_cell(cell, **self.facts)
        lines, step = self._lines(cell, exposures, generator)
        run.train_path.write_text("".join(lines), encoding="utf-8")
        share = _learned(step * cell.train.batch_rows / self.rows_per_epoch, exposures)
        for hash8, scores in self.scores.items():
            content = _scored(scores, share, generator) | {"run": run.name, "step": step}
            run.eval_path(hash8).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        if registry.family(cell.model.family).has_memory:
            usage = {"run": run.name, "step": step, **self.usage}
            run.usage_path.write_text(json.dumps(usage, indent=1) + "\n", encoding="utf-8")
        (run.checkpoints / f"step-{step}").mkdir(parents=True, exist_ok=True)
        run.set_state("done", progress=1.0, eta_s=0.0, started=0.0, finished=float(step), trained=True, log=None)

    def _lines(self, cell: Cell, exposures: float, generator: np.random.Generator) -> tuple[list[str], int]:
        """Return the lines of train.jsonl and the last step, at which two probes are past the cell's stopping share."""
        tokens_per_step = cell.train.batch_rows * cell.data.seq_len
        flops, seconds = self.facts["account"]["flops_per_token"], 0.02 + 0.002 * generator.random()
        noise = generator.standard_normal((self.steps + 1, 2)) * (0.05, 0.01)
        probes, is_past = probe_steps(cell.train, self.steps), False
        lines: list[str] = []
        for step in range(1, self.steps + 1):
            is_logged = step % cell.train.log_every == 0 or step == self.steps
            if not is_logged and step not in probes:
                continue
            epoch = step * cell.train.batch_rows / self.rows_per_epoch
            share = _learned(epoch, exposures)
            position = {
                "step": step,
                "tokens": step * tokens_per_step,
                "epoch": round(epoch, 6),
                "train_flops": step * tokens_per_step * flops,
                "wall_s": round(step * seconds, 3),
            }
            loss = 1.0 + 5.0 * math.exp(-epoch) + (1.0 - share)
            if is_logged:
                lines.append(self._training_line(position, loss + noise[step, 0], cell, seconds))
            if step in probes:
                probe = _probe(self.scores, share + noise[step, 1])
                lines.append(json.dumps({**position, "eval_loss": loss, "probe": probe}) + "\n")
                was_past, is_past = is_past, share >= (cell.train.stop_past or math.inf)
                if was_past and is_past:
                    return lines, step
        return lines, self.steps

    def _training_line(self, position: dict[str, Any], loss: float, cell: Cell, seconds: float) -> str:
        has_memory = bool(self.usage)
        line = {
            **position,
            "loss": loss,
            "lr": cell.train.lr,
            "value_lr": cell.train.value_lr if has_memory else None,
            "grad_norm": 0.637078440442657 * loss,
            "value_grad_norm": 0.021542940288782 * loss if has_memory else None,
            "tokens_per_s": round(cell.train.batch_rows * cell.data.seq_len / seconds, 1),
            "memory_bytes": 484618240,
        }
        text = json.dumps(line)
        return f'{text[:-1]}, "usage": {self.line_usage}}}\n' if has_memory else f"{text}\n"


def _learned(epoch: float, exposures: float) -> float:
    """Return the share of bits learned after `epoch` exposures; it is a half at `exposures`."""
    return 1.0 / (1.0 + (exposures / epoch) ** 3)


def _probe(scores: dict[str, dict[str, Any]], share: float) -> dict[str, Any]:
    """Return the scores of a probe for the tasks that measure bits learned."""
    tasks = {name: task for content in scores.values() for name, task in content["tasks"].items()}
    probe_scores = {}
    for name, task in tasks.items():
        if "bits_max" in task["metrics"]:
            most = task["metrics"]["bits_max"]["value"]
            bits = most * share
            nll = (most - bits) * math.log(2.0) / task["n"]
            probe_scores[name.removeprefix("bios_")] = {
                "bits": bits,
                "bits_max": most,
                "nll": nll,
                "recall": min(1.0, max(0.0, share)),
                "n": task["n"],
            }
    return probe_scores


def _scored(scores: dict[str, Any], share: float, generator: np.random.Generator) -> dict[str, Any]:
    """Return an evaluation's file with the scores of a model that knows `share` of the facts."""
    content = copy.deepcopy(scores)
    for task in content["tasks"].values():
        metrics = task["metrics"]
        for name, metric in metrics.items():
            if name == "bits":
                metric["value"] = share * metrics["bits_max"]["value"]
            elif name == "nll":
                metric["value"] = 5.0 * (1.0 - share)
            elif name != "bits_max":
                metric["value"] = share
        for name, answers in (task.get("answers") or {}).items():
            if isinstance(answers, str):
                task["answers"][name] = "".join("01"[hit] for hit in (generator.random(len(answers)) < share).tolist())
    return content
