// Rotary position embedding of queries and keys in one call: pairs of elements are turned by an angle of the position.

#include "elements.h"

namespace {

// A tensor of [batch, heads, positions, width], with strides in elements; the last is 1.
struct Heads {
    const void* from;
    void* to;
    int64_t heads;
    int64_t from_batch, from_head, from_position;
    int64_t to_batch, to_head, to_position;
};

struct Angles {  // of [batch or 1, positions, pairs]
    const void* cosine;
    const void* sine;
    int64_t cosine_batch, cosine_position;
    int64_t sine_batch, sine_position;
};

template <typename Element, typename Angle, bool from_neighbors, bool to_neighbors>
inline void turn(
    const Element* from, Element* to, const Angle* cosine, const Angle* sine, float sign, int64_t pairs,
    int64_t width) {
    const int64_t second = from_neighbors ? 1 : pairs, step = from_neighbors ? 2 : 1;
    const int64_t to_second = to_neighbors ? 1 : pairs, to_step = to_neighbors ? 2 : 1;
#pragma omp simd
    for (int64_t i = 0; i < pairs; ++i) {
        const float a = widened(from[i * step]), b = widened(from[i * step + second]);
        const float c = widened(cosine[i]), s = widened(sine[i]) * sign;
        to[i * to_step] = narrowed<Element>(a * c - b * s);
        to[i * to_step + to_second] = narrowed<Element>(b * c + a * s);
    }
    for (int64_t i = 2 * pairs; i < width; ++i) to[i] = from[i];
}

template <typename Element, typename Angle, bool from_neighbors, bool to_neighbors>
void turn_all(
    const Heads& x, const Angles& angles, float sign, int64_t batch, int64_t begin, int64_t end, int64_t pairs,
    int64_t width) {
    const auto one = [&](int64_t head, int64_t position) {
        const Element* from = static_cast<const Element*>(x.from) + batch * x.from_batch + head * x.from_head;
        Element* to = static_cast<Element*>(x.to) + batch * x.to_batch + head * x.to_head;
        const int64_t at_cosine = batch * angles.cosine_batch + position * angles.cosine_position;
        const int64_t at_sine = batch * angles.sine_batch + position * angles.sine_position;
        turn<Element, Angle, from_neighbors, to_neighbors>(
            from + position * x.from_position, to + position * x.to_position,
            static_cast<const Angle*>(angles.cosine) + at_cosine, static_cast<const Angle*>(angles.sine) + at_sine,
            sign, pairs, width);
    };
    // In the order in which they lie in memory.
    if (x.from_position > x.from_head) {
        for (int64_t position = begin; position < end; ++position) {
            for (int64_t head = 0; head < x.heads; ++head) one(head, position);
        }
    } else {
        for (int64_t head = 0; head < x.heads; ++head) {
            for (int64_t position = begin; position < end; ++position) one(head, position);
        }
    }
}

}  // namespace

extern "C" {

// sign: -1 turns backward; from_neighbors, to_neighbors: pairs lie so, else in halves of the first 2 * pairs elements.
void rotary(
    const Heads* tensors, int64_t count, const Angles* angles, float sign, int64_t batches, int64_t positions,
    int64_t pairs, int64_t width, int64_t from_neighbors, int64_t to_neighbors, int64_t is_bf16, int64_t angle_is_bf16,
    int64_t threads) {
    int64_t heads = 0;
    for (int64_t i = 0; i < count; ++i) heads += tensors[i].heads;
    const auto run = [&](auto element, auto angle, auto from, auto to) {
        share(batches * positions, heads * width, threads, [&](int64_t, int64_t begin, int64_t end) {
            for (int64_t at = begin; at < end;) {
                const int64_t batch = at / positions, last = std::min(end, (batch + 1) * positions);
                for (int64_t i = 0; i < count; ++i) {
                    turn_all<decltype(element), decltype(angle), decltype(from)::value, decltype(to)::value>(
                        tensors[i], *angles, sign, batch, at - batch * positions, last - batch * positions, pairs,
                        width);
                }
                at = last;
            }
        });
    };
    with_element(is_bf16, [&](auto element) {
        with_element(angle_is_bf16, [&](auto angle) {
            const auto with = [&](auto from) {
                to_neighbors ? run(element, angle, from, std::true_type{}) : run(element, angle, from, std::false_type{});
            };
            from_neighbors ? with(std::true_type{}) : with(std::false_type{});
        });
    });
}
}
