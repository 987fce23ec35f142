// Experts of a mixture: which of them a token goes to, tokens by expert, and back with the weighted sum.

#include <cmath>
#include <limits>
#include <numeric>

#include "elements.h"
#include "functions.h"

namespace {

constexpr float infinity = std::numeric_limits<float>::infinity();

template <typename Element>
void softmax(const Element* x, float* to, int64_t size) {
    float most = -infinity;
    for (int64_t i = 0; i < size; ++i) most = std::max(most, widened(x[i]));
    for (int64_t i = 0; i < size; ++i) to[i] = exponential(widened(x[i]) - most);
    const float total = sum(size, [=](int64_t i) { return to[i]; });
#pragma omp simd
    for (int64_t i = 0; i < size; ++i) to[i] /= total;
}

template <typename Element>
void score(const Element* x, float* to, int64_t size, bool is_sigmoid) {
    if (!is_sigmoid) return softmax(x, to, size);
#pragma omp simd
    for (int64_t i = 0; i < size; ++i) to[i] = sigmoid(widened(x[i])).share;
}

// The largest that is not taken, the first of them if there are several; there is one.
int64_t best_of(const float* keys, const char* is_taken, int64_t size) {
    int64_t best = 0;
    while (is_taken[best]) ++best;
    for (int64_t i = best + 1; i < size; ++i) {
        if (!is_taken[i] && keys[i] > keys[best]) best = i;
    }
    return best;
}

// Takes, of experts in groups, those that are not in one of the `top` groups with the largest sum of two keys.
void limit(const float* keys, char* is_taken, int64_t groups, int64_t size, int64_t top) {
    std::vector<float> totals(groups);
    std::vector<char> is_kept(groups, 0);
    for (int64_t group = 0; group < groups; ++group) {
        float first = -infinity, second = -infinity;
        for (int64_t i = group * size; i < (group + 1) * size; ++i) {
            second = std::max(second, std::min(first, keys[i]));
            first = std::max(first, keys[i]);
        }
        totals[group] = first + second;
    }
    for (int64_t i = 0; i < top; ++i) is_kept[best_of(totals.data(), is_kept.data(), groups)] = 1;
    for (int64_t group = 0; group < groups; ++group) {
        std::fill(is_taken + group * size, is_taken + (group + 1) * size, static_cast<char>(!is_kept[group]));
    }
}

}  // namespace

