"""
A recogniser outside of PyTorch: export to ONNX, int8 weights for CPUs, and how much of the result that changes.

A folder of an exported model has the network, `model.onnx`, and what is needed beside it: configuration, feature
extractor and, of a recogniser, tokenizer. Inputs and output of the network, for any batch and length:

    input_values    float32 (B, S), as the feature extractor makes them
    attention_mask  int64 (B, S), 1 for samples, 0 for padding at the end
    logits          float32 (B, T, vocab_size); `HEADS` has the outputs of other models

`B` batch, `S` samples, `T` frames, `D` width of the output.
"""

from __future__ import annotations

import copy
import json
import logging
import os
import shutil
import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedModel, Wav2Vec2FeatureExtractor, Wav2Vec2Processor

from ..data import SAMPLING_RATE
from ..model import modeling_dinosr
from ..model.configuration_dinosr import DinoSRConfig
from ..utils.extras import import_extra
from ..utils.files import atomic_folder

NETWORK = "model.onnx"

# Exported networks and torch differ by rounding: 2e-6 (tiny models), 1e-5 (base), of outputs of about 1.
MAX_DIFFERENCE = 1e-4


class Head(NamedTuple):
    """What is exported of a model: the field of its output, and whether that has a row for each frame."""

    output: str
    by_frame: bool


RECOGNISER = "DinoSRForCTC"
HEADS = {
    RECOGNISER: Head("logits", True),
    "DinoSRForAudioFrameClassification": Head("logits", True),
    "DinoSRForSequenceClassification": Head("logits", False),
    "DinoSRForXVector": Head("embeddings", False),
    "DinoSRModel": Head("last_hidden_state", True),
}


def _require(module: str) -> Any:
    return import_extra(module, "onnx", "ONNX")


def _head_of(architecture: str, name: str) -> Head:
    if architecture not in HEADS:
        raise ValueError(
            f"{name} is a {architecture}, which is not exported: choose one of {', '.join(HEADS)}. Of a pre-training"
            " folder export the encoder, DinoSRModel.from_pretrained(folder), or fine-tune it first."
        )
    return HEADS[architecture]


def _read_config(folder: Path) -> DinoSRConfig:
    file = folder / "config.json"
    if not file.is_file():
        raise ValueError(f"{folder} has no config.json. Give a folder that save_pretrained or export_onnx wrote.")
    model_type = json.loads(file.read_text(encoding="utf-8")).get("model_type")
    if model_type != DinoSRConfig.model_type:
        raise ValueError(
            f"{folder} has a model of the type {model_type!r}, but must have a {DinoSRConfig.model_type}. Give"
            " the folder of another model."
        )
    return DinoSRConfig.from_json_file(file)


def _architecture(config: DinoSRConfig) -> str:
    return (config.architectures or ["model without architecture"])[0]


Processor = Wav2Vec2Processor | Wav2Vec2FeatureExtractor


def _load_processor(folder: Path, needs_tokenizer: bool) -> Processor:
    has_extractor = any((folder / f"{kind}_config.json").is_file() for kind in ("preprocessor", "processor"))
    if not has_extractor:
        raise ValueError(
            f"{folder} has no feature extractor (preprocessor_config.json or processor_config.json). Save the"
            " processor of fine-tuning there: processor.save_pretrained(folder)."
        )
    if not (folder / "vocab.json").is_file():
        if needs_tokenizer:
            raise ValueError(
                f"{folder} has no tokenizer (vocab.json), but a recogniser needs one to write its transcripts. Save"
                " the processor of fine-tuning there: processor.save_pretrained(folder)."
            )
        return Wav2Vec2FeatureExtractor.from_pretrained(folder)
    return Wav2Vec2Processor.from_pretrained(folder)


