// Products with bf16 weights and fp32 sums. Three inner loops:
//
//   dots    rows of W, as the tensor holds them, with few tokens: cached keys, experts.
//   stream  W packed into panels, with a tile of tokens held in registers: every linear layer. Each weight is read once, in one contiguous
//           stream, for up to MAX_TILE tokens; more tokens pass over pieces of a panel that stay in the nearest cache.
//   micro   C += A B over small fp32 blocks in the cache: attention of prompts.

#pragma once

#include "vector.hpp"

#if defined(__AVX512BF16__) || defined(MINIINFER_EMULATE_BF16_DOT)  // emulated in tests: the pair layout without the instruction
#define BF16_DOT 1
#else
#define BF16_DOT 0
#endif

namespace {

// ------------------------------------------------------------------------------------------- dots: rows as they are

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

// R rows times M tokens: c[m * ldc + r] = w[r] . x[m]. Meanwhile fetches `lines` rows from `next` on, one line of each a step.
template <class E, int R, int M>
void dot_tile(const E* w, long ldw, const typename Rows<E>::X* x, long ldx, long k, float* c, long ldc, const E* next, long lines) {
    constexpr int step = Rows<E>::step;
    vf acc[R][M] = {};
    const E* row[R];
    for (int r = 0; r < R; r++) row[r] = w + r * ldw;
    long full = k / step * step;
    for (long i = 0; i < full; i += step) {
        for (long n = 0; n < lines; n++) __builtin_prefetch(next + n * ldw + i, 0, 2);
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
// each pass fetches its share of the rows `ahead` elements on (0: of the group that comes next).
template <class E>
void dots(const E* w, long ldw, long rows, const typename Rows<E>::X* x, long ldx, long tokens, long k, float* c, long ldc, long ahead = 0) {
    constexpr int most = W == 16 ? 6 : 4;
    const long passes = ceil_div(tokens, 4);
    for (long r = 0; r < rows;) {
        const long group = rows - r >= most && tokens > 3 ? most : rows - r >= 4 ? 4 : 1;
        for (long p = 0; p < passes; p++) {
            const long t = p * tokens / passes, m = (p + 1) * tokens / passes - t;
            const long fetch = p * group / passes, lines = (p + 1) * group / passes - fetch;
            auto tile = group == most ? dot_tile_of<E, most>(m) : group == 4 ? dot_tile_of<E, 4>(m) : dot_tile_of<E, 1>(m);
            tile(w + r * ldw, ldw, x + t * ldx, ldx, k, c + t * ldc + r, ldc, w + (r + fetch) * ldw + (ahead ? ahead : group * ldw), lines);
        }
        r += group;
    }
}

// ------------------------------------------------------------------------------------------ micro: blocks in the cache

// c[i * ldc + j] (+)= sum over k of a[k * lda + i] * b[k * PANEL + j], i < M, j < PANEL.
template <int M>
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
            acc[i][0] += splat(a[i]) * b0;
            acc[i][1] += splat(a[i]) * b1;
        }
    }
#pragma GCC unroll 12
    for (int i = 0; i < M; i++) {
        store(c + i * ldc, acc[i][0]);
        store(c + i * ldc + W, acc[i][1]);
    }
}

using Micro = void (*)(const float*, long, const float*, long, float*, long, bool);
template <int... I>
Micro micro_of(long m, std::integer_sequence<int, I...>) {
    static const Micro table[] = {micro<I + 1>...};
    return table[m - 1];
}
inline Micro micro_of(long m) { return micro_of(m, std::make_integer_sequence<int, MAX_TILE>()); }

// Even split of `total` into tiles of at most MAX_TILE: tile i is [at(i), at(i + 1)).
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

// Columns from k on of W rows (`have` exist; `width` elements of each, zeros beyond), transposed into out[unit * PANEL]. A unit is 32 bits:
// with Pairs two neighbouring bf16 elements, else one element as fp32.
template <bool Pairs, class E>
inline void pack_block(const E* const* rows, int have, long k, long width, float* out) {
    constexpr int words = 4 / sizeof(E);  // elements in 32 bits
    vu v[W] = {};
    if (width >= W * words) {
        for (int r = 0; r < have; r++) v[r] = load<vu>(rows[r] + k);
    } else {
        for (int r = 0; r < have; r++) std::memcpy(&v[r], rows[r] + k, width * sizeof(E));
    }
    transpose(v);
    const long units = std::min<long>(Pairs ? ceil_div(width, 2) : width, W * words / (Pairs ? 2 : 1));
    for (int i = 0; i < W; i++) {
        if constexpr (words == 1 || Pairs) {
            if (i < units) store(out + i * PANEL, v[i]);
        } else {
            if (2 * i < units) store(out + 2 * i * PANEL, (vf)(v[i] << 16));
            if (2 * i + 1 < units) store(out + (2 * i + 1) * PANEL, (vf)(v[i] & 0xFFFF0000u));
        }
    }
}

