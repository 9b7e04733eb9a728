// Vectors as wide as the target's registers, bf16, exp and log, scratch memory. Knows nothing of models.
//
// Vectors are the compiler's own (vector_size), so that one source serves AVX-512, AVX2, NEON and plain scalar code.

#pragma once

#include <omp.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <utility>
#include <vector>
#if defined(__AVX512BF16__) && !defined(MINIINFER_EMULATE_BF16_DOT)
#include <immintrin.h>
#endif

namespace {

// ------------------------------------------------------------------------------------------------------------ vectors

#if defined(__AVX512F__)
constexpr int W = 16;  // fp32 lanes
constexpr int MAX_TILE = 12;  // token rows of a register tile, times two vectors of columns: 24 accumulators of 32 registers
#elif defined(__AVX__)
constexpr int W = 8;
constexpr int MAX_TILE = 6;
#else
constexpr int W = 4;
constexpr int MAX_TILE = 6;
#endif
constexpr int PANEL = 2 * W;  // columns of a register tile

typedef float vf __attribute__((vector_size(4 * W)));
typedef uint32_t vu __attribute__((vector_size(4 * W)));
typedef int32_t vi __attribute__((vector_size(4 * W)));
typedef uint16_t vh __attribute__((vector_size(2 * W)));

struct bf16 {
    uint16_t bits;
};

template <class V>
inline V load(const void* p) {
    V v;
    std::memcpy(&v, p, sizeof v);
    return v;
}
template <class V>
inline void store(void* p, V v) {
    std::memcpy(p, &v, sizeof v);
}
inline vf splat(float x) { return x - vf{}; }  // x + 0 would turn -0 into 0, and cost an addition
inline vf select(vi mask, vf a, vf b) { return (vf)(((vi)a & mask) | ((vi)b & ~mask)); }
inline vf vmax(vf a, vf b) { return a > b ? a : b; }

inline float widen(bf16 x) {
    uint32_t u = (uint32_t)x.bits << 16;
    float f;
    std::memcpy(&f, &u, 4);
    return f;
}
inline float widen(float x) { return x; }
inline bf16 narrow_bf16(float f) {  // round to nearest even; a NaN stays one
    uint32_t u;
    std::memcpy(&u, &f, 4);
    if (f != f) return {(uint16_t)((u >> 16) | 0x40)};
    return {(uint16_t)((u + 0x7FFF + ((u >> 16) & 1)) >> 16)};
}
template <class E>
inline E narrow(float f);
template <>
inline bf16 narrow<bf16>(float f) {
    return narrow_bf16(f);
}
template <>
inline float narrow<float>(float f) {
    return f;
}

// W elements in natural order.
inline vf load_wide(const bf16* p) { return (vf)(__builtin_convertvector(load<vh>(p), vu) << 16); }
inline vf load_wide(const float* p) { return load<vf>(p); }
inline void store_narrow(bf16* p, vf v) {
    vu u = (vu)v;
    vu rounded = (u + 0x7FFF + ((u >> 16) & 1)) >> 16;
    vu nan = (u >> 16) | 0x40;
    vi isnan = (vi)(v != v);
    store(p, __builtin_convertvector((rounded & (vu)~isnan) | (nan & (vu)isnan), vh));
}
inline void store_narrow(float* p, vf v) { store(p, v); }
// 2 W elements as two vectors, in whatever order is cheapest: even and odd lanes for bf16, natural for fp32.
template <int Half>
inline vf load_half(const bf16* p) {
    vu u = load<vu>(p);
    return (vf)(Half ? u & 0xFFFF0000u : u << 16);
}
template <int Half>
inline vf load_half(const float* p) {
    return load<vf>(p + Half * W);
}
template <class E>
constexpr int place(int i) {  // where natural element i of 2 W stands in that order
    return sizeof(E) == 2 ? (i & 1) * W + (i >> 1) : i;
}

template <int... I>
inline vf rotate_by(vf v, int n, std::integer_sequence<int, I...>) {
    vi index = {((I + n) % W)...};
    return __builtin_shuffle(v, index);
}
inline float sum(vf v) {
#pragma GCC unroll 4
    for (int n = W / 2; n; n /= 2) v += rotate_by(v, n, std::make_integer_sequence<int, W>());
    return v[0];
}
inline float largest(vf v) {
    float m = v[0];
    for (int i = 1; i < W; i++) m = std::max(m, v[i]);
    return m;
}

// Whole rows, of any length.
template <class E>
inline void widen_row(const E* x, float* out, long n) {
    long i = 0;
    for (; i + W <= n; i += W) store(out + i, load_wide(x + i));
    for (; i < n; i++) out[i] = widen(x[i]);
}
template <class E>
inline void narrow_row(const float* x, E* out, long n) {
    long i = 0;
    for (; i + W <= n; i += W) store_narrow(out + i, load<vf>(x + i));
    for (; i < n; i++) out[i] = narrow<E>(x[i]);
}

// exp(x); 0 below -87, exp(88) above 88 (Cody & Waite's reduction, minimax polynomial of degree 6).
inline vf vexp(vf x) {
    vi tiny = (vi)(x < -87.0f);
    x = select(tiny, splat(0), x > 88.0f ? splat(88.0f) : x);
    vf n = x * 1.44269504f + 12582912.0f;  // 1.5 * 2^23: the sum's low bits are the rounded integer
    vi e = ((vi)n - 0x4B400000) << 23;
    n -= 12582912.0f;
    vf r = x - n * 0.693359375f + n * 2.12194440e-4f;
    vf p = r * 1.9875691500e-4f + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    return select(tiny, splat(0), (vf)((vi)p + e));
}

// log(x) for normal x > 0 (Cephes' logf).
inline vf vlog(vf x) {
    vi bits = (vi)x;
    vf e = __builtin_convertvector((bits >> 23) - 126, vf);
    vf m = (vf)((bits & 0x007FFFFF) | 0x3F000000);  // [0.5, 1)
    vi low = (vi)(m < 0.707106781f);
    e = select(low, e - 1.0f, e);
    m = select(low, m + m, m) - 1.0f;
    vf z = m * m;
    vf p = m * 7.0376836292e-2f - 1.1514610310e-1f;
    p = p * m + 1.1676998740e-1f;
    p = p * m - 1.2420140846e-1f;
    p = p * m + 1.4249322787e-1f;
    p = p * m - 1.6668057665e-1f;
    p = p * m + 2.0000714765e-1f;
    p = p * m - 2.4999993993e-1f;
    p = p * m + 3.3333331174e-1f;
    return m + (p * m * z + e * -2.12194440e-4f - z * 0.5f) + e * 0.693359375f;
}

// ------------------------------------------------------------------------------------------------------------ scratch

// Memory that a thread keeps between calls. Each kernel takes what it needs from one slot.
struct Scratch {
    float* data = nullptr;
    size_t size = 0;
    ~Scratch() { std::free(data); }
    float* get(size_t floats) {
        if (floats > size) {
            std::free(data);
            size = floats + floats / 2 + 1024;
            data = static_cast<float*>(std::aligned_alloc(64, (size * 4 + 63) / 64 * 64));
        }
        return data;
    }
};
thread_local Scratch caller_scratch[3];  // of the thread that opens a parallel region, read by all of it
thread_local Scratch own_scratch;

inline long ceil_div(long a, long b) { return (a + b - 1) / b; }

}  // namespace
