"""Benchmarks print their tables, and refuse to time code that fails its check."""

import argparse
import io
import json
import platform
import re
import subprocess
import sys

import numpy as np
import pytest
import soundfile
import torch
import yaml

import forks
from dinosr_hf import DinoSRConfig, DinoSRForPreTraining
from scripts import ROOT, load_command, load_script
from tiny import randomize, tiny_config

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


def test_train_step_prints_a_table(load_in_process, capsys):
    load_in_process("benchmarks/train_step.py").main([*QUICK, "--seconds", "0.5"])
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


def test_scaling_prints_a_table_of_each_axis(load_in_process, capsys, monkeypatch):
    benchmark = load_in_process("benchmarks/scaling.py")
    monkeypatch.setattr(benchmark, "AXES", {"batch": (1, 2), "layers": (8, 9), "codewords": (32, 128)})
    benchmark.main([*QUICK, "--seconds", "0.5", "--axes", "batch", "layers", "codewords"])
    table, axis = {}, ""
    for name, *cells in rows(capsys.readouterr().out):
        axis = name if cells[0] == "median (s)" else axis
        table[axis, name] = cells
    assert [table[key][4] for key in (("batch", "1"), ("layers", "8"), ("codewords", "32"))] == ["1.00"] * 3
    assert float(table["batch", "2"][4]) == pytest.approx(2, abs=0.05)
    assert 1 < float(table["codewords", "128"][4]) < float(table["layers", "9"][4]) < 1.2


def test_scaling_runs_several_processes(capsys):
    load_script("benchmarks/scaling.py").main([*QUICK, "--seconds", "0.5", "--axes", "processes"])
    heading, _, *table = rows(capsys.readouterr().out)
    assert heading[0] == "processes" and heading[-1] == "peak GiB of the first process"
    assert [row[0] for row in table] == ["1", "2"]
    assert float(table[1][5]) == pytest.approx(1, abs=0.02)  # two processes do the work of one


def test_scale_to_batch_trains_once_and_refuses_other_options(tmp_path, capsys, monkeypatch):
    study = load_script("benchmarks/scale_to_batch.py")
    options = ["--reference_seconds", "16", "--fraction", "2", "--audio_seconds", "32", "--evaluations", "1"]
    options += ["--synthetic_utterances", "8", "--eval_seconds", "16", "--max_seconds", "8"]
    options += ["--hidden_size", "16", "--num_hidden_layers", "2", "--intermediate_size", "16"]
    options += ["--codebook_size", "8", "--output_dir", str(tmp_path)]
    study.main([*options, "--runs", "reference", "scaled"])
    table = rows(capsys.readouterr().out)[-2:]
    assert [row[:3] for row in table] == [["reference", "16 s", "2"], ["scaled", "8 s", "4"]]
    monkeypatch.setattr(study, "run", lambda arguments: pytest.fail(f"trains {arguments.run.output_dir} again"))
    study.main([*options, "--runs", "reference", "scaled"])
    assert rows(capsys.readouterr().out)[-2:] == table
    with pytest.raises(SystemExit, match=r"reference-0 has a run with other options. Give another --output_dir"):
        study.main([*options, "--learning_rate", "2e-3"])


QUICK_READING = [
    *("--utterances", "6", "--step_seconds", "10", "--micro_seconds", "10", "--epochs", "1", "--workers", "0"),
]


def test_dataloading_prints_a_table(capsys, monkeypatch):
    monkeypatch.setattr("datasets.config.SLEEP_TIME_ON_THREADS_SHUTDOWN", 0)  # at the end of a stream
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


def test_convert_memory_converts_what_it_wrote(capsys, monkeypatch):
    benchmark = load_script("benchmarks/convert_memory.py")
    monkeypatch.setattr(benchmark.subprocess, "run", lambda command, **options: forks.run(command[1:]))
    sizes = []
    for flags in ([], ["--optimizer"]):
        benchmark.main(["--size", "tiny", *flags])
        printed = capsys.readouterr().out
        assert re.search(r"peak of a process that converts +\d+ MB, [\d.]+ times the file", printed)
        sizes.append(int(re.search(r"^file +(\d+) MB", printed, re.MULTILINE)[1]))
    assert sizes[1] > 1.8 * sizes[0]  # two moments of the student's weights; with one, 1.5 times