class FolderModel(ABC):
    """
    A model with its processor, from a folder: waveforms in, one array an utterance out.

    Args:
        folder: With weights, configuration and processor.

    Attributes:
        folder: That folder.
        config: The model's configuration.
        head: What the model gives.
        is_recogniser: Whether that can be read as a transcript.
        processor: Feature extractor, with the tokenizer if there is one.

    Raises:
        ValueError: If the folder lacks any of it.
    """

    def __init__(self, folder: str | os.PathLike) -> None:
        self.folder = Path(folder)
        self.config = _read_config(self.folder)
        architecture = _architecture(self.config)
        self.head = _head_of(architecture, str(folder))
        self.is_recogniser = architecture == RECOGNISER
        self.processor = _load_processor(self.folder, needs_tokenizer=self.is_recogniser)

    @property
    @abstractmethod
    def num_bytes(self) -> int:
        """Size of the weights on disk."""

    @abstractmethod
    def forward(self, input_values: np.ndarray, attention_mask: np.ndarray) -> np.ndarray:
        """float32 (B, S) and int64 (B, S) to the output, float32 (B, T, D) or (B, D)."""

    def run(self, waveforms: Sequence[np.ndarray], *, batch_size: int = 1) -> list[np.ndarray]:
        """
        The network's output for each utterance.

        Args:
            waveforms: float (S,) each, 16 kHz, one channel.
            batch_size: Utterances that go through the network together, in the order given.

        Returns:
            For each utterance float32 (T, D), without the frames of padding, or (D,) where there is one row an
            utterance.

        Raises:
            ValueError: For a waveform of another shape, or too short for a frame; for a batch size below 1.
        """
        if batch_size < 1:
            raise ValueError(f"batch_size={batch_size}, but must be at least 1.")
        outputs: list[np.ndarray] = []
        for begin in range(0, len(waveforms), batch_size):
            batch = [np.asarray(waveform, dtype=np.float32) for waveform in waveforms[begin : begin + batch_size]]
            for number, waveform in enumerate(batch, start=begin):
                if waveform.ndim != 1 or self.config.num_frames(len(waveform)) < 1:
                    raise ValueError(
                        f"Waveform {number} has shape {waveform.shape}, but must be (samples,): one channel at 16 kHz"
                        f" with at least {self.config.receptive_field} samples."
                    )
            inputs = self.processor(
                batch,
                sampling_rate=SAMPLING_RATE,
                padding=True,
                return_attention_mask=True,
                return_tensors="np",
            )
            rows = self.forward(inputs["input_values"], inputs["attention_mask"].astype(np.int64))
            lengths = [self.config.num_frames(len(waveform)) if self.head.by_frame else None for waveform in batch]
            outputs += [row[:length] for row, length in zip(rows, lengths, strict=True)]
        return outputs

    def decode(self, outputs: Sequence[np.ndarray]) -> list[str]:
        """
        Best path: the most likely label of each frame, repetitions and blanks left out.

        Args:
            outputs: What `run` gives.

        Returns:
            A transcript for each utterance.

        Raises:
            ValueError: If the model is no recogniser.
        """
        if not self.is_recogniser:
            raise ValueError(
                f"{self.folder} is a {_architecture(self.config)}, which writes no transcripts; `run` has its output."
            )
        assert isinstance(self.processor, Wav2Vec2Processor)
        return [self.processor.decode(output.argmax(axis=-1)) for output in outputs]

    def transcribe(self, waveforms: Sequence[np.ndarray], *, batch_size: int = 1) -> list[str]:
        """A transcript for each waveform: `run`, then `decode`."""
        return self.decode(self.run(waveforms, batch_size=batch_size))


class TorchModel(FolderModel):
    """
    A model of PyTorch in evaluation mode and float32, to compare exported ones with.

    Args:
        folder: As `save_pretrained` of model and processor wrote it.

    Raises:
        ValueError: As `FolderModel`.
    """

    def __init__(self, folder: str | os.PathLike) -> None:
        super().__init__(folder)
        model_class = getattr(modeling_dinosr, _architecture(self.config))
        self.model: PreTrainedModel = model_class.from_pretrained(folder, dtype=torch.float32).eval()

    @property
    def num_bytes(self) -> int:
        """Size of the weights on disk."""
        return sum(file.stat().st_size for file in self.folder.glob("*.safetensors"))

    @torch.inference_mode()
    def forward(self, input_values: np.ndarray, attention_mask: np.ndarray) -> np.ndarray:
        """float32 (B, S) and int64 (B, S) to the output, float32 (B, T, D) or (B, D)."""
        output = self.model(torch.from_numpy(input_values), torch.from_numpy(attention_mask), return_dict=True)
        return output[self.head.output].numpy()


