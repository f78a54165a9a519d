"""The collapse monitor: when it warns, the text, when it is quiet, and that a resumed run changes none of it."""

import copy
import json
import math

import pytest
import torch

from dinosr_hf import DinoSRForPreTraining
from dinosr_hf.pretraining import RunArguments
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
# Below the bounds: 0.2 * 7 = 1.4 and 0.3 * 7 = 2.1 codewords, and a variation of 0.02.
COLLAPSES = {
    "target_perplexities": [1.2, 1.1],
    "prediction_perplexities": [1.2, 1.1],
    "codebook_active_codewords": [2, 1],
    "target_variations": [0.019, 0.001],
    "feature_variation": 0.0123,
}


def bounds_of(**changes):
    return RunArguments(
        **{"collapse_perplexity": 0.2, "collapse_active": 0.3, "collapse_variation": 0.02, "collapse_patience": 3}
        | changes
    )


def monitor_of(grace_steps=0, **bounds):
    return CollapseMonitor(CONFIG, bounds_of(**bounds), grace_steps=grace_steps)


def news_of(monitor, *lines, first_step=1):
    """Return what the monitor reports for each line; lines are changes of the healthy one."""
    return [
        monitor.check({"step": step, **HEALTHY, **changes}) for step, changes in enumerate(lines, start=first_step)
    ]


def test_healthy_lines_give_no_warning():
    monitor = monitor_of()
    assert news_of(monitor, *[{}] * 20) == [[]] * 20
    assert monitor.standing() == []


@pytest.mark.parametrize("figure", COLLAPSES)
def test_each_figure_is_watched(figure):
    monitor = monitor_of()
    collapse = {figure: COLLAPSES[figure]}
    *before, last = news_of(monitor, {}, {}, collapse, collapse, collapse)
    assert before == [[]] * 4
    assert (
        len(last) == 1
        and last[0].startswith("Step 5: ")
        and last[0].count("since step 3") == (1 if figure == "feature_variation" else 2)
    )
    assert monitor.standing()


def test_a_warning_names_codebook_bound_step_and_remedies():
    monitor = monitor_of()
    *_, [warning] = news_of(monitor, {}, *[{"target_perplexities": [4.0, 1.25]}] * 3)
    assert warning == (
        "Step 4: the run looks collapsed. The target perplexity is below 1.4 (collapse_perplexity=0.2 of 7 codewords):"
        " codebook 2 (layer 3) at 1.2 since step 2. What usually helps: a lower codebook_decay for the first hundreds"
        " of steps (codebook_end_decay and codebook_end_decay_step raise it again), a larger step_seconds, so that"
        " more frames fall on a codeword, or codebook_revival_share=0.1, which lets unused codewords start anew; a"
        " lower learning_rate or a larger warmup_share."
    )
    assert monitor.standing() == [warning.removeprefix("Step 4: ")]


def test_a_warning_names_all_codebooks_each_with_its_own_step():
    monitor = monitor_of()
    first, both = {"target_variations": [0.001, 0.5]}, {"target_variations": [0.0005, 0.004]}
    *_, [second_warning] = news_of(monitor, first, first, both, both, both)
    assert "codebook 2 (layer 3) at 0.004 since step 3" in second_warning and "layer 2" not in second_warning
    [standing] = monitor.standing()
    assert "codebook 1 (layer 2) at 0.0005 since step 1; codebook 2 (layer 3) at 0.004 since step 3" in standing
    assert "(collapse_variation=0.02)" in standing


def test_the_warning_for_the_convolutions_names_no_codebook():
    *_, [warning] = news_of(monitor_of(), *[{"feature_variation": 0.0123}] * 3)
    assert "The variation over time of the convolutions is below 0.02 (collapse_variation=0.02): at 0.0123" in warning
    assert "codebook" not in warning


def test_a_collapse_is_reported_once_and_its_end_once():
    monitor = monitor_of()
    low = {"codebook_active_codewords": [6, 1]}
    *lines, last = news_of(monitor, {}, low, low, low, low, low, {}, {}, {})
    assert [len(texts) for texts in lines] == [0, 0, 0, 1, 0, 0, 0, 0]
    assert last == [
        "Step 9: number of codewords in use, codebook 2 (layer 3), is back at 6.0, above its bound of 2.1; it was"
        " below since step 2."
    ]
    assert monitor.standing() == []
    again = news_of(monitor, low, low, low, first_step=10)
    assert [len(texts) for texts in again] == [0, 0, 1] and "since step 10" in again[-1][0]


