"""`python train.py --config cfgs/demo.json` is `adaclip train --config cfgs/demo.json`."""

import sys

from adaclip_finetune.cli import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
