"""Evaluate an image classifier: `python validate.py --help`."""

import sys

from backbones.training.commands import validate

if __name__ == "__main__":
    sys.exit(validate(sys.argv[1:]))