def test_only_consecutive_lines_count():
    monitor = monitor_of()
    low = {"feature_variation": 0.001}
    assert not any(news_of(monitor, *[low, low, {}] * 5))
    # for recovery, too
    assert any(news_of(monitor, low, low, low))
    assert not any(news_of(monitor, *[{}, {}, low] * 5))
    assert monitor.standing()


def test_patience_of_one_line():
    assert [len(texts) for texts in news_of(monitor_of(collapse_patience=1), {"feature_variation": 0.0}, {})] == [1, 1]


def test_the_first_steps_are_ignored():
    low = {"target_perplexities": [1.0, 1.0]}
    lines = news_of(monitor_of(grace_steps=4), *[low] * 8)
    assert [len(texts) for texts in lines] == [0, 0, 0, 0, 0, 0, 1, 0]
    assert "since step 5" in lines[6][0]
    # 50 by default
    assert not any(news_of(CollapseMonitor(CONFIG, bounds_of()), *[low] * 52))


@pytest.mark.parametrize("bound", ["collapse_perplexity", "collapse_active", "collapse_variation"])
def test_a_bound_of_zero_is_off(bound):
    monitor = monitor_of(**{bound: 0.0})
    *_, last = news_of(monitor, *[COLLAPSES] * 3)
    expected = {"collapse_perplexity": 3, "collapse_active": 4, "collapse_variation": 3}[bound]
    assert len(last) == expected and bound not in " ".join(last)


@pytest.mark.parametrize("loss", [4.0, 4512.0, math.inf, math.nan], ids=str)
def test_a_loss_far_above_that_of_guessing_is_reported(loss):
    monitor = monitor_of()
    diverged = {"codebook_losses": [2.0, loss]}  # 2 ln 7 = 3.9
    *before, [warning] = news_of(monitor, {"codebook_losses": [2.0, 3.8]}, *[diverged] * 3)
    assert before == [[]] * 3
    shown = f"{loss:,.1f}" if math.isfinite(loss) else "a value that is not finite"
    assert warning.startswith(
        "Step 4: the run diverges. The loss is above 3.9 (2 times that of guessing among 7 labels): codebook 2 (layer"
        f" 3) at {shown} since step 2. What usually helps: a lower learning_rate"
    )
    resumed = monitor_of()
    resumed.load_state_dict(json.loads(json.dumps(monitor.state_dict())))
    assert resumed.standing() == monitor.standing() == [warning.removeprefix("Step 4: ")]
    *_, [recovered] = news_of(monitor, *[{"codebook_losses": [2.0, 1.5]}] * 3, first_step=5)
    assert recovered == (
        "Step 7: loss, codebook 2 (layer 3), is back at 1.5, below its bound of 3.9; it was above since step 2."
    )


def test_a_loss_of_the_anchor_far_above_that_of_guessing_is_reported():
    monitor = CollapseMonitor(tiny_config(num_anchor_labels=20), bounds_of(), grace_steps=0)
    *_, [warning] = news_of(monitor, *[{"anchor_losses": [5.9, 6.0]}] * 3)  # 2 ln 20 = 5.99
    assert "loss of the anchor is above 6.0 (2 times that of guessing among 20 labels): unmasked frames at" in warning


def test_nan_counts_as_below_the_bound():
    *_, last = news_of(monitor_of(), *[{"feature_variation": math.nan}] * 3)
    assert "at a value that is not finite since step 1" in last[0]


def test_bounds_are_lower_for_fewer_frames_than_codewords():
    few = {"codebook_active_codewords": [1, 1], "target_perplexities": [1.0, 1.0], "prediction_perplexities": [3.0, 3]}
    assert not any(news_of(monitor_of(), *[few | {"masked_frames": 3.0}] * 5))
    assert any(news_of(monitor_of(), *[few | {"masked_frames": 100.0}] * 5))


def test_other_lines_are_ignored():
    monitor = monitor_of()
    low = {"step": 1, **HEALTHY, "feature_variation": 0.0}
    for line in (low, {"step": 1, "eval_loss": 2.0}, {**low, "masked_frames": 0.0}, low, {"step": 2}):
        assert monitor.check(line) == []
    assert len(monitor.check(low)) == 1


@pytest.mark.parametrize("at", range(9))
def test_a_resumed_monitor_reports_the_same(at):
    low = {"target_variations": [0.4, 0.0001]}
    lines = [{}, low, low, low, low, {}, {}, {}, {}]
    whole = news_of(monitor_of(), *lines)
    before = monitor_of()
    start = news_of(before, *lines[:at])
    after = monitor_of()
    after.load_state_dict(json.loads(json.dumps(before.state_dict())))
    assert start + news_of(after, *lines[at:], first_step=at + 1) == whole
    assert sum(map(len, whole)) == 2


