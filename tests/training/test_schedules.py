"""Learning rate schedules: hand-computed values of each, and the choice among them."""

import pickle
import warnings

import pytest
from torch import nn, optim
from torch.optim.lr_scheduler import LambdaLR

from dinosr_hf.pretraining import ArgumentError, RunArguments
from dinosr_hf.training.schedules import SCHEDULES, constant, cosine, make_schedule, tri_stage

SHARES = {"warmup_share": 0.1, "hold_share": 0.4, "final_lr_scale": 0.01}


@pytest.mark.parametrize(
    ("step", "expected"),
    [
        (0, 0.01),  # 1 % of the peak
        (50, 0.505),
        (100, 1.0),
        (499, 1.0),
        (500, 1.0),
        (750, 0.1),  # half way down on a logarithmic scale
        (1000, 0.01),
        (5000, 0.01),
    ],
)
def test_tri_stage(step, expected):
    assert tri_stage(step, max_steps=1000, **SHARES) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("step", "expected"),
    [(0, 0.01), (50, 0.505), (100, 1.0), (325, 0.855018), (550, 0.505), (1000, 0.01), (5000, 0.01)],
)
def test_cosine(step, expected):
    factor = cosine(step, max_steps=1000, warmup_share=0.1, final_lr_scale=0.01)
    assert factor == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(("step", "expected"), [(0, 0.01), (50, 0.505), (100, 1.0), (1000, 1.0), (5000, 1.0)])
def test_constant(step, expected):
    assert constant(step, max_steps=1000, warmup_share=0.1) == pytest.approx(expected)


def make(name, max_steps=1000):
    shares = SHARES if name == "tri_stage" else {"warmup_share": SHARES["warmup_share"]}
    return make_schedule(RunArguments(schedule=name, max_steps=max_steps, **shares))


@pytest.mark.parametrize("name", SCHEDULES)
def test_all_schedules_have_the_same_warm_up(name):
    schedule = make(name)
    for step in range(100):
        assert schedule(step) == tri_stage(step, max_steps=1000, **SHARES)


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("max_steps", [1, 2, 3, 7])
def test_short_runs(name, max_steps):
    schedule = make(name, max_steps)
    assert all(0 < schedule(step) <= 1 for step in range(max_steps + 2))


def test_schedules_differ_after_the_warm_up():
    assert len({make(name)(800) for name in SCHEDULES}) == len(SCHEDULES)


@pytest.mark.parametrize("name", SCHEDULES)
def test_schedule_survives_pickling(name):
    again = pickle.loads(pickle.dumps(make(name)))
    assert [again(step) for step in range(0, 1100, 10)] == [make(name)(step) for step in range(0, 1100, 10)]


def test_schedule_drives_torch():
    optimizer = optim.SGD([nn.Parameter(nn.Linear(1, 1).weight.detach())], lr=2.0)
    scheduler = LambdaLR(optimizer, make("cosine", max_steps=10))
    rates = []
    for _ in range(10):
        rates.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    assert rates[0] == pytest.approx(0.02)
    assert rates[1] == pytest.approx(2.0)
    assert rates[1:] == sorted(rates[1:], reverse=True)


def test_unknown_schedule_is_refused():
    with pytest.raises(ArgumentError, match=r"schedule=linear is unknown\. Choose one of tri_stage, cosine, constant"):
        make_schedule(RunArguments(schedule="linear"))


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("cosine", {"hold_share": 0.2}, "hold_share=0.2 is ignored: schedule=cosine does not use it"),
        ("constant", {"hold_share": 0.2}, "hold_share=0.2 is ignored"),
        ("constant", {"final_lr_scale": 0.5}, "final_lr_scale=0.5 is ignored: schedule=constant does not use it"),
    ],
    ids=["cosine_hold", "constant_hold", "constant_final"],
)
def test_an_ignored_option_gives_a_warning(name, changes, message):
    with pytest.warns(UserWarning, match=message):
        make_schedule(RunArguments(schedule=name, **changes))


@pytest.mark.parametrize("name", SCHEDULES)
def test_defaults_give_no_warning(name):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        make_schedule(RunArguments(schedule=name))
