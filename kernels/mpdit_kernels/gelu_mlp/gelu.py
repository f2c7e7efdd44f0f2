"""Device functions: tanh-GELU as a product of its argument and a sigmoid.

(1 + tanh(z / 2)) / 2 is sigmoid(z). From exp(-|z|) neither it nor its derivative overflows or is a difference of near
equals: taken as s - s^2, the derivative would cost several times PyTorch's error once |h| reaches 2.
"""

# mypy: disable-error-code="assignment,no-untyped-def"

import triton
import triton.language as tl


@triton.jit
def gate(h):
    """(s, its derivative) where gelu(h) = h * s; the derivative is that of the sigmoid, s (1 - s)."""
    z = 1.5957691216057308 * h * (1 + 0.044715 * h * h)  # 2 sqrt(2 / pi)
    e = tl.exp(-tl.abs(z))
    larger = 1 / (1 + e)
    smaller = e * larger
    return tl.where(z >= 0, larger, smaller), larger * smaller


@triton.jit
def slope(h, s, ds):
    """The derivative of h * s; h meets ds first, so that large |h| give 0 and not 0 times infinity."""
    return s + h * ds * (1.5957691216057308 + 0.2140644488 * h * h)  # 3 * 0.044715 times the former
