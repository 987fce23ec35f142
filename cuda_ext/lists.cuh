// Lists of tensors as the work of one kernel: a table of their addresses goes with its launch (no copy to the device, so
// launches may be recorded in a CUDA graph), and each block takes a stretch of one of them.

#pragma once

#include "launch.cuh"
#include "rules.h"

// What is updated together: `size` elements each, which do not overlap. lists.py knows the layout.
struct Run {
    void* parameter;
    const void* gradient;
    void* first;   // states; null where the rule has none
    void* second;
    void* copy;    // of the new parameter; may be null
    float* first_scales;  // of states in bytes
    float* second_scales;
    int64_t size;
};

constexpr int most_runs = 56;  // of a launch, whose arguments have room for 4096 bytes

struct Table {
    Run runs[most_runs];
    int first_blocks[most_runs + 1];
    int count;
};

struct Part {
    int run;
    int64_t begin, end;
};

// Which elements are a block's.
template <int64_t chunk>
ON_BOTH Part part_of(const Table& table, int block) {
    int low = 0, high = table.count - 1;
    while (low < high) {
        const int middle = (low + high + 1) / 2;
        if (table.first_blocks[middle] <= block) {
            low = middle;
        } else {
            high = middle - 1;
        }
    }
    const int64_t begin = (block - table.first_blocks[low]) * chunk, size = table.runs[low].size;
    return {low, begin, begin + chunk < size ? begin + chunk : size};
}

template <int64_t chunk>
int64_t blocks_of(const Run& run) {
    return (run.size + chunk - 1) / chunk;
}

// Calls go(table, blocks) for as many tables as the runs need; empty runs are in none. Returns the first error.
template <int64_t chunk, typename Go>
int for_each_table(const Run* runs, int64_t count, Go go) {
    constexpr int64_t most_blocks = std::numeric_limits<int>::max();
    for (int64_t next = 0; next < count;) {
        Table table{};
        int64_t blocks = 0;
        for (; next < count && table.count < most_runs && blocks + blocks_of<chunk>(runs[next]) <= most_blocks; ++next) {
            if (runs[next].size == 0) continue;
            table.runs[table.count] = runs[next];
            table.first_blocks[table.count++] = static_cast<int>(blocks);
            blocks += blocks_of<chunk>(runs[next]);
        }
        table.first_blocks[table.count] = static_cast<int>(blocks);
        if (const int error = go(table, blocks)) return error;
    }
    return 0;
}

template <typename Element, int size>
struct alignas(sizeof(Element) * size) Vector {
    Element at[size];
};

#ifdef __CUDACC__
// What is read or written in one access.
template <typename Value>
using Raw = std::conditional_t<
    sizeof(Value) == 16, uint4,
    std::conditional_t<sizeof(Value) == 8, uint2,
                       std::conditional_t<sizeof(Value) == 4, unsigned,
                                          std::conditional_t<sizeof(Value) == 2, unsigned short, unsigned char>>>>;
#endif

// As what is not needed again.
template <int size, typename Element>
ON_BOTH Vector<Element, size> streamed(const Element* from) {
    Vector<Element, size> read;
#ifdef __CUDA_ARCH__
    const auto raw = __ldcs(reinterpret_cast<const Raw<Vector<Element, size>>*>(from));
    static_assert(sizeof raw == sizeof read);
    std::memcpy(&read, &raw, sizeof raw);
#else
    std::memcpy(&read, from, sizeof read);
#endif
    return read;
}

template <typename Element, int size>
ON_BOTH void stream(Element* to, const Vector<Element, size>& written) {
#ifdef __CUDA_ARCH__
    Raw<Vector<Element, size>> raw;
    static_assert(sizeof raw == sizeof written);
    std::memcpy(&raw, &written, sizeof raw);
    __stcs(reinterpret_cast<decltype(raw)*>(to), raw);
#else
    std::memcpy(to, &written, sizeof written);
#endif
}

template <int size, typename Element>
ON_BOTH void load(const Element* from, float* to) {
    const auto read = streamed<size>(from);
#pragma unroll
    for (int i = 0; i < size; ++i) to[i] = widened(read.at[i]);
}

template <int size, typename Element>
ON_BOTH void store(Element* to, const float* from) {
    Vector<Element, size> written;
#pragma unroll
    for (int i = 0; i < size; ++i) written.at[i] = narrowed<Element>(from[i]);
    stream(to, written);
}

template <int size, typename Element>
ON_BOTH bool is_aligned(const Element* address) {
    return reinterpret_cast<std::uintptr_t>(address) % (sizeof(Element) * size) == 0;
}

// What all runs of a call have in common. Addresses may be null, and are of the device.
struct Common {
    Factors given;
    const Factors* factors;  // instead of `given`
    const float* scale;      // of gradients, beside that among the factors
    const float* skip;       // nothing is changed unless this is zero
    int64_t copy_is_fp16;    // else it is bf16

    ON_BOTH bool skips() const { return skip && *skip != 0; }

    ON_BOTH Factors ready() const {
        Factors ready = factors ? *factors : given;
        if (scale) ready.gradient_scale *= *scale;
        return ready;
    }

    template <int size>
    ON_BOTH void store_copy(const Run& run, int64_t at, const float* from) const {
        if (!run.copy) return;
        if (copy_is_fp16) {
            store<size>(static_cast<fp16*>(run.copy) + at, from);
        } else {
            store<size>(static_cast<bf16*>(run.copy) + at, from);
        }
    }
};

// Elements of parameters and of gradients.
enum Types { floats, floats_bf16, floats_fp16, bf16s, fp16s, types_count };

// `go` is called with values of the two types: go(float{}, bf16{}).
template <typename Go>
int with_types(int64_t types, Go go) {
    switch (types) {
        case floats: return go(float{}, float{});
        case floats_bf16: return go(float{}, bf16{});
        case floats_fp16: return go(float{}, fp16{});
        case bf16s: return go(bf16{}, bf16{});
        default: return go(fp16{}, fp16{});
    }
}
