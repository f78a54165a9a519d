"""Code in a model's folder never runs from a script, whatever its files name and whatever is piped into the script."""

import ast
import dataclasses
import json
import re
import shutil
import sys
import warnings

import pytest
from transformers import AutoConfig

from audio_files import write
from dinosr_hf.model.modeling_dinosr import AUTO_CLASSES
from dinosr_hf.training.run_record import write_record
from language_models import write_arpa
from recognisers import MODEL_SCRIPTS, RECORD, save_models
from scripts import ROOT, load_command

FINETUNING = "{nothing} --train_data {corpus} --eval_strategy no --use_cpu true --max_steps 1 --output_dir {out}"
# Of each script that opens a model: the kind of the model, and the words of a command, with {model} for its folder.
COMMANDS = {
    **{script: (kind, f"{{model}} {words}") for script, (kind, words) in MODEL_SCRIPTS.items()},
    "evaluate_units": ("pretrained", "{model} --data {data} --labels {labels} --layers 3 --output_dir {out}"),
    "evaluate_layers": (
        "pretrained",
        "{model} --data {corpus} --labels {labels} --speakers label --layers 3 --output_dir {out}",
    ),
    "evaluate_abx": (
        "pretrained",
        "{model} --data {corpus} --labels {labels} --speakers label --layers 3 --output_dir {out}",
    ),
    "prepare_for_hub": ("recogniser", "{model} {out} --provenance {provenance}"),
    "finetune_ctc": ("pretrained", f"{FINETUNING} --model {{model}}"),
    "finetune_classification": ("pretrained", f"{FINETUNING} --model {{model}} --label_column kind"),
    "pretrain": (
        "pretrained",
        "{nothing} --base_model {model} --data {data} --max_steps 1 --min_seconds 0.1 --max_seconds 0.5"
        " --step_seconds 0.5 --micro_seconds 0.5 --num_workers 0 --output_dir {out}",
    ),
    "tune_decoding": ("recogniser", "{model} {corpus} {lm} --trials 1"),
}
KINDS = ("its own type", "an unknown type", "unknown processors")
# Those that do all of their work, which takes long.
SLOW = {(script, kind) for script in ("finetune_ctc", "fit_kmeans", "inspect_units") for kind in KINDS[::2]}
CASES = [
    pytest.param(script, kind, marks=[pytest.mark.slow] if (script, kind) in SLOW else [])
    for script in COMMANDS
    for kind in KINDS
]
EVIL = """
from pathlib import Path
Path(__file__).with_name("it_ran").touch()
Path({marker!r}).touch()
from transformers import PreTrainedConfig, PreTrainedModel
class Config(PreTrainedConfig):  # transformers marks the class, so it must not be its own
    model_type = "evil"
class Model(PreTrainedModel):
    config_class = Config
"""


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """Make a folder with models, and with a few short recordings."""
    folder = tmp_path_factory.mktemp("work")
    save_models(folder)
    for number in range(3):
        write(folder / "data" / f"{number}.wav", 8_000)
        write(folder / "corpus" / f"{number}.wav", 8_000)
    rows = [
        "file_name,transcription,label,kind",
        *(f"{number}.wav,a b,c{number},k{number % 2}" for number in range(3)),
    ]
    (folder / "corpus" / "metadata.csv").write_text("\n".join(rows))
    phones = [("B", 0.0), ("AA", 0.15), ("B", 0.3)]
    lines = [f"{number} 1 {start} 0.15 {phone}\n" for number in range(3) for phone, start in phones]
    (folder / "labels.ctm").write_text("".join(lines))
    (folder / "nothing.yaml").write_text("")
    write_arpa(folder / "lm.arpa", ["A B"])
    datasets = [{"name": entry, "license": "cc0-1.0"} for entry in ("train", "test")]
    facts = {"repo_id": "a/b", "license": "cc0-1.0", "languages": ["en"], "base_model": "unpublished"}
    (folder / "provenance.yaml").write_text(json.dumps({**facts, "datasets": datasets}))
    return folder


def change(file, **changes):
    content = json.loads(file.read_text()) if file.is_file() else {}
    file.write_text(json.dumps({**content, **changes}))


