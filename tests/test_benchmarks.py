"""Benchmarks print their tables, and refuse to time code that fails its check."""

import io
import json
import re
import sys

import pytest
import torch

from scripts import load_script

QUICK = ["--size", "tiny", "--batch", "2", "--repeats", "1", "--threads", "1"]
SHORT = ["--shortest", "0.5", "--longest", "1.0"]


@pytest.fixture
def load_in_process(monkeypatch, capsys):
    """Load a benchmark whose contestants run in this process, to save the time of importing torch in others."""
    monkeypatch.setattr(torch, "set_num_threads", lambda threads: None)

    def load(script):
        benchmark = load_script(script)

        def compete(path, names, argv, repeats):
            assert path == benchmark.__file__
            found = {}
            printed = capsys.readouterr().out
            for name in names:
                monkeypatch.setattr(sys, "stdin", io.StringIO("step\n" * repeats + "end\n"))
                benchmark.main([*argv, "--serve", name])
                ready, *times, end = (json.loads(line) for line in capsys.readouterr().out.splitlines())
                assert ready == {"ready": True} and len(times) == repeats
                found[name] = {"times": [time["seconds"] for time in times], **end}
            print(printed, end="")
            return found

        monkeypatch.setattr(benchmark, "compete", compete)
        return benchmark

    return load


def rows(printed):
    """Return the cells of each row of the printed table."""
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in printed.splitlines() if line[:1] == "|"]


def test_train_step_prints_a_table(capsys):
    # Here contestants run in their own processes, as for users.
    load_script("benchmarks/train_step.py").main([*QUICK, "--seconds", "0.5"])
    printed = capsys.readouterr().out
    assert f"torch {torch.__version__}" in printed
    for name in ("ours", "eager"):
        assert re.search(rf"^\| {name} (\| [\d.]+ ){{6}}\| \d+% \| [\d.]+ \|$", printed, re.MULTILINE)
    assert re.search(r"^ours spends: .*matrix products \d+%", printed, re.MULTILINE)


@pytest.mark.parametrize(
    ("tolerance", "message"), [("LOSS_TOLERANCE", "different losses"), ("CODEBOOK_TOLERANCE", "other codebooks")]
)
def test_train_step_is_not_timed_if_its_check_fails(load_in_process, capsys, monkeypatch, tolerance, message):
    benchmark = load_in_process("benchmarks/train_step.py")
    monkeypatch.setattr(benchmark, tolerance, -1.0)
    with pytest.raises(SystemExit, match=message):
        benchmark.main([*QUICK, "--seconds", "0.5"])
    assert capsys.readouterr().out == ""


def test_spidr_needs_the_base_size_and_its_package(load_in_process):
    benchmark = load_in_process("benchmarks/train_step.py")
    with pytest.raises(SystemExit, match="the only size that spidr has"):
        benchmark.main([*QUICK, "--peers", "spidr"])
    with pytest.raises(SystemExit, match="pip install spidr"):
        benchmark.main([*QUICK, "--size", "base", "--peers", "spidr"])


def test_extract_prints_a_table(load_in_process, capsys):
    load_in_process("benchmarks/extract.py").main([*QUICK, *SHORT, "--peers", "data2vec", "hubert"])
    printed = capsys.readouterr().out
    assert "25% of it padding" in printed
    names = [row[0] for row in rows(printed)[2:]]
    assert names == ["ours", "ours units", "ours teacher", "data2vec", "hubert"]
    assert all(float(cell) > 0 for row in rows(printed)[2:] for cell in row[1:])


@pytest.mark.parametrize("options", [[], ["--train_convolutions"]], ids=["frozen", "trained"])
def test_ctc_prints_a_table(load_in_process, capsys, options):
    load_in_process("benchmarks/ctc.py").main([*QUICK, *SHORT, *options])
    printed = capsys.readouterr().out
    assert f"convolutions {'trained' if options else 'frozen'}" in printed
    assert [row[0] for row in rows(printed)[2:]] == ["ours", "data2vec"]


@pytest.mark.parametrize(
    ("script", "tolerance", "message"),
    [
        ("extract", "TOLERANCE", "features of utterance 0 differ by .* from those of the utterance alone"),
        ("ctc", "LOSS_TOLERANCE", "the losses are"),
        ("ctc", "GRADIENT_TOLERANCE", "gradients of lm_head.weight differ"),
    ],
)
def test_nothing_is_timed_if_results_differ(load_in_process, capsys, monkeypatch, script, tolerance, message):
    benchmark = load_in_process(f"benchmarks/{script}.py")
    monkeypatch.setattr(benchmark, tolerance, -1.0)
    with pytest.raises(SystemExit, match=message):
        benchmark.main([*QUICK, *SHORT])
    assert capsys.readouterr().out == ""


def test_scaling_prints_a_table(load_in_process, capsys, monkeypatch):
    benchmark = load_in_process("benchmarks/scaling.py")
    monkeypatch.setattr(benchmark, "AXES", {"batch": (1, 2), "layers": (8, 9), "codewords": (32, 128)})
    benchmark.main([*QUICK, "--seconds", "0.5", "--axes", "batch", "layers", "codewords"])
    table = {(row[0], row[1]): row[2:] for row in rows(capsys.readouterr().out)[2:]}
    assert [table[key][4] for key in (("batch", "1"), ("layers", "8"), ("codewords", "32"))] == ["1.00"] * 3
    assert float(table["batch", "2"][4]) == pytest.approx(2, abs=0.05)
    assert 1 < float(table["codewords", "128"][4]) < float(table["layers", "9"][4]) < 1.2


def test_scaling_runs_several_processes(capsys):
    load_script("benchmarks/scaling.py").main([*QUICK, "--seconds", "0.5", "--axes", "processes"])
    table = rows(capsys.readouterr().out)[2:]
    assert [row[1] for row in table] == ["1", "2"]
    assert float(table[1][6]) == pytest.approx(1, abs=0.02)  # two processes do the work of one


QUICK_READING = [
    *("--utterances", "6", "--step_seconds", "10", "--micro_seconds", "10", "--epochs", "1", "--workers", "0"),
]


def test_dataloading_prints_a_table(capsys):
    load_script("benchmarks/dataloading.py").main(QUICK_READING)
    table = rows(capsys.readouterr().out)[2:]
    assert [row[0] for row in table] == ["flac", "mp3", "flac in tar", "parquet stream"]
    assert all(float(row[1].replace(",", "")) > 1 and 0 < float(row[2].rstrip("%")) < 100 for row in table)


def test_dataloading_is_not_timed_if_recordings_differ(capsys, monkeypatch):
    benchmark = load_script("benchmarks/dataloading.py")
    monkeypatch.setattr(benchmark, "MIN_CORRELATION", 1.0)
    with pytest.raises(SystemExit, match="mp3: recording 0 has correlation"):
        benchmark.main(QUICK_READING)
    monkeypatch.undo()
    monkeypatch.setattr(benchmark.np, "allclose", lambda *arrays: False)
    with pytest.raises(SystemExit, match="flac in tar: recording 0 has other samples"):
        benchmark.main(QUICK_READING)
    monkeypatch.undo()
    with pytest.raises(SystemExit, match="An epoch has a single step"):
        benchmark.main([*QUICK_READING, "--step_seconds", "1000"])
    assert capsys.readouterr().out == ""
