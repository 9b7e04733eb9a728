// The CPU kernels' C interface, called through ctypes by __init__.py, and the small operations.
//
// No header of torch or Python is used, so that g++ (11 or later) compiles this in seconds at first use. Meanings, shapes and letters are
// those of reference.py; results agree up to the order of fp32 sums. `dtype` is 0 for fp32 and 1 for bf16; strides are contiguous.

#include "attention.hpp"
#include "projection.hpp"
#include "sampling.hpp"
#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace {

constexpr long SERIAL = 1 << 14;  // elements below which waking the other threads costs more than it saves

template <class E>
inline vf rounded(vf v) {  // through E and back
    E t[W];
    store_narrow(t, v);
    return load_wide(t);
}
template <class E>
inline float rounded(float v) {
    return widen(narrow<E>(v));
}

// ------------------------------------------------------------------------------------------------------ norms, silu

inline float inverse_rms(const float* x, long n, float eps) {
    vf sums = {};
    long i = 0;
    for (; i + W <= n; i += W) {
        vf v = load<vf>(x + i);
        sums += v * v;
    }
    float total = sum(sums);
    for (; i < n; i++) total += x[i] * x[i];
    return 1.0f / std::sqrt(total / (float)n + eps);
}

// x is scaled, rounded to E and multiplied with the weight, in place.
template <class E>
inline void norm_row(float* x, const E* weight, long n, float eps) {
    const float scale = inverse_rms(x, n, eps);
    long i = 0;
    for (; i + W <= n; i += W) store(x + i, rounded<E>(load<vf>(x + i) * scale) * load_wide(weight + i));
    for (; i < n; i++) x[i] = rounded<E>(x[i] * scale) * widen(weight[i]);
}

// out = norm(x), or of x + residual, which `total` then takes.
template <class E>
void rms_norm(const E* x, const E* residual, const E* weight, E* out, E* total, long tokens, long n, float eps) {
#pragma omp parallel for if (tokens * n > SERIAL)
    for (long t = 0; t < tokens; t++) {
        float* row = own_scratch.get(2 * n);
        widen_row(x + t * n, row, n);
        if (residual) {
            widen_row(residual + t * n, row + n, n);
#pragma omp simd
            for (long i = 0; i < n; i++) row[i] += row[n + i];
            narrow_row(row, total + t * n, n);
            widen_row(total + t * n, row, n);
        }
        norm_row(row, weight, n, eps);
        narrow_row(row, out + t * n, n);
    }
}

inline vf silu(vf x) { return x / (vexp(-x) + 1.0f); }

// out = silu(gate) * up; any length, rows through a padded vector at the end.
template <class E>
inline void silu_mul_row(const E* gate, const E* up, E* out, long n) {
    long i = 0;
    for (; i + W <= n; i += W) store_narrow(out + i, silu(load_wide(gate + i)) * load_wide(up + i));
    for (; i < n; i++) out[i] = narrow<E>(silu(splat(widen(gate[i])))[0] * widen(up[i]));
}

template <class E>
void silu_mul(const E* gate_up, E* out, long tokens, long n) {
#pragma omp parallel for if (tokens * n > SERIAL)
    for (long t = 0; t < tokens; t++) silu_mul_row(gate_up + t * 2 * n, gate_up + t * 2 * n + n, out + t * n, n);
}

// ------------------------------------------------------------------------------------------------------------ rotary

struct Rope {
    long tokens, heads, groups, dim, size;  // query heads, kv heads, head dimension, page size
    const float* cos_sin;
    const int32_t *positions, *slots;
    float eps;
};

