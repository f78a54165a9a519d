"""
Pre-train a DinoSR.

    accelerate launch examples/pretrain.py                                      # a tiny model on synthetic speech
    accelerate launch examples/pretrain.py --data my_recordings --output_dir runs/mine
    accelerate launch examples/pretrain.py examples/configs/base_ls960.yaml --data my_recordings --output_dir runs/base

The same as `dinosr pretrain`; `--help` says more.
"""

import sys

from dinosr_hf.commands.pretrain import main

if __name__ == "__main__":
    main(sys.argv[1:])
