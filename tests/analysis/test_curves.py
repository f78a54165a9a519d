"""Training curves of runs: reading, drawing, the reference behind them, and what is left out."""

import json
import runpy
import sys

import pytest
from matplotlib.colors import to_hex

from dinosr_hf.analysis.curves import REFERENCE, RunCurves, read_run, read_runs, run_figure
from scripts import ROOT

BOUNDS = {"collapse_perplexity": 0.05, "collapse_active": 0.15, "collapse_variation": 0.02}
PLOT_RUN = ROOT / "examples" / "plot_run.py"
LOSS, TARGETS, USED = (
    "loss (nats)",
    "target perplexity, share of the codewords",
    "codewords in use, share",
)
VARIATION, PHONES = "variation over time, share of the energy", "phones in the codes, held out"
GREY = to_hex("0.72")


def line_of(step, **changes):
    return {
        "step": step,
        "loss": 5.0 / step**0.1,
        "codebook_losses": [4.9 / step**0.1, 5.1 / step**0.1],
        "target_perplexity": 40.0,
        "target_perplexities": [36.0, 44.0],
        "prediction_perplexity": 42.0,
        "prediction_perplexities": [40.0, 44.0],
        "active_codewords": 64.0,
        "codebook_active_codewords": [60, 68],
        "target_variation": 0.4,
        "target_variations": [0.3, 0.5],
        "feature_variation": 0.3,
        "learning_rate": 1e-4 * step,
        "seconds": 3600.0,
        **changes,
    }


def evaluation_of(step, **changes):
    return {"step": step, "eval_loss": 4.5, "eval_target_perplexity": 30.0, **changes}


def run_of(name="a", lines=(1, 10, 20), codebook_size=128, bounds=BOUNDS):
    return RunCurves(name, [line_of(step) for step in lines], codebook_size, bounds)


def write_run(folder, lines, arguments="codebook_size: 128\n"):
    folder.mkdir(parents=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "arguments.yaml").write_text(arguments)
    return folder


def panels(figure):
    return {axes.get_title(): axes for axes in figure.axes}


def drawn(axes, color=None):
    """(x, y) of each curve, or of those of one colour, without horizontal lines across the panel."""
    return [
        (list(line.get_xdata()), list(line.get_ydata()))
        for line in axes.get_lines()
        if len(line.get_xdata()) and list(line.get_xdata()) != [0, 1]
        if color is None or to_hex(line.get_color()) == color
    ]


def test_a_run_is_read_with_its_size_and_bounds(tmp_path):
    arguments = "codebook_size: 64\ncollapse_perplexity: 0.07\nmax_steps: 9\n"
    run = read_run(write_run(tmp_path / "mine", [line_of(1), line_of(2)], arguments))
    assert run == RunCurves("mine", [line_of(1), line_of(2)], 64, {"collapse_perplexity": 0.07})


def test_runs_are_named_by_as_much_of_their_path_as_tells_them_apart(tmp_path):
    folders = [write_run(tmp_path / name, [line_of(1)]) for name in ("a/one/run", "a/two/run", "b/two/run")]
    assert [run.name for run in read_runs([*folders, folders[0]])] == ["a/one/run", "a/two/run", "b/two/run"]
    assert [run.name for run in read_runs(folders[:2])] == ["one/run", "two/run"]
    assert [run.name for run in read_runs(folders[:1])] == ["run"]


def test_an_incomplete_last_line_is_ignored(tmp_path):
    folder = write_run(tmp_path / "run", [line_of(1)])
    with open(folder / "metrics.jsonl", "a") as file:
        file.write('{"step": 2, "lo')
    assert len(read_run(folder).lines) == 1
    with open(folder / "metrics.jsonl", "a") as file:  # the disk was full, and has room again
        file.write('\n{"step": 3}\n')
    assert [line["step"] for line in read_run(folder).lines][1:] == [3]


