"""Open the folder of a model, prepare it for the Hub and upload it."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import HfApi, ModelCard
from huggingface_hub.constants import EVAL_RESULTS_FOLDER
from transformers import AutoModel, PreTrainedModel, Wav2Vec2FeatureExtractor, Wav2Vec2Processor
from transformers.dynamic_module_utils import get_class_from_dynamic_module

from ..model import modeling_dinosr
from ..model.configuration_dinosr import DinoSRConfig
from ..recognition.decoding import DecodingOptions
from ..recognition.text import TextNormalization
from ..training.run_record import RECORD_NAME, RunRecord
from ..utils.command_line import NetworkError
from ..utils.files import atomic_folder
from ..utils.model_folder import feature_extractor, open_dinosr_config, open_weights, opening
from .card import build_card, build_results
from .provenance import Provenance

ARCHITECTURES = {
    "pretraining": ("DinoSRForPreTraining", "DinoSRModel"),
    "automatic-speech-recognition": ("DinoSRForCTC",),
    "audio-classification": ("DinoSRForSequenceClassification",),
}

# Files of a run that do not belong on the Hub.
RUN_FILES = (
    *(RECORD_NAME, "metrics.jsonl", "arguments.yaml", "finished.json", "training_args.bin", "trainer_state.json"),
    *("optimizer.pt", "scheduler.pt", "training_state.pt", "process_states.pt", "anchor.safetensors"),
    *("anchor_origin.json", "plan.png", "checkpoint-*", "abandoned-checkpoint-*", "best-*", "step-*"),
)
# Files of an earlier upload that would contradict a later one without them: weights, results, settings of decoding.
OF_AN_EARLIER_UPLOAD = (
    *("model.safetensors", "model-*.safetensors", "model.safetensors.index.json"),
    *("decoding.json", f"{EVAL_RESULTS_FOLDER}/*"),
)

StrPath = str | os.PathLike
Processor = Wav2Vec2Processor | Wav2Vec2FeatureExtractor


def open_folder(folder: Path, allowed: Collection[str], problem: str) -> tuple[DinoSRConfig, type[PreTrainedModel]]:
    """Return configuration and class of a saved model. Raises `ValueError`, with `problem` if it is not allowed."""
    if not (folder / "config.json").is_file():
        raise ValueError(f"{folder} has no config.json. Give a folder with a saved model.")
    config = open_dinosr_config(folder)
    name = (config.architectures or ["model without architecture"])[0]
    if name not in allowed:
        raise ValueError(f"{folder} is a {name}, {problem}")
    return config, getattr(modeling_dinosr, name)


def open_processor(folder: Path, is_recogniser: bool) -> Processor:
    """Load a recogniser's processor (`ValueError` if it is incomplete), or the feature extractor of another model."""
    has_extractor = any((folder / f"{pre}processor_config.json").is_file() for pre in ("", "pre"))
    advice = "Save the processor of the model's run there: processor.save_pretrained(folder)."
    if not is_recogniser:
        with opening(folder, advice):
            return Wav2Vec2FeatureExtractor.from_pretrained(folder) if has_extractor else feature_extractor()
    if not (has_extractor and (folder / "vocab.json").is_file()):
        missing = "tokenizer (vocab.json)" if has_extractor else "feature extractor (processor_config.json)"
        raise ValueError(
            f"{folder} has no {missing}, which a recogniser needs. Save the processor of the fine-tuning run there:"
            " processor.save_pretrained(folder)."
        )
    with opening(folder, advice):
        return Wav2Vec2Processor.from_pretrained(folder, trust_remote_code=False)


def _open_model(folder: Path, record: RunRecord) -> PreTrainedModel:
    if (folder / "adapter_config.json").exists():
        raise ValueError(
            f"{folder} has an adapter, which does not work without its base model. Merge them with"
            " `model.merge_and_unload()`, save the result with its processor to another folder, and give that folder."
        )
    task, allowed = record.task, ARCHITECTURES[record.task]
    problem = f"but the run's task is {task}, whose models are {', '.join(allowed)}."
    advice = "Give the record of the run that trained the model."
    _, model_class = open_folder(folder, allowed, f"{problem} {advice}")
    return open_weights(model_class, folder)


def _check_loads(folder: Path, model: PreTrainedModel) -> None:
    """Assert that the folder's configuration, code and weights load as the model, with the installed code as well."""
    auto_map = json.loads((folder / "config.json").read_text(encoding="utf-8"))["auto_map"]
    expected = {auto: f"modeling_dinosr.{name}" for auto, name in modeling_dinosr.AUTO_CLASSES.items()}
    assert auto_map == {"AutoConfig": "configuration_dinosr.DinoSRConfig", **expected}
    AutoModel.from_pretrained(folder, trust_remote_code=False)
    remote_class: Any = get_class_from_dynamic_module(f"modeling_dinosr.{type(model).__name__}", str(folder))
    for loaded in (type(model).from_pretrained(folder), remote_class.from_pretrained(folder)):
        state = loaded.state_dict()
        assert all(torch.equal(tensor, state[key]) for key, tensor in model.state_dict().items())


