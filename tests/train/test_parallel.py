"""Several processes (torchrun, gloo, float64) train to the same losses and weights as one.

Only the order of sums differs, so they agree up to rounding.
"""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from page_examples import POINTS, file_of
from parallel_jobs import FAMILIES, WITH_MEMORY, Job, cell_of, job, run_jobs
from times import TIMES
from torch.distributed.tensor import DTensor
from torch.testing._internal.distributed.fake_pg import FakeStore

from kernels.product_key import best
from suite.baselines import loading
from suite.cells import Cell, EvalConfig
from suite.data.corpus import prepare
from suite.errors import UserError
from suite.launch.background_scoring import retain_due
from suite.launch.scorer import Scorer
from suite.launch.scoring import score_missing
from suite.models import initial_weights, moe, registry
from suite.records import RunDir
from suite.train import checkpoint, sharding
from suite.train.loop import Trainer, train
from suite.train.parallel import Parallel, World

STEPS = 50
EXACT = 1e-9


def alone(cell: Cell, folder: Path, cache: Path) -> Path:
    """Train the cell in this process."""
    folder.mkdir(parents=True, exist_ok=True)
    assert train(cell, prepare(cell.data, cache), RunDir(folder)) == "done"
    return folder


def lines(folder: Path, of: str = "loss") -> list[dict[str, Any]]:
    """Lines of train.jsonl about steps ("loss") or probes ("eval_loss"), without timings."""
    every = RunDir(folder).train_lines()
    return [{k: v for k, v in line.items() if k not in TIMES} for line in every if of in line]


def weights(cell: Cell, folder: Path, cache: Path) -> dict[str, torch.Tensor]:
    """Return the newest weights as a single process reads them, with whole tables."""
    state: dict[str, torch.Tensor] = checkpoint.load_model(RunDir(folder), cell, prepare(cell.data, cache)).state_dict()
    return state


def distance(cell: Cell, first: Path, second: Path, cache: Path) -> tuple[float, float]:
    """Return the largest differences between two runs' losses and between their weights."""
    a, b = lines(first), lines(second)
    assert [line["step"] for line in a] == [line["step"] for line in b]
    losses = max(abs(x["loss"] - y["loss"]) for x, y in zip(a, b, strict=True))
    one, many = weights(cell, first, cache), weights(cell, second, cache)
    assert one.keys() == many.keys()
    return losses, max((one[name].double() - many[name].double()).abs().max().item() for name in one)


def assert_same_run(cell: Cell, first: Path, second: Path, cache: Path) -> None:
    losses, difference = distance(cell, first, second, cache)
    print(f"{second.name}: losses within {losses:.1e} nats, weights within {difference:.1e}")
    assert losses < EXACT
    assert difference < EXACT
    for a, b in zip(lines(first), lines(second), strict=True):
        assert numbers(a) == pytest.approx(numbers(b), abs=10 * EXACT)


def numbers(content: Any) -> list[float]:
    """Return all numbers of nested records, in order."""
    if isinstance(content, dict):
        content = list(content.values())
    return [x for item in content for x in numbers(item)] if isinstance(content, list) else [content]


def test_two_processes_train_like_one_and_one_process_reads_their_checkpoint(
    cache: Path, tmp_path: Path, wide: None
) -> None:
    cases = ("memory_plus large", "moe_topk", "moe_topk softmax", "dense tied")
    cells = {case: cell_of(case, 3, probes=1, accumulate=2) for case in cases}
    cells["moe_topk odd"] = cell_of("moe_topk odd", 3, probes=1, matrix_optimizer="muon")
    prepare(cells["moe_topk"].data, cache)
    options = {"memory_parallel": 2, "logits_at_once": 20_000}  # one process computes all logits at once
    run_jobs([job(cell, tmp_path / f"{case}-2", **options) for case, cell in cells.items()], cache, 2, tmp_path)
    for case, cell in cells.items():
        one, two = alone(cell, tmp_path / case, cache), tmp_path / f"{case}-2"
        assert_same_run(cell, one, two, cache)
        for a, b in zip(lines(one, "eval_loss"), lines(two, "eval_loss"), strict=True):
            assert a["eval_loss"] == pytest.approx(b["eval_loss"], rel=1e-6)
            assert a["probe"]["storage"] == pytest.approx(b["probe"]["storage"], rel=1e-4)


