"""Activations of tiles in float32, and their derivatives."""

# mypy: disable-error-code="no-untyped-def"

import triton
import triton.language as tl

# constants stand right of tensors: the interpreter wants it so
# sqrt(1/2), sqrt(1/(2 pi)), sqrt(8/pi) and the cubic term of the tanh form
_SQRT_HALF = tl.constexpr(0.7071067811865476)
_DENSITY = tl.constexpr(0.3989422804014327)
_TANH = tl.constexpr(1.5957691216057308)
_CUBIC = tl.constexpr(0.044715)


@triton.jit
def activate(x, ACT: tl.constexpr):
    """Apply the activation called `ACT`; "" is none."""
    if ACT == "relu":
        y = tl.where(x > 0, x, 0.0)
    elif ACT == "silu":
        y = x * tl.sigmoid(x)
    elif ACT == "gelu":
        y = 0.5 * x * (1 + tl.erf(x * _SQRT_HALF))
    elif ACT == "gelu_tanh":
        y = x * tl.sigmoid(x * _TANH * (1 + x * x * _CUBIC))
    else:
        tl.static_assert(ACT == "")
        y = x
    return y


@triton.jit
def derivative(x, ACT: tl.constexpr):
    """Derivative of `activate` at x; call it for an activation only."""
    if ACT == "relu":
        slope = tl.where(x > 0, 1.0, 0.0)
    elif ACT == "silu":
        gate = tl.sigmoid(x)
        slope = gate * (1 + x * (1 - gate))
    elif ACT == "gelu":
        slope = 0.5 * (1 + tl.erf(x * _SQRT_HALF)) + x * _DENSITY * tl.exp(-0.5 * x * x)
    else:
        tl.static_assert(ACT == "gelu_tanh")
        gate = tl.sigmoid(x * _TANH * (1 + x * x * _CUBIC))
        slope = gate + x * gate * (1 - gate) * _TANH * (1 + 3 * (x * x * _CUBIC))
    return slope
