// SGD, Lion and Adam with states of one byte an element, over lists of tensors. A warp has the 256 elements of a scale
// in its registers: it decodes their states, updates them as if they were floats, and encodes them anew.

#include "byte_codes.h"
#include "lists.cuh"

namespace {

constexpr int64_t chunk = block_elements * block_warps;
constexpr int per_thread = block_elements / warp_threads;

template <int size, bool is_signed>
ON_BOTH void decode(const void* from, int64_t at, float scale, float* to) {
    const auto codes = streamed<size>(static_cast<const std::uint8_t*>(from) + at);
#pragma unroll
    for (int k = 0; k < size; ++k) to[k] = scale * Codes<is_signed>::decoded(codes.at[k]);
}

template <int size, bool is_signed>
ON_BOTH void encode(void* to, int64_t at, float scale, const float* from) {
    Vector<std::uint8_t, size> codes;
#pragma unroll
    for (int k = 0; k < size; ++k) codes.at[k] = Codes<is_signed>::encoded(from[k] * scale);
    stream(static_cast<std::uint8_t*>(to) + at, codes);
}

template <typename Rule, typename Parameter, typename Gradient>
struct Update {
    static constexpr int group = warp_threads;
    static constexpr int vector_size = 16 / sizeof(Parameter);
    using Reduction = Largest;
    Table table;
    Common common;

    struct Held {  // new states; where they go
        float first[per_thread], second[per_thread];
        int run;
        int64_t begin, end;
        bool is_in_vectors;
    };

    ON_BOTH Pair<float> before(int block, int thread, Held& held) const {
        if (common.skips()) return {0, 0};
        const Part part = part_of<chunk>(table, block);
        const Run& run = table.runs[part.run];
        held.run = part.run;
        held.begin = part.begin + thread / warp_threads * block_elements;
        held.end = part.end;
        held.is_in_vectors = held.begin + block_elements <= part.end && is_aligned<vector_size>(run);
        if (held.begin >= held.end) return {0, 0};
        if (held.is_in_vectors) {
            update<vector_size>(run, thread % warp_threads, held);
        } else {
            update<1>(run, thread % warp_threads, held);
        }
        Pair<float> largest{0, 0};
#pragma unroll
        for (int i = 0; i < per_thread; ++i) {
            largest = Largest::of(largest, Pair<float>{std::fabs(held.first[i]), held.second[i]});
        }
        return largest;
    }

    ON_BOTH void after(int, int thread, const Held& held, const Pair<float>& largest) const {
        if (common.skips() || held.begin >= held.end) return;
        const Run& run = table.runs[held.run];
        const Scale first{largest.first}, second{largest.second};
        if (held.is_in_vectors) {
            write<vector_size>(run, thread % warp_threads, held, first.down, second.down);
        } else {
            write<1>(run, thread % warp_threads, held, first.down, second.down);
        }
        if (thread % warp_threads == 0) {
            run.first_scales[held.begin / block_elements] = first.up;
            if (Rule::states > 1) run.second_scales[held.begin / block_elements] = second.up;
        }
    }

   private:
    template <int size>
    static ON_BOTH bool is_aligned(const Run& run) {
        return ::is_aligned<size>(static_cast<const Parameter*>(run.parameter)) &&
               ::is_aligned<size>(static_cast<const Gradient*>(run.gradient)) &&
               ::is_aligned<size>(static_cast<const std::uint8_t*>(run.first)) &&
               ::is_aligned<size>(static_cast<const std::uint8_t*>(run.second)) &&
               ::is_aligned<size>(static_cast<const bf16*>(run.copy));
    }

    // The place of a lane's vector of `size` elements.
    template <int size>
    static ON_BOTH int64_t place(const Held& held, int lane, int vector) {
        return held.begin + (vector * warp_threads + lane) * size;
    }

    template <int size>
    ON_BOTH void update(const Run& run, int lane, Held& held) const {
        const Factors factors = common.ready();
        const float first_scale = run.first_scales[held.begin / block_elements];
        const float second_scale = Rule::states > 1 ? run.second_scales[held.begin / block_elements] : 0;
        float p[per_thread] = {}, g[per_thread] = {};
#pragma unroll
        for (int i = 0; i < per_thread; i += size) {
            const int64_t at = place<size>(held, lane, i / size);
#pragma unroll
            for (int k = 0; k < size; ++k) held.first[i + k] = held.second[i + k] = 0;
            if (size == 1 && at >= held.end) continue;
            load<size>(static_cast<const Parameter*>(run.parameter) + at, p + i);
            load<size>(static_cast<const Gradient*>(run.gradient) + at, g + i);
            decode<size, true>(run.first, at, first_scale, held.first + i);
            if (Rule::states > 1) decode<size, false>(run.second, at, second_scale, held.second + i);
        }
#pragma unroll
        for (int i = 0; i < per_thread; ++i) {
            const float scaled = g[i] * factors.gradient_scale;
            p[i] = Rule::updated(p[i], scaled, held.first[i], held.second[i], factors);
        }
#pragma unroll
        for (int i = 0; i < per_thread; i += size) {
            const int64_t at = place<size>(held, lane, i / size);
            if (size == 1 && at >= held.end) {
                held.first[i] = held.second[i] = 0;
                continue;
            }
            store<size>(static_cast<Parameter*>(run.parameter) + at, p + i);
            common.store_copy<size>(run, at, p + i);
        }
    }

    template <int size>
    ON_BOTH void write(const Run& run, int lane, const Held& held, float first, float second) const {
#pragma unroll
        for (int i = 0; i < per_thread; i += size) {
            const int64_t at = place<size>(held, lane, i / size);
            if (size == 1 && at >= held.end) continue;
            encode<size, true>(run.first, at, first, held.first + i);
            if (Rule::states > 1) encode<size, false>(run.second, at, second, held.second + i);
        }
    }
};

template <typename Rule>
int update(const Run* runs, int64_t count, int64_t types, const Common& common, int64_t queue) {
    return with_types(types, [&](auto parameter, auto gradient) {
        return for_each_table<chunk>(runs, count, [&](const Table& table, int64_t blocks) {
            return launch(Update<Rule, decltype(parameter), decltype(gradient)>{table, common}, blocks, queue);
        });
    });
}

}  // namespace

extern "C" {

// As `optimize` of optimizers.cu; there is no rule 1.
int optimize(const Run* runs, const Common* common, int64_t count, int64_t rule, int64_t types, int64_t device,
             int64_t queue) {
    if (const int error = use_device(device)) return error;
    switch (rule) {
        case 0: return update<Sgd>(runs, count, types, *common, queue);
        case 2: return update<Lion>(runs, count, types, *common, queue);
        default: return update<AdamOf<true, true>>(runs, count, types, *common, queue);
    }
}

// Of the code, on the CPU: what it stands for, and the nearest of a number.
float decoded(int64_t code, int64_t is_signed) {
    const auto byte = static_cast<std::uint8_t>(code);
    return is_signed ? Codes<true>::decoded(byte) : Codes<false>::decoded(byte);
}

int encoded(float x, int64_t is_signed) { return is_signed ? Codes<true>::encoded(x) : Codes<false>::encoded(x); }
}
