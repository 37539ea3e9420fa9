"""`python utils/frame_extraction.py VIDEOS FRAMES --parallel` is `adaclip extract VIDEOS FRAMES --parallel`."""

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # also where the package is not installed
    from adaclip_finetune.cli import main

    sys.exit(main(["extract", *sys.argv[1:]]))
