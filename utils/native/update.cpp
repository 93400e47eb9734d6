// One optimizer step with masks in one pass: torch.optim's arithmetic at live places, +0.0 at pruned ones.
//
// Per element and step torch reads and writes weights, gradients and state several times, and masking them takes further
// passes; here each is touched once. Where torch multiplies and adds in one rounding, so does this: compiled without
// contraction of a * b + c, every fused operation below is written out. Pruned places are selected away, never
// multiplied: inf and NaN there end as +0.0. Elements are independent of each other, so threads change no bit.

#include <cmath>
#include <cstdint>
#include <system_error>
#include <thread>
#include <vector>

namespace {

#if defined(__x86_64__) && defined(__GNUC__)
#define ALWAYS_INLINE inline __attribute__((always_inline))
#define WIDE __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq")))
#define NARROW __attribute__((target("avx2,fma")))

bool has_wide() {
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
}
bool has_narrow() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }

// What every step has: one entry a tensor, and how many threads share the elements of all of them.
struct Tensors {
    int64_t count;
    float *const *weights;
    const float *const *gradients;
    float *const *first;         // momentum, or mean of the gradients
    float *const *second;        // mean of their squares
    const uint8_t *const *live;  // 1 where a weight lives; null: all do
    const int64_t *sizes;
    const uint8_t *fresh;  // no momentum yet
};

struct Sgd {
    float rate, momentum, undamped, decay;
    bool nesterov;
};

struct Adam {
    float kept, decay, lerp, beta2, rest2, correction2, eps, step;
    bool decoupled;
    int64_t vector;  // elements of torch's vector registers: what is left over at a tensor's end is rounded otherwise
};

template <bool MASKED>
ALWAYS_INLINE float select(const uint8_t *live, int64_t i, float value) {
    return !MASKED || live[i] ? value : 0.0f;
}

// torch.optim.SGD with foreach=True.
template <bool MASKED, bool DECAY, bool MOMENTUM, bool FRESH, bool NESTEROV>
ALWAYS_INLINE void sgd(const Tensors &all, int64_t t, int64_t begin, int64_t end, const Sgd &c) {
    float *__restrict weights = all.weights[t];
    const float *__restrict gradients = all.gradients[t];
    float *__restrict buffer = MOMENTUM ? all.first[t] : nullptr;
    const uint8_t *__restrict live = all.live[t];
    const float rate = -c.rate, momentum = c.momentum, undamped = c.undamped, decay = c.decay;
    for (int64_t i = begin; i < end; ++i) {
        const float gradient = DECAY ? __builtin_fmaf(weights[i], decay, gradients[i]) : gradients[i];
        float move = gradient;
        if (MOMENTUM) {
            if (!FRESH) move = __builtin_fmaf(gradient, undamped, buffer[i] * momentum);
            buffer[i] = select<MASKED>(live, i, move);
            if (NESTEROV) move = __builtin_fmaf(move, momentum, gradient);
        }
        weights[i] = select<MASKED>(live, i, __builtin_fmaf(move, rate, weights[i]));
    }
}

template <bool MASKED, bool DECAY>
ALWAYS_INLINE void sgd_of(const Tensors &all, int64_t t, int64_t begin, int64_t end, const Sgd &c) {
    if (all.first == nullptr) return sgd<MASKED, DECAY, false, false, false>(all, t, begin, end, c);
    if (all.fresh[t]) {
        if (c.nesterov) return sgd<MASKED, DECAY, true, true, true>(all, t, begin, end, c);
        return sgd<MASKED, DECAY, true, true, false>(all, t, begin, end, c);
    }
    if (c.nesterov) return sgd<MASKED, DECAY, true, false, true>(all, t, begin, end, c);
    return sgd<MASKED, DECAY, true, false, false>(all, t, begin, end, c);
}

ALWAYS_INLINE void part(const Tensors &all, int64_t t, int64_t begin, int64_t end, const Sgd &c) {
    const bool masked = all.live[t] != nullptr, decay = c.decay != 0.0f;
    if (masked && decay) return sgd_of<true, true>(all, t, begin, end, c);
    if (masked) return sgd_of<true, false>(all, t, begin, end, c);
    if (decay) return sgd_of<false, true>(all, t, begin, end, c);
    return sgd_of<false, false>(all, t, begin, end, c);
}

// torch.optim.Adam and AdamW with fused=True. Its loop over whole vectors and the loop over what is left of a tensor
// contract the second moment differently; LEFT is the latter.
template <bool MASKED, bool DECAY, bool DECOUPLED, bool LEFT>
ALWAYS_INLINE void adam(const Tensors &all, int64_t t, int64_t begin, int64_t end, const Adam &c) {
    float *__restrict weights = all.weights[t];
    const float *__restrict gradients = all.gradients[t];
    float *__restrict first = all.first[t];
    float *__restrict second = all.second[t];
    const uint8_t *__restrict live = all.live[t];
    const bool small = std::fabs(c.lerp) < 0.5f;
    const float toward = small ? c.lerp : c.lerp - 1.0f;
    const Adam k = c;
    for (int64_t i = begin; i < end; ++i) {
        float weight = weights[i], gradient = gradients[i];
        if (DECAY && DECOUPLED) weight *= k.kept;
        if (DECAY && !DECOUPLED) gradient = __builtin_fmaf(weight, k.decay, gradient);
        const float mean = __builtin_fmaf(toward, gradient - first[i], small ? first[i] : gradient);
        const float scaled = k.rest2 * gradient;
        const float square = LEFT ? __builtin_fmaf(second[i], k.beta2, scaled * gradient)
                                  : __builtin_fmaf(scaled, gradient, second[i] * k.beta2);
        const float root = __builtin_sqrtf(square) / k.correction2 + k.eps;
        weight = weight + (k.step * mean) / root;
        first[i] = select<MASKED>(live, i, mean);
        second[i] = select<MASKED>(live, i, square);
        weights[i] = select<MASKED>(live, i, weight);
    }
}

