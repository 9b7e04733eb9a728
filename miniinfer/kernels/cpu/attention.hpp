// Causal attention over the paged cache [N, H, S, D], the group of query heads that share a kv head folded into rows.
//
// Few rows (decode): scores and values straight from the pages, split over chunks of the context; bound by memory.
// Many rows (prefill): blocks of scores held transposed [key][row], so that the softmax runs along lanes and both products use `micro`.
// Chunks and blocks lie at absolute positions, so a sequence's sums depend neither on its neighbours nor, among prompts of many rows, on where
// they were cut.

#pragma once

#include "projection.hpp"

namespace {

template <class E>
struct Attention {
    const E *q, *k, *v;
    E* out;
    const int32_t *table, *rows, *start, *lengths;
    long batch, table_width, heads, groups, share, size, dim;  // heads: query heads, groups: kv heads, share: heads / groups, size: tokens of a page
    float scale;
    long window;
    bool fixed;  // one query decodes, more do not: a token's result then depends on that alone

    static constexpr long CHUNK = 256;  // keys of a decode task
    static constexpr long FEW = 16;  // rows up to which a sequence counts as decode
    static constexpr int PANELS = 4;  // panels of rows that share a transposed block of keys
    static constexpr float NEVER = -1e30f;

    long spread() const { return ceil_div(dim, 2 * W) * 2 * W; }  // stored elements of a row in the order of load_half
    const E* page(const E* cache, long b, long h, long index) const {  // the first key or value of page `index` of a sequence
        return cache + ((long)table[rows[b] * table_width + index] * groups + h) * size * dim;
    }
    const E* query(long b, long h, long row) const { return q + ((start[b] + row / share) * heads + h * share + row % share) * dim; }
    E* result(long b, long h, long row) const { return out + ((start[b] + row / share) * heads + h * share + row % share) * dim; }

    struct Task {
        int b, h, first, keep;  // first: key of a decode chunk or row of a prefill block; keep: where a decode chunk's partial result goes
    };

    // ---------------------------------------------------------------------------------------------------------- decode

    // Partial result of FEW rows: per row `spread` sums of p v, then the largest score and the sum of p.
    long partial() const { return spread() + 2; }

    void decode(const Task& task, float* result, float* scratch) const {
        const long b = task.b, h = task.h, n = start[b + 1] - start[b], m = n * share, length = lengths[b];
        const long seen = window ? std::max(0L, length - n - window + 1) : 0;
        const long lo = std::max<long>(task.first, seen), hi = std::min<long>(task.first + CHUNK, length);
        using X = typename Rows<E>::X;
        X* x = reinterpret_cast<X*>(scratch);
        float* p = scratch + FEW * spread();
        for (long r = 0; r < m; r++) Rows<E>::prepare(query(b, h, r), dim, x + r * spread());
        each_page(k, b, h, lo, hi, [&](const E* keys, long key, long have, long ahead) {
            dots<E>(keys, dim, have, x, spread(), m, dim, p + key - task.first, CHUNK, ahead);
        });
        for (long r = 0; r < m; r++) {
            float* pr = p + r * CHUNK - task.first;
            const long own = length - n + r / share, from = window ? std::max(lo, own - window + 1) : lo, to = std::min(hi, own + 1);
            soften(pr, lo, from, std::max(from, to), hi, result + r * partial() + spread());
            std::fill_n(result + r * partial(), spread(), 0.0f);
        }
        each_page(v, b, h, lo, hi, [&](const E* values, long key, long have, long ahead) {
            for (long r = 0; r < m; r += 2) {
                const float* pr = p + r * CHUNK + key - task.first;
                if (r + 1 < m) weigh<2>(values, have, pr, result + r * partial(), r ? 0 : ahead);
                else weigh<1>(values, have, pr, result + r * partial(), r ? 0 : ahead);
            }
        });
    }

