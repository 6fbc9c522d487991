"""The blocks of OverLoCK against the official code (golden files), and context mixing alone."""

import pytest
import torch
from safetensors.torch import load_file
from timm.utils import reparameterize_model
from torch import Tensor, nn

from backbones.layers import ContextMixing, ContMixBlock
from backbones.layers.context_mixing import enlarged
from backbones.layers.focus_block import FocusBlock
from backbones.ops._neighborhood import window_pixels
from backbones.pretrained import overlock
from tests.backbones.models import deterministic, relative_error
from tests.support import golden

PRECISIONS = [(torch.float64, 1e-8), (torch.float32, 2e-5)]
RECORDED = golden.load("op_contmix")
TENSORS = load_file(golden.GOLDEN / "op_contmix.safetensors")
FOCUS = {case["case"]: case for case in RECORDED["dynamic_conv_block"]}
CONTMIX = {case["case"]: case for case in RECORDED["contmix_block"]}


def our_name(name: str, kernel: int) -> str:
    # the block that stands alone calls one of its layers otherwise
    name = name.replace("fusion_proj.", "dyconv_proj.")
    return overlock.our_part(name, "sub_blocks", kernel)


def load(block: nn.Module, case: dict, dtype: torch.dtype) -> dict[str, str]:
    """Fill a block with the weights of its official names; return these, by ours."""
    kernel = case["config"]["kernel_size"]
    names = {our_name(name, kernel): name for name in case["manifest"]}
    filled = golden.state_dict(case["manifest"])
    own = block.to(dtype).eval().state_dict()
    assert set(names) == set(own)
    block.load_state_dict({k: filled[names[k]].reshape(v.shape) for k, v in own.items()})
    return names


def inputs(case: dict, dtype: torch.dtype) -> list[Tensor]:
    return [
        torch.from_numpy(golden.normal(f"{case['case']}.{name}", shape)).to(dtype).requires_grad_()
        for name, shape in case["inputs"].items()
    ]


def check(value: Tensor, case: dict, key: str, summary: dict, tolerance: float) -> None:
    """Compare with a recorded tensor, with its summary alone if it is not kept."""
    name = f"{case['case']}/{key}"
    if name in TENSORS:
        assert (
            relative_error(golden.kept(value.double(), TENSORS[name]), TENSORS[name]) < tolerance
        ), key
    golden.check_summary(value, summary, tolerance)


def check_all(
    block: nn.Module,
    case: dict,
    names: dict[str, str],
    outs: list[Tensor],
    given: list[Tensor],
    tolerance: float,
) -> None:
    """Compare results, gradients of what is given, and norms of gradients of parameters."""
    for n, (out, summary) in enumerate(zip(outs, case["outs"], strict=True)):
        check(out, case, f"out{n}", summary, tolerance)
    loss = sum(
        (out * torch.from_numpy(golden.normal(f"{case['case']}.grad_out{n}", out.shape))).sum()
        for n, out in enumerate(outs)
    )
    loss.backward()
    for x, (name, summary) in zip(given, case["grads"].items(), strict=True):
        if summary is None:
            assert x.grad is None or not x.grad.any()
        else:
            check(x.grad, case, f"grad_{name}", summary, tolerance)
    norms = case["param_grad_norm"]
    # some gradients are zero but for rounding
    floor = 1e-2 * max(norms.values())
    for name, parameter in block.named_parameters():
        norm = norms[names[name]]
        assert abs(float(parameter.grad.double().norm()) - norm) < tolerance * max(norm, floor)


