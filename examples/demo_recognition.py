"""
Fine-tune the model of examples/demo.py to recognise spoken digits (`make demo` runs it after the other).

    python examples/demo_recognition.py

The same as `dinosr demo-recognition`; `--help` says more.
"""

import sys

from dinosr_hf.commands.demo_recognition import main

if __name__ == "__main__":
    main(sys.argv[1:])
