"""The model card of a folder of weights: `README.md`, which the hub shows and reads its header.

A card says what is known and where from, and no number that nobody reported.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from .table import Paper, Weights

UNKNOWN_LICENSE = "unknown"
_TITLES = {
    "biformer": "BiFormer",
    "davit": "DaViT",
    "l2vit": "L2ViT",
    "maxvit": "MaxViT",
    "overlock": "OverLoCK",
    "ravlt": "RAVLT",
    "shvit": "SHViT",
    "tic": "TiC",
}
_LICENSES = {"apache-2.0": "Apache-2.0", "mit": "MIT"}
_TIMM = "https://github.com/huggingface/pytorch-image-models"
_REPORTED = {
    "paper": "in the paper",
    "repository": "in the readme of the authors' code",
    "log": "in a training log that the authors quote",
    "timm": "measured by timm",
}
_RECONSTRUCTION = (
    "TiC is a reconstruction. Its authors released the operator, MSA-Conv, but no model, no "
    "weights and no training code: there is no official model to compare with. The network is "
    "that of the package `backbones`, after the abstract of the paper; no number of the paper is "
    "claimed for it."
)


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What a card states.

    Attributes:
        model: Name of the architecture.
        family: Its family, in lower case.
        paper: The paper of the family.
        weights: The official weights that these are, or None for anybody else's.
        license: Identifier of the licence of the weights, as the hub writes it.
        parameters: How many numbers the model learns.
        macs: Multiply-adds of one image of the size below, or None if they were not counted.
        num_classes: Width of the classifier, 0 if there is none.
        input_size: Channels, height and width of images.
        crop_pct: Side of the crop over side of the resized image.
        crop_mode: timm's name of how images are cropped.
        interpolation: How images are resized.
        mean: Channel means for normalisation.
        std: Channel standard deviations likewise.
        source: The file that was converted: an address, or its name.
        source_sha256: Its hash.
        copy: Which copy of the weights was taken from it, in words.
        changes: What else became of its tensors than other names, in lines.
    """

    model: str
    family: str
    paper: Paper
    weights: Weights | None
    license: str
    parameters: int
    macs: int | None
    num_classes: int
    input_size: tuple[int, int, int]
    crop_pct: float
    crop_mode: str
    interpolation: str
    mean: tuple[float, ...]
    std: tuple[float, ...]
    source: str
    source_sha256: str
    copy: str
    changes: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """`model.tag` of official weights, else the name of the architecture."""
        return self.weights.name if self.weights else self.model


def model_card(facts: Facts) -> str:
    """Write a model card: the header that the hub reads, and the text below it.

    Args:
        facts: What to state. The same facts give the same text.

    Returns:
        The content of `README.md`.
    """
    header = _header(facts).to_yaml(line_break="\n")
    sections = [
        f"# {facts.name}",
        _introduction(facts),
        f"## Model\n\n{_details(facts)}",
        f"## Accuracy\n\n{_accuracy(facts)}",
        f"## Use\n\n{_usage(facts)}",
        f"## Where the weights come from\n\n{_origin(facts)}",
        f"## Licence\n\n{_licence(facts)}",
        f"## Notes and known problems\n\n{_problems(facts)}",
        f"## Citation\n\n```bibtex\n{facts.paper.bibtex}\n```",
    ]
    return f"---\n{header}\n---\n" + "\n\n".join(sections) + "\n"


def license_of(card: str) -> str:
    """The licence that a card states in its header, empty if none.

    Args:
        card: The content of `README.md`.

    Raises:
        ValueError: The header is not valid.
    """
    return str(ModelCard(card).data.get("license") or "")


def _header(facts: Facts) -> ModelCardData:
    task = "image-classification" if facts.num_classes else "image-feature-extraction"
    results = _results(facts)
    return ModelCardData(
        license=facts.license,
        library_name="timm",
        pipeline_tag=task,
        tags=[task, "timm", "backbones", facts.family],
        datasets=_datasets(facts) or None,
        model_name=facts.name if results else None,
        eval_results=results or None,
    )


def _datasets(facts: Facts) -> list[str]:
    """What the tag says of the training: in21k_ft_in1k is ImageNet-21k, then ImageNet-1k."""
    tag = facts.weights.name.partition(".")[2] if facts.weights else ""
    return sorted({f"imagenet-{size}" for size in re.findall(r"in(\d+k)", tag)})


def _results(facts: Facts) -> list[EvalResult]:
    # the hub's format has room for one source of a task and data set: the first reported
    top1 = facts.weights.top1 if facts.weights else {}
    return [
        EvalResult(
            task_type="image-classification",
            dataset_type="imagenet-1k",
            dataset_name="ImageNet-1k",
            metric_type="accuracy",
            metric_name="Top-1 accuracy",
            metric_value=value,
            source_name=f"reported {_REPORTED[source]}",
            source_url=_where(
                source, facts.paper if facts.weights is None else facts.weights.paper
            ),
        )
        for source, value in list(top1.items())[:1]
    ]


