// Products of few rows with a matrix of int8 or int4: weights are read from memory once and become floats in a register.
// A tile of outputs by rows shares each weight among its rows, and each element of a row among its outputs.

#include "elements.h"

namespace {

#if defined(__AVX512F__)
constexpr int lanes = 16;
#elif defined(__AVX2__)
constexpr int lanes = 8;
#else
constexpr int lanes = 4;
#endif
typedef float Vector __attribute__((vector_size(4 * lanes)));
typedef std::int8_t Int8s __attribute__((vector_size(lanes)));
typedef std::uint8_t Uint8s __attribute__((vector_size(lanes)));

template <typename Values>
inline Values loaded(const void* from) {
    Values values;
    std::memcpy(&values, from, sizeof values);
    return values;
}

inline float total(Vector vector) {
    float result = 0;
    for (int lane = 0; lane < lanes; ++lane) result += vector[lane];
    return result;
}

struct Matrix {
    const void* values;
    const float* scales;
    const float* zeros;  // null: the middle of the range
    int64_t inputs, outputs, group;
};

// What is there of a group: vectors of weights and the place of their first input; then single ones.

struct Int8 {
    static constexpr float middle = 0;
    template <typename Whole, typename Single>
    static void walk(const Matrix& m, int64_t begin, Whole whole, Single single) {
        const auto* values = static_cast<const std::int8_t*>(m.values);
        int64_t i = begin;
        const int64_t end = begin + m.group;
        for (; i + lanes <= end; i += lanes) {
            whole(i, [=](int64_t output) {
                return __builtin_convertvector(loaded<Int8s>(values + output * m.inputs + i), Vector);
            });
        }
        for (; i < end; ++i) {
            single(i, [=](int64_t output) { return static_cast<float>(values[output * m.inputs + i]); });
        }
    }
};

struct Int4 {
    static constexpr float middle = 8;
    template <typename Whole, typename Single>
    static void walk(const Matrix& m, int64_t begin, Whole whole, Single single) {
        const auto* values = static_cast<const std::uint8_t*>(m.values) + begin / 2;
        const int64_t half = m.group / 2, row = m.inputs / 2;
        int64_t i = 0;
        for (; i + lanes <= half; i += lanes) {
            whole(begin + i, [=](int64_t output) {
                return __builtin_convertvector(loaded<Uint8s>(values + output * row + i) & 15, Vector);
            });
            whole(begin + half + i, [=](int64_t output) {
                return __builtin_convertvector(loaded<Uint8s>(values + output * row + i) >> 4, Vector);
            });
        }
        for (; i < half; ++i) {
            single(begin + i, [=](int64_t output) { return static_cast<float>(values[output * row + i] & 15); });
            single(begin + half + i, [=](int64_t output) { return static_cast<float>(values[output * row + i] >> 4); });
        }
    }
};

template <typename Format, int outputs, int rows>
void tile(const Matrix& m, const float* x, float* y, int64_t output, int64_t row) {
    Vector sums[outputs][rows] = {};
    float rest[outputs][rows] = {};
    const int64_t groups = m.inputs / m.group;
    x += row * m.inputs;
    for (int64_t group = 0; group < groups; ++group) {
        Vector part[outputs][rows] = {};
        float single_part[outputs][rows] = {};
        float zero[outputs];
        for (int o = 0; o < outputs; ++o) zero[o] = m.zeros ? m.zeros[(output + o) * groups + group] : Format::middle;
        Format::walk(
            m, group * m.group,
            [&](int64_t i, auto weights) {
                Vector inputs[rows];
                for (int r = 0; r < rows; ++r) inputs[r] = loaded<Vector>(x + r * m.inputs + i);
                for (int o = 0; o < outputs; ++o) {
                    const Vector weight = weights(output + o) - zero[o];
                    for (int r = 0; r < rows; ++r) part[o][r] += weight * inputs[r];
                }
            },
            [&](int64_t i, auto weights) {
                for (int o = 0; o < outputs; ++o) {
                    for (int r = 0; r < rows; ++r) single_part[o][r] += (weights(output + o) - zero[o]) * x[r * m.inputs + i];
                }
            });
        for (int o = 0; o < outputs; ++o) {
            const float scale = m.scales[(output + o) * groups + group];
            for (int r = 0; r < rows; ++r) {
                sums[o][r] += part[o][r] * scale;
                rest[o][r] += single_part[o][r] * scale;
            }
        }
    }
    for (int r = 0; r < rows; ++r) {
        for (int o = 0; o < outputs; ++o) y[(row + r) * m.outputs + output + o] = total(sums[o][r]) + rest[o][r];
    }
}

template <typename Format, int outputs>
void all_rows(const Matrix& m, const float* x, float* y, int64_t output, int64_t rows) {
    constexpr int most = lanes == 16 ? 4 : 2;  // more would not fit in the registers
    int64_t row = 0;
    for (; row + most <= rows; row += most) tile<Format, outputs, most>(m, x, y, output, row);
    for (; row < rows; ++row) tile<Format, outputs, 1>(m, x, y, output, row);
}

template <typename Format>
void multiply(const Matrix& m, const float* x, float* y, int64_t rows, int64_t threads) {
    constexpr int outputs = 2;
    share(m.outputs, rows * m.inputs, threads, [&](int64_t, int64_t begin, int64_t end) {
        int64_t output = begin;
        for (; output + outputs <= end; output += outputs) all_rows<Format, outputs>(m, x, y, output, rows);
        for (; output < end; ++output) all_rows<Format, 1>(m, x, y, output, rows);
    });
}

}  // namespace

extern "C" {

// y = x times the transposed matrix; bits: 8 or 4; a group divides `inputs`, and is even where bits are 4.
void quantized_linear(
    const void* x, const void* values, const float* scales, const float* zeros, const void* bias, void* y,
    int64_t rows, int64_t inputs, int64_t outputs, int64_t group, int64_t bits, int64_t is_bf16, int64_t bias_is_bf16,
    int64_t threads) {
    const Matrix matrix{values, scales, zeros, inputs, outputs, group};
    const Floats from(x, is_bf16, rows * inputs, 0), biases(bias, bias_is_bf16, outputs, 0);
    std::vector<float> products(static_cast<std::size_t>(rows * outputs));
    bits == 8 ? multiply<Int8>(matrix, from.data(), products.data(), rows, threads)
              : multiply<Int4>(matrix, from.data(), products.data(), rows, threads);
    with_element(is_bf16, [&](auto element) {
        using Element = decltype(element);
        for (int64_t row = 0; row < rows; ++row) {
            for (int64_t o = 0; o < outputs; ++o) {
                static_cast<Element*>(y)[row * outputs + o] = narrowed<Element>(products[row * outputs + o] + biases.data()[o]);
            }
        }
    });
}
}
