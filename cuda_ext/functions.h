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

inline float sigmoid(float x) { return 1.0f / (1.0f + exponential(-x)); }

struct Normal {
    float below;    // share of the standard normal distribution below x
    float density;  // its density at x
};

inline Normal normal(float x) {
    const float z = std::fabs(x) * 0.707106781f;
    const float power = exponential(-z * z);
    // erfc(z) = e^(-z^2) t p(t), where t = 1 / (1 + 0.3 z), within 4e-8 of itself.
    const float t = 1.0f / (1.0f + 0.3f * z);
    float value = -0.12943407893180847f;
    value = value * t + 0.48509645462036133f;
    value = value * t - 0.5112264752388f;
    value = value * t + 0.5463950634002686f;
    value = value * t - 0.09363125264644623f;
    value = value * t + 0.21443627774715424f;
    value = value * t + 0.14848242700099945f;
    value = value * t + 0.17069193720817566f;
    value = value * t + 0.16918961703777313f;
    const float tail = 0.5f * power * t * value;
    return {x > 0 ? 1.0f - tail : tail, power * 0.398942280f};
}
