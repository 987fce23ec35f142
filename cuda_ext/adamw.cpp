// AdamW over many runs of memory in one pass: what the pass reads and writes bounds its speed, so whatever else is to
// happen to an element (unscaling, clipping, casts from and to bf16) happens while it is in a register.
//
// Operations and roundings are those of torch.optim.AdamW(fused=True), so that results have the same bits: a fused
// multiply-add exactly where torch's kernels for AVX2 and AVX-512 have one, never where the compiler would like one
// (-ffp-contract=off).

#include "elements.h"
#include "rules.h"

namespace {

// adamw.py knows the layout.

struct Run {  // `size` elements each, which do not overlap
    float* parameter;
    const void* gradient;
    float* exp_avg;
    float* exp_avg_sq;
    bf16* copy;  // of the new parameter; may be null
    int64_t size;
    int64_t gradient_is_bf16;  // else it is float
};

constexpr int64_t chunk_size = 1 << 18;  // elements that a thread takes at a time: few, long streams from memory

template <bool has_fma, typename Gradient, bool has_copy>
__attribute__((always_inline)) inline void update(const Run& run, int64_t begin, int64_t end, const Factors& factors) {
    const Factors f = factors;  // which nothing that is written may be, so that they are read once
    float* __restrict parameter = run.parameter;
    float* __restrict exp_avg = run.exp_avg;
    float* __restrict exp_avg_sq = run.exp_avg_sq;
    bf16* __restrict copy = run.copy;
    const Gradient* __restrict gradient = static_cast<const Gradient*>(run.gradient);
#pragma omp simd
    for (int64_t i = begin; i < end; ++i) {
        const float g = widened(gradient[i]) * f.gradient_scale;
        float m = exp_avg[i], v = exp_avg_sq[i];
        const float p = AdamOf<has_fma>::updated(parameter[i], g, m, v, f);
        exp_avg[i] = m;
        exp_avg_sq[i] = v;
        parameter[i] = p;
        if constexpr (has_copy) copy[i] = narrowed<bf16>(p);
    }
}

using Update = void (*)(const Run&, int64_t, int64_t, const Factors&);

#ifdef __FP_FAST_FMAF
constexpr bool baseline_has_fma = true;
#else
constexpr bool baseline_has_fma = false;
#endif

template <typename Gradient, bool has_copy>
void update_baseline(const Run& run, int64_t begin, int64_t end, const Factors& f) {
    update<baseline_has_fma, Gradient, has_copy>(run, begin, end, f);
}

#ifdef __x86_64__
template <typename Gradient, bool has_copy>
__attribute__((target("avx2,fma"))) void update_avx2(
    const Run& run, int64_t begin, int64_t end, const Factors& f) {
    update<true, Gradient, has_copy>(run, begin, end, f);
}

template <typename Gradient, bool has_copy>
__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,fma"))) void update_avx512(
    const Run& run, int64_t begin, int64_t end, const Factors& f) {
    update<true, Gradient, has_copy>(run, begin, end, f);
}
#endif

int widest() {
#ifdef __x86_64__
    if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma")) return 0;
    const bool has_avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                            __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    return has_avx512 ? 2 : 1;
#else
    return 0;
#endif
}

template <typename Gradient, bool has_copy>
Update of_level(int level) {
#ifdef __x86_64__
    if (level == 2) return update_avx512<Gradient, has_copy>;
    if (level == 1) return update_avx2<Gradient, has_copy>;
#endif
    return update_baseline<Gradient, has_copy>;
}

Update chosen(const Run& run, int level) {
    if (run.gradient_is_bf16) return run.copy ? of_level<bf16, true>(level) : of_level<bf16, false>(level);
    return run.copy ? of_level<float, true>(level) : of_level<float, false>(level);
}

}  // namespace

extern "C" {

// The widest instructions that this processor has and this file has code for: 0 baseline, 1 AVX2, 2 AVX-512.
int adamw_level() { return widest(); }

// level: at most what `adamw_level` returns; threads: how many share the work, one at least.
void adamw(const Run* runs, int64_t count, const Factors* factors, int level, int threads) {
    int64_t total = 0;
    for (int64_t r = 0; r < count; ++r) total += runs[r].size;
#pragma omp parallel num_threads(threads) if (total >= least_for_threads)
    for (int64_t r = 0; r < count; ++r) {
        const Run& run = runs[r];
        const Update update_chunk = chosen(run, level);
        // Without a barrier, so that many small runs keep all threads busy.
#pragma omp for schedule(dynamic) nowait
        for (int64_t begin = 0; begin < run.size; begin += chunk_size) {
            update_chunk(run, begin, std::min(begin + chunk_size, run.size), *factors);
        }
    }
}
}
