// SGD, Adagrad, Lion, Adam and LAMB over many runs of memory, each in one pass, LAMB in two: what is read and written bounds
// their speed, so unscaling and the cast of the copy happen while an element is in a register.

#include "elements.h"
#include "rules.h"

namespace {

// optimizers.py knows the layout, and numbers the rules.

struct Run {  // `size` elements each, which do not overlap
    float* parameter;
    const void* gradient;
    float* state;   // null where the rule has none
    float* second;  // of LAMB
    bf16* copy;     // of the new parameter; may be null
    int64_t size;
    int64_t gradient_is_bf16;  // else it is float
};

constexpr int64_t chunk_size = 1 << 14;  // elements that a thread takes at a time

template <typename Rule, int states, typename Gradient>
void update(const Run& run, int64_t begin, int64_t end, const Factors& f) {
    const Gradient* gradient = static_cast<const Gradient*>(run.gradient);
    float *parameter = run.parameter, *state = run.state, *second = run.second;
#pragma omp simd
    for (int64_t i = begin; i < end; ++i) {
        float held = states > 0 ? state[i] : 0, also = states > 1 ? second[i] : 0;
        parameter[i] = Rule::updated(parameter[i], widened(gradient[i]) * f.gradient_scale, held, also, f);
        if constexpr (states > 0) state[i] = held;
        if constexpr (states > 1) second[i] = also;
    }
}

#ifdef __FP_FAST_FMAF
using Adam = AdamOf<true>;
#else
using Adam = AdamOf<false>;
#endif

struct Squares {
    double parameter = 0;
    double direction = 0;
};

template <typename Gradient>
Squares lamb_moments(const Run& run, int64_t begin, int64_t end, const Factors& f) {
    const Gradient* gradient = static_cast<const Gradient*>(run.gradient);
    float *first = run.state, *second = run.second, of_parameter = 0, of_direction = 0;
    const float* parameter = run.parameter;
#pragma omp simd reduction(+ : of_parameter, of_direction)
    for (int64_t i = begin; i < end; ++i) {
        const float g = widened(gradient[i]) * f.gradient_scale;
        Lamb::advance(g, first[i], second[i], f);
        const float direction = Lamb::direction(parameter[i], first[i], second[i], f);
        of_parameter += parameter[i] * parameter[i];
        of_direction += direction * direction;
    }
    return {of_parameter, of_direction};
}

void lamb_step(const Run& run, int64_t begin, int64_t end, float rate, const Factors& f) {
    float* parameter = run.parameter;
    const float *first = run.state, *second = run.second;
#pragma omp simd
    for (int64_t i = begin; i < end; ++i) parameter[i] -= rate * Lamb::direction(parameter[i], first[i], second[i], f);
}

void write_copy(const Run& run, int64_t begin, int64_t end) {
    if (!run.copy) return;
#pragma omp simd
    for (int64_t i = begin; i < end; ++i) run.copy[i] = narrowed<bf16>(run.parameter[i]);
}

struct Chunk {
    int64_t run, begin, end;
};

std::vector<Chunk> chunks(const Run* runs, int64_t count) {
    std::vector<Chunk> found;
    for (int64_t r = 0; r < count; ++r) {
        for (int64_t begin = 0; begin < runs[r].size; begin += chunk_size) {
            found.push_back({r, begin, std::min(begin + chunk_size, runs[r].size)});
        }
    }
    return found;
}

}  // namespace

extern "C" {

// rule: 0 SGD, 1 Adagrad, 2 Lion, 3 Adam.
void optimize(const Run* runs, const Factors* factors, int64_t count, int64_t rule, int64_t threads) {
    const auto parts = chunks(runs, count);
    share(static_cast<int64_t>(parts.size()), chunk_size, threads, [&](int64_t, int64_t from, int64_t to) {
        for (int64_t i = from; i < to; ++i) {
            const auto [r, begin, end] = parts[i];
            with_element(runs[r].gradient_is_bf16, [&, begin = begin, end = end, &run = runs[r]](auto element) {
                using Gradient = decltype(element);
                switch (rule) {
                    case 0:
                        return run.state ? update<Sgd, 1, Gradient>(run, begin, end, *factors)
                                         : update<Sgd, 0, Gradient>(run, begin, end, *factors);
                    case 1: return update<Adagrad, 1, Gradient>(run, begin, end, *factors);
                    case 2: return update<Lion, 1, Gradient>(run, begin, end, *factors);
                    default: return update<Adam, 2, Gradient>(run, begin, end, *factors);
                }
            });
            write_copy(runs[r], begin, end);  // from the first cache
        }
    });
}

// Steps of each run are as long as its parameter, so their lengths are found before any is taken.
void lamb(const Run* runs, const Factors* factors, int64_t count, int64_t threads) {
    const auto parts = chunks(runs, count);
    const auto size = static_cast<int64_t>(parts.size());
    std::vector<Squares> squares(parts.size()), of_runs(static_cast<std::size_t>(count));
    share(size, chunk_size, threads, [&](int64_t, int64_t from, int64_t to) {
        for (int64_t i = from; i < to; ++i) {
            const Run& run = runs[parts[i].run];
            squares[i] = run.gradient_is_bf16 ? lamb_moments<bf16>(run, parts[i].begin, parts[i].end, *factors)
                                              : lamb_moments<float>(run, parts[i].begin, parts[i].end, *factors);
        }
    });
    for (int64_t i = 0; i < size; ++i) {  // in one order, whatever the threads
        of_runs[parts[i].run].parameter += squares[i].parameter;
        of_runs[parts[i].run].direction += squares[i].direction;
    }
    share(size, chunk_size, threads, [&](int64_t, int64_t from, int64_t to) {
        for (int64_t i = from; i < to; ++i) {
            const auto& [r, begin, end] = parts[i];
            const double trust = Lamb::trust(of_runs[r].parameter, of_runs[r].direction);
            lamb_step(runs[r], begin, end, static_cast<float>(factors->rate * trust), *factors);
            write_copy(runs[r], begin, end);
        }
    });
}
}
