// What optimizers compute for one element: the same text for the CPU, in adamw.cpp and optimizers.cpp, and for GPUs.

#pragma once

#include <cmath>

#include "portable.h"

// optimizers.py knows the order of these.
struct Factors {
    float gradient_scale;
    float rate;
    float weight_decay;  // of the parameter added to the gradient; of Lion and LAMB, to the step
    float eps;
    float old, fresh;                        // shares of state and gradient in the next state
    float from_old, from_fresh;              // and in the step; of Adam and LAMB in their second state
    float correction, correction_of_second;  // what states are divided by, of Adam the root of the second
    float kept;                              // share of the parameter that Adam steps from
};

struct Sgd {
    static constexpr int states = 1;
    static ON_BOTH float updated(float p, float g, float& state, float&, const Factors& f) {
        g += f.weight_decay * p;
        state = f.old * state + f.fresh * g;
        return p - f.rate * (f.from_fresh != 0 ? f.from_old * state + f.from_fresh * g : state);
    }
};

struct Adagrad {
    static constexpr int states = 1;
    static ON_BOTH float updated(float p, float g, float& state, float&, const Factors& f) {
        g += f.weight_decay * p;
        state += g * g;
        return p - f.rate * g / (std::sqrt(state) + f.eps);
    }
};

struct Lion {
    static constexpr int states = 1;
    static ON_BOTH float updated(float p, float g, float& state, float&, const Factors& f) {
        const float direction = f.from_old * state + f.from_fresh * g;
        state = f.old * state + f.fresh * g;
        const float sign = direction > 0 ? 1.0f : direction < 0 ? -1.0f : direction;  // nan stays nan
        return p - f.rate * (f.weight_decay * p + sign);
    }
};

template <bool has_fma>
ON_BOTH float multiply_add(float a, float b, float c) {
    if constexpr (has_fma) return fmaf(a, b, c);
    return a * b + c;
}

// Quotient and root of numbers that are not extreme, where a unit or two in the last place count for nothing.
ON_BOTH float quick_quotient(float a, float b) {
#ifdef __CUDA_ARCH__
    return __fdividef(a, b);
#else
    return a / b;
#endif
}

ON_BOTH float quick_root(float x) {
#ifdef __CUDA_ARCH__
    float root;
    asm("sqrt.approx.f32 %0, %1;" : "=f"(root) : "f"(x));
    return root;
#else
    return std::sqrt(x);
#endif
}

// Adam and AdamW. Operations and roundings are those of torch.optim.AdamW(fused=True) on the CPU, where no others are
// fused by the compiler: a fused multiply-add exactly where torch's kernels for AVX2 and AVX-512 have one.
template <bool has_fma, bool is_quick = false>
struct AdamOf {
    static constexpr int states = 2;
    static ON_BOTH float updated(float p, float g, float& first, float& second, const Factors& f) {
        if (f.weight_decay != 0) g += f.weight_decay * p;
        const bool from_old = std::fabs(f.fresh) < 0.5f;  // torch interpolates from the nearer end
        const float weight = from_old ? f.fresh : f.fresh - 1;
        first = multiply_add<has_fma>(weight, g - first, from_old ? first : g);
        second = multiply_add<has_fma>(f.from_fresh * g, g, second * f.from_old);
        if (is_quick) {
            const float denominator = quick_quotient(quick_root(second), f.correction) + f.eps;
            return p * f.kept - quick_quotient(f.rate * first, denominator);
        }
        const float denominator = std::sqrt(second) / f.correction + f.eps;
        return p * f.kept - f.rate * first / denominator;
    }
};

// LAMB's states, then its direction, along which a step is as long as the parameter.
struct Lamb {
    static ON_BOTH void advance(float g, float& first, float& second, const Factors& f) {
        first = f.old * first + f.fresh * g;
        second = f.from_old * second + f.from_fresh * g * g;
    }
    static ON_BOTH float direction(float p, float first, float second, const Factors& f) {
        return first / f.correction / (std::sqrt(second / f.correction_of_second) + f.eps) + f.weight_decay * p;
    }
    template <typename Number>
    static ON_BOTH Number trust(Number squares_of_parameter, Number squares_of_direction) {
        const bool has_lengths = squares_of_parameter > 0 && squares_of_direction > 0;
        return has_lengths ? std::sqrt(squares_of_parameter / squares_of_direction) : 1;
    }
};
