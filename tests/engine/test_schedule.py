"""What looks wrong in a schedule is said at the start of the run."""

import pytest

from stage_interactor.config import load_config
from stage_interactor.engine.schedule import doubts


@pytest.mark.parametrize(
    ("warmup", "length", "told"),
    [
        (50, 30, "warmup_iters=3 "),
        (50, 499, "warmup_iters=49 "),
        (2, 5, "warmup_iters=1 "),
        (50, 500, None),
        (1, 2, None),
        (0, 1, None),
        (500, 87960, None),
    ],
)
def test_a_warm_up_of_more_than_a_tenth_is_told_with_one_that_is_not(warmup, length, told):
    found = doubts({"warmup_iters": warmup, "max_iter": length}, length)
    assert bool(found) == bool(told) and all(told in line and "\n" not in line for line in found)


def test_a_schedule_of_another_length_than_the_run_is_told():
    (told,) = doubts({"warmup_iters": 5, "max_iter": 100}, 200)
    assert "scheduled for 100 iterations, the run has 200" in told
    assert doubts({"_target_": "a.Scheduler"}, 200) == []  # somebody else's, without these keys


@pytest.mark.parametrize("name", ["stage_interactor_r50_100q_12ep.py", "quickstart.py"])
def test_nothing_is_doubted_in_a_run_of_its_own_length(name):
    config = load_config(name)
    assert doubts(config.lr_multiplier, config.train.max_iter) == []
    assert len(doubts(load_config(name, ["train.max_iter=20"]).lr_multiplier, 20)) == 1
