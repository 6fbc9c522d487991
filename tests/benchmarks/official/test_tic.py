"""TiC on the official formulation of its attention beside ours: the same tensors and outputs."""

import pytest
import torch

from benchmarks.official import family, kind, pair
from benchmarks.official.tic import msa_conv
from tests.backbones.models import FAMILIES, gradients, relative_error, worst_gradient
from tests.support import golden

SMALL = FAMILIES["tic"]
SIZES = [(61, 90), (56, 56)]
OPTIONS = [
    {},
    {"kernel_size": 3, "dilation": (2, 1, 1, 1), "pool": "avg", "shift": "block"},
    {"attn_proj": False, "shift": "none"},
]


@pytest.mark.parametrize("options", OPTIONS, ids=["default", "dilated", "not projected"])
def test_outputs_and_gradients_are_equal(options):
    ours, theirs = pair(SMALL.name, **{"num_classes": 10, **SMALL.args, **options})
    assert (family(ours), kind(ours), theirs.training) == ("tic", "official", False)
    weights, values = golden.fill_model(ours), []
    for model in (theirs, ours):
        model.double().load_state_dict(weights)
        images = [golden.image((2, 3, *size)).requires_grad_() for size in SIZES]
        logits = [model(x) for x in images]
        grads = torch.autograd.grad(sum((y * y).sum() for y in logits), images)
        values.append([*logits, *grads])
    for value, expected in zip(*values, strict=True):
        assert relative_error(value, expected) < 1e-10
    found, expected = (gradients(model, golden.image((2, 3, 40, 41))) for model in (theirs, ours))
    assert set(found) == set(expected)
    assert worst_gradient({name: found[name] for name in expected}, expected)[0] < 1e-10


def test_attention_is_in_float32():
    _, theirs = pair(SMALL.name, **{"num_classes": 10, **SMALL.args}, dtype=torch.bfloat16)
    seen = []
    attention = theirs.stages[0].blocks[1].attn
    attention._attend = lambda *parts: seen.append(parts) or parts[0]
    assert theirs(torch.randn(1, 3, 64, 64).bfloat16()).dtype == torch.bfloat16
    # four heads in the four directions, or as many as there are
    assert len(seen) == min(4, attention.heads)
    assert all(part.dtype == torch.float32 for parts in seen for part in parts)


@pytest.mark.parametrize("case", golden.load("op_msa_conv")["cases"], ids=lambda c: c["name"])
def test_attention_equals_the_official_operator(case):
    """The files hold outputs of the official C++ code."""
    sizes, dilation = case["shape"], case["shape"]["dilation"]
    shape = [sizes[key] for key in "BCHW"]
    q, k, v = (
        (case["scale_inputs"] * torch.from_numpy(golden.normal(f"op.{key}", shape)))
        .unflatten(1, (sizes["heads"], -1))
        .flatten(0, 1)
        for key in "qkv"
    )
    out = msa_conv(q, k, v, tuple(sizes["kernel"]), (dilation, dilation))
    golden.check_summary(out.view(shape), case["out"], 1e-10)


def test_a_whole_model_on_the_meta_device():
    _, theirs = pair("tic_tiny", device="meta")
    assert theirs(torch.empty(1, 3, 96, 130, device="meta")).shape == (1, 1000)