@pytest.mark.parametrize("form", ["fast", "plain"])
def test_convolution_is_not_timed_if_its_forms_differ(capsys, monkeypatch, form):
    benchmark = load_script("benchmarks/convolution.py")
    quick = ["--batch", "2", "--seconds", "0.5", "--repeats", "1"]
    benchmark.main(quick)
    assert [row[0] for row in rows(capsys.readouterr().out)] == ["form", "---", "fast", "plain"]
    plain = benchmark.FORMS[form]
    monkeypatch.setitem(benchmark.FORMS, form, lambda *inputs: 1.1 * plain(*inputs))
    with pytest.raises(SystemExit, match="Nothing was timed: the forms differ"):
        benchmark.main(quick)


def test_codebook_prints_a_table(capsys, monkeypatch):
    benchmark = load_script("benchmarks/codebook.py")
    benchmark.main(["--frames", "50", "--sizes", "8", "16", "--repeats", "1"])
    assert [row[0] for row in rows(capsys.readouterr().out)[2:]] == ["8", "16"]
    monkeypatch.setattr(benchmark, "TOLERANCE", -1.0)
    with pytest.raises(SystemExit, match="Nothing was timed: with 8 codewords"):
        benchmark.main(["--frames", "50", "--sizes", "8"])


@pytest.mark.parametrize("script", ["train_step", "extract", "convolution", "codebook", "checkpoint_stall", "deploy"])
def test_nothing_is_timed_without_repeats(capsys, script):
    with pytest.raises(SystemExit):
        load_script(f"benchmarks/{script}.py").parse(["--repeats", "0"])
    assert "argument --repeats: 0 must be at least 1." in capsys.readouterr().err


def test_units_without_a_seam_do_not_agree_at_one(tmp_path, capsys):
    randomize(DinoSRForPreTraining(tiny_config())).save_pretrained(tmp_path / "model")
    soundfile.write(tmp_path / "short.wav", np.random.default_rng(0).uniform(-0.5, 0.5, 16_000), 16_000)
    words = ["--windows", "10", "--contexts", "0", "--stream_contexts", "1", "--lookaheads", "0"]
    main = load_script("benchmarks/unit_agreement.py").main
    main([str(tmp_path / "model"), str(tmp_path / "short.wav"), "--layer", "2", "--sources", "student", *words])
    assert ["10", "0", "100.0", "nan"] in rows(capsys.readouterr().out)


def test_few_labels_pretrains_once_for_each_seed(tmp_path, capsys, monkeypatch):
    benchmark, runs = load_script("benchmarks/few_labels.py"), []

    def run_script(script, *flags):
        folder = flags[flags.index("--output_dir") + 1]
        runs.append((script, folder.name))
        folder.mkdir(exist_ok=True)
        (folder / "run.json").write_text(json.dumps({"evaluation": [{"split": "test", "wer": 0.25}]}))

    monkeypatch.setattr(benchmark, "run_script", run_script)
    for steps in ("3", "4"):
        benchmark.main(["--output_dir", str(tmp_path), "--seeds", "0", "1", "--pretraining_steps", steps])
        assert all(row[2:] == ["25.0%"] * 3 for row in rows(capsys.readouterr().out)[2:])
    assert [script for script, _ in runs].count("pretrain.py") == 4
    assert len({*runs}) == len(runs) == 4 + 2 * 2 * 4


# -- learning.py