// The first `width` elements of up to PANEL rows, transposed: out[unit * PANEL + row].
template <bool Pairs, class E>
void pack_panel(const E* const* rows, int have, long width, float* out) {
    constexpr int span = W * 4 / sizeof(E);
    for (long k = 0; k < width; k += span)
        for (int half = 0; half < 2; half++)
            pack_block<Pairs>(rows + half * W, std::clamp(have - half * W, 0, W), k, width - k, out + k / (Pairs ? 2 : 1) * PANEL + half * W);
}

// -------------------------------------------------------------------------------------------- stream: packed weights

constexpr long DEPTH = 128;  // pairs of a panel that several tiles of tokens pass over: 16 KiB with 32 columns
constexpr long AHEAD = 1024;  // pairs to fetch ahead in the stream: 4 KiB

// Weights [N, K] packed as [N / PANEL][K / 2][PANEL] pairs of bf16, zeros beyond N and K. A pair is what the bf16 dot product takes, and a
// shift and a mask make two fp32 vectors of it where there is none.
inline long pairs_of(long k) { return ceil_div(k, 2); }

void pack(const bf16* w, uint32_t* out, long n, long k) {
#pragma omp parallel for schedule(dynamic, 1)
    for (long p = 0; p < ceil_div(n, PANEL); p++) {
        const bf16* rows[PANEL];
        const int have = (int)std::min<long>(PANEL, n - p * PANEL);
        for (int r = 0; r < have; r++) rows[r] = w + (p * PANEL + r) * k;
        pack_panel<true>(rows, have, k, reinterpret_cast<float*>(out) + p * pairs_of(k) * PANEL);
    }
}

#if BF16_DOT
constexpr int X_UNITS = 1;  // 32-bit units of an activation per pair
#else
constexpr int X_UNITS = 2;
#endif

// c[i * ldc + j] (+)= the tile's M tokens times a panel, over `pairs` pairs. x [pair][X_UNITS][M]. With Fixed the order of a token's sum is the
// same for every M.
template <int M, bool Fixed>
void stream(const float* x, const uint32_t* w, long pairs, float* c, long ldc, bool add) {
    constexpr int chains = BF16_DOT || Fixed || 4 * M > 2 * MAX_TILE ? 1 : 2;  // few tokens: more sums side by side, to hide the FMA's latency
    vf acc[chains][M][2] = {};
#pragma GCC unroll 12
    for (int i = 0; i < M; i++)
        for (int j = 0; j < 2; j++)
            if (add) acc[0][i][j] = load<vf>(c + i * ldc + j * W);
    for (long n = 0; n < pairs; n++, x += X_UNITS * M, w += PANEL) {
        for (int j = 0; j < PANEL; j += 16) __builtin_prefetch(w + j + AHEAD, 0, 3);
        const vu b0 = load<vu>(w), b1 = load<vu>(w + W);
#if BF16_DOT
#pragma GCC unroll 12
        for (int i = 0; i < M; i++) {
            uint32_t pair;
            std::memcpy(&pair, x + i, 4);
            acc[0][i][0] = dot_pairs(acc[0][i][0], b0, pair - vu{});
            acc[0][i][1] = dot_pairs(acc[0][i][1], b1, pair - vu{});
        }
#else
        const vf even0 = (vf)(b0 << 16), even1 = (vf)(b1 << 16), odd0 = (vf)(b0 & 0xFFFF0000u), odd1 = (vf)(b1 & 0xFFFF0000u);
#pragma GCC unroll 12
        for (int i = 0; i < M; i++) {
            acc[0][i][0] += splat(x[i]) * even0;
            acc[0][i][1] += splat(x[i]) * even1;
        }
#pragma GCC unroll 12
        for (int i = 0; i < M; i++) {
            acc[chains - 1][i][0] += splat(x[M + i]) * odd0;
            acc[chains - 1][i][1] += splat(x[M + i]) * odd1;
        }
#endif
    }
#pragma GCC unroll 12
    for (int i = 0; i < M; i++)
        for (int j = 0; j < 2; j++) store(c + i * ldc + j * W, chains == 2 ? acc[0][i][j] + acc[chains - 1][i][j] : acc[0][i][j]);
}

