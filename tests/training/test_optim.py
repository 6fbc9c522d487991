"""The optimizer: what timm makes of the settings, and PyTorch's fused update where it has one."""

import pytest
import torch

from backbones.training.optim import OptimConfig, make_optimizer


@pytest.mark.parametrize("name", ["adamw", "sgd"])
def test_a_fused_update_equals_the_loop_of_small_ones(name):
    steps = []
    for fused in (True, False):
        torch.manual_seed(0)
        layer = torch.nn.Linear(64, 64)
        optimizer = make_optimizer(OptimConfig(name=name), layer)
        assert optimizer.param_groups[0]["fused"]
        for group in optimizer.param_groups:
            group["fused"] = fused
        for _ in range(3):
            layer(torch.randn(8, 64)).square().sum().backward()
            optimizer.step()
        steps.append(layer.weight.detach())
    torch.testing.assert_close(*steps)


@pytest.mark.parametrize("name", ["lamb", "nadam", "adagrad"])
def test_optimizers_without_one_are_made_too(name):
    optimizer = make_optimizer(OptimConfig(name=name), torch.nn.Linear(2, 2))
    assert not optimizer.param_groups[0].get("fused")
