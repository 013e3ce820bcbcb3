"""The trainer: resume, gradient accumulation, clipping, probes and checkpoints."""

import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from kills import killed_at
from naive_routing import auxiliary_by_loop
from times import TIMES
from tiny_cells import corpus_of, tiny_cell

from kernels import dispatch
from suite import models
from suite.cells import Cell
from suite.errors import UserError
from suite.records import RunDir
from suite.train import checkpoint
from suite.train.loop import Diverged, Trainer, probe_steps, train


def trainer_of(cell: Cell, cache: Path, folder: Path) -> Trainer:
    run = RunDir(folder)
    run.path.mkdir(parents=True, exist_ok=True)
    return Trainer(cell, corpus_of(cell, cache), run)


def lines(folder: Path) -> list[dict[str, Any]]:
    return [{k: v for k, v in line.items() if k not in TIMES} for line in RunDir(folder).train_lines()]


def weights(folder: Path) -> dict[str, Any]:
    newest = checkpoint.steps_saved(RunDir(folder))[-1]
    state: dict[str, Any] = torch.load(folder / "checkpoints" / f"step-{newest}" / checkpoint.STATE_FILE)
    return state


def assert_same(first: Any, second: Any) -> None:
    assert type(first) is type(second)
    if isinstance(first, torch.Tensor):
        assert torch.equal(first, second)
    elif isinstance(first, dict):
        assert first.keys() == second.keys()
        for key in first:
            assert_same(first[key], second[key])
    elif isinstance(first, list | tuple):
        for a, b in zip(first, second, strict=True):
            assert_same(a, b)
    else:
        assert first == second


SGD = {"table_optimizer": "sgd", "value_lr": 0.5}


@pytest.mark.parametrize(
    ("family", "options"),
    [
        *[
            (family, {})
            for family in (
                "dense",
                "moe",
                "moe_topk",
                "pkm",
                "pkm query_batchnorm",
                "memory_plus",
                "engram",
                "engram_moe",
                "ngram_embedding",
            )
        ],
        ("moe_topk softmax", {}),
        ("ultramem_v2", {"value_lr_end": 0.25}),
        ("token_table", {}),
        ("pkm frozen", {}),
        ("pkm shuffled", {}),
        ("moe_topk", {"matrix_optimizer": "muon"}),
        ("memory_plus", {"matrix_optimizer": "muon"} | SGD),
        ("peer", SGD),
        ("pkm", {"table_optimizer": "dense"}),
    ],
)
@pytest.mark.parametrize("killed_after", [2, pytest.param(6, marks=pytest.mark.slow)])
def test_a_killed_run_resumes_to_the_same_losses_and_weights(
    family: str, options: dict[str, Any], killed_after: int, cache: Path, tmp_path: Path
) -> None:
    cell = tiny_cell(family, probes=3, **options)
    corpus = corpus_of(cell, cache)
    for name in ("whole", "killed"):
        (tmp_path / name).mkdir()
    train(cell, corpus, RunDir(tmp_path / "whole"))

    with killed_at(killed_after):
        train(cell, corpus, RunDir(tmp_path / "killed"))
    train(cell, corpus, RunDir(tmp_path / "killed"))

    assert lines(tmp_path / "killed") == lines(tmp_path / "whole")
    assert_same(weights(tmp_path / "killed"), weights(tmp_path / "whole"))


def test_micro_batches_add_up_to_the_whole_batch(cache: Path, tmp_path: Path) -> None:
    whole = trainer_of(tiny_cell(accumulate=1), cache, tmp_path / "1")
    parts = trainer_of(tiny_cell(accumulate=4), cache, tmp_path / "4")
    for _ in range(3):
        one, four = whole.train_step(), parts.train_step()
        assert one["loss"] == pytest.approx(four["loss"], rel=1e-6)
        assert one["grad_norm"] == pytest.approx(four["grad_norm"], rel=1e-5)


