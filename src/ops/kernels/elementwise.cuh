// Embeddings, activations, dropout, maps and sums of columns, windows over tokens.

#pragma once
#include "norm.cuh"

template <class T>
__device__ void embed(const T *word, const T *position, const T *token_type,
                      const unsigned *word_rows, const unsigned *position_rows,
                      const unsigned *type_rows, T *out, unsigned tokens, unsigned hidden) {
    const unsigned token = warp_row();
    if (token >= tokens) return;
    const T *w = word + size_t(word_rows[token]) * hidden;
    const T *p = position + size_t(position_rows[token]) * hidden;
    const T *t = token_type + size_t(type_rows[token]) * hidden;
    const bool wide = is_wide(word, hidden) && is_wide(position, hidden) &&
                      is_wide(token_type, hidden) && is_wide(out, hidden);
    for_each_chunk(hidden, [&](unsigned column, unsigned valid) {
        float a[VALUES], b[VALUES], c[VALUES];
        read(w + column, valid, wide, a);
        read(p + column, valid, wide, b);
        read(t + column, valid, wide, c);
#pragma unroll
        for (unsigned i = 0; i < VALUES; i++) a[i] = a[i] + b[i] + c[i];
        write(out + size_t(token) * hidden + column, valid, wide, a);
    });
}

// The first value of this thread.
__device__ __forceinline__ size_t first_value() {
    return (size_t(blockIdx.x) * blockDim.x + threadIdx.x) * VALUES;
}

__device__ __forceinline__ unsigned values_from(size_t first, unsigned long long count) {
    return count - first < VALUES ? unsigned(count - first) : VALUES;
}

template <class T>
__device__ void activation(const T *x, T *y, unsigned long long count, unsigned kind) {
    const size_t first = first_value();
    if (first >= count) return;
    const unsigned valid = values_from(first, count);
    float v[VALUES];
    read(x + first, valid, is_wide(x), v);
#pragma unroll
    for (unsigned i = 0; i < VALUES; i++) v[i] = activate(kind, v[i]);
    write(y + first, valid, is_wide(y), v);
}

template <class T>
__device__ void activation_gradient(const T *gradient, const T *x, T *dx, unsigned long long count,
                                    unsigned kind) {
    const size_t first = first_value();
    if (first >= count) return;
    const unsigned valid = values_from(first, count);
    float d[VALUES], v[VALUES];
    read(gradient + first, valid, is_wide(gradient), d);
    read(x + first, valid, is_wide(x), v);
#pragma unroll
    for (unsigned i = 0; i < VALUES; i++) d[i] *= activation_derivative(kind, v[i]);
    write(dx + first, valid, is_wide(dx), d);
}

// The functions of the same names in dropout.rs; the mask must be the very same.
__device__ __forceinline__ unsigned long long mix(unsigned long long z) {
    z += 0x9e3779b97f4a7c15ull;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ull;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebull;
    return z ^ (z >> 31);
}

__device__ __forceinline__ unsigned mix32(unsigned x) {
    x ^= x >> 16;
    x *= 0x7feb352du;
    x ^= x >> 15;
    x *= 0x846ca68bu;
    return x ^ (x >> 16);
}

template <class T>
__device__ void dropout(const T *x, T *y, unsigned rows, unsigned columns, unsigned long long seed,
                        unsigned long long first_row, unsigned threshold, float scale) {
    const unsigned row = warp_row();
    if (row >= rows) return;
    const unsigned key = unsigned(mix(seed ^ mix(first_row + row)));
    const size_t start = size_t(row) * columns;
    for_each_chunk(columns, [&](unsigned column, unsigned valid) {
        float v[VALUES];
        read(x + start + column, valid, is_wide(x, columns), v);
#pragma unroll
        for (unsigned i = 0; i < VALUES; i++)
            v[i] = mix32(key ^ (column + i)) >= threshold ? v[i] * scale : 0.0f;
        write(y + start + column, valid, is_wide(y, columns), v);
    });
}

template <class T>
__device__ void map_columns(const T *y, const float *gain, const float *shift, T *out,
                            unsigned rows, unsigned width_of_row, unsigned column, unsigned width) {
    const unsigned row = warp_row();
    if (row >= rows) return;
    const size_t start = size_t(row) * width_of_row;
    for (unsigned c = threadIdx.x % WARP; c < width_of_row; c += WARP) {
        if (c >= column && c - column < width) {
            const float added = shift ? shift[c - column] : 0.0f;
            out[start + c] = from_float<T>(to_float(y[start + c]) * gain[c - column] + added);
        } else {
            out[start + c] = y[start + c];
        }
    }
}

