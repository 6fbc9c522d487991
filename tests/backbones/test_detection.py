"""torchvision's detectors on all families."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from backbones.detection import DETECTORS, DetectionBackbone, build_detector
from backbones.pretrained import WeightsError, biformer
from tests.backbones.models import FAMILIES, SMALLEST, VARIANTS, Small, deterministic
from tests.support import golden

DENSE = ("retinanet", "fcos")
WITHOUT_NORMS = ("maxvit", "shvit")
# little work for the heads of R-CNNs
FEW = {
    "rpn_pre_nms_top_n_train": 50,
    "rpn_pre_nms_top_n_test": 50,
    "rpn_post_nms_top_n_train": 20,
    "rpn_post_nms_top_n_test": 20,
    "box_batch_size_per_image": 16,
}


def build(detector: str, family: Small, **kwargs) -> nn.Module:
    """A detector on a small model."""
    few = {} if detector in DENSE else FEW
    args = {"min_size": 96, "max_size": 160, "num_classes": 3, "backbone_args": family.args}
    args |= {"detector_args": few}
    return build_detector(detector, family.name, **{**args, **kwargs})


@pytest.fixture(scope="module", params=FAMILIES.values(), ids=FAMILIES)
def family(request) -> Small:
    return request.param


def images(*sizes: tuple[int, int]) -> list[Tensor]:
    return [golden.image((1, 3, *size))[0].float().sigmoid() for size in sizes]


def targets(sizes: list[tuple[int, int]]) -> list[dict[str, Tensor]]:
    """Two rectangles in every image, of classes 1 and 2."""
    found = []
    for height, width in sizes:
        boxes = torch.tensor([[0.1, 0.1, 0.45, 0.6], [0.5, 0.3, 0.9, 0.9]])
        boxes = boxes * torch.tensor([width, height, width, height])
        masks = torch.zeros(2, height, width, dtype=torch.uint8)
        for mask, (x0, y0, x1, y1) in zip(masks, boxes.int().tolist(), strict=True):
            mask[y0:y1, x0:x1] = 1
        found.append({"boxes": boxes, "labels": torch.tensor([1, 2]), "masks": masks})
    return found


def check_gradients(detector: nn.Module, sizes: list[tuple[int, int]]) -> None:
    """A step of training gives every trainable parameter a finite gradient, and no other one."""
    losses = detector.train()(images(*sizes), targets(sizes))
    assert all(loss.isfinite() for loss in losses.values())
    sum(losses.values()).backward()
    for name, parameter in detector.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None and parameter.grad.isfinite().all(), name
        else:
            assert parameter.grad is None, name


def some(*every: str) -> list:
    """Pairs of family and detector: all families with these detectors, a few with the others."""
    names = ("davit", "overlock", "shvit")
    pairs = [(name, detector) for name in FAMILIES for detector in every]
    pairs += [(name, other) for name in names for other in DETECTORS if other not in every]
    return [pytest.param(FAMILIES[n], detector, id=f"{n}-{detector}") for n, detector in pairs]


@pytest.mark.parametrize("family, detector", some("faster_rcnn", "retinanet", "fcos"))
@torch.no_grad()
def test_maps_and_anchors(family, detector):
    model = build(detector, family).eval()
    strides = [8, 16, 32, 64, 128] if detector in DENSE else [4, 8, 16, 32, 64]
    body = model.backbone
    assert (list(body.strides), body.out_channels) == (strides, 256)
    batch, _ = model.transform(images((75, 101), (96, 64)))
    height, width = batch.tensors.shape[2:]
    maps = list(body(batch.tensors).values())
    shapes = [(2, 256, -(-height // stride), -(-width // stride)) for stride in strides]
    assert [tuple(value.shape) for value in maps] == shapes

    generator = model.rpn.anchor_generator if detector not in DENSE else model.anchor_generator
    kinds = generator.num_anchors_per_location()
    assert kinds == [{"retinanet": 9, "fcos": 1}.get(detector, 3)] * 5
    first, second = generator(batch, maps)
    assert torch.equal(first, second)
    counts = [k * h * w for k, (_, _, h, w) in zip(kinds, shapes, strict=True)]
    factor = {"retinanet": 4, "fcos": 1}.get(detector, 8)
    for stride, level, kind, shape in zip(strides, first.split(counts), kinds, shapes, strict=True):
        grid = level.unflatten(0, (*shape[2:], kind))
        centres = (grid[..., :2] + grid[..., 2:]) / 2
        if shape[2] > 1 and shape[3] > 1:
            step = centres[1, 1, 0] - centres[0, 0, 0]
            assert step.tolist() == [stride, stride]
        side = (grid[0, 0, :, 2:] - grid[0, 0, :, :2]).prod(1).sqrt()
        assert side.min() == pytest.approx(factor * stride, rel=0.03, abs=1)


@pytest.mark.parametrize("family, detector", some("mask_rcnn"))
@torch.no_grad()
def test_detects_in_images_of_different_odd_sizes(family, detector):
    torch.manual_seed(0)
    sizes = [(75, 101), (97, 63)]
    found = build(detector, family).eval()(images(*sizes))
    for (height, width), image in zip(sizes, found, strict=True):
        boxes = image["boxes"]
        assert len(boxes) == len(image["labels"]) == len(image["scores"])
        assert boxes.isfinite().all()
        assert (boxes >= 0).all() and (boxes <= torch.tensor([width, height] * 2)).all()
        if detector == "mask_rcnn":
            assert image["masks"].shape == (len(boxes), 1, height, width)


def test_mask_rcnn_trains_every_parameter(family):
    torch.manual_seed(0)
    check_gradients(build("mask_rcnn", family, min_size=256, max_size=320), [(256, 320)])


@pytest.mark.slow
@pytest.mark.parametrize("name", SMALLEST.values())
def test_mask_rcnn_trains_every_parameter_of_real_models(name):
    torch.manual_seed(0)
    detector = build_detector(
        "mask_rcnn", name, num_classes=3, min_size=256, max_size=320, detector_args=FEW
    )
    check_gradients(detector, [(256, 320)] * 2)


@pytest.mark.parametrize("detector", DENSE)
@pytest.mark.parametrize("name", ["biformer", "overlock", "shvit"])
def test_dense_detectors_train_every_parameter(name, detector):
    torch.manual_seed(0)
    check_gradients(build(detector, FAMILIES[name]), [(96, 128), (90, 107)])


@pytest.mark.parametrize("trainable", [0, 2])
def test_frozen_stages_stay_as_they_are(family, trainable):
    torch.manual_seed(0)
    detector = build("fcos", family, trainable_stages=trainable)
    body = detector.backbone.body
    before = {k: v.clone() for k, v in body.state_dict().items()}
    check_gradients(detector, [(64, 96), (60, 73)])
    layers = body.feature_layers()
    assert len(layers) == family.stages + 1
    for index, group in enumerate(layers):
        frozen = index < len(layers) - trainable
        for layer in group:
            assert all(p.requires_grad != frozen for p in layer.parameters())
            assert all(m.training != frozen for m in layer.modules())
    with torch.no_grad():
        for parameter in detector.parameters():
            if parameter.grad is not None:
                parameter -= parameter.grad
    stem = {id(v) for layer in layers[0] for v in layer.state_dict(keep_vars=True).values()}
    for key, value in body.state_dict(keep_vars=True).items():
        assert id(value) not in stem or torch.equal(value, before[key]), key
    assert not any(m.training for m in detector.eval().modules())


def test_batch_norms_of_pretrained_backbones_keep_their_statistics(tmp_path):
    family = FAMILIES["ravlt"]
    path = tmp_path / "weights.pth"
    torch.save({"model": family.create().state_dict()}, path)
    for kwargs, keep in [
        ({}, False),
        ({"norm_eval": True}, True),
        ({"pretrained_backbone": path}, True),
        ({"pretrained_backbone": str(path), "norm_eval": False}, False),
    ]:
        detector = build("fcos", family, **kwargs).train()
        norms = [m for m in detector.backbone.body.modules() if isinstance(m, nn.BatchNorm2d)]
        assert norms and all(m.training != keep for m in norms)
        assert all(p.requires_grad for m in norms for p in m.parameters())


@torch.no_grad()
def test_norms_of_maps(family):
    x = golden.image((1, 3, 64, 96)).float()
    torch.manual_seed(0)
    with_norms = build("fcos", family).eval().backbone
    torch.manual_seed(0)
    without = build("fcos", family, norm_maps=False).eval().backbone
    names = {k for k in with_norms.state_dict() if ".feature_norms." in k}
    if family.name.startswith(WITHOUT_NORMS):
        assert not names and with_norms.state_dict().keys() == without.state_dict().keys()
        return
    assert not any(".feature_norms." in k for k in without.state_dict())
    # those of the first map are left out
    assert len(names) == 6
    body = without.body.state_dict()
    with_norms.body.load_state_dict(body, strict=False)
    maps = with_norms.body.forward_intermediates(x, intermediates_only=True)
    raw = without.body.forward_intermediates(x, intermediates_only=True)
    # what follows the second stage of OverLoCK sees its norm
    end = 2 if family.name.startswith("overlock") else 4
    for value, plain in zip(maps[1:end], raw[1:end], strict=True):
        eps = with_norms.body.feature_norms[1].eps
        normed = F.layer_norm(plain.permute(0, 2, 3, 1), plain.shape[1:2], eps=eps)
        torch.testing.assert_close(value, normed.permute(0, 3, 1, 2), rtol=1e-4, atol=1e-5)


def test_dense_detectors_do_without_the_first_map(family):
    body = build("retinanet", family).backbone.body
    levels = [m for m in body.feature_norms if not isinstance(m, nn.Identity)]
    expected = 0 if family.name.startswith(WITHOUT_NORMS) else 3
    assert len(levels) == expected


@pytest.mark.parametrize("detector", DETECTORS)
def test_state_dict_round_trip(detector):
    torch.manual_seed(0)
    model, again = (build(detector, FAMILIES["shvit"]).eval() for _ in range(2))
    again.load_state_dict(model.state_dict())
    x = images((75, 101))
    with torch.no_grad():
        for value, other in zip(model(x)[0].values(), again(x)[0].values(), strict=True):
            assert torch.equal(value, other)


def test_regions_and_normalization_follow_the_backbone():
    detector = build("faster_rcnn", FAMILIES["biformer"])
    blocks = detector.backbone.body.stages[0].blocks
    assert {block.attn.n_win for block in blocks} == {16}
    assert build("fcos", FAMILIES["shvit"]).transform.image_mean == [0.485, 0.456, 0.406]
    maxvit = build("fcos", VARIANTS["maxvit_rw"])
    assert maxvit.transform.image_mean == maxvit.transform.image_std == [0.5] * 3
    roi = build("mask_rcnn", FAMILIES["maxvit"]).roi_heads
    assert roi.box_roi_pool.featmap_names == roi.mask_roi_pool.featmap_names == list("0123")


@torch.no_grad()
def test_weights_of_official_detectors_and_of_classifiers_load(tmp_path):
    family = FAMILIES["biformer"]
    pyramid = deterministic(family.create(pyramid="det"), torch.float32)
    official = {f"backbone.{k}": v for k, v in biformer.to_official(pyramid.state_dict()).items()}
    path = tmp_path / "mask_rcnn.pth"
    torch.save({"state_dict": {**official, "neck.weight": torch.zeros(1)}}, path)
    body = build("mask_rcnn", family, pretrained_backbone=path).backbone.body
    assert all(torch.equal(v, body.state_dict()[k]) for k, v in pyramid.state_dict().items())

    for name in ("maxvit", "davit"):
        family = FAMILIES[name]
        trained = deterministic(family.create(), torch.float32)
        torch.save(trained.state_dict(), path)
        for norm_maps in (True, False):
            body = build("fcos", family, pretrained_backbone=path, norm_maps=norm_maps).backbone
            for key, value in body.body.state_dict().items():
                wanted = trained.state_dict().get(key)
                assert key.startswith("feature_norms.") or torch.equal(value, wanted), key
    torch.save({"x": torch.zeros(1)}, path)
    with pytest.raises(WeightsError, match="do not fit the model"):
        build("fcos", family, pretrained_backbone=path)


def test_models_of_ones_own():
    model = FAMILIES["l2vit"].create(pyramid="det", in_chans=3)
    detector = build_detector("retinanet", model, num_classes=5, min_size=64)
    assert detector.backbone.body is model and not list(model.head.parameters())
    with pytest.raises(ValueError, match="load and build the L2ViT before"):
        build_detector("retinanet", model, pretrained_backbone=True)


@pytest.mark.parametrize(
    "args, message",
    [
        ({"detector": "yolo"}, "detector 'yolo' is none of .*'faster_rcnn'"),
        ({"backbone": "shvit_s9"}, "no model is called 'shvit_s9'"),
        ({"num_classes": 1}, "num_classes=1: count the background too"),
        ({"trainable_stages": 4}, "trainable_stages=4 is none of 0 to 3"),
        ({"trainable_stages": -1}, "trainable_stages=-1 is none of 0 to 3"),
        ({"backbone": FAMILIES["tic"].create_short()}, r"maps at strides \[4, 8\]"),
    ],
)
def test_bad_arguments_are_named(args, message):
    with pytest.raises(ValueError, match=message):
        build_detector(**{"detector": "fcos", "backbone": "shvit_s1", **args})


def test_the_body_is_for_other_detectors_too():
    body = DetectionBackbone(FAMILIES["davit"].create(pyramid="det"))
    names = list(body(torch.zeros(1, 3, 64, 64)))
    assert names == ["0", "1", "2", "3", "pool"]
