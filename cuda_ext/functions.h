// Functions of float that loops over them can be vectorized with: no branch, no table, no call.
//
// Polynomials are minimax fits of our own (Lawson's iteration in float64, then rounded to float32).

#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

inline float float_of_bits(std::uint32_t bits) {
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

// e^x within 2 units in the last place from -87.3 to 88.3; 0 below, the last value above; nan stays nan.
inline float exponential(float x) {
    constexpr float lowest = -87.3f, highest = 88.3f;
    const float within = x < lowest ? lowest : x > highest ? highest : x;
    // Adding this leaves the nearest integer in the last bits.
    constexpr float shift = 12582912.0f;
    constexpr std::uint32_t shift_bits = 0x4b400000;
    const float shifted = within * 1.44269504f + shift;
    const float power = shifted - shift;
    const float rest = (within - power * 0.693359375f) + power * 2.12194440e-4f;  // ln 2 in two parts
    float value = 0.001383683760650456f;
    value = value * rest + 0.008374822326004505f;
    value = value * rest + 0.04166822507977486f;
    value = value * rest + 0.16666419804096222f;
    value = value * rest + 0.49999991059303284f;
    value = value * rest + 1.0f;
    value = value * rest + 1.0f;
    std::uint32_t bits;
    std::memcpy(&bits, &shifted, sizeof bits);
    const float result = value * float_of_bits((bits - shift_bits + 127) << 23);
    return x < lowest ? 0.0f : result;
}

struct Sigmoid {
    float share;  // 1 / (1 + e^-x)
    float rest;   // 1 - share, but as exact where that is small
};

inline Sigmoid sigmoid(float x) {
    const float power = exponential(-x), share = 1.0f / (1.0f + power);
    return {share, power * share};
}

// The share of the standard normal distribution below x, within 1e-7: (1 + erf(z)) / 2 with z = x / sqrt(2), and
// erf(z) = z p(z^2 / 8 - 1) up to 4, where the rest is less than what a float can tell from 1.
inline float normal_below(float x) {
    const float z = x * 0.707106781f, v = z * z * 0.125f - 1.0f;
    float value = 0.0004935567267239094f;
    value = value * v - 0.0013212854973971844f;
    value = value * v + 0.001002311590127647f;
    value = value * v - 0.0012572911800816655f;
    value = value * v + 0.004992479924112558f;
    value = value * v - 0.0098347133025527f;
    value = value * v + 0.014367611147463322f;
    value = value * v - 0.021839650347828865f;
    value = value * v + 0.033018238842487335f;
    value = value * v - 0.045947905629873276f;
    value = value * v + 0.059902358800172806f;
    value = value * v - 0.07470020651817322f;
    value = value * v + 0.09020677208900452f;
    value = value * v - 0.10771230608224869f;
    value = value * v + 0.13167522847652435f;
    value = value * v - 0.17657619714736938f;
    value = value * v + 0.35353100299835205f;
    const float share = 0.5f + 0.5f * z * value;
    return z > 4.0f ? 1.0f : z < -4.0f ? 0.0f : share;
}

inline float normal_density(float x) { return 0.398942280f * exponential(-0.5f * x * x); }
