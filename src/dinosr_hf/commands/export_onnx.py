"""
Export a fine-tuned model to ONNX, in float32 and in int8, and compare its results with PyTorch's.

    dinosr export runs/recogniser runs/onnx --int8 runs/onnx-int8 --verify speech.wav

The written folders have all that onnxruntime needs; docs/deploying.md has the code to run them.
"""

import argparse
from collections.abc import Sequence

from ..data import load_audio
from ..data.audio import audio_info
from ..hub.export import ExportError, FolderModel, OnnxModel, TorchModel, compare, export_onnx, quantize_onnx
from ..utils.command_line import Parser, command, parse_options


def make_parser() -> Parser:
    parser = Parser(__doc__)
    parser.add_argument("model", help="folder of a fine-tuned model and its processor")
    parser.add_argument("onnx", help="folder to write")
    parser.add_argument("--int8", metavar="FOLDER", help="folder to write for the network with int8 weights")
    parser.add_argument(
        "--verify", metavar="AUDIO", nargs="+", default=[], help="audio files to compare the models on"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace exported models")
    return parser


def parse(argv: Sequence[str]) -> argparse.Namespace:
    return parse_options(make_parser(), argv)


def verify(models: dict[str, FolderModel], files: Sequence[str]) -> None:
    """Print the transcripts of all models, and how they differ from torch."""
    waveforms = [load_audio(file) for file in files]
    if models["torch"].is_recogniser:
        transcripts = [model.transcribe(waveforms) for model in models.values()]
        for file, *texts in zip(files, *transcripts, strict=True):
            print(file, *(f"  {name:5}  {text}" for name, text in zip(models, texts, strict=True)), sep="\n")
    for name, model in models.items():
        if name != "torch":
            print(f"\ntorch and {name}:\n{compare(models['torch'], model, waveforms)}")


def main(argv: Sequence[str]) -> None:
    with command(__file__, ValueError, OSError, ImportError, ExportError):
        options = parse(argv)
        for file in options.verify:
            audio_info(file)  # before the work
        print("Written:", export_onnx(options.model, options.onnx, overwrite=options.overwrite))
        if options.int8:
            print("Written:", quantize_onnx(options.onnx, options.int8, overwrite=options.overwrite))
        if options.verify:
            models: dict[str, FolderModel] = {"torch": TorchModel(options.model), "onnx": OnnxModel(options.onnx)}
            if options.int8:
                models["int8"] = OnnxModel(options.int8)
            verify(models, options.verify)
