"""
Try models on a page in the browser: record or choose speech, and see its words, their times and its units.

    python examples/app.py runs/recogniser
    python examples/app.py runs/recogniser runs/base --max_seconds 60

The same as `dinosr app`; `--help` says more.
"""

import sys

from dinosr_hf.commands.app import main

if __name__ == "__main__":
    main(sys.argv[1:])