TABLE_OPTIONS: dict[str, dict[str, Any]] = {
    "fp32": {},
    "accumulate": {"accumulate": 2},
    "limit": {"value_replay_limit": 2},
    "row": {"value_second_moment": "row"},
    "lazy": {"value_lazy": True},
    "sgd": {"table_optimizer": "sgd"},
    "dense": {"table_optimizer": "dense"},
    "bf16": {"value_precision": "bf16"},
    "bf16 limit": {"value_precision": "bf16", "value_replay_limit": 2},
    "bf16_master": {"value_precision": "bf16_master"},
    "bf16_stochastic": {"value_precision": "bf16_stochastic"},
}


@pytest.mark.parametrize(
    "names", [["fp32", "bf16_stochastic"], pytest.param([*TABLE_OPTIONS], marks=pytest.mark.slow)], ids=["two", "every"]
)
def test_replicas_of_a_table_that_replays_train_like_one_process(
    names: list[str], cache: Path, tmp_path: Path, wide: None
) -> None:
    """Four replicas, and two whose columns two processes divide.

    `run_jobs` asserts that replicas hold the same bits. Rows in bf16 have sums in fp32: those runs are merely close.
    """
    cells = {name: cell_of("pkm sparse", 8, value_lr=5e-2, **TABLE_OPTIONS[name]) for name in names}
    prepare(cells["fp32"].data, cache)
    # A second moment per row needs whole rows.
    meshes = [(name, members) for name in cells for members in (1, 2) if name != "row" or members == 1]
    folders = {mesh: tmp_path / mesh_name(mesh[0], 4, mesh[1]) for mesh in meshes}
    jobs = [job(cells[name], folder, memory_parallel=members) for (name, members), folder in folders.items()]
    run_jobs(jobs, cache, 4, tmp_path)
    ones = {name: alone(cell, tmp_path / name, cache) for name, cell in cells.items()}
    for (name, _), folder in folders.items():
        if "bf16" in name:
            assert lines(folder)[-1]["loss"] == pytest.approx(lines(ones[name])[-1]["loss"], abs=1e-3)
        else:
            assert_same_run(cells[name], ones[name], folder, cache)


@pytest.mark.parametrize("name", ["fp32", pytest.param("bf16_stochastic", marks=pytest.mark.slow)])
def test_two_replicas_with_triton_kernels_train_like_one_process_without(
    name: str, cache: Path, tmp_path: Path, wide: None
) -> None:
    """On few tokens, since the interpreter takes milliseconds for each."""
    cell, two = cell_of("pkm tiny", 3, 2, 20, value_lr=5e-2, **TABLE_OPTIONS[name]), tmp_path / "two"
    prepare(cell.data, cache)
    run_jobs([job(cell, two)], cache, 2, tmp_path, KERNELS_BACKEND="triton", TRITON_INTERPRET="1")
    one = alone(cell, tmp_path / "one", cache)
    if "bf16" in name:
        assert lines(two)[-1]["loss"] == pytest.approx(lines(one)[-1]["loss"], abs=1e-3)
    else:
        assert_same_run(cell, one, two, cache)


def mesh_name(case: str, processes: int, members: int) -> str:
    return f"{case}-{processes}x{members}"


def jobs_of(processes: int, members: list[int], folder: Path, dtype: str) -> list[Job]:
    """Return a job per family on `processes` processes; families with a memory once per memory-parallel group size."""
    return [
        job(cell_of(case, STEPS), folder / mesh_name(case, processes, m), memory_parallel=m, dtype=dtype)
        for case in FAMILIES
        for m in (members if case in WITH_MEMORY else members[:1])
    ]


@pytest.mark.slow
@pytest.mark.parametrize(("processes", "members"), [(2, [1, 2]), (4, [1, 2, 4])])
def test_every_family_trains_on_every_mesh_as_in_one_process(
    processes: int, members: list[int], cache: Path, tmp_path: Path, wide: None
) -> None:
    jobs = jobs_of(processes, members, tmp_path, "float64")
    prepare(cell_of("dense", STEPS).data, cache)
    run_jobs(jobs, cache, processes, tmp_path)
    for case in FAMILIES:
        cell = cell_of(case, STEPS)
        one = alone(cell, tmp_path / case, cache)
        for m in members if case in WITH_MEMORY else members[:1]:
            assert_same_run(cell, one, tmp_path / mesh_name(case, processes, m), cache)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in POINTS if name != "squared"])
