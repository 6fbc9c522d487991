"""Models made without memory and filled later, as transformers and FSDP do."""

import pytest
import torch
from timm.models._manipulate import reinit_non_persistent_buffers
from torch import Tensor, nn

import backbones  # noqa: F401
from tests.backbones.models import VARIANTS, deterministic
from tests.support import golden


def rubbish(value: Tensor) -> Tensor:
    """A tensor in memory, of what may have been there before."""
    return torch.full_like(value, 77, device="cpu")


def give_memory_by_tensor(model: nn.Module) -> None:
    """Replace one tensor after the other, as transformers does."""
    for module in model.modules():
        for name, value in list(module.named_parameters(recurse=False)):
            setattr(module, name, nn.Parameter(rubbish(value)))
        for name, value in list(module.named_buffers(recurse=False)):
            module._buffers[name] = rubbish(value)


def give_memory_at_once(model: nn.Module) -> None:
    model.to_empty(device="cpu")


@pytest.mark.parametrize("give_memory", [give_memory_by_tensor, give_memory_at_once])
@pytest.mark.parametrize("name", VARIANTS)
@torch.no_grad()
def test_weights_and_what_is_derived_make_the_model(name, give_memory):
    expected = deterministic(VARIANTS[name].create())
    model = VARIANTS[name].create(device="meta", dtype=torch.float64).eval()
    give_memory(model)
    assert not any(value.is_meta for value in (*model.parameters(), *model.buffers()))
    model.load_state_dict(expected.state_dict())
    reinit_non_persistent_buffers(model)
    x = golden.image((1, 3, 64, 96))
    assert torch.equal(model(x), expected(x))
