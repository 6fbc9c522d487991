"""Train an image classifier: `python train.py --help`."""

import sys

from backbones.training.commands import train

if __name__ == "__main__":
    sys.exit(train(sys.argv[1:]))
