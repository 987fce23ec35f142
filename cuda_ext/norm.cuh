// The norm of all gradients of a list, in two steps of one order: sums of blocks, then the sum of those. The same pass
// finds what is not finite, so that a step may be skipped before it changes anything.

#pragma once

#include <cfloat>

#include "lists.cuh"

constexpr int64_t norm_chunk = 32768;  // elements of a block: few sums are left for the second step
constexpr int norm_vectors = 4;        // of a thread at a time

template <typename Gradient>
struct Squares {
    static constexpr int group = block_threads;
    static constexpr int size = 16 / sizeof(Gradient);
    using Reduction = Sum;
    struct Held {};
    Table table;
    Pair<float>* sums;  // of squares, and of how many elements are not finite

    ON_BOTH Pair<float> before(int block, int thread, Held&) const {
        constexpr int64_t tile = int64_t{block_threads} * size * norm_vectors;
        const Part part = part_of<norm_chunk>(table, block);
        const auto* gradient = static_cast<const Gradient*>(table.runs[part.run].gradient);
        Pair<float> own{0, 0};
        int64_t i = part.begin;
        if (is_aligned<size>(gradient)) {
            for (; i + tile <= part.end; i += tile) {
                float g[norm_vectors][size];
#pragma unroll
                for (int t = 0; t < norm_vectors; ++t) {
                    load<size>(gradient + i + (t * block_threads + thread) * size, g[t]);
                }
#pragma unroll
                for (int t = 0; t < norm_vectors; ++t) add<size>(g[t], own);
            }
        }
        for (i += thread; i < part.end; i += block_threads) {
            float g[1];
            load<1>(gradient + i, g);
            add<1>(g, own);
        }
        return own;
    }

    ON_BOTH void after(int block, int thread, const Held&, const Pair<float>& total) const {
        if (thread == 0) sums[block] = total;
    }

    template <int count>
    static ON_BOTH void add(const float* g, Pair<float>& own) {
#pragma unroll
        for (int k = 0; k < count; ++k) {
            own.first += g[k] * g[k];
            own.second += std::fabs(g[k]) <= FLT_MAX ? 0.0f : 1.0f;
        }
    }
};

// By one block. result: the norm; what to multiply gradients with so that it is `most` at most; whether to skip.
struct Norm {
    static constexpr int group = block_threads;
    using Reduction = Sum;
    struct Held {};
    const Pair<float>* sums;
    int64_t count;
    float gradient_scale;
    float most;  // any where negative
    float* result;

    ON_BOTH Pair<double> before(int, int thread, Held&) const {
        Pair<double> own{0, 0};
        for (int64_t i = thread; i < count; i += block_threads) {
            own = {own.first + sums[i].first, own.second + sums[i].second};
        }
        return own;
    }

    ON_BOTH void after(int, int thread, const Held&, const Pair<double>& total) const {
        if (thread != 0) return;
        const double norm = std::sqrt(total.first) * std::fabs(gradient_scale);
        const double share = most / (norm + 1e-6);  // as torch.nn.utils.clip_grad_norm_
        result[0] = static_cast<float>(norm);
        result[1] = most < 0 || share > 1 ? 1.0f : static_cast<float>(share);
        result[2] = total.second != 0 ? 1.0f : 0.0f;
    }
};
