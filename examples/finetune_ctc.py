r"""
Fine-tune a DinoSR as a speech recogniser.

    accelerate launch examples/finetune_ctc.py                               # the tiny model, on synthetic speech
    accelerate launch examples/finetune_ctc.py examples/configs/ctc_10h.yaml --model runs/base \
        --train_data librispeech/train --eval_data librispeech/dev --output_dir runs/my_recogniser

The same as `dinosr finetune`; `--help` says more.
"""

import sys

from dinosr_hf.commands.finetune_ctc import main

if __name__ == "__main__":
    main(sys.argv[1:])
