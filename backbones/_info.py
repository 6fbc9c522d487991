"""Tell all that is known of a model and of its official weights.

Where the weights come from, what they expect, what they reached, under which licences they are, and
how to load them.
"""

from __future__ import annotations

import argparse
import json
import shutil
import textwrap
from dataclasses import asdict
from typing import Any

from backbones.pretrained import Weights
from backbones.pretrained.stored import known_record, stored_file
from backbones.pretrained.table import Paper

from . import catalog
from .catalog import Images, Model

_LABEL = 15
_WIDTH = 100
_FORMATS = {
    "safetensors": "safetensors",
    "torch": "a pickle of PyTorch, of which only tensors are read",
}
_AVERAGE = "the moving average of the weights, if the file has one"

Facts = list[tuple[str, str]]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of this command.

    Args:
        parser: Its parser.
    """
    parser.add_argument("name", metavar="NAME", help="a model, or model.tag for these weights only")
    parser.add_argument("--json", action="store_true", help="write it as JSON")


def run(arguments: argparse.Namespace) -> int:
    """Print what is known.

    Args:
        arguments: What was parsed.

    Returns:
        The exit code.

    Raises:
        ValueError: An unknown name.
    """
    model, rows = catalog.find(arguments.name)
    if arguments.json:
        facts = model_facts(model) | {"weights": [weights_facts(row) for row in rows]}
        print(json.dumps(facts, indent=2))
        return 0
    parts = [(model.name, _of_model(model))]
    parts += [(row.name, _of_weights(row, model)) for row in rows]
    print("\n\n".join("\n".join([title, *_lines(facts)]) for title, facts in parts))
    return 0


def model_facts(model: Model) -> dict[str, Any]:
    """What is known of a model, for JSON.

    Args:
        model: The model; of its weights there are the names only.
    """
    facts = asdict(model)
    images, weights = facts.pop("images"), facts.pop("weights")
    return facts | images | {"weights": [row["name"] for row in weights]}


def weights_facts(weights: Weights) -> dict[str, Any]:
    """What is known of official weights, for JSON.

    Args:
        weights: The weights.
    """
    record, path = known_record(weights), stored_file(weights)
    return asdict(weights) | {
        "location": None if weights.dead_links else weights.location,
        "format": weights.format,
        "recorded": asdict(record) if record else None,
        "stored": str(path) if path else None,
    }


def _of_model(model: Model) -> Facts:
    names = ", ".join(row.name for row in model.weights)
    facts = [
        ("about", model.description),
        ("family", model.family),
        ("parameters", f"{model.parameters:,}"),
        ("multiply-adds", f"{model.macs / 1e9:.3f} G for one image of the size below"),
        *_of_images(model.images, model.num_classes),
        *_of_paper(model.paper),
        ("weights", names or f"none: {model.no_weights}"),
    ]
    if not model.weights:
        facts += _python(f'"{model.name}"')
    return facts


def _of_images(images: Images, num_classes: int) -> Facts:
    crop = f"{images.crop_pct:g} of the resized image, from its centre"
    if images.crop_mode == "squash":
        crop = "none: the whole image is warped to the input size"
    return [
        ("input", " x ".join(map(str, images.input_size))),
        ("normalisation", f"mean {_numbers(images.mean)}, std {_numbers(images.std)}"),
        ("crop", crop),
        ("interpolation", images.interpolation),
        ("classes", str(num_classes or "no classifier")),
    ]


def _of_paper(paper: Paper) -> Facts:
    where = f"{paper.venue} {paper.year}" if paper.venue else str(paper.year)
    return [
        ("paper", f"{', '.join(paper.authors)}: {paper.title}, {where}, arXiv:{paper.arxiv}"),
        ("code", f"{paper.code}, licence: {catalog.license_name(paper.code_license)}"),
    ]


def _of_weights(weights: Weights, model: Model) -> Facts:
    same = [
        *_of_images(model.images, model.num_classes),
        *_of_paper(model.paper),
    ]
    own = [
        *_of_images(Images.of(weights), weights.num_classes),
        *_of_paper(weights.paper),
    ]
    top1 = ", ".join(f"{percent} % {place}" for place, percent in catalog.top1(weights).items())
    return [
        *_of_file(weights),
        ("licence", catalog.license_name(weights.license)),
        ("ImageNet-1k", f"top-1 {top1}" if top1 else ""),
        *[fact for fact in own if fact not in same],
        ("remarks", catalog.sentence(weights.note)),
        *_of_copy(weights),
        *_loading(weights),
    ]


def _of_file(weights: Weights) -> Facts:
    dead = f"only as a file: the links are dead ({weights.dead_links})"
    known = (weights.converted_from, weights.urls[0] if weights.direct else "")
    return [
        ("where", dead if weights.dead_links else weights.location),
        ("file", weights.filename),
        ("format", _FORMATS[weights.format]),
        ("state dict", weights.wrapping),
        ("copy", _AVERAGE if weights.prefer_ema else ""),
        ("released as", ", ".join(url for url in weights.urls if url not in known)),
        ("converted from", weights.converted_from),
    ]


def _of_copy(weights: Weights) -> Facts:
    record = known_record(weights)
    known = f"sha256 {record.sha256}, {record.size:,} bytes" if record else "not recorded yet"
    return [("hash", known), ("on this machine", str(stored_file(weights) or "no"))]


def _loading(weights: Weights) -> Facts:
    if not weights.dead_links:
        return _python(f'"{weights.name}", pretrained=True')
    overlay = f'pretrained_cfg_overlay={{"file": "{weights.filename}"}}'
    return _python(f'"{weights.model}", pretrained=True, {overlay}')


def _python(arguments: str) -> Facts:
    return [
        ("in Python", "import backbones"),
        ("", f"model = backbones.create_model({arguments})"),
    ]


def _numbers(values: tuple[float, ...]) -> str:
    return " ".join(f"{value:g}" for value in values)


def _lines(facts: Facts) -> list[str]:
    """One fact a line, wrapped to the width of the terminal; none for what is not known."""
    lines = []
    for label, text in facts:
        start = f"  {label:<{_LABEL}}  "
        lines += [start + text] if label in ("in Python", "") else _wrap(text, start)
    return lines


def _wrap(text: str, start: str) -> list[str]:
    return textwrap.wrap(
        text,
        max(shutil.get_terminal_size((_WIDTH, 0)).columns, 2 * len(start)),
        initial_indent=start,
        subsequent_indent=" " * len(start),
        break_long_words=False,
        break_on_hyphens=False,
    )
