"""The restated official OverLoCK equals ours, in both forms, and in training."""

import pytest
import timm
import torch

from benchmarks.official import overlock, pair
from tests.support import golden

SHORT = {"depths": (1, 1, 1, 1), "focus_depths": (2, 2), "num_classes": 10}


def short_pair(**options):
    """Our smallest model with fewer blocks and its restatement, with deterministic weights."""
    ours = timm.create_model("overlock_xt", **SHORT, **options, dtype=torch.float64)
    weights = golden.fill_model(ours)
    ours.load_state_dict(weights)
    peer = overlock.build(ours, "overlock_xt", **options)
    peer.load_state_dict(weights)
    return ours.eval(), peer.eval()


def assert_close(value, expected, tolerance=1e-9):
    assert value.shape == expected.shape
    assert (value - expected).abs().max() <= tolerance * expected.abs().max()


# 193 and more: maps as they are; others are resized before they are mixed
@pytest.mark.parametrize("size", [(208, 225), (64, 64), (33, 97)])
@torch.no_grad()
def test_equals_ours(size):
    ours, peer = short_pair()
    x = golden.image((1, 3, *size))
    expected = ours(x)
    assert_close(peer(x), expected)
    assert_close(peer.fuse()(x), expected)


@torch.no_grad()
def test_equals_the_merged_form():
    ours, peer = short_pair(reparam=True)
    x = golden.image((1, 3, 64, 64))
    assert_close(peer(x), ours(x))


def test_trains_as_ours():
    grads = []
    for model in short_pair():
        x = golden.image((2, 3, 64, 33)).requires_grad_()
        out = model.train()(x)
        out.backward(torch.from_numpy(golden.normal("grad", out.shape)))
        grads.append((out, x.grad, dict(model.named_parameters()), dict(model.named_buffers())))
    (out, dx, ours, buffers), (expected, expected_dx, theirs, their_buffers) = grads
    assert_close(out, expected)
    assert_close(dx, expected_dx)
    for name in ("stages.0.blocks.0.conv.rep.branches.2.conv.weight", "stem.0.conv.weight"):
        assert_close(ours[name].grad, theirs[name].grad)
    name = "focus.1.blocks.1.mixer.lepe.rep.branches.3.bn.running_var"
    assert_close(buffers[name], their_buffers[name])


def test_fits_the_weights_of_a_whole_model():
    ours, peer = pair("overlock_xt", device="meta")
    shapes, expected = ({k: v.shape for k, v in m.state_dict().items()} for m in (peer, ours))
    assert shapes == expected
