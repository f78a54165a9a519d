"""
Run a fine-tuned model without PyTorch: export to ONNX, int8 weights for CPUs, and a comparison of the results.

The folder of an exported model has the network, `model.onnx`, its configuration and its processor. The network maps
`input_values`, float32 (B, S) as the feature extractor returns them, and `attention_mask`, int64 (B, S) with 0 for
padding at the end, to an output of `OUTPUTS`, float32 (B, T, D) or (B, D), for any batch size and length.

`B` batch, `S` samples, `T` frames, `D` width of the output.
"""

from __future__ import annotations

import copy
import logging
import shutil
import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import cast

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedModel, Wav2Vec2Processor

from ..data import SAMPLING_RATE
from ..model.configuration_dinosr import DinoSRConfig
from ..model.modeling_dinosr import DinoSRForCTC, DinoSRForXVector
from ..recognition.text import NORMALIZATION_FILE
from ..utils.extras import import_extra
from ..utils.files import atomic_folder
from ..utils.model_folder import open_weights
from ..utils.names import printable_name
from .folder import Processor, StrPath, open_folder, open_processor

NETWORK = "model.onnx"
# What a folder of an exported model may have beside its network and configuration.
BESIDE = {f"{NETWORK}.data", "preprocessor_config.json", "processor_config.json", "tokenizer_config.json"} | {
    *("vocab.json", "special_tokens_map.json", "added_tokens.json", NORMALIZATION_FILE)
}

# Exported networks and torch differ by rounding: 2e-6 (tiny models), 1e-5 (base), for outputs of about 1.
MAX_DIFFERENCE = 1e-4


# Names of the exported outputs; those of three dimensions have a row for each frame.
OUTPUTS = {
    "DinoSRForCTC": "logits",
    "DinoSRForAudioFrameClassification": "logits",
    "DinoSRForSequenceClassification": "logits",
    "DinoSRForXVector": "embeddings",
    "DinoSRModel": "last_hidden_state",
}


class ExportError(RuntimeError):
    """An exported network does not compute what the model does."""


_PROBLEM = (
    f"which cannot be exported. Give one of {', '.join(OUTPUTS)}. For a pre-training folder, export the encoder,"
    " DinoSRModel.from_pretrained(folder), or fine-tune it first."
)
_require = partial(import_extra, extra="onnx", purpose="ONNX")


def _fewest_samples(config: DinoSRConfig, model_class: type[PreTrainedModel], num_frames: int = 1) -> int:
    """Return the number of samples of the shortest utterance of which the model's head gets so many frames."""
    if issubclass(model_class, DinoSRForXVector):
        layers = zip(config.tdnn_kernel, config.tdnn_dilation, strict=True)
        num_frames += sum(dilation * (kernel - 1) for kernel, dilation in layers)
    return config.receptive_field + (num_frames - 1) * config.inputs_to_logits_ratio


class FolderModel(ABC):
    """
    A model with its processor, loaded from a folder, that maps waveforms to one array per utterance.

    Raises `ValueError` if the folder lacks weights, configuration or processor.
    """

    _weights: str  # pattern of the files

    def __init__(self, folder: StrPath) -> None:
        self.folder = Path(folder)
        self.config, self.model_class = open_folder(self.folder, OUTPUTS, _PROBLEM)
        self.output = OUTPUTS[self.model_class.__name__]
        self.is_recogniser = self.model_class is DinoSRForCTC
        self.processor = open_processor(self.folder, self.is_recogniser)

    @property
    def num_bytes(self) -> int:
        """Size of the weights on disk."""
        return sum(file.stat().st_size for file in self.folder.glob(self._weights))

    @abstractmethod
    def forward(self, input_values: np.ndarray, attention_mask: np.ndarray) -> np.ndarray:
        """Map float32 (B, S) and int64 (B, S) to the output, float32 (B, T, D) or (B, D)."""

    def run(self, waveforms: Sequence[np.ndarray], *, batch_size: int = 1) -> list[np.ndarray]:
        """
        Return for each waveform, float (S,) at 16 kHz, its output: float32 (T, D) without padding frames, or (D,).

        Raises `ValueError` if a waveform has another shape or is too short for an output, or `batch_size` is below 1.
        """
        if batch_size < 1:
            raise ValueError(f"batch_size={batch_size} is out of range: it must be at least 1.")
        outputs: list[np.ndarray] = []
        fewest = _fewest_samples(self.config, self.model_class)
        for begin in range(0, len(waveforms), batch_size):
            batch = [np.asarray(waveform, dtype=np.float32) for waveform in waveforms[begin : begin + batch_size]]
            for number, waveform in enumerate(batch, start=begin):
                if waveform.ndim != 1 or len(waveform) < fewest:
                    raise ValueError(
                        f"Waveform {number} has shape {waveform.shape}, but must be (samples,): one channel at 16 kHz"
                        f" with at least {fewest} samples."
                    )
            inputs = self.processor(
                batch, sampling_rate=SAMPLING_RATE, padding=True, return_attention_mask=True, return_tensors="np"
            )
            rows = self.forward(inputs["input_values"], inputs["attention_mask"].astype(np.int64))
            lengths = [self.config.num_frames(len(waveform)) for waveform in batch]
            outputs += [row[:length] if row.ndim == 2 else row for row, length in zip(rows, lengths, strict=True)]
        return outputs

    def decode(self, outputs: Sequence[np.ndarray]) -> list[str]:
        """Decode outputs of a recogniser (else `ValueError`) to transcripts, by the best label of each frame."""
        if not self.is_recogniser:
            raise ValueError(
                f"{self.folder} is a {self.model_class.__name__}, which has no transcripts. Use `run` for its output."
            )
        assert isinstance(self.processor, Wav2Vec2Processor)
        return [self.processor.decode(output.argmax(axis=-1)) for output in outputs]

    def transcribe(self, waveforms: Sequence[np.ndarray], *, batch_size: int = 1) -> list[str]:
        """Return a transcript for each waveform: `run`, then `decode`."""
        return self.decode(self.run(waveforms, batch_size=batch_size))