template <class E>
void rope_qkv_cache(const Rope& r, const E* qkv, const E* q_weight, const E* k_weight, E* q, E* k_cache, E* v_cache) {
    const long all = r.heads + 2 * r.groups, half = r.dim / 2;
#pragma omp parallel for if (r.tokens * all * r.dim > SERIAL)
    for (long t = 0; t < r.tokens; t++) {
        float* row = own_scratch.get(r.dim);
        const float *cosine = r.cos_sin + (long)r.positions[t] * r.dim, *sine = cosine + half;
        const long page = r.slots[t] / r.size, offset = r.slots[t] % r.size;
        for (long h = 0; h < all; h++) {
            const E* from = qkv + (t * all + h) * r.dim;
            const long g = h < r.heads ? h : (h - r.heads) % r.groups;
            const long at = ((page * r.groups + g) * r.size + offset) * r.dim;  // for keys and values
            if (h >= r.heads + r.groups) {
                std::memcpy(v_cache + at, from, r.dim * sizeof(E));
                continue;
            }
            const bool query = h < r.heads;
            widen_row(from, row, r.dim);
            const E* weight = query ? q_weight : k_weight;
            if (weight) {
                norm_row(row, weight, r.dim, r.eps);
                for (long i = 0; i < r.dim; i++) row[i] = rounded<E>(row[i]);
            }
#pragma omp simd
            for (long i = 0; i < half; i++) {
                const float a = row[i], b = row[half + i];
                row[i] = a * cosine[i] - b * sine[i];
                row[half + i] = b * cosine[i] + a * sine[i];
            }
            narrow_row(row, query ? q + (t * r.heads + g) * r.dim : k_cache + at, r.dim);
        }
    }
}

// ------------------------------------------------------------------------------------------------ mixture of experts

// A token's k likeliest experts (ties to the lower index) and their weights.
void route(const float* logits, long experts, long k, bool renormalize, int32_t* chosen, float* weights) {
    const float top = *std::max_element(logits, logits + experts);
    float all = 0, kept = 0;
    for (long e = 0; e < experts; e++) all += std::exp(logits[e] - top);
    for (long j = 0; j < k; j++) {
        long best = -1;
        for (long e = 0; e < experts; e++)
            if (std::find(chosen, chosen + j, (int32_t)e) == chosen + j && (best < 0 || logits[e] > logits[best])) best = e;
        chosen[j] = (int32_t)best;
        kept += weights[j] = std::exp(logits[best] - top) / all;
    }
    if (renormalize)
        for (long j = 0; j < k; j++) weights[j] /= kept;
}

