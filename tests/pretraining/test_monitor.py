"""The collapse monitor: when it speaks, what it says, when it is quiet, and that a restart changes none of it."""

import copy
import json
import math
from dataclasses import dataclass

import pytest
import torch

from dinosr_hf import DinoSRForPreTraining
from dinosr_hf.pretraining.metrics import MetricSums
from dinosr_hf.pretraining.monitor import CollapseMonitor
from tiny import deterministic_config, tiny_config

# 3 layers, of which codebooks 1 and 2 of 7 codewords belong to layers 2 and 3.
CONFIG = tiny_config()
HEALTHY = {
    "target_perplexities": [4.0, 5.0],
    "prediction_perplexities": [4.1, 5.1],
    "codebook_active_codewords": [6, 6],
    "target_variations": [0.4, 0.5],
    "feature_variation": 0.3,
    "masked_frames": 500.0,
}
# Under the bounds: 0.2 * 7 = 1.4 and 0.3 * 7 = 2.1 codewords, and a variation of 0.02.
COLLAPSES = {
    "target_perplexities": [1.2, 1.1],
    "prediction_perplexities": [1.2, 1.1],
    "codebook_active_codewords": [2, 1],
    "target_variations": [0.019, 0.001],
    "feature_variation": 0.0123,
}


@dataclass
class Bounds:
    collapse_perplexity: float = 0.2
    collapse_active: float = 0.3
    collapse_variation: float = 0.02
    collapse_patience: int = 3


def monitor_of(grace_steps=0, **bounds):
    return CollapseMonitor(CONFIG, Bounds(**bounds), grace_steps=grace_steps)


def said(monitor, *lines, first_step=1):
    """What the monitor says of each of the lines, which change the healthy one."""
    return [
        monitor.check({"step": step, **HEALTHY, **changes}) for step, changes in enumerate(lines, start=first_step)
    ]


def test_healthy_lines_are_met_with_silence():
    monitor = monitor_of()
    assert said(monitor, *[{}] * 20) == [[]] * 20
    assert not monitor.has_collapsed and monitor.standing() == []


@pytest.mark.parametrize("figure", COLLAPSES)
def test_each_figure_is_watched(figure):
    monitor = monitor_of()
    collapse = {figure: COLLAPSES[figure]}
    *before, last = said(monitor, {}, {}, collapse, collapse, collapse)
    assert before == [[]] * 4
    assert (
        len(last) == 1
        and last[0].startswith("Step 5: ")
        and last[0].count("since step 3") == (1 if figure == "feature_variation" else 2)
    )
    assert monitor.has_collapsed


def test_a_warning_says_which_codebook_which_bound_since_when_and_what_helps():
    monitor = monitor_of()
    *_, [warning] = said(monitor, {}, *[{"target_perplexities": [4.0, 1.25]}] * 3)
    assert warning == (
        "Step 4: the run looks collapsed. The target perplexity is under 1.4 (collapse_perplexity=0.2 of 7 codewords):"
        " codebook 2 (layer 3) at 1.2 since step 2. What usually helps: a lower codebook_decay for the first hundreds"
        " of steps (codebook_end_decay and codebook_end_decay_step bring it back), a greater step_seconds, so that"
        " more frames fall on a codeword, or codebook_revival_share=0.1, by which codewords out"
        " of use start anew; a lower learning_rate or a greater warmup_share."
    )
    assert monitor.standing() == [warning.removeprefix("Step 4: ")]


def test_a_warning_has_all_codebooks_each_since_its_own_step():
    monitor = monitor_of()
    first, both = {"target_variations": [0.001, 0.5]}, {"target_variations": [0.0005, 0.004]}
    *_, [second_warning] = said(monitor, first, first, both, both, both)
    assert "codebook 2 (layer 3) at 0.004 since step 3" in second_warning and "layer 2" not in second_warning
    [standing] = monitor.standing()
    assert "codebook 1 (layer 2) at 0.0005 since step 1; codebook 2 (layer 3) at 0.004 since step 3" in standing
    assert "(collapse_variation=0.02)" in standing


