"""The plan of a run: its numbers against the run's own functions, its text, its picture."""

import math
import re

import numpy as np
import pytest
import torch

from dinosr_hf import DinoSRForPreTraining
from dinosr_hf.data import PlanSummary, SpeechSource
from dinosr_hf.data.sources import Utterance
from dinosr_hf.pretraining import parse_arguments
from dinosr_hf.pretraining.plan import RunPlan, describe_left_out, format_seconds, plan_figure
from dinosr_hf.pretraining.pretraining_arguments import DataArguments
from dinosr_hf.pretraining.scaling import scale_to_batch
from dinosr_hf.training.schedules import tri_stage
from dinosr_hf.utils.model_folder import save_folder
from pretraining_runs import CONFIGS, read_config

# 10 steps of 80 s, with 64 utterances of 12.5 s in total, on 2 processes with 2 passes a step each.
EPOCH = PlanSummary(
    num_steps=10,
    num_utterances=64,
    num_too_short=1,
    num_dropped=2,
    num_micro_batches=40,
    hours=800 / 3600,
    seconds_per_step=80.0,
    cropped_share=0.1,
    padded_share=0.0123,
)


def tiny(*flags):
    return parse_arguments(["--max_steps", "600", "--save_steps", "100", *flags], CONFIGS / "tiny_cpu.yaml")


def base(*flags):
    return read_config("base_ls960", *flags)


@pytest.fixture(scope="module")
def tiny_plan():
    return RunPlan(tiny(), EPOCH, world_size=2)


def test_hours_and_passes(tiny_plan):
    assert tiny_plan.seconds_per_step == 80.0
    assert tiny_plan.utterance_seconds == pytest.approx(12.5)
    assert tiny_plan.micro_batches == 2.0
    assert tiny_plan.steps_per_epoch == 10
    assert tiny_plan.hours == pytest.approx(600 * 80 / 3600)


def test_masked_frames_follow_from_the_masks(tiny_plan):
    config = tiny_plan.config
    # 0.65 of the frames would be masked if no spans overlapped; starts are spread evenly, so about 1 - exp(-0.65) are.
    assert tiny_plan.masked_share == pytest.approx(1 - math.exp(-config.mask_prob), abs=0.03)
    frames = 6.4 * config.num_frames(int(12.5 * 16_000))
    assert tiny_plan.masked_frames == pytest.approx(frames * tiny_plan.masked_share)
    assert tiny_plan.frames_per_codeword == tiny_plan.masked_frames / 128


def test_figures_of_the_paper():
    plan = RunPlan(base(), None, world_size=16)
    assert plan.masked_share == pytest.approx(0.566, abs=0.01)  # docs/parity.md
    assert plan.frames_per_codeword == pytest.approx(420, rel=0.05)
    assert plan.first_move == pytest.approx(0.98, abs=0.01)
    assert plan.hours == pytest.approx(422_222, rel=1e-3)
    assert plan.micro_batches == 1
    assert plan.notes == []


def test_a_stream_is_planned_with_full_steps():
    plan = RunPlan(tiny("--micro_seconds", "16"), None)
    assert (plan.seconds_per_step, plan.utterance_seconds, plan.micro_batches) == (40.0, 10.0, 3)
    assert plan.steps_per_epoch is None
    assert plan.padded_share is None
    assert "a stream" in str(plan)


def test_points_have_the_learning_rates_and_decays_of_the_run(tiny_plan):
    options, config = tiny_plan.arguments.run, tiny_plan.config
    assert [point.step for point in tiny_plan.points] == [1, 150, 300, 450, 600]
    for point in tiny_plan.points:
        factor = tri_stage(
            point.step - 1,
            max_steps=600,
            warmup_share=options.warmup_share,
            hold_share=options.hold_share,
            final_lr_scale=options.final_lr_scale,
        )
        assert point.learning_rate == options.learning_rate * factor
        assert point.hours == pytest.approx(point.step * 80 / 3600)
    torch.manual_seed(0)
    model = DinoSRForPreTraining(config)
    for point in tiny_plan.points:
        decays = model.update_targets(point.step)
        assert decays == {"codebook_decay": point.codebook_decay, "ema_decay": point.ema_decay}


