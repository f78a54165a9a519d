r"""
Fine-tune a DinoSR to classify utterances: keywords, languages, speakers, emotions.

    accelerate launch examples/finetune_classification.py         # languages of synthetic speech, with the tiny model
    accelerate launch examples/finetune_classification.py examples/configs/superb_ks.yaml --model runs/base \
        --train_data speech_commands --label_column label --output_dir runs/keywords

The same as `dinosr finetune-classifier`; `--help` says more.
"""

import sys

from dinosr_hf.commands.finetune_classification import main

if __name__ == "__main__":
    main(sys.argv[1:])
