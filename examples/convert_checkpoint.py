"""
Convert a DinoSR checkpoint to a Transformers folder, without running any code of the file.

    python examples/convert_checkpoint.py dinosr.ckpt runs/converted --verify speech.wav

The same as `dinosr convert`; `--help` says more.
"""

import sys

from dinosr_hf.commands.convert_checkpoint import main

if __name__ == "__main__":
    main(sys.argv[1:])
