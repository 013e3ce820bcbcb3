"""Optimizer rules: which parameter is trained by which optimizer, and what Muon and row-wise SGD compute."""

import itertools
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from parallel_jobs import FAMILIES, cell_of
from pydantic import ValidationError
from tiny_cells import corpus_of, tiny_cell
from torch import Tensor, nn
from torch.nn import functional as F

from kernels.embedding_bag import RowGradients, embedding_bag
from suite import models
from suite.cells import Cell
from suite.models.precision import holds_matrices_only
from suite.models.transformer import Transformer
from suite.records import RunDir
from suite.train import optim
from suite.train.loop import Trainer
from suite.train.muon import NamedMuon
from suite.train.optim import Optimizer, Rule, match_rules, parameter_rules
from suite.train.tables.optimizers import RowSGD

ATTENTION = r"layers\.\d\.attention\.w[qkvo]\.weight"
SWIGLU = r"layers\.\d\.feed_forward\.w[123]\.weight"
MATRICES = {
    "dense": [ATTENTION, SWIGLU],
    "moe": [ATTENTION, r"layers\.\d\.feed_forward\.experts\.w[123]"],
    "moe_topk": [
        ATTENTION,
        r"layers\.\d\.feed_forward\.experts\.w[123]",
        r"layers\.\d\.feed_forward\.shared\.w[123]\.weight",
    ],
    "moe_topk softmax": [ATTENTION, r"layers\.\d\.feed_forward\.experts\.w[123]"],
    "pkm": [ATTENTION, SWIGLU, r"layers\.1\.feed_forward\.query\.weight"],
    "pkm batchnorm": [ATTENTION, SWIGLU, r"layers\.1\.feed_forward\.query\.weight"],
    "memory_plus": [ATTENTION, SWIGLU, r"layers\.\d\.feed_forward\.(query|gate|out)\.weight"],
    "peer": [ATTENTION, SWIGLU, r"layers\.1\.feed_forward\.query\.weight"],
    "peer frozen": [ATTENTION, SWIGLU, r"layers\.1\.feed_forward\.query\.weight"],
    "memory_plus shuffled": [ATTENTION, SWIGLU, r"layers\.\d\.feed_forward\.(query|gate|out)\.weight"],
    "ultramem_v2": [ATTENTION, SWIGLU, r"layers\.\d\.feed_forward\.memory\.(query|factor|out)\.weight"],
    "ngram_embedding": [ATTENTION, SWIGLU, r"input_embedding\.projection\.weight"],
    "token_table stem": [ATTENTION, SWIGLU],
    "token_table tails": [ATTENTION, SWIGLU, r"layers\.\d\.(before_attention|skip)\.(gate|context|up)\.weight"],
    "token_table values": [ATTENTION, SWIGLU],
    "engram": [ATTENTION, SWIGLU, r"layers\.\d\.before_attention\.(key|value)\.weight"],
    "engram_moe": [
        ATTENTION,
        r"layers\.\d\.feed_forward\.experts\.w[123]",
        r"layers\.\d\.before_attention\.(key|value)\.weight",
    ],
}
"""Names of the weight matrices inside blocks, by family."""


def model_of(cell: Cell) -> Transformer:
    return models.build(cell.model, 100, cell.seed)


def names(model: Transformer, cell: Cell, optimizer: str) -> set[str]:
    """Return the parameters of that optimizer."""
    parameters = [name for name, _ in model.named_parameters()]
    matched = match_rules(parameters, parameter_rules(model, cell.train))
    assert list(matched) == parameters
    return {name for name, rule in matched.items() if rule.optimizer == optimizer}


@pytest.mark.parametrize("case", FAMILIES)
def test_by_default_tables_use_row_wise_adamw_and_everything_else_adamw(case: str) -> None:
    cell = cell_of(case, 2)
    model = model_of(cell)
    tables = {f"tables.{number}.weight" for number in range(len(model.memory_tables()))}
    assert names(model, cell, "row_adamw") == tables
    assert names(model, cell, "adamw") == {name for name, _ in model.named_parameters()} - tables


@pytest.mark.parametrize("case", FAMILIES)
def test_muon_gets_the_matrices_inside_blocks_and_sgd_the_tables(case: str) -> None:
    cell = cell_of(case, 2, matrix_optimizer="muon", table_optimizer="sgd", value_lr=0.1)
    model = model_of(cell)
    parameters = {name for name, _ in model.named_parameters()}
    matrices = {name for name in parameters if any(re.fullmatch(pattern, name) for pattern in MATRICES[case])}
    tables = {name for name in parameters if name.startswith("tables.")}
    assert names(model, cell, "muon") == matrices
    assert names(model, cell, "row_sgd") == tables
    assert names(model, cell, "adamw") == parameters - matrices - tables


