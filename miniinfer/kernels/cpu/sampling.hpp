// Sampling: one token per row of logits by the Gumbel-max rule, with reference.py's counter-based numbers.

#pragma once

#include "vector.hpp"

namespace {

template <class U>
inline U mix(U x) {  // murmur3's finalizer
    x = (x ^ (x >> 16)) * 0x85EBCA6Bu;
    x = (x ^ (x >> 13)) * 0xC2B2AE35u;
    return x ^ (x >> 16);
}
inline uint32_t sampling_key(int64_t seed, int32_t position) {
    return mix<uint32_t>(mix<uint32_t>(mix<uint32_t>((uint32_t)seed) ^ (uint32_t)((uint64_t)seed >> 32)) ^ (uint32_t)position);
}
inline vf gumbel(vu lane, uint32_t key) {
    vu bits = mix<vu>(mix<vu>(lane * 0x9E3779B1u ^ key) + key);
    vf u = (__builtin_convertvector((vi)(bits >> 9), vf) + 0.5f) * 0x1p-23f;
    return -vlog(-vlog(u));
}

struct Best {  // the largest value seen in each lane and the first place that had it
    vf value = splat(-INFINITY);
    vi index = vi{} + INT32_MAX;
    void see(vf v, vi at) {
        vi better = (vi)(v > value);
        value = select(better, v, value);
        index = (at & better) | (index & ~better);
    }
    int32_t pick() const {  // -1 if it is not finite
        float top = value[0];
        int32_t at = index[0];
        for (int i = 1; i < W; i++)
            if (value[i] > top || (value[i] == top && index[i] < at)) top = value[i], at = index[i];
        return std::isfinite(top) ? at : -1;
    }
};

inline vi lanes() {
    vi v;
    for (int i = 0; i < W; i++) v[i] = i;
    return v;
}

// argmax of x[i] / temperature + noise, or of x alone if temperature is 0.
int32_t sample_row(const float* x, long n, float temperature, uint32_t key) {
    Best best;
    vi at = lanes();
    for (long i = 0; i < n; i += W, at += W) {
        vf v = splat(-INFINITY);
        if (i + W <= n) v = load<vf>(x + i);
        else std::memcpy(&v, x + i, (n - i) * 4);
        if (temperature > 0) v = v / temperature + gumbel((vu)at, key);
        best.see(v, at);
    }
    return best.pick();
}

struct Candidate {
    float value;
    int32_t id;
    bool operator<(const Candidate& o) const { return value > o.value || (value == o.value && id < o.id); }  // likeliest first
};

// The same among the tokens that top-k, top-p and min-p leave. `ordered` holds the row's candidates; only its head is ever sorted.
int32_t sample_filtered(const float* x, long n, float temperature, long top_k, float top_p, float min_p, uint32_t key,
                        std::vector<Candidate>& ordered) {
    vf tops = splat(-INFINITY);
    long i = 0;
    for (; i + W <= n; i += W) tops = vmax(load<vf>(x + i), tops);
    float top = largest(tops);
    for (; i < n; i++) top = std::max(top, x[i]);
    top /= temperature;
    ordered.clear();
    for (i = 0; i < n; i++) {
        const float v = x[i] / temperature;
        if (v > -INFINITY) ordered.push_back({v, (int32_t)i});
    }
    const long count = (long)ordered.size(), limit = top_k > 0 ? std::min(top_k, count) : count;
    if (count == 0) return -1;
    long sorted = 0;
    auto sort_to = [&](long want) {
        want = std::min(want, count);
        if (want <= sorted) return;
        if (want < count) std::nth_element(ordered.begin() + sorted, ordered.begin() + want, ordered.begin() + count);
        std::sort(ordered.begin() + sorted, ordered.begin() + want);
        sorted = want;
    };
    double mass = 0;  // of what top-k leaves, relative to the likeliest token
    if (limit < count) {
        sort_to(limit);
        for (i = 0; i < limit; i++) mass += std::exp(ordered[i].value - top);
    } else if (top_p < 1) {
        vf sums = {};
        for (i = 0; i + W <= n; i += W) sums += vexp(load<vf>(x + i) / temperature - top);
        mass = sum(sums);
        for (; i < n; i++) mass += std::exp(x[i] / temperature - top);
    }
    Candidate best = {-INFINITY, 0};
    double before = 0;
    for (i = 0; i < limit; i++) {
        if (i >= sorted) sort_to(std::max(256L, 4 * sorted));
        const float p = std::exp(ordered[i].value - top);
        if (i > 0 && ((top_p < 1 && before >= top_p * mass) || p < min_p)) break;
        before += p;
        const vf noise = gumbel(vu{} + (uint32_t)ordered[i].id, key);
        const Candidate now = {ordered[i].value + noise[0], ordered[i].id};
        if (i == 0 || now < best) best = now;
    }
    return std::isfinite(best.value) ? best.id : -1;
}

}  // namespace
