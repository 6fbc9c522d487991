"""Image backbones: find a model, learn about it, convert and publish its weights."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import Protocol

from backbones import __version__, _info, _list, convert
from backbones.pretrained import WeightsError, publish

_EXAMPLES = """\
examples:
  python -m backbones list                     all models, small and large
  python -m backbones list 'shvit*'            those of one name
  python -m backbones list --pretrained        all official weights
  python -m backbones info shvit_s1            everything about a model
  python -m backbones convert a.pth folder     weights as a folder that timm loads
  python -m backbones publish folder acme/me   what would go to the hub; --push sends it
  python -m backbones COMMAND --help           the options of a command

To train and to evaluate: train.py and validate.py. To see what a model attends to:
python -m backbones.visualize --help.
"""


class Command(Protocol):
    """What every module of a command has; the first line of its docstring says what it does."""

    def add_arguments(self, parser: argparse.ArgumentParser, /) -> None:
        """Add the arguments of the command."""
        ...

    def run(self, arguments: argparse.Namespace, /) -> int:
        """Do what was asked; return the exit code."""
        ...


_COMMANDS: dict[str, Command] = {
    "list": _list,
    "info": _info,
    "convert": convert,
    "publish": publish,
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command.

    Args:
        arguments: Those of the command line if None.

    Returns:
        The exit code: 0, or 2 for a name, an argument or a file that is wrong.
    """
    parsed = _parser().parse_args(arguments)
    try:
        return _COMMANDS[parsed.command].run(parsed)
    except (WeightsError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m backbones",
        description=__doc__,
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"backbones {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, command in _COMMANDS.items():
        text = command.__doc__ or ""
        command.add_arguments(
            commands.add_parser(name, help=text.partition("\n")[0].rstrip("."), description=text)
        )
    return parser


if __name__ == "__main__":
    sys.exit(main())