// w13 [E, 2 I, h], w2 [E, h, I]. Pairs of (token, choice) are sorted by expert; each expert's products run over its own tokens.
void moe(const bf16* x, const float* logits, const bf16* w13, const bf16* w2, bf16* out, long tokens, long h, long inner, long experts,
         long k, bool renormalize) {
    const long pairs = tokens * k;
    static thread_local std::vector<int32_t> chosen, order, start, busy;
    static thread_local std::vector<float> weights;
    static thread_local std::vector<bf16> hidden;
    chosen.resize(pairs), weights.resize(pairs), order.resize(pairs), hidden.resize(pairs * inner);
    start.assign(experts + 1, 0), busy.clear();
    for (long t = 0; t < tokens; t++) route(logits + t * experts, experts, k, renormalize, &chosen[t * k], &weights[t * k]);
    for (long i = 0; i < pairs; i++) start[chosen[i] + 1]++;
    for (long e = 0; e < experts; e++) {
        if (start[e + 1]) busy.push_back((int32_t)e);
        start[e + 1] += start[e];
    }
    std::vector<int32_t> next(start.begin(), start.end() - 1);
    for (long i = 0; i < pairs; i++) order[next[chosen[i]]++] = (int32_t)i;
    constexpr long step = Rows<bf16>::step;
    const long wide = ceil_div(h, step) * step, narrow = ceil_div(inner, step) * step;
    using X = Rows<bf16>::X;
    X* inputs = reinterpret_cast<X*>(caller_scratch[0].get(pairs * wide));
    X* inners = reinterpret_cast<X*>(caller_scratch[1].get(pairs * narrow));
    float* results = caller_scratch[2].get(pairs * h);  // [token, choice][h], weighted
    // thread_local names mean another thread's copy inside the region: take the addresses here
    const int32_t *sorted = order.data(), *first = start.data(), *active = busy.data();
    const float* share = weights.data();
    bf16* inside = hidden.data();
    const long count = (long)busy.size(), rows = 48, ups = ceil_div(inner, rows), downs = ceil_div(h, rows);
#pragma omp parallel
    {
#pragma omp for schedule(static)
        for (long i = 0; i < pairs; i++) Rows<bf16>::prepare(x + sorted[i] / k * h, h, inputs + i * wide);
        float* c = own_scratch.get(pairs * 2 * rows);
#pragma omp for schedule(dynamic, 1)
        for (long task = 0; task < count * ups; task++) {
            const long e = active[task / ups], from = task % ups * rows, have = std::min(rows, inner - from), n = first[e + 1] - first[e];
            const bf16* w = w13 + (e * 2 * inner + from) * h;
            float *gate = c, *other = c + n * rows;
            dots<bf16>(w, h, have, inputs + first[e] * wide, wide, n, h, gate, rows);
            dots<bf16>(w + inner * h, h, have, inputs + first[e] * wide, wide, n, h, other, rows);
            for (long t = 0; t < n; t++) {
                silu_mul_row(gate + t * rows, other + t * rows, gate + t * rows, have);
                narrow_row(gate + t * rows, inside + (first[e] + t) * inner + from, have);
            }
        }
#pragma omp for schedule(static)
        for (long i = 0; i < pairs; i++) Rows<bf16>::prepare(inside + i * inner, inner, inners + i * narrow);
#pragma omp for schedule(dynamic, 1)
        for (long task = 0; task < count * downs; task++) {
            const long e = active[task / downs], from = task % downs * rows, have = std::min(rows, h - from), n = first[e + 1] - first[e];
            dots<bf16>(w2 + (e * h + from) * inner, inner, have, inners + first[e] * narrow, narrow, n, inner, c, rows);
            for (long t = 0; t < n; t++) {
                const long pair = sorted[first[e] + t];
                for (long i = 0; i < have; i++) results[pair * h + from + i] = c[t * rows + i] * share[pair];
            }
        }
#pragma omp for schedule(static)
        for (long t = 0; t < tokens; t++) {
            float* total = results + t * k * h;
            for (long j = 1; j < k; j++)
                for (long i = 0; i < h; i++) total[i] += total[j * h + i];
            narrow_row(total, out + t * h, h);
        }
    }
}

template <class F>
void with_type(int dtype, F f) {
    if (dtype) f(bf16{});
    else f(float{});
}

}  // namespace

