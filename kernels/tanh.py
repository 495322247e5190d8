"""tanh inside a Triton kernel, with its digits kept near 0.

Triton has no tanh of its own. 2 * sigmoid(2 x) - 1 does far from 0; near it that difference of two numbers near 1 is
left with few digits: a softcapped logit was three times as wrong as PyTorch's. libdevice has one, but for CUDA alone.
"""

from fsdp_qlora.kernels.device import tl, triton


@triton.jit
def tanh(x):
    """tanh of float32, a few units of the last place off. Infinities give 1 and -1, NaN gives NaN.

    Below 0.6 x + x s p(s), s = x^2, with p fitted to (tanh(x) / x - 1) / s at Chebyshev's nodes."""
    s = x * x
    p = -0.006276391095773781
    p = p * s + 0.021116216796175608
    p = p * s - 0.05387513895964496
    p = p * s + 0.13332924014117611
    p = p * s - 0.3333333043155161
    far = 1 - 2 / (tl.exp(2 * tl.abs(x)) + 1)
    return tl.where(s < 0.36, x + x * (s * p), tl.where(x < 0, -far, far))