def test_the_convolutions_are_no_codebook():
    *_, [warning] = said(monitor_of(), *[{"feature_variation": 0.0123}] * 3)
    assert "The variation over time of the convolutions is under 0.02 (collapse_variation=0.02): at 0.0123" in warning
    assert "codebook" not in warning


def test_it_is_quiet_while_it_lasts_and_says_when_it_is_over():
    monitor = monitor_of()
    low = {"codebook_active_codewords": [6, 1]}
    *lines, last = said(monitor, {}, low, low, low, low, low, {}, {}, {})
    assert [len(texts) for texts in lines] == [0, 0, 0, 1, 0, 0, 0, 0]
    assert last == [
        "Step 9: number of codewords in use, codebook 2 (layer 3), is back at 6.0, over its bound of 2.1, which it was"
        " under since step 2."
    ]
    assert not monitor.has_collapsed and monitor.standing() == []
    again = said(monitor, low, low, low, first_step=10)
    assert [len(texts) for texts in again] == [0, 0, 1] and "since step 10" in again[-1][0]


def test_it_takes_lines_running():
    monitor = monitor_of()
    low = {"feature_variation": 0.001}
    assert not any(said(monitor, *[low, low, {}] * 5))
    # ... on the way back, too
    assert any(said(monitor, low, low, low))
    assert not any(said(monitor, *[{}, {}, low] * 5))
    assert monitor.has_collapsed


def test_patience_of_one_line():
    assert [len(texts) for texts in said(monitor_of(collapse_patience=1), {"feature_variation": 0.0}, {})] == [1, 1]


def test_the_first_steps_do_not_count():
    low = {"target_perplexities": [1.0, 1.0]}
    lines = said(monitor_of(grace_steps=4), *[low] * 8)
    assert [len(texts) for texts in lines] == [0, 0, 0, 0, 0, 0, 1, 0]
    assert "since step 5" in lines[6][0]
    # by default they are 50
    assert not any(said(CollapseMonitor(CONFIG, Bounds()), *[low] * 52))


@pytest.mark.parametrize("bound", ["collapse_perplexity", "collapse_active", "collapse_variation"])
def test_a_bound_of_zero_is_none(bound):
    monitor = monitor_of(**{bound: 0.0})
    *_, last = said(monitor, *[COLLAPSES] * 3)
    expected = {"collapse_perplexity": 3, "collapse_active": 4, "collapse_variation": 3}[bound]
    assert len(last) == expected and bound not in " ".join(last)


def test_what_is_no_number_is_no_sign_of_health():
    *_, last = said(monitor_of(), *[{"feature_variation": math.nan}] * 3)
    assert "at nan since step 1" in last[0]


def test_few_frames_cannot_fall_on_many_codewords():
    few = {"codebook_active_codewords": [1, 1], "target_perplexities": [1.0, 1.0], "prediction_perplexities": [3.0, 3]}
    assert not any(said(monitor_of(), *[few | {"masked_frames": 3.0}] * 5))
    assert any(said(monitor_of(), *[few | {"masked_frames": 100.0}] * 5))


def test_lines_about_something_else_are_left_alone():
    monitor = monitor_of()
    low = {"step": 1, **HEALTHY, "feature_variation": 0.0}
    for line in (low, {"step": 1, "eval_loss": 2.0}, {**low, "masked_frames": 0.0}, low, {"step": 2}):
        assert monitor.check(line) == []
    assert len(monitor.check(low)) == 1


@pytest.mark.parametrize("at", range(9))
def test_a_restart_says_what_would_have_been_said(at):
    low = {"target_variations": [0.4, 0.0001]}
    lines = [{}, low, low, low, low, {}, {}, {}, {}]
    whole = said(monitor_of(), *lines)
    before = monitor_of()
    start = said(before, *lines[:at])
    after = monitor_of()
    after.load_state_dict(json.loads(json.dumps(before.state_dict())))
    assert start + said(after, *lines[at:], first_step=at + 1) == whole
    assert sum(map(len, whole)) == 2


