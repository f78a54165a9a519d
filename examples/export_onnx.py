"""
Export a fine-tuned model to ONNX, in float32 and in int8, and compare its results with PyTorch's.

    python examples/export_onnx.py runs/recogniser runs/onnx --int8 runs/onnx-int8 --verify speech.wav

The same as `dinosr export`; `--help` says more.
"""

import sys

from dinosr_hf.commands.export_onnx import main

if __name__ == "__main__":
    main(sys.argv[1:])
