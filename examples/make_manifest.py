"""
Scan a folder of recordings, and write a manifest of those that a run can use.

    python examples/make_manifest.py my_recordings my_recordings/manifest.jsonl
    accelerate launch examples/pretrain.py --data my_recordings/manifest.jsonl --output_dir runs/mine

The same as `dinosr manifest`; `--help` says more.
"""

import sys

from dinosr_hf.commands.make_manifest import main

if __name__ == "__main__":
    main(sys.argv[1:])
