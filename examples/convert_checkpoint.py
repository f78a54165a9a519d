"""
Make a Transformers folder of a public DinoSR checkpoint, without running anything of the file.

    python examples/convert_checkpoint.py dinosr.ckpt runs/converted --verify speech.wav

docs/converting.md says which files it takes, and which licences they have.
"""

import argparse
import sys
from collections.abc import Sequence

from dinosr_hf import DinoSRForPreTraining
from dinosr_hf.hub.conversion import convert, convert_to_fairseq, statistics_table
from dinosr_hf.utils.command_line import command


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Convert a checkpoint to a Transformers folder, or back.")
    parser.add_argument("file", help="checkpoint (.pt, .ckpt) or data2vec folder; with --to, a folder of this package")
    parser.add_argument("out", help="folder to write; with --to, file")
    parser.add_argument("--as", dest="as_", choices=("pretraining", "model", "ctc"), help="model: the encoder alone")
    parser.add_argument("--dictionary", metavar="dict.ltr.txt", help="labels of a recogniser fine-tuned by fairseq")
    parser.add_argument("--config", metavar="config.json", help="configuration of a spidr checkpoint")
    parser.add_argument("--num_attention_heads", type=int, help="of a spidr checkpoint without a configuration")
    parser.add_argument("--objective", choices=("dinosr", "spidr"), default="dinosr", help="of a spidr checkpoint")
    parser.add_argument("--license", help="licence of the weights for the card, such as cc-by-nc-4.0")
    parser.add_argument("--to", choices=("fairseq",), help="write the authors' layout instead")
    parser.add_argument("--verify", metavar="AUDIO", help="print how a recording spreads over the codewords")
    options = parser.parse_args(argv)
    if options.to and (options.as_ or options.verify or options.dictionary or options.config or options.license):
        parser.error("--to takes a folder and a file, and no other flag.")
    return options


def main(argv: Sequence[str]) -> None:
    options = parse(argv)
    with command(__file__):
        if options.to:
            print("Written:", convert_to_fairseq(options.file, options.out))
            return
        model = convert(
            options.file,
            options.out,
            as_=options.as_,
            dictionary=options.dictionary,
            config=options.config,
            num_attention_heads=options.num_attention_heads,
            objective=options.objective,
            license=options.license,
        )
        print(f"Written: {options.out}, a {type(model).__name__}")
        if options.verify and isinstance(model, DinoSRForPreTraining):
            print(statistics_table(model, options.verify))
        elif options.verify:
            print("--verify needs the codebooks, and this model has none.")


if __name__ == "__main__":
    main(sys.argv[1:])
