// LayerNorm and, where `mean` is null, RMSNorm: rows are read from memory once, whatever is computed of them. What a
// row needs again lies in the processor's cache then.

#include <cmath>

#include "elements.h"

namespace {

constexpr int64_t block = 512;  // elements of the next row that are asked for at once

template <typename Element>
struct Forward {
    const Element* x;
    const Element* residual;  // may be null
    const std::uint8_t* mask;  // of x, 0 or 1, where there is a residual; may be null
    float scale;               // of what the mask leaves
    const float* weight;
    const float* bias;
    Element* y;
    Element* summed;    // x + residual
    float* mean;        // null for RMSNorm
    float* inverse;     // of the root
    int64_t width;
    float epsilon;

    void rows(int64_t begin, int64_t end) const {
        for (int64_t row = begin; row < end; ++row) mean ? one<true>(row) : one<false>(row);
    }

    template <bool is_centered>
    void one(int64_t row) const {
        const Element* from = x + row * width;
        float first = 0;  // sum of what is normed, or of its squares
        if (residual) {
            const Element* other = residual + row * width;
            Element* to = summed + row * width;
            const auto put = [=](int64_t i, float x) {
                const Element rounded = narrowed<Element>(x + widened(other[i]));
                to[i] = rounded;
                return is_centered ? widened(rounded) : widened(rounded) * widened(rounded);
            };
            if (mask) {
                const std::uint8_t* kept = mask + row * width;
                const float factor = scale;
                first = sum(width, [=](int64_t i) { return put(i, widened(from[i]) * (kept[i] * factor)); });
            } else {
                first = sum(width, [=](int64_t i) { return put(i, widened(from[i])); });
            }
            from = to;
        } else {
            first = sum(width, [=](int64_t i) {
                return is_centered ? widened(from[i]) : widened(from[i]) * widened(from[i]);
            });
        }
        float center = 0, squares = first;
        if constexpr (is_centered) {
            center = first / width;
            mean[row] = center;
            const Element* next = x + (row + 1) * width;
            squares = 0;
            for (int64_t begin = 0; begin < width; begin += block) {
                const int64_t end = std::min(begin + block, width);
                fetch(next + begin, end - begin);  // memory would rest meanwhile
                squares += sum_of_block(begin, end, [=](int64_t i) {
                    const float apart = widened(from[i]) - center;
                    return apart * apart;
                });
            }
        }
        const float factor = 1 / std::sqrt(squares / width + epsilon);
        inverse[row] = factor;
        Element* to = y + row * width;
        const float *w = weight, *b = bias;
        const int64_t size = width;
        if (is_centered) {
#pragma omp simd
            for (int64_t i = 0; i < size; ++i) {
                to[i] = narrowed<Element>((widened(from[i]) - center) * factor * w[i] + b[i]);
            }
        } else {
#pragma omp simd
            for (int64_t i = 0; i < size; ++i) to[i] = narrowed<Element>(widened(from[i]) * factor * w[i]);
        }
    }
};

template <typename Element>
struct Backward {
    const Element* dy;
    const Element* x;
    const Element* dsum;  // may be null
    const float* weight;
    const float* mean;  // null for RMSNorm
    const float* inverse;
    const std::uint8_t* mask;  // null, or the gradient of what was dropped is written too
    float scale;
    Element* dx;
    Element* ddropped;
    int64_t width;

    void rows(int64_t begin, int64_t end, float* dweight, float* dbias) const {
        for (int64_t row = begin; row < end; ++row) {
            if (mean) {
                dweight ? one<true, true>(row, dweight, dbias) : one<true, false>(row, dweight, dbias);
            } else {
                dweight ? one<false, true>(row, dweight, dbias) : one<false, false>(row, dweight, dbias);
            }
        }
    }

