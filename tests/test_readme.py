"""The documents are correct: their Python runs, their commands and flags exist, their links resolve."""

import json
import os
import re
import shlex
import shutil
import sys
import tomllib
from pathlib import Path

import numpy as np
import pytest
import soundfile

import forks
from dinosr_cli import COMMANDS
from dinosr_hf import DinoSRConfig, DinoSRForPreTraining, DinoSRForSequenceClassification
from dinosr_hf.pretraining import ArgumentError, parse_arguments, run
from dinosr_hf.utils.command_line import parse_groups
from dinosr_hf.utils.model_folder import save_folder
from documents import blocks
from language_models import write_arpa
from pretraining_runs import metrics_of, read_config, tiny_arguments
from recognisers import save_recogniser
from scripts import ROOT, load_command, load_script

TINY = ROOT / "examples" / "configs" / "tiny_cpu.yaml"
DOCUMENTS = sorted(
    file.relative_to(ROOT).as_posix()
    for pattern in (
        *("*.md", "docs/*.md", "docs/tutorials/*.md", "docs/reference/*.md"),
        *("benchmarks/*.md", "model_cards/*.md", "examples/*.ipynb"),
    )
    for file in ROOT.glob(pattern)
)
CODES = r"\b(?:S(?:10|[1-9])|T(?:1[01]|[1-9])|M[1-4]|D(?:1[01]|[1-9]))\b"


RUN_BLOCKS = """
import json, sys

namespace = {"__name__": "__main__"}
for line, code in json.load(sys.stdin):
    # Empty lines before the code, so that a traceback shows the line of the document.
    exec(compile("\\n" * (line - 1) + code, sys.argv[1], "exec"), namespace)
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Create the files that the documents use: models, a language model, a recording, an authors' checkpoint."""
    path = tmp_path_factory.mktemp("documents")
    config = parse_arguments([], TINY).model_config()
    save_folder(DinoSRForPreTraining(config), path / "runs" / "tiny")
    config = DinoSRConfig(**{**config.to_diff_dict(), "use_weighted_layer_sum": True, "num_labels": 5})
    save_folder(DinoSRForSequenceClassification(config), path / "runs" / "classifier")
    save_recogniser(path / "runs" / "recogniser")
    write_arpa(path / "runs" / "words.arpa", ["the sheep sails", "the ship"])
    noise = np.random.default_rng(0).standard_normal(22_050).cumsum() * 1e-3
    soundfile.write(path / "speech.wav", np.clip(noise, -0.9, 0.9), 22_050)
    shutil.copy(ROOT / "tests" / "fixtures" / "dev_tiny" / "checkpoint.pt", path / "dinosr.ckpt")
    return path


ELSEWHERE = ["docs/deploying.md"]  # by tests/hub/test_export.py, with a network that is exported already
WITH_PYTHON = [
    name
    for name in DOCUMENTS
    if blocks(name, "python") and name not in ELSEWHERE and not name.startswith("model_cards/")
]


