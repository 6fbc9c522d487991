"""The recipes against a table written from the publications, and a few steps of each family."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from backbones.training.augment import View, train_transform
from backbones.training.config import parse
from backbones.training.data import KeyedDataset
from backbones.training.digits import Digits
from backbones.training.engine import Engine
from backbones.training.model import build_model, count_parameters
from backbones.training.runtime import World
from backbones.training.sampler import Sample
from backbones.training.schedule import learning_rate
from backbones.training.train_config import TrainConfig
from tests.backbones.models import FAMILIES

RECIPES = {path.stem: path for path in (Path(__file__).parents[2] / "recipes").glob("*.yaml")}
# for any model
GENERIC = {"finetune", "linear_probe"}


@dataclass(frozen=True)
class Published:
    """What a publication says, apart from what all share; the learning rates are computed."""

    batch: int
    lr: float
    drop_path: float | None
    warmup: float = 5
    first: float = 1e-6
    last: float = 1e-5
    epochs: int = 300
    cooldown: int = 0
    per: str = "epoch"
    decay: float = 0.05
    clip: tuple[float, str] | None = None
    ema: float = 0.0
    repeats: int = 1
    mix: tuple[float, float] = (0.8, 1.0)
    erase: float = 0.25
    size: int = 224
    accumulate: int = 1
    model: str = ""


_BIFORMER = Published(1024, 1e-3, 0.1, ema=0.99996, repeats=3)
_DAVIT = Published(1024, 1e-3, 0.1, cooldown=10, clip=(1.0, "norm"))
_L2VIT = Published(4096, 4e-3, 0.1, 20, 0.0, 1e-6, per="step", ema=0.9999, accumulate=4)
_L2VIT_22K = Published(1024, 1e-3, 0.2, epochs=90, per="step", model="l2vit_base")
_L2VIT_FT = Published(
    1024, 4e-5, 0.2, 5, 4e-8, 4e-7, 30, per="step", decay=1e-8, ema=0.9999, accumulate=2
)
_MAXVIT = Published(
    4096, 3e-3, 0.2, 32, 0.0, per="step", clip=(1.0, "norm"), ema=0.9999, mix=(0.8, 0.0), erase=0.0
)
_MAXVIT_FT = replace(_MAXVIT, batch=512, lr=5e-5, warmup=0, last=5e-5, epochs=30, decay=1e-8)
_OVERLOCK = Published(2048, 2e-3, 0.1, cooldown=10, clip=(5.0, "norm"), ema=0.9999)
_RAVLT = Published(1024, 1e-3, 0.1, ema=0.99992, repeats=3)
_SHVIT = Published(2048, 4e-3, None, clip=(0.02, "agc"), ema=0.99996, repeats=3)
_TIC = Published(1024, 1e-3, 0.2, 20, per="step", clip=(5.0, "norm"), ema=0.9999)

PUBLISHED = {
    "biformer_tiny": _BIFORMER,
    "biformer_small": replace(_BIFORMER, drop_path=0.15),
    "biformer_base": replace(_BIFORMER, drop_path=0.4),
    "biformer_stl": _BIFORMER,
    "biformer_stl_nchw": _BIFORMER,
    "davit_tiny": _DAVIT,
    "davit_small": replace(_DAVIT, drop_path=0.2),
    "davit_base": replace(_DAVIT, drop_path=0.4),
    "l2vit_tiny": _L2VIT,
    "l2vit_small": replace(_L2VIT, drop_path=0.2),
    "l2vit_base": replace(_L2VIT, drop_path=0.3),
    "l2vit_base_in22k": _L2VIT_22K,
    "l2vit_base_in22k_ft_in1k": replace(_L2VIT_FT, model="l2vit_base"),
    "l2vit_base_384_in22k_ft_in1k": replace(_L2VIT_FT, size=384, model="l2vit_base_384"),
    **{
        f"maxvit_{name}_tf_{size}": replace(base, drop_path=drop_path, size=size)
        for name, drop_path in (("tiny", 0.2), ("small", 0.3), ("base", 0.4), ("large", 0.6))
        for size, base in ((224, _MAXVIT), (384, _MAXVIT_FT), (512, _MAXVIT_FT))
    },
    "overlock_xt": _OVERLOCK,
    "overlock_t": replace(_OVERLOCK, drop_path=0.15),
    "overlock_s": replace(_OVERLOCK, drop_path=0.4),
    "overlock_b": replace(_OVERLOCK, drop_path=0.5),
    "ravlt_t": _RAVLT,
    "ravlt_s": replace(_RAVLT, drop_path=0.15),
    "ravlt_b": replace(_RAVLT, drop_path=0.4),
    "ravlt_l": replace(_RAVLT, drop_path=0.55),
    "shvit_s1": replace(_SHVIT, decay=0.025),
    "shvit_s2": replace(_SHVIT, decay=0.032),
    "shvit_s3": replace(_SHVIT, decay=0.035),
    "shvit_s4": replace(_SHVIT, decay=0.03, size=256),
    "tic_tiny": _TIC,
    "tic_small": replace(_TIC, drop_path=0.3),
    "tic_base": replace(_TIC, drop_path=0.5),
}

# what no file of the authors says, by recipe; below, what a family's recipes share
MEMORY = {
    "biformer_tiny": {"drop_path"},
    "biformer_base": {"drop_path"},
    "davit_small": {"drop_path"},
    "davit_base": {"drop_path"},
    **{name: {"batch_size"} for name in PUBLISHED if name.startswith("ravlt")},
}
OURS = {
    "biformer": {"amp", "seed"},
    "davit": {"amp", "crop_pct"},
    "l2vit": {"seed"},
    "l2vit_tiny": {"drop_path"},
    "l2vit_small": {"drop_path"},
    "maxvit": {
        "auto_augment", "betas", "crop_pct", "eps", "hflip", "mixup_prob", "ratio", "scale", "seed",
    },
    **{
        f"maxvit_{name}_tf_{size}": {"crop_mode"} if name == "tiny" else {"crop_mode", "drop_path"}
        for name in ("tiny", "small", "base", "large")
        for size in (384, 512)
    },
    "overlock": {"amp"},
    "ravlt": {"amp", "seed"},
    "shvit": {"amp", "seed"},
}  # fmt: skip

_PINNED = {
    "augment": {
        "geometry", "scale", "ratio", "hflip", "auto_augment", "train_interpolation", "reprob",
        "mixup", "cutmix", "mixup_prob", "smoothing", "repeats",
    },
    "data": {"img_size", "batch_size", "crop_pct", "interpolation"},
    "ema": {"decay"},
    "optim": {"name", "lr", "weight_decay", "betas", "eps", "clip"},
    "schedule": {"name", "epochs", "cooldown_epochs", "warmup_epochs", "per"},
}  # fmt: skip


def _config(name: str) -> TrainConfig:
    return parse(TrainConfig, [str(RECIPES[name])], program="train.py").config


def _marked(name: str, mark: str) -> set[str]:
    return set(re.findall(rf"^  (\w+): .*# {mark}\b", RECIPES[name].read_text(), re.MULTILINE))


def test_every_recipe_is_in_the_table():
    assert RECIPES.keys() == PUBLISHED.keys() | GENERIC


@pytest.mark.parametrize("name", sorted(RECIPES))
def test_the_model_of_a_recipe_takes_its_input(name):
    config = _config(name)
    with torch.device("meta"):
        # tables that are made from constants stay behind on the CPU
        model: Any = build_model(config.model, 1000).eval().to("meta")
    size = config.data.img_size or 224
    assert model.default_cfg["input_size"] == (3, size, size)
    # larger ones of the same family take seconds
    if count_parameters(model) < 32e6:
        assert model(torch.empty(1, 3, size, size, device="meta")).shape == (1, 1000)


@pytest.mark.parametrize("name", sorted(PUBLISHED))
def test_the_values_are_the_published_ones(name):
    config, expected = _config(name), PUBLISHED[name]
    data, augment, optim = config.data, config.augment, config.optim
    assert config.model.name == (expected.model or name)
    assert config.model.drop_path == expected.drop_path
    assert (data.batch_size, data.img_size) == (expected.batch, expected.size)
    assert data.crop_mode == ("squash" if expected.size > 256 else None)
    assert (optim.name, optim.weight_decay) == ("adamw", expected.decay)
    assert (optim.betas, optim.eps) == ((0.9, 0.999), 1e-8)
    assert ((optim.clip, optim.clip_mode) if optim.clip else None) == expected.clip
    assert optim.layer_decay is None
    assert config.ema.decay == expected.ema and not (expected.ema and config.ema.warmup)
    assert (augment.mixup, augment.cutmix, augment.mixup_prob) == (*expected.mix, 1.0)
    assert (augment.smoothing, augment.repeats) == (0.1, expected.repeats)
    assert (augment.reprob, augment.hflip, augment.mixup_switch_prob) == (expected.erase, 0.5, 0.5)
    maxvit, overlock = "maxvit" in name, "overlock" in name
    assert augment.auto_augment == ("rand-m15-n2" if maxvit else "rand-m9-mstd0.5-inc1")
    assert augment.train_interpolation == ("random" if overlock else "bicubic")
    assert config.model.aux_weight == (0.4 if overlock else 0.0)
    assert config.runtime.sync_bn == (overlock or "ravlt" in name)
    assert config.optim.accumulate == expected.accumulate


@pytest.mark.parametrize("name", sorted(PUBLISHED))
def test_the_rates_are_the_published_ones(name):
    config, expected = _config(name), PUBLISHED[name]
    schedule, steps = config.schedule, 1281167 // expected.batch
    peak = config.optim.peak_lr(config.data.batch_size)
    assert peak == pytest.approx(expected.lr)
    assert (schedule.epochs, schedule.cooldown_epochs) == (expected.epochs, expected.cooldown)
    assert (schedule.warmup_epochs, schedule.per) == (expected.warmup, expected.per)

    def rate(step: float) -> float:
        return learning_rate(schedule, peak, int(step), steps)

    constant, warmup, last = expected.last == expected.lr, int(expected.warmup), expected.last
    first = expected.lr if constant else expected.first
    assert rate(0) == pytest.approx(first, rel=1e-12)
    # the cosine has already begun to fall where the warm-up ends
    part = (1 + math.cos(math.pi * warmup / expected.epochs)) / 2
    assert rate(warmup * steps) == pytest.approx(last + (expected.lr - last) * part, rel=1e-9)
    assert rate(expected.epochs * steps / 2) == pytest.approx((expected.lr + last) / 2, rel=1e-3)
    end = (expected.epochs + expected.cooldown) * steps - 1
    assert rate(end) == pytest.approx(last, rel=1e-9 if expected.cooldown or constant else 0.15)


@pytest.mark.parametrize("name", sorted(PUBLISHED))
def test_a_recipe_says_where_its_values_come_from(name):
    text = RECIPES[name].read_text()
    header = text[: text.index("model:")]
    if "tic" in name:
        assert "Every value is ours" in header and "No accuracy is known" in header
    else:
        assert "Every value is published" in header and 'unless marked "ours"' in header
        assert "no accuracy" in header or re.search(r"reports? \d\d\.\d+ % top-1 at \d+ px", header)
        family = name.split("_")[0]
        assert _marked(name, "ours") == OURS[family] | OURS.get(name, set())
        assert _marked(name, "from memory of the paper") == MEMORY.get(name, set())
        assert not MEMORY.get(name) or '"from memory of the paper"' in header
    assert "not reproduced here: no ImageNet, no GPU time" in header
    assert f"train.py recipes/{name}.yaml" in header


@pytest.mark.parametrize("name", sorted(PUBLISHED))
def test_a_recipe_leaves_nothing_to_the_defaults(name):
    groups = yaml.safe_load(RECIPES[name].read_text())
    for group, settings in _PINNED.items():
        assert settings <= groups[group].keys()
    assert groups["schedule"]["name"] == "constant" or "min_lr" in groups["schedule"]


def test_the_generic_recipes_are_ours():
    for name in GENERIC:
        assert "every value is ours" in RECIPES[name].read_text()
    optim = _config("finetune").optim
    assert (optim.layer_decay, optim.peak_lr(512)) == (0.75, pytest.approx(2e-4))
    probe = _config("linear_probe")
    assert probe.finetune.head_only and (probe.optim.name, probe.optim.momentum) == ("sgd", 0.9)


FIRST = {
    "biformer": "biformer_tiny", "davit": "davit_tiny", "l2vit": "l2vit_tiny",
    "maxvit": "maxvit_tiny_tf_224", "overlock": "overlock_xt", "ravlt": "ravlt_t",
    "shvit": "shvit_s1", "tic": "tic_tiny",
}  # fmt: skip
_VIEW = View(32, (0.3,) * 3, (0.35,) * 3, "bicubic", 1.0)


def _losses(family: str, steps: int = 20) -> list[float]:
    """Losses of steps on one batch of digits, with all of a family's recipe but its length."""
    config = _config(FIRST[family])
    torch.manual_seed(0)
    given = {"drop_path_rate": config.model.drop_path, "aux_head": bool(config.model.aux_weight)}
    model = FAMILIES[family].create_short(**{k: v for k, v in given.items() if v})
    engine = Engine(model.train(), 10, config, World(torch.device("cpu")))
    transform = train_transform(config.augment, _VIEW, affine=False)
    views = KeyedDataset(Digits(train=True), transform, seed=0)
    images, labels, failed = zip(*(views[Sample(0, image)] for image in range(16)), strict=True)
    batch = (torch.stack(images), torch.tensor(labels), torch.tensor(failed))
    lr = config.optim.peak_lr(config.data.batch_size)
    # the number of the step stays: it draws the mixing and the dropped paths
    return [
        engine.step([tuple(t.clone() for t in batch)], 0, lr, stop=False, bad=0).loss
        for _ in range(steps)
    ]


@pytest.mark.parametrize("family", FIRST)
def test_twenty_steps_of_a_recipe_lower_the_loss(family):
    losses = _losses(family)
    assert losses[-1] < 0.85 * losses[0]