// A block has 32 columns; each of its warps adds every 32nd row.
template <class T>
__device__ void column_sums(const T *x, float *sums, unsigned rows, unsigned columns) {
    const unsigned warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
    const unsigned warps = blockDim.x / WARP;
    const unsigned column = blockIdx.x * WARP + lane;
    float *partial = reinterpret_cast<float *>(shared_memory);
    float sum = 0.0f;
    if (column < columns)
        for (unsigned row = warp; row < rows; row += warps)
            sum += to_float(x[size_t(row) * columns + column]);
    partial[threadIdx.x] = sum;
    __syncthreads();
    if (warp == 0 && column < columns) {
        sum = 0.0f;
        for (unsigned w = 0; w < warps; w++) sum += partial[w * WARP + lane];
        sums[column] = sum;
    }
}

struct Window {
    unsigned start, end;
};

// The sequence that a token stands in.
__device__ __forceinline__ Window sequence_of(const unsigned *offsets, unsigned sequences,
                                              unsigned token) {
    // The last border that is not beyond the token.
    unsigned low = 0, high = sequences;
    while (high - low > 1) {
        const unsigned middle = (low + high) / 2;
        if (offsets[middle] <= token) low = middle;
        else high = middle;
    }
    return {offsets[low], offsets[low + 1]};
}

template <class T>
__device__ void unfold(const T *x, const unsigned *offsets, T *out, unsigned sequences,
                       unsigned tokens, unsigned hidden, unsigned kernel) {
    const unsigned token = warp_row();
    if (token >= tokens) return;
    const Window window = sequence_of(offsets, sequences, token);
    const unsigned before = kernel / 2;
    for (unsigned place = 0; place < kernel; place++) {
        const unsigned from = token + place;
        const bool inside = from >= window.start + before && from < window.end + before;
        T *target = out + (size_t(token) * kernel + place) * hidden;
        for (unsigned c = threadIdx.x % WARP; c < hidden; c += WARP)
            target[c] = inside ? x[size_t(from - before) * hidden + c] : from_float<T>(0.0f);
    }
}

template <class T>
__device__ void fold(const T *windows, const unsigned *offsets, T *out, unsigned sequences,
                     unsigned tokens, unsigned hidden, unsigned kernel) {
    const unsigned token = warp_row();
    if (token >= tokens) return;
    const Window window = sequence_of(offsets, sequences, token);
    const unsigned before = kernel / 2;
    for (unsigned c = threadIdx.x % WARP; c < hidden; c += WARP) {
        float sum = 0.0f;
        // From the first window that this token stands in to the last.
        for (unsigned place = kernel; place-- > 0;) {
            const unsigned of = token + before;
            if (of >= window.start + place && of < window.end + place)
                sum += to_float(windows[(size_t(of - place) * kernel + place) * hidden + c]);
        }
        out[size_t(token) * hidden + c] = from_float<T>(sum);
    }
}

#define DEFINE(name, T)                                                                            \
    KERNEL(128, embed_##name,                                                                      \
           (const T *word, const T *position, const T *token_type, const unsigned *word_rows,      \
            const unsigned *position_rows, const unsigned *type_rows, T *out, unsigned tokens,     \
            unsigned hidden),                                                                      \
           embed<T>(word, position, token_type, word_rows, position_rows, type_rows, out, tokens,  \
                    hidden))                                                                       \
    KERNEL(256, activation_##name, (const T *x, T *y, unsigned long long count, unsigned kind),    \
           activation<T>(x, y, count, kind))                                                       \
    KERNEL(256, activation_gradient_##name,                                                        \
           (const T *gradient, const T *x, T *dx, unsigned long long count, unsigned kind),        \
           activation_gradient<T>(gradient, x, dx, count, kind))                                   \
    KERNEL(128, dropout_##name,                                                                    \
           (const T *x, T *y, unsigned rows, unsigned columns, unsigned long long seed,            \
            unsigned long long first_row, unsigned threshold, float scale),                        \
           dropout<T>(x, y, rows, columns, seed, first_row, threshold, scale))                     \
    KERNEL(128, map_columns_##name,                                                                \
           (const T *y, const float *gain, const float *shift, T *out, unsigned rows,              \
            unsigned width_of_row, unsigned column, unsigned width),                               \
           map_columns<T>(y, gain, shift, out, rows, width_of_row, column, width))                 \
    KERNEL(1024, column_sums_##name,                                                               \
           (const T *x, float *sums, unsigned rows, unsigned columns),                             \
           column_sums<T>(x, sums, rows, columns))                                                 \
    KERNEL(128, unfold_##name,                                                                     \
           (const T *x, const unsigned *offsets, T *out, unsigned sequences, unsigned tokens,      \
            unsigned hidden, unsigned kernel),                                                     \
           unfold<T>(x, offsets, out, sequences, tokens, hidden, kernel))                          \
    KERNEL(128, fold_##name,                                                                       \
           (const T *windows, const unsigned *offsets, T *out, unsigned sequences,                 \
            unsigned tokens, unsigned hidden, unsigned kernel),                                    \
           fold<T>(windows, offsets, out, sequences, tokens, hidden, kernel))
FOR_SCALARS(DEFINE)
#undef DEFINE
