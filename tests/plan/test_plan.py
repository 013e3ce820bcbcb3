"""Plans compared with totals and formulas computed by hand, and meshes, which are the smallest that fit."""

from __future__ import annotations

import dataclasses
import json
import math
import re
import socket
from pathlib import Path

import pytest
from tokenizers import Tokenizer as RustTokenizer
from tokenizers import models
from typer.testing import CliRunner

from suite.atomic import write_json
from suite.cli.main import app
from suite.errors import UserError
from suite.grids import Grid, load_grid
from suite.models.accounting import account_of, meta_model
from suite.models.moe import MoETopKConfig
from suite.plan import plan as planning
from suite.plan import this_machine
from suite.plan.activation_memory import StepTracer
from suite.plan.gpus import GPUS, USABLE
from suite.plan.mesh import MICRO_ROWS, Mesh
from suite.plan.table import plan_notes, plan_table
from suite.plan.table_state import table_state
from suite.plan.traffic import sent_bytes
from suite.records import RunDir

GRIDS = Path(__file__).resolve().parents[2] / "grids"
COUNTED = {  # models of table 1, in millions, to 0.1m, by hand; test_accounting.py checks published totals
    ("moe", "134m", None): 983.6,
    ("peer", "134m", 768): 1036.9,
    ("pkm", "134m", 1024): 936.5,
    ("memory_plus", "134m", 1024): 937.1,
    ("moe", "1.3b", None): 3545.5,
    ("peer", "1.3b", 768): 3645.7,
    ("pkm", "1.3b", 1024): 3377.6,
    ("memory_plus", "1.3b", 1024): 3368.1,
    ("dense", "373m", None): 373.9,
    ("memory_plus", "1.3b", 2048): 9823.2,
    ("memory_plus", "1.3b", 4096): 35618.1,
    ("memory_plus", "1.3b", 8192): 138747.7,
}


def planned(name: str, gpu: str = "h100", nodes: int | None = None, **over: str) -> list[planning.CellPlan]:
    changes = {path.replace("__", "."): value for path, value in over.items()}
    grid = load_grid(str(GRIDS / f"{name}.yaml"), changes, need_data=False)
    return planning.plan(grid, planning.assumptions(gpu, nodes, 0.4, None), Path("unused"))


@pytest.fixture(scope="module")
def scaling() -> list[planning.CellPlan]:
    return planned("paper-memory-scaling")


def test_the_papers_grids_are_planned_together_with_hand_counted_totals(tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["plan", "paper", "--json", "--results", str(tmp_path)])
    assert done.exit_code == 0, done.output
    document = json.loads(done.stdout)
    assert json.loads((tmp_path / "plans" / "paper-h100.json").read_text()) == document
    seen: dict[tuple[str, str, int | None], list[float]] = {}
    for cell in document["cells"]:
        millions = cell["params"]["total"] / 1e6
        seen.setdefault((cell["family"], cell["base"], cell["half_keys"]), []).append(millions)
    for key, millions in COUNTED.items():
        assert min(abs(total - millions) for total in seen[key]) < 0.05, key


def test_cells_with_the_same_name_show_their_distinguishing_settings(tmp_path: Path) -> None:
    arguments = ["plan", "paper-ablations", "--results", str(tmp_path)]
    shown = CliRunner().invoke(app, arguments).stdout
    for setting in ("placement=[4, 12, 20]", "value_dim=2048", "scalar_gate=True", "qk_norm=True", "share=False"):
        assert shown.count(f"  {setting} ") == 1, setting
    cells = json.loads(CliRunner().invoke(app, [*arguments, "--json"]).stdout)["cells"]
    names = [(cell["run"].rpartition("-")[0], json.dumps(cell["variant"])) for cell in cells]
    assert len(set(names)) == len(names) == 19