class TorchModel(FolderModel):
    """A PyTorch model in evaluation mode and float32, to compare exported models with."""

    _weights = "model*.safetensors"

    def __init__(self, folder: StrPath) -> None:
        super().__init__(folder)
        self.model = open_weights(self.model_class, folder, dtype=torch.float32).eval()

    @torch.inference_mode()
    def forward(self, input_values: np.ndarray, attention_mask: np.ndarray) -> np.ndarray:
        output = self.model(torch.from_numpy(input_values), torch.from_numpy(attention_mask), return_dict=True)
        return output[self.output].numpy()


def _check_name(folder: Path) -> None:
    if (shown := printable_name(str(folder))) != str(folder):
        raise ValueError(f"{shown} is not UTF-8 text, which onnxruntime needs. Give the folder another name.")


def _network(folder: Path) -> Path:
    _check_name(folder)
    if not (folder / NETWORK).is_file():
        raise ValueError(f"{folder} has no {NETWORK}. Give a folder that export_onnx wrote.")
    return folder / NETWORK


class OnnxModel(FolderModel):
    """
    A model that `export_onnx` or `quantize_onnx` wrote, on the CPU; `num_threads=None` is one thread per core.

    Raises `ValueError` if the folder is another, and `ImportError` if onnxruntime is not installed.
    """

    _weights = f"{NETWORK}*"

    def __init__(self, folder: StrPath, *, num_threads: int | None = None) -> None:
        super().__init__(folder)
        network, runtime = _network(self.folder), _require("onnxruntime")
        options = runtime.SessionOptions()
        options.intra_op_num_threads = num_threads or 0
        self.session = runtime.InferenceSession(network, options, providers=["CPUExecutionProvider"])

    def forward(self, input_values: np.ndarray, attention_mask: np.ndarray) -> np.ndarray:
        return self.session.run(None, {"input_values": input_values, "attention_mask": attention_mask})[0]


