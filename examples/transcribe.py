"""
Transcribe recordings of any length.

    python examples/transcribe.py runs/recogniser talk.mp3
    python examples/transcribe.py runs/recogniser talks more/talk.wav --format srt --output_dir subtitles

The same as `dinosr transcribe`; `--help` says more.
"""

import sys

from dinosr_hf.commands.transcribe import main

if __name__ == "__main__":
    main(sys.argv[1:])
