// Projections: y = W x with bf16 weights as the model holds them, row-major [N, K], and fp32 sums.
//
// Two inner loops carry the work:
//   dots   few tokens: each weight is read once from memory and widened by a shift; bound by memory.
//   micro  many tokens: a register tile of C += A B over blocks of W transposed into the cache; bound by the FMA units.
// Nothing is copied at load, so the embedding can share the head's storage and new weights take effect at once.

#pragma once

#include "vector.hpp"

#if defined(__AVX512BF16__) || defined(MINIINFER_EMULATE_BF16_DOT)  // emulated in tests: the pair layout without the instruction
#define BF16_DOT 1
#else
#define BF16_DOT 0
#endif

namespace {

// ------------------------------------------------------------------------------------------- dots: few tokens, from memory

#if BF16_DOT
#if defined(MINIINFER_EMULATE_BF16_DOT)
inline vf dot_pairs(vf acc, vu a, vu b) {
    acc += (vf)(a << 16) * (vf)(b << 16);
    return acc + (vf)(a & 0xFFFF0000u) * (vf)(b & 0xFFFF0000u);
}
#else
inline vf dot_pairs(vf acc, vu a, vu b) { return (vf)_mm512_dpbf16_ps((__m512)acc, (__m512bh)a, (__m512bh)b); }
#endif
#endif

// What `dots` multiplies rows of E with. X is the stored form of an activation row: padded with zeros to a multiple of 2 W elements.
template <class E>
struct Rows {
    using X = float;
    static constexpr int step = 2 * W;
    template <int Half, int R, int M>
    static inline void half(vf (&acc)[R][M], const E* const (&w)[R], const float* x, long ldx, long k) {
        vf a[R];
#pragma GCC unroll 8
        for (int r = 0; r < R; r++) a[r] = load_half<Half>(w[r] + k);
#pragma GCC unroll 8
        for (int m = 0; m < M; m++) {
            vf xm = load<vf>(x + m * ldx + k + Half * W);
#pragma GCC unroll 8
            for (int r = 0; r < R; r++) acc[r][m] = a[r] * xm + acc[r][m];
        }
    }
    template <int R, int M>
    static inline void accumulate(vf (&acc)[R][M], const E* const (&w)[R], const float* x, long ldx, long k) {
        half<0>(acc, w, x, ldx, k);  // one half at a time: R M accumulators, R weights and one activation fill the registers
        half<1>(acc, w, x, ldx, k);
    }
    static void prepare(const E* x, long k, float* out) {
        long full = k / step * step;
        for (long i = 0; i < full; i += step) {
            store(out + i, load_half<0>(x + i));
            store(out + i + W, load_half<1>(x + i));
        }
        if (full < k) {
            std::fill(out + full, out + full + step, 0.0f);
            for (long i = full; i < k; i++) out[full + place<E>(i - full)] = widen(x[i]);
        }
    }
};

#if BF16_DOT
template <>
struct Rows<bf16> {
    using X = bf16;
    static constexpr int step = 2 * W;
    template <int R, int M>
    static inline void accumulate(vf (&acc)[R][M], const bf16* const (&w)[R], const bf16* x, long ldx, long k) {
        vu a[R];
#pragma GCC unroll 8
        for (int r = 0; r < R; r++) a[r] = load<vu>(w[r] + k);
#pragma GCC unroll 8
        for (int m = 0; m < M; m++) {
            vu xm = load<vu>(x + m * ldx + k);
#pragma GCC unroll 8
            for (int r = 0; r < R; r++) acc[r][m] = dot_pairs(acc[r][m], a[r], xm);
        }
    }
    static void prepare(const bf16* x, long k, bf16* out) {
        std::memcpy(out, x, k * 2);
        std::memset(out + k, 0, (ceil_div(k, step) * step - k) * 2);
    }
};
#endif

// R rows times M tokens: c[m * ldc + r] = w[r] . x[m]. Meanwhile fetches `lines` rows from `ahead` on, one line of each a step.
template <class E, int R, int M>
void dot_tile(const E* w, long ldw, const typename Rows<E>::X* x, long ldx, long k, float* c, long ldc, const E* ahead, long lines) {
    constexpr int step = Rows<E>::step;
    vf acc[R][M] = {};
    const E* row[R];
    for (int r = 0; r < R; r++) row[r] = w + r * ldw;
    long full = k / step * step;
    for (long i = 0; i < full; i += step) {
        for (long n = 0; n < lines; n++) __builtin_prefetch(ahead + n * ldw + i, 0, 2);
        Rows<E>::template accumulate<R, M>(acc, row, x, ldx, i);
    }
    if (full < k) {
        E rest[R][step];
        const E* tail[R];
        for (int r = 0; r < R; r++) {
            std::memset(rest[r], 0, sizeof rest[r]);
            std::memcpy(rest[r], row[r] + full, (k - full) * sizeof(E));
            tail[r] = rest[r] - full;
        }
        Rows<E>::template accumulate<R, M>(acc, tail, x, ldx, full);
    }
    for (int m = 0; m < M; m++)
        for (int r = 0; r < R; r++) c[m * ldc + r] = sum(acc[r][m]);
}

template <class E, int R>
auto dot_tile_of(long m) {
    return m == 1 ? dot_tile<E, R, 1> : m == 2 ? dot_tile<E, R, 2> : m == 3 ? dot_tile<E, R, 3> : dot_tile<E, R, 4>;
}

// c[t * ldc + r] = w[r] . x[t] for any numbers of rows and tokens; groups of rows stay in the cache while the tokens pass over them, and
// each pass fetches its share of the group that comes next.
template <class E>
void dots(const E* w, long ldw, long rows, const typename Rows<E>::X* x, long ldx, long tokens, long k, float* c, long ldc) {
    constexpr int most = W == 16 ? 6 : 4;
    const long passes = ceil_div(tokens, 4);
    for (long r = 0; r < rows;) {
        const long group = rows - r >= most && tokens > 3 ? most : rows - r >= 4 ? 4 : 1;
        for (long p = 0; p < passes; p++) {
            const long t = p * tokens / passes, m = (p + 1) * tokens / passes - t;
            const long fetch = p * group / passes, lines = (p + 1) * group / passes - fetch;
            auto tile = group == most ? dot_tile_of<E, most>(m) : group == 4 ? dot_tile_of<E, 4>(m) : dot_tile_of<E, 1>(m);
            tile(w + r * ldw, ldw, x + t * ldx, ldx, k, c + t * ldc + r, ldc, w + (r + group + fetch) * ldw, lines);
        }
        r += group;
    }
}

// ------------------------------------------------------------------------------------- micro: many tokens, from the cache

// The unit of the reduction: one fp32 value, or a pair of bf16 values in 32 bits.
struct Single {
    static constexpr int per_unit = 1;
    static inline vf fma(vf acc, float a, vf b) { return splat(a) * b + acc; }
};
#if BF16_DOT
struct Pair {
    static constexpr int per_unit = 2;
    static inline vf fma(vf acc, float a, vf b) {
        uint32_t u;
        std::memcpy(&u, &a, 4);
        return dot_pairs(acc, vu{} + u, (vu)b);
    }
};
using Weights = Pair;
#else
using Weights = Single;
#endif

// c[i * ldc + j] (+)= sum over k of a[k * lda + i] * b[k * PANEL + j], i < M, j < PANEL.
template <class Unit, int M>
void micro(const float* a, long lda, const float* b, long k, float* c, long ldc, bool add) {
    vf acc[M][2];
#pragma GCC unroll 12
    for (int i = 0; i < M; i++) {
        acc[i][0] = add ? load<vf>(c + i * ldc) : vf{};
        acc[i][1] = add ? load<vf>(c + i * ldc + W) : vf{};
    }
    for (long n = 0; n < k; n++, a += lda, b += PANEL) {
        vf b0 = load<vf>(b), b1 = load<vf>(b + W);
#pragma GCC unroll 12
        for (int i = 0; i < M; i++) {
            acc[i][0] = Unit::fma(acc[i][0], a[i], b0);
            acc[i][1] = Unit::fma(acc[i][1], a[i], b1);
        }
    }
#pragma GCC unroll 12
    for (int i = 0; i < M; i++) {
        store(c + i * ldc, acc[i][0]);
        store(c + i * ldc + W, acc[i][1]);
    }
}

using Micro = void (*)(const float*, long, const float*, long, float*, long, bool);
template <class Unit, int... I>
Micro micro_of(int m, std::integer_sequence<int, I...>) {
    static const Micro table[] = {micro<Unit, I + 1>...};
    return table[m - 1];
}
template <class Unit>
Micro micro_of(long m) {
    return micro_of<Unit>((int)m, std::make_integer_sequence<int, MAX_TILE>());
}

// Even split of `total` into tiles of at most MAX_TILE: tile i is [tile_at(i), tile_at(i + 1)).
struct Tiles {
    long total, count;
    explicit Tiles(long n) : total(n), count(ceil_div(n, MAX_TILE)) {}
    long at(long i) const { return i * total / count; }
};

// Transposes a W x W block held in vectors: log W rounds of swapping off-diagonal blocks.
template <int S, int... I>
inline void swap_blocks(vu& a, vu& b, std::integer_sequence<int, I...>) {
    vu lo = {(uint32_t)((I & S) ? I - S + W : I)...}, hi = {(uint32_t)((I & S) ? I + W : I + S)...};
    vu x = __builtin_shuffle(a, b, lo), y = __builtin_shuffle(a, b, hi);
    a = x;
    b = y;
}
template <int S>
inline void transpose_round(vu (&v)[W]) {
#pragma GCC unroll 16
    for (int i = 0; i < W; i++)
        if (!(i & S)) swap_blocks<S>(v[i], v[i | S], std::make_integer_sequence<int, W>());
}
inline void transpose(vu (&v)[W]) {
    transpose_round<1>(v);
    transpose_round<2>(v);
    if constexpr (W >= 8) transpose_round<4>(v);
    if constexpr (W >= 16) transpose_round<8>(v);
}

// Columns [k, k + W words) of W rows, transposed into out[unit * PANEL]: `have` rows exist, `width` elements of each (zeros beyond).
template <class Unit, class E>
inline void pack_block(const E* const* rows, int have, long k, long width, float* out) {
    constexpr int words = 4 / sizeof(E);  // elements in 32 bits
    vu v[W] = {};
    if (width >= W * words) {
        for (int r = 0; r < have; r++) v[r] = load<vu>(rows[r] + k);
    } else {
        for (int r = 0; r < have; r++) std::memcpy(&v[r], rows[r] + k, width * sizeof(E));
    }
    transpose(v);
    if constexpr (words == 2 && Unit::per_unit == 1) {
        long n = std::min<long>(width, 2 * W);
        for (int i = 0; i < W && 2 * i < n; i++) {
            store(out + 2 * i * PANEL, (vf)(v[i] << 16));
            if (2 * i + 1 < n) store(out + (2 * i + 1) * PANEL, (vf)(v[i] & 0xFFFF0000u));
        }
    } else {
        long n = std::min<long>(ceil_div(width, Unit::per_unit), W);
        for (int i = 0; i < n; i++) store(out + i * PANEL, v[i]);
    }
}

// Elements [k, k + width) of up to PANEL rows, transposed: out[unit * PANEL + row].
template <class Unit, class E>
void pack_panel(const E* const* rows, int have, long k, long width, float* out) {
    constexpr int span = W * 4 / sizeof(E);
    for (long i = 0; i < width; i += span)
        for (int half = 0; half < 2; half++) {
            int here = std::clamp(have - half * W, 0, W);
            pack_block<Unit, E>(rows + half * W, here, k + i, width - i, out + i / Unit::per_unit * PANEL + half * W);
        }
}

// --------------------------------------------------------------------------------------------------------- projections

constexpr long DEPTH = 256;  // elements of K that are transposed at a time: PANEL x DEPTH fp32 and a token tile stay near the core
#if !defined(MINIINFER_CROSSOVER)
#define MINIINFER_CROSSOVER 40
#endif
constexpr long CROSSOVER = MINIINFER_CROSSOVER;  // from this many tokens on, tiles beat dots (measured)

// Activations in the form that the chosen loop wants: rows for `dots`, token tiles [tile][unit][token] for `micro`.
struct Activations {
    bool tiled;
    long tokens, k, padded;  // padded: stored elements of a row
    float* data;

