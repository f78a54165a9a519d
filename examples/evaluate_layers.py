r"""
Evaluate what each layer of one or several models knows about phones and speakers, in a table and a plot.

    python examples/evaluate_layers.py runs/base --data dev-clean --labels phones.jsonl.gz --speakers folder \
        --output_dir runs/layers
    python examples/evaluate_layers.py runs/base hubert --data test --fit_data train --labels textgrids \
        --output_dir runs/layers

The same as `dinosr layers`; `--help` says more.
"""

import sys

from dinosr_hf.commands.evaluate_layers import main

if __name__ == "__main__":
    main(sys.argv[1:])
