"""TiC against the recorded reconstruction, what it costs, and everything that may be chosen."""

import itertools

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import backbones
from backbones.layers import NeighborhoodAttention
from backbones.tic import Downsample
from benchmarks._cpu import peak
from tests.backbones.models import FAMILIES, deterministic, relative_error
from tests.support import costs, golden

NAMES = ["tic_tiny", "tic_small", "tic_base"]
CASES = [("tic_tiny", 0), ("tic_tiny", 1), ("tic_small", 0), ("tic_small", 1), ("tic_base", 0)]
SMALL = FAMILIES["tic"]
DIAGONALS = [(1, 1), (1, -1), (-1, 1), (-1, -1)]


def recorded(name: str) -> dict:
    return golden.load(f"{name}_reconstruction")


def create(name: str, dtype: torch.dtype) -> nn.Module:
    """The model with the recorded names, which are ours, filled."""
    model = timm.create_model(name).to(dtype).eval()
    model.load_state_dict(golden.official_weights(recorded(name)))
    return model


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-8), (torch.float32, 2e-5)])
@pytest.mark.parametrize("name, index", CASES)
@torch.no_grad()
def test_equals_the_reconstruction(name, index, dtype, tolerance):
    case, model = recorded(name)["cases"][index], create(name, dtype)
    x = golden.image(case["input_shape"]).to(dtype)
    last, maps = model.forward_intermediates(x)
    values = [model.forward_stem(model.image_input(x)), *maps, model.forward_head(last, True)]
    for value, summary in zip(values, case["features"].values(), strict=True):
        golden.check_summary(value, summary, tolerance)
    logits = torch.tensor(case["logits"], dtype=torch.float64).reshape(1, -1)
    assert relative_error(model.forward_head(last).double(), logits) < tolerance


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-8), (torch.float32, 2e-5)])
def test_gradients_equal_those_of_the_reconstruction(dtype, tolerance):
    (case,), model = recorded("tic_tiny")["gradient_cases"], create("tic_tiny", dtype)
    x = golden.image(case["input_shape"]).to(dtype).requires_grad_()
    logits = model(x)
    (logits * torch.from_numpy(golden.normal("cotangent", logits.shape)).to(dtype)).sum().backward()
    golden.check_summary(x.grad, case["grad_input"], tolerance)
    norms = {name: float(p.grad.double().norm()) for name, p in model.named_parameters()}
    assert norms == pytest.approx(case["grad_param_l2"], rel=tolerance)


@pytest.mark.parametrize("name", NAMES)
def test_costs(name):
    config, model = recorded(name)["config"], timm.create_model(name, device="meta")
    assert sum(p.numel() for p in model.parameters()) == config["params"]
    assert costs.macs(name) == config["macs_224"]
    assert {k: list(v.shape) for k, v in model.state_dict().items()} == recorded(name)["manifest"]


def test_layers_start_as_the_spec_says():
    model = timm.create_model("tic_tiny", num_classes=10)
    for module in model.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            assert not module.bias.any()
            assert 0.01 < module.weight.std() < 0.025


def shifts(model: nn.Module) -> list[list[list[tuple[int, int]] | None]]:
    return [[block.attn.shifts for block in stage.blocks] for stage in model.stages]


def test_every_second_block_is_shifted():
    options = {"device": "meta", "depths": (2, 1, 5, 2), "dilation": (1, 1, 2, 1)}
    by_three = [(3 * y, 3 * x) for y, x in DIAGONALS]
    by_six = [(6 * y, 6 * x) for y, x in DIAGONALS]
    expected = [[None, by_three], [None], [None, by_six, None, by_six, None], [None, by_three]]
    assert shifts(backbones.TiC(**options)) == expected
    # of the whole network, each such block has the next direction
    expected[0][1], expected[3][1] = by_three[:1], by_three[3:]
    expected[2][1::2] = [by_six[1:2], by_six[2:3]]
    assert shifts(backbones.TiC(**options, shift="block")) == expected
    assert not any(any(s) for s in shifts(backbones.TiC(**options, shift="none")))


@pytest.mark.parametrize(
    "dilation, expected",
    [
        (2, [[2, 2], [2], [2, 2], [2]]),
        ((1, 2, 3, 1), [[1, 1], [2], [3, 3], [1]]),
        (((1, 4), 2, (3, 1), (1,)), [[1, 4], [2], [3, 1], [1]]),
    ],
)
def test_dilation_of_all_of_stages_or_of_blocks(dilation, expected):
    model = SMALL.create(dilation=dilation, device="meta")
    found = [[block.attn.dilation for block in stage.blocks] for stage in model.stages]
    assert found == [[(d, d) for d in stage] for stage in expected]