def test_sizes_are_those_of_the_files(tiny_plan, tmp_path):
    model = DinoSRForPreTraining(tiny_plan.config)
    assert tiny_plan.num_trained == sum(weight.numel() for weight in model.parameters() if weight.requires_grad)
    save_folder(model, tmp_path)
    weights = (tmp_path / "model.safetensors").stat().st_size
    assert tiny_plan.model_bytes == pytest.approx(weights, rel=0.02)
    optimizer = torch.optim.AdamW([weight for weight in model.parameters() if weight.requires_grad])
    mask = torch.ones(1, model.config.num_frames(16_000), dtype=torch.bool)
    model(torch.randn(1, 16_000), mask_time_indices=mask).loss.backward()
    optimizer.step()
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    written = weights + (tmp_path / "optimizer.pt").stat().st_size
    assert tiny_plan.checkpoint_bytes == pytest.approx(written, rel=0.05)
    # Saved at 100, 200, ..., 500 and at the end; two checkpoints, and the one that is being written.
    assert tiny_plan.num_saved_models == 6
    assert tiny_plan.disk_bytes == 6 * tiny_plan.model_bytes + 3 * tiny_plan.checkpoint_bytes


@pytest.mark.parametrize(("save_steps", "expected"), [(0, 1), (100, 6), (599, 2), (600, 1), (1000, 1)])
def test_number_of_saved_models(save_steps, expected):
    assert RunPlan(tiny("--save_steps", str(save_steps)), EPOCH).num_saved_models == expected


def test_the_best_models_need_space_too():
    patient = tiny("--save_steps", "0", "--eval_share", "0.1", "--eval_patience", "2", "--keep_checkpoints", "3")
    assert RunPlan(patient, EPOCH).num_saved_models == 1 + 1 + 3


def test_text(tiny_plan):
    text = str(tiny_plan)
    for words in (
        "step            80 s of audio (step_seconds=40): 6.4 utterances of 12.5 s, 1.2% padding",
        "2.0 per step in each of 2 process(es), of at most 40 s",
        "for each of 128 codewords",
        "600: 13.3 hours of audio, 60.0 epochs of 10 steps",
        "0.001 after 60 updates of warm-up; tri_stage; finally 0.0001",
        "betas 0.9, 0.98; epsilon 1e-06; weight decay 0.01; clipping off",
        "2 of 128, updated every 1 update(s); memory at first: 2 updates, 2.67 min of audio",
        "memory at first: 100 updates, 2.23 h of audio; never frozen",
        f"6 model(s) of {tiny_plan.model_bytes / 1e6:.1f} MB, 2 checkpoint(s) of"
        f" {tiny_plan.checkpoint_bytes / 1e6:.1f} MB and one being written",
    ):
        assert words in text
    table = [line.split() for line in text.splitlines() if line.lstrip()[:1].isdigit()]
    assert [row[:3] for row in table] == [["0", "%", "1"], *([str(25 * n), "%", str(150 * n)] for n in range(1, 5))]
    assert table[0][3:] == ["0.0", "1e-05", "0.99002", "0.5"]
    assert table[-1][3:] == ["13.3", "0.000101", "0.999", "0.9"]