using Stream = void (*)(const float*, const uint32_t*, long, float*, long, bool);
template <int... I>
Stream stream_of(long m, bool fixed, std::integer_sequence<int, I...>) {
    static const Stream table[][MAX_TILE] = {{stream<I + 1, false>...}, {stream<I + 1, true>...}};
    return table[fixed][m - 1];
}

// Pairs [from, to) of a tile's m rows x [m, k], interleaved: out[pair][X_UNITS][m].
void interleave(const bf16* x, long k, long m, long from, long to, float* out) {
    out += from * X_UNITS * m;
    if (m == 1 && !BF16_DOT) {
        widen_row(x + 2 * from, out, std::min(k, 2 * to) - 2 * from);
        if (2 * to > k) out[k - 2 * from] = 0.0f;
        return;
    }
    for (long n = from; n < to; n++, out += X_UNITS * m) {
        const bool whole = 2 * n + 1 < k;
        for (long i = 0; i < m; i++) {
            const bf16* pair = x + i * k + 2 * n;
#if BF16_DOT
            const bf16 both[2] = {pair[0], whole ? pair[1] : bf16{0}};
            std::memcpy(out + i, both, 4);
#else
            out[i] = widen(pair[0]);
            out[m + i] = whole ? widen(pair[1]) : 0.0f;
#endif
        }
    }
}

// y [T, N] = x [T, K] w^T + bias. `fixed`: a token's result does not depend on how many there are.
void linear(const uint32_t* w, const bf16* bias, const bf16* input, bf16* out, long tokens, long n, long k, bool fixed) {
    const Tiles tiles(tokens);
    const long pairs = pairs_of(k), panels = ceil_div(n, PANEL), threads = omp_get_max_threads();
    const long depth = tiles.count == 1 ? pairs : DEPTH;
    float* x = caller_scratch[0].get(pairs * X_UNITS * tokens);
    // A task is some panels: a long contiguous read, but enough tasks that all threads end together.
    const long wish = ceil_div(256 * 1024, pairs * PANEL * 4), group = std::clamp(panels / (threads * 8), 1L, tiles.count == 1 ? wish : 4L);
    const long pieces = ceil_div(pairs, 128);
    const bool alone = pairs * tokens < 2048;  // too little to share out
    if (alone)
        for (long i = 0; i < tiles.count; i++)
            interleave(input + tiles.at(i) * k, k, tiles.at(i + 1) - tiles.at(i), 0, pairs, x + tiles.at(i) * pairs * X_UNITS);
#pragma omp parallel
    {
        if (!alone) {
#pragma omp for schedule(static)
            for (long p = 0; p < tiles.count * pieces; p++) {
                const long i = p / pieces, from = p % pieces * 128;
                interleave(input + tiles.at(i) * k, k, tiles.at(i + 1) - tiles.at(i), from, std::min(pairs, from + 128),
                           x + tiles.at(i) * pairs * X_UNITS);
            }
        }
        float* c = own_scratch.get(tokens * PANEL);
#pragma omp for schedule(dynamic, 1) nowait
        for (long task = 0; task < ceil_div(panels, group); task++) {
            for (long p = task * group; p < std::min(panels, (task + 1) * group); p++) {
                const uint32_t* panel = w + p * pairs * PANEL;
                for (long d = 0; d < pairs; d += depth) {
                    for (long i = 0; i < tiles.count; i++) {
                        const long first = tiles.at(i), m = tiles.at(i + 1) - first;
                        const float* xs = x + (first * pairs + d * m) * X_UNITS;
                        const Stream tile = stream_of(m, fixed, std::make_integer_sequence<int, MAX_TILE>());
                        tile(xs, panel + d * PANEL, std::min(depth, pairs - d), c + first * PANEL, PANEL, d > 0);
                    }
                }
                const long columns = std::min<long>(PANEL, n - p * PANEL);
                for (long t = 0; t < tokens; t++) {
                    float* ct = c + t * PANEL;
                    if (bias)
                        for (long j = 0; j < columns; j++) ct[j] += widen(bias[p * PANEL + j]);
                    narrow_row(ct, out + t * n + p * PANEL, columns);
                }
            }
        }
    }
}

}  // namespace
