"""
Tune the language model weight and word score of beam search on a development set, and write decoding.json.

    python examples/tune_decoding.py runs/recogniser librispeech/dev 4-gram.arpa.gz --trials 32

The same as `dinosr tune`; `--help` says more.
"""

import sys

from dinosr_hf.commands.tune_decoding import main

if __name__ == "__main__":
    main(sys.argv[1:])