class OnnxModel(FolderModel):
    """
    An exported model, run by onnxruntime on the CPU.

    Args:
        folder: As `export_onnx` or `quantize_onnx` wrote it.
        num_threads: That a single run uses; None: one for each core.

    Raises:
        ValueError: As `FolderModel`, and without `model.onnx`.
        ImportError: Without onnxruntime.
    """

    def __init__(self, folder: str | os.PathLike, *, num_threads: int | None = None) -> None:
        super().__init__(folder)
        if not (self.folder / NETWORK).is_file():
            raise ValueError(f"{folder} has no {NETWORK}. Make such a folder with export_onnx.")
        runtime = _require("onnxruntime")
        options = runtime.SessionOptions()
        options.intra_op_num_threads = num_threads or 0
        self.session = runtime.InferenceSession(self.folder / NETWORK, options, providers=["CPUExecutionProvider"])

    @property
    def num_bytes(self) -> int:
        """Size of the network on disk."""
        return sum(file.stat().st_size for file in self.folder.glob(f"{NETWORK}*"))

    def forward(self, input_values: np.ndarray, attention_mask: np.ndarray) -> np.ndarray:
        """float32 (B, S) and int64 (B, S) to the output, float32 (B, T, D) or (B, D)."""
        return self.session.run(None, {"input_values": input_values, "attention_mask": attention_mask})[0]


def load_onnx(folder: str | os.PathLike, *, num_threads: int | None = None) -> OnnxModel:
    """`OnnxModel(folder)`: an exported model, run by onnxruntime on the CPU; arguments and errors are its."""
    return OnnxModel(folder, num_threads=num_threads)


