// SGD, Adagrad, Lion, Adam and LAMB over lists of tensors. What is read and written bounds their speed, so unscaling,
// clipping, the decision to skip and the cast of the copy happen while an element is in a register.

#pragma once

#include "lists.cuh"

constexpr int64_t update_chunk = 4096;  // elements of a block
constexpr int vector_size = 4;          // 16 bytes of float
constexpr int vectors = 2;              // of a thread at a time, so that enough reads are under way

// Work on stretches of a run: whole tiles by vectors, what is left, or lies otherwise, element by element.
// take<size, times>(at, stride): `times` vectors of `size` elements, `stride` apart.
template <typename Take>
ON_BOTH void by_tiles(const Part& part, int thread, bool is_aligned, Take& take) {
    constexpr int64_t tile = int64_t{block_threads} * vector_size * vectors;
    int64_t i = part.begin;
    if (is_aligned) {
        for (; i + tile <= part.end; i += tile) {
            take.template operator()<vector_size, vectors>(i + thread * vector_size, block_threads * vector_size);
        }
    }
    for (i += thread; i < part.end; i += block_threads) take.template operator()<1, 1>(i, 0);
}

template <typename Parameter, typename Gradient>
ON_BOTH bool is_in_vectors(const Run& run) {
    return is_aligned<vector_size>(static_cast<const Parameter*>(run.parameter)) &&
           is_aligned<vector_size>(static_cast<const Gradient*>(run.gradient)) &&
           is_aligned<vector_size>(static_cast<const float*>(run.first)) &&
           is_aligned<vector_size>(static_cast<const float*>(run.second)) &&
           is_aligned<vector_size>(static_cast<const bf16*>(run.copy));  // as fp16
}

template <int size, int times, typename Element>
ON_BOTH void load_all(const void* from, int64_t at, int64_t stride, float (&to)[times][size]) {
#pragma unroll
    for (int t = 0; t < times; ++t) load<size>(static_cast<const Element*>(from) + at + t * stride, to[t]);
}

template <int size, int times, typename Element>
ON_BOTH void store_all(void* to, int64_t at, int64_t stride, const float (&from)[times][size]) {
#pragma unroll
    for (int t = 0; t < times; ++t) store<size>(static_cast<Element*>(to) + at + t * stride, from[t]);
}

template <typename Rule, typename Parameter, typename Gradient>
struct Update : Alone {
    Table table;
    Common common;

    ON_BOTH void operator()(int block, int thread) const {
        if (common.skips()) return;
        const Part part = part_of<update_chunk>(table, block);
        const Run& run = table.runs[part.run];
        Take take{run, common, common.ready()};
        by_tiles(part, thread, is_in_vectors<Parameter, Gradient>(run), take);
    }

    struct Take {
        const Run& run;
        const Common& common;
        const Factors factors;

        template <int size, int times>
        ON_BOTH void operator()(int64_t at, int64_t stride) const {
            float p[times][size], g[times][size], first[times][size] = {}, second[times][size] = {};
            load_all<size, times, Parameter>(run.parameter, at, stride, p);
            load_all<size, times, Gradient>(run.gradient, at, stride, g);
            if (run.first) load_all<size, times, float>(run.first, at, stride, first);
            if (Rule::states > 1) load_all<size, times, float>(run.second, at, stride, second);
#pragma unroll
            for (int t = 0; t < times; ++t) {
#pragma unroll
                for (int k = 0; k < size; ++k) {
                    const float scaled = g[t][k] * factors.gradient_scale;
                    p[t][k] = Rule::updated(p[t][k], scaled, first[t][k], second[t][k], factors);
                }
            }
            store_all<size, times, Parameter>(run.parameter, at, stride, p);
            if (run.first) store_all<size, times, float>(run.first, at, stride, first);
            if (Rule::states > 1) store_all<size, times, float>(run.second, at, stride, second);
#pragma unroll
            for (int t = 0; t < times; ++t) common.store_copy<size>(run, at + t * stride, p[t]);
        }
    };
};

