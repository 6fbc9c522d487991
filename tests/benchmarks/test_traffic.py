"""Bytes counted on meta tensors, by hand where that is possible."""

import json

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from backbones import ops

pytest.importorskip("triton")

from benchmarks import traffic
from benchmarks._traffic import Moved, Traffic, kind_of

MAP = 2 * 8 * 14 * 14 * 64  # bytes of a map of 64 channels in bfloat16, batch 8


def map_of(channels: int, grad: bool = False) -> torch.Tensor:
    x = torch.empty(8, 14, 14, channels, dtype=torch.bfloat16, device="meta")
    return x.requires_grad_(grad)


def moved(*records: Moved, backward: bool = False) -> int:
    return sum(m.bytes for m in records if m.backward == backward)


def test_inputs_and_outputs_count_and_views_do_not():
    x = map_of(64)
    with Traffic() as traffic:
        y = x.view(8, 196, 64).transpose(1, 2) + 1
        y.zero_()
        y.copy_(y)
    assert [(m.name, m.bytes) for m in traffic.moved] == [
        ("aten::add", 2 * MAP),
        ("aten::zero_", MAP),
        ("aten::copy_", 2 * MAP),
    ]


def test_expanded_tensors_count_once():
    x = torch.empty(1, 14, 14, 64, dtype=torch.bfloat16, device="meta").expand(8, -1, -1, -1)
    with Traffic() as traffic:
        x.contiguous()
    assert moved(*traffic.moved) == MAP // 8 + MAP


def test_attention_of_pytorch_is_one_kernel():
    q, k, v = (map_of(64, grad=True).view(8, 196, 2, 32).transpose(1, 2) for _ in range(3))
    with Traffic() as traffic:
        y = F.scaled_dot_product_attention(q, k, v)
        y.backward(torch.empty_like(y))
    forward, backward = (
        [m for m in traffic.moved if m.kind == "attention core" and m.backward == part]
        for part in (False, True)
    )
    lse = 4 * 8 * 2 * 196
    # the states of a generator take some bytes too
    assert len(forward) == 1 and 0 <= forward[0].bytes - (4 * MAP + lse) < 100
    assert len(backward) == 1 and 0 <= backward[0].bytes - (8 * MAP + lse) < 100


def test_ops_of_ours_move_what_their_kernels_do():
    qkv = map_of(192, grad=True)
    with Traffic() as traffic:
        y = ops.window_attention(qkv, None, 2, (7, 7))
        y.backward(torch.empty_like(y))
    assert moved(*traffic.moved) == 4 * MAP
    # queries, keys, values and the gradient in, three gradients out
    core = [m for m in traffic.moved if m.name.endswith("window_attention_backward")]
    assert moved(*core, backward=True) == 7 * MAP
    assert core[0].kernels == 1


def test_kernels_that_go_through_a_map_twice_count_twice():
    qkv = map_of(192, grad=True)
    with Traffic() as channel:
        y = ops.channel_attention(qkv, 2)
        y.backward(torch.empty_like(y))
    core = [m for m in channel.moved if m.kind == "attention core"]
    weights = 4 * 8 * 2 * 32 * 32
    assert moved(*core) == 4 * MAP + weights
    # the gradient is summed against the values before it can be applied
    assert moved(*core, backward=True) == 8 * MAP + weights
    # the queries are averaged before the keys can be weighted
    with torch.no_grad(), Traffic() as rank:
        table = torch.empty(2, 14, 8, device="meta")
        ops.rank_augmented_attention(map_of(256), table, 2, None, True)
    states = 2 * 4 * 8 * 2 * 34 * 32
    assert 6 * MAP < rank.moved[0].bytes < 6 * MAP + 2 * states