    // With n = (x - mean) * inverse and g = dy * weight: dx = inverse * (g - n * average(g * n) - average(g)), the last
    // for LayerNorm alone.
    template <bool is_centered, bool has_columns>
    void one(int64_t row, float* dweight, float* dbias) const {
        const Element *d = dy + row * width, *from = x + row * width;
        const float *w = weight, factor = inverse[row], center = is_centered ? mean[row] : 0;
        const int64_t size = width;
        float along = 0, total = 0;
#pragma omp simd reduction(+ : along, total)
        for (int64_t i = 0; i < size; ++i) {
            const float normed = (widened(from[i]) - center) * factor, g = widened(d[i]) * w[i];
            along += g * normed;
            if constexpr (is_centered) total += g;
            if constexpr (has_columns) dweight[i] += widened(d[i]) * normed;
            if constexpr (has_columns && is_centered) dbias[i] += widened(d[i]);
        }
        along /= size;
        total /= size;
        Element* to = dx + row * width;
        const Element* more = dsum ? dsum + row * width : nullptr;
        const auto gradient = [=](int64_t i) {
            const float normed = (widened(from[i]) - center) * factor, g = widened(d[i]) * w[i];
            return factor * (g - normed * along - total);
        };
        if (more) {
#pragma omp simd
            for (int64_t i = 0; i < size; ++i) to[i] = narrowed<Element>(gradient(i) + widened(more[i]));
        } else {
#pragma omp simd
            for (int64_t i = 0; i < size; ++i) to[i] = narrowed<Element>(gradient(i));
        }
        if (mask) {
            const std::uint8_t* kept = mask + row * width;
            Element* dropped = ddropped + row * width;
            const float rate = scale;
#pragma omp simd
            for (int64_t i = 0; i < size; ++i) dropped[i] = narrowed<Element>(widened(to[i]) * (kept[i] * rate));
        }
    }
};

}  // namespace

extern "C" {

void norm(
    const void* x, const void* residual, const std::uint8_t* mask, const void* weight, const void* bias, void* y,
    void* summed, float* mean, float* inverse, int64_t rows, int64_t width, float epsilon, float offset, float scale,
    int64_t is_bf16, int64_t weight_is_bf16, int64_t bias_is_bf16, int64_t threads) {
    const Floats weights(weight, weight_is_bf16, width, 1, offset);
    const Floats biases(bias, bias_is_bf16, width, 0);
    with_element(is_bf16, [&](auto element) {
        using Element = decltype(element);
        const Forward<Element> forward{
            static_cast<const Element*>(x), static_cast<const Element*>(residual), mask, scale, weights.data(),
            biases.data(), static_cast<Element*>(y), static_cast<Element*>(summed), mean, inverse, width, epsilon};
        share(rows, width, threads, [&](int64_t, int64_t begin, int64_t end) { forward.rows(begin, end); });
    });
}

// dweight, dbias: of the type of weights; null where they are not wanted.
void norm_backward(
    const void* dy, const void* x, const void* dsum, const std::uint8_t* mask, const void* weight, const float* mean,
    const float* inverse, void* dx, void* ddropped, void* dweight, void* dbias, int64_t rows, int64_t width,
    float offset, float scale, int64_t is_bf16, int64_t weight_is_bf16, int64_t threads) {
    const Floats weights(weight, weight_is_bf16, width, 1, offset);
    const bool has_columns = dweight || dbias;  // without rows, mean is null for LayerNorm too
    ColumnSums of_weight(has_columns, width, threads), of_bias(has_columns && (mean || dbias), width, threads);
    with_element(is_bf16, [&](auto element) {
        using Element = decltype(element);
        const Backward<Element> backward{
            static_cast<const Element*>(dy), static_cast<const Element*>(x), static_cast<const Element*>(dsum),
            weights.data(), mean, inverse, mask, scale, static_cast<Element*>(dx), static_cast<Element*>(ddropped),
            width};
        share(rows, width, threads, [&](int64_t part, int64_t begin, int64_t end) {
            backward.rows(begin, end, of_weight.of(part), of_bias.of(part));
        });
    });
    with_element(weight_is_bf16, [&](auto element) {
        using Element = decltype(element);
        if (dweight) of_weight.write(static_cast<Element*>(dweight));
        if (dbias) of_bias.write(static_cast<Element*>(dbias));
    });
}
}