def test_text_tells_the_speeds():
    assert "12.5 s, 1.2% padding; speeds 0.87 to 1.13\n" in str(RunPlan(tiny("--speed_change", "0.13"), EPOCH))


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ([], "anchor          256 labels from mfcc; weight 2 beside 8 codebooks, 0.5 of it on unmasked frames\n"),
        (
            ["--num_anchor_labels", "50", "--anchor_end_weight", "0.5", "--anchor_end_step", "300"],
            "anchor          50 labels from mfcc; weight 2 beside 8 codebooks, 0.5 of it on unmasked frames; by update"
            " 300 weight 0.5 beside 8 codebooks, 0.5 of it on unmasked frames\n",
        ),
    ],
    ids=["constant", "annealed"],
)
def test_text_tells_the_anchor(flags, words):
    plan = RunPlan(base("--anchor", "mfcc", *flags), EPOCH)
    assert words in str(plan)
    assert plan.num_trained - RunPlan(base(), EPOCH).num_trained == plan.config.num_anchor_labels * (768 + 1)
    assert "\nanchor " not in str(RunPlan(base(), EPOCH))


def test_text_lists_scaled_values():
    arguments, changes = scale_to_batch(base("--scale_to_batch", "--step_seconds", "475"))
    text = str(RunPlan(arguments, None, changes=changes))
    assert "a step is 0.125 (kappa) times the reference step" in text
    assert "max_steps" in text.split("(kappa)")[1]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--freeze_teacher_step", "601"], "never frozen in this run: freeze_teacher_step=601"),
        (["--ema_anneal_steps", "1200"], r"EMA decay ends at 0\.9945 instead of 0\.999: ema_anneal_steps=1,200"),
        (["--codebook_end_decay_step", "1200"], r"codebook decay ends at 0\.7 instead of 0\.9: codebook_end"),
        (["--ema_decay", "0.999"], "averages over 1,000 updates, and the run has 600"),
        (
            ["--codebook_decay", "0.99", "--codebook_end_decay", "0.99"],
            r"14% of the way .* codebook_update_steps, or let .* codebook_revival_share",
        ),
        (
            ["--codebook_decay", "0.9", "--ema_decay", "0.999", "--ema_end_decay", "0.9999"],
            r"0\.0105 times the audio of the paper's, but .* cover less audio\. Set scale_to_batch",
        ),
    ],
    ids=["freeze", "anneal", "codebook_anneal", "long_memory", "slow_codewords", "unscaled"],
)
def test_notes_on_unusual_runs(flags, message):
    notes = RunPlan(tiny(*flags), EPOCH).notes
    assert any(re.search(message, note) for note in notes), notes
    assert f"Note: {notes[0]}" in str(RunPlan(tiny(*flags), EPOCH))


def test_a_base_model_does_not_begin_at_random(tmp_path):
    slow = ["--ema_decay", "0.999", "--codebook_decay", "0.99", "--codebook_end_decay", "0.99"]
    assert len(RunPlan(tiny(*slow), EPOCH).notes) == 2
    base, network = (str(tmp_path / name) for name in ("base", "network"))
    model = DinoSRForPreTraining(tiny().model_config())
    save_folder(model, base)
    save_folder(model.dinosr, network)
    assert RunPlan(tiny(*slow, "--base_model", base), EPOCH).notes == []
    (note,) = RunPlan(tiny("--base_model", base, "--fit_heads_steps", "600"), EPOCH).notes
    assert note.startswith("Only heads and codebooks learn: fit_heads_steps=600 reaches to the last of max_steps=600.")
    for anew in (["--new_codebooks", "true"], ["--codebook_size", "100"], ["--base_model", network]):
        (note,) = RunPlan(tiny(*slow, "--base_model", base, *anew), EPOCH).notes
        assert "random start" in note


def test_usual_runs_have_no_notes(tiny_plan):
    assert tiny_plan.notes == []
    assert "Note" not in str(tiny_plan)


def test_a_frozen_teacher_is_not_unfinished_annealing():
    # Its decay at the end is 1, and not that of the end of annealing.
    notes = RunPlan(tiny("--freeze_teacher_step", "500", "--ema_anneal_steps", "1200"), EPOCH).notes
    assert not any("EMA decay ends" in note for note in notes)


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [(9.5, "9.5 s"), (80, "80 s"), (3760, "62.7 min"), (38_000, "10.6 h"), (3.8e6, "1,056 h")],
)
def test_format_seconds(seconds, expected):
    assert format_seconds(seconds) == expected


