"""Every command of docs/adapting.md runs, in its order, with a tiny checkpoint of SpidR and few steps."""

import json
import os
import re
import shlex
import shutil

import pytest
import torch

import forks
from dinosr_cli import COMMANDS as MODULES
from dinosr_hf import DinoSRForPreTraining
from hub_server import hub_server
from scripts import FIXTURES, ROOT, load_command

CASE = FIXTURES / "spidr_objective"
GUIDE = (ROOT / "docs" / "adapting.md").read_text(encoding="utf-8")
COMMANDS = [
    command
    for block in re.findall(r"^```bash\n(.*?)^```", GUIDE, re.MULTILINE | re.DOTALL)
    for command in block.replace("\\\n", " ").splitlines()
]
SMALL_STEPS = "--step_seconds 8 --micro_seconds 8 --min_seconds 0.5 --max_seconds 2 --num_buckets 2 --num_workers 0"
SMALL = {  # later flags win
    "pretrain": f"{SMALL_STEPS} --max_steps 3 --fit_heads_steps 1 --eval_steps 3 --checkpoint_steps 0 --num_threads 1",
    "units": "--layers 2 --num_threads 1",
    "finetune": "--step_seconds 8 --micro_seconds 8 --max_steps 2 --freeze_steps 1 --eval_steps 2 --save_steps 2"
    " --mask_feature_length 8",
    "evaluate": "--layers 2 --num_samples 0",
}


@pytest.fixture
def place(tmp_path, recordings, monkeypatch):
    """The folder in which the guide is followed: the checkpoint on a Hub, and all data that the commands name."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "hub" / "coml" / "spidr-vp20").mkdir(parents=True)
    state = torch.load(CASE / "checkpoint.pt", weights_only=True)["model"]
    torch.save(state, tmp_path / "hub" / "coml" / "spidr-vp20" / "final.pt")
    shutil.copy(CASE / "config.json", tmp_path / "hub" / "coml" / "spidr-vp20")
    for name in ("my_language", "old_language", "held_out", "transcribed", "transcribed_dev"):
        shutil.copytree(recordings, name)
    files = sorted(recordings.iterdir())
    phones = [{"label": "a", "start": 0, "end": 0.4}, {"label": "b", "start": 0.4, "end": 0.8}]
    lines = [json.dumps({"name": file.stem, "phones": phones}) + "\n" for file in files]
    (tmp_path / "phones.jsonl").write_text("".join(lines))
    for name in ("transcribed", "transcribed_dev"):
        rows = ["file_name,transcription", *(f"{file.name},oh no" for file in files)]
        (tmp_path / name / "metadata.csv").write_text("\n".join(rows))
    return tmp_path


def convert(words):
    """Run the conversion in a process of its own, which has the address of the Hub."""
    with hub_server(ROOT.joinpath(os.getcwd(), "hub")) as hub:
        environment = {**os.environ, "HF_ENDPOINT": hub.url, "HF_HOME": os.path.abspath("home"), "HF_HUB_OFFLINE": "0"}
        done = forks.run(words, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    shutil.copytree("runs/base", "runs/again")  # stands for a run of small_again.yaml


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_each_command_of_the_guide_runs(place):
    done = []
    for command in COMMANDS:
        program, name, *flags = shlex.split(command)
        assert program == "dinosr"
        done.append(name)
        if name == "convert":
            convert(["-m", "dinosr_cli", name, *flags])
            continue
        if "--anchor_layer" in flags:
            flags[flags.index("--anchor_layer") + 1] = "2"
            flags += ["--num_anchor_labels", "5"]
        load_command(MODULES[name][0]).main([*flags, *SMALL[name].split()])
    assert done.count("pretrain") == 9 and {"units", "finetune", "evaluate"} <= set(done)
    base, adapted = (DinoSRForPreTraining.from_pretrained(f"runs/{name}") for name in ("base", "adapted"))
    assert adapted.config.head_input == base.config.head_input == "own_layer"
    assert DinoSRForPreTraining.from_pretrained("runs/adapted-anew").config.codebook_size == 128
    assert list((place / "units-adapted").glob("*.jsonl"))
