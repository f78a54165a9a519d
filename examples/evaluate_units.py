r"""
Evaluate how well units agree with phones: all metrics, for all layers of one or several models, in a table and a plot.

    python examples/evaluate_units.py runs/base --data dev-clean --labels phones.jsonl.gz --output_dir runs/evaluated
    python examples/evaluate_units.py runs/base hubert --data dev-clean --labels textgrids --kmeans_data train-clean \
        --kmeans_layers 6 9 --mfccs textbook tuned --output_dir runs/compared

The same as `dinosr evaluate`; `--help` says more.
"""

import sys

from dinosr_hf.commands.evaluate_units import main

if __name__ == "__main__":
    main(sys.argv[1:])