    // f(first row, key, rows, elements from a row to the same row of the next page) for the pages that hold keys [lo, hi).
    template <class F>
    void each_page(const E* cache, long b, long h, long lo, long hi, F f) const {
        const long last = (hi - 1) / size;
        for (long i = lo / size; i <= last; i++) {
            const E* at = page(cache, b, h, i);
            const long first = std::max(lo, i * size), have = std::min(hi, (i + 1) * size) - first;
            f(at + (first - i * size) * dim, first, have, i < last ? page(cache, b, h, i + 1) - at : 0);
        }
    }

    // Turns scores p[from:to) into exp(scale (s - largest)), zero elsewhere in [lo, hi); tail[0] and tail[1] take the largest and the sum.
    void soften(float* p, long lo, long from, long to, long hi, float* tail) const {
        float total = 0;
        vf tops = splat(NEVER), sums = {};
        long i = from;
        for (; i + W <= to; i += W) tops = vmax(tops, load<vf>(p + i) * scale);
        float top = largest(tops);
        for (; i < to; i++) top = std::max(top, p[i] * scale);
        i = from;
        for (; i + W <= to; i += W) {
            vf e = vexp(load<vf>(p + i) * scale - top);
            store(p + i, e);
            sums += e;
        }
        for (; i < to; i++) total += p[i] = std::exp(p[i] * scale - top);
        std::fill(p + lo, p + std::min(from, hi), 0.0f);
        std::fill(p + std::max(to, lo), p + hi, 0.0f);
        tail[0] = top;
        tail[1] = total + sum(sums);
    }

    // out[r] += sum over `have` keys of p[r][key] * values[key], in the order of load_half. Fetches the rows `ahead` elements on.
    template <int M>
    void weigh(const E* values, long have, const float* p, float* out, long ahead) const {
        long d = 0;
        for (; d + 2 * W <= dim; d += 2 * W) weigh_columns<M>(values + d, dim, have, p, out + d, ahead);
        if (d == dim) return;
        for (long i = 0; i < have; i++) {  // the rest of a row, padded: reading on would leave the page
            E padded[2 * W] = {};
            std::memcpy(padded, values + i * dim + d, (dim - d) * sizeof(E));
            weigh_columns<M>(padded, 0, 1, p + i, out + d, 0);
        }
    }
    template <int M>
    void weigh_columns(const E* values, long stride, long have, const float* p, float* out, long ahead) const {
        vf even[M], odd[M];
#pragma GCC unroll 4
        for (int r = 0; r < M; r++) {
            even[r] = load<vf>(out + r * partial());
            odd[r] = load<vf>(out + r * partial() + W);
        }
        for (long i = 0; i < have; i++, values += stride) {
            __builtin_prefetch(values + ahead, 0, 2);
            const vf a = load_half<0>(values), b = load_half<1>(values);
#pragma GCC unroll 4
            for (int r = 0; r < M; r++) {
                even[r] += splat(p[r * CHUNK + i]) * a;
                odd[r] += splat(p[r * CHUNK + i]) * b;
            }
        }
#pragma GCC unroll 4
        for (int r = 0; r < M; r++) {
            store(out + r * partial(), even[r]);
            store(out + r * partial() + W, odd[r]);
        }
    }

    void combine(long b, long h, const float* parts, long chunks) const {
        const long m = (start[b + 1] - start[b]) * share, stride = FEW * partial();
        for (long r = 0; r < m; r++) {
            const float* part = parts + r * partial();
            float top = NEVER, total = 0;
            for (long c = 0; c < chunks; c++) top = std::max(top, part[c * stride + spread()]);
            float sums[MAX_DIM] = {};
            for (long c = 0; c < chunks; c++) {
                const float* one = part + c * stride;
                if (one[spread() + 1] == 0) continue;
                const float weight = std::exp(one[spread()] - top);
                total += weight * one[spread() + 1];
#pragma omp simd
                for (long d = 0; d < spread(); d++) sums[d] += weight * one[d];
            }
            E* to = result(b, h, r);
            for (long d = 0; d < dim; d++) to[d] = narrow<E>(sums[d / (2 * W) * 2 * W + place<E>(d % (2 * W))] / total);
        }
    }
    static constexpr long MAX_DIM = 512;

