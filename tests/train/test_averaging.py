"""The average of weights that probes measure: its values, resuming, and that training does not notice it."""

from pathlib import Path
from typing import Any

import pytest
import torch
from kills import killed_at
from pydantic import ValidationError
from test_loop import assert_same, lines, trainer_of, weights
from tiny_cells import corpus_of, tiny_cell
from torch import Tensor

from suite.cells import Cell
from suite.errors import UserError
from suite.records import RunDir
from suite.train.averaging import SPACING
from suite.train.loop import train
from suite.train.parallel import World
from suite.train.probe import Prober


def sparse_cell(family: str = "engram", **train: Any) -> Cell:
    """A cell whose steps read few of its table's rows, so that the others wait for a flush."""
    cell = tiny_cell(family, **{"probes": 3, **train})
    if family != "engram":
        return cell
    return cell.model_copy(update={"model": cell.model.model_copy(update={"head_rows": 20_011})})


def snapshots(cell: Cell, cache: Path, folder: Path) -> list[dict[str, Tensor]]:
    """Return what a run without an average saves after every step, in float64."""
    trainer = trainer_of(cell, cache, folder)
    taken = []
    while trainer.step < trainer.steps:
        trainer.train_step()
        trainer.optimizer.state()  # as before a checkpoint: all rows are at this step
        state = trainer.model.state_dict().items()
        taken.append({name: value.double().clone() for name, value in state if value.is_floating_point()})
    return taken


@pytest.mark.parametrize("family", ["pkm query_batchnorm", "engram", "moe_topk"])
def test_the_average_is_that_of_all_weights_and_rows(family: str, cache: Path, tmp_path: Path) -> None:
    cell, share = sparse_cell(family), 0.2
    taken = snapshots(cell, cache, tmp_path / "plain")[::SPACING]
    count = len(taken)
    # Each snapshot enters with weight 1 - (1 - 1/n)^(1/share - 1), and later ones reduce it.
    factors = [(1 - 1 / n) ** (1 / share - 1) for n in range(1, count + 1)]
    shares = torch.tensor([1 - factor for factor in factors], dtype=torch.float64)
    for at in range(count):
        shares[at] *= torch.tensor(factors[at + 1 :], dtype=torch.float64).prod()
    assert count >= 4
    assert float(shares.sum()) == pytest.approx(1)

    train(averaged := with_average(cell, share), corpus_of(averaged, cache), make(tmp_path / "averaged"))
    average = weights(tmp_path / "averaged")["average"]
    assert average.keys() == taken[0].keys()
    for name, value in average.items():
        expected = sum(float(weight) * state[name] for weight, state in zip(shares, taken, strict=True))
        torch.testing.assert_close(value.double(), expected, rtol=1e-5, atol=1e-6)


def test_the_mean_age_of_the_averaged_weights_is_the_share_of_the_snapshots() -> None:
    from suite.train.averaging import decay

    mean_position = 0.0
    for n in range(1, 2001):
        mean_position = decay(n, 0.1) * mean_position + (1 - decay(n, 0.1)) * n
    assert 1 - mean_position / 2000 == pytest.approx(0.1, rel=0.01)


@pytest.mark.parametrize(("family", "options"), [("engram", {}), ("pkm query_batchnorm", {"table_device": "host"})])
def test_averaging_changes_no_bit_of_training_and_raw_probes(
    family: str, options: dict[str, Any], cache: Path, tmp_path: Path
) -> None:
    cell = sparse_cell(family, **options)
    for name, variant in (("plain", cell), ("averaged", with_average(cell, 0.2))):
        train(variant, corpus_of(variant, cache), make(tmp_path / name))
    recorded = lines(tmp_path / "averaged")
    assert sum("averaged" in line for line in recorded) == 3
    assert [{key: value for key, value in line.items() if key != "averaged"} for line in recorded] == lines(
        tmp_path / "plain"
    )
    state = weights(tmp_path / "averaged")
    del state["average"]
    assert_same(state, weights(tmp_path / "plain"))


def test_the_recorded_scores_are_those_of_a_model_with_the_averaged_weights(cache: Path, tmp_path: Path) -> None:
    cell = with_average(sparse_cell("engram"), 0.2)
    train(cell, corpus_of(cell, cache), make(tmp_path / "run"))
    last = [line for line in lines(tmp_path / "run") if "averaged" in line][-1]
    fresh = trainer_of(with_average(cell, None), cache, tmp_path / "fresh")
    state = fresh.model.state_dict() | weights(tmp_path / "run")["average"]
    fresh.model.load_state_dict(state)
    assert Prober(corpus_of(cell, cache)).run(fresh.model) == last["averaged"]
    assert last["averaged"]["eval_loss"] != last["eval_loss"]


def test_a_killed_run_resumes_to_the_same_average(cache: Path, tmp_path: Path) -> None:
    cell = with_average(sparse_cell("engram"), 0.2)
    corpus = corpus_of(cell, cache)
    train(cell, corpus, make(tmp_path / "whole"))
    with killed_at(6):  # the newest checkpoint is that of step 4
        train(cell, corpus, make(tmp_path / "killed"))
    train(cell, corpus, RunDir(tmp_path / "killed"))
    assert lines(tmp_path / "killed") == lines(tmp_path / "whole")
    assert_same(weights(tmp_path / "killed"), weights(tmp_path / "whole"))


def test_unsupported_settings_are_refused_by_name() -> None:
    with pytest.raises(ValidationError, match=r"train\.probe_average: got 0\.1, allowed: None without train\.probes"):
        tiny_cell(probe_average=0.1)
    with pytest.raises(ValidationError, match=r"train\.value_precision: got 'bf16', allowed: fp32 with probe_average"):
        tiny_cell("pkm", probes=2, probe_average=0.1, value_precision="bf16")
    with pytest.raises(ValidationError, match=r"train\.probe_average: got 0\.1, allowed: None with trainable lora"):
        tiny_cell(probes=2, probe_average=0.1, init_from="x", trainable={"kind": "lora", "rank": 2})
    with pytest.raises(UserError, match=r"train\.probe_average: got 0\.1, allowed: None where several processes"):
        World(size=2, distributed=True).check(tiny_cell(probes=2, probe_average=0.1))


def test_the_option_is_part_of_a_cells_identity_and_its_default_is_not() -> None:
    assert tiny_cell(probes=2, probe_average=0.1).hash8 != tiny_cell(probes=2).hash8
    assert tiny_cell(probes=2, probe_average=None).hash8 == tiny_cell(probes=2).hash8


def with_average(cell: Cell, share: float | None) -> Cell:
    return cell.model_copy(update={"train": cell.train.model_copy(update={"probe_average": share})})


def make(folder: Path) -> RunDir:
    folder.mkdir(parents=True)
    return RunDir(folder)
