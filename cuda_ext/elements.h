// What every kernel for the CPU needs: elements of either type, sums that round little, work shared among threads.

#pragma once

#include <algorithm>
#include <vector>

#include <omp.h>

#include "portable.h"

// `run` is called with a value of the type of elements: run(float{}) or run(bf16{}).
template <typename Run>
inline void with_element(int64_t is_bf16, Run run) {
    is_bf16 ? run(bf16{}) : run(float{});
}

// Sum of term(i) over begin..end: in many accumulators, whose adds do not wait for one another.
template <typename Term>
__attribute__((always_inline)) inline float sum_of_block(int64_t begin, int64_t end, Term term) {
    constexpr int lanes = 64;
    float partial[lanes] = {};
    for (; begin + lanes <= end; begin += lanes) {
#pragma omp simd
        for (int lane = 0; lane < lanes; ++lane) partial[lane] += term(begin + lane);
    }
    float total = 0;
#pragma omp simd reduction(+ : total)
    for (int64_t i = begin; i < end; ++i) total += term(i);
#pragma omp simd reduction(+ : total)
    for (int lane = 0; lane < lanes; ++lane) total += partial[lane];
    return total;
}

// Sum of term(i) over 0..size, by blocks, so that no accumulator gets long.
template <typename Term>
__attribute__((always_inline)) inline float sum(int64_t size, Term term) {
    constexpr int64_t block = 4096;
    float total = 0;
    for (int64_t begin = 0; begin < size; begin += block) {
        total += sum_of_block(begin, std::min(begin + block, size), term);
    }
    return total;
}

// Asks for what will be read next, while the processor computes on what it has.
template <typename Element>
inline void fetch(const Element* from, int64_t size) {
    for (int64_t i = 0; i < size; i += 64 / static_cast<int64_t>(sizeof(Element))) __builtin_prefetch(from + i, 0, 2);
}

// Numbers as floats, `offset` added: in a copy only where one is needed. Where there are none, each is `missing`.
class Floats {
   public:
    Floats(const void* values, int64_t is_bf16, int64_t size, float missing, float offset = 0) {
        if (values && !is_bf16 && offset == 0) {
            values_ = static_cast<const float*>(values);
            return;
        }
        copy_.assign(static_cast<std::size_t>(size), missing);
        if (values) {
            with_element(is_bf16, [&](auto element) {
                const auto* from = static_cast<const decltype(element)*>(values);
                for (int64_t i = 0; i < size; ++i) copy_[i] = widened(from[i]) + offset;
            });
        }
        values_ = copy_.data();
    }
    Floats(const Floats&) = delete;
    const float* data() const { return values_; }

   private:
    std::vector<float> copy_;
    const float* values_;
};

constexpr int64_t least_for_threads = 1 << 15;  // less work is done before other threads have woken up

// Calls run(part, begin, end) for parts of 0..count, in at most `threads` of them at once; `cost`: elements of one.
template <typename Run>
inline void share(int64_t count, int64_t cost, int64_t threads, Run run) {
    threads = std::min(threads, count);
    if (threads < 2 || count * cost < least_for_threads) {
        run(int64_t{0}, int64_t{0}, count);
        return;
    }
#pragma omp parallel num_threads(static_cast<int>(threads))
    {
        const int64_t part = omp_get_thread_num(), parts = omp_get_num_threads();
        run(part, count * part / parts, count * (part + 1) / parts);
    }
}

// Sums over rows, one of each column: every part of `share` adds to its own, `write` adds them up.
class ColumnSums {
   public:
    ColumnSums(bool is_wanted, int64_t width, int64_t threads)
        : width_(is_wanted ? width : 0), sums_(static_cast<std::size_t>(width_ * std::max<int64_t>(threads, 1))) {}
    float* of(int64_t part) { return width_ ? sums_.data() + part * width_ : nullptr; }

    template <typename Element>
    void write(Element* to) {
        float* total = sums_.data();
        for (auto next = width_; next < static_cast<int64_t>(sums_.size()); next += width_) {
#pragma omp simd
            for (int64_t i = 0; i < width_; ++i) total[i] += total[next + i];
        }
        for (int64_t i = 0; i < width_; ++i) to[i] = narrowed<Element>(total[i]);
    }

   private:
    int64_t width_;
    std::vector<float> sums_;
};
