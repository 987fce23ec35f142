// States of one byte an element: dynamic quantization by blocks (Dettmers et al., "8-bit Optimizers via Block-wise
// Quantization", arXiv:2110.02861, section 2). A code has, from its highest bit, a sign (where there is one), k zeros, a
// one, and n bits of a fraction f; it stands for 10^-k (0.1 + 0.9 (f + 1/2) / 2^n), k at most 6. What is left of the
// codes are 0 and 1. Elements are divided by the largest of their block first.
//
// The nearest code is found by arithmetic: a search in a table would take longer than what a step reads and writes.

#pragma once

#include <cfloat>
#include <cmath>
#include <utility>

#include "portable.h"

constexpr int64_t block_elements = 256;  // of one scale

ON_BOTH float as_float(std::uint32_t bits) {
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

ON_BOTH std::uint32_t as_bits(float value) {
    std::uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    return bits;
}

constexpr int most_zeros = 6;

constexpr double power(int zeros) { return zeros ? 10 * power(zeros - 1) : 1; }

// The first and the last of the numbers with these zeros, where a fraction without any has `longest` bits.
constexpr double lowest(int longest, int zeros) { return (0.1 + 0.45 / (1 << (longest - zeros))) / power(zeros); }
constexpr double highest(int longest, int zeros) { return (1 - 0.45 / (1 << (longest - zeros))) / power(zeros); }

// Halfway between the numbers with these zeros and those with fewer; before 1; and before the first.
template <int longest, int zeros>
constexpr float least_before = static_cast<float>(0.5 * (lowest(longest, zeros - 1) + highest(longest, zeros)));
template <int longest>
constexpr float least_of_one = static_cast<float>(0.5 * (highest(longest, 0) + 1));
template <int longest>
constexpr float least_of_any = static_cast<float>(0.5 * lowest(longest, most_zeros));

// How many numbers have these zeros, and one over their distance.
template <int longest, int zeros>
constexpr float cells_of = 1 << (longest - zeros);
template <int longest, int zeros>
constexpr float rate_of = static_cast<float>(cells_of<longest, zeros> / 0.9 * power(zeros));

template <bool is_signed>
struct Codes {
    static constexpr int longest = is_signed ? 6 : 7;  // bits of a fraction

    static ON_BOTH float decoded(std::uint8_t code) {
        const std::uint32_t magnitude = is_signed ? code & 127 : code;
        // The number 2^(n + 1) (1 + (f + 1/2) / 2^n) has n in its exponent, the fraction in its mantissa.
        const std::uint32_t bits = as_bits(static_cast<float>(2 * magnitude + 1));
        const int zeros = longest + 1 - static_cast<int>((bits >> 23) - 127);
        const float within = 0.9f * as_float((bits & 0x7fffff) | 0x3f800000) - 0.8f;
        const float value = (zeros & 1 ? 0.1f : 1.0f) * (zeros & 2 ? 0.01f : 1.0f) * (zeros & 4 ? 1e-4f : 1.0f) * within;
        if (is_signed) return magnitude ? (code & 128 ? -value : value) : code ? 1.0f : 0.0f;
        return code > 1 ? value : static_cast<float>(code);
    }

    // The nearest, of numbers of at most 1. Squares that are not 0 stay so: a step is divided by their root
    // (Li et al., "Memory Efficient Optimizers with 4-bit States", arXiv:2309.01507, section 4.1).
    static ON_BOTH std::uint8_t encoded(float x) {
        const float size = is_signed ? std::fabs(x) : x;
        float cells = cells_of<longest, 0>, rate = rate_of<longest, 0>;
        find(size, cells, rate, std::make_integer_sequence<int, most_zeros>{});
        const float place = fmaf(size, rate, cells * (8.0f / 9));  // (x - 0.1) / 0.9 of the cells, behind as many
        const auto code = static_cast<std::uint8_t>(fminf(fmaxf(place, cells), 2 * cells - 1));  // of nan: a number
        if (is_signed) {
            if (size < least_of_any<longest>) return 0;
            return x > least_of_one<longest> ? 128 : x < 0 ? code | 128 : code;
        }
        return x > least_of_one<longest> ? 1 : x == 0 ? 0 : code;
    }

   private:
    template <int... fewer>
    static ON_BOTH void find(float size, float& cells, float& rate, std::integer_sequence<int, fewer...>) {
        const auto take = [&](bool is_less, float its_cells, float its_rate) {
            cells = is_less ? its_cells : cells;
            rate = is_less ? its_rate : rate;
        };
        (..., take(size < least_before<longest, fewer + 1>, cells_of<longest, fewer + 1>, rate_of<longest, fewer + 1>));
    }
};

// What the elements of a block are multiplied with before they are encoded, and afterwards.
struct Scale {
    float down, up;
    explicit ON_BOTH Scale(float largest)  // nan stays nan
        : down(largest < FLT_MIN ? 0 : 1 / largest), up(largest < FLT_MIN ? 0 : largest) {}
};
