"""The folder that goes to the Hub: written whole, loaded once as others will, then uploaded."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import HfApi, ModelCard
from transformers import AutoFeatureExtractor, AutoModel, AutoProcessor, PreTrainedModel
from transformers.dynamic_module_utils import get_class_from_dynamic_module

from ..model import modeling_dinosr
from ..training.run_record import RECORD_NAME, RunRecord
from ..utils.files import atomic_folder
from ..utils.model_folder import feature_extractor
from .card import build_card
from .provenance import Provenance

ARCHITECTURES = {
    "pretraining": ("DinoSRForPreTraining", "DinoSRModel"),
    "automatic-speech-recognition": ("DinoSRForCTC",),
    "audio-classification": (
        *("DinoSRForSequenceClassification", "DinoSRForAudioFrameClassification", "DinoSRForXVector"),
    ),
}

# Of a run that is still to be prepared; nothing of it is for others.
LEFTOVERS = (
    *(RECORD_NAME, "metrics.jsonl", "arguments.yaml", "finished.json", "training_args.bin", "trainer_state.json"),
    *("optimizer.pt", "scheduler.pt", "training_state.pt", "process_states.pt", "checkpoint-*", "step-*"),
)


def _open_model(folder: Path, record: RunRecord) -> PreTrainedModel:
    if (folder / "adapter_config.json").exists():
        raise ValueError(
            f"{folder} has an adapter, which needs its base model to be of use. Merge them with"
            " `model.merge_and_unload()`, save the result to a folder with its processor, and give that."
        )
    if not (folder / "config.json").is_file():
        raise ValueError(f"{folder} has no config.json. Give the folder that a run left its model in.")
    names = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("architectures") or ["none"]
    if names[0] not in ARCHITECTURES[record.task]:
        raise ValueError(
            f"{folder} is a {names[0]}, but the run's task is {record.task}, whose models are"
            f" {', '.join(ARCHITECTURES[record.task])}. Give the record of the run that made the model."
        )
    return getattr(modeling_dinosr, names[0]).from_pretrained(folder)


def _open_processor(folder: Path, record: RunRecord, model: PreTrainedModel) -> Any:
    """What turns audio into input and, for a recogniser, labels into text."""
    if record.task != "automatic-speech-recognition":
        has_own = (folder / "preprocessor_config.json").exists() or (folder / "processor_config.json").exists()
        return AutoFeatureExtractor.from_pretrained(folder) if has_own else feature_extractor()
    processor = AutoProcessor.from_pretrained(folder)
    tokenizer = getattr(processor, "tokenizer", None)
    if tokenizer is None:
        raise ValueError(
            f"{folder} has no tokenizer, and a recogniser is of no use without. Save it there with"
            " `processor.save_pretrained(folder)`."
        )
    if len(tokenizer) > model.config.vocab_size:
        raise ValueError(
            f"The tokenizer of {folder} has {len(tokenizer)} labels, but vocab_size={model.config.vocab_size}. Save"
            " the tokenizer that the model was trained with."
        )
    # Where a tokenizer was read from stays on this machine.
    tokenizer.name_or_path = ""
    tokenizer.init_kwargs.pop("name_or_path", None)
    return processor


def _check_loads(folder: Path, model: PreTrainedModel) -> None:
    """Open the folder by the installed code and by its own; weights that differ are an error of ours."""
    name = type(model).__name__
    own_class: Any = get_class_from_dynamic_module(f"modeling_dinosr.{name}", str(folder))
    own_module = sys.modules[own_class.__module__]
    named = json.loads((folder / "config.json").read_text(encoding="utf-8"))["auto_map"]
    wanted = {auto: f"modeling_dinosr.{class_name}" for auto, class_name in modeling_dinosr.AUTO_CLASSES.items()}
    assert named == {"AutoConfig": "configuration_dinosr.DinoSRConfig", **wanted}
    assert all(hasattr(own_module, class_name) for class_name in modeling_dinosr.AUTO_CLASSES.values())
    AutoModel.from_pretrained(folder)
    for loaded in (getattr(modeling_dinosr, name).from_pretrained(folder), own_class.from_pretrained(folder)):
        state = loaded.state_dict()
        assert all(torch.equal(tensor, state[key]) for key, tensor in model.state_dict().items())


def prepare(
    folder: str | os.PathLike,
    out: str | os.PathLike,
    provenance: Provenance,
    record: RunRecord,
    *,
    include: Sequence[str | os.PathLike] = (),
) -> Path:
    """
    Write a folder that is ready for the Hub, all of it or nothing.

    It has the weights as safetensors, the configuration with all heads, the model's code, feature extractor or
    processor, and the card as README.md; nothing else that the run left. It was opened before it appears.

    Args:
        folder: Where the run left its model.
        out: The folder to write; a new one, or an empty one.
        provenance, record: As `read_provenance` gives them.
        include: Files to copy beside them, such as a description of the text normalisation.

    Returns:
        The folder.

    Raises:
        ValueError: If `out` has files, the model is not of the record's task, a recogniser has no tokenizer or one
            that does not fit, or a file to include is not there or would replace another.
    """
    folder, out = Path(folder), Path(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out} has files already. Give a new folder, or remove it.")
    for file in map(Path, include):
        if not file.is_file():
            raise ValueError(f"{file} is to be included, but is no file.")
    model = _open_model(folder, record)
    processor = _open_processor(folder, record, model)
    card = build_card(record, provenance, model)
    with atomic_folder(out) as whole:
        model.save_pretrained(whole)
        processor.save_pretrained(whole)
        card.save(whole / "README.md")
        for file in map(Path, include):
            if (whole / file.name).exists():
                raise ValueError(f"{file} is to be included, but {file.name} is a file of the model. Rename it.")
            shutil.copyfile(file, whole / file.name)
        _check_loads(whole, model)
    return out


def _check_ready(folder: Path) -> None:
    for name in ("config.json", "README.md"):
        if not (folder / name).is_file():
            raise ValueError(f"{folder} has no {name}. Give a folder that `prepare` wrote.")
    leftovers = sorted(file.name for pattern in LEFTOVERS for file in folder.glob(pattern))
    if leftovers:
        raise ValueError(
            f"{folder} has what a run left for itself ({', '.join(leftovers)}). Give a folder that `prepare` wrote."
        )
    if not ModelCard.load(folder / "README.md").data.get("license"):
        raise ValueError(f"The card of {folder} names no licence. Give a folder that `prepare` wrote.")


def push(
    folder: str | os.PathLike,
    repo_id: str,
    *,
    private: bool = True,
    token: str | None = None,
    message: str = "Add model",
) -> str:
    """
    Upload a folder that `prepare` wrote, to a repository that is made if it is not there.

    Args:
        folder: What to upload, all of it.
        repo_id: `organisation/name`.
        private: Whether a new repository is for its owners only; one that is there stays as it is.
        token: Of an account that may write there; None: the one that `hf auth login` keeps.
        message: Of the commit.

    Returns:
        Where the model is now.

    Raises:
        ValueError: If the folder is not one that `prepare` wrote.
    """
    folder = Path(folder)
    _check_ready(folder)
    api = HfApi(token=token)
    url = api.create_repo(repo_id, private=private, exist_ok=True)
    api.upload_folder(folder_path=folder, repo_id=repo_id, commit_message=message)
    return str(url)