    Activations(long tokens, long k, float* memory)
        : tiled(tokens >= CROSSOVER), tokens(tokens), k(k), padded(ceil_div(k, 2 * W) * 2 * W), data(memory) {}
    static size_t floats(long tokens, long k) { return (size_t)tokens * (ceil_div(k, 2 * W) * 2 * W); }
    using Row = Rows<bf16>::X;
    Row* row(long t) const { return reinterpret_cast<Row*>(data) + t * padded; }
    float* tile(long first) const { return data + first * (padded / Weights::per_unit); }

    long pieces() const { return tiled ? Tiles(tokens).count : tokens; }
    void prepare(const bf16* x, long piece) const {  // one piece; pieces are independent
        if (!tiled) return Rows<bf16>::prepare(x + piece * k, k, row(piece));
        Tiles tiles(tokens);
        long first = tiles.at(piece), m = tiles.at(piece + 1) - first;
        float* out = tile(first);
        for (long i = 0; i < m; i++) {
            const bf16* from = x + (first + i) * k;
#if BF16_DOT
            for (long n = 0; n < k / 2; n++) std::memcpy(out + n * m + i, from + 2 * n, 4);
            if (k & 1) {
                bf16 last[2] = {from[k - 1], {0}};
                std::memcpy(out + k / 2 * m + i, last, 4);
            }
#else
            for (long n = 0; n < k; n++) out[n * m + i] = widen(from[n]);
#endif
        }
    }
};

// Fetches the block of weights that comes next, in shares, while the FMA units work on the present one.
struct Prefetch {
    const bf16* w;
    long k, row, rows, width, each;
    Prefetch(const bf16* w, long k, long from, long to, long d, long shares)
        : w(w + from * k + d), k(k), row(0), rows(d < k ? std::min<long>(PANEL, to - from) : 0), width(std::min(DEPTH, k - d)),
          each(ceil_div(rows, shares)) {}
    void share() {
        for (long last = std::min(rows, row + each); row < last; row++)
            for (long i = 0; i < width; i += 32) __builtin_prefetch(w + row * k + i, 0, 2);
    }
};

// c[t * ldc + n - from] = x[t] . w[n] in fp32, for rows from <= n < to of w.
void project(const bf16* w, long from, long to, const Activations& x, float* c, long ldc, float* panel) {
    const long k = x.k;
    if (!x.tiled) return dots<bf16>(w + from * k, k, to - from, x.row(0), x.padded, x.tokens, k, c, ldc);
    Tiles tiles(x.tokens);
    for (long d = 0; d < k; d += DEPTH) {
        const long width = std::min(DEPTH, k - d), units = ceil_div(width, Weights::per_unit);
        for (long n = from; n < to; n += PANEL) {
            const bf16* rows[PANEL];
            const int have = (int)std::min<long>(PANEL, to - n);
            for (int r = 0; r < have; r++) rows[r] = w + (n + r) * k;
            pack_panel<Weights>(rows, have, d, width, panel);
            const bool last = n + PANEL >= to;
            Prefetch next(w, k, last ? from : n + PANEL, to, last ? d + DEPTH : d, tiles.count);
            for (long i = 0; i < tiles.count; i++) {
                next.share();
                const long first = tiles.at(i), m = tiles.at(i + 1) - first;
                const float* a = x.tile(first) + d / Weights::per_unit * m;
                micro_of<Weights>(m)(a, m, panel, units, c + first * ldc + n - from, ldc, d > 0);
            }
        }
    }
}

// Rows of w that one task takes: enough for a long contiguous read, few enough that threads end together.
long task_rows(long rows, long k, bool tiled) {
    const long threads = omp_get_max_threads();
    if (tiled) return std::clamp(rows / (PANEL * 4 * threads), 1L, 4L) * PANEL;
    const long enough = ceil_div(128 * 1024, 2 * k);
    return std::clamp(std::min(enough, rows / (threads * 8)) / 24 * 24, 24L, 4096L);
}

size_t panel_floats() { return (size_t)DEPTH * PANEL; }

void linear(const bf16* w, const bf16* bias, const bf16* input, bf16* out, long tokens, long n, long k) {
    Activations x(tokens, k, caller_scratch[0].get(Activations::floats(tokens, k)));
    const long rows = task_rows(n, k, x.tiled), tasks = ceil_div(n, rows), ldc = ceil_div(rows, PANEL) * PANEL;
    const bool split = x.tiled;
    if (!split)
        for (long i = 0; i < x.pieces(); i++) x.prepare(input, i);
#pragma omp parallel
    {
        if (split) {
#pragma omp for schedule(static)
            for (long i = 0; i < x.pieces(); i++) x.prepare(input, i);
        }
        float* c = own_scratch.get(tokens * ldc + panel_floats());
#pragma omp for schedule(dynamic, 1) nowait
        for (long task = 0; task < tasks; task++) {
            const long from = task * rows, to = std::min(n, from + rows);
            project(w, from, to, x, c, ldc, c + tokens * ldc);
            for (long t = 0; t < tokens; t++) {
                const float* ct = c + t * ldc;
                bf16* o = out + t * n + from;
                long i = 0;
                for (; i + W <= to - from; i += W) {
                    vf v = load<vf>(ct + i);
                    if (bias) v += load_wide(bias + from + i);
                    store_narrow(o + i, v);
                }
                for (; i < to - from; i++) o[i] = narrow_bf16(ct[i] + (bias ? widen(bias[from + i]) : 0.0f));
            }
        }
    }
}

}  // namespace