@pytest.mark.parametrize("case", FAMILIES)
def test_modules_that_hold_only_matrices_are_derived_from_the_model(case: str) -> None:
    """FSDP gathers them in bf16: attention, plain feed-forwards and stacks of experts."""
    model = model_of(cell_of(case, 2))
    kinds = {type(module).__name__ for module in model.modules() if holds_matrices_only(module)}
    experts = {
        "moe": {"Experts"},
        "moe_topk": {"Experts", "SwiGLU"},
        "moe_topk softmax": {"Experts"},
        "engram_moe": {"Experts"},
        "ngram_embedding": {"NgramEmbedding", "SwiGLU"},
        "token_table stem": {"SwiGLU", "Stem"},
    }
    every_layer_has_a_memory = case in ("memory_plus", "memory_plus shuffled", "ultramem_v2")
    assert kinds == {"Attention"} | experts.get(case, set() if every_layer_has_a_memory else {"SwiGLU"})


def test_the_first_matching_rule_wins_and_an_unmatched_parameter_raises() -> None:
    first = Rule(r"a\..*", "adamw", 1.0, 0.0, "rest")
    second = Rule(r".*\.weight", "adamw", 2.0, 0.0, "rest")
    assert match_rules(["a.weight", "b.weight"], [first, second]) == {"a.weight": first, "b.weight": second}
    with pytest.raises(ValueError, match=r"b\.bias"):
        match_rules(["a.bias", "b.bias"], [first, second])


def orthogonalised(matrix: Tensor) -> Tensor:
    """Compute the five quintic Newton-Schulz steps of Muon in float64."""
    x = matrix.double()
    x = x / x.norm()
    for _ in range(5):
        gram = x @ x.mT
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x