def test_auxiliary_losses_enter_the_gradient_but_not_the_loss(cache: Path, tmp_path: Path, wide: None) -> None:
    """In float64, the gradient is that of cross-entropy plus the weighted means over micro-batches of naive losses."""
    cell = tiny_cell("moe_topk softmax", accumulate=2, batch_rows=2)
    trainer = trainer_of(cell, cache, tmp_path)
    twin = models.build(cell.model, trainer.corpus.vocab_size, cell.seed)
    routed: list[tuple[Any, torch.Tensor]] = []
    for layer in twin.layers:
        layer.feed_forward.register_forward_pre_hook(
            lambda module, args: routed.append((module, args[0].flatten(0, 1)))
        )
    batches = [trainer.loader.batch(0, micro, 2) for micro in range(2)]
    targets = sum(int((batch.targets_BT != -100).sum()) for batch in batches)
    entropy, objective = 0.0, torch.zeros(())
    auxiliary = {"balance_loss": 0.0, "z_loss": 0.0}
    for batch in batches:
        routed.clear()
        logits_NV = twin(batch.tokens_BT, batch.segments_BT).flatten(0, 1)
        part = F.cross_entropy(logits_NV, batch.targets_BT.flatten(), reduction="sum") / targets
        entropy, objective = entropy + part.item(), objective + part
        for module, x_ND in routed:
            for name, loss in auxiliary_by_loop(module, x_ND).items():
                mean = loss / len(routed) / 2
                objective = objective + {"balance_loss": 0.01, "z_loss": 0.001}[name] * mean
                auxiliary[name] += mean.item()
    objective.backward()
    logged = {name: float(value) for name, value in trainer._backward().items()}
    assert logged.pop("loss") == pytest.approx(entropy, rel=1e-12)
    assert logged == pytest.approx(auxiliary, rel=1e-12)
    for (name, ours), theirs in zip(trainer.model.named_parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-9, atol=1e-14, msg=name)


def test_the_loss_is_the_mean_over_real_targets(cache: Path, tmp_path: Path) -> None:
    trainer = trainer_of(tiny_cell(), cache, tmp_path)
    batch = trainer.loader.batch(0)
    with torch.no_grad():
        logits = trainer.model(batch.tokens_BT, batch.segments_BT).double()
    log_p = logits.log_softmax(-1)
    losses_of_targets = [
        -log_p[row, column, target].item()
        for row, targets in enumerate(batch.targets_BT.tolist())
        for column, target in enumerate(targets)
        if target != -100
    ]
    assert trainer.train_step()["loss"] == pytest.approx(sum(losses_of_targets) / len(losses_of_targets), rel=1e-6)


def test_tables_and_other_parameters_are_clipped_separately_and_updated_by_adamw(
    cache: Path, tmp_path: Path, wide: None
) -> None:
    cell = tiny_cell("memory_plus", warmup=0, schedule="constant", clip=0.05, value_lr=2e-2, value_weight_decay=0.0)
    trainer = trainer_of(cell, cache, tmp_path)
    batch = trainer.loader.batch(0)
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    twin = models.build(cell.model, trainer.corpus.vocab_size, cell.seed)  # its tables have dense gradients
    F.cross_entropy(twin(batch.tokens_BT, batch.segments_BT).flatten(0, 1), batch.targets_BT.flatten()).backward()
    tables = {"tables.0.weight"}
    grads = {name: p.grad for name, p in twin.named_parameters() if p.grad is not None}
    trainer.train_step()
    trainer.optimizer.state()  # flushes, which also decays rows that were not read
    for group, lr, decay in ((tables, 2e-2, 0.0), (set(grads) - tables, 5e-3, 0.1)):
        norm = sum(grads[name].pow(2).sum() for name in group).sqrt()
        assert norm > 0.05
        for name in group:
            g = grads[name] * (0.05 / (norm + 1e-6))  # as torch.nn.utils.clip_grad_norm_ does
            # One step of AdamW (Loshchilov and Hutter 2019): bias-corrected moments of a single gradient.
            expected = before[name] * (1 - lr * decay) - lr * g / (g.abs() + 1e-8)
            updated = dict(trainer.model.named_parameters())[name].detach()
            torch.testing.assert_close(updated, expected, rtol=1e-9, atol=1e-9)


def test_a_non_finite_loss_ends_the_run_and_names_the_step(cache: Path, tmp_path: Path) -> None:
    trainer = trainer_of(tiny_cell(), cache, tmp_path)
    trainer.train_step()
    with torch.no_grad():
        trainer.model.norm.weight.fill_(float("nan"))
    with pytest.raises(Diverged, match="step 2: the loss is nan"):
        trainer.train_step()


def test_a_step_that_reads_only_padding_ends_the_run_and_names_the_fields(cache: Path, tmp_path: Path) -> None:
    # Most rows that are as long as the longest document begin none; step 2 has only such a row.
    rounds = corpus_of(tiny_cell(), cache).parts[0].rounds
    seq_len = max(int(r.lengths.max()) for r in rounds)

    def trainer_with(folder: str, **train: Any) -> Trainer:
        cell = tiny_cell(epochs=0.01, **train)
        data = cell.data.model_copy(update={"seq_len": seq_len})
        return trainer_of(cell.model_copy(update={"data": data}), cache, tmp_path / folder)

    alone, padded = trainer_with("alone", batch_rows=1), trainer_with("padded", batch_rows=2, accumulate=2)
    assert padded.train_step()["loss"] == alone.train_step()["loss"]  # next to targets, padding adds nothing
    assert alone.loader.batch(1).targets_BT.eq(-100).all()
    with pytest.raises(UserError, match=rf"train\.batch_rows: got 1; step 2 reads .*data\.seq_len: got {seq_len}\)"):
        alone.train_step()