@pytest.mark.parametrize(
    ("lines", "arguments", "message"),
    [
        (None, "codebook_size: 1", "metrics.jsonl does not exist. Give the output_dir of a run that has started"),
        ("", "codebook_size: 1", "metrics.jsonl has no line of metrics"),
        ('{"loss": 1}\n', "codebook_size: 1", "metrics.jsonl has no line of metrics"),
        ('{"step": 1\n', "codebook_size: 1", "metrics.jsonl has no line of metrics"),
        ("[1]\n", "codebook_size: 1", "metrics.jsonl has no line of metrics"),
        ('{"step": 1}\n', None, "arguments.yaml does not exist"),
        ('{"step": 1}\n', "- 1", "arguments.yaml has no codebook_size"),
    ],
    ids=["no-metrics", "empty", "no-step", "broken", "no-object", "no-arguments", "other-arguments"],
)
def test_malformed_runs_are_refused(tmp_path, lines, arguments, message):
    for name, text in (("metrics.jsonl", lines), ("arguments.yaml", arguments)):
        if text is not None:
            (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=message):
        read_run(tmp_path)


def test_one_run_has_its_mean_and_a_line_per_codebook():
    axes = panels(run_figure([run_of()]))[TARGETS]
    *reference, one, other, mean = drawn(axes)
    assert len(reference) == 2
    assert one == ([1, 10, 20], [36 / 128] * 3) and other[1] == [44 / 128] * 3
    assert mean[1] == [40 / 128] * 3


def test_several_runs_have_only_their_means_in_different_colours():
    figure = run_figure([run_of("a"), run_of("b", codebook_size=64)])
    axes = panels(figure)[TARGETS]
    curves = [line for line in axes.get_lines() if to_hex(line.get_color()) != GREY and len(line.get_xdata()) == 3]
    assert [line.get_ydata()[0] for line in curves] == [40 / 128, 40 / 64]
    assert len({to_hex(line.get_color()) for line in curves}) == 2
    names = [text.get_text() for text in figure.legends[0].get_texts()]
    assert names[:2] == ["a (128 codewords)", "b (64 codewords)"] and "reference" in names[2]


@pytest.mark.parametrize(("x", "unit"), [("step", 1), ("hours", 3800 / 3600)])
def test_the_reference_is_drawn_behind(x, unit):
    found = panels(run_figure([run_of()], x=x))
    unmeasured, measured = drawn(found[LOSS], GREY)
    assert measured[0] == pytest.approx([point.step * unit for point in REFERENCE[1:]])
    assert measured[1] == [point.loss for point in REFERENCE[1:]]
    assert unmeasured[0] == pytest.approx([unit, 2500 * unit]) and unmeasured[1] == [5.735, 3.144]
    assert drawn(found[TARGETS], GREY)[1][1][-1] == pytest.approx(159.1 / 256)
    assert drawn(found[USED], GREY)[1][1][-1] == pytest.approx(210.7 / 256)
    assert drawn(found["learning rate"], GREY) == []


def test_hours_are_summed_or_read_from_the_line():
    lines = [line_of(1), line_of(10), evaluation_of(10), line_of(20)]
    run = RunCurves("a", lines, 128, {})
    axes = panels(run_figure([run], x="hours"))[LOSS]
    assert drawn(axes)[-2][0] == [1.0, 2.0, 3.0]
    assert drawn(axes)[-1] == ([2.0], [4.5])
    resumed = RunCurves("b", [line_of(1, audio_hours=5.0), line_of(10, audio_hours=6.5)], 128, {})
    assert drawn(panels(run_figure([resumed], x="hours"))[LOSS])[-1][0] == [5.0, 6.5]


def test_held_out_metrics_are_dashed():
    lines = [line_of(1), line_of(10), evaluation_of(10, eval_pnmi=0.2, eval_pnmis=[0.1, 0.2], eval_phone_purity=0.3)]
    found = panels(run_figure([RunCurves("a", lines, 128, {})]))
    *_, held_out = found[LOSS].get_lines()
    assert list(held_out.get_ydata()) == [4.5]
    assert held_out.get_linestyle() == "--" and held_out.get_marker() == "."
    assert [text.get_text() for text in found[LOSS].get_legend().get_texts()] == ["training", "held out"]
    assert sorted(y[0] for _, y in drawn(found[PHONES])) == [0.1, 0.2, 0.2, 0.3]
    assert found[PHONES].get_ylim()[0] == 0


