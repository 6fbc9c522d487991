"""Train an image classifier: `python train.py --help`."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

from backbones.training.commands import train

if __name__ == "__main__":
    sys.exit(train(sys.argv[1:]))