template <bool MASKED, bool DECAY, bool DECOUPLED>
ALWAYS_INLINE void adam_of(const Tensors &all, int64_t t, int64_t begin, int64_t end, const Adam &c) {
    const int64_t whole = all.sizes[t] - all.sizes[t] % c.vector;
    if (begin < whole) adam<MASKED, DECAY, DECOUPLED, false>(all, t, begin, end < whole ? end : whole, c);
    if (end > whole) adam<MASKED, DECAY, DECOUPLED, true>(all, t, begin > whole ? begin : whole, end, c);
}

template <bool MASKED>
ALWAYS_INLINE void adam_kind(const Tensors &all, int64_t t, int64_t begin, int64_t end, const Adam &c) {
    if (c.decay == 0.0f) return adam_of<MASKED, false, false>(all, t, begin, end, c);
    if (c.decoupled) return adam_of<MASKED, true, true>(all, t, begin, end, c);
    return adam_of<MASKED, true, false>(all, t, begin, end, c);
}

ALWAYS_INLINE void part(const Tensors &all, int64_t t, int64_t begin, int64_t end, const Adam &c) {
    if (all.live[t] != nullptr) return adam_kind<true>(all, t, begin, end, c);
    return adam_kind<false>(all, t, begin, end, c);
}

WIDE void wide(const Tensors &all, int64_t t, int64_t begin, int64_t end, const Sgd &c) { part(all, t, begin, end, c); }
WIDE void wide(const Tensors &all, int64_t t, int64_t begin, int64_t end, const Adam &c) { part(all, t, begin, end, c); }
NARROW void narrow(const Tensors &all, int64_t t, int64_t begin, int64_t end, const Sgd &c) {
    part(all, t, begin, end, c);
}
NARROW void narrow(const Tensors &all, int64_t t, int64_t begin, int64_t end, const Adam &c) {
    part(all, t, begin, end, c);
}

// Elements `begin` to `end` of all tensors laid end to end.
template <class Constants>
void range(const Tensors &all, int64_t begin, int64_t end, const Constants &c) {
    const bool best = has_wide();
    int64_t start = 0;
    for (int64_t t = 0; t < all.count && start < end; ++t) {
        const int64_t size = all.sizes[t];
        const int64_t from = begin > start ? begin - start : 0, to = end - start < size ? end - start : size;
        if (from < to) best ? wide(all, t, from, to, c) : narrow(all, t, from, to, c);
        start += size;
    }
}

template <class Constants>
int64_t run(const Tensors &all, int64_t threads, const Constants &c) {
    if (!has_wide() && !has_narrow()) return 1;
    int64_t total = 0;
    for (int64_t t = 0; t < all.count; ++t) total += all.sizes[t];
    constexpr int64_t worth = 1 << 16;  // elements a thread is started for, 0.1 ms of work
    if (threads > total / worth) threads = total / worth;
    if (threads <= 1) {
        range(all, 0, total, c);
        return 0;
    }
    const int64_t share = (total / threads + 15) / 16 * 16;
    const auto part_of = [&](int64_t n) { range(all, n * share, n + 1 < threads ? (n + 1) * share : total, c); };
    std::vector<std::thread> others;
    try {
        for (int64_t n = 1; n < threads; ++n) others.emplace_back([&part_of, n] { part_of(n); });
    } catch (const std::system_error &) {  // no more threads are allowed here: this one does the rest
    }
    part_of(0);
    for (int64_t n = static_cast<int64_t>(others.size()) + 1; n < threads; ++n) part_of(n);
    for (std::thread &other : others) other.join();
    return 0;
}
#endif

}  // namespace

// Both return 0 when done, 1 where the CPU lacks AVX2 and FMA: nothing was touched then. `first` may be null for SGD
// without momentum. Constants are torch's: those it computes in double are given so.
extern "C" int64_t sieve_sgd(int64_t count, float *const *weights, const float *const *gradients, float *const *momenta,
                             const uint8_t *const *live, const int64_t *sizes, const uint8_t *fresh, double rate,
                             double momentum, double dampening, double decay, int64_t nesterov, int64_t threads) {
#ifdef ALWAYS_INLINE
    const Tensors all{count, weights, gradients, momenta, nullptr, live, sizes, fresh};
    const Sgd constants{static_cast<float>(rate), static_cast<float>(momentum), static_cast<float>(1.0 - dampening),
                        static_cast<float>(decay), nesterov != 0};
    return run(all, threads, constants);
#else
    return 1;
#endif
}

extern "C" int64_t sieve_adam(int64_t count, float *const *weights, const float *const *gradients, float *const *first,
                              float *const *second, const uint8_t *const *live, const int64_t *sizes, double rate,
                              double beta1, double beta2, double eps, double decay, int64_t decoupled, double steps,
                              int64_t vector, int64_t threads) {
#ifdef ALWAYS_INLINE
    const Tensors all{count, weights, gradients, first, second, live, sizes, nullptr};
    const double correction1 = 1.0 - std::pow(beta1, steps), correction2 = 1.0 - std::pow(beta2, steps);
    const Adam constants{static_cast<float>(1.0 - rate * decay),
                         static_cast<float>(decay),
                         static_cast<float>(1.0 - beta1),
                         static_cast<float>(beta2),
                         static_cast<float>(1.0 - beta2),
                         static_cast<float>(std::sqrt(correction2)),
                         static_cast<float>(eps),
                         static_cast<float>(-(rate / correction1)),
                         decoupled != 0,
                         vector};
    return run(all, threads, constants);
#else
    return 1;
#endif
}
