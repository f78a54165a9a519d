"""The model card, made of a run's record and its provenance: what people read, and the Hub's metadata above it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from transformers import PreTrainedModel

from ..training.run_record import RunRecord
from .provenance import UNPUBLISHED, Provenance

TEMPLATE = Path(__file__).with_name("model_card.md")

# Name, and how many of its unit 1 is, of each figure that a record may have.
MEASURES = {
    "wer": ("word error rate, %", 100),
    "cer": ("character error rate, %", 100),
    "accuracy": ("accuracy, %", 100),
    "macro_f1": ("F1, mean over classes, %", 100),
    "real_time_factor": ("seconds of processing a second of audio", 1),
    "loss": ("loss, nats a masked frame", 1),
    "target_perplexity": ("target perplexity, mean over codebooks", 1),
    "prediction_perplexity": ("prediction perplexity, mean over codebooks", 1),
    "active_codewords": ("active codewords, mean over codebooks", 1),
    "pnmi": ("phone-normalised mutual information, best codebook", 1),
    "phone_purity": ("phone purity, best codebook", 1),
}

# Those that the Hub knows by these names.
HUB_METRICS = ("wer", "cer", "accuracy")

PIPELINE_TAGS = {
    "pretraining": "feature-extraction",
    "automatic-speech-recognition": "automatic-speech-recognition",
    "audio-classification": "audio-classification",
}
INTENDED_USE = {
    "pretraining": "Features of speech, acoustic units, and fine-tuning for recognition or classification.",
    "automatic-speech-recognition": "Transcripts of speech like that it was trained on.",
    "audio-classification": "Labels of recordings like those it was trained on.",
}
LIMITATIONS = (
    "What is not among the figures below was not tested: other accents and languages, noise, distant microphones."
    " Speech of people who were not asked, and decisions about people, are no use it was made for."
)

_FEATURES_CODE = """
from transformers import AutoFeatureExtractor, AutoModel

extractor = AutoFeatureExtractor.from_pretrained("{repo_id}")
model = AutoModel.from_pretrained("{repo_id}", trust_remote_code=True)
batch = extractor(waveform, sampling_rate=16_000, return_tensors="pt")  # float32 samples at 16 kHz
features = model(**batch).last_hidden_state  # (1, frames, hidden size)
"""
_PIPELINE_CODE = """
from transformers import pipeline

