"""Schedules compared with their closed forms."""

import math

import pytest

from suite.cells import TrainConfig
from suite.identity import identity
from suite.train.schedules import branch_steps, decay_start, lr_factor


def config(**fields: object) -> TrainConfig:
    return TrainConfig.model_validate({"batch_rows": 1, "tokens": 1, "lr": 1.0, **fields})


def test_warmup_rises_linearly_to_one() -> None:
    rates = [lr_factor(config(schedule="constant", warmup=4), step, 10) for step in range(10)]
    assert rates == [0.25, 0.5, 0.75, 1.0] + [1.0] * 6


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_decay_starts_at_one_and_ends_at_final_lr(schedule: str) -> None:
    schedule_config = config(schedule=schedule, warmup=2, final_lr=0.1)
    assert lr_factor(schedule_config, 2, 12) == pytest.approx(1.0)
    assert lr_factor(schedule_config, 11, 12) == pytest.approx(0.1)


def test_linear_and_cosine_agree_with_their_formulas_midway() -> None:
    assert lr_factor(config(schedule="linear", final_lr=0.0), 3, 11) == pytest.approx(0.7)
    assert lr_factor(config(schedule="cosine", final_lr=0.0), 3, 11) == pytest.approx((1 + math.cos(0.3 * math.pi)) / 2)


def test_wsd_is_constant_until_its_decay() -> None:
    schedule_config = config(schedule="wsd", warmup=2, decay=0.3, final_lr=0.0, decay_shape="linear")
    assert decay_start(schedule_config, 20) == 14
    rates = [lr_factor(schedule_config, step, 20) for step in range(20)]
    assert rates == pytest.approx([0.5, 1.0] + [1.0] * 12 + [5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6, 0.0])


def test_the_1_sqrt_decay_follows_its_formula_and_ends_at_final_lr() -> None:
    schedule_config = config(schedule="wsd", decay=0.2, final_lr=0.1)
    rates = [lr_factor(schedule_config, step, 100) for step in range(100)]
    assert set(rates[:80]) == {1.0}
    for past in range(1, 21):
        assert rates[79 + past] == pytest.approx(0.1 + 0.9 * (1 - math.sqrt(past / 20)))
    assert rates[-1] == pytest.approx(0.1)


def test_a_decay_is_at_least_one_step_and_at_most_all() -> None:
    assert decay_start(config(schedule="wsd", decay=0.001), 10) == 9
    assert decay_start(config(schedule="wsd", decay=1.0), 10) == 0
    assert lr_factor(config(schedule="wsd", decay=0.001, final_lr=0.5), 0, 1) == pytest.approx(0.5)


def test_budgets_share_the_rate_until_the_smaller_starts_to_decay() -> None:
    schedule_config = config(schedule="wsd", warmup=5)
    small, large = ([lr_factor(schedule_config, step, total) for step in range(total)] for total in (40, 100))
    assert small[: decay_start(schedule_config, 40)] == large[: decay_start(schedule_config, 40)]
    assert small[decay_start(schedule_config, 40)] < large[decay_start(schedule_config, 40)]


def test_a_run_retains_the_checkpoints_from_which_branches_start() -> None:
    # Rows of 10 tokens, 2 a step: budgets of 200, 400 and 800 tokens are 10, 20 and 40 steps, decaying from 8, 16, 32.
    branches = [200, 400, 800]
    retained = [
        branch_steps(config(schedule="wsd", batch_rows=2, tokens=tokens, branches=branches), 10) for tokens in branches
    ]
    assert retained == [{8}, {8, 16}, {8, 16, 32}]
    assert branch_steps(config(schedule="wsd"), 10) == frozenset()


@pytest.mark.parametrize(
    ("fields", "complaint"),
    [
        ({"branches": [1, 2]}, "branches"),
        ({"schedule": "wsd", "branches": [2, 3]}, "branches"),
        ({"schedule": "wsd", "branches": [1, 2], "stop_past": 0.5}, "stop_past"),
    ],
)
def test_invalid_branches_are_refused(fields: dict[str, object], complaint: str) -> None:
    assert [field for field, _, _ in config(**fields).problems()] == [complaint]


def test_branches_are_outside_the_identity_and_the_decay_is_not() -> None:
    plain = config(schedule="wsd")
    assert identity(config(schedule="wsd", branches=[1, 2])) == identity(plain)
    assert identity(config(schedule="wsd", decay=0.1)) != identity(plain)
    assert identity(config(schedule="wsd", decay_shape="linear")) != identity(plain)
