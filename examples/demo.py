"""
Pre-train a tiny DinoSR on synthetic speech in minutes, and show the acoustic units that it learnt (`make demo`).

    python examples/demo.py

The same as `dinosr demo`; `--help` says more.
"""

import sys

from dinosr_hf.commands.demo import main

if __name__ == "__main__":
    main(sys.argv[1:])
