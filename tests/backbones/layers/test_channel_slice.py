"""A slice whose gradient is added in place."""

import pytest
import torch

from backbones import ops
from backbones.layers.channel_slice import with_slice
from tests.support import golden


def packed() -> torch.Tensor:
    return torch.from_numpy(golden.normal("qkv", (2, 6, 5, 24))).requires_grad_()


def attend(qkv: torch.Tensor, slices) -> torch.Tensor:
    whole, v = slices(qkv)
    return ops.window_attention(whole, None, 2, (3, 3)) + v.sin()


def plain(qkv: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return qkv, qkv[..., 16:]


def sliced(qkv: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return with_slice(qkv, 3, 16, 8)


def test_gradients_are_those_of_a_plain_slice():
    weights = torch.from_numpy(golden.normal("weights", (2, 6, 5, 8)))
    grads = []
    for slices in (plain, sliced):
        qkv = packed()
        (attend(qkv, slices) * weights).sum().backward()
        grads.append(qkv.grad)
    assert torch.equal(*grads)


def test_one_of_the_two_may_go_unused():
    for part, slices in ((0, sliced), (1, sliced)):
        qkv = packed()
        (slices(qkv)[part] * 2).sum().backward()
        assert qkv.grad.sum() == (2 * qkv.numel() if part == 0 else 2 * qkv.numel() / 3)


def test_no_map_is_padded_and_added():
    qkv = packed()
    with torch.profiler.profile() as profile:
        attend(qkv, sliced).sum().backward()
    assert "aten::slice_backward" not in {event.name for event in profile.events()}


@pytest.mark.parametrize("kind", ["script", "trace", "fx"])
def test_graphs_take_a_plain_slice(kind):
    def call(qkv: torch.Tensor) -> torch.Tensor:
        whole, v = with_slice(qkv, 3, 16, 8)
        return whole.sum(-1) + v.sum(-1)

    qkv = packed()
    graph = {
        "script": lambda: torch.jit.script(call),
        "trace": lambda: torch.jit.trace(call, qkv),
        "fx": lambda: torch.fx.symbolic_trace(call),
    }[kind]()
    assert torch.equal(graph(qkv), call(qkv))


def test_compiles_whole():
    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")
    grads = []
    for call in (attend, compiled):
        qkv = packed()
        call(qkv, sliced).sum().backward()
        grads.append(qkv.grad)
    assert (grads[0] - grads[1]).abs().max() < 1e-12
