// Cross-entropy over logits, and its gradient: a row of logits is read from memory once and its gradient written once;
// between the two it lies in the processor's cache.

#include <cmath>
#include <limits>

#include "elements.h"
#include "functions.h"

namespace {

struct Options {
    float smoothing;
    float z_loss;
};

constexpr int64_t block = 2048;  // elements whose largest is sought before they are added up, in the first cache

struct Row {
    float largest;
    float powers;  // sum of e^(x - largest)
    float total;   // of logits; 0 where it is not wanted

    float log_normalizer() const { return largest + std::log(powers); }
};

template <typename Element>
inline float largest(const Element* x, int64_t size) {
    constexpr int lanes = 64;
    float most[lanes];
    for (float& each : most) each = -std::numeric_limits<float>::infinity();
    int64_t begin = 0;
    for (; begin + lanes <= size; begin += lanes) {
#pragma omp simd
        for (int lane = 0; lane < lanes; ++lane) {
            const float value = widened(x[begin + lane]);
            most[lane] = value > most[lane] ? value : most[lane];
        }
    }
    for (int64_t i = begin; i < size; ++i) most[0] = std::max(most[0], widened(x[i]));
    return *std::max_element(most, most + lanes);
}

template <typename Element>
Row reduced(const Element* x, int64_t size, bool wants_total) {
    constexpr float lowest = std::numeric_limits<float>::lowest();
    float most = lowest, powers = 0, total = 0;  // powers: sum of e^(x - most)
    for (int64_t begin = 0; begin < size; begin += block) {
        const Element* from = x + begin;
        const int64_t count = std::min(block, size - begin);
        const float here = largest(from, count);
        if (here > most) {
            powers *= exponential(most - here);
            most = here;
        }
        const float shift = most;
        powers += sum(count, [=](int64_t i) { return exponential(widened(from[i]) - shift); });
        if (wants_total) total += sum(count, [=](int64_t i) { return widened(from[i]); });
    }
    return {most, powers, total};
}

template <typename Element>
float loss(const Element* x, int64_t size, int64_t target, const Row& row, const Options& options) {
    const float lse = row.log_normalizer();
    float result = (1 - options.smoothing) * (lse - widened(x[target]));
    if (options.smoothing != 0) result += options.smoothing * (lse - row.total / size);
    return result + options.z_loss * lse * lse;
}

// d loss / d x, times `scale`. May be written over x.
template <typename Element>
void gradient(
    const Element* x, Element* to, int64_t size, int64_t target, float log_normalizer, float scale,
    const Options& options) {
    const float of_softmax = scale * (1 + 2 * options.z_loss * log_normalizer);
    const float even = scale * options.smoothing / size;
    const float at_target = of_softmax * exponential(widened(x[target]) - log_normalizer) - even;
#pragma omp simd
    for (int64_t i = 0; i < size; ++i) {
        to[i] = narrowed<Element>(of_softmax * exponential(widened(x[i]) - log_normalizer) - even);
    }
    to[target] = narrowed<Element>(at_target - scale * (1 - options.smoothing));
}

}  // namespace

extern "C" {

// losses, log_normalizers: found where `losses` is not null, else `log_normalizers` is read; gradients: found where not
// null, each row's times `scales` (null: 1).
void cross_entropy(
    const void* logits, const int64_t* targets, const float* scales, float* losses, float* log_normalizers,
    void* gradients, int64_t rows, int64_t columns, int64_t ignored, float smoothing, float z_loss, int64_t is_bf16,
    int64_t threads) {
    const Options options{smoothing, z_loss};
    with_element(is_bf16, [=](auto element) {
        using Element = decltype(element);
        share(rows, columns, threads, [=](int64_t, int64_t begin, int64_t end) {
            for (int64_t row = begin; row < end; ++row) {
                const Element* x = static_cast<const Element*>(logits) + row * columns;
                Element* to = gradients ? static_cast<Element*>(gradients) + row * columns : nullptr;
                const int64_t target = targets[row];
                if (target == ignored) {
                    if (losses) losses[row] = log_normalizers[row] = 0;
                    if (to) std::fill(to, to + columns, Element{0});
                    continue;
                }
                if (losses) {
                    const Row found = reduced(x, columns, smoothing != 0);
                    losses[row] = loss(x, columns, target, found, options);
                    log_normalizers[row] = found.log_normalizer();
                }
                if (to) gradient(x, to, columns, target, log_normalizers[row], scales ? scales[row] : 1, options);
            }
        });
    });
}

// Of rows of which a part of the columns is here, and perhaps not the target's, which is then -1. totals: null where
// they are not wanted.
void cross_entropy_part(
    const void* logits, const int64_t* targets, float* largest, float* powers, float* chosen, float* totals,
    int64_t rows, int64_t columns, int64_t is_bf16, int64_t threads) {
    with_element(is_bf16, [=](auto element) {
        using Element = decltype(element);
        share(rows, columns, threads, [=](int64_t, int64_t begin, int64_t end) {
            for (int64_t row = begin; row < end; ++row) {
                const Element* x = static_cast<const Element*>(logits) + row * columns;
                const Row found = reduced(x, columns, totals != nullptr);
                largest[row] = found.powers == 0 ? -std::numeric_limits<float>::infinity() : found.largest;
                powers[row] = found.powers;
                chosen[row] = targets[row] < 0 ? 0 : widened(x[targets[row]]);
                if (totals) totals[row] = found.total;
            }
        });
    });
}

// gradients: of logits, where those of what `cross_entropy_part` gives are of_powers, of_chosen and of_totals (null: 0);
// may be written over the logits.
void cross_entropy_part_backward(
    const void* logits, const int64_t* targets, const float* largest, const float* of_powers, const float* of_chosen,
    const float* of_totals, void* gradients, int64_t rows, int64_t columns, int64_t is_bf16, int64_t threads) {
    with_element(is_bf16, [=](auto element) {
        using Element = decltype(element);
        share(rows, columns, threads, [=](int64_t, int64_t begin, int64_t end) {
            for (int64_t row = begin; row < end; ++row) {
                const Element* x = static_cast<const Element*>(logits) + row * columns;
                Element* to = static_cast<Element*>(gradients) + row * columns;
                const int64_t target = targets[row];
                const float factor = of_powers[row], even = of_totals ? of_totals[row] : 0;
                const float base = largest[row] == -std::numeric_limits<float>::infinity() ? 0 : largest[row];
                const float at_target = target < 0 ? 0 : widened(x[target]);
#pragma omp simd
                for (int64_t i = 0; i < columns; ++i) {
                    to[i] = narrowed<Element>(factor * exponential(widened(x[i]) - base) + even);
                }
                if (target >= 0) {
                    to[target] = narrowed<Element>(factor * exponential(at_target - base) + even + of_chosen[row]);
                }
            }
        });
    });
}
}