def test_a_restart_forgets_no_warning():
    monitor, resumed = monitor_of(), monitor_of()
    said(monitor, *[COLLAPSES] * 3)
    assert not resumed.has_collapsed
    resumed.load_state_dict(monitor.state_dict())
    assert resumed.has_collapsed and resumed.standing() == monitor.standing() != []


def test_the_state_of_another_model_is_refused():
    monitor = monitor_of()
    state = copy.deepcopy(monitor.state_dict())
    state["target_perplexities"].append(state["target_perplexities"][0])
    with pytest.raises(ValueError, match=r"'target_perplexities': 3.*but this monitor watches.*of the same model"):
        monitor.load_state_dict(state)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"collapse_perplexity": 1.0}, "collapse_perplexity=1.0 is out of range: it must be less than 1"),
        ({"collapse_active": -0.1}, "collapse_active=-0.1 is out of range"),
        ({"collapse_variation": 2.0}, "collapse_variation=2.0 is out of range"),
        ({"collapse_patience": 0}, "collapse_patience=0 is out of range: it must be at least 1 line"),
        ({"grace_steps": -1}, "grace_steps=-1 is out of range: it must be at least 0"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_values_out_of_range(changes, message):
    with pytest.raises(ValueError, match=message):
        monitor_of(**changes)


def tones(generator):
    """Four utterances of tones of twelve frames each, so that neighbours tell what a masked frame is."""
    pitches = torch.tensor([0.02, 0.05, 0.11, 0.2])[torch.randint(4, (4, 9), generator=generator)]
    phases = 2 * torch.pi * pitches.repeat_interleave(240, dim=1)[:, :2001].cumsum(dim=1)
    return phases.sin() + 0.05 * torch.randn(4, 2001, generator=generator)


def noise(generator):
    """Four utterances in which nothing tells a masked frame."""
    return torch.randn(4, 2001, generator=generator)


def warnings_of_training(speech, learning_rate, num_steps):
    """What the monitor says of a short run with a line of metrics a step, and the last line."""
    torch.manual_seed(0)
    averages = {"codebook_decay": 0.5, "codebook_end_decay": 0.5, "ema_decay": 0.9, "ema_end_decay": 0.9}
    config = deterministic_config(codebook_size=32, **averages)
    model = DinoSRForPreTraining(config).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=learning_rate)
    bounds = Bounds(collapse_perplexity=0.05, collapse_active=0.15, collapse_variation=0.02)
    monitor = CollapseMonitor(config, bounds, grace_steps=0)
    generator = torch.Generator().manual_seed(1)
    said, metrics = [], {}
    for step in range(1, num_steps + 1):
        output = model(speech(generator), generator=generator)
        output.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        model.update_targets(step)
        sums = MetricSums(config.num_codebooks, config.codebook_size, torch.device("cpu"))
        sums.add(output, 4 * 2001, 0)
        metrics = {"step": step, **sums.compute(lambda tensor: tensor)}
        said += monitor.check(metrics)
    return said, metrics


def test_a_run_that_learns_is_met_with_silence():
    said, metrics = warnings_of_training(tones, learning_rate=3e-3, num_steps=40)
    assert said == []
    assert metrics["loss"] < 2.8 and metrics["target_perplexity"] > 12


def test_a_learning_rate_that_is_too_high_is_announced():
    said, metrics = warnings_of_training(tones, learning_rate=3e-2, num_steps=24)
    assert metrics["loss"] < 1.5  # which looks like learning
    text = "\n".join(said)
    assert "variation over time of the teacher is under 0.02" in said[0] and "codebook 1 (layer 2) at" in said[0]
    assert "number of codewords in use is under 4.8 (collapse_active=0.15 of 32 codewords): codebook 2" in text
    assert "a lower learning_rate" in text


def test_a_teacher_without_variation_is_announced_though_perplexities_are_high():
    said, metrics = warnings_of_training(noise, learning_rate=1e-3, num_steps=36)
    assert metrics["target_perplexity"] > 16 and metrics["active_codewords"] > 20
    assert said and all("collapse_variation" in text for text in said)