// LAMB's states, and for each block the sums of squares of parameters and directions.
template <typename Parameter, typename Gradient>
struct LambMoments {
    static constexpr int group = block_threads;
    using Reduction = Sum;
    struct Held {};
    Table table;
    Common common;
    Pair<float>* sums;

    ON_BOTH Pair<float> before(int block, int thread, Held&) const {
        if (common.skips()) return {0, 0};
        const Part part = part_of<update_chunk>(table, block);
        const Run& run = table.runs[part.run];
        Take take{run, common.ready(), {0, 0}};
        by_tiles(part, thread, is_in_vectors<Parameter, Gradient>(run), take);
        return take.squares;
    }

    ON_BOTH void after(int block, int thread, const Held&, const Pair<float>& total) const {
        if (thread == 0) sums[block] = total;
    }

    struct Take {
        const Run& run;
        const Factors factors;
        Pair<float> squares;

        template <int size, int times>
        ON_BOTH void operator()(int64_t at, int64_t stride) {
            float p[times][size], g[times][size], first[times][size], second[times][size];
            load_all<size, times, Parameter>(run.parameter, at, stride, p);
            load_all<size, times, Gradient>(run.gradient, at, stride, g);
            load_all<size, times, float>(run.first, at, stride, first);
            load_all<size, times, float>(run.second, at, stride, second);
#pragma unroll
            for (int t = 0; t < times; ++t) {
#pragma unroll
                for (int k = 0; k < size; ++k) {
                    Lamb::advance(g[t][k] * factors.gradient_scale, first[t][k], second[t][k], factors);
                    const float direction = Lamb::direction(p[t][k], first[t][k], second[t][k], factors);
                    squares.first += p[t][k] * p[t][k];
                    squares.second += direction * direction;
                }
            }
            store_all<size, times, float>(run.first, at, stride, first);
            store_all<size, times, float>(run.second, at, stride, second);
        }
    };
};

// How much longer a run's parameter is than its direction: one block for each run.
struct LambTrust {
    static constexpr int group = block_threads;
    using Reduction = Sum;
    struct Held {};
    Table table;
    const Pair<float>* sums;
    float* trusts;

    ON_BOTH Pair<double> before(int block, int thread, Held&) const {
        Pair<double> own{0, 0};
        for (int i = table.first_blocks[block] + thread; i < table.first_blocks[block + 1]; i += block_threads) {
            own = {own.first + sums[i].first, own.second + sums[i].second};
        }
        return own;
    }

    ON_BOTH void after(int block, int thread, const Held&, const Pair<double>& total) const {
        if (thread == 0) trusts[block] = static_cast<float>(Lamb::trust(total.first, total.second));
    }
};

template <typename Parameter>
struct LambStep : Alone {
    Table table;
    Common common;
    const float* trusts;

    ON_BOTH void operator()(int block, int thread) const {
        if (common.skips()) return;
        const Part part = part_of<update_chunk>(table, block);
        const Run& run = table.runs[part.run];
        const Factors factors = common.ready();
        Take take{run, common, factors, factors.rate * trusts[part.run]};
        by_tiles(part, thread, is_in_vectors<Parameter, bf16>(run), take);
    }

    struct Take {
        const Run& run;
        const Common& common;
        const Factors factors;
        const float rate;

        template <int size, int times>
        ON_BOTH void operator()(int64_t at, int64_t stride) const {
            float p[times][size], first[times][size], second[times][size];
            load_all<size, times, Parameter>(run.parameter, at, stride, p);
            load_all<size, times, float>(run.first, at, stride, first);
            load_all<size, times, float>(run.second, at, stride, second);
#pragma unroll
            for (int t = 0; t < times; ++t) {
#pragma unroll
                for (int k = 0; k < size; ++k) {
                    p[t][k] -= rate * Lamb::direction(p[t][k], first[t][k], second[t][k], factors);
                }
            }
            store_all<size, times, Parameter>(run.parameter, at, stride, p);
#pragma unroll
            for (int t = 0; t < times; ++t) common.store_copy<size>(run, at + t * stride, p[t]);
        }
    };
};
