// What code for the CPU and for GPUs has in common: numbers of 16 bits, and a mark of functions for both.

#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#ifdef __CUDACC__
#include <cuda_fp16.h>
#include <cuda_bf16.h>
#define ON_BOTH __host__ __device__ __forceinline__
#else
#define ON_BOTH __attribute__((always_inline)) inline
#endif

using bf16 = std::uint16_t;
struct fp16 {
    std::uint16_t bits;
};
using std::int64_t;

ON_BOTH float widened(float value) { return value; }

ON_BOTH float widened(bf16 value) {
    const std::uint32_t bits = std::uint32_t{value} << 16;
    float result;
    std::memcpy(&result, &bits, sizeof result);
    return result;
}

ON_BOTH float widened(fp16 value) {
#ifdef __CUDACC__
    return __half2float(__ushort_as_half(value.bits));
#else
    _Float16 half;
    std::memcpy(&half, &value, sizeof half);
    return static_cast<float>(half);
#endif
}

// To nearest, ties to even; a nan stays one.
template <typename Element>
ON_BOTH Element narrowed(float value) {
    if constexpr (std::is_same_v<Element, float>) {
        return value;
    } else if constexpr (std::is_same_v<Element, fp16>) {
#ifdef __CUDACC__
        return {__half_as_ushort(__float2half_rn(value))};
#else
        const auto half = static_cast<_Float16>(value);
        fp16 result;
        std::memcpy(&result, &half, sizeof result);
        return result;
#endif
    } else {
#ifdef __CUDA_ARCH__
        return __bfloat16_as_ushort(__float2bfloat16_rn(value));  // one instruction
#else
        std::uint32_t bits;
        std::memcpy(&bits, &value, sizeof bits);
        const std::uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
        const std::uint32_t quiet_nan = (bits >> 16) | 0x40;
        return static_cast<bf16>((bits & 0x7fffffff) > 0x7f800000 ? quiet_nan : rounded);
#endif
    }
}
