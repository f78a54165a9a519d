"""Checkpoints on the Hub are downloaded by name, and nothing else of their repositories."""

import json
import os
from types import SimpleNamespace

import pytest
import torch
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

import forks
from dinosr_hf import DinoSRForPreTraining
from dinosr_hf.hub.conversion import ConversionError, convert, downloads
from dinosr_hf.hub.conversion.downloads import is_hub_name
from hub_server import hub_server
from scripts import FIXTURES

CASE = FIXTURES / "spidr_objective"


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("coml/spidr-vp20", True),
        ("coml/baselines/spidr-vp20/ft-deu-1h/best.pt", True),
        ("runs/missing.pt", False),
        ("runs/base/config.json", False),
        ("checkpoint.pt", False),
        ("./runs/base", False),
        ("/data/dinosr.ckpt", False),
        ("runs/base/step", False),
    ],
)
def test_names_on_the_hub_are_told_from_paths(name, expected):
    assert is_hub_name(name) is expected


def test_a_folder_of_that_name_comes_first(tmp_path, monkeypatch):
    (tmp_path / "coml" / "spidr").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert not is_hub_name("coml/spidr")


def test_without_a_connection_the_error_says_so(tmp_path):
    with pytest.raises(ConversionError, match="nobody/nothing is not a file, and the Hub cannot be reached"):
        convert("nobody/nothing", tmp_path / "out")


CONVERT = """
import json, sys
from dinosr_hf.commands.convert_checkpoint import main
for words in json.load(sys.stdin):
    try:
        main(words)
        print("end: 0")
    except SystemExit as end:
        print("end:", end)
"""


def convert_from(hub, home, *commands):
    """Run commands in a process that has the address of the Hub; return what each ended with."""
    environment = {**os.environ, "HF_ENDPOINT": hub.url, "HF_HOME": str(home), "HF_HUB_OFFLINE": "0"}
    words = json.dumps([[*map(str, command)] for command in commands])
    done = forks.run(["-c", CONVERT], text=words, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    return [line.removeprefix("end: ") for line in done.stdout.splitlines() if line.startswith("end: ")]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("error", "message"),
    [
        (GatedRepoError, r"coml/x on the Hub is gated\. Accept its terms .* hf auth login"),
        (
            RepositoryNotFoundError,
            r"coml/x is neither a file nor a model on the Hub, or it is private, .*hf auth login",
        ),
    ],
)
def test_models_that_need_a_login_are_told_apart(monkeypatch, tmp_path, error, message):
    def refuse(*arguments):
        raise error("401 Client Error.", response=SimpleNamespace(headers={}, request=None, url="x", status_code=401))

    monkeypatch.setattr(downloads, "hf_hub_download", refuse)
    with pytest.raises(ConversionError, match=message):
        convert("coml/x", tmp_path / "out")


def test_a_name_downloads_the_checkpoint_and_its_configuration_alone(tmp_path):
    state = torch.load(CASE / "checkpoint.pt", weights_only=True)["model"]
    for folder in ("coml/spidr-tiny", "coml/baselines/vp20/ft-deu-1h"):
        place = tmp_path / "hub" / folder
        place.mkdir(parents=True)
        (place / "config.json").write_bytes((CASE / "config.json").read_bytes())
        (place / "README.md").write_text("---\nlicense: cc-by-nc-4.0\n---\n")
        torch.save(state, place / ("final.pt" if folder.endswith("tiny") else "best.pt"))
        torch.save(state, place / "full_checkpoint.pt")
    with hub_server(tmp_path / "hub") as hub:
        commands = [
            ("coml/spidr-tiny", tmp_path / "flat"),
            ("coml/baselines/vp20/ft-deu-1h/best.pt", tmp_path / "tuned"),
            ("coml/baselines", tmp_path / "other"),
            ("coml/nothing", tmp_path / "nothing"),
        ]
        flat, tuned, other, nothing = convert_from(hub, tmp_path / "home", *commands)
        asked = [request for request in hub.requests if "spidr-tiny/resolve" in request]
    assert flat == tuned == "0"
    assert {request.rpartition("/")[2] for request in asked} == {"final.pt", "config.json"}
    for folder in ("flat", "tuned"):
        model = DinoSRForPreTraining.from_pretrained(tmp_path / folder)
        assert model.config.head_input == "own_layer"
    assert "coml/baselines on the Hub has no final.pt or best.pt or" in other
    assert "coml/nothing is neither a file nor a model on the Hub" in nothing