def test_panels_without_data_are_left_out():
    found = panels(run_figure([run_of()]))
    assert PHONES not in found and "gradient norm" not in found
    assert found[LOSS].get_legend() is None  # without held-out metrics there is nothing to distinguish
    assert "gradient norm" in panels(run_figure([RunCurves("a", [line_of(1, grad_norm=2.0)], 128, {})]))
    assert list(panels(run_figure([RunCurves("a", [{"step": 1, "loss": 2.0}], 128, {})]))) == [LOSS]


def test_collapse_bounds_of_runs_are_drawn():
    def bounds_in(axes):
        return [line.get_ydata()[0] for line in axes.get_lines() if list(line.get_xdata()) == [0, 1]]

    found = panels(run_figure([run_of()]))
    assert [bounds_in(found[title]) for title in (LOSS, TARGETS, USED, VARIATION)] == [[], [0.05], [0.15], [0.02]]
    assert found[VARIATION].get_ylim()[0] < 0.02
    off = panels(run_figure([run_of(bounds={"collapse_perplexity": 0.0}), run_of("b", bounds={})]))
    assert [bounds_in(axes) for axes in off.values()] == [[]] * len(off)


def test_a_run_of_one_line_has_a_marker():
    axes = panels(run_figure([run_of(lines=[1])]))[LOSS]
    assert axes.get_lines()[-1].get_marker() == "."


def test_nothing_overlaps():
    lines = [line_of(step, grad_norm=1.0, audio_seconds_per_second=20.0) for step in (1, 100, 900)]
    lines += [evaluation_of(900, eval_pnmi=0.2, eval_phone_purity=0.3)]
    figure = run_figure([RunCurves(name, lines, 128, BOUNDS) for name in "abcd"], title="Four runs")
    found = panels(figure)
    assert len(found) == 9
    figure.draw_without_rendering()
    boxes = [axes.get_tightbbox() for axes in found.values()] + [figure.legends[0].get_window_extent()]
    for number, box in enumerate(boxes):
        assert figure.bbox.x0 - 1 <= box.x0 and box.x1 <= figure.bbox.x1 + 1
        assert not any(box.padded(-2).overlaps(other.padded(-2)) for other in boxes[:number])


@pytest.mark.parametrize(
    ("runs", "options", "message"),
    [
        ([], {}, "There is no run to draw"),
        ([run_of()], {"x": "epochs"}, "x='epochs' is unknown. Choose one of step, hours"),
        ([run_of()], {"width": 0.0}, "width=0.0 is out of range"),
    ],
    ids=["no-run", "x", "width"],
)
def test_run_figure_refuses(runs, options, message):
    with pytest.raises(ValueError, match=message):
        run_figure(runs, **options)


def plot_run(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["plot_run.py", *map(str, arguments)])
    runpy.run_path(str(PLOT_RUN), run_name="__main__")


def test_the_script_draws_runs(tmp_path, monkeypatch, capsys):
    one = write_run(tmp_path / "one", [{"step": 1, "loss": 5.0}, {"step": 10, "loss": 4.0}])
    two = write_run(tmp_path / "two", [{"step": 1, "audio_hours": 0.1, "loss": 5.0}])
    plot_run(monkeypatch, one)
    assert (one / "curves.png").read_bytes().startswith(b"\x89PNG")
    plot_run(monkeypatch, one, two, "--x", "hours", "--title", "Both", "--output", tmp_path / "new" / "both.pdf")
    assert (tmp_path / "new" / "both.pdf").read_bytes().startswith(b"%PDF")
    assert str(tmp_path / "new" / "both.pdf") in capsys.readouterr().out
    with pytest.raises(SystemExit, match=r"plot_run.py: .*metrics.jsonl does not exist"):
        plot_run(monkeypatch, tmp_path)