    // --------------------------------------------------------------------------------------------------------- prefill

    size_t block_floats() const { return (2 * PANELS * dim + 2 * dim + PANEL) * (size_t)PANEL + 4 * PANELS * PANEL; }

    void prefill(const Task& task, float* scratch) const {
        const long b = task.b, h = task.h, n = start[b + 1] - start[b], total = n * share, length = lengths[b];
        const long count = std::min<long>(total - task.first, PANELS * PANEL), panels = ceil_div(count, PANEL);
        float *qt = scratch, *sums = qt + PANELS * dim * PANEL, *kt = sums + PANELS * dim * PANEL, *values = kt + dim * PANEL;
        float *scores = values + dim * PANEL, *tops = scores + PANEL * PANEL, *totals = tops + PANELS * PANEL;
        int32_t* own = reinterpret_cast<int32_t*>(totals + PANELS * PANEL);  // position of each row's query
        for (long i = 0; i < panels; i++) {
            const E* from[PANEL];
            const long have = std::min<long>(PANEL, count - i * PANEL);
            for (long r = 0; r < have; r++) from[r] = query(b, h, task.first + i * PANEL + r);
            pack_panel<false>(from, (int)have, dim, qt + i * dim * PANEL);
        }
        for (long r = 0; r < panels * PANEL; r++) own[r] = (int32_t)(length - n + (task.first + std::min(r, count - 1)) / share);
        std::fill_n(sums, panels * dim * PANEL, 0.0f);
        std::fill_n(tops, panels * PANEL, NEVER);
        std::fill_n(totals, panels * PANEL, 0.0f);
        const long lo = window ? std::max(0L, own[0] - window + 1) : 0, hi = own[count - 1] + 1;
        for (long key = lo / PANEL * PANEL; key < hi; key += PANEL) {
            const long keys = std::min<long>(PANEL, hi - key);
            const E* from[PANEL];
            for (long i = 0; i < keys; i++) {
                const long at = std::max(key + i, lo), index = at / size, row = (at - index * size) * dim;  // before lo pages may be gone
                from[i] = page(k, b, h, index) + row;
                widen_row(page(v, b, h, index) + row, values + i * dim, dim);
            }
            pack_panel<false>(from, (int)keys, dim, kt);
            for (long i = 0; i < panels; i++) {
                const int32_t* at = own + i * PANEL;
                if (at[PANEL - 1] < key || (window && at[0] - window + 1 >= key + keys)) continue;  // all hidden
                Tiles tiles(keys);
                for (long t = 0; t < tiles.count; t++) {
                    const long first = tiles.at(t), m = tiles.at(t + 1) - first;
                    micro_of(m)(kt + first, PANEL, qt + i * dim * PANEL, dim, scores + first * PANEL, PANEL, false);
                }
                for (int half = 0; half < 2; half++)
                    fold(scores + half * W, key, keys, at + half * W, tops + i * PANEL + half * W, totals + i * PANEL + half * W,
                         sums + i * dim * PANEL + half * W);
                Tiles columns(dim);
                for (long t = 0; t < columns.count; t++) {
                    const long first = columns.at(t), m = columns.at(t + 1) - first;
                    micro_of(m)(values + first, dim, scores, keys, sums + i * dim * PANEL + first * PANEL, PANEL, true);
                }
            }
        }
        for (long r = 0; r < count; r++) {
            E* to = result(b, h, task.first + r);
            const float* from = sums + r / PANEL * dim * PANEL + r % PANEL;
            for (long d = 0; d < dim; d++) to[d] = narrow<E>(from[d * PANEL] / totals[r]);
        }
    }

