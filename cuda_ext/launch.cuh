// Kernels as objects: body(block, thread) is the work of one thread. nvcc makes a kernel of it; any other compiler loops
// over blocks and threads, so that the code of a GPU runs, and is tested, on the CPU too.
//
// Where the threads of a group (a warp, or a block) need a sum or a maximum over all of them, a body has two halves:
// before(block, thread, held) returns the thread's share, after(block, thread, held, total) goes on with the total.
// `held` is what a thread keeps between them. Totals have one order of additions, whichever compiler it was.

#pragma once

#include <algorithm>
#include <limits>

#include "portable.h"

constexpr int block_threads = 256;
constexpr int warp_threads = 32;
constexpr int block_warps = block_threads / warp_threads;

template <typename Number>
struct Pair {
    Number first, second;
};

struct Sum {
    template <typename Number>
    static ON_BOTH Pair<Number> of(const Pair<Number>& a, const Pair<Number>& b) {
        return {a.first + b.first, a.second + b.second};
    }
};

struct Largest {  // nan where one is
    template <typename Number>
    static ON_BOTH Number of(Number a, Number b) {
        return a > b || a != a ? a : b;
    }
    template <typename Number>
    static ON_BOTH Pair<Number> of(const Pair<Number>& a, const Pair<Number>& b) {
        return {of(a.first, b.first), of(a.second, b.second)};
    }
};

// Bodies without halves.
struct Alone {
    static constexpr int group = 1;
};

#ifdef __CUDACC__

template <typename Number>
__device__ __forceinline__ Pair<Number> of_lane(const Pair<Number>& own, int distance) {
    return {__shfl_xor_sync(~0u, own.first, distance), __shfl_xor_sync(~0u, own.second, distance)};
}

template <int group, typename Reduction, typename Value>
__device__ __forceinline__ Value total_of_group(Value value) {
    for (int distance = warp_threads / 2; distance; distance /= 2) {
        value = Reduction::of(value, of_lane(value, distance));
    }
    if constexpr (group == block_threads) {
        __shared__ Value of_warps[block_warps];
        if (threadIdx.x % warp_threads == 0) of_warps[threadIdx.x / warp_threads] = value;
        __syncthreads();
        value = of_warps[0];
        for (int warp = 1; warp < block_warps; ++warp) value = Reduction::of(value, of_warps[warp]);
    }
    return value;
}

template <typename Body>
__global__ void __launch_bounds__(block_threads) run(const __grid_constant__ Body body) {
    const int block = static_cast<int>(blockIdx.x), thread = static_cast<int>(threadIdx.x);
    if constexpr (Body::group == 1) {
        body(block, thread);
    } else {
        typename Body::Held held;
        const auto own = body.before(block, thread, held);
        body.after(block, thread, held, total_of_group<Body::group, typename Body::Reduction>(own));
    }
}

// queue: the stream. Returns CUDA's number of the error, 0 where there is none.
template <typename Body>
int launch(const Body& body, int64_t blocks, int64_t queue) {
    if (blocks == 0) return 0;
    run<<<static_cast<unsigned>(blocks), block_threads, 0, reinterpret_cast<cudaStream_t>(queue)>>>(body);
    return static_cast<int>(cudaGetLastError());
}

#else

template <int group, typename Reduction, typename Value>
void replace_by_totals(Value* values) {
    for (int distance = warp_threads / 2; distance; distance /= 2) {
        Value others[block_threads];
        for (int thread = 0; thread < block_threads; ++thread) others[thread] = values[thread ^ distance];
        for (int thread = 0; thread < block_threads; ++thread) {
            values[thread] = Reduction::of(values[thread], others[thread]);
        }
    }
    if (group != block_threads) return;
    Value total = values[0];
    for (int warp = 1; warp < block_warps; ++warp) total = Reduction::of(total, values[warp * warp_threads]);
    std::fill(values, values + block_threads, total);
}

// queue: how many threads share the blocks.
template <typename Body>
int launch(const Body& body, int64_t blocks, int64_t queue) {
#pragma omp parallel for schedule(dynamic) num_threads(static_cast<int>(queue)) if (queue > 1)
    for (int64_t block = 0; block < blocks; ++block) {
        const int index = static_cast<int>(block);
        if constexpr (Body::group == 1) {
            for (int thread = 0; thread < block_threads; ++thread) body(index, thread);
        } else {
            typename Body::Held held[block_threads];
            decltype(body.before(0, 0, held[0])) values[block_threads];
            for (int thread = 0; thread < block_threads; ++thread) {
                values[thread] = body.before(index, thread, held[thread]);
            }
            replace_by_totals<Body::group, typename Body::Reduction>(values);
            for (int thread = 0; thread < block_threads; ++thread) {
                body.after(index, thread, held[thread], values[thread]);
            }
        }
    }
    return 0;
}

#endif

// Sends the launches that follow to a device of this process. Returns CUDA's number of the error.
inline int use_device(int64_t device) {
#ifdef __CUDACC__
    return static_cast<int>(cudaSetDevice(static_cast<int>(device)));
#else
    return device != 0;
#endif
}

// These are in each library once, as it is one source: why no launch will do, as where the driver is older than the
// runtime that is linked in; and what an error is.
extern "C" int hindrance() {
#ifdef __CUDACC__
    int count = 0;
    return static_cast<int>(cudaGetDeviceCount(&count));
#else
    return 0;
#endif
}

extern "C" const char* explained(int64_t error) {
#ifdef __CUDACC__
    return cudaGetErrorString(static_cast<cudaError_t>(error));
#else
    return error ? "there is no device but the CPU" : "";
#endif
}
