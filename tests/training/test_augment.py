from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data.auto_augment import NAME_TO_OP

from backbones.training.augment import (
    AugmentConfig,
    BatchMixer,
    View,
    eval_transform,
    guard_posterize,
    train_transform,
)
from backbones.training.config import parse
from backbones.training.keys import seed_host
from backbones.training.train_config import TrainConfig

VIEW = View(32, (0.5,) * 3, (0.25,) * 3, "bicubic", 0.875)


def _config(**changes) -> AugmentConfig:
    argv = [f"augment.{name}={value}" for name, value in changes.items()]
    return parse(TrainConfig, argv, program="train.py").config.augment


def _image(size=(48, 40)) -> Image.Image:
    pixels = np.random.RandomState(0).randint(0, 256, (*size, 3))
    return Image.fromarray(pixels.astype(np.uint8))


@pytest.mark.parametrize(
    ("policy", "draws"),
    [("rand-m9-mstd0.5-inc1", 5000), ("rand-m15-mstd0.5-inc1", 500), ("v0", 500)],
)
def test_no_draw_of_a_policy_fails(policy, draws):
    transform = train_transform(_config(auto_augment=policy), VIEW, affine=False)
    image = _image((32, 32))
    for seed in range(draws):
        seed_host(seed)
        transform(image)


def test_posterize_to_no_bits_is_black_and_timm_stays_as_it_is():
    before = dict(NAME_TO_OP)
    transform = guard_posterize(
        train_transform(_config(auto_augment="rand-m9-inc1"), VIEW, affine=False)
    )
    ops = [op for step in transform.transforms for op in getattr(step, "ops", ())]
    posterize = next(op.aug_fn for op in ops if op.name == "PosterizeIncreasing")
    assert posterize(_image(), 0).getextrema() == ((0, 0),) * 3
    assert posterize(_image(), 3).tobytes() == NAME_TO_OP["Posterize"](_image(), 3).tobytes()
    assert before == NAME_TO_OP


@pytest.mark.parametrize("affine", [False, True])
def test_a_view_is_a_function_of_its_seed(affine):
    config = _config(auto_augment="rand-m9-mstd0.5-inc1", reprob=1.0, color_jitter=0.4)
    transform = train_transform(config, VIEW, affine=affine)
    views = []
    for seed in (1, 2, 1):
        seed_host(seed)
        views.append(transform(_image()))
    assert views[0].shape == (3, 32, 32)
    assert torch.equal(views[0], views[2]) and not torch.equal(views[0], views[1])


def test_evaluation_resizes_crops_and_normalises():
    image = Image.new("RGB", (100, 60), (255, 128, 0))
    view = eval_transform(VIEW)(image)
    assert view.shape == (3, 32, 32)
    expected = (torch.tensor([255, 128, 0]) / 255 - 0.5) / 0.25
    assert torch.allclose(view, expected[:, None, None].expand_as(view))


@pytest.mark.parametrize(
    ("mode", "edge"), [("center", (0, 255, 0)), ("squash", (255, 0, 0)), ("border", (0, 0, 255))]
)
def test_evaluation_crops_squashes_or_pads(mode, edge):
    image = Image.new("RGB", (120, 60), (0, 255, 0))
    image.paste((255, 0, 0), (0, 0, 20, 60))
    plain = replace(VIEW, mean=(0.0, 0.0, 1.0), std=(1.0,) * 3, crop_pct=1.0, crop_mode=mode)
    view = eval_transform(plain)(image) + torch.tensor([0.0, 0.0, 1.0])[:, None, None]
    # the upper edge is padded with the mean, which is blue
    pixel = view[:, 0, 1] * 255
    assert torch.allclose(pixel, torch.tensor(edge).float(), atol=3)


@pytest.mark.parametrize("mix", [{"mixup": 0.8}, {"cutmix": 1.0}, {"mixup": 0.8, "cutmix": 1.0}])
def test_mixing_is_a_function_of_its_seed_and_keeps_the_mass(mix):
    mixer = BatchMixer(_config(smoothing=0.1, **mix), num_classes=5)
    images, labels = torch.rand(6, 3, 16, 16), torch.tensor([0, 1, 2, 3, 4, 0])
    results = [mixer(images.clone(), labels, seed) for seed in (2**64 - 1, 7, 2**64 - 1)]
    assert all(torch.equal(a, b) for a, b in zip(results[0], results[2], strict=True))
    assert not torch.equal(results[0][0], results[1][0])
    assert torch.allclose(results[0][1].sum(1), torch.ones(6))
