# pyright: basic
"""The functions of Triton kernels: their text begins with what follows; nobody imports this."""

import triton
import triton.language as tl


@triton.jit
def _total(at, n, SUMS: tl.constexpr):
    i = tl.arange(0, SUMS)
    a = tl.zeros([SUMS], tl.float64)
    for lo in range(0, n, SUMS):
        a += tl.load(at + lo + i, mask=lo + i < n, other=0.0)
    return tl.sum(a)


@triton.jit
def _peak(a):
    """The largest, or NaN if one is."""
    b = tl.max(tl.where(a != a, float("-inf"), a))
    return tl.where(tl.max((a != a).to(tl.int32)) != 0, float("nan"), b)


@triton.jit
def _highest(at, n, SUMS: tl.constexpr):
    i = tl.arange(0, SUMS)
    a = tl.full([SUMS], float("-inf"), tl.float64)
    for lo in range(0, n, SUMS):
        b = tl.load(at + lo + i, mask=lo + i < n, other=float("-inf"))
        a = tl.where((b > a) | (b != b), b, a)
    return _peak(a)


@triton.jit
def _power(a, b):
    """In float64, as the logarithm is multiplied by what may be large."""
    c = tl.exp(b * tl.log(tl.abs(a).to(tl.float64)))
    c = tl.where(b == 0, 1.0, c)
    even = tl.where(tl.floor(b * 0.5) == b * 0.5, c, -c)
    broken = tl.where(a == float("-inf"), c, float("nan"))
    signed = tl.where(tl.floor(b) == b, even, broken)
    return tl.where(a < 0, signed, c)


@triton.jit
def _tanh(a):
    """By its series near 0, where 1 - exp(-2a) has lost digits."""
    b = tl.abs(a)
    q = b * b
    e = tl.exp(-2.0 * b)
    c = (1.0 - e) / (1.0 + e)
    near = 0.3 if a.dtype == tl.float32 else 0.03
    series = 1 + q * (-1 / 3 + q * (2 / 15 + q * (-17 / 315 + q * (62 / 2835))))
    c = tl.where(b < near, b * series, c)
    return tl.where(a < 0, -c, c)


@triton.jit
def _wide(a):
    """The float32 of a bfloat16's bits."""
    return (a.to(tl.uint32) << 16).to(tl.float32, bitcast=True)


@triton.jit
def _nearest(a):
    """The bits of the nearest bfloat16."""
    bits = a.to(tl.uint32, bitcast=True)
    return tl.where(a != a, 0x7FC0, (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).to(tl.uint16)


@triton.jit
def _stochastic(a, at, STEP, PLACE, K0, K1, BLOCK: tl.constexpr):
    """16 random bits are added below what is kept; four entries share a draw of Philox."""
    block = (at // 4 + tl.arange(0, BLOCK // 4)).to(tl.uint64)
    low, high = (block & 0xFFFFFFFF).to(tl.uint32), (block >> 32).to(tl.uint32)
    p, q, r, s = tl.philox_impl(low, high, STEP, PLACE, K0, K1)
    draw = tl.interleave(tl.interleave(p, r), tl.interleave(q, s)) & 0xFFFF
    bits = a.to(tl.uint32, bitcast=True) + draw
    return tl.where(a != a, 0x7FC0, bits >> 16).to(tl.uint16)


@triton.jit
def _joined(high, low):
    """The float32 of a bfloat16, half away from zero, and the 16 bits that are left."""
    below = low.to(tl.uint32)
    above = high.to(tl.uint32)
    both = (above << 16) + below - ((below >> 15) << 16)
    # Weights that somebody else has written since have no low half.
    ours = ((both + 0x8000) >> 16 == above) & (both >> 31 == above >> 15)
    bits = tl.where(ours, both, above << 16).to(tl.uint32)
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def _bits(a):
    return tl.where(a != a, 0x7FC00000, a.to(tl.uint32, bitcast=True)).to(tl.uint32)