def test_modules_at_every_point_train_in_two_processes_as_in_one(
    name: str, cache: Path, tmp_path: Path, wide: None
) -> None:
    path, before = file_of(name, tmp_path), set(registry.families())
    loading.load(path)
    try:
        fields = cell_of("dense", 15).model_dump(mode="json")
        fields["model"] = {"family": name, "base": "w32", "dim": 16, "ffn_hidden": 32}
        cell = Cell.model_validate(fields)
        prepare(cell.data, cache)
        options = [{"memory_parallel": 2}, {"checkpoint_activations": True}]
        folders = [tmp_path / str(number) for number in range(len(options))]
        jobs = [job(cell, folder, baseline=str(path), **more) for folder, more in zip(folders, options, strict=True)]
        run_jobs(jobs, cache, 2, tmp_path)
        one = alone(cell, tmp_path / "one", cache)
        for folder in folders:
            assert_same_run(cell, one, folder, cache)
    finally:
        registry.unregister(set(registry.families()) - before)


@pytest.mark.slow
def test_in_fp32_processes_differ_by_rounding_only(cache: Path, tmp_path: Path, record_testsuite_property: Any) -> None:
    prepare(cell_of("dense", STEPS).data, cache)
    run_jobs(jobs_of(2, [2], tmp_path, "float32"), cache, 2, tmp_path)
    for case in FAMILIES:
        cell = cell_of(case, STEPS)
        one = alone(cell, tmp_path / case, cache)
        losses, difference = distance(cell, one, tmp_path / mesh_name(case, 2, 2), cache)
        print(f"fp32 drift over {STEPS} steps, {case}: loss {losses:.1e} nats, weights {difference:.1e}")
        record_testsuite_property(f"fp32 drift {case}", f"loss {losses:.1e}, weights {difference:.1e}")
        assert losses < 0.05


def losses_and_choices(cell: Cell, accumulate: int, folder: Path, cache: Path) -> list[tuple[float, list[list[int]]]]:
    """Return the loss of each step, and the tokens that experts choose, sorted, by layer, row and expert."""
    folder.mkdir()
    parts = World(parallel=Parallel(accumulate=accumulate))
    trainer = Trainer(cell, prepare(cell.data, cache), RunDir(folder), parts)
    chosen: list[torch.Tensor] = []
    steps = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(moe, "best", lambda x, k: chosen.append(best(x, k)) or chosen[-1])
        for _ in range(STEPS):
            chosen.clear()
            loss = trainer.train_step()["loss"]
            assert loss is not None
            layers = len(chosen) // accumulate
            rows = [torch.cat(chosen[layer::layers]).sort(-1).values.flatten(0, 1).tolist() for layer in range(layers)]
            steps.append((loss, [tokens for layer in rows for tokens in layer]))
    return steps


@pytest.mark.slow
def test_expert_choice_differs_in_fp32_only_after_an_expert_chooses_another_token(cache: Path, tmp_path: Path) -> None:
    """Rounding can flip the choice between nearly equal tokens; until it does, losses agree."""
    cell = cell_of("moe", STEPS)
    whole = losses_and_choices(cell, 1, tmp_path / "whole", cache)
    parts = losses_and_choices(cell, 2, tmp_path / "parts", cache)
    differences = [abs(one - other) for (one, _), (other, _) in zip(whole, parts, strict=True)]
    others = [sum(a != b for a, b in zip(x, y, strict=True)) for (_, x), (_, y) in zip(whole, parts, strict=True)]
    first = next((step for step, count in enumerate(others) if count), STEPS)
    before = max(differences[:first])
    print(f"the same choices for {first} steps, losses within {before:.1e}; then within {max(differences):.1e}")
    assert before < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize(
    ("case", "options"),
    [
        ("memory_plus", {}),
        ("moe_topk", {}),
        ("pkm batchnorm", {}),
        ("moe_topk", {"matrix_optimizer": "muon"}),
        ("moe_topk odd", {"matrix_optimizer": "muon"}),
        ("moe_topk odd", {}),
        ("memory_plus", {"matrix_optimizer": "muon", "table_optimizer": "sgd", "value_lr": 0.5}),
    ],
)
def test_a_run_resumes_with_a_different_number_of_processes(
    case: str, options: dict[str, Any], cache: Path, tmp_path: Path, wide: None
) -> None:
    cell = cell_of(case, 24, **options)
    one = alone(cell, tmp_path / "one", cache)
    moved = tmp_path / "moved"
    run_jobs([job(cell, moved, memory_parallel=2, stop_at=7, stopping_rank=1)], cache, 2, tmp_path)
    assert checkpoint.steps_saved(RunDir(moved)) == [7]
    run_jobs([job(cell, moved, stop_at=15)], cache, 0, tmp_path)
    assert checkpoint.steps_saved(RunDir(moved)) == [7, 15]
    run_jobs([job(cell, moved, memory_parallel=2)], cache, 4, tmp_path)
    assert_same_run(cell, one, moved, cache)