pipe = pipeline("{task}", model="{repo_id}", trust_remote_code=True)
print(pipe(waveform))  # float32 samples at 16 kHz
"""
_USE_NOTE = (
    "`trust_remote_code=True` runs the Python files of this repository. With `import dinosr_hf` it is not needed, and"
    " `dinosr_hf.data.load_audio` reads recordings of any rate as 16 kHz."
)


def _is_path(name: str, value: str) -> bool:
    looks_so = re.match(r"[/~]|\.{1,2}[\\/]|[A-Za-z]:[\\/]|\\\\", value) is not None
    is_deep = "://" not in value and len(re.findall(r"[\\/]", value)) > 1
    is_place = name == "resume" or name.endswith(("_dir", "_file", "_path"))
    return looks_so or is_deep or is_place


def redact_paths(value: Any, name: str = "") -> Any:
    """
    Arguments as they can be published: paths become the name at their end, keys to accounts are left out.

    Args:
        value: Plain values, in lists and mappings.
        name: Of the argument, which may say that it is a path.
    """
    if isinstance(value, Mapping):
        secret = re.compile(r"(hub|auth|access|api).*(token|key)")
        return {key: redact_paths(item, str(key)) for key, item in value.items() if not secret.search(str(key))}
    if isinstance(value, list | tuple):
        return [redact_paths(item, name) for item in value]
    if isinstance(value, str) and _is_path(name, value):
        return re.split(r"[\\/]", value.rstrip("\\/"))[-1]
    return value


def _figures(record: RunRecord) -> list[tuple[Mapping[str, Any], str, float]]:
    """Each figure of the record: its entry, the name of its measure, its value in the unit of `MEASURES`."""
    return [
        (entry, measure, round(entry[measure] * MEASURES[measure][1], 3))
        for entry in record.evaluation
        for measure in MEASURES
        if entry.get(measure) is not None
    ]


def _card_data(record: RunRecord, provenance: Provenance) -> ModelCardData:
    results: list[EvalResult] = []
    seen: dict[Any, str] = {}
    for entry, measure, value in _figures(record):
        data = provenance.dataset(entry["dataset"])
        place = (data.id or data.name, data.config, entry["split"])
        if seen.setdefault(place, entry["dataset"]) != entry["dataset"]:
            raise ValueError(
                f"{entry['dataset']} and {seen[place]} are the same data to the Hub: {' '.join(filter(None, place))}."
                " Give them other `config` in the provenance file."
            )
        results.append(
            EvalResult(
                task_type=PIPELINE_TAGS[record.task],
                dataset_type=place[0],
                dataset_name=data.label,
                dataset_config=data.config,
                dataset_split=entry["split"],
                metric_type=measure,
                metric_name=MEASURES[measure][0],
                metric_value=value,
            )
        )
    trained_on = [provenance.dataset(entry["name"]).id for entry in record.data]
    base_model = None if provenance.base_model == UNPUBLISHED else provenance.base_model
    return ModelCardData(
        license=provenance.license,
        license_name=provenance.license_name,
        license_link=provenance.license_link,
        language=provenance.languages,
        library_name="transformers",
        pipeline_tag=PIPELINE_TAGS[record.task],
        datasets=list(dict.fromkeys(filter(None, trained_on))) or None,
        base_model=base_model,
        tags=["dinosr", "speech", "audio", *(["self-supervised"] if record.task == "pretraining" else [])],
        metrics=[name for name in HUB_METRICS if name in {result.metric_type for result in results}] or None,
        model_name=provenance.repo_id.rpartition("/")[2],
        eval_results=results or None,
    )


def _made_by(record: RunRecord, provenance: Provenance) -> str:
    verb = {"pretraining": "pre-trained", "automatic-speech-recognition": "fine-tuned with CTC"}.get(
        record.task, "fine-tuned to classify recordings"
    )
    version = record.versions.get("dinosr_hf", "")
    base = f" from {_unpublished_base(record)}" if record.base_model else ""
    if provenance.base_model and provenance.base_model != UNPUBLISHED:
        base = f" from [{provenance.base_model}](https://huggingface.co/{provenance.base_model})"
    return f", {verb}{base} with dinosr-hf {version}".rstrip()


def _unpublished_base(record: RunRecord) -> str:
    return f"{redact_paths(record.base_model, 'base_model_path')}, which is not published,"


def _data_rows(record: RunRecord, provenance: Provenance) -> list[list[str]]:
    rows = []
    for entry in record.data:
        data = provenance.dataset(entry["name"])
        hours = data.hours if entry["hours"] is None else entry["hours"]
        assert hours is not None  # `read_provenance` saw to it
        written = f"{hours:,.1f}" if hours >= 1 else f"{hours:.2g}"
        utterances = "not counted" if entry["utterances"] is None else f"{entry['utterances']:,}"
        rows.append([data.label, entry["split"] or "all", written, utterances, data.license])
    return rows


def _figure_rows(record: RunRecord, provenance: Provenance) -> list[list[str]]:
    return [
        [
            MEASURES[measure][0],
            provenance.dataset(entry["dataset"]).label,
            entry["split"] or "all",
            f"{entry['num_utterances']:,}",
            f"{value:g}",
            "this run",
        ]
        for entry, measure, value in _figures(record)
    ]


def build_card(record: RunRecord, provenance: Provenance, model: PreTrainedModel) -> ModelCard:
    """
    Render the card of a model.

    Args:
        record: Of the run that made it.
        provenance: As `read_provenance` gives it, with an entry for all data of the record.
        model: For its sizes.

    Returns:
        The card; `str` of it is the README.md. No path of this machine is in it, unless the provenance has one.

    Raises:
        ValueError: If two data that were measured on have the same name to the Hub.
    """
    config = model.config
    is_pretraining = record.task == "pretraining"
    code = _FEATURES_CODE if is_pretraining else _PIPELINE_CODE
    output = {
        "pretraining": "one vector every 20 ms",
        "automatic-speech-recognition": f"one of {config.vocab_size} labels every 20 ms, for greedy or beam search",
        "audio-classification": f"one of {config.num_labels} labels a recording",
    }[record.task]
    license_text = provenance.license_name or provenance.license
    if provenance.license_link:
        license_text = f"[{license_text}]({provenance.license_link})"
    return ModelCard.from_template(
        _card_data(record, provenance),
        template_path=str(TEMPLATE),
        title=provenance.repo_id.rpartition("/")[2],
        made_by=_made_by(record, provenance),
        num_parameters=f"{sum(parameter.numel() for parameter in model.parameters()):,}",
        encoder=f"{config.num_hidden_layers} layers, width {config.hidden_size}, {config.num_codebooks} codebooks of"
        f" {config.codebook_size} codewords",
        output=output.replace("20 ms", f"{config.inputs_to_logits_ratio / 16:g} ms"),
        intended_use=provenance.intended_use or INTENDED_USE[record.task],
        limitations=provenance.limitations or LIMITATIONS,
        code=code.format(task=record.task, repo_id=provenance.repo_id).strip(),
        use_note=_USE_NOTE,
        data=_data_rows(record, provenance),
        steps=f"{record.steps:,}",
        hardware=record.hardware,
        started=record.started,
        finished=record.finished,
        versions=", ".join(f"{name} {version}" for name, version in record.versions.items()),
        arguments=yaml.safe_dump(redact_paths(record.arguments), sort_keys=False, allow_unicode=True),
        figures=_figure_rows(record, provenance),
        license=license_text + (f". {provenance.license_reason.rstrip('.')}" if provenance.license_reason else ""),
    )
