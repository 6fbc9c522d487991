"""Evaluate an image classifier: `python validate.py --help`."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

from backbones.training.commands import validate

if __name__ == "__main__":
    sys.exit(validate(sys.argv[1:]))