@pytest.mark.slow
def test_two_processes_start_from_a_parent_like_one_and_also_from_a_sharded_parent(
    cache: Path, tmp_path: Path, wide: None
) -> None:
    parent = cell_of("memory_plus", 4)
    runs = [RunDir(tmp_path / "runs" / name) for name in ("parent-1", "parent-2")]
    for run in runs:
        run.write_cell(parent)
    alone(parent, runs[0].path, cache)
    run_jobs([job(parent, runs[1].path, memory_parallel=2)], cache, 2, tmp_path)
    for run in runs:
        run.set_state("done", trained=True)
        child = cell_of("memory_plus", 5, init_from=str(run.path), parent=parent.hash8)
        one, two = (tmp_path / f"child-{number}-{run.name}" for number in (1, 2))
        run_jobs([job(child, two, memory_parallel=2)], cache, 2, tmp_path)
        assert_same_run(child, alone(child, one, cache), two, cache)


@pytest.mark.slow
@pytest.mark.parametrize("processes", [0, 2])
def test_activation_checkpointing_does_not_change_training(
    processes: int, cache: Path, tmp_path: Path, wide: None
) -> None:
    cells = {case: cell_of(case, 6) for case in ("moe_topk", "moe_topk softmax", "pkm batchnorm")}
    prepare(cells["moe_topk"].data, cache)
    again = [job(cell, tmp_path / f"{case}-again", checkpoint_activations=True) for case, cell in cells.items()]
    run_jobs(again, cache, processes, tmp_path)
    for case, cell in cells.items():
        assert_same_run(cell, alone(cell, tmp_path / case, cache), tmp_path / f"{case}-again", cache)


OPTIMIZERS: list[tuple[str, dict[str, Any]]] = [
    ("peer", {"table_optimizer": "dense"}),
    ("peer", {"table_optimizer": "sgd", "value_lr": 0.5}),
    ("memory_plus", {"matrix_optimizer": "muon"}),
    ("moe", {"matrix_optimizer": "muon"}),
    ("moe_topk", {"matrix_optimizer": "muon"}),
    ("moe_topk odd", {"matrix_optimizer": "muon"}),
]


@pytest.mark.slow
@pytest.mark.parametrize("processes", [2, 4])
def test_every_optimizer_on_several_processes_trains_as_in_one(
    processes: int, cache: Path, tmp_path: Path, wide: None
) -> None:
    cells = {tmp_path / f"{number}": cell_of(case, 6, **options) for number, (case, options) in enumerate(OPTIMIZERS)}
    prepare(cell_of("dense", 6).data, cache)
    jobs = [job(cell, folder, memory_parallel=2, stop_at=3) for folder, cell in cells.items()]
    run_jobs(jobs, cache, processes, tmp_path)
    run_jobs([job(cell, folder, memory_parallel=2) for folder, cell in cells.items()], cache, processes, tmp_path)
    for folder, cell in cells.items():
        assert_same_run(cell, alone(cell, folder.with_suffix(".alone"), cache), folder, cache)


@pytest.mark.slow
def test_in_bf16_two_processes_stay_close_to_one(cache: Path, tmp_path: Path) -> None:
    cells = {case: cell_of(case, 10, precision="bf16") for case in ("memory_plus", "moe_topk")}
    prepare(cells["moe_topk"].data, cache)
    jobs = [job(cell, tmp_path / f"{case}-2", memory_parallel=2, dtype="float32") for case, cell in cells.items()]
    run_jobs(jobs, cache, 2, tmp_path)
    for case, cell in cells.items():
        one = lines(alone(cell, tmp_path / case, cache))
        two = lines(tmp_path / f"{case}-2")
        assert one[0]["loss"] == pytest.approx(two[0]["loss"], abs=1e-3)
        assert one[-1]["loss"] == pytest.approx(two[-1]["loss"], abs=0.02)


