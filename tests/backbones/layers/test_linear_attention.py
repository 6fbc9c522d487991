"""The linear attention of L2ViT and its block, outside of the model."""

import pytest
import torch
from torch import nn

from backbones.layers import LinearAttention, LinearAttentionBlock
from tests.backbones.models import deterministic, relative_error
from tests.support import golden


@torch.no_grad()
def test_attention_is_what_the_paper_defines():
    layer = deterministic(LinearAttention(24, num_heads=3))
    x = golden.image((2, 5, 7, 24))
    q, k, v = layer.qkv(x).reshape(2, 35, 3, 3, 8).permute(2, 0, 3, 1, 4)
    q, k = q.relu(), k.relu()
    weights = q @ k.mT
    denominators = weights.sum(-1, keepdim=True)
    # some are below the bound, some are not
    assert 0 < (denominators < 100).double().mean() < 1
    out = weights @ v / denominators.clamp(min=100) * layer.temperature
    out = layer.proj(out.transpose(1, 2).reshape(2, 5, 7, 24))
    assert relative_error(layer(x), out) < 1e-12


def test_heads_that_do_not_fit_are_named():
    with pytest.raises(ValueError, match="dim=24 must be a multiple of num_heads=5"):
        LinearAttention(24, 5)


def composed(block: LinearAttentionBlock, x: torch.Tensor) -> torch.Tensor:
    """A block step by step, from modules of PyTorch only but for the attention."""
    local = nn.Sequential(block.local.conv1, nn.GELU(), block.local.bn, block.local.conv2)
    x = x + block.cpe1.proj(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
    x = x + block.attn(block.norm1(x))
    x = x + local(block.local_norm(x).permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
    return x + block.mlp(block.norm2(x))


@pytest.mark.parametrize("drop_path", [0.0, 1e-9])
@pytest.mark.parametrize("training", [False, True])
@torch.no_grad()
def test_block_is_its_parts(drop_path, training):
    block = deterministic(LinearAttentionBlock(16, 2, drop_path)).train(training)
    x = golden.image((2, 9, 5, 16))
    assert relative_error(block(x), composed(block, x)) < 1e-7


@torch.no_grad()
def test_training_drops_every_branch():
    block = deterministic(LinearAttentionBlock(16, 2, drop_path=1 - 1e-9))
    x = golden.image((2, 9, 5, 16))
    norm = block.norm1
    encoded, _ = block.cpe1(x, norm.weight, norm.bias, norm.eps)
    assert not torch.equal(block(x), encoded)
    assert torch.equal(block.train()(x), encoded)


@pytest.mark.parametrize("training", [False, True])
def test_a_float32_stream_stays_so_under_autocast(training):
    block, x = LinearAttentionBlock(16, 2).train(training), torch.randn(2, 9, 5, 16)
    with torch.autocast("cpu", torch.bfloat16):
        out = block(x)
    assert out.dtype == torch.float32
    # what the stream had of digits below bfloat16 is not lost
    assert not torch.equal(out, out.bfloat16().float())
    out.sum().backward()
    assert all(p.grad is not None for n, p in block.named_parameters())
    assert block.bfloat16()(x.bfloat16()).dtype == torch.bfloat16