TINY_RECIPE = """
{hidden_size: 36, num_hidden_layers: 3, num_attention_heads: 3, intermediate_size: 50, conv_dim: [11, 13],
conv_kernel: [20, 16], conv_stride: [20, 16], num_conv_pos_embeddings: 2, conv_pos_kernel_size: 5,
num_conv_pos_embedding_groups: 4, num_codebooks: 2, codebook_size: 7, mask_length: 3, codebook_revival_share: 0.1,
codebook_decay: 0.5, codebook_end_decay: 0.8, codebook_end_decay_step: 2, step_seconds: 3, micro_seconds: 3,
min_seconds: 0.5, max_seconds: 1.2, num_workers: 0, learning_rate: 0.002, max_steps: 1}
"""
TINY_AGAIN = """
{anchor_layer: 3, num_anchor_labels: 5, fit_heads_steps: 1, codebook_revival_share: 0.1, step_seconds: 3,
micro_seconds: 3, min_seconds: 0.5, max_seconds: 1.2, num_workers: 0, max_steps: 3}
"""
# As much of spidr's public interface as the benchmark uses; a unit lasts a little longer than a phone.
FAKE_SPIDR = {
    "config.py": """
        from dataclasses import dataclass
        @dataclass(frozen=True)
        class DinoSRConfig:
            encoder_embed_dim: int = 768
            encoder_num_layers: int = 12
            encoder_num_heads: int = 12
            encoder_ff_interm_features: int = 3072
            encoder_pos_conv_kernel: int = 95
            encoder_pos_conv_groups: int = 16
            encoder_pos_conv_depth: int = 5
            encoder_attention_dropout: float = 0.1
            encoder_dropout: float = 0.1
            encoder_layer_drop: float = 0.0
            extractor_conv_layer_config: object = None
            codebook_size: int = 256
            codebook_decay: float = 0.9
            num_codebooks: int = 8
            ema_start_decay: float = 0.999
            ema_final_decay: float = 0.9999
            ema_final_step: int = 30000
            freeze_step: int = 200000
        @dataclass(frozen=True)
        class SpidRConfig(DinoSRConfig):
            ema_timescale: float = 20000
        @dataclass(frozen=True)
        class OptimizerConfig:
            lr: float = 5e-4
            dtype: str = "bfloat16"
            max_norm: float = 10.0
            max_steps: int = 400000
            warmup_steps: int = 12000
            hold_steps: int = 188000
            decay_steps: int = 200000
    """,
    "models.py": """
        import torch
        class SpidR(torch.nn.Module):
            def __init__(self, config):
                super().__init__()
                assert (config.encoder_embed_dim, config.codebook_decay) == (36, 0.8)
                assert config.extractor_conv_layer_config[0] == [24, 10, 5]
                assert config.freeze_step != 200000 or config.ema_timescale == 20000
                self.config, self.weight = config, torch.nn.Parameter(torch.ones(()))
                self.taken, self.is_frozen = 0, False
            def forward(self, waveforms, *, mask_indices):
                assert waveforms.dtype == torch.float32 and abs(waveforms[0].mean()) < 1e-4
                assert mask_indices.shape[0] == waveforms.shape[0] and mask_indices.dtype == torch.int64
                assert mask_indices.max() < (waveforms.shape[1] - 80) // 320
                return self.weight * torch.ones(mask_indices.numel()), {}
            def update_ema(self, step):
                self.taken += 1
                assert step == self.taken
            def freeze_extractor(self):
                assert self.taken == self.config.freeze_step
            def get_codebooks(self, waveform):
                assert not self.training
                num_frames = (waveform.shape[1] - 80) // 320
                codes = torch.arange(num_frames)[:, None] // 12 % 7
                return [None, *(torch.eye(7)[codes[:, 0] * layer] for layer in (0, 1))]
        DinoSR = SpidR
    """,
    "optimizer.py": """
        import torch
        def build_optimizer(model, config):
            assert (config.lr, config.dtype) == (0.002, "float32")
            assert config.warmup_steps + config.hold_steps + config.decay_steps >= config.max_steps
            optimizer = torch.optim.SGD(model.parameters(), config.lr)
            return optimizer, None, torch.optim.lr_scheduler.ConstantLR(optimizer)
    """,
}