@pytest.mark.slow
@pytest.mark.parametrize("case", ["memory_plus", "peer"])
def test_a_sharded_model_has_the_scores_of_a_whole_one(case: str, cache: Path, tmp_path: Path) -> None:
    """Directly from the checkpoint: each process reads only its columns."""
    evaluation = EvalConfig(tasks=("bios_storage", "bios_qa"), limit=10)
    cell = cell_of(case, 4, checkpoint_every=2, evaluate_every=2)
    cell = cell.model_copy(update={"evaluate": (evaluation,)})
    together, one = RunDir(tmp_path / "together"), RunDir(tmp_path / "one")
    run_jobs([job(cell, together.path, memory_parallel=2, dtype="float32")], cache, 2, tmp_path)
    assert retain_due(together, cell)
    shutil.copytree(together.path, one.path)
    run_jobs([job(cell, together.path, memory_parallel=2, dtype="float32", score=True)], cache, 2, tmp_path)
    score_missing(one, cell, prepare(cell.data, cache), Scorer())
    for name in (f"eval/{evaluation.hash8}.json", f"eval/steps/{evaluation.hash8}-2.json"):
        sharded, expected = (json.loads((run.path / name).read_text()) for run in (together, one))
        for task, scores in expected["tasks"].items():
            for metric, value in scores["metrics"].items():
                assert sharded["tasks"][task]["metrics"][metric]["value"] == pytest.approx(value["value"], rel=1e-5)
            assert sharded["tasks"][task].get("answers") == scores.get("answers")
    usage, expected = (json.loads(run.usage_path.read_text()) for run in (together, one))
    assert usage == expected | {"run": "together"}


def test_a_run_interrupted_between_steps_resumes_bit_for_bit(cache: Path, tmp_path: Path) -> None:
    cell = cell_of("memory_plus", 6)
    whole = alone(cell, tmp_path / "whole", cache)
    run = RunDir(tmp_path / "interrupted")
    run.path.mkdir()
    trainer = Trainer(cell, prepare(cell.data, cache), run)
    assert trainer.run_to_end(lambda: trainer.step == 4) == "interrupted"
    assert checkpoint.steps_saved(run) == [4]
    alone(cell, run.path, cache)
    assert distance(cell, whole, run.path, cache) == (0.0, 0.0)


@pytest.fixture
def second_of_two() -> Iterator[World]:
    """The second process of two that divide the columns of tables; the first does not exist."""
    dist.init_process_group("fake", store=FakeStore(), rank=1, world_size=2)
    yield World(1, 2, Parallel(memory_parallel=2), True, torch.device("cpu"))
    dist.destroy_process_group()


@pytest.mark.parametrize("mesh", [None, "second_of_two"])
def test_a_model_whose_weights_are_loaded_is_not_drawn_first(
    mesh: str | None, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    cell, run = cell_of("memory_plus", 2), RunDir(tmp_path / "run")
    run.path.mkdir()
    corpus = prepare(cell.data, cache)
    trainer = Trainer(cell, corpus, run)
    trainer.train_step()
    trainer.save()
    world = World() if mesh is None else request.getfixturevalue(mesh)

    def refuse(*_: object) -> None:
        raise AssertionError("drawn")

    monkeypatch.setattr(initial_weights, "_law", refuse)  # the distribution of every parameter that is drawn
    resumed = Trainer(cell, corpus, run, world)
    scored = checkpoint.load_model(run, cell, corpus, world)
    for name, whole in trainer.model.state_dict().items():
        for model in (resumed.model, scored):
            value = model.state_dict()[name]
            if name == "tables.0.weight":
                assert value.equal(whole.chunk(world.size, 1)[world.rank])
            elif isinstance(value, DTensor):
                assert value.to_local().equal(whole.chunk(world.size, value.placements[0].dim)[world.rank])
            else:
                assert value.equal(whole)
    with pytest.raises(AssertionError, match="drawn"):
        Trainer(cell, corpus, RunDir(tmp_path / "new"), world)


def test_parameters_are_sharded_by_a_dimension_that_needs_no_padding() -> None:
    shapes = {(4, 2048, 8192): 1, (4, 2, 8192, 512): 2, (64, 7): 0, (128256, 4096): 0, (50257, 4096): 0, (65, 64): 1}
    for shape, dim in shapes.items():
        assert sharding.placement(64, torch.empty(shape, device="meta")).dim == dim
    assert sharding.placement(64, torch.empty(3, 5, device="meta")).dim == 0  # padded: FSDP divides no other evenly


def test_a_world_that_does_not_divide_the_cell_is_refused() -> None:
    cell = cell_of("pkm", 2, accumulate=2)
    with pytest.raises(
        UserError, match=r"train.batch_rows: got 8, allowed: a multiple of accumulate x processes = 2 x 3"
    ):
        World(size=3).check(cell)
    with pytest.raises(UserError, match=r"parallel.memory_parallel: got 3"):
        World(size=4, parallel=Parallel(memory_parallel=3)).check(cell)


def test_a_launch_cannot_change_the_micro_batches_of_a_batch_norm() -> None:
    World(parallel=Parallel(accumulate=4)).check(cell_of("pkm", 2))
    with pytest.raises(UserError, match=r"parallel.accumulate: got 4"):
        World(parallel=Parallel(accumulate=4)).check(cell_of("pkm batchnorm", 2))