def _with_decoding_files(include: Sequence[StrPath]) -> list[Path]:
    """Return the files to include, with the language model and lexicon of a decoding.json; `ValueError` if missing."""
    files = [Path(os.path.abspath(file)) for file in include]
    for file in files:  # those that are added as well
        if not file.is_file():
            raise ValueError(f"{file} is to be included, but is not a file.")
        if file.name == "decoding.json":
            options = DecodingOptions.load(file)
            files += map(Path, map(os.path.abspath, filter(None, (options.language_model, options.lexicon))))
    return list(dict.fromkeys(files))


def _include(file: Path, folder: Path) -> None:
    """Copy a file into a folder; a decoding.json so that it names language model and lexicon in that folder."""
    if (folder / file.name).exists():
        raise ValueError(f"{file} is to be included, but {file.name} is in the folder already. Rename yours.")
    if file.name != "decoding.json":
        shutil.copyfile(file, folder / file.name)
        return
    options = DecodingOptions.load(file)
    paths = {"language_model": options.language_model, "lexicon": options.lexicon}
    moved: Any = {name: None if path is None else str(folder / Path(path).name) for name, path in paths.items()}
    dataclasses.replace(options, **moved).save(folder / file.name)


def prepare(
    folder: StrPath, out: StrPath, provenance: Provenance, record: RunRecord, *, include: Sequence[StrPath] = ()
) -> Path:
    """
    Write the model of a run to a folder for the Hub, atomically, and return its path.

    It has the weights as safetensors, the configuration with all heads, the model's code, the feature extractor or
    processor, a recogniser's text normalisation, the card as README.md, and results on benchmarks in `.eval_results/`,
    but no other files of the run. It is loaded once before it appears.

    Args:
        folder: Path to the folder in which the run saved its model.
        out: Path to the folder to write; new or empty.
        provenance: Facts that the record lacks; `read_provenance` returns both.
        record: Record of the run.
        include: Paths of further files to copy, such as a recogniser's decoding.json, whose language model and lexicon
            are copied as well. All lie side by side in `out`.

    Raises:
        ValueError: If `out` has files, the model does not fit the record's task, a recogniser has no tokenizer or one
            that does not fit, or a file to include does not exist or would replace another.
    """
    folder, out = Path(folder), Path(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out} has files already. Give a new folder, or remove this one.")
    included = _with_decoding_files(include)
    model = _open_model(folder, record)
    processor = open_processor(folder, is_recogniser=record.task == "automatic-speech-recognition")
    if isinstance(processor, Wav2Vec2Processor):
        tokenizer: Any = processor.tokenizer
        if len(tokenizer) > model.config.vocab_size:
            raise ValueError(
                f"The tokenizer of {folder} has {len(tokenizer)} labels, but vocab_size={model.config.vocab_size}."
                " Save the tokenizer that the model was trained with."
            )
        # Do not publish the local path that the tokenizer was read from.
        tokenizer.name_or_path = ""
        tokenizer.init_kwargs.pop("name_or_path", None)
    normalization = TextNormalization.load(folder)
    card, results = build_card(record, provenance, model), build_results(record, provenance)
    with atomic_folder(out) as temporary:
        model.save_pretrained(temporary)
        processor.save_pretrained(temporary)
        if normalization is not None:
            normalization.save(temporary)
        card.save(temporary / "README.md")
        for name, content in results.items():
            (temporary / EVAL_RESULTS_FOLDER).mkdir(exist_ok=True)
            (temporary / EVAL_RESULTS_FOLDER / name).write_text(content, encoding="utf-8")
        for file in included:
            _include(file, temporary)
        _check_loads(temporary, model)
    return out


def push(
    folder: StrPath, repo_id: str, *, private: bool = True, token: str | None = None, message: str = "Add model"
) -> str:
    """
    Upload a folder that `prepare` wrote, or raise `ValueError`; return the URL of the repository.

    In an existing repository files of the same names are replaced, and weights, results and settings of decoding that
    only an earlier upload had are removed (`OF_AN_EARLIER_UPLOAD`). Other files stay.

    Args:
        repo_id: Name of the repository, `organisation/name`, which is created if it does not exist.
        private: Whether a new repository is private; an existing one does not change.
        token: Access token with write permission; None: the token of `hf auth login`.
    """
    folder = Path(folder)
    advice = "Give a folder that `prepare` wrote."
    for name in ("config.json", "README.md"):
        if not (folder / name).is_file():
            raise ValueError(f"{folder} has no {name}. {advice}")
    run_files = sorted(file.name for pattern in RUN_FILES for file in folder.glob(pattern))
    if run_files:
        raise ValueError(f"{folder} has files of a run ({', '.join(run_files)}). {advice}")
    if not ModelCard.load(folder / "README.md").data.get("license"):
        raise ValueError(f"The card of {folder} has no license. {advice}")
    api = HfApi(token=token)
    try:
        url = api.create_repo(repo_id, private=private, exist_ok=True)
        api.upload_folder(
            folder_path=folder, repo_id=repo_id, commit_message=message, delete_patterns=list(OF_AN_EARLIER_UPLOAD)
        )
    except (NetworkError, OSError) as error:
        command = f"hf upload {'--private ' if private else ''}{repo_id} {folder}"
        advice = f"The folder is ready: `{command}` uploads it."
        raise OSError(f"{folder} could not be uploaded: {error}. {advice}") from error
    return str(url)