def test_depthwise_convolutions_count_by_either_implementation():
    x, weight = map_of(64), torch.empty(64, 1, 3, 3, dtype=torch.bfloat16, device="meta")
    counts = []
    for ours in (True, False):
        with torch.no_grad(), Traffic(depthwise=ours) as traffic:
            ops.depthwise_conv(x, weight, residual=True, act="gelu")
        counts.append(moved(*traffic.moved) // MAP)
    # in and out; then a convolution, the residual and the activation one after the other
    assert counts == [2, 7]


def test_gradients_of_convolutions_are_a_kernel_each():
    x = map_of(64, grad=True).permute(0, 3, 1, 2)
    weight = torch.empty(64, 64, 1, 1, dtype=torch.bfloat16, device="meta", requires_grad=True)
    with Traffic() as traffic:
        y = F.conv2d(x, weight)
        y.backward(torch.empty_like(y))
    (back,) = (m for m in traffic.moved if m.name == "aten::convolution_backward")
    # as a product of matrices and its gradients would
    assert (back.kernels, back.bytes) == (2, 4 * MAP + 2 * 2 * 64 * 64)
    assert back.projection


class _Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.attn = nn.Linear(64, 64), nn.Linear(64, 64)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.attn(self.first(x)).roll(1, 1)


def test_backward_passes_belong_to_the_module_that_noted_them():
    block = _Block().to(device="meta", dtype=torch.bfloat16)
    with Traffic(block) as traffic:
        y = block(map_of(64, grad=True))
        y.backward(torch.empty_like(y))
    paths = [(m.name, m.path, m.backward) for m in traffic.moved if m.kind == "matrix product"]
    assert paths == [
        ("aten::addmm", "first", False),
        ("aten::addmm", "attn", False),
        *[("aten::mm", "attn", True)] * 2,
        *[("aten::mm", "first", True)] * 2,
    ]
    assert {m.path for m in traffic.moved if m.name == "aten::roll"} == {""}
    assert all(m.projection for m in traffic.moved if m.kind == "matrix product")


def test_hooks_are_gone_afterwards():
    block = _Block().to(device="meta", dtype=torch.bfloat16)
    with Traffic(block) as traffic:
        pass
    block(map_of(64))
    assert traffic.moved == []


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("backbones::linear_attention_backward", "attention core"),
        ("backbones::depthwise_conv_norm", "convolution"),
        ("aten::convolution_backward", "convolution"),
        ("aten::bmm", "matrix product"),
        ("aten::native_layer_norm_backward", "norm"),
        ("aten::scatter_add", "gather"),
        ("aten::_softmax", "reduction"),
        ("aten::clone", "copy"),
        ("aten::gelu", "elementwise"),
    ],
)
def test_kinds(name, kind):
    assert kind_of(name) == kind


def test_a_model_takes_our_kernels_and_attends_in_few_bytes():
    ours, peer = (m.bfloat16() for m in traffic.pair("davit_tiny", device="meta"))
    part = traffic.ATTENTION["davit"]
    found = traffic.count(ours, (2, 64, 64), training=True)
    names = {m.name for m in found}
    assert "backbones::window_attention_backward" in names
    # the reference path would attend with these
    assert not names & {"aten::bmm", "aten::_softmax", "aten::im2col", "aten::gather"}
    row = {"model": "davit_tiny", "image": [64, 64], "batch": 2, "mode": "training"}
    row["ours"] = traffic.summary(found, part)
    row["timm"] = traffic.summary(traffic.count(peer, (2, 64, 64), training=True), part)
    row["ours"]["plain"] = row["ours"]["total"]
    assert traffic.ratio(row, "attention without projections") < traffic.ratio(row, "total") < 1
    assert traffic.too_much([row]) == []
    row["timm"]["attention without projections"] = [1, 0.1]
    assert len(traffic.too_much([row])) == 1
    assert "timm" in traffic.table([row], kinds=True)


def test_what_is_committed_covers_all_models_and_is_within_the_target():
    rows = json.loads(traffic.RESULTS.read_text())["rows"]
    assert {(row["model"], row["batch"], row["mode"]) for row in rows} == {
        (model, batch, mode)
        for model in traffic.MODELS
        for batch in (128, 2)
        for mode in ("forward", "training")
    }
    # at the size of its training SHViT attends to 16 tokens: what is left are maps to and from it
    assert all(line.startswith("shvit_s") for line in traffic.too_much(rows))
