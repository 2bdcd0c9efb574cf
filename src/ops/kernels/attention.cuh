// softmax(scale · Q Kᵀ + positions) V within each sequence, a warp a query. The kernel for every
// type, head and kind of positions; what it shares with the backward pass stands here too.

#pragma once
#include "common.cuh"

enum PositionKind : unsigned { NO_POSITIONS = 0, BIAS = 1, DISENTANGLED = 2 };

constexpr unsigned ATTENTION_WARPS = 4;

struct Attention {
    // [tokens, 3 · hidden] of T: Q, K and V side by side
    const void *qkv;
    // [3 · hidden] or null
    const float *bias;
    const unsigned *borders;
    // BIAS: f32 [rows, heads]. DISENTANGLED: T [rows, terms · hidden].
    const void *table;
    const unsigned *row_of;
    unsigned kind, limit;
    unsigned rows, first_row;
    unsigned query, key;
    unsigned first_sequence, sequences;
    unsigned heads, head_dim;
    float scale;
    unsigned tokens;
    unsigned longest, unused;

    __device__ __forceinline__ unsigned hidden() const { return heads * head_dim; }

    // Where the row of the relative position `distance` = j − i is found.
    __device__ __forceinline__ unsigned row(int distance) const {
        return row_of[int(limit) - 1 + distance] - first_row;
    }

    __device__ __forceinline__ float bias_at(unsigned head, int distance) const {
        return static_cast<const float *>(table)[size_t(row(distance)) * heads + head];
    }

    // Values of a row of the table of a disentangled head.
    __device__ __forceinline__ unsigned columns() const { return (query + key) * hidden(); }

    // The query, or the key, of a row of the table; null if positions have none.
    template <class T>
    __device__ __forceinline__ const T *query_of(unsigned row, unsigned head) const {
        if (!query) return nullptr;
        return static_cast<const T *>(table) + size_t(row) * columns() + head * head_dim;
    }
    template <class T>
    __device__ __forceinline__ const T *key_of(unsigned row, unsigned head) const {
        if (!key) return nullptr;
        return static_cast<const T *>(table) + size_t(row) * columns() + query * hidden() +
               head * head_dim;
    }
};

enum Part : unsigned { Q = 0, K = 1, V = 2 };

// A vector of a head in the device's memory, its bias added as it is read.
template <class T> struct Vector {
    const T *values;
    const float *bias;
    unsigned size;
    bool wide, bias_wide;

    __device__ __forceinline__ void chunk(unsigned column, float (&v)[VALUES]) const {
        read(values + column, size - column, wide, v);
        if (bias) {
            float added[VALUES];
            read(bias + column, size - column, bias_wide, added);
#pragma unroll
            for (unsigned i = 0; i < VALUES; i++) v[i] += added[i];
        }
    }
    __device__ __forceinline__ float at(unsigned column) const {
        return to_float(values[column]) + (bias ? bias[column] : 0.0f);
    }
};

// One in shared memory, padded with zeros to a multiple of eight.
struct Kept {
    const float *values;

    __device__ __forceinline__ void chunk(unsigned column, float (&v)[VALUES]) const {
#pragma unroll
        for (unsigned i = 0; i < VALUES; i++) v[i] = values[column + i];
    }
};

template <class T>
__device__ __forceinline__ Vector<T> part(const Attention &a, unsigned token, unsigned head,
                                          Part which) {
    const size_t column = size_t(which) * a.hidden() + head * a.head_dim;
    const T *values = static_cast<const T *>(a.qkv) + size_t(token) * 3 * a.hidden() + column;
    const float *bias = a.bias ? a.bias + column : nullptr;
    return {values, bias, a.head_dim, is_wide(values), is_wide(bias)};
}

// The head's part of a row of [tokens, hidden].
template <class T>
__device__ __forceinline__ Vector<T> output_part(const Attention &a, const T *rows, unsigned token,
                                                 unsigned head) {
    const T *values = rows + size_t(token) * a.hidden() + head * a.head_dim;
    return {values, nullptr, a.head_dim, is_wide(values), false};
}

// The warp brings a vector to shared memory.
template <class T>
__device__ __forceinline__ Kept keep(const Vector<T> &vector, unsigned padded, float *to) {
    for (unsigned c = threadIdx.x % WARP; c < padded; c += WARP)
        to[c] = c < vector.size ? vector.at(c) : 0.0f;
    return {to};
}