@pytest.mark.parametrize(("dtype", "tolerance"), PRECISIONS)
@pytest.mark.parametrize("case", FOCUS.values(), ids=FOCUS)
def test_focus_block_equals_the_official_one(case, dtype, tolerance):
    config = case["config"]
    dims = [config["dim"], config["ctx_dim"] // 4]
    block = FocusBlock(
        *dims,
        config["kernel_size"],
        config["smk_size"],
        2 * config["num_heads"],
        first=config["is_first"],
    )
    names = load(block, case, dtype)
    given = inputs(case, dtype)
    x, context, prior = (value.permute(0, 2, 3, 1) for value in given)
    out = block(torch.cat([x, context], -1), prior).permute(0, 3, 1, 2)
    outs = [out] if config["is_last"] else list(out.split(dims, 1))
    check_all(block, case, names, outs, given, tolerance)


@pytest.mark.parametrize(("dtype", "tolerance"), PRECISIONS)
@pytest.mark.parametrize("case", CONTMIX.values(), ids=CONTMIX)
def test_contmix_block_equals_the_official_one(case, dtype, tolerance):
    config = case["config"]
    sizes = {key: config[key] for key in ("kernel_size", "smk_size", "num_heads", "mlp_ratio")}
    block = ContMixBlock(config["dim"], **sizes)
    names = load(block, case, dtype)
    given = inputs(case, dtype)
    check_all(block, case, names, [block(*given)], given, tolerance)


@torch.no_grad()
def test_contmix_block_in_both_layouts_and_forms():
    block = deterministic(ContMixBlock(32))
    last = deterministic(ContMixBlock(32, channels_last=True))
    for size in [(8, 10), (3, 9), (1, 1)]:
        x = golden.image((2, 32, *size))
        expected = block(x)
        assert expected.shape == x.shape
        assert torch.equal(last(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2), expected)
        fused = reparameterize_model(nn.Sequential(block))
        assert relative_error(fused(x), expected) < 1e-11
        assert not any(isinstance(m, nn.BatchNorm2d) for m in fused.modules())
    x = golden.image((2, 32, 8, 10))
    expected = block(x)
    assert block.reparameterize() is block
    assert relative_error(block(x), expected) < 1e-11


def test_contmix_block_starts_as_the_official_one():
    block = ContMixBlock(64)
    mixing = block.mixer.mixing
    for table in (mixing.table_small, mixing.table_large):
        assert 0.01 < table.std() < 0.03
    assert torch.equal(block.scale1.weight, torch.ones(64)) and not block.scale1.bias.any()


@pytest.mark.parametrize("size", [(9, 8), (5, 9)])
@torch.no_grad()
def test_attention_gives_the_kernels_that_mix(size):
    layer = deterministic(ContextMixing(16, 8, 7, 5, 2))
    for table in (layer.table_small, layer.table_large):
        table.copy_(torch.from_numpy(golden.normal("table", table.shape)))
    x, context, value = (
        torch.from_numpy(golden.normal(name, (2, *size, width)))
        for name, width in [("x", 16), ("context", 8), ("value", 16)]
    )
    parts = layer.attention(x, context)
    height, width = size if min(size) >= 7 else enlarged(*size, 7)
    assert parts[0].shape == (2, 2, height, width, 25)
    assert parts[1].shape == (2, 2, height, width, 49)
    for part in parts:
        torch.testing.assert_close(part.sum(-1), torch.ones_like(part[..., 0]))
    if (height, width) != size:
        return
    mixed = []
    for part, half, kernel in zip(parts, value.chunk(2, -1), (5, 7), strict=True):
        pixels = window_pixels(height, width, (kernel, kernel))
        windows = half.flatten(1, 2)[:, pixels].unflatten(-1, (2, 4))
        mixed.append(torch.einsum("bghws,bhwsgd->bhwgd", part, windows).flatten(3))
    assert relative_error(layer(x, context, value), torch.cat(mixed, -1)) < 1e-12


def test_sizes_of_small_maps_are_the_official_ones():
    for least in (5, 7, 9, 11, 13, 15, 17):
        for short in range(1, least):
            for long in range(short + 1, 300):
                expected = (least, int(least / short * long))
                assert enlarged(short, long, least) == expected
                assert enlarged(long, short, least) == expected[::-1]
            assert enlarged(short, short, least) == (least, least)


def test_bad_widths_and_kernels_are_named():
    for arguments, message in [
        ({"dim": 36, "num_heads": 2}, r"dim=36 must be a multiple of 4 \* num_heads=8"),
        ({"dim": 32, "kernel_size": 8}, "kernel_size=8 is none of"),
    ]:
        with pytest.raises(ValueError, match=message):
            ContMixBlock(**arguments)
    with pytest.raises(ValueError, match=r"dim=20 must be a multiple of 2 \* num_heads=8"):
        ContextMixing(20, 8, 7, 5, 4)