def test_the_document_has_its_documented_fields(scaling: list[planning.CellPlan]) -> None:
    document = scaling[2].to_json(price=2.0)
    assert {
        "cell",
        "family",
        "base",
        "half_keys",
        "params",
        "flops_per_token",
        "bytes_per_token",
        "tokens",
        "memory_per_gpu",
        "gpus",
        "gpu_hours",
    } <= document.keys()
    assert document["params"].keys() == {"total", "active", "memory", "embedding"}
    assert document["flops_per_token"].keys() == {"train", "forward"}
    assert document["cost"] == 2.0 * document["gpu_hours"]
    assert document["days"] == document["gpu_hours"] / document["gpus"] / 24
    json.dumps(document, allow_nan=False)


def test_hours_are_flops_divided_by_the_assumed_speed(scaling: list[planning.CellPlan]) -> None:
    for one in scaling:
        assert one.total_flops == 1e12 * one.account.flops_per_token
        assert one.compute_hours == pytest.approx(one.total_flops / (989e12 * 0.4) / 3600)
        assert one.gpu_hours >= one.compute_hours
        assert one.steps == int(1e12) // (2048 * 4096)


def test_a_mesh_fits_and_one_of_half_the_size_does_not() -> None:
    usable = GPUS["h100"].memory * USABLE
    for one in planned("paper-memory-scaling")[:4]:
        mesh = one.mesh
        assert mesh is not None
        assert mesh.memory.peak <= usable
        assert mesh.gpus * mesh.micro_rows * mesh.accumulate == one.cell.train.batch_rows
        if mesh.gpus > 1:
            model, half = meta_model(one.cell.model, 32000), mesh.gpus // 2
            for micro in MICRO_ROWS:
                step = StepTracer(model, 4096, "bf16").parts(micro).step(half, half, 2048 // half // micro)
                assert step.peak > usable


def test_a_table_too_large_for_a_node_is_divided_over_nodes(scaling: list[planning.CellPlan]) -> None:
    huge = scaling[-1]
    assert huge.account.params_memory == 2**26 * 2048
    assert huge.mesh is not None
    assert huge.mesh.table_shards == huge.mesh.gpus
    assert huge.mesh.gpus > GPUS["h100"].per_node
    assert scaling[2].mesh is not None
    assert scaling[2].mesh.table_shards <= GPUS["h100"].per_node


def test_a_cell_that_does_not_fit_states_why_and_what_would_fit() -> None:
    tight = planned("paper-memory-scaling", "h200", nodes=1)[-1]
    assert tight.mesh is None
    assert f"{12 * 2**26 * 2048 / 8 / 1e9:.1f} GB" in str(tight.why)
    assert re.fullmatch(r"\d+ GPUs \(\d+ nodes\)", str(tight.would_fit))
    assert tight.to_json(1.0)["fits"] is False
    more = planned("paper-memory-scaling", "h200")[-1].mesh
    assert more is not None
    assert str(tight.would_fit).startswith(f"{more.gpus} GPUs")


@pytest.mark.parametrize(("rows", "most"), [(48, 16), (24, 8), (7, 1)])
def test_the_gpus_of_a_mesh_divide_the_rows_of_a_batch(rows: int, most: int) -> None:
    plans = planned("paper-memory-scaling", train__batch_rows=str(rows))
    for one in plans:
        if one.mesh is not None:
            assert one.mesh.gpus * one.mesh.micro_rows * one.mesh.accumulate == rows
    huge = plans[-1]
    assert huge.mesh is None
    assert str(huge.why).startswith(f"on {most} GPUs (the most that divide its {rows} rows), each needs ")
    assert str(huge.would_fit).startswith("a train.batch_rows that more GPUs divide or ")


def test_batch_rows_are_not_the_stated_reason_if_more_gpus_divide_them() -> None:
    (tight,) = (one for one in planned("paper-memory-scaling", nodes=3) if one.account.params_memory == 2**26 * 2048)
    assert str(tight.why).startswith("on 16 GPUs, each needs ")
    assert re.fullmatch(r"\d+ GPUs \(\d+ nodes\)", str(tight.would_fit))


def test_meshes_of_several_nodes_use_whole_nodes() -> None:
    grid = load_grid(str(GRIDS / "paper-memory-scaling.yaml"), {"train.batch_rows": "3072"}, need_data=False)
    assumed = planning.Assumptions(dataclasses.replace(GPUS["h100"], per_node=6))
    plans = planning.plan(grid, assumed, Path("unused"))
    meshes = [(one.mesh.gpus, one.mesh.table_shards) for one in plans if one.mesh is not None]
    assert all(gpus < 6 or gpus % 6 == 0 for gpus, _ in meshes)
    widths = [2048 % shards for _, shards in meshes]
    assert set(widths) == {0}
    assert {gpus for gpus, _ in meshes} >= {1, 4}


def test_an_unsharded_table_that_does_not_fit_names_the_option() -> None:
    (huge,) = (
        one
        for one in planned("paper-memory-scaling", train__value_second_moment="row")
        if one.account.params_memory == 2**24 * 2048
    )
    assert str(huge.would_fit).startswith("train.value_second_moment: element")


def test_tables_in_host_memory_need_one_gpu_and_host_memory() -> None:
    plans = planned("paper-memory-scaling", train__table_device="host")
    (large,) = (one for one in plans if one.account.params_memory == 2**24 * 2048)
    assert large.mesh is not None
    assert large.mesh.gpus == 1
    assert large.mesh.memory.host > 12 * 2**24 * 2048 > large.mesh.memory.peak
    (note,) = (line for line in plan_notes([large], planning.document(*documented(large))) if "host memory" in line)
    assert note.startswith(f"{large.cell.run_name}: {large.mesh.memory.host / 1e9:,.3g} GB of host memory")


def documented(plan: planning.CellPlan) -> tuple[Grid, list[planning.CellPlan], planning.Assumptions]:
    return Grid("grid", Path("grid"), (plan.cell,)), [plan], planning.assumptions("h100", None, 0.4, None)


def test_each_base_has_its_own_vocabulary_in_any_order(tmp_path: Path) -> None:
    (tmp_path / "g.yaml").write_text(
        "defaults:\n  model: {family: dense}\n"
        "  data: {kind: text, path: gone, seq_len: 64, tokenizer: {kind: file, path: gone}}\n"
        "  train: {batch_rows: 8, tokens: 100000, lr: 1e-3}\n"
        "blocks: [{axes: {model.base: [134m, 8b]}}]\n"
    )
    plans = planning.plan(
        load_grid(str(tmp_path / "g.yaml"), need_data=False),
        planning.assumptions("h100", None, 0.4, None),
        Path("unused"),
    )
    assert [one.account.params_embedding // one.cell.model.size.dim for one in plans] == [2 * 32000, 2 * 128256]


def test_batch_statistics_fix_the_number_of_micro_batches() -> None:
    (one,) = (
        one
        for one in planned("paper-fixed-memory", model__query_batchnorm="true", train__accumulate="64")
        if (one.cell.model.family, one.cell.model.base) == ("pkm", "1.3b")
    )
    assert one.mesh is not None
    assert one.mesh.accumulate == 64
    assert one.mesh.gpus * 64 * one.mesh.micro_rows == one.cell.train.batch_rows


@pytest.mark.parametrize(
    ("option", "value", "weight", "moments", "row"),
    [("precision", "bf16", 2, 8, 9), ("precision", "bf16_master", 2, 12, 9), ("second_moment", "row", 4, 4, 13)],
)
def test_tables_are_counted_in_their_configured_precision(
    option: str, value: str, weight: int, moments: int, row: int
) -> None:
    """Bytes per value and per row are those that docs/training.md lists."""
    one = planned("paper-memory-scaling", **{f"train__value_{option}": value})[2]
    assert one.mesh is not None
    values, rows, memory = one.account.params_memory, 2**20, one.mesh.memory
    rest = (one.account.params_total - values) / one.mesh.gpus
    assert memory.weights == pytest.approx(4 * rest + weight * values / one.mesh.table_shards)
    assert memory.moments == pytest.approx(8 * rest + moments * values / one.mesh.table_shards + row * rows)
    lookups, touched = 2048 * 4096 * 3 * 4 * 32, 2**20  # three layers, four heads, top 32; every row is read
    assert one.table_bytes_per_step == pytest.approx(
        2048 * (lookups * (2 * weight + 8) + touched * (2 * weight + 2 * moments + 8)), rel=1e-6
    )


def test_a_second_moment_per_row_prevents_sharding_of_tables() -> None:
    one = planned("paper-memory-scaling", train__value_second_moment="row")[2]
    assert one.mesh is not None
    assert one.mesh.table_shards == 1


def test_the_notes_list_the_hours_of_cells_that_do_not_fit(tmp_path: Path) -> None:
    arguments = ["plan", "paper-memory-scaling", "--nodes", "1", "--results", str(tmp_path)]
    shown = CliRunner().invoke(app, arguments).stdout
    cells = json.loads(CliRunner().invoke(app, [*arguments, "--json"]).stdout)["cells"]
    unfit = sum(cell["gpu_hours"] for cell in cells if not cell["fits"])
    assert unfit > 0
    assert f"{unfit:,.0f} GPU-hours" in shown


def test_partners_are_the_nearest_cells_with_their_ratios(scaling: list[planning.CellPlan]) -> None:
    dense, pkm, plus = scaling[0], scaling[1], scaling[2]
    assert plus.partners["flops"]["run"] == dense.cell.run_name
    assert plus.partners["flops"]["ratio"] == plus.account.macs_total / dense.account.macs_total
    assert plus.partners["flops"]["equal"] is True
    assert plus.partners["params"]["run"] == pkm.cell.run_name
    biggest = scaling[-1].partners["params"]
    assert biggest["ratio"] > 10
    assert biggest["equal"] is False


def test_every_cell_has_ratios_to_the_dense_model_of_its_base(scaling: list[planning.CellPlan]) -> None:
    dense, plus = scaling[0], scaling[2]
    assert set(dense.to_json(1.0)["ratio_to_dense"].values()) == {1.0}
    ratio = plus.to_json(1.0)["ratio_to_dense"]["flops"]
    assert ratio == plus.account.macs_total / dense.account.macs_total
    wide = next(one for one in planned("paper-partners") if one.cell.model.ffn_hidden == 15872)
    assert wide.to_json(1.0)["ratio_to_dense"]["flops"] == pytest.approx(2.0, rel=0.01)


def test_table_traffic_equals_the_hand_computed_one(scaling: list[planning.CellPlan]) -> None:
    plus = scaling[2]
    read = 3 * 128 * 2048 * 4  # layers, rows per token, width, bytes
    rows = 2048 * 4096
    touched = 2**20 * -math.expm1(-rows * 3 * 128 / 2**20)
    assert plus.table_bytes_per_step == pytest.approx(4 * rows * read + 8 * 4 * touched * 2048)
    assert scaling[0].table_bytes_per_step == 0


def test_hours_include_what_gpus_send_as_computed_by_hand() -> None:
    """Matrices are gathered in bf16 for both passes, all else in fp32, and what is outside blocks once.

    Reads of tables wait for their group.
    """
    plus = next(one for one in planned("paper-8b") if one.cell.model.family == "memory_plus")
    mesh = plus.mesh
    assert mesh is not None
    assert (mesh.gpus, mesh.table_shards, mesh.accumulate) == (64, 64, 32)
    rest = plus.account.params_total - 2**24 * 4096
    tokens, layers = 32 * 4096, 3
    matrices = 32 * (2 * 4096 * 4096 + 2 * 4096 * 1024) + 29 * 3 * 4096 * 14336  # attention; feed-forwards that remain
    root = 2 * 128256 * 4096 + 4096  # embedding, output and last norm
    sent = rest * (4 + 4 + 4) - matrices * (2 + 2) - root * 4
    assert plus.sent.weights == pytest.approx(32 * 63 / 64 * sent)
    assert plus.sent.columns == pytest.approx(layers * tokens * 63 * (128 * 12 + 2 * 4096 * 4 / 64))
    assert plus.sent.replicas == 0
    step_s = (plus.sent.weights + plus.sent.columns) / 50e9
    assert plus.gpu_hours == pytest.approx(step_s * plus.steps * 64 / 3600)
    assert plus.compute_hours < 0.4 * plus.gpu_hours


@pytest.mark.parametrize("replicas", [2, 32])
def test_what_replicas_send_and_allocate_does_not_grow_with_their_number(replicas: int) -> None:
    """Nearly all of 2^20 rows are read: an all-reduce of the whole table."""
    cell = next(one for one in planned("paper-memory-scaling") if one.cell.model.table_side == 1024).cell
    model = meta_model(cell.model, 1000)
    parts = StepTracer(model, 4096).parts(1)
    memory = parts.step(8 * replicas, 8, 1, table_state(cell.train))
    one = parts.step(8, 8, 1, table_state(cell.train))
    mesh = Mesh(8 * replicas, 8, 1, 1, memory)
    sent = sent_bytes(model, account_of(model, 4096), cell, mesh)
    table = 2**20 * 2048 // 8 * 4
    assert sent.replicas == pytest.approx(2 * (1 - 1 / replicas) * (table + 2**20))
    assert memory.peak < one.peak + table


def test_the_partners_grid_matches_flops_and_parameters() -> None:
    plans = planned("paper-partners")
    plus = {
        one.cell.model.base: one
        for one in plans
        if one.cell.model.family == "memory_plus" and not one.cell.model.keep_ffn
    }
    dense = {
        one.cell.model.base: one
        for one in plans
        if one.cell.model.family == "dense" and one.cell.model.ffn_hidden is None
    }
    for base, plain in dense.items():
        wide = sorted(
            one.account.macs_total / plain.account.macs_total
            for one in plans
            if one.cell.model.family == "dense" and one.cell.model.base == base
        )
        for factor in (2, 4):
            assert min(abs(ratio / factor - 1) for ratio in wide) < 0.01
        equal = [
            one.account.params_total / plus[base].account.params_total
            for one in plans
            if one.cell.model.base == base and one is not plus[base]
        ]
        assert sum(abs(ratio - 1) < 0.01 for ratio in equal) >= 2  # dense and the mixture


def test_the_tokens_of_a_small_world_come_from_its_corpus(tmp_path: Path) -> None:
    grid = load_grid(str(GRIDS / "smoke.yaml"))
    one = planning.plan(grid, planning.assumptions("a100", 1, 0.4, None), tmp_path)[0]
    assert one.tokens == one.steps * 8 * 128
    assert one.mesh is not None
    assert one.mesh.gpus == 1


def test_the_hours_of_experts_in_blocks_include_their_padding(tmp_path: Path) -> None:
    """An A100 has no kernel for grouped products: 64 experts fill 127 blocks of the mean count."""
    grid = load_grid(str(GRIDS / "paper-partners.yaml"), need_data=False)
    cell = next(cell for cell in grid.cells if cell.model.family == "moe_topk" and cell.train.precision == "bf16")
    plans = {
        gpu: planning.plan(
            dataclasses.replace(grid, cells=(cell,)), planning.assumptions(gpu, None, 0.4, None), tmp_path
        )[0]
        for gpu in ("a100", "h100")
    }
    seconds = {gpu: 3600 * plan.compute_hours * GPUS[gpu].flops * 0.4 for gpu, plan in plans.items()}
    assert seconds["h100"] == pytest.approx(plans["h100"].total_flops)
    assert isinstance(cell.model, MoETopKConfig)
    experts, top_k, hidden = cell.model.routing
    products = 6 * cell.model.size.layers * top_k * 3 * cell.model.size.dim * hidden * plans["a100"].tokens
    assert seconds["a100"] - seconds["h100"] == pytest.approx((1 - 1 / experts) * products)


def test_an_unknown_gpu_is_refused_by_name() -> None:
    with pytest.raises(UserError, match=r"--gpu: got 'b200', .*allowed: a100, h100, h200"):
        planning.assumptions("b200", None, 0.4, None)
    assert planning.assumptions("H100", None, 0.4, None).gpu == GPUS["h100"]


def test_a_device_of_ones_own_is_a_file(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("{name: Mine, memory: 48e9, flops: 1e14, bandwidth: 8e11, link: 3e10, price: 0.5, per_node: 4}\n")
    gpu = planning.assumptions(str(path), None, 0.4, None).gpu
    assert (gpu.name, gpu.memory, gpu.per_node, gpu.network) == ("Mine", 48e9, 4, GPUS["h100"].network)
    for text, message in (
        ("{name: Mine}", "memory: missing"),
        ("{name: Mine, memoryy: 1}", "memoryy: unknown field, did you mean memory?"),
        ("{name: Mine, memory: 80 GB}", "memory: got '80 GB', allowed: above 0"),
    ):
        path.write_text(text)
        with pytest.raises(UserError, match=re.escape(message)) as caught:
            planning.assumptions(str(path), None, 0.4, None)
        assert str(path) in str(caught.value)


def test_a_tokenizer_file_is_opened_and_an_absent_one_assumed(tmp_path: Path) -> None:
    tokenizer = RustTokenizer(models.WordLevel({f"w{number}": number for number in range(777)}, unk_token="w0"))
    grid = tmp_path / "g.yaml"
    text = (
        "defaults:\n  model: {base: 134m, family: dense}\n"
        f"  data: {{kind: text, path: gone, tokenizer: {{kind: file, path: {tmp_path}/tokenizer.json}}}}\n"
        "  train: {batch_rows: 8, tokens: 100000, lr: 1e-3}\n"
        "blocks: [{axes: {seed: [0]}}]\n"
    )
    grid.write_text(text)
    h100 = planning.assumptions("h100", None, 0.4, None)

    def planned() -> planning.CellPlan:
        return planning.plan(load_grid(str(grid), need_data=False), h100, Path("unused"))[0]

    absent = planned()
    assert (absent.vocabulary, absent.vocabulary_is_assumed) == (32000, True)
    document = planning.document(load_grid(str(grid), need_data=False), [absent], h100)
    assert any("vocabulary assumed in 1 cells" in line for line in plan_notes([absent], document))
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    present = planned()
    assert (present.vocabulary, present.vocabulary_is_assumed) == (778, False)  # one more for the end of text
    assert present.account.params_embedding == 2 * 778 * present.cell.model.size.dim


def test_a_plan_for_this_machine_uses_the_speed_of_its_runs(tmp_path: Path) -> None:
    grid = load_grid(str(GRIDS / "smoke.yaml"))
    with pytest.raises(UserError, match="no finished run"):
        this_machine.speeds(tmp_path)
    cell = next(cell for cell in grid.cells if cell.model.family == "dense")
    for host, device, flops in ((socket.gethostname(), "cpu", 5e9), ("other", "cpu", 1e12), (None, "NVIDIA", 1e13)):
        run = RunDir(tmp_path / "runs" / f"{cell.slug}-{host}")
        run.path.mkdir(parents=True)
        run.write_cell(cell, device=device)
        run.set_state("done", trained=True)
        write_json(run.state_path, run.state() | {"host": host or socket.gethostname()})
        run.append_train({"step": 1, "wall_s": 2.0, "train_flops": 2 * flops, "memory_bytes": 1})
    speeds = this_machine.speeds(tmp_path)
    assert [speed.flops for speed in speeds] == [5e9]
    assumed = planning.Assumptions(this_machine.cpu(speeds, 8e9), nodes=1, utilisation=1.0)
    plans = this_machine.with_speeds(planning.plan(grid, assumed, tmp_path / "cache"), speeds)
    for one in plans:
        assert one.gpu_hours == pytest.approx(one.total_flops / 5e9 / 3600)
    document = planning.document(grid, plans, assumed)
    assert "CPU of this machine" in plan_notes(plans, document)[0]
    document["cells"][0]["measured"] = {"wall_s": 2.0, "memory_bytes": 1e9}
    (measured,) = [note for note in plan_notes(plans, document) if "predicted" in note]
    assert "on the CPU of this machine; its run took 2 s and 1 GB (memory of its process)" in measured
    assert "GPU" not in measured
    heads = [str(column.header) for column in plan_table("smoke", plans, assumed).columns]
    sizes = [float(str(cell).removesuffix("m")) for cell in plan_table("smoke", plans, assumed).columns[1].cells]
    assert sizes == pytest.approx([one.account.params_total / 1e6 for one in plans], rel=5e-3)
    assert "CPU-hours" in heads
    assert not any("GPU" in head for head in heads)