template <class L, class R>
__device__ __forceinline__ float dot(const L &left, const R &right, unsigned size) {
    float sum = 0.0f;
    for (unsigned c = 0; c < size; c += VALUES) {
        float l[VALUES], r[VALUES];
        left.chunk(c, l);
        right.chunk(c, r);
#pragma unroll
        for (unsigned i = 0; i < VALUES; i++) sum += l[i] * r[i];
    }
    return sum;
}

// The score of query i and key j = i + distance.
template <class T, class QueryVector, class KeyVector>
__device__ __forceinline__ float score(const Attention &a, unsigned head, int distance,
                                       const QueryVector &query, const KeyVector &key) {
    float sum = dot(query, key, a.head_dim);
    if (a.kind == DISENTANGLED) {
        const unsigned row = a.row(distance);
        if (const T *of = a.key_of<T>(row, head))
            sum += dot(query, Vector<T>{of, nullptr, a.head_dim, is_wide(of), false}, a.head_dim);
        if (const T *of = a.query_of<T>(row, head))
            sum += dot(key, Vector<T>{of, nullptr, a.head_dim, is_wide(of), false}, a.head_dim);
    }
    sum *= a.scale;
    if (a.kind == BIAS) sum += a.bias_at(head, distance);
    return sum;
}

// What a warp of the kernels by token works on.
struct Place {
    // First token and number of tokens of the sequence; the place of the warp's token in it.
    unsigned start, length, token;
    unsigned head;
    // Columns of a head, up to the next multiple of eight.
    unsigned padded;
    // The warp's shared memory, of `floats` values.
    float *memory;

    __device__ Place(const Attention &a, unsigned vectors, unsigned chunks) {
        const unsigned sequence = a.first_sequence + blockIdx.x / a.heads;
        const unsigned warp = threadIdx.x / WARP;
        head = blockIdx.x % a.heads;
        start = a.borders[sequence];
        length = a.borders[sequence + 1] - start;
        token = blockIdx.y * ATTENTION_WARPS + warp;
        padded = (a.head_dim + VALUES - 1) / VALUES * VALUES;
        memory = reinterpret_cast<float *>(shared_memory) +
                 warp * (vectors * padded + chunks * WARP);
    }
};

// A running softmax, the same in all lanes: the largest score and the sum of exponentials.
struct Running {
    float largest = -INFINITY;
    float sum = 0.0f;

    // Takes a score of each lane. Returns the factor of what has been summed before; `weight`
    // becomes the lane's exponential.
    __device__ __forceinline__ float take(float score, float &weight) {
        const float before = largest;
        largest = fmaxf(before, warp_max(score));
        const float factor = expf(before - largest);
        weight = expf(score - largest);
        sum = sum * factor + warp_sum(weight);
        return factor;
    }
};

template <class T> __device__ void attention(const Attention &a, T *out) {
    const Place place(a, 2, 1);
    if (place.token >= place.length) return;
    const unsigned lane = threadIdx.x % WARP;
    float *sums = place.memory + place.padded;
    float *weights = sums + place.padded;
    const unsigned i = place.token, head = place.head;
    const Kept query = keep(part<T>(a, place.start + i, head, Q), place.padded, place.memory);
    for (unsigned c = lane; c < a.head_dim; c += WARP) sums[c] = 0.0f;
    __syncwarp();

    Running softmax;
    for (unsigned first = 0; first < place.length; first += WARP) {
        const unsigned j = first + lane;
        float s = -INFINITY;
        if (j < place.length)
            s = score<T>(a, head, int(j) - int(i), query, part<T>(a, place.start + j, head, K));
        float weight;
        const float factor = softmax.take(s, weight);
        weights[lane] = weight;
        __syncwarp();
        const unsigned keys = min(WARP, place.length - first);
        for (unsigned c = lane; c < a.head_dim; c += WARP) {
            float sum = sums[c] * factor;
            for (unsigned k = 0; k < keys; k++)
                sum += weights[k] * part<T>(a, place.start + first + k, head, V).at(c);
            sums[c] = sum;
        }
        __syncwarp();
    }
    T *target = out + size_t(place.start + i) * a.hidden() + head * a.head_dim;
    for (unsigned c = lane; c < a.head_dim; c += WARP)
        target[c] = from_float<T>(sums[c] / softmax.sum);
}

#define DEFINE(name, T)                                                                            \
    KERNEL(128, attention_##name, (const __grid_constant__ Attention a, T *out),                   \
           attention<T>(a, out))
FOR_SCALARS(DEFINE)
#undef DEFINE