@pytest.mark.parametrize("name", WITH_PYTHON)
def test_python_in_documents_runs(folder, name):
    # In its own process: remote code would stay registered with the automatic classes.
    work = folder / name.replace("/", "-")
    work.mkdir()
    for entry in ("runs", "speech.wav", "dinosr.ckpt"):
        source = folder / entry
        shutil.copytree(source, work / entry) if source.is_dir() else shutil.copy(source, work / entry)
    paths = [str(ROOT / "src"), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    done = forks.run(["-c", RUN_BLOCKS, name], text=json.dumps(blocks(name, "python")), cwd=work, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]


def test_readme_contains_python():
    assert "README.md" in WITH_PYTHON


def commands(text):
    """Yield the words of each command in a bash block, without comments and leading variables."""
    for line in re.sub(r"\\\n", " ", text).splitlines():
        for command in re.split(r"\s*(?:&&|;)\s*", line):
            words = shlex.split(command, comments=True)
            while words and re.match(r"[A-Z_]+=", words[0]):
                words.pop(0)
            if words:
                yield words


OWN_PARSER = (
    *("benchmarks/deploy.py", "benchmarks/convert_memory.py"),
    *("benchmarks/train_step.py", "benchmarks/batching.py", "benchmarks/few_labels.py"),
    *("benchmarks/unit_agreement.py", "benchmarks/convolution.py", "benchmarks/codebook.py"),
    *("benchmarks/extract.py", "benchmarks/ctc.py", "benchmarks/dataloading.py", "benchmarks/scaling.py"),
    *("benchmarks/learning.py", "benchmarks/checkpoint_stall.py", "benchmarks/gpu_check.py"),
)


def check_subcommand(name, flags):
    """Check that a command, which is named as its module, accepts these flags."""
    module = load_command(name)
    flags = [str(ROOT / flag) if flag.startswith("examples/") else flag for flag in flags]
    if flags == ["--help"]:
        return
    if name == "demo":
        flags, name = module.make_parser().parse_known_args(flags)[1], "pretrain"
    if name == "pretrain":
        parse_arguments(flags, TINY)
    elif hasattr(module, "GROUPS"):
        parse_groups(flags, module.GROUPS, module.CONFIG)
    elif hasattr(module, "parse"):
        module.parse(flags)
    else:
        module.make_parser().parse_args(flags)


def check_dinosr(words):
    name, *flags = words
    if name != "--help":
        assert name in COMMANDS, f"dinosr {name}: the commands are {list(COMMANDS)}"
        check_subcommand(COMMANDS[name][0], flags)


def check_script(script, flags):
    """Check that the script exists and accepts these flags."""
    assert (ROOT / script).is_file(), f"{script} does not exist"
    if script.startswith("examples/"):
        check_subcommand(Path(script).stem, flags)
    elif script in OWN_PARSER:
        load_script(script).parse([str(ROOT / flag) if flag.endswith(".yaml") else flag for flag in flags])
    elif script == "benchmarks/scale_to_batch.py":
        study = load_script(script)
        study.arguments_of("scaled", 0, *study.parse(flags))
    else:
        raise AssertionError(f"{script}: define above how to check its flags")


def check_program(program, flags):
    """Check what starts processes: of a script, or of the module `dinosr_hf.cli`."""
    if program == "dinosr_hf.cli":
        check_dinosr(flags)
    else:
        check_script(program, flags)


def check_make(targets):
    rules = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert set(targets) <= set(rules), f"make {targets}: the Makefile has {rules}"


def check_pip(words):
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert words[0] == "install"
    for word in words[1:]:
        named = re.fullmatch(r"(?:\.|dinosr-hf)(?:\[([\w,]+)\])?", word)
        assert named, f"pip {words}: {word} is not this package"
        assert set((named[1] or "").split(",")) - {""} <= set(extras), f"{word}: the extras are {list(extras)}"


def check_command(words):
    match words:
        case [assignment, *rest] if re.fullmatch(r"[A-Z_]+=\w*", assignment):
            check_command(rest)
        case ["make", *targets]:
            check_make(targets)
        case ["pip", *rest]:
            check_pip(rest)
        case ["dinosr", *rest]:
            check_dinosr(rest)
        case ["python", "-m", program, *flags] | ["python", program, *flags]:
            check_program(program, flags)
        case ["accelerate", "launch", *rest]:
            from accelerate.commands.launch import launch_command_parser

            launch = launch_command_parser().parse_args(rest)
            check_program(launch.training_script, launch.training_script_args)
        case ["torchrun", *rest]:
            from torch.distributed.run import get_args_parser

            launch = get_args_parser().parse_args(rest)
            check_program(launch.training_script, launch.training_script_args)
        case ["git" | "cd" | "hf", *_]:
            pass
        case [tool, *_] if tool.startswith(".venv/bin/"):
            pass
        case _:
            raise AssertionError(f"unknown command: {shlex.join(words)}")


BASH = [(f"{name}:{line}", text) for name in DOCUMENTS for line, text in blocks(name, "bash")]


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """Create the models, labels and Python that the commands of the documents name and look at."""
    path = tmp_path_factory.mktemp("bases")
    for name, config in (
        ("tiny", parse_arguments([], TINY).model_config()),
        ("small", read_config("small").model_config()),
        ("again", read_config("small").model_config()),
        ("base", DinoSRConfig()),
    ):
        config.save_pretrained(path / "runs" / name)
    (path / "spidr_env" / "bin").mkdir(parents=True)
    (path / "spidr_env" / "bin" / "python").symlink_to(sys.executable)
    (path / "phones.jsonl").write_text('{"name": "a", "phones": ["a"]}\n')
    for _, text in blocks("docs/command-line.md", "yaml"):
        (path / "units.yaml").write_text(text)
    return path


@pytest.mark.parametrize("text", [text for _, text in BASH], ids=[name for name, _ in BASH])
def test_commands_in_documents_are_valid(text, bases, monkeypatch):
    monkeypatch.chdir(bases)
    for words in commands(text):
        check_command(words)


@pytest.mark.parametrize(
    "command",
    [
        "make coffee",
        'pip install ".[nothing]"',
        "python examples/nothing.py",
        "accelerate launch examples/pretrain.py examples/configs/nothing.yaml",
        "PORT=1 accelerate launch examples/pretrain.py --max_stepz 3",
        "python examples/make_manifest.py my_recordings",
        "accelerate launch examples/finetune_classification.py --label speaker_id",
        "python examples/plot_run.py runs/a --x hour",
        "python examples/transcribe.py runs/recogniser a.wav --format ass",
        "python examples/export_onnx.py runs/a",
        "python examples/extract_units.py runs/a my_speech --layers 5",
        "accelerate launch examples/extract_units.py runs/a my_speech --output_dir units --layer five",
        "python examples/fit_kmeans.py runs/a my_speech",
        "python benchmarks/unit_agreement.py runs/a --sources pupil",
        "python examples/evaluate_units.py runs/a --data my_speech --labels phones.ctm",
        "python examples/evaluate_layers.py runs/a --data my_speech --labels phones.ctm",
        "python examples/evaluate_abx.py runs/a --data my_speech --output_dir runs/abx --distances identical",
        "python examples/inspect_units.py runs/a my_speech --output page.html --source pupil",
        "python examples/prepare_for_hub.py runs/a",
        "python examples/prepare_for_hub.py runs/a hub/a --public",
        "python examples/tune_decoding.py runs/recogniser my_speech",
        "dinosr pretain",
        "dinosr pretrain smal",
        "dinosr units runs/a my_speech",
        "accelerate launch -m dinosr_hf.cli pretrain small --max_stepz 3",
        "python benchmarks/train_step.py --size huge",
        "python benchmarks/extract.py --peers wav2vec",
        "python benchmarks/extract.py --shortest 3 --longest 2",
        "python benchmarks/ctc.py --repeats 0",
        "python benchmarks/scaling.py --axes height",
        "python benchmarks/dataloading.py --epochs 0",
        "python benchmarks/codebook.py --sizes many",
        "python benchmarks/batching.py my_recordings --epochs 0",
        "python benchmarks/scale_to_batch.py --seedz 0",
        "rm -rf runs",
    ],
)
def test_invalid_commands_are_detected(command):
    (words,) = commands(command)
    with pytest.raises((AssertionError, ArgumentError, SystemExit)):
        check_command(words)


@pytest.mark.parametrize("name", [module for module, *_ in COMMANDS.values()])
def test_each_flag_has_a_help_text(name):
    module = load_command(name)
    assert max(map(len, module.__doc__.splitlines())) < 120, "a backslash joins two lines"
    if hasattr(module, "make_parser"):
        for action in module.make_parser().arguments().values():
            assert re.search("[a-z]{3}", action.help.replace("%(default)s", "")), action.dest
            assert not isinstance(action.default, list) or "%(default)s" not in action.help, action.dest


def anchors(file):
    """Return the anchors that GitHub gives to the headings of a file."""
    text = re.sub(r"^```.*?^```$", "", file.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    titles = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("name", DOCUMENTS)
def test_links_resolve(name):
    text = re.sub(r"^```.*?^```$", "", (ROOT / name).read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"https?://", link):
            continue
        path, _, anchor = link.partition("#")
        target = (ROOT / name).parent / path if path else ROOT / name
        assert target.exists(), f"{name}: {link} does not exist"
        if anchor:
            assert anchor in anchors(target), f"{name}: {link} is not one of the headings {sorted(anchors(target))}"


def test_short_codes_are_defined():
    text = (ROOT / "docs" / "parity.md").read_text(encoding="utf-8")
    defined = set(re.findall(rf"^- \*\*({CODES})\*\*", text, re.MULTILINE))
    sources = [*(ROOT / "src").rglob("*.py"), *(ROOT / "docs").glob("*.md")]
    used = {code for file in sources for code in re.findall(CODES, file.read_text(encoding="utf-8"))}
    assert used and used <= defined


def test_every_room_is_in_the_architecture():
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    package = ROOT / "src" / "dinosr_hf"
    rooms = {file.relative_to(package).with_suffix("").parts[0] for file in package.rglob("*.py")}
    assert {room for room in rooms if f"`{room}`" not in text} == set()


def test_every_logged_metric_is_documented(tmp_path, recordings):
    labels = tmp_path / "labels.jsonl"
    names = sorted(path.name for path in recordings.iterdir())
    labels.write_text(
        "".join(
            json.dumps({"name": name, "phones": [{"label": "a", "start": 0, "end": 0.5}]}) + "\n" for name in names
        )
    )
    run(
        tiny_arguments(
            tmp_path, recordings, max_steps=2, eval_steps=2, eval_data=str(recordings), eval_labels=str(labels)
        )
    )
    fields = dict.fromkeys(["warnings"])  # appears only when the monitor has a warning
    for line in metrics_of(tmp_path / "out"):
        fields |= line
    assert {"loss", "eval_loss", "eval_pnmi", "grad_norm", "memory_gib"} <= set(fields)
    text = (ROOT / "docs" / "pretraining.md").read_text(encoding="utf-8")
    assert "`eval_...`" in text  # a held-out metric is documented under its name without the prefix
    assert [name for name in fields if not re.search(rf"`(eval_)?{name.removeprefix('eval_')}`", text)] == []
