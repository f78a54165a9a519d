r"""
Evaluate the ABX error of features and units of selected layers, within and across speakers, in a table.

    python examples/evaluate_abx.py runs/base --data dev-clean --labels phones.jsonl.gz --speakers folder \
        --output_dir runs/abx
    python examples/evaluate_abx.py runs/base hubert --data dev-clean --labels textgrids --speakers folder \
        --output_dir runs/abx --layers 5 9 --distances angular cosine

The same as `dinosr abx`; `--help` says more.
"""

import sys

from dinosr_hf.commands.evaluate_abx import main

if __name__ == "__main__":
    main(sys.argv[1:])