extern "C" {

void route(
    const void* logits, const float* bias, float* weights, int64_t* chosen, int64_t tokens, int64_t experts,
    int64_t top_k, int64_t is_sigmoid, int64_t is_normalized, float epsilon, float scale, int64_t groups,
    int64_t top_groups, int64_t is_bf16, int64_t threads) {
    with_element(is_bf16, [=](auto element) {
        using Element = decltype(element);
        share(tokens, experts * top_k, threads, [=](int64_t, int64_t begin, int64_t end) {
            std::vector<float> scores(experts), keys(experts);
            std::vector<char> is_taken(experts);
            for (int64_t token = begin; token < end; ++token) {
                score(static_cast<const Element*>(logits) + token * experts, scores.data(), experts, is_sigmoid);
                for (int64_t i = 0; i < experts; ++i) {
                    const float key = scores[i] + (bias ? bias[i] : 0.0f);
                    keys[i] = std::isnan(key) ? infinity : key;
                }
                std::fill(is_taken.begin(), is_taken.end(), char{0});
                if (top_groups < groups) limit(keys.data(), is_taken.data(), groups, experts / groups, top_groups);
                float total = epsilon;
                for (int64_t slot = token * top_k; slot < (token + 1) * top_k; ++slot) {
                    chosen[slot] = best_of(keys.data(), is_taken.data(), experts);
                    is_taken[chosen[slot]] = 1;
                    total += weights[slot] = scores[chosen[slot]];
                }
                const float factor = is_normalized ? scale / total : scale;
                for (int64_t slot = token * top_k; slot < (token + 1) * top_k; ++slot) weights[slot] *= factor;
            }
        });
    });
}

void route_backward(
    const void* logits, const float* gradient, const int64_t* chosen, void* of_logits, int64_t tokens, int64_t experts,
    int64_t top_k, int64_t is_sigmoid, int64_t is_normalized, float epsilon, float scale, int64_t is_bf16,
    int64_t threads) {
    with_element(is_bf16, [=](auto element) {
        using Element = decltype(element);
        share(tokens, experts, threads, [=](int64_t, int64_t begin, int64_t end) {
            std::vector<float> scores(experts), of_scores(experts);
            for (int64_t token = begin; token < end; ++token) {
                score(static_cast<const Element*>(logits) + token * experts, scores.data(), experts, is_sigmoid);
                const float* given = gradient + token * top_k;
                const int64_t* at = chosen + token * top_k;
                float total = epsilon, shared = 0, along = 0;
                for (int64_t slot = 0; slot < top_k; ++slot) {
                    total += scores[at[slot]];
                    shared += scale * given[slot] * scores[at[slot]];
                }
                std::fill(of_scores.begin(), of_scores.end(), 0.0f);
                for (int64_t slot = 0; slot < top_k; ++slot) {
                    const float own = scale * given[slot];
                    of_scores[at[slot]] = is_normalized ? (own - shared / total) / total : own;
                    along += of_scores[at[slot]] * scores[at[slot]];
                }
                Element* to = static_cast<Element*>(of_logits) + token * experts;
                for (int64_t i = 0; i < experts; ++i) {
                    const float inner = is_sigmoid ? of_scores[i] * (1 - scores[i]) : of_scores[i] - along;
                    to[i] = narrowed<Element>(scores[i] * inner);
                }
            }
        });
    });
}

void sort_by_expert(
    const int64_t* chosen, int64_t* order, int64_t* places, int* ends, int64_t count, int64_t experts, int64_t) {
    const auto expert = [=](int64_t i) { return chosen[i] < 0 || chosen[i] >= experts ? experts : chosen[i]; };
    std::vector<int64_t> next(experts + 2, 0);
    for (int64_t i = 0; i < count; ++i) ++next[expert(i) + 1];
    std::partial_sum(next.begin(), next.end(), next.begin());
    for (int64_t i = 0; i < experts; ++i) ends[i] = static_cast<int>(next[i + 1]);
    for (int64_t i = 0; i < count; ++i) {
        places[i] = next[expert(i)]++;
        order[places[i]] = i;
    }
}

// width: of a row, in bytes.
void permute_tokens(
    const char* x, const int64_t* places, char* rows, int64_t tokens, int64_t top_k, int64_t width, int64_t threads) {
    share(tokens, top_k * width / 4, threads, [=](int64_t, int64_t begin, int64_t end) {
        for (int64_t slot = begin * top_k; slot < end * top_k; ++slot) {
            std::memcpy(rows + places[slot] * width, x + slot / top_k * width, width);
        }
    });
}

void unpermute_tokens(
    const void* rows, const float* weights, const int64_t* places, void* y, int64_t tokens, int64_t top_k,
    int64_t width, int64_t is_bf16, int64_t threads) {
    constexpr int64_t block = 1024;  // elements that are added up at once, in the first cache
    with_element(is_bf16, [=](auto element) {
        using Element = decltype(element);
        share(tokens, top_k * width, threads, [=](int64_t, int64_t begin, int64_t end) {
            float total[block];
            for (int64_t token = begin; token < end; ++token) {
                for (int64_t first = 0; first < width; first += block) {
                    const int64_t size = std::min(block, width - first);
                    std::fill(total, total + size, 0.0f);
                    for (int64_t slot = token * top_k; slot < (token + 1) * top_k; ++slot) {
                        const Element* row = static_cast<const Element*>(rows) + places[slot] * width + first;
                        const float weight = weights ? weights[slot] : 1.0f;
#pragma omp simd
                        for (int64_t i = 0; i < size; ++i) total[i] += weight * widened(row[i]);
                    }
                    Element* to = static_cast<Element*>(y) + token * width + first;
#pragma omp simd
                    for (int64_t i = 0; i < size; ++i) to[i] = narrowed<Element>(total[i]);
                }
            }
        });
    });
}

void unpermute_tokens_backward(
    const void* gradient, const void* rows, const float* weights, const int64_t* places, void* of_rows,
    float* of_weights, int64_t tokens, int64_t top_k, int64_t width, int64_t is_bf16, int64_t threads) {
    with_element(is_bf16, [=](auto element) {
        using Element = decltype(element);
        share(tokens, top_k * width, threads, [=](int64_t, int64_t begin, int64_t end) {
            for (int64_t slot = begin * top_k; slot < end * top_k; ++slot) {
                const Element* given = static_cast<const Element*>(gradient) + slot / top_k * width;
                const Element* row = static_cast<const Element*>(rows) + places[slot] * width;
                Element* to = static_cast<Element*>(of_rows) + places[slot] * width;
                const float weight = weights[slot];
                of_weights[slot] = sum(width, [=](int64_t i) { return widened(given[i]) * widened(row[i]); });
#pragma omp simd
                for (int64_t i = 0; i < width; ++i) to[i] = narrowed<Element>(weight * widened(given[i]));
            }
        });
    });
}
}
