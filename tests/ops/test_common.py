"""When ops on a CPU compute at once, and the context without autocast."""

import pytest
import torch
from torch import Tensor
from torch.profiler import profile
from torch.utils.flop_counter import FlopCounterMode

from backbones.ops import (
    channel_attention,
    depthwise_conv,
    depthwise_conv_norm,
    partial_attention,
    window_attention,
)
from backbones.ops._common import outside_autocast, runs_at_once
from tests.backbones.models import relative_error


def convolve(x: Tensor) -> Tensor:
    """A depthwise convolution and its norm, of the first 16 channels."""
    return torch.cat(
        depthwise_conv_norm(x[..., :16], x[0, 0, 0, :9].expand(16, 9).reshape(16, 1, 3, 3))
    )


CALLS = {
    "window_attention": lambda x: window_attention(x, None, 2, (3, 3)),
    "depthwise_conv": lambda x: depthwise_conv(x, x[0, 0, 0, :9].expand(48, 9).view(48, 1, 3, 3)),
    "channel_attention": lambda x: channel_attention(x, 2),
    "partial_attention": lambda x: partial_attention(x, x, 8),
    "depthwise_conv_norm": convolve,
}


def events(function, x: Tensor) -> set[str]:
    with profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        function(x)
    return {event.key for event in profiler.key_averages()}


@pytest.mark.parametrize("op", CALLS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_at_once_is_the_same_without_the_op(op, dtype):
    torch.manual_seed(0)
    x = torch.randn(2, 5, 7, 48, dtype=dtype)
    expected = CALLS[op](x)
    with torch.no_grad():
        assert runs_at_once(x)
        value = CALLS[op](x)
        assert f"backbones::{op}" not in events(CALLS[op], x)
    assert value.dtype == expected.dtype and value.is_contiguous()
    assert relative_error(value, expected) < (1e-12 if dtype == torch.float64 else 1e-2)
    assert f"backbones::{op}" in events(CALLS[op], x)


@torch.no_grad()
def test_whoever_wants_to_see_the_op_sees_it():
    x = torch.randn(2, 5, 7, 48)
    with FlopCounterMode(display=False) as counter:
        channel_attention(x, 2)
    names = [str(op) for op in counter.get_flop_counts()["Global"]]
    assert names == ["backbones.channel_attention"]
    assert "backbones::partial_attention" in str(
        torch.jit.trace(CALLS["partial_attention"], x).graph
    )
    assert not runs_at_once(torch.nn.Parameter(x)) and not runs_at_once(x.to("meta"))
    with torch.enable_grad():
        assert not runs_at_once(x)


def test_no_autocast_inside():
    x = torch.randn(2, 2)
    with outside_autocast(x):
        assert (x @ x).dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        with outside_autocast(x):
            assert (x @ x).dtype == torch.float32
        assert (x @ x).dtype == torch.bfloat16
