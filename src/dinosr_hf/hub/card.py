"""Render model cards and files of results: from a run's record and its provenance, or for a converted checkpoint."""

from __future__ import annotations

import html
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResult, EvalResultEntry, ModelCard, ModelCardData, eval_result_entries_to_yaml
from transformers import PreTrainedModel

from ..model.modeling_dinosr import DinoSRForPreTraining
from ..training.run_record import RunRecord, public_values
from ..utils.names import printable_name
from .provenance import HUB_METRICS, UNPUBLISHED, Provenance, main_metric

TEMPLATE = Path(__file__).with_name("model_card.md")

# Name of each metric that a record may have, and the factor from its value to the unit in the name.
METRIC_NAMES = {
    "wer": ("word error rate, %", 100),
    "cer": ("character error rate, %", 100),
    "accuracy": ("accuracy, %", 100),
    "macro_f1": ("F1, mean over classes, %", 100),
    "real_time_factor": ("seconds of processing per second of audio", 1),
    "loss": ("loss, nats per masked frame", 1),
    "target_perplexity": ("target perplexity, mean over codebooks", 1),
    "prediction_perplexity": ("prediction perplexity, mean over codebooks", 1),
    "active_codewords": ("active codewords, mean over codebooks", 1),
    "pnmi": ("phone-normalised mutual information, best codebook", 1),
    "phone_purity": ("phone purity, best codebook", 1),
    "anchor_pnmi": ("phone-normalised mutual information, labels of the anchor's head", 1),
}
PIPELINE_TAGS = {"pretraining": "feature-extraction"}  # of tasks that have another name on the Hub


def _is_path(name: str, value: str) -> bool:
    looks_like_path = re.match(r"[/~]|\.{1,2}[\\/]|[A-Za-z]:[\\/]|\\\\", value) is not None
    is_deep = "://" not in value and len(re.findall(r"[\\/]", value)) > 1
    return looks_like_path or is_deep or name == "resume" or name.endswith(("_dir", "_file", "_path"))


def redact_paths(value: Any, name: str = "") -> Any:
    """
    Return arguments (plain values, lists and mappings) as they can be published.

    Of each path the last part stays, and secrets are removed as by `public_values`. `name` may tell that a value is a
    path.
    """
    if isinstance(value, Mapping):
        return {key: redact_paths(item, key) for key, item in public_values(value).items()}
    if isinstance(value, list | tuple):
        return [redact_paths(item, name) for item in value]
    if isinstance(value, str) and _is_path(name, value):
        return re.split(r"[\\/]", value.rstrip("\\/"))[-1]
    return value


def plain(text: Any) -> str:
    """Return text as one line of Markdown that shows it as it is, whatever characters it has."""
    shown = html.escape(printable_name(str(text)), quote=False).strip()
    shown = re.sub(r"[\\`*\[\]|~$!#]|(?<![^\W_])_|_(?![^\W_])", r"\\\g<0>", shown)
    # Where a list, or the line under a heading, would begin.
    return re.sub(r"^(\d+(?=[.)](?:\s|$))|(?=[-+=]))", r"\1\\", shown)


def code(text: Any) -> str:
    """Return text as Markdown's code, or as `plain` if it has characters that would end it."""
    return f"`{text}`" if re.fullmatch(r"[\w./-]([\w ./-]*[\w./-])?", str(text)) else plain(text)


def render_card(metadata: ModelCardData, model: PreTrainedModel, **values: Any) -> ModelCard:
    """
    Render a card from the template.

    Args:
        metadata: The Hub's metadata. Its `pipeline_tag` decides which lines the card shows to use the model.
        model: Model whose sizes the card tells.
        **values: Further values of the template: `layout` of a converted checkpoint, or `run` and its facts.
    """
    num_parameters = f"{sum(parameter.numel() for parameter in model.parameters()):,}"
    values |= {"config": model.config, "num_parameters": num_parameters, "plain": plain, "code": code}
    values["is_pretraining"] = isinstance(model, DinoSRForPreTraining)
    return ModelCard.from_template(metadata, template_path=str(TEMPLATE), **values)


def _hours(hours: float) -> str:
    return ("{:,.1f}" if hours >= 1 else "{:.2g}").format(hours)


def _training_data(record: RunRecord, provenance: Provenance) -> Iterator[dict[str, Any]]:
    """Yield each entry of the training data with its dataset, and with hours, which the run or the user counted."""
    for entry in record.data:
        dataset = provenance.dataset(entry["name"])
        yield {**entry, "dataset": dataset, "hours": dataset.hours if entry["hours"] is None else entry["hours"]}


def _figures(record: RunRecord) -> Iterator[tuple[Mapping[str, Any], str, str, float]]:
    """Yield each metric of the record: its entry, its name there and on the card, and its value on the card."""
    for entry in record.evaluation:
        for metric, (name, factor) in METRIC_NAMES.items():
            if entry.get(metric) is not None:
                yield entry, metric, name, round(entry[metric] * factor, 3)


