// The C interface of optimizers.cuh and norm.cuh; lists.py calls it. Functions return 0, or the number of an error.

#include "norm.cuh"
#include "optimizers.cuh"

namespace {

template <typename Rule>
int update(const Run* runs, int64_t count, int64_t types, const Common& common, int64_t queue) {
    return with_types(types, [&](auto parameter, auto gradient) {
        return for_each_table<update_chunk>(runs, count, [&](const Table& table, int64_t blocks) {
            return launch(Update<Rule, decltype(parameter), decltype(gradient)>{{}, table, common}, blocks, queue);
        });
    });
}

template <int64_t chunk>
int64_t all_blocks(const Run* runs, int64_t count) {
    int64_t blocks = 0;
    for (int64_t i = 0; i < count; ++i) blocks += blocks_of<chunk>(runs[i]);
    return blocks;
}

}  // namespace

extern "C" {

// rule: 0 SGD, 1 Adagrad, 2 Lion, 3 Adam; types: as `Types`.
int optimize(const Run* runs, const Common* common, int64_t count, int64_t rule, int64_t types, int64_t device,
             int64_t queue) {
    if (const int error = use_device(device)) return error;
    switch (rule) {
        case 0: return update<Sgd>(runs, count, types, *common, queue);
        case 1: return update<Adagrad>(runs, count, types, *common, queue);
        case 2: return update<Lion>(runs, count, types, *common, queue);
        default: return update<AdamOf<true>>(runs, count, types, *common, queue);
    }
}

// How many floats `lamb` wants to write in between.
int64_t floats_of_lamb(const Run* runs, int64_t count) { return 2 * all_blocks<update_chunk>(runs, count) + most_runs; }

int lamb(const Run* runs, const Common* common, float* between, int64_t count, int64_t types, int64_t device,
         int64_t queue) {
    if (const int error = use_device(device)) return error;
    float* trusts = between;
    auto* sums = reinterpret_cast<Pair<float>*>(between + most_runs);
    return with_types(types, [&](auto parameter, auto gradient) {
        using Parameter = decltype(parameter);
        return for_each_table<update_chunk>(runs, count, [&](const Table& table, int64_t blocks) {
            int error = launch(LambMoments<Parameter, decltype(gradient)>{table, *common, sums}, blocks, queue);
            if (!error) error = launch(LambTrust{table, sums, trusts}, table.count, queue);
            if (!error) error = launch(LambStep<Parameter>{{}, table, *common, trusts}, blocks, queue);
            return error;
        });
    });
}

// How many floats `squares` writes.
int64_t floats_of_squares(const Run* runs, int64_t count) { return 2 * all_blocks<norm_chunk>(runs, count); }

// type: of gradients, 0 float, 1 bf16, 2 fp16; the other members of runs are not read.
int squares(const Run* runs, float* sums, int64_t count, int64_t type, int64_t device, int64_t queue) {
    if (const int error = use_device(device)) return error;
    auto* next = reinterpret_cast<Pair<float>*>(sums);
    return with_types(type, [&](auto, auto gradient) {
        return for_each_table<norm_chunk>(runs, count, [&](const Table& table, int64_t blocks) {
            const int error = launch(Squares<decltype(gradient)>{table, next}, blocks, queue);
            next += blocks;
            return error;
        });
    });
}

// sums: what `squares` wrote, `size` floats; result: three floats, see `Norm`.
int norm_of_sums(const float* sums, float* result, int64_t size, float gradient_scale, float most, int64_t device,
         int64_t queue) {
    if (const int error = use_device(device)) return error;
    return launch(
        Norm{reinterpret_cast<const Pair<float>*>(sums), size / 2, gradient_scale, most, result}, 1, queue);
}
}
