// Products of few rows with a matrix of int8 or int4: weights are read from memory once and become floats in a
// register. A tile of outputs by rows shares each weight among its rows, and each input among its outputs.

#ifdef __AVX2__
#include <immintrin.h>
#endif

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
typedef std::int32_t Integers __attribute__((vector_size(4 * lanes)));

inline Vector loaded(const float* from) {
    Vector vector;
    std::memcpy(&vector, from, sizeof vector);
    return vector;
}

// Compilers would widen bytes one by one.
template <typename Byte>
inline Integers widened_bytes(const Byte* from) {
    [[maybe_unused]] constexpr bool is_signed = std::is_signed_v<Byte>;
#if defined(__AVX512F__)
    const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
    return (Integers)(is_signed ? _mm512_cvtepi8_epi32(bytes) : _mm512_cvtepu8_epi32(bytes));
#elif defined(__AVX2__)
    const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(from));
    return (Integers)(is_signed ? _mm256_cvtepi8_epi32(bytes) : _mm256_cvtepu8_epi32(bytes));
#else
    return Integers{from[0], from[1], from[2], from[3]};
#endif
}

// A byte holds `parts` weights, a part of a group apart. `value` is of one byte or of a vector of them.

struct Int8 {
    using Byte = std::int8_t;
    static constexpr int parts = 1;
    static constexpr float middle = 0;
    template <typename Bytes>
    static Bytes value(Bytes bytes, int) {
        return bytes;
    }
};

struct Int4 {
    using Byte = std::uint8_t;
    static constexpr int parts = 2;
    static constexpr float middle = 8;
    template <typename Bytes>
    static Bytes value(Bytes bytes, int part) {
        return part ? bytes >> 4 : bytes & 15;
    }
};

struct Matrix {
    const void* values;
    const float* scales;
    const float* zeros;  // null: the middle of the range
    int64_t inputs, outputs, group;
};

// Adds the weights of a group, `size` bytes of each output, times its inputs: (value - zero) * scale * x.
template <typename Format, int outputs, int rows>
__attribute__((always_inline)) inline void add_group(
    const typename Format::Byte* values, int64_t value_stride, const float* x, int64_t x_stride, int64_t size,
    const float (&zeros)[outputs], const float (&scales)[outputs], Vector (&sums)[outputs][rows]) {
    int64_t i = 0;
    for (; i + lanes <= size; i += lanes) {
        for (int o = 0; o < outputs; ++o) {
            const Integers bytes = widened_bytes(values + o * value_stride + i);
            for (int part = 0; part < Format::parts; ++part) {
                const Vector value = __builtin_convertvector(Format::value(bytes, part), Vector);
                const Vector weight = (value - zeros[o]) * scales[o];
                for (int r = 0; r < rows; ++r) sums[o][r] += weight * loaded(x + r * x_stride + part * size + i);
            }
        }
    }
    for (; i < size; ++i) {
        for (int o = 0; o < outputs; ++o) {
            for (int part = 0; part < Format::parts; ++part) {
                const int value = Format::value(int{values[o * value_stride + i]}, part);
                const float weight = (static_cast<float>(value) - zeros[o]) * scales[o];
                for (int r = 0; r < rows; ++r) sums[o][r][0] += weight * x[r * x_stride + part * size + i];
            }
        }
    }
}

template <typename Format, int outputs, int rows>
void tile(const Matrix& m, const float* x, float* y, int64_t output, int64_t row) {
    const int64_t groups = m.inputs / m.group, bytes = m.group / Format::parts, stride = m.inputs / Format::parts;
    const auto* values = static_cast<const typename Format::Byte*>(m.values) + output * stride;
    Vector sums[outputs][rows] = {};
    for (int64_t group = 0; group < groups; ++group) {
        const auto add = [&](const float(&scales)[outputs], Vector(&to)[outputs][rows]) {
            float zeros[outputs];
            for (int o = 0; o < outputs; ++o) {
                zeros[o] = m.zeros ? m.zeros[(output + o) * groups + group] : Format::middle;
            }
            const float* inputs = x + row * m.inputs + group * m.group;
            add_group<Format, outputs, rows>(
                values + group * bytes, stride, inputs, m.inputs, bytes, zeros, scales, to);
        };
        float scales[outputs], ones[outputs];
        for (int o = 0; o < outputs; ++o) {
            scales[o] = m.scales[(output + o) * groups + group];
            ones[o] = 1;
        }
        if constexpr (rows == 1) {  // one product a group, rather than one a weight
            Vector part[outputs][rows] = {};
            add(ones, part);
            for (int o = 0; o < outputs; ++o) sums[o][0] += part[o][0] * scales[o];
        } else {  // more sums would not fit in the registers
            add(scales, sums);
        }
    }
    for (int r = 0; r < rows; ++r) {
        for (int o = 0; o < outputs; ++o) {
            float total = 0;
            for (int lane = 0; lane < lanes; ++lane) total += sums[o][r][lane];
            y[(row + r) * m.outputs + output + o] = total;
        }
    }
}

template <typename Format, int outputs>
void all_rows(const Matrix& m, const float* x, float* y, int64_t output, int64_t rows) {
    int64_t row = 0;
    for (; row + 4 <= rows; row += 4) tile<Format, outputs, 4>(m, x, y, output, row);
    for (; row + 2 <= rows; row += 2) tile<Format, outputs, 2>(m, x, y, output, row);
    if (row < rows) tile<Format, outputs, 1>(m, x, y, output, row);
}

template <typename Format>
void multiply(const Matrix& m, const float* x, float* y, int64_t rows, int64_t threads) {
    constexpr int together = lanes == 16 ? 4 : 2;
    share(m.outputs, rows * m.inputs, threads, [&](int64_t, int64_t begin, int64_t end) {
        int64_t output = begin;
        for (; output + together <= end; output += together) all_rows<Format, together>(m, x, y, output, rows);
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
        auto* to = static_cast<Element*>(y);
        for (int64_t row = 0; row < rows; ++row) {
            for (int64_t o = 0; o < outputs; ++o, ++to) {
                *to = narrowed<Element>(products[row * outputs + o] + biases.data()[o]);
            }
        }
    });
}
}