def curves(figure):
    return [axes.get_lines()[0].get_xydata() for axes in figure.axes[:3]]


def test_figure_shows_rates_and_decays(tiny_plan):
    rate, ema, codebook = curves(plan_figure(tiny_plan))
    for curve, value in (
        (rate, lambda point: point.learning_rate),
        (ema, lambda point: 1 - point.ema_decay),
        (codebook, lambda point: 1 - point.codebook_decay),
    ):
        assert (curve[0, 0], curve[-1, 0]) == (1, 600)
        for step, height in curve[::50]:
            assert height == pytest.approx(value(tiny_plan.at(int(step))))


def test_figure_marks_what_changes():
    figure = plan_figure(RunPlan(tiny("--freeze_teacher_step", "500"), EPOCH))
    words = [text.get_text().strip() for axes in figure.axes for text in axes.texts]
    assert sorted(words) == [
        "EMA decay reaches its end: 400",
        "codebook decay reaches its end: 200",
        "rate begins to fall: 360",
        "teacher frozen: 500",
        "warm-up ends: 60",
    ]


def test_figure_leaves_a_frozen_teacher_out():
    _, ema, _ = curves(plan_figure(RunPlan(tiny("--freeze_teacher_step", "500"), EPOCH)))
    assert np.isfinite(ema[ema[:, 0] < 500, 1]).all()
    assert np.isnan(ema[ema[:, 0] >= 500, 1]).all()


@pytest.mark.parametrize(
    "flags",
    [
        ["--max_steps", "1"],
        ["--freeze_teacher_step", "0"],
        ["--codebook_decay", "0"],
        ["--schedule", "constant", "--hold_share", "0.47"],
    ],
    ids=["one_step", "frozen_from_the_start", "no_memory", "constant"],
)
@pytest.mark.filterwarnings("error")
def test_odd_runs_are_described_and_drawn(flags, tmp_path):
    plan = RunPlan(tiny(*flags), EPOCH)
    assert str(plan)
    plan_figure(plan).savefig(tmp_path / "plan.png", dpi=50)
    assert (tmp_path / "plan.png").stat().st_size > 1000


class Named(SpeechSource):
    """A source without audio."""

    def load(self, index, start=0, num_samples=None):
        raise NotImplementedError


def test_what_is_left_out_is_described():
    source = Named()
    source.utterances = [Utterance("a.wav", 8_000), Utterance("b.wav", 40_000), Utterance("c.wav", 7_000)]
    source.skipped = {"unreadable": ["x.wav", "y.wav"], "unsupported .m4a": ["z.m4a"], "hidden": ["._a.wav"]}
    data = DataArguments(min_seconds=1.0)
    assert describe_left_out(data, source, EPOCH._replace(num_too_short=3)) == (
        "2 shorter than min_seconds=1 (such as a.wav), 2 unreadable (such as x.wav), 1 unsupported .m4a (such as"
        " z.m4a), 1 hidden (such as ._a.wav), 1 shorter than that at their speed, 2 that do not fill half a step,"
        " others in each epoch; 10.0% of the audio is cropped away"
    )
    source.utterances, source.skipped = source.utterances[1:2], {}
    assert describe_left_out(data, source, EPOCH._replace(num_too_short=0, num_dropped=0, cropped_share=0.0)) == (
        "no recording"
    )


def test_the_text_says_what_is_left_out(tiny_plan):
    assert "left out" not in str(tiny_plan)  # of a stream it is not known
    assert re.search(r"^left out +3 too few$", str(RunPlan(tiny(), EPOCH, left_out="3 too few")), re.MULTILINE)
