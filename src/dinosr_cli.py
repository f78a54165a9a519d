"""
The command `dinosr`. It lives outside the package, which takes seconds to import, so `--help` appears at once.

A subcommand is a module of `dinosr_hf.commands` with a `main(argv)`; only the chosen one is imported.
"""

from __future__ import annotations

import difflib
import importlib
import importlib.metadata
import sys
from collections.abc import Sequence

# Subcommand: (module in `dinosr_hf.commands`, extras that it needs, summary). All but the last two also have a script
# in examples/.
COMMANDS = {
    "pretrain": ("pretrain", "train", "pre-train a DinoSR, or adapt one to other speech"),
    "finetune": ("finetune_ctc", "asr", "fine-tune a speech recogniser"),
    "finetune-classifier": ("finetune_classification", "asr", "fine-tune a classifier of utterances"),
    "transcribe": ("transcribe", "asr", "transcribe recordings of any length"),
    "tune": ("tune_decoding", "lm", "tune beam search with a language model"),
    "units": ("extract_units", "train", "turn recordings into units or features"),
    "kmeans": ("fit_kmeans", "train,analysis", "cluster the features of a layer, for units"),
    "evaluate": ("evaluate_units", "train,analysis", "compare units with phones"),
    "layers": ("evaluate_layers", "train,analysis", "compare what layers know of phones and speakers"),
    "abx": ("evaluate_abx", "train,analysis", "measure ABX errors of features and units"),
    "inspect": ("inspect_units", "train,analysis", "write a page to look at and listen to units"),
    "plot": ("plot_run", "train,analysis", "plot the curves of pre-training runs"),
    "manifest": ("make_manifest", "train", "scan a folder of recordings, and list them in a file"),
    "convert": ("convert_checkpoint", "train", "convert the checkpoint of another package, or back"),
    "export": ("export_onnx", "onnx", "export a fine-tuned model to ONNX"),
    "app": ("app", "app", "see words and units of speech on a page"),
    "publish": ("prepare_for_hub", "train,analysis", "prepare a run's folder for the Hub, and upload it"),
    "demo": ("demo", "demo", "learn the units of synthetic speech, in minutes"),
    "demo-recognition": ("demo_recognition", "asr,demo", "learn to recognise synthetic speech, after the demo"),
    "recipes": ("list_recipes", "train", "list the recipes, which are found by their names"),
    "completion": ("print_completion", "train", "print the completion of commands and flags for a shell"),
}


def help_text() -> str:
    """Return the text of `dinosr --help`, which fits a terminal of 80 columns and 24 lines."""
    lines = [f"  {name:20} {text}" for name, (*_, text) in COMMANDS.items()]
    return "\n".join(["usage: dinosr COMMAND [ARGUMENT ...]; dinosr COMMAND --help has more", *lines])


def main(argv: Sequence[str] | None = None) -> None:
    """Run the subcommand that a command line names, as if it were a script of that name."""
    name, *rest = list(sys.argv[1:] if argv is None else argv) or ["--help"]
    if name in ("--help", "-h", "help"):
        print(help_text())
    elif name == "--version":
        print("dinosr-hf", importlib.metadata.version("dinosr-hf"))
    elif name in COMMANDS:
        sys.argv = [f"dinosr {name}", *rest]  # by which parsers and errors call themselves
        try:
            module = importlib.import_module(f"dinosr_hf.commands.{COMMANDS[name][0]}")
        except ModuleNotFoundError as error:
            if error.name is None:  # of transformers, which says what is missing
                raise SystemExit(f"dinosr {name}: {error.__cause__ or error}") from error
            sys.exit(f'dinosr {name} needs {error.name}: pip install "dinosr-hf[{COMMANDS[name][1]}]"')
        module.main(rest)
    else:
        nearest = difflib.get_close_matches(name, COMMANDS, n=1, cutoff=0.0)[0]
        sys.exit(f"dinosr: {name} is not a command. The nearest is {nearest}. dinosr --help lists all.")


if __name__ == "__main__":
    main()
