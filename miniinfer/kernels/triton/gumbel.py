"""What a draw is made of: counter-based random bits, Gumbel noise, the score that a draw maximizes, and how the best of many programs is found.

Random bits equal the reference's (kernels/reference.py `uniform`). Knows nothing of filters.
"""

from __future__ import annotations

import triton
import triton.language as tl

FAST_LOG = tl.constexpr(not triton.knobs.runtime.interpret)
LARGEST = tl.constexpr(3.4028234e38)


@triton.jit
def _mix(x):
    """murmur3's 32-bit finalizer."""
    x = (x ^ (x >> 16)) * tl.full([], 0x85EBCA6B, tl.uint32)
    x = (x ^ (x >> 13)) * tl.full([], 0xC2B2AE35, tl.uint32)
    return x ^ (x >> 16)


@triton.jit
def row_key(seed, position):
    """The key of one token's noise."""
    low = (seed & 0xFFFFFFFF).to(tl.uint32)
    high = ((seed >> 32) & 0xFFFFFFFF).to(tl.uint32)
    return _mix(_mix(_mix(low) ^ high) ^ position.to(tl.uint32))


@triton.jit
def _minus_log(x):
    """-ln(x), on a GPU by its own logarithm: absolute error 2e-7."""
    if FAST_LOG:
        return tl.extra.cuda.libdevice.fast_log2f(x) * -0.6931471805599453
    return -tl.log(x)


@triton.jit
def _gumbel(key, ids):
    """-log(-log(u)) within about 1e-6. Two calls of tl.log would be half of a draw's instructions."""
    bits = _mix(_mix((ids.to(tl.uint32) * tl.full([], 0x9E3779B1, tl.uint32)) ^ key) + key)
    # 1 - u, where u is (bits >> 9) + 0.5 over 2^23: the bits as the mantissa of a number from 1 to 2, and two exact differences.
    rest = (2.0 - ((bits >> 9) | tl.full([], 0x3F800000, tl.uint32)).to(tl.float32, bitcast=True)) - 5.9604644775390625e-08
    # Near u = 1, where large noise comes from, the GPU's logarithm has too few digits: there its series in 1 - u.
    series = 0.16666666666 + rest * 0.14285714286
    series = 0.25 + rest * (0.2 + rest * series)
    series = rest * (1.0 + rest * (0.5 + rest * (0.33333333333 + rest * series)))
    return _minus_log(tl.where(rest < 0.125, series, _minus_log(1.0 - rest)))


@triton.jit
def score(value, ids, heat, key):
    """What a draw maximizes: value / heat plus noise; the value itself where heat is 0."""
    if heat > 0:
        value = value * (1.0 / heat) + _gumbel(key, ids)
    return value


@triton.jit
def order(x):
    """fp32 to uint32 such that integers compare as the floats do; -0 equals 0."""
    bits = (x + 0.0).to(tl.uint32, bitcast=True)
    sign = tl.full([], 0x80000000, tl.uint32)
    return bits ^ tl.where(bits >= sign, tl.full([], 0xFFFFFFFF, tl.uint32), sign)


@triton.jit
def unorder(bits):
    """The float of an order."""
    sign = tl.full([], 0x80000000, tl.uint32)
    return (bits ^ tl.where(bits >= sign, sign, tl.full([], 0xFFFFFFFF, tl.uint32))).to(tl.float32, bitcast=True)


@triton.jit
def pack(value, index):
    """An int64 that is the larger for the larger value, of equal ones for the lower index."""
    signed = (order(value) ^ tl.full([], 0x80000000, tl.uint32)).to(tl.int32, bitcast=True)
    return (signed.to(tl.int64) << 32) | (-1 - index).to(tl.uint32, bitcast=True).to(tl.int64)


@triton.jit
def packed_index(packed):
    return -1 - (packed & 0xFFFFFFFF).to(tl.uint32).to(tl.int32, bitcast=True)


@triton.jit
def packed_value(packed):
    return unorder((packed >> 32).to(tl.int32).to(tl.uint32, bitcast=True) ^ tl.full([], 0x80000000, tl.uint32))


@triton.jit
def token_of(packed):
    """The index, or -1 if the score is not finite, for then the logits were not."""
    return tl.where(tl.abs(packed_value(packed)) < 1e38, packed_index(packed), -1)


@triton.jit
def nothing():
    """Index 0 with -inf: what every other entry of a row beats."""
    return pack(tl.full([], -float("inf"), tl.float32), tl.full([], 0, tl.int32))


@triton.jit
def best_of(value, ids, heat, key, vocab):
    """The packed best of a block. A maximum passes over NaN, unless there is nothing else."""
    scores = score(value, ids, heat, key)
    top = tl.max(scores, 0)
    top = tl.where(top == top, top, -float("inf"))
    return pack(top, tl.min(tl.where(scores == top, ids, vocab - 1), 0))


@triton.jit
def best_part(best, parts, PARTS: tl.constexpr):
    """The best of what a row's programs packed."""
    each = tl.arange(0, PARTS)
    return tl.max(tl.load(best + each, mask=each < parts, other=-0x7FFFFFFFFFFFFFFF, cache_modifier=".cg"), 0)


@triton.jit
def last_arrival(arrivals, parts):
    """Whether the calling program is the last of `parts` to get here. It then sees what all of them stored before, and the counter is 0 again."""
    tl.debug_barrier()  # the stores of all of this program's threads
    last = tl.atomic_add(arrivals, 1, sem="acq_rel") == parts - 1
    if last:
        tl.store(arrivals, 0)
    return last