class _SingleOutput(nn.Module):
    """A model as a function of two tensors that returns one tensor."""

    def __init__(self, model: PreTrainedModel, output: str) -> None:
        super().__init__()
        self.model, self.output = model, output

    def forward(self, input_values: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        return self.model(input_values, attention_mask, return_dict=True)[self.output]


def _noise(num_samples: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return noise of these lengths as a padded batch, (B, S), and its attention mask."""
    generator = torch.Generator().manual_seed(0)
    mask = torch.arange(max(num_samples)) < torch.tensor(num_samples)[:, None]
    return torch.randn(mask.shape, generator=generator) * mask, mask.long()


@contextmanager
def _silence() -> Iterator[None]:
    """Hide the exporters' warnings, which are about packages that are not needed and about their next releases."""
    previous = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(action="ignore"):
            yield
    finally:
        logging.disable(previous)


def _export_network(model: PreTrainedModel, output: str, file: Path) -> None:
    shortest = _fewest_samples(cast(DinoSRConfig, model.config), type(model), num_frames=2)
    # Two utterances of different lengths: the exporter could take a size of 1, or equal sizes, for constant.
    example = _noise([2 * shortest + 7, shortest + 3])
    axes = {0: torch.export.Dim("batch"), 1: torch.export.Dim("samples", min=shortest)}
    with _silence():
        program = torch.onnx.export(
            _SingleOutput(model, output).eval(),
            example,
            input_names=["input_values", "attention_mask"],
            output_names=[output],
            dynamic_shapes={"input_values": axes, "attention_mask": axes},
            dynamo=True,
            verbose=False,
        )
    assert program is not None  # only the exporter before dynamo returns None
    for node in program.model.graph.all_nodes():
        node.metadata_props.clear()  # stack traces with local paths, larger than a small model
    program.save(file)


def _check_network(model: PreTrainedModel, output: str, folder: Path) -> None:
    """Compare the network with torch, at other batch sizes and lengths than those of the export."""
    exported = OnnxModel(folder, num_threads=1)
    shortest = _fewest_samples(exported.config, exported.model_class, num_frames=2)
    for num_samples in ([3 * shortest + 11, shortest, 2 * shortest + 1], [shortest + 5]):
        input_values, attention_mask = _noise(num_samples)
        with torch.inference_mode():
            right = model(input_values, attention_mask, return_dict=True)[output].numpy()
        difference = np.abs(exported.forward(input_values.numpy(), attention_mask.numpy()) - right).max()
        if not difference <= MAX_DIFFERENCE * max(1.0, np.abs(right).max()):
            raise ExportError(
                f"The exported network is wrong: for {len(num_samples)} utterance(s) its output differs from torch's"
                f" by {difference:.1e}. Nothing was written. Try another release of torch or onnxruntime."
            )


def _check_target(folder: Path, overwrite: bool) -> None:
    _check_name(folder)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is a file. Give the path of a folder.")
    if folder.exists() and any(folder.iterdir()):
        if not (folder / NETWORK).is_file():
            raise ValueError(f"{folder} has files that are not of an exported model. Give a new folder.")
        if not overwrite:
            raise ValueError(f"{folder} has an exported model already. Give another folder, or set overwrite.")


@contextmanager
def _replaced(folder: Path) -> Iterator[Path]:
    """`atomic_folder`, after which no file of an earlier export is left beside the new ones."""
    with atomic_folder(folder) as temporary:
        yield temporary
        written = {file.name for file in temporary.iterdir()}
    for name in BESIDE - written:
        (folder / name).unlink(missing_ok=True)


def export_onnx(
    model: PreTrainedModel | StrPath, folder: StrPath, *, processor: Processor | None = None, overwrite: bool = False
) -> Path:
    """
    Export a model to an ONNX network for any batch size and length, with its configuration and processor.

    The network has float32 weights and runs in evaluation mode; the model that was given does not change. Before the
    folder appears, the network runs on noise of other lengths in onnxruntime, and must give torch's output.

    Args:
        model: A recogniser, classifier or encoder of `OUTPUTS`, or the path to a folder with it and its processor.
        folder: Path to the folder to write; returned. A new one appears complete or not at all.
        processor: Feature extractor and tokenizer; required if `model` is not a folder.
        overwrite: Whether to replace an exported model.

    Raises:
        ValueError: If the model cannot be exported, has no processor, or `folder` has other files.
        ImportError: If onnx, onnxscript or onnxruntime is not installed.
        ExportError: If the network's output differs from torch's.
    """
    folder = Path(folder)
    _check_target(folder, overwrite)
    if not isinstance(model, nn.Module):
        source = Path(model)
        _, model_class = open_folder(source, OUTPUTS, _PROBLEM)
        processor = processor or open_processor(source, is_recogniser=model_class is DinoSRForCTC)
        model = cast(PreTrainedModel, open_weights(model_class, source))
    name = type(model).__name__
    if not isinstance(model, PreTrainedModel):
        raise ValueError(
            f"The model's class is {name}, and not one of {', '.join(OUTPUTS)}. Merge the adapters of PEFT into it by"
            " `model.merge_and_unload()`, or give the model as it was before `torch.compile`."
        )
    if name not in OUTPUTS:
        raise ValueError(f"The model is a {name}, {_PROBLEM}")
    if processor is None:
        raise ValueError("processor is missing. With a model instead of a folder, give the model's processor as well.")
    if isinstance(model, DinoSRForCTC) and not isinstance(processor, Wav2Vec2Processor):
        problem = "processor is a feature extractor without the tokenizer that a recogniser needs."
        raise ValueError(f"{problem} Give the Wav2Vec2Processor of the fine-tuning run.")
    for module in ("onnx", "onnxscript", "onnxruntime"):
        _require(module)
    own, output = copy.deepcopy(model).float().cpu().eval(), OUTPUTS[name]
    own.set_attn_implementation("eager")
    own.config.architectures = [name]
    vars(own.config).pop("auto_map", None)  # the code that it names is not part of the folder
    with _replaced(folder) as temporary:
        own.config.to_json_file(temporary / "config.json")
        processor.save_pretrained(temporary)
        _export_network(own, output, temporary / NETWORK)
        _check_network(own, output, temporary)
    return folder


def quantize_onnx(source: StrPath, folder: StrPath, *, overwrite: bool = False) -> Path:
    """
    Write an exported model with int8 weights in its linear layers, for CPUs.

    Each column of a weight has its own scale. Inputs of linear layers are quantised to 8 bits as well, with one scale
    per batch, so an output depends slightly on the rest of its batch. Convolutions stay in float32. `compare` measures
    what has changed.

    Args:
        source: Path to the folder that `export_onnx` wrote.
        folder: Path to the folder to write; returned. A new one appears complete or not at all.
        overwrite: Whether to replace an exported model.

    Raises:
        ValueError: If `source` is not an exported model or already in int8, or `folder` has other files.
        ImportError: If onnx or onnxruntime is not installed.
    """
    source, folder = Path(source), Path(folder)
    _check_target(folder, overwrite)
    network, onnx, quantization = _network(source), _require("onnx"), _require("onnxruntime.quantization")
    nodes = onnx.load(network, load_external_data=False).graph.node
    if any(node.op_type == "MatMulInteger" for node in nodes):
        raise ValueError(f"{source} is already in int8. Give the folder that export_onnx wrote.")
    with _replaced(folder) as temporary:
        for file in source.iterdir():
            if file.is_file() and not file.name.startswith(NETWORK):
                shutil.copyfile(file, temporary / file.name)
        with _silence():
            new = temporary / NETWORK
            quantization.quantize_dynamic(network, new, op_types_to_quantize=["MatMul"], per_channel=True)
    return folder


@dataclass(frozen=True)
class Comparison:
    """Differences of a second model from a first one; of a model that is not a recogniser, without transcripts."""

    num_utterances: int
    num_bytes: tuple[int, int]  # of both models on disk
    max_difference: float  # of the outputs, absolute
    mean_difference: float
    changed_decisions: float  # share of output rows (frames, or utterances) with another highest output
    changed_transcripts: float | None  # share of utterances
    word_error_rates: tuple[float, float] | None  # of both, if texts were given

    def __str__(self) -> str:
        first, second = (num_bytes / 2**20 for num_bytes in self.num_bytes)
        lines = [
            f"{self.num_utterances:,} utterances; size {first:,.1f} MiB -> {second:,.1f} MiB",
            f"difference of the outputs: {self.max_difference:.2e} at most, {self.mean_difference:.2e} on average",
            f"another best label: {self.changed_decisions:.2%}",
        ]
        if self.changed_transcripts is not None:
            lines.append(f"another transcript: {self.changed_transcripts:.2%}")
        if self.word_error_rates is not None:
            lines.append("word error rate: {:.2%} -> {:.2%}".format(*self.word_error_rates))
        return "\n".join(lines)


def compare(
    first: FolderModel, second: FolderModel, waveforms: Sequence[np.ndarray], texts: Sequence[str] | None = None
) -> Comparison:
    """
    Compare two forms of one model on the same speech, such as torch and ONNX, or ONNX in float32 and in int8.

    Args:
        waveforms: float (S,) each, 16 kHz, one channel; more of your own speech gives more reliable results.
        texts: Reference of each utterance, normalised like the training transcripts; None: no word error rates.

    Raises:
        ValueError: If the waveforms, texts or models do not fit each other.
        ImportError: If there are texts and jiwer is not installed.
    """
    if not len(waveforms):
        raise ValueError("There are no waveforms to compare on. Give at least one.")
    if texts is not None and len(texts) != len(waveforms):
        raise ValueError(f"There are {len(texts)} texts and {len(waveforms)} waveforms. Give one text per waveform.")
    outputs = [model.run(waveforms) for model in (first, second)]
    shapes = [output[0].shape for output in outputs]
    if shapes[0] != shapes[1]:
        raise ValueError(
            f"{first.folder} and {second.folder} have outputs of the shapes {shapes[0]} and {shapes[1]}, so they are"
            " not the same model. Compare a model with its own export."
        )
    changed_transcripts, rates = None, None
    if texts is not None or first.is_recogniser:
        transcripts = [model.decode(output) for model, output in zip((first, second), outputs, strict=True)]
        changed_transcripts = float(np.mean([a != b for a, b in zip(*transcripts, strict=True)]))
        if texts is not None:
            jiwer = _require("jiwer")
            rates = (jiwer.wer(list(texts), transcripts[0]), jiwer.wer(list(texts), transcripts[1]))
    right, other = (np.concatenate([np.atleast_2d(output) for output in one]) for one in outputs)
    differences = np.abs(right - other)
    return Comparison(
        num_utterances=len(waveforms),
        num_bytes=(first.num_bytes, second.num_bytes),
        max_difference=float(differences.max()),
        mean_difference=float(differences.mean()),
        changed_decisions=float((right.argmax(axis=1) != other.argmax(axis=1)).mean()),
        changed_transcripts=changed_transcripts,
        word_error_rates=rates,
    )