    // One round of the online softmax for W rows: scores [key][row] become weights, older sums are rescaled.
    void fold(float* scores, long key, long keys, const int32_t* at, float* tops, float* totals, float* sums) const {
        const vi own = load<vi>(at);
        const bool open = own[0] >= key + keys - 1 && (!window || own[W - 1] - window < key);  // nothing to hide
        const vf old = load<vf>(tops);
        vf top = old, total = {};
        for (long i = 0; i < keys; i++) {
            vf s = load<vf>(scores + i * PANEL) * scale;
            if (!open) s = select(shown(own, key + i), s, splat(NEVER));
            store(scores + i * PANEL, s);
            top = vmax(top, s);
        }
        for (long i = 0; i < keys; i++) {
            vf p = vexp(load<vf>(scores + i * PANEL) - top);
            if (!open) p = select(shown(own, key + i), p, splat(0));
            store(scores + i * PANEL, p);
            total += p;
        }
        const vf rescale = vexp(old - top);
        store(tops, top);
        store(totals, load<vf>(totals) * rescale + total);
        for (long d = 0; d < dim; d++) store(sums + d * PANEL, load<vf>(sums + d * PANEL) * rescale);
    }
    vi shown(vi own, long key) const {
        const int32_t at = (int32_t)key;
        vi visible = own >= at;
        return window ? visible & (own - (int32_t)window < at) : visible;
    }

    // ------------------------------------------------------------------------------------------------------------- run

    void run(long tokens) const {
        static thread_local std::vector<Task> few, many;
        static thread_local std::vector<std::pair<int, int>> joins;  // per (sequence, kv head) in decode: its first task and how many
        few.clear(), many.clear(), joins.clear();
        std::fill_n(out + start[batch] * heads * dim, (tokens - start[batch]) * heads * dim, narrow<E>(0));
        for (long b = 0; b < batch; b++) {
            const long n = start[b + 1] - start[b], m = n * share;
            if (n <= 0) continue;
            if (lengths[b] < n) {
                std::fill_n(out + start[b] * heads * dim, n * heads * dim, narrow<E>(0));
                continue;
            }
            for (long h = 0; h < groups; h++) {
                if (m > (fixed ? std::min(share, FEW) : FEW)) {
                    for (long r = (m - 1) / (PANELS * PANEL) * PANELS * PANEL; r >= 0; r -= PANELS * PANEL)  // the longest first
                        many.push_back({(int)b, (int)h, (int)r, 0});
                    continue;
                }
                const long seen = window ? std::max(0L, lengths[b] - n - window + 1) / CHUNK * CHUNK : 0;
                const int at = (int)few.size();
                for (long c = seen; c < lengths[b]; c += CHUNK) few.push_back({(int)b, (int)h, (int)c, (int)few.size()});
                joins.push_back({at, (int)few.size() - at});
            }
        }
        float* parts = caller_scratch[0].get(few.size() * FEW * partial());
        const long tasks = (long)(few.size() + many.size());
        const Task *decodes = few.data(), *prefills = many.data();
        const std::pair<int, int>* join = joins.data();
        const long decode_count = (long)few.size(), join_count = (long)joins.size();
        const size_t room = std::max<size_t>(block_floats(), FEW * (spread() + CHUNK));
#pragma omp parallel
        {
            float* scratch = own_scratch.get(room);
#pragma omp for schedule(dynamic, 1)
            for (long i = 0; i < tasks; i++) {
                if (i < decode_count) decode(decodes[i], parts + (long)decodes[i].keep * FEW * partial(), scratch);
                else prefill(prefills[i - decode_count], scratch);
            }
#pragma omp for schedule(static)
            for (long i = 0; i < join_count; i++) {
                const Task& first = decodes[join[i].first];
                combine(first.b, first.h, parts + (long)first.keep * FEW * partial(), join[i].second);
            }
        }
    }
};

}  // namespace
