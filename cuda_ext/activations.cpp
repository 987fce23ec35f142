// Activations with what stands beside them (the product of a gated unit, the bias of a linear layer), in one pass over
// memory each way. Backward computes them again rather than read what forward would have had to write.

#include "elements.h"
#include "functions.h"

namespace {

struct Point {
    float value;
    float slope;
};

struct Silu {
    static Point at(float x) {
        const Sigmoid s = sigmoid(x);
        return {x * s.share, s.share * (1 + x * s.rest)};
    }
};

struct Gelu {
    static Point at(float x) {
        const float below = normal_below(x);
        return {x * below, below + x * normal_density(x)};
    }
};

// x sigmoid(2 u) with u = sqrt(2 / pi) (x + 0.044715 x^3), for 1 + tanh(u) = 2 sigmoid(2 u).
struct GeluTanh {
    static Point at(float x) {
        constexpr float twice_root = 1.595769122f, cubic = 0.044715f;
        const float within = x > 30 ? 30 : x < -30 ? -30 : x;  // the slope is 1 or 0 beyond; cubes would overflow
        const float square = within * within;
        const Sigmoid s = sigmoid(twice_root * within * (1 + cubic * square));
        return {x * s.share, s.share * (1 + within * s.rest * twice_root * (1 + 3 * cubic * square))};
    }
};

// activation: as in activations.py.
template <typename Run>
void with_activation(int64_t activation, Run run) {
    switch (activation) {
        case 0: return run(Silu{});
        case 1: return run(Gelu{});
        default: return run(GeluTanh{});
    }
}

template <typename Run>
void with_both(int64_t activation, int64_t is_bf16, Run run) {
    with_activation(activation, [&](auto function) {
        with_element(is_bf16, [&](auto element) { run(function, element); });
    });
}

}  // namespace

extern "C" {

// Rows of `gate` and `up` are as many elements apart as their strides say.
void gated(
    const void* gate, const void* up, void* y, int64_t rows, int64_t width, int64_t gate_stride, int64_t up_stride,
    int64_t activation, int64_t is_bf16, int64_t threads) {
    with_both(activation, is_bf16, [=](auto function, auto element) {
        using Element = decltype(element);
        share(rows, width, threads, [=](int64_t, int64_t begin, int64_t end) {
            for (int64_t row = begin; row < end; ++row) {
                const Element* g = static_cast<const Element*>(gate) + row * gate_stride;
                const Element* u = static_cast<const Element*>(up) + row * up_stride;
                Element* to = static_cast<Element*>(y) + row * width;
#pragma omp simd
                for (int64_t i = 0; i < width; ++i) {
                    to[i] = narrowed<Element>(function.at(widened(g[i])).value * widened(u[i]));
                }
            }
        });
    });
}

void gated_backward(
    const void* dy, const void* gate, const void* up, void* dgate, void* dup, int64_t rows, int64_t width,
    int64_t gate_stride, int64_t up_stride, int64_t activation, int64_t is_bf16, int64_t threads) {
    with_both(activation, is_bf16, [=](auto function, auto element) {
        using Element = decltype(element);
        share(rows, width, threads, [=](int64_t, int64_t begin, int64_t end) {
            for (int64_t row = begin; row < end; ++row) {
                const Element* d = static_cast<const Element*>(dy) + row * width;
                const Element* g = static_cast<const Element*>(gate) + row * gate_stride;
                const Element* u = static_cast<const Element*>(up) + row * up_stride;
                Element* to_gate = static_cast<Element*>(dgate) + row * width;
                Element* to_up = static_cast<Element*>(dup) + row * width;
#pragma omp simd
                for (int64_t i = 0; i < width; ++i) {
                    const Point point = function.at(widened(g[i]));
                    to_gate[i] = narrowed<Element>(widened(d[i]) * widened(u[i]) * point.slope);
                    to_up[i] = narrowed<Element>(widened(d[i]) * point.value);
                }
            }
        });
    });
}

void bias_activation(
    const void* x, const void* bias, void* y, int64_t rows, int64_t width, int64_t activation, int64_t is_bf16,
    int64_t bias_is_bf16, int64_t threads) {
    const Floats biases(bias, bias_is_bf16, width, 0);
    const float* b = biases.data();
    with_both(activation, is_bf16, [=](auto function, auto element) {
        using Element = decltype(element);
        share(rows, width, threads, [=](int64_t, int64_t begin, int64_t end) {
            for (int64_t row = begin; row < end; ++row) {
                const Element* from = static_cast<const Element*>(x) + row * width;
                Element* to = static_cast<Element*>(y) + row * width;
#pragma omp simd
                for (int64_t i = 0; i < width; ++i) {
                    to[i] = narrowed<Element>(function.at(widened(from[i]) + b[i]).value);
                }
            }
        });
    });
}

// dbias: of the type of bias; null where there is none.
void bias_activation_backward(
    const void* dy, const void* x, const void* bias, void* dx, void* dbias, int64_t rows, int64_t width,
    int64_t activation, int64_t is_bf16, int64_t bias_is_bf16, int64_t threads) {
    const Floats biases(bias, bias_is_bf16, width, 0);
    const float* b = biases.data();
    ColumnSums columns(true, width, threads);
    with_both(activation, is_bf16, [&](auto function, auto element) {
        using Element = decltype(element);
        share(rows, width, threads, [&](int64_t part, int64_t begin, int64_t end) {
            float* total = columns.of(part);
            for (int64_t row = begin; row < end; ++row) {
                const Element* d = static_cast<const Element*>(dy) + row * width;
                const Element* from = static_cast<const Element*>(x) + row * width;
                Element* to = static_cast<Element*>(dx) + row * width;
#pragma omp simd
                for (int64_t i = 0; i < width; ++i) {
                    const float gradient = widened(d[i]) * function.at(widened(from[i]) + b[i]).slope;
                    total[i] += gradient;
                    to[i] = narrowed<Element>(gradient);
                }
            }
        });
    });
    if (!dbias) return;
    with_element(bias_is_bf16, [&](auto element) { columns.write(static_cast<decltype(element)*>(dbias)); });
}
}
