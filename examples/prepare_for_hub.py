"""
Prepare the folder of a run for the Hub, and upload it with --push.

    python examples/prepare_for_hub.py runs/tiny hub/tiny --provenance provenance.yaml
    python examples/prepare_for_hub.py runs/tiny hub/tiny-2 --provenance provenance.yaml --push

The same as `dinosr publish`; `--help` says more.
"""

import sys

from dinosr_hf.commands.prepare_for_hub import main

if __name__ == "__main__":
    main(sys.argv[1:])
