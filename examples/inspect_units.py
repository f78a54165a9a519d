"""
Write an HTML page to look at and listen to the units of a checkpoint, with plots and sounds in it.

    python examples/inspect_units.py runs/base my_speech --output page.html
    python examples/inspect_units.py runs/base my_speech --labels phones.jsonl --output page.html --layer 9

The same as `dinosr inspect`; `--help` says more.
"""

import sys

from dinosr_hf.commands.inspect_units import main

if __name__ == "__main__":
    main(sys.argv[1:])