OPTIONS = {
    "smaller windows": {"kernel_size": 3},
    "dilated": {"dilation": ((2, 3), 2, 1, 1)},
    "depthwise": {"num_heads": (32, 64, 64, 96), "kernel_size": 3},
    "shifted by blocks": {"shift": "block"},
    "not shifted": {"shift": "none"},
    "averaged": {"pool": "avg"},
    "not projected": {"attn_proj": False},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_options_change_the_model_and_train(options):
    x, plain = golden.image((2, 3, 65, 97)), deterministic(SMALL.create())
    model = deterministic(SMALL.create(**options))
    logits = model(x)
    assert relative_error(logits, plain(x)) > 1e-6
    logits.square().sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad.isfinite().all() and parameter.grad.any(), name
    with torch.no_grad():
        assert relative_error(model.fuse()(x), logits) < 1e-11


def test_the_projection_is_what_the_option_removes():
    count = [sum(p.numel() for p in SMALL.create(attn_proj=flag).parameters()) for flag in (0, 1)]
    blocks = zip(SMALL.args["embed_dims"], SMALL.args["depths"], strict=True)
    assert count[1] - count[0] == sum(depth * (dim**2 + dim) for dim, depth in blocks)


@pytest.mark.parametrize("pool", ["max", "avg"])
@pytest.mark.parametrize("size", [(1, 1), (2, 5), (7, 8)])
@torch.no_grad()
def test_pooling_counts_what_is_on_the_map(pool, size):
    layer = deterministic(Downsample(4, 6, pool))
    x = golden.image((2, 4, *size)) - 5
    reduce = Tensor.amax if pool == "max" else Tensor.mean
    pooled = torch.empty(2, (size[0] + 1) // 2, (size[1] + 1) // 2, 4, dtype=x.dtype)
    for y, i in itertools.product(range(pooled.shape[1]), range(pooled.shape[2])):
        window = x[:, :, max(0, 2 * y - 1) : 2 * y + 2, max(0, 2 * i - 1) : 2 * i + 2]
        pooled[:, y, i] = reduce(window, (2, 3))
    normed = F.layer_norm(pooled, (4,), layer.norm.weight, layer.norm.bias, 1e-6)
    expected = F.linear(normed, layer.proj.weight, layer.proj.bias).permute(0, 3, 1, 2)
    torch.testing.assert_close(layer(x), expected)


@torch.no_grad()
def test_large_maps_hold_no_windows():
    """Those of the first stage of a large image are 1.1 GB of keys, and as much of values."""
    model = timm.create_model("tic_tiny", depths=(1, 1, 1, 1), num_classes=2).eval()
    images = torch.zeros(1, 3, 800, 1216)
    # the hidden layer of its feed forward network is the widest map
    assert peak(lambda: model(images)) < 4 * 200 * 304 * 4 * 96 * 4 / 2**20


def test_what_is_not_available_is_named():
    for arguments, message in [
        ({"depths": (1, 1)}, r"depths=\(1, 1\).*must be of equal length"),
        ({"num_heads": (5, 6, 12, 24)}, r"multiples of num_heads=\(5, 6, 12, 24\)"),
        ({"kernel_size": 4}, r"kernel_size \(4, 4\) must be odd, and 1 or more"),
        ({"dilation": 0}, r"dilation \(0, 0\) must be positive"),
        ({"dilation": (1, 2)}, r"dilation=\(1, 2\) must be a number, or have one for each stage"),
        ({"dilation": (1, (1,), 1, 1)}, r"one for each block: depths=\(2, 2, 6, 2\)"),
        ({"shift": "all"}, r"shift='all' is not one of \('head', 'block', 'none'\)"),
        ({"pool": "min"}, r"pool='min' is not one of \('max', 'avg'\)"),
    ]:
        with pytest.raises(ValueError, match=message):
            backbones.TiC(**arguments, device="meta")


def test_it_says_that_it_is_a_reconstruction():
    for text in (backbones.TiC.__doc__, backbones.tic.__doc__, backbones.tic.tic_tiny.__doc__):
        assert "reconstruct" in text
    assert "reconstruction" in timm.get_pretrained_cfg("tic_base").description
    assert backbones.list_models("tic", pretrained=True) == []
    assert isinstance(SMALL.create().stages[0].blocks[0].attn, NeighborhoodAttention)