extern "C" {

// Elements of bf16 that `mi_pack` writes.
long mi_packed_size(long n, long k) { return ceil_div(n, PANEL) * PANEL * pairs_of(k) * 2; }

void mi_pack(const void* w, void* packed, long n, long k) {
#if defined(__linux__)  // 2 MiB pages where the memory allows, before it is first touched
    const uintptr_t huge = 1 << 21, bytes = mi_packed_size(n, k) * 2;
    const uintptr_t from = ((uintptr_t)packed + huge - 1) / huge * huge, to = ((uintptr_t)packed + bytes) / huge * huge;
    if (from < to) madvise((void*)from, to - from, MADV_HUGEPAGE);
#endif
    pack((const bf16*)w, (uint32_t*)packed, n, k);
}

// y [T, N] = x [T, K] w^T + bias (bias may be null), bf16, w as mi_pack wrote it.
void mi_linear(const void* w, const void* bias, const void* x, void* y, long tokens, long n, long k, int fixed) {
    linear((const uint32_t*)w, (const bf16*)bias, (const bf16*)x, (bf16*)y, tokens, n, k, fixed);
}

// residual null: plain norm.
void mi_rms_norm(int dtype, const void* x, const void* residual, const void* weight, void* out, void* total, long tokens, long n, float eps) {
    with_type(dtype, [&](auto e) {
        using E = decltype(e);
        rms_norm((const E*)x, (const E*)residual, (const E*)weight, (E*)out, (E*)total, tokens, n, eps);
    });
}

void mi_silu_mul(int dtype, const void* gate_up, void* out, long tokens, long n) {
    with_type(dtype, [&](auto e) {
        using E = decltype(e);
        silu_mul((const E*)gate_up, (E*)out, tokens, n);
    });
}

void mi_rope_qkv_cache(int dtype, const void* qkv, const float* cos_sin, const int32_t* positions, const void* q_weight, const void* k_weight,
                       void* q, void* k_cache, void* v_cache, const int32_t* slots, long tokens, long heads, long groups, long dim, long size,
                       float eps) {
    with_type(dtype, [&](auto e) {
        using E = decltype(e);
        const Rope r{tokens, heads, groups, dim, size, cos_sin, positions, slots, eps};
        rope_qkv_cache(r, (const E*)qkv, (const E*)q_weight, (const E*)k_weight, (E*)q, (E*)k_cache, (E*)v_cache);
    });
}

void mi_paged_attention(int dtype, const void* q, const void* k, const void* v, void* out, const int32_t* table, const int32_t* rows,
                        const int32_t* start, const int32_t* lengths, long tokens, long batch, long table_width, long heads, long groups,
                        long size, long dim, float scale, long window, int fixed) {
    with_type(dtype, [&](auto e) {
        using E = decltype(e);
        Attention<E>{(const E*)q, (const E*)k, (const E*)v, (E*)out, table, rows, start, lengths, batch, table_width, heads, groups,
                     heads / groups, size, dim, scale, window, fixed != 0}
            .run(tokens);
    });
}

void mi_moe(const void* x, const float* logits, const void* w13, const void* w2, void* out, long tokens, long h, long inner, long experts,
            long k, int renormalize) {
    moe((const bf16*)x, logits, (const bf16*)w13, (const bf16*)w2, (bf16*)out, tokens, h, inner, experts, k, renormalize);
}

// top_k, top_p and min_p null: no row has a filter.
void mi_sample(const float* logits, const float* temperature, const int32_t* top_k, const float* top_p, const float* min_p,
               const int64_t* seeds, const int32_t* positions, int32_t* out, long batch, long n) {
#pragma omp parallel for schedule(dynamic, 1) if (batch * n > SERIAL)
    for (long b = 0; b < batch; b++) {
        static thread_local std::vector<Candidate> candidates;
        const float* x = logits + b * n;
        const uint32_t key = sampling_key(seeds[b], positions[b]);
        const bool filtered = top_k && temperature[b] > 0 && (top_k[b] > 0 || top_p[b] < 1 || min_p[b] > 0);
        out[b] = filtered ? sample_filtered(x, n, temperature[b], top_k[b], top_p[b], min_p[b], key, candidates)
                          : sample_row(x, n, temperature[b], key);
    }
}

// One kind's slots; ids, positions and lengths too where they are not null.
void mi_step_inputs(const int32_t* tokens, const int32_t* rows, const int32_t* starts, const int32_t* query_start, const int32_t* table,
                    int32_t* ids, int32_t* positions, int32_t* lengths, int32_t* slots, long batch, long num_tokens, long row_length,
                    long table_width, long size) {
    for (long b = 0; b < batch; b++) {
        const long row = rows[b];
        if (lengths) lengths[b] = starts[b] + query_start[b + 1] - query_start[b];
        for (long t = query_start[b]; t < query_start[b + 1]; t++) {
            const long p = starts[b] + t - query_start[b];
            if (ids) ids[t] = tokens[row * row_length + p], positions[t] = (int32_t)p;
            if (slots) slots[t] = (int32_t)(table[row * table_width + p / size] * size + p % size);
        }
    }
    for (long t = query_start[batch]; t < num_tokens; t++) {
        if (ids) ids[t] = positions[t] = 0;
        if (slots) slots[t] = 0;
    }
}
}