def _where(source: str, paper: Paper) -> str:
    """The address of a place where an accuracy was reported."""
    if source == "paper":
        return f"https://arxiv.org/abs/{paper.arxiv}"
    return _TIMM if source == "timm" else paper.code


def _introduction(facts: Facts) -> str:
    title = _TITLES[facts.family]
    if facts.family == "tic":
        return f"**{_RECONSTRUCTION}**\n\nThese weights are somebody's own training of it."
    if facts.weights is None:
        return (
            f"Weights of the {title} model `{facts.model}`. They are none of the official "
            "releases: somebody trained them, and what on and how well is not known."
        )
    datasets = " and ".join(name.replace("imagenet", "ImageNet") for name in _datasets(facts))
    trained = f", trained on {datasets}" if datasets else ""
    kind = "An image classifier" if facts.num_classes else "An image model without classifier"
    return (
        f"{kind} of the {title} family{trained}. These are the released weights, as safetensors "
        "and under the tensor names of the package `backbones`."
    )


def _details(facts: Facts) -> str:
    paper, (channels, height, width) = facts.paper, facts.input_size
    macs = f"; {facts.macs / 1e9:.3f} G multiply-adds for one image" if facts.macs else ""
    venue = f"{paper.venue} {paper.year}" if paper.venue else f"arXiv, {paper.year}"
    mean, std = (", ".join(f"{v:g}" for v in values) for values in (facts.mean, facts.std))
    lines = [
        f"- Paper: [{paper.title}](https://arxiv.org/abs/{paper.arxiv}), {venue}",
        f"- Code of its authors: {paper.code}",
        f"- Parameters: {facts.parameters / 1e6:.2f} M{macs}",
        f"- Classes: {facts.num_classes or 'none, it gives features'}",
        f"- Images: {channels} x {height} x {width}, {facts.interpolation} resizing, "
        f"{facts.crop_mode} crop {facts.crop_pct:g}, mean {mean}, standard deviation {std}",
    ]
    if facts.weights is None:
        lines.append(
            "- The image settings are those of the architecture; what these weights were trained "
            "with is not known"
        )
    return "\n".join(lines)


def _accuracy(facts: Facts) -> str:
    if facts.weights is None or not facts.weights.top1:
        return "No accuracy was reported for these weights, and none was measured."
    paper = facts.weights.paper
    lines = [
        f"- {value:g} %, {_REPORTED[source]}: {_where(source, paper)}"
        for source, value in facts.weights.top1.items()
    ]
    return (
        "Top-1 on ImageNet-1k, as it was reported of the original file:\n\n"
        + "\n".join(lines)
        + "\n\nThe converted file was not evaluated again."
    )


def _usage(facts: Facts) -> str:
    return (
        "With the package `backbones` (distribution `fused-backbones`):\n\n"
        "```python\n"
        "import backbones, timm, torch\n\n"
        f'model = timm.create_model("local-dir:{facts.name}", pretrained=True).eval()\n'
        f"output = model(torch.randn(1, {', '.join(str(n) for n in facts.input_size)}))\n"
        "```\n\n"
        f"`{facts.name}` stands for the path of this folder; of a repository, write `hf-hub:` and "
        "its name instead. `timm.data.resolve_model_data_config(model)` gives the image settings."
    )


def _origin(facts: Facts) -> str:
    lines = [
        f"- Converted from `{facts.source}`, SHA-256 `{facts.source_sha256}`",
        f"- Taken from it: {facts.copy}",
        *(f"- {change}" for change in facts.changes),
    ]
    if facts.weights is not None:
        places = list(facts.weights.urls)
        if facts.weights.hub_id:
            hub = f"https://huggingface.co/{facts.weights.hub_id}"
            places.append(f"{hub} (`{facts.weights.filename}`)")
        lines += [f"- Released at {place}" for place in places]
        if facts.weights.converted_from:
            lines.append(f"- That of the hub was made from: {facts.weights.converted_from}")
    return "\n".join(lines)


def _licence(facts: Facts) -> str:
    code = facts.paper.code_license
    authors = "states no licence" if code == "none" else f"is under {_LICENSES.get(code, code)}"
    weights = (
        "Nobody stated a licence for these weights: ask who trained them."
        if facts.license == UNKNOWN_LICENSE
        else f"The weights are under {_LICENSES.get(facts.license, facts.license)}."
    )
    return (
        f"{weights} The code of the paper's authors, {facts.paper.code}, {authors}; none of it is "
        "here. The package `backbones` is under Apache-2.0."
    )


def _problems(facts: Facts) -> str:
    if facts.weights is not None:
        return facts.weights.note or "None are known."
    return "None are known: nobody has reported on these weights."