class _OneOutput(nn.Module):
    """A model as a function of two tensors with one tensor as its result."""

    def __init__(self, model: PreTrainedModel, output: str) -> None:
        super().__init__()
        self.model = model
        self.output = output

    def forward(self, input_values: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        return self.model(input_values, attention_mask, return_dict=True)[self.output]


def _noise(num_samples: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Utterances of so many samples, (B, S), and their attention mask."""
    generator = torch.Generator().manual_seed(0)
    mask = torch.arange(max(num_samples)) < torch.tensor(num_samples)[:, None]
    return torch.randn(mask.shape, generator=generator) * mask, mask.long()


def _shortest(model: PreTrainedModel) -> int:
    """Samples of the shortest utterance that the model takes in its stride, of two frames or more."""
    num_lost = model.tdnn.num_frames_lost if isinstance(model, modeling_dinosr.DinoSRForXVector) else 0
    return model.config.receptive_field + (1 + num_lost) * model.config.inputs_to_logits_ratio


@contextmanager
def _quietly() -> Iterator[None]:
    """Without what the exporters say of packages that are not needed and of their own next releases."""
    loggers = [logging.getLogger(), logging.getLogger("torch.onnx")]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _export_network(model: PreTrainedModel, head: Head, file: Path) -> None:
    shortest = _shortest(model)
    # Two utterances of different lengths: what is 1 or equal while it is traced could be taken for always so.
    example = _noise([2 * shortest + 7, shortest + 3])
    axes = {0: torch.export.Dim("batch"), 1: torch.export.Dim("samples", min=shortest)}
    with _quietly():
        program = torch.onnx.export(
            _OneOutput(model, head.output).eval(),
            example,
            input_names=["input_values", "attention_mask"],
            output_names=[head.output],
            dynamic_shapes={"input_values": axes, "attention_mask": axes},
            dynamo=True,
            verbose=False,
        )
    assert program is not None  # None is for the exporter before dynamo
    for node in program.model.graph.all_nodes():
        # Where in which file each was traced: larger than a small model, and nobody's business.
        node.metadata_props.clear()
    program.save(file)


def _check_network(model: PreTrainedModel, head: Head, folder: Path) -> None:
    """Run the network at another batch and other lengths than those it was traced with, beside torch."""
    exported, shortest = load_onnx(folder, num_threads=1), _shortest(model)
    for num_samples in ([3 * shortest + 11, shortest, 2 * shortest + 1], [shortest + 5]):
        input_values, attention_mask = _noise(num_samples)
        with torch.inference_mode():
            right = model(input_values, attention_mask, return_dict=True)[head.output].numpy()
        difference = np.abs(exported.forward(input_values.numpy(), attention_mask.numpy()) - right).max()
        if not difference <= MAX_DIFFERENCE * max(1.0, np.abs(right).max()):
            raise RuntimeError(
                f"The exported network is wrong: for {len(num_samples)} utterance(s) its output differs from torch's"
                f" by {difference:.1e}. Nothing was written. Other releases of torch or onnxruntime may do better."
            )


def _check_target(folder: Path, overwrite: bool) -> None:
    if not folder.exists():
        return
    if not folder.is_dir():
        raise ValueError(f"{folder} is a file, but must be a folder, or not exist yet.")
    if not any(folder.iterdir()):
        return
    if not (folder / NETWORK).is_file():
        raise ValueError(f"{folder} has other things than an exported model in it. Choose a folder of its own.")
    if not overwrite:
        raise ValueError(f"{folder} has an exported model already. Choose another folder, or set overwrite.")


def _source(model: PreTrainedModel | str | os.PathLike, processor: Processor | None) -> tuple[Any, Head, Processor]:
    """The model, what is exported of it, and its processor."""
    if not isinstance(model, PreTrainedModel):
        folder = Path(model)
        architecture = _architecture(_read_config(folder))
        head = _head_of(architecture, str(folder))
        processor = processor or _load_processor(folder, needs_tokenizer=architecture == RECOGNISER)
        return getattr(modeling_dinosr, architecture).from_pretrained(folder), head, processor
    head = _head_of(type(model).__name__, "The model")
    if processor is None:
        raise ValueError("processor is missing: with a model that is not a folder, give the processor it belongs to.")
    if isinstance(model, modeling_dinosr.DinoSRForCTC) and isinstance(processor, Wav2Vec2FeatureExtractor):
        raise ValueError(
            "processor is a feature extractor alone, but a recogniser needs a tokenizer with it: give the"
            " Wav2Vec2Processor of fine-tuning."
        )
    return model, head, processor


def export_onnx(
    model: PreTrainedModel | str | os.PathLike,
    folder: str | os.PathLike,
    *,
    processor: Processor | None = None,
    overwrite: bool = False,
) -> Path:
    """
    Write a model as an ONNX network of any batch and length, with configuration and processor beside it.

    The weights become float32 and the model is taken as in evaluation; the one given stays as it is. Before anything
    is kept, onnxruntime runs the network on noise of other lengths, and its output must be torch's.

    Args:
        model: A folder of a model and its processor, or a model: a recogniser, a classifier or an encoder (`HEADS`).
        folder: Where to; made if it does not exist. It appears as a whole.
        processor: Feature extractor and tokenizer; needed if `model` is no folder.
        overwrite: Replace an exported model that is there.

    Returns:
        The folder.

    Raises:
        ValueError: For a model that is not exported, without a processor, or if `folder` has something else in it.
        ImportError: Without onnx, onnxscript or onnxruntime.
        RuntimeError: If the network's output is not torch's.
    """
    folder = Path(folder)
    _check_target(folder, overwrite)
    source, head, processor = _source(model, processor)
    for module in ("onnx", "onnxscript", "onnxruntime"):
        _require(module)
    own = copy.deepcopy(source).float().cpu().eval()
    own.set_attn_implementation("eager")
    own.config.architectures = [type(source).__name__]
    vars(own.config).pop("auto_map", None)  # the code it names does not come along
    with atomic_folder(folder) as aside:
        own.config.to_json_file(aside / "config.json")
        processor.save_pretrained(aside)
        _export_network(own, head, aside / NETWORK)
        _check_network(own, head, aside)
    return folder


def quantize_onnx(source: str | os.PathLike, folder: str | os.PathLike, *, overwrite: bool = False) -> Path:
    """
    Write an exported model with the weights of its linear layers in int8, for CPUs.

    Each column of a weight has a scale of its own. What comes into a linear layer is made 8 bit as well, with one
    scale for the whole batch: so outputs depend a little on what else is in it. Convolutions stay in float32.

    Args:
        source: As `export_onnx` wrote it.
        folder: Where to; made if it does not exist. It appears as a whole.
        overwrite: Replace an exported model that is there.

    Returns:
        The folder; `compare` tells what has changed.

    Raises:
        ValueError: If `source` is not an exported model, or is in int8; if `folder` has something else in it.
        ImportError: Without onnx or onnxruntime.
    """
    source, folder = Path(source), Path(folder)
    _check_target(folder, overwrite)
    if not (source / NETWORK).is_file():
        raise ValueError(f"{source} has no {NETWORK}. Make such a folder with export_onnx.")
    onnx, quantization = _require("onnx"), _require("onnxruntime.quantization")
    nodes = onnx.load(source / NETWORK, load_external_data=False).graph.node
    if any(node.op_type == "MatMulInteger" for node in nodes):
        raise ValueError(f"{source} is in int8 already. Give the folder that export_onnx wrote.")
    with atomic_folder(folder) as aside:
        for file in source.iterdir():
            if file.is_file() and not file.name.startswith(NETWORK):
                shutil.copyfile(file, aside / file.name)
        with _quietly():
            quantization.quantize_dynamic(
                source / NETWORK, aside / NETWORK, op_types_to_quantize=["MatMul"], per_channel=True
            )
    return folder


@dataclass(frozen=True)
class Comparison:
    """
    What a second model does differently from a first one.

    Attributes:
        num_utterances: Utterances compared.
        num_bytes: Sizes of both on disk.
        max_difference: Largest difference of an output.
        mean_difference: Mean of the differences' absolute values.
        changed_decisions: Share of frames, or of utterances for a model of one row an utterance, whose highest output
            is another.
        changed_transcripts: Share of utterances with another transcript; None for a model that is no recogniser.
        word_error_rates: Of both against the right texts; None without these.
    """

    num_utterances: int
    num_bytes: tuple[int, int]
    max_difference: float
    mean_difference: float
    changed_decisions: float
    changed_transcripts: float | None
    word_error_rates: tuple[float, float] | None

    def __str__(self) -> str:
        first, second = (num_bytes / 2**20 for num_bytes in self.num_bytes)
        lines = [
            f"{self.num_utterances:,} utterances; size {first:,.1f} MiB -> {second:,.1f} MiB",
            f"outputs differ by {self.max_difference:.2e} at most, {self.mean_difference:.2e} in the mean",
            f"another best label: {self.changed_decisions:.2%}",
        ]
        if self.changed_transcripts is not None:
            lines.append(f"another transcript: {self.changed_transcripts:.2%}")
        if self.word_error_rates is not None:
            lines.append("word error rate: {:.2%} -> {:.2%}".format(*self.word_error_rates))
        return "\n".join(lines)


def compare(
    first: FolderModel,
    second: FolderModel,
    waveforms: Sequence[np.ndarray],
    texts: Sequence[str] | None = None,
    *,
    batch_size: int = 1,
) -> Comparison:
    """
    Run two forms of one model on the same speech: torch and ONNX, or ONNX in float32 and in int8.

    Args:
        first: The one that is right.
        second: The other.
        waveforms: float (S,) each, 16 kHz, one channel; your own, as much as you can, for a figure worth something.
        texts: What is said in each, written as the model's training transcripts were; None: no word error rate.
        batch_size: Utterances that go through a network together.

    Returns:
        What differs, over all utterances.

    Raises:
        ValueError: Without a waveform; with another number of texts; if the models do not have outputs of the same
            shape, or texts are given to models that are no recognisers.
        ImportError: With texts, without jiwer.
    """
    if not len(waveforms):
        raise ValueError("There is no waveform to compare with. Give at least one.")
    if texts is not None and len(texts) != len(waveforms):
        raise ValueError(f"There are {len(texts)} texts and {len(waveforms)} waveforms. Give a text for each.")
    outputs = [model.run(waveforms, batch_size=batch_size) for model in (first, second)]
    shapes = [outputs_of[0].shape for outputs_of in outputs]
    if shapes[0] != shapes[1]:
        raise ValueError(
            f"{first.folder} and {second.folder} have outputs of the shapes {shapes[0]} and {shapes[1]}, so they are"
            " not the same model. Compare a model with its own export."
        )
    transcripts = None
    if texts is not None or first.is_recogniser:
        transcripts = [model.decode(output) for model, output in zip((first, second), outputs, strict=True)]
    rates = None
    if texts is not None and transcripts is not None:
        jiwer = _require("jiwer")
        rates = (jiwer.wer(list(texts), transcripts[0]), jiwer.wer(list(texts), transcripts[1]))
    right, other = (np.concatenate([np.atleast_2d(output) for output in one]) for one in outputs)
    differences = np.abs(right - other)
    changed = None if transcripts is None else np.mean([a != b for a, b in zip(*transcripts, strict=True)])
    return Comparison(
        num_utterances=len(waveforms),
        num_bytes=(first.num_bytes, second.num_bytes),
        max_difference=float(differences.max()),
        mean_difference=float(differences.mean()),
        changed_decisions=float((right.argmax(axis=1) != other.argmax(axis=1)).mean()),
        changed_transcripts=None if changed is None else float(changed),
        word_error_rates=rates,
    )