def test_the_share_of_a_core_that_steps_had_is_logged_if_they_wait_for_nothing(cache: Path, tmp_path: Path) -> None:
    shares = []
    for threads in (1, 2):
        trainer = trainer_of(tiny_cell().model_copy(update={"threads": threads}), cache, tmp_path / str(threads))
        step = trainer.train_step
        trainer.train_step = lambda step=step: time.sleep(0.5) or step()  # type: ignore[method-assign, misc]
        trainer.run_to_end(lambda trainer=trainer: trainer.step == 2)
        shares.append([line.get("cpu_share") for line in trainer.run.train_lines() if "loss" in line])
    assert all(0 < share < 0.5 for share in shares[0])
    assert shares[1] == [None, None], "threads wait for each other"


def test_probes_are_log_spaced_and_end_with_the_last_step() -> None:
    steps = sorted(probe_steps(tiny_cell(probes=5).train, 1600))
    assert steps == [100, 200, 400, 800, 1600]


def test_a_run_stops_after_two_probes_in_a_row_above_stop_past(cache: Path, tmp_path: Path) -> None:
    cell = tiny_cell(probes=6, epochs=4.0, stop_past=0.5)
    trainer = trainer_of(cell, cache, tmp_path)
    shares = iter([0.1, 0.6, 0.4, 0.7, 0.8, 0.9])
    trainer.prober.run = lambda model: {  # type: ignore[method-assign]
        "eval_loss": 1.0,
        "probe": {"storage": {"bits": next(shares), "bits_max": 1.0}},
    }
    trainer.run_to_end()
    assert [line["probe"]["storage"]["bits"] for line in lines(tmp_path) if "probe" in line] == [
        0.1,
        0.6,
        0.4,
        0.7,
        0.8,
    ]
    assert trainer.step < trainer.steps
    assert checkpoint.steps_saved(RunDir(tmp_path))[-1] == trainer.step


def test_only_recent_checkpoints_are_retained_and_an_incomplete_one_is_ignored(cache: Path, tmp_path: Path) -> None:
    trainer = trainer_of(tiny_cell(checkpoint_every=1, keep_checkpoints=2), cache, tmp_path)
    trainer.run_to_end()
    run = RunDir(tmp_path)
    assert checkpoint.steps_saved(run) == [trainer.steps - 1, trainer.steps]
    torn = run.checkpoints / f".step-{trainer.steps + 1}"
    torn.mkdir()
    (torn / "state.pt").write_bytes(b"half")
    assert checkpoint.steps_saved(run) == [trainer.steps - 1, trainer.steps]
    assert trainer_of(trainer.cell, cache, tmp_path).step == trainer.steps


@pytest.mark.parametrize("backend", ["torch", "native"])
@pytest.mark.parametrize("family", ["pkm", "memory_plus", "peer"])
def test_row_wise_and_dense_table_optimizers_agree(
    family: str, backend: str, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(dispatch.VARIABLE, backend)
    half_keys = {"half_keys": 24, "top_k": 2}  # most rows are read rarely, so that there are steps to replay
    runs = {}
    for optimizer in ("row_wise", "dense"):
        cell = tiny_cell(family, table_optimizer=optimizer, epochs=3.0, weight_decay=0.1, value_lr=2e-2)
        cell = Cell.model_validate(cell.model_dump() | {"model": cell.model.model_dump() | half_keys})
        runs[optimizer] = trainer_of(cell, cache, tmp_path / optimizer)
        runs[optimizer].run_to_end()
    rows, dense = runs["row_wise"], runs["dense"]
    assert rows.model.memory_tables()[0].weight.grad is None
    losses = [[line["loss"] for line in lines(tmp_path / name)] for name in runs]
    assert losses[0] == pytest.approx(losses[1], rel=2e-4)
    for ours, plain in zip(rows.model.memory_tables(), dense.model.memory_tables(), strict=True):
        moved = (plain.weight - trainer_of(dense.cell, cache, tmp_path / "fresh").model.memory_tables()[0].weight).abs()
        assert (ours.weight - plain.weight).abs().max() < 0.02 * moved.max()