def _metadata(record: RunRecord, provenance: Provenance) -> ModelCardData:
    pipeline_tag = PIPELINE_TAGS.get(record.task, record.task)
    results: list[EvalResult] = []
    sources: dict[Any, str] = {}
    for entry, metric, name, value in _figures(record):
        dataset = provenance.dataset(entry["dataset"])
        place = (dataset.id or dataset.name, dataset.config, entry["split"])
        if sources.setdefault(place, entry["dataset"]) != entry["dataset"]:
            raise ValueError(
                f"{entry['dataset']} and {sources[place]} are the same dataset to the Hub:"
                f" {' '.join(filter(None, place))}. Give each its own `config` in the provenance file."
            )
        results.append(
            EvalResult(
                task_type=pipeline_tag,
                dataset_type=place[0],
                dataset_name=dataset.label,
                dataset_config=dataset.config,
                dataset_split=entry["split"],
                metric_type=metric,
                metric_name=name,
                metric_value=value,
            )
        )
    training_ids = [provenance.dataset(entry["name"]).id for entry in record.data]
    return ModelCardData(
        license=provenance.license,
        license_name=provenance.license_name,
        license_link=provenance.license_link,
        language=provenance.languages,
        library_name="transformers",
        pipeline_tag=pipeline_tag,
        datasets=list(dict.fromkeys(filter(None, training_ids))) or None,
        base_model=None if provenance.base_model == UNPUBLISHED else provenance.base_model,
        tags=["dinosr", "speech", "audio", *(["self-supervised"] if record.task == "pretraining" else [])],
        metrics=[name for name in HUB_METRICS if any(result.metric_type == name for result in results)] or None,
        model_name=provenance.repo_id.rpartition("/")[2],
        eval_results=results or None,
    )


def build_results(record: RunRecord, provenance: Provenance) -> dict[str, str]:
    """
    Render the results on the Hub's benchmarks, for its leaderboards: name -> content of files in `.eval_results/`.

    The format is that of https://huggingface.co/docs/hub/eval-results, one file per benchmark. Only datasets that the
    provenance gives a `task_id` are benchmarks. Their result is the first of `HUB_METRICS` that the run measured,
    as on the card. Raises `ValueError` for two results of one task.
    """
    found: dict[tuple[str, str], EvalResultEntry] = {}
    for entry, metric, name, value in _figures(record):
        dataset = provenance.dataset(entry["dataset"])
        if dataset.id is None or dataset.task_id is None or metric != main_metric(entry):
            continue
        task = (dataset.id, dataset.task_id)
        if task in found:
            raise ValueError(
                f"The run has two results for the task {dataset.task_id} of {dataset.id}. Leave out the task_id of"
                f" {dataset.name}: a benchmark takes one."
            )
        found[task] = EvalResultEntry(
            *task,
            value,
            date=record.finished and record.finished[:10],
            source_url=f"https://huggingface.co/{provenance.repo_id}",
            source_name="Model card",
            notes=f"{name}; {entry['num_utterances']:,} utterances",
        )
    files: dict[str, list[EvalResultEntry]] = {}
    for (benchmark, _), result in found.items():
        files.setdefault(f"{benchmark.replace('/', '--')}.yaml", []).append(result)
    return {
        file: yaml.safe_dump(eval_result_entries_to_yaml(results), sort_keys=False, allow_unicode=True)
        for file, results in files.items()
    }


def build_card(record: RunRecord, provenance: Provenance, model: PreTrainedModel) -> ModelCard:
    """
    Render the card of a trained model.

    Args:
        record: Record of the run that trained it.
        provenance: Result of `read_provenance`, with an entry for every dataset of the record.
        model: Model whose sizes the card tells.

    Returns the card; `str` of it is the README.md. It has no path of this machine, unless the provenance has one, and
    whatever the record says is shown as text: only `intended_use`, `limitations` and `license_reason` are Markdown.
    Raises `ValueError` if the Hub cannot tell two datasets of the evaluation apart.
    """
    arguments = yaml.safe_dump(redact_paths(record.arguments), sort_keys=False, allow_unicode=True)
    longest = max(map(len, re.findall("`+", arguments)), default=0)
    return render_card(
        _metadata(record, provenance),
        model,
        title=provenance.repo_id.rpartition("/")[2],
        run=record,
        provenance=provenance,
        unpublished=record.base_model and redact_paths(record.base_model, "base_model_path"),
        arguments=arguments,
        fence="`" * max(3, longest + 1),  # which no argument can end
        frame_ms=f"{model.config.inputs_to_logits_ratio / 16:g}",
        hours=_hours,
        data=list(_training_data(record, provenance)),
        figures=list(_figures(record)),
    )
