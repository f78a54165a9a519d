"""
Plot the curves of pre-training runs, with those of a published full-size run behind them.

    python examples/plot_run.py runs/tiny
    python examples/plot_run.py runs/a runs/b --x hours --output both.png

The same as `dinosr plot`; `--help` says more.
"""

import sys

from dinosr_hf.commands.plot_run import main

if __name__ == "__main__":
    main(sys.argv[1:])
