"""
Turn recordings into acoustic units, or into the continuous features of layers.

    python examples/extract_units.py runs/base my_speech --output_dir units
    accelerate launch examples/extract_units.py runs/base my_speech --output_dir units --deduplicate --dtype bfloat16
    python examples/extract_units.py runs/base my_speech --output_dir features --features npy --layers 5 9

The same as `dinosr units`; `--help` says more.
"""

import sys

from dinosr_hf.commands.extract_units import main

if __name__ == "__main__":
    main(sys.argv[1:])