@pytest.fixture
def learning(tmp_path, monkeypatch):
    """The benchmark; `run(*flags)` runs it on noise of five speakers with phones, and the public command in here."""
    monkeypatch.setattr(torch, "set_num_threads", lambda threads: None)
    benchmark = load_script("benchmarks/learning.py")
    generator, labels = np.random.default_rng(0), []
    speakers = {"train": ("ann", "bob"), "validation": ("cid", "dan"), "test": ("eve",)}
    for split, names in speakers.items():
        (tmp_path / split).mkdir()
        table = ["file_name,speaker_id"]
        for number, speaker in enumerate(names * 3):
            name = f"{split}{number}"
            samples = generator.uniform(-0.5, 0.5, 16_000 + 1_600 * number)
            soundfile.write(tmp_path / split / f"{name}.wav", samples, 16_000)
            table.append(f"{name}.wav,{speaker}")
            phones = [("AA", "B", "SIL")[step // 20 % 3] for step in range(len(samples) // 160)]
            labels.append(json.dumps({"name": name, "phones": phones}))
        (tmp_path / split / "metadata.csv").write_text("\n".join(table) + "\n")
    (tmp_path / "phones.jsonl").write_text("\n".join(labels) + "\n")
    recipe, again = tmp_path / "recipe.yaml", tmp_path / "again.yaml"
    recipe.write_text(TINY_RECIPE)
    again.write_text(TINY_AGAIN)
    words = [word for split in speakers for word in (f"--{split}", str(tmp_path / split))]
    words += ["--labels", str(tmp_path / "phones.jsonl"), "--threads", "1"]
    words += ["--recipe", str(recipe), str(again)]
    words += ["--output_dir", str(tmp_path / "runs"), "--seeds", "0"]
    benchmark.run = lambda *flags: benchmark.main([*words, *flags])
    pretrain, run_command = load_command("pretrain"), subprocess.run

    def run(command, **options):
        script = str(ROOT / "examples" / "pretrain.py")
        if script not in command:
            return run_command(command, **options)
        benchmark.launched = [*command[1 : command.index(script)], options["env"].get("ACCELERATE_USE_CPU")]
        pretrain.main(command[command.index(script) + 1 :])
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(benchmark.subprocess, "run", run)
    return benchmark


def test_learning_prints_a_table(learning, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(learning, "NUM_TIMED", 6)
    monkeypatch.setattr(learning, "TIME_TOLERANCE", 1e9)
    names = ["ours", "ours-spidr", "paper", "mfcc-textbook", "mfcc-tuned"]
    contestants = ["--contestants", *names, "--minutes", "0.01"]
    learning.run(*contestants)
    printed = capsys.readouterr().out
    heading, _, *lines = rows(printed)
    assert heading == list(learning.COLUMNS)
    assert [line[0] for line in lines] == names
    assert all(re.fullmatch(r"0\.\d{3}", line[2]) for line in lines)
    assert re.fullmatch(r"(student|teacher), layer [23]|k-means, layer 3", lines[0][1])
    assert learning.launched == [None]
    # 16,000, 17,600 and 19,200 samples, with a frame of 320 every 320
    assert "seeds 0; 165 test frames" in printed
    runs = tmp_path / "runs"
    record = json.loads((runs / "paper-0.01min-0" / "model-1" / "config.json").read_text())
    assert record["conv_dim"] == [24] * 7 and record["conv_stride"] == list(DinoSRConfig().conv_stride)
    assert record["codebook_revival_share"] == 0 and record["codebook_end_decay"] == 0.8
    assert not (runs / "paper-0.01min-0" / "model-2").exists()
    again = yaml.safe_load((runs / "ours-0.01min-0" / "model-2" / "arguments.yaml").read_text())
    assert again["base_model"] == again["anchor"] == str(runs / "ours-0.01min-0" / "model-1")
    seen = [learning.metrics_of(runs / "ours-0.01min-0" / f"model-{number}")[-1]["audio_hours"] for number in (1, 2)]
    hours = json.loads((runs / "ours-0.01min-0" / "result.json").read_text())["result"]["hours"]
    assert hours == pytest.approx(sum(seen)) and 0 < seen[0] < hours
    spidr = json.loads((runs / "ours-spidr-0.01min-0" / "model-2" / "config.json").read_text())
    assert (spidr["head_input"], spidr["qkv_bias"], spidr["mask_min_spans"]) == ("own_layer", False, 2)
    assert spidr["codebook_revival_share"] > 0
    monkeypatch.setattr(learning, "RUNNERS", {})  # finished runs are read
    learning.run(*contestants)
    monkeypatch.setattr(learning, "RUNNERS", dict.fromkeys(learning.CONTESTANTS, lambda *_: sys.exit("run anew")))
    with pytest.raises(SystemExit, match="run anew"):
        learning.run(*contestants, "--threads", "2")
    monkeypatch.setattr(learning, "describe_machine", lambda *_: "another machine")
    with pytest.raises(SystemExit, match="run anew"):
        learning.run(*contestants)


def test_learning_shares_the_time_by_steps(learning, tmp_path, monkeypatch):
    started = {}

    def run_pretraining(recipe, options, seed, folder, max_steps):
        started[folder.name] = max_steps
        return (60 if "2" in folder.name else 10) + 0.5 * max_steps  # the second makes its anchor

    lines = [{"step": step, "elapsed_seconds": 0.5 * step, "audio_hours": 2.0} for step in (10, 30)]
    monkeypatch.setattr(learning, "run_pretraining", run_pretraining)
    monkeypatch.setattr(learning, "metrics_of", lambda folder: lines)
    recipes = [tmp_path / name for name in ("a.yaml", "b.yaml")]
    for number, recipe in enumerate(recipes, 1):
        recipe.write_text(f"max_steps: {1000 * number}\n")
    monkeypatch.setattr(learning, "fit_clusters", lambda folder, options, seed: None)
    options = argparse.Namespace(recipe=recipes, minutes=30.0)
    found = learning.run_ours(options, 0, tmp_path, {}, dict)
    assert started == {"timing-1": 30, "model-1": 1180, "timing-2": 30, "model-2": 2280}
    assert found == {"minutes": pytest.approx(30.0, abs=0.01), "hours": 4.0}


def test_learning_trains_ours_in_several_processes(learning, tmp_path):
    options = argparse.Namespace(train=[str(tmp_path / "train")], threads=4, processes=2)
    learning.run_pretraining(tmp_path / "recipe.yaml", options, 0, tmp_path / "run", 1)
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "true"]
    assert learning.launched == launch
    arguments = yaml.safe_load((tmp_path / "run" / "arguments.yaml").read_text())
    assert (arguments["micro_seconds"], arguments["num_threads"]) == (1.5, 2)


def test_learning_trains_spidr_in_another_python(learning, tmp_path, capsys, monkeypatch):
    (tmp_path / "modules" / "spidr").mkdir(parents=True)
    for name, text in {"__init__.py": "", **FAKE_SPIDR}.items():
        (tmp_path / "modules" / "spidr" / name).write_text(re.sub(r"(?m)^ {8}", "", text))
    (tmp_path / "modules" / "spidr-1.2.3.dist-info").mkdir()
    (tmp_path / "modules" / "spidr-1.2.3.dist-info" / "METADATA").write_text("Name: spidr\nVersion: 1.2.3\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "modules"))
    monkeypatch.setattr(learning, "TIME_TOLERANCE", 1e9)

    def convert(checkpoint, folder, *, config):
        assert checkpoint.is_file() and "ema_timescale" in json.loads(config.read_text())["model"]

    def model_figures(folder, part, kmeans):
        """Those of spidr's student, and of a teacher whose units are the phones."""
        with np.load(folder.parent / ("validation.npz" if len(part.source) == 6 else "test.npz")) as codes:
            units = [(part.source.utterances[int(index)].id, codes[index]) for index in codes.files]
        phones = ((name, codes[:1]) for name, codes in learning.own_codes(part))
        own = learning.figures_by_layer(part, ["student, layer 2", "student, layer 3"], units, 7)
        return own | learning.figures_by_layer(part, ["teacher, layer 3"], phones, 7)

    monkeypatch.setattr(learning, "convert", convert)
    monkeypatch.setattr(learning, "fit_clusters", lambda folder, options, seed: None)
    monkeypatch.setattr(learning, "model_figures", model_figures)
    learning.run("--contestants", "spidr", "--minutes", "0.06")
    printed = capsys.readouterr().out
    assert f"spidr's own: spidr 1.2.3, Python {platform.python_version()}, torch {torch.__version__}\n" in printed
    (line,) = rows(printed)[2:]
    assert line[:3] == ["spidr", "teacher, layer 3", "1.000"]
    result = json.loads((tmp_path / "runs" / "spidr-0.06min-0" / "result.json").read_text())["result"]
    # The higher of the student's layers has a unit every 0.24 s, and the lower always the same; phones last 0.2 s.
    assert result["validation"]["student, layer 2"]["pnmi"] == 0 and result["hours"] > 0
    assert 0.4 < result["test"]["student, layer 3"]["pnmi"] < 0.5


def test_learning_needs_spidr(learning):
    with pytest.raises(SystemExit, match=r"--spidr_python=no/python cannot be run: No such file"):
        learning.run("--spidr_python", "no/python")
    with pytest.raises(SystemExit, match=r"spidr is not installed for --spidr_python=.*pip install spidr"):
        learning.run("--contestants", "spidr")


def test_learning_refuses_if_its_check_fails(learning, capsys, monkeypatch, tmp_path):
    flags = ["--contestants", "ours"]
    with monkeypatch.context() as patch:
        patch.setattr(learning, "EXACT", -1.0)
        with pytest.raises(SystemExit, match=r"Nothing was trained: validation: the phones themselves have a PNMI of"):
            learning.run(*flags)
    with pytest.raises(SystemExit, match="validation and test both have the speakers cid, dan"):
        learning.run(*flags, "--test", str(tmp_path / "validation"))
    with pytest.raises(SystemExit, match="train and test both have the speakers ann, bob"):
        learning.run(*flags, "--test", str(tmp_path / "train"))
    assert capsys.readouterr().out == "" and not (tmp_path / "runs").exists()
    with pytest.raises(SystemExit):
        learning.run(*flags, "--minutes", "0")
    with pytest.raises(SystemExit):
        learning.run(*flags, "--recipe", "none.yaml")
    errors = capsys.readouterr().err
    assert "--minutes must be above 0" in errors and "--recipe=none.yaml does not exist" in errors
    recipe = tmp_path / "recipe.yaml"
    with pytest.raises(SystemExit):
        learning.run(*flags, "--recipe", str(recipe), str(recipe))
    assert "recipe.yaml lacks anchor_layer. Add it to the file" in capsys.readouterr().err


def test_learning_chooses_units_on_validation_speakers(learning):
    one, other = {"pnmi": 0.4}, {"pnmi": 0.3}
    by_split = {"validation": {"a": one, "b": other}, "test": {"a": {"pnmi": 0.1}, "b": {"pnmi": 0.9}}}
    assert learning.choose(by_split) == ("a", {"pnmi": 0.1})


@pytest.mark.parametrize(("num_labels", "kinds"), [(7, {"student", "teacher", "anchor"}), (6, {"student", "teacher"})])
def test_learning_leaves_out_another_number_of_units(learning, tmp_path, monkeypatch, num_labels, kinds):
    torch.manual_seed(0)
    model = randomize(DinoSRForPreTraining(tiny_config(num_anchor_labels=num_labels))).eval()
    monkeypatch.setattr(learning, "load_model", lambda *_, **options: model)
    part = learning.Part(*learning.open_reference(tmp_path / "test", labels=tmp_path / "phones.jsonl"))
    kmeans = learning.fit_clusters(tmp_path, argparse.Namespace(train=[str(tmp_path / "train")]), 0)
    found = learning.model_figures(tmp_path, part, kmeans)
    assert {name.partition(",")[0] for name in found} == kinds | {"k-means"}


def test_learning_reports_unequal_times(learning, capsys, monkeypatch):
    def runner(minutes):
        figures = {"pnmi": 0.5, "phone_purity": 0.5, "active_codes": 3, "num_frames": 100}
        return lambda *_: {"validation": {"x": figures}, "test": {"x": figures}, "minutes": minutes, "hours": 1.0}

    monkeypatch.setattr(learning, "RUNNERS", {"ours": runner(10.5), "paper": runner(12), "mfcc-tuned": runner(1)})
    with pytest.raises(
        SystemExit, match=r"no fair comparison: \S*paper-10min-0 took 12.0 minutes instead of 10\. Repeat"
    ):
        learning.run("--contestants", "ours", "paper", "mfcc-tuned", "--minutes", "10")
    capsys.readouterr()
    learning.run("--contestants", "ours", "mfcc-tuned", "--minutes", "10", "--seeds", "0", "1")
    (ours, _) = rows(capsys.readouterr().out)[2:]
    assert ours[:3] == ["ours", "x", "0.500 (0.500, 0.500)"]
    assert ours[4:] == ["3 (3, 3)", "1.00 (1.00, 1.00)", "10.5 (10.5, 10.5)"]


def test_checkpoint_stall_prints_a_table(capsys):
    load_script("benchmarks/checkpoint_stall.py").main(["--repeats", "1"])
    _, size, _, _, row = capsys.readouterr().out.splitlines()
    assert size.startswith("tiny, ") and re.fullmatch(r"\| [\d.]+ \| [\d.]+ \| 0\.\d\d \|", row)


def test_checkpoint_stall_refuses_other_weights(monkeypatch):
    script = load_script("benchmarks/checkpoint_stall.py")
    plain = script.load_file
    monkeypatch.setattr(script, "load_file", lambda path: {name: tensor + 1 for name, tensor in plain(path).items()})
    with pytest.raises(SystemExit, match="has other weights than the model"):
        script.main(["--repeats", "1"])


# -- gpu_check.py


@pytest.fixture
def gpu_check(monkeypatch):
    monkeypatch.setattr(torch, "set_num_threads", lambda threads: None)
    return load_script("benchmarks/gpu_check.py")


def test_a_failed_part_of_the_gpu_check_leaves_the_others_alone(gpu_check, monkeypatch, capsys, tmp_path):
    table = (
        "print('| contestant | s | ours / it |'); print('|---|---|---|'); print('| ours | 0.5 | 1.00 |', flush=True)"
    )
    programs = {
        "step": f"{table}; print('| eager | 1.0 | 0.50 |')",
        "ctc": f"{table}; raise SystemExit('out of memory | here')",
        "compile": f"{table}; import time; time.sleep(60)",
    }
    monkeypatch.setattr(gpu_check, "command_of", lambda part, *_: [sys.executable, "-c", programs[part]])
    monkeypatch.setattr(gpu_check, "LIMITS", {"step": 60, "compile": 2, "ctc": 60})
    with pytest.raises(SystemExit, match=r"^Failed: compile, ctc\.$"):
        gpu_check.main(["--size", "tiny", "--output", str(tmp_path / "gpu.md")])
    printed = capsys.readouterr().out
    assert printed == (tmp_path / "gpu.md").read_text()
    lines = [[*row[:2], re.sub(r"^\d+ s$", "time", row[2])] for row in rows(printed)[2:]]
    ours = ["", "ours", "s 0.5, ours / it 1.00"]
    assert lines[:4] == [
        ["step", "passed", "time"],
        ours,
        ["", "eager", "s 1.0, ours / it 0.50"],
        ["compile", "FAILED: stopped after its limit of 2 s", "time"],
    ]
    assert lines[-3:] == [
        ["ctc", "FAILED: exit status 1: out of memory / here", "time"],
        ours,
        ["", "spidr", "not compared: --spidr_python was not given"],
    ]


@pytest.mark.parametrize(("part", "num_rows"), [("parity", 4), ("paths", 6)])
def test_the_gpu_check_passes_here(gpu_check, capsys, part, num_rows):
    gpu_check.main(["--size", "tiny", "--serve", part])
    assert len(rows(capsys.readouterr().out)[2:]) == num_rows


def test_a_check_of_the_gpu_check_may_fail_alone(gpu_check, capsys):
    checks = {"one": lambda: gpu_check.within(loss=(2.0, 1.0)), "other": lambda: gpu_check.within(loss=(0.5, 1.0))}
    with pytest.raises(SystemExit, match=r"^Failed: one\.$"):
        gpu_check.check_all(checks)
    assert rows(capsys.readouterr().out)[2:] == [
        ["one", "FAILED: AssertionError: loss 2.0e+00 (1e+00 allowed)"],
        ["other", "loss 5.0e-01 (1e+00 allowed)"],
    ]


def test_the_gpu_check_compares_with_spidr_in_its_python(gpu_check, capsys):
    options = gpu_check.parse(["--spidr_python", sys.executable])
    cpu = torch.device("cpu")
    commands = {part: gpu_check.command_of(part, options, cpu) for part in gpu_check.LIMITS}
    assert commands["step"][-2:] == ["eager", "spidr"] and commands["compile"][-2:] == [
        "ours compiled",
        "spidr compiled",
    ]
    for words, message in (
        (["--spidr_python", "no/python"], "--spidr_python=no/python cannot be run"),
        (["--spidr_python", sys.executable, "--size", "tiny"], "--spidr_python needs --size base"),
        (["--minutes", "0"], "--minutes=0 must be above 0"),
    ):
        with pytest.raises(SystemExit):
            gpu_check.parse(words)
        assert message in capsys.readouterr().err
