"""List the models of this package, or their official weights.

One line each. With several patterns, what matches any of them is listed.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import textwrap
from collections.abc import Iterable, Sequence

from backbones.pretrained import FAMILIES, Weights

from . import catalog
from ._info import model_facts, weights_facts
from .catalog import Model

# where nothing says how wide a line may be, as in a pipe, lines are not broken
_ENDLESS = 10_000
_NUMBER = re.compile(r"[\d.]+( M)?|-")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of this command.

    Args:
        parser: Its parser.
    """
    parser.add_argument(
        "patterns",
        nargs="*",
        metavar="PATTERN",
        help="a name, with the wildcards of a shell: 'shvit*'; all if left out",
    )
    parser.add_argument("--family", choices=sorted(FAMILIES), default="", help="one family only")
    parser.add_argument(
        "--pretrained", action="store_true", help="list official weights instead of models"
    )
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--markdown", action="store_true", help="write a Markdown table with links")
    form.add_argument("--json", action="store_true", help="write all that is known, as JSON")


def run(arguments: argparse.Namespace) -> int:
    """Print the list.

    Args:
        arguments: What was parsed.

    Returns:
        The exit code.

    Raises:
        ValueError: A pattern that nothing matches.
    """
    text = _weights(arguments) if arguments.pretrained else _models(arguments)
    print(text)
    return 0


def _models(arguments: argparse.Namespace) -> str:
    models = catalog.find_models(arguments.patterns, arguments.family)
    if arguments.json:
        return json.dumps([model_facts(model) for model in models], indent=2)
    if arguments.markdown:
        header = ("model", "parameters", "GMACs", "input", "ImageNet-1k top-1", "weights")
        rows = [(f"`{m.name}`", *_costs(m), _best(m), _linked(m)) for m in models]
        return markdown(header, rows)
    notes = Notes()
    rows = [(m.name, *_costs(m), _best(m), _tags(m, notes)) for m in models]
    return _text(("model", "params", "GMACs", "input", "top-1", "weights"), rows, notes)


def _weights(arguments: argparse.Namespace) -> str:
    rows = catalog.list_weights(arguments.patterns, arguments.family)
    if arguments.json:
        return json.dumps([weights_facts(row) for row in rows], indent=2)
    if arguments.markdown:
        header = ("weights", "classes", "ImageNet-1k top-1", "licence", "remarks")
        return markdown(
            header,
            [(_named(r), _classes(r), _all(r), _terms(r), catalog.sentence(r.note)) for r in rows],
        )
    notes = Notes()
    cells = [(r.name, _classes(r), _first(r), _terms(r), _from(r, notes)) for r in rows]
    return _text(("weights", "classes", "top-1", "licence", "from"), cells, notes)


class Notes:
    """Remarks to print below a table, each once."""

    def __init__(self) -> None:
        self.texts: list[str] = []

    def add(self, text: str) -> str:
        """Keep a remark.

        Args:
            text: The remark.

        Returns:
            Its mark: "[1]", ...
        """
        if text not in self.texts:
            self.texts.append(text)
        return f"[{self.texts.index(text) + 1}]"

    def lines(self, width: int) -> list[str]:
        """The remarks.

        Args:
            width: Of a line, in characters.
        """
        lines = []
        for index, text in enumerate(self.texts, 1):
            mark = f"[{index}] "
            lines += textwrap.wrap(
                catalog.sentence(text),
                width,
                initial_indent=mark,
                subsequent_indent=" " * len(mark),
                break_long_words=False,
                break_on_hyphens=False,
            )
        return lines


def markdown(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table.

    Args:
        header: Names of the columns.
        rows: As many cells each.
    """
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _text(header: Sequence[str], rows: Sequence[Sequence[str]], notes: Notes) -> str:
    """An aligned table, numbers to the right, and the remarks below it."""
    columns = list(zip(*rows, strict=True)) if rows else [() for _ in header]
    widths = [
        max(len(cell) for cell in (name, *column))
        for name, column in zip(header, columns, strict=True)
    ]
    right = [all(_NUMBER.fullmatch(cell) for cell in column) for column in columns]
    lines = [
        "  ".join(
            cell.rjust(width) if number else cell.ljust(width)
            for cell, width, number in zip(row, widths, right, strict=True)
        ).rstrip()
        for row in (header, *rows)
    ]
    remarks = notes.lines(shutil.get_terminal_size((_ENDLESS, 0)).columns)
    return "\n".join([*lines, *([""] if remarks else []), *remarks])


def _costs(model: Model) -> tuple[str, str, str]:
    size = model.images.input_size[-1]
    return f"{model.parameters / 1e6:.2f} M", f"{model.macs / 1e9:.3f}", str(size)


def _best(model: Model) -> str:
    return _first(model.weights[0]) if model.weights else "-"


def _first(weights: Weights) -> str:
    return next(iter(catalog.top1(weights).values()), "-")


def _all(weights: Weights) -> str:
    return ", ".join(f"{v} {place}" for place, v in catalog.top1(weights).items()) or "-"


def _classes(weights: Weights) -> str:
    return str(weights.num_classes or "-")


def _terms(weights: Weights) -> str:
    return catalog.license_name(weights.license)


def _from(weights: Weights, notes: Notes) -> str:
    place = "hub" if weights.hub_id else "URL" if weights.direct else "file"
    return f"{place:4} {notes.add(weights.note)}"


def _tags(model: Model, notes: Notes) -> str:
    if not model.weights:
        return f"none {notes.add(model.no_weights)}"
    tags = ", ".join(row.name.partition(".")[2] for row in model.weights)
    dead = model.weights[0].dead_links
    return f"{tags} {notes.add(f'only as a file: the links are dead ({dead})')}" if dead else tags


def _named(weights: Weights) -> str:
    link = catalog.link(weights)
    return f"[`{weights.name}`]({link})" if link else f"`{weights.name}`"


def _linked(model: Model) -> str:
    """The default weights, or why there are none if that is so of the whole family."""
    if not model.weights:
        return f"none: {model.no_weights}" if not FAMILIES[model.family].WEIGHTS else "-"
    weights = model.weights[0]
    dead = f"only as a file: the [links are dead]({weights.dead_links})"
    return f"{dead if weights.dead_links else _named(weights)}, {_terms(weights)}"