def test_a_resumed_monitor_keeps_its_warnings():
    monitor, resumed = monitor_of(), monitor_of()
    news_of(monitor, *[COLLAPSES] * 3)
    assert not resumed.standing()
    resumed.load_state_dict(monitor.state_dict())
    assert resumed.standing() == monitor.standing() != []


def test_since_is_the_first_step_of_what_is_beyond_a_bound_now():
    monitor, few = monitor_of(), {"target_perplexities": [1.0, 5.0]}
    news_of(monitor, {})
    assert monitor.since == 0
    news_of(monitor, {"feature_variation": 0.0}, first_step=2)
    assert monitor.since == 2  # before there is a warning
    news_of(monitor, {"feature_variation": 0.0, **few}, first_step=3)
    assert monitor.since == 2
    news_of(monitor, few, first_step=4)  # the other has come back
    assert monitor.since == 3
    news_of(monitor, {}, first_step=5)
    assert monitor.since == 0


def test_a_bound_that_is_turned_off_ends_its_warnings():
    monitor, resumed = monitor_of(), monitor_of(collapse_variation=0.0)
    news_of(monitor, *[{"feature_variation": 0.0}] * 3)
    resumed.load_state_dict(monitor.state_dict())
    assert monitor.standing() != [] and monitor.since == 1
    assert resumed.standing() == [] and resumed.since == 0


def test_the_state_of_another_model_is_refused():
    monitor = monitor_of()
    state = copy.deepcopy(monitor.state_dict())
    state["target_perplexities"].append(state["target_perplexities"][0])
    with pytest.raises(ValueError, match=r"'target_perplexities': 3.*but this monitor watches.*of the same model"):
        monitor.load_state_dict(state)


def tones(generator):
    """Four utterances of tones of twelve frames each, so that a masked frame can be told from its neighbours."""
    pitches = torch.tensor([0.02, 0.05, 0.11, 0.2])[torch.randint(4, (4, 9), generator=generator)]
    phases = 2 * torch.pi * pitches.repeat_interleave(240, dim=1)[:, :2001].cumsum(dim=1)
    return phases.sin() + 0.05 * torch.randn(4, 2001, generator=generator)


def noise(generator):
    """Four utterances of noise, in which a masked frame cannot be predicted."""
    return torch.randn(4, 2001, generator=generator)


def warnings_of_training(speech, learning_rate, num_steps):
    """Return what the monitor reports in a short run with a line of metrics per step, and the last line."""
    torch.manual_seed(0)
    averages = {"codebook_decay": 0.5, "codebook_end_decay": 0.5, "ema_decay": 0.9, "ema_end_decay": 0.9}
    config = deterministic_config(codebook_size=32, **averages)
    model = DinoSRForPreTraining(config).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=learning_rate)
    bounds = bounds_of(collapse_perplexity=0.05, collapse_active=0.15, collapse_variation=0.02)
    monitor = CollapseMonitor(config, bounds, grace_steps=0)
    generator = torch.Generator().manual_seed(1)
    warnings, metrics = [], {}
    for step in range(1, num_steps + 1):
        output = model(speech(generator), generator=generator)
        output.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        model.update_targets(step)
        sums = MetricSums(config, torch.device("cpu"))
        sums.add(output, 4 * 2001, 0)
        metrics = {"step": step, **sums.compute(lambda tensor: tensor)}
        warnings += monitor.check(metrics)
    return warnings, metrics


def test_a_run_that_learns_gives_no_warning():
    warnings, metrics = warnings_of_training(tones, learning_rate=3e-3, num_steps=40)
    assert warnings == []
    assert metrics["loss"] < 2.8 and metrics["target_perplexity"] > 12


def test_a_learning_rate_that_is_too_high_is_reported():
    warnings, metrics = warnings_of_training(tones, learning_rate=3e-2, num_steps=24)
    assert metrics["loss"] < 1.5  # which looks like learning
    text = "\n".join(warnings)
    assert (
        "variation over time of the teacher is below 0.02" in warnings[0] and "codebook 1 (layer 2) at" in warnings[0]
    )
    assert "number of codewords in use is below 4.8 (collapse_active=0.15 of 32 codewords): codebook 2" in text
    assert "a lower learning_rate" in text


def test_a_teacher_without_variation_is_reported_despite_high_perplexities():
    warnings, metrics = warnings_of_training(noise, learning_rate=1e-3, num_steps=36)
    assert metrics["target_perplexity"] > 16 and metrics["active_codewords"] > 20
    assert warnings and all("collapse_variation" in text for text in warnings)
