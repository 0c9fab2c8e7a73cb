"""Activations and their derivatives inside a kernel, in float32."""

import triton
import triton.language as tl


@triton.jit
def sigmoid(x):
    return 1 / (1 + tl.exp(-x))


@triton.jit
def tanh(x):
    # Lambert's continued fraction where 1 - 2 / (e^2x + 1) would cancel; gates start at 0.
    square = x * x
    top = x * (135135 + square * (17325 + square * (378 + square)))
    fraction = top / (135135 + square * (62370 + square * (3150 + square * 28)))
    return tl.where(square < 1, fraction, 1 - 2 / (tl.exp(2 * x) + 1))


@triton.jit
def activate(x, ACTIVATION: tl.constexpr):
    """``activation(x)``; a NaN stays one, as in PyTorch."""
    if ACTIVATION == "relu":
        x = tl.where(x <= 0, 0.0, x)
    elif ACTIVATION == "gelu":
        x = 0.5 * x * (1 + tl.math.erf(x * 0.7071067811865476))
    elif ACTIVATION == "silu":
        x = x * sigmoid(x)
    return x


@triton.jit
def derivative(x, ACTIVATION: tl.constexpr):
    """``d activation(x) / dx``."""
    if ACTIVATION == "relu":
        slope = tl.where(x <= 0, 0.0, 1.0)
    elif ACTIVATION == "gelu":
        density = 0.3989422804014327 * tl.exp(-0.5 * x * x)
        slope = 0.5 * (1 + tl.math.erf(x * 0.7071067811865476)) + x * density
    elif ACTIVATION == "silu":
        s = sigmoid(x)
        slope = s * (1 + x * (1 - s))
    else:
        slope = tl.full(x.shape, 1.0, tl.float32)
    return slope