def random(shape: tuple[int, ...], seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_muon_is_nesterov_momentum_orthogonalised_and_scaled() -> None:
    lr, decay = 0.02, 0.1
    parameter = nn.Parameter(random((24, 40), 0))
    muon = NamedMuon({"w": parameter}, decay)
    expected, momentum = parameter.detach().double(), torch.zeros(24, 40, dtype=torch.float64)
    for step in range(3):
        gradient = random((24, 40), step + 1)
        before = parameter.detach().clone()
        parameter.grad = gradient
        muon.step(lr)
        momentum = 0.95 * momentum + 0.05 * gradient
        update = 0.2 * math.sqrt(40) * orthogonalised(0.05 * gradient + 0.95 * momentum)
        expected = before.double() * (1 - lr * decay) - lr * update
        # torch orthogonalises in bfloat16: its rounding is 2^-9, over five steps
        assert (parameter.detach() - expected).norm() < 0.02 * (lr * update).norm()
    assert muon.momentum["w"].sub(momentum).abs().max() < 1e-6


def test_muon_updates_each_matrix_of_a_stack_like_torch() -> None:
    stack = nn.Parameter(random((3, 8, 12), 0))
    alone = [nn.Parameter(matrix.clone()) for matrix in stack.detach()]
    muon = NamedMuon({"experts": stack}, 0.1)
    plain = torch.optim.Muon(alone, lr=0.02, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    for step in range(2):
        stack.grad = random((3, 8, 12), step + 1)
        for matrix, gradient in zip(alone, stack.grad, strict=True):
            matrix.grad = gradient.clone()
        muon.step(0.02)
        plain.step()
    assert torch.equal(stack.detach(), torch.stack([matrix.detach() for matrix in alone]))


def trainer_of(cell: Cell, cache: Path, folder: Path) -> Trainer:
    run = RunDir(folder)
    run.path.mkdir(parents=True, exist_ok=True)
    return Trainer(cell, corpus_of(cell, cache), run)


def test_muon_does_not_change_the_updates_of_embeddings_norms_and_biases(cache: Path, tmp_path: Path) -> None:
    """After one step, exactly the matrices differ from a run without Muon."""
    stepped = {}
    for name in ("adamw", "muon"):
        trainer = trainer_of(tiny_cell("memory_plus", matrix_optimizer=name, warmup=0), cache, tmp_path / name)
        norms = trainer.train_step()
        stepped[name] = (norms["grad_norm"], dict(trainer.model.named_parameters()))
        matrices = set(trainer.model.hidden_matrices())
    assert stepped["adamw"][0] == stepped["muon"][0]
    for name, parameter in stepped["adamw"][1].items():
        assert torch.equal(parameter, stepped["muon"][1][name]) == (name not in matrices), name


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_sgd_updates_only_the_rows_read_by_their_clipped_gradient(
    decay: float, cache: Path, tmp_path: Path, wide: None
) -> None:
    options: dict[str, Any] = {"warmup": 0, "schedule": "constant", "clip": 0.05, "value_weight_decay": decay}
    cell = tiny_cell("peer", table_optimizer="sgd", value_lr=3.0, **options)
    cell = Cell.model_validate(cell.model_dump() | {"model": cell.model.model_dump() | {"half_keys": 24, "top_k": 2}})
    trainer = trainer_of(cell, cache, tmp_path)
    batch = trainer.loader.batch(0)
    twin = models.build(cell.model, trainer.corpus.vocab_size, cell.seed)  # its tables have dense gradients
    F.cross_entropy(twin(batch.tokens_BT, batch.segments_BT).flatten(0, 1), batch.targets_BT.flatten()).backward()
    gradients = [table.weight.grad for table in twin.memory_tables()]
    norm = sum(gradient.square().sum() for gradient in gradients if gradient is not None) ** 0.5
    assert trainer.train_step()["value_grad_norm"] == pytest.approx(float(norm), rel=1e-9)
    for before, table, gradient in zip(twin.memory_tables(), trainer.model.memory_tables(), gradients, strict=True):
        assert gradient is not None
        read = gradient.ne(0).any(1)
        assert 0 < read.sum() < len(read)
        clipped = gradient * (0.05 / (norm + 1e-6))
        expected = (1 - 3.0 * decay) * before.weight - 3.0 * clipped
        torch.testing.assert_close(table.weight[read], expected[read], rtol=1e-9, atol=1e-12)
        assert torch.equal(table.weight[~read], before.weight[~read])
        assert trainer.optimizer.never_read(table) == int((~read).sum())


@pytest.mark.parametrize("lookups", [6, 40], ids=["few rows", "most rows"])
def test_sgd_of_rows_whose_number_stays_on_the_device_equals_the_formula(
    lookups: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The Triton kernels run in the interpreter; the last row is read in one case and not in the other."""
    monkeypatch.setenv("KERNELS_BACKEND", "triton")
    draw = torch.Generator().manual_seed(0)
    table_RD = torch.randn(32, 8, generator=draw)
    gradients = RowGradients(table_RD)
    sgd = RowSGD(table_RD, gradients, weight_decay=0.1)
    before_RD, expected_RD = table_RD.clone(), torch.zeros(32, 8)
    for _ in range(2):  # two layers, or two micro-batches
        indices_NS = torch.randint(0, 31, (lookups // 2, 1), generator=draw)
        indices_NS[0] = 31 if lookups == 40 else 30
        source_ND = torch.randn(lookups // 2, 8, generator=draw)
        read_RD = table_RD.clone().requires_grad_()
        embedding_bag(read_RD, indices_NS, torch.ones_like(indices_NS, dtype=torch.float32), gradients).backward(
            source_ND
        )
        expected_RD.index_add_(0, indices_NS[:, 0], source_ND)
    assert gradients.leaves_counts
    gradients.scale_(0.5)
    sgd.step(lr=0.3)
    is_read_R = expected_RD.ne(0).any(1)
    expected_RD = torch.where(is_read_R[:, None], 0.97 * before_RD - 0.15 * expected_RD, before_RD)
    torch.testing.assert_close(table_RD, expected_RD, rtol=1e-5, atol=1e-6)
    assert table_RD[~is_read_R].equal(before_RD[~is_read_R])
    assert sgd.touched_R.equal(is_read_R)
    assert not len(gradients.merged()[0])


def test_each_clipping_group_is_clipped_to_its_own_norm(monkeypatch: pytest.MonkeyPatch) -> None:
    cell = cell_of("memory_plus", 2, clip=0.01, table_optimizer="dense")
    model = model_of(cell)
    rules = [Rule(r"embedding\..*", "adamw", 1e-3, 0.0, "embedding"), *parameter_rules(model, cell.train)]
    monkeypatch.setattr(optim, "parameter_rules", lambda *_: rules)
    optimizer = Optimizer(model, cell.train)
    gradients = {name: torch.full_like(p, number + 1.0) for number, (name, p) in enumerate(model.named_parameters())}
    for name, parameter in model.named_parameters():
        parameter.grad = gradients[name].clone()
    clipped: dict[str, Tensor] = {}
    monkeypatch.setattr(
        optimizer.adamw, "step", lambda: clipped.update({n: p.grad.clone() for n, p in optimizer.parameters.items()})
    )
    norms = optimizer.step()
    groups = {"embedding": {"embedding.weight"}, "values": {"tables.0.weight"}}
    groups["rest"] = gradients.keys() - groups["embedding"] - groups["values"]
    assert norms.keys() == groups.keys()
    for group, members in groups.items():
        norm = sum(float(gradients[name].square().sum()) for name in members) ** 0.5
        assert norms[group] == pytest.approx(norm, rel=1e-5)
        for name in members:
            torch.testing.assert_close(clipped[name], gradients[name] * (0.01 / norm), rtol=1e-4, atol=0.0)


def test_tables_in_a_clipping_group_with_other_parameters_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    cell = cell_of("pkm", 2)
    monkeypatch.setattr(optim, "parameter_rules", lambda *_: [Rule(".*", "adamw", 1e-3, 0.0, "rest")])
    with pytest.raises(ValueError, match="rest"):
        Optimizer(model_of(cell), cell.train)


def test_frozen_parameters_are_in_no_group() -> None:
    cell = cell_of("memory_plus", 2)
    model = model_of(cell)
    model.embedding.requires_grad_(False)
    model.memory_tables()[0].requires_grad_(False)
    optimizer = Optimizer(model, cell.train)
    assert "embedding.weight" not in optimizer.parameters
    assert not optimizer.tables
    assert optimizer.state().keys() == optimizer.parameters.keys()


@pytest.mark.parametrize(
    ("train", "words"),
    [
        ({"table_optimizer": "sgd"}, "train.value_lr: got None"),
        ({"table_optimizer": "sgd", "value_lr": 1.0, "value_lazy": True}, "train.value_lazy: got True"),
        ({"matrix_optimizer": "sgd"}, "matrix_optimizer"),
    ],
)
def test_an_invalid_optimizer_option_is_named(train: dict[str, Any], words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        tiny_cell("pkm", **train)


@pytest.mark.parametrize("case", FAMILIES)
def test_every_family_takes_steps_in_either_precision_with_every_optimizer(
    case: str, cache: Path, tmp_path: Path
) -> None:
    tables = ("row_wise", "dense", "sgd") if cell_of(case, 4).model.table_side else ("row_wise",)
    losses: dict[str, set[float]] = {}
    for precision, matrices, values in itertools.product(("fp32", "bf16"), ("adamw", "muon"), tables):
        options = {"precision": precision, "matrix_optimizer": matrices, "table_optimizer": values, "value_lr": 1e-2}
        cell = cell_of(case, 4, **options)
        trainer = Trainer(cell, corpus_of(cell, cache), RunDir(tmp_path / f"{precision}-{matrices}-{values}"))
        first = trainer.train_step()["loss"]
        assert math.isfinite(trainer.train_step()["loss"])
        losses.setdefault(precision, set()).add(round(first, 2))
    assert all(max(found) - min(found) < 0.05 for found in losses.values()), losses


def test_the_default_optimizer_leaves_every_hash_unchanged() -> None:
    assert tiny_cell("pkm", matrix_optimizer="adamw").hash8 == tiny_cell("pkm").hash8
    assert tiny_cell("pkm", matrix_optimizer="muon").hash8 != tiny_cell("pkm").hash8


def test_the_rate_of_tables_falls_linearly_and_is_multiplied_by_the_schedule(cache: Path, tmp_path: Path) -> None:
    options = {"value_lr": 4e-3, "value_lr_end": 0.25, "lr": 1e-3, "schedule": "cosine", "final_lr": 0.1, "warmup": 0}
    trainer = trainer_of(tiny_cell("memory_plus", **options), cache, tmp_path)
    steps = trainer.steps
    for step in range(3):
        logged = trainer.train_step()
        cosine = 0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * step / (steps - 1)))
        assert logged["lr"] == pytest.approx(1e-3 * cosine, rel=1e-12)
        assert logged["value_lr"] == pytest.approx(1e-3 * (1 + 3 * (1 - step / steps)) * cosine, rel=1e-12)
    wsd = {"schedule": "wsd", "tokens": 4096, "epochs": None, "branches": [4096]}
    with pytest.raises(ValidationError, match=r"train.value_lr_end: got 0.25"):
        tiny_cell("memory_plus", value_lr_end=0.25, **wsd)