def spoil(folder, kind, marker):
    """Let the files of a model name code beside them."""
    (folder / "evil.py").write_text(EVIL.format(marker=str(marker)))
    names = dict.fromkeys([*AUTO_CLASSES, "AutoModel"], "evil.Model")
    of_model = {"AutoConfig": "evil.Config", **names}
    others = {
        "AutoProcessor": "evil.Config",
        "AutoFeatureExtractor": "evil.Config",
        "AutoTokenizer": ["evil.Model", None],
    }
    if kind == "its own type":
        change(folder / "config.json", auto_map=of_model)
        for file in ("processor_config.json", "preprocessor_config.json", "tokenizer_config.json"):
            change(folder / file, auto_map=others)
    elif kind == "an unknown type":
        change(folder / "config.json", auto_map={**of_model, **others}, model_type="evil", architectures=["Evil"])
    else:
        change(folder / "config.json", auto_map={**of_model, **others})
        unknown = {"processor_class": "Evil", "feature_extractor_type": "Evil", "tokenizer_class": "Evil"}
        for file in ("processor_config.json", "preprocessor_config.json", "tokenizer_config.json"):
            change(folder / file, auto_map=others, **unknown)


@pytest.mark.parametrize(("script", "kind"), CASES)
def test_no_script_runs_code_of_a_model(work, tmp_path, monkeypatch, script, kind):
    folder, marker, out = tmp_path / "model", tmp_path / "ran", tmp_path / "out"
    which, words = COMMANDS[script]
    shutil.copytree(work / which, folder)
    write_record(folder, dataclasses.replace(RECORD, base_model="base"))
    spoil(folder, kind, marker)
    places = {name: work / name for name in ("data", "corpus")} | {"model": folder, "out": out}
    places |= {name: work / f"{name}.yaml" for name in ("nothing", "provenance")}
    places |= {"labels": work / "labels.ctm", "lm": work / "lm.arpa"}
    argv = [word.format(**places) for word in words.split()]
    monkeypatch.setattr(sys, "argv", [f"{script}.py", *argv])
    monkeypatch.setattr("builtins.input", lambda *_: questions.append(1) or "y")
    questions, module, message = [], load_command(script), None
    # What needs Python 3.12, and comes behind the model.
    monkeypatch.setattr(module, "import_fastabx", lambda: None, raising=False)
    monkeypatch.setattr("dinosr_hf.analysis.abx.abx_error", lambda *_, **options: 0.5)
    # The network is needed behind it too, and takes long.
    monkeypatch.setattr("dinosr_hf.hub.export._export_network", lambda model, output, file: file.touch())
    monkeypatch.setattr("dinosr_hf.hub.export._check_network", lambda *_: None)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            module.main(argv)
        except SystemExit as end:
            message = end.code
    assert questions == [] and not marker.exists() and not (folder / "it_ran").exists()
    if kind == "its own type":
        assert message is None
    if kind == "an unknown type":
        assert message.startswith(f"{script}.py: ") and "\n" not in message
        assert re.search("names Python code that would have to run to open it, which|is a Evil", message)


@pytest.mark.filterwarnings("ignore")
def test_transformers_itself_asks_and_runs_it(work, tmp_path, monkeypatch):
    # The control of the test above.
    folder, marker = tmp_path / "model", tmp_path / "ran"
    shutil.copytree(work / "pretrained", folder)
    spoil(folder, "an unknown type", marker)
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    AutoConfig.from_pretrained(folder)
    assert marker.exists()


@pytest.mark.parametrize("folder", ["src", "examples", "benchmarks"])
def test_every_automatic_class_is_told_not_to_run_code(folder):
    for file in sorted((ROOT / folder).rglob("*.py")):
        for call in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if not isinstance(call, ast.Call):
                continue
            name = ast.unparse(call.func)
            kinds = ("Auto", "Wav2Vec2Processor.", "model_class.")
            if name == "pipeline" or (name.startswith(kinds) and name.endswith(".from_pretrained")):
                assert "trust_remote_code" in ast.unparse(call), f"{file}: {name}"
            given = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}
            assert given.get("trust_remote_code", "False") == "False", file
            assert name != "torch.load" or given.get("weights_only") == "True", file
            assert name != "yaml.load" or ast.unparse(call.args[1]) == "_YamlLoader", file  # a SafeLoader
            assert given.get("allow_pickle", "False") == "False", file
            assert name not in ("yaml.full_load", "pickle.load", "pickle.loads", "joblib.load", "eval", "exec"), file
