// Attention by tensor cores: 16-bit types, heads of 32, 64 and 128, no positions or a bias.
//
// A warp has 16 queries of a head, one or more warps have the head, a block has as many heads as it
// has warps for. The warps of a head bring 32 keys and values at a time to shared memory; the
// softmax runs on along them, and the sums of values are scaled only when a larger score turns up.
// All warps of a block meet at the same barriers, whatever the lengths of their sequences.

#pragma once
#include "attention.cuh"
#include "tile.cuh"

// Brings rows of qkv, the bias added, to shared memory; zeros beyond `rows`.
template <unsigned D, class T>
__device__ __forceinline__ void stage_part(const Attention &a, unsigned token, unsigned head,
                                           Part which, unsigned rows, unsigned all_rows, T *to,
                                           unsigned thread, unsigned threads) {
    const size_t stride = size_t(3) * a.hidden();
    const size_t column_of_head = size_t(which) * a.hidden() + head * D;
    const T *from = static_cast<const T *>(a.qkv) + token * stride + column_of_head;
    const float *bias = a.bias ? a.bias + column_of_head : nullptr;
    const bool bias_wide = is_wide(bias);
    constexpr unsigned per_row = D / VALUES;
    for (unsigned i = thread; i < all_rows * per_row; i += threads) {
        const unsigned row = i / per_row, column = i % per_row * VALUES;
        uint4 raw = make_uint4(0, 0, 0, 0);
        if (row < rows) {
            const T *p = from + row * stride + column;
            raw = load_16_bytes(p);
            if (bias) {
                T *values = reinterpret_cast<T *>(&raw);
                float added[VALUES];
                read(bias + column, VALUES, bias_wide, added);
#pragma unroll
                for (unsigned k = 0; k < VALUES; k++)
                    values[k] = from_float<T>(to_float(values[k]) + added[k]);
            }
        }
        store_16_bytes(to + row * (D + PAD) + column, raw);
    }
}

template <class T, unsigned D>
__device__ void attention_tiles(const Attention &a, T *out, unsigned warps_per_head) {
    using namespace nvcuda::wmma;
    constexpr unsigned KEYS = 32, ROW = D + PAD, SCORES = KEYS + 4, WEIGHTS = KEYS + 8;
    constexpr unsigned OF_SCORES = TILE * SCORES * 4, OF_WEIGHTS = TILE * WEIGHTS * sizeof(T);
    constexpr unsigned OF_QUERIES = TILE * ROW * sizeof(T);
    constexpr unsigned OF_WARP =
        (OF_SCORES + OF_WEIGHTS > OF_QUERIES ? OF_SCORES + OF_WEIGHTS : OF_QUERIES) +
        (KEYS + TILE) * 4;
    const unsigned heads_per_block = blockDim.x / WARP / warps_per_head;
    const unsigned warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
    const unsigned group = warp / warps_per_head;

    // A sequence's head for each group of warps; a block takes `queries` of each.
    const unsigned queries = warps_per_head * TILE;
    const unsigned first_of_block = blockIdx.y * queries;
    unsigned start = 0, length = 0, head = 0, longest = 0;
    for (unsigned g = 0; g < heads_per_block; g++) {
        const unsigned item = blockIdx.x * heads_per_block + g;
        if (item >= a.sequences * a.heads) continue;
        const unsigned sequence = a.first_sequence + item / a.heads;
        const unsigned begin = a.borders[sequence];
        const unsigned tokens = a.borders[sequence + 1] - begin;
        if (tokens <= first_of_block) continue;
        longest = max(longest, tokens);
        if (g == group) {
            start = begin;
            length = tokens;
            head = item % a.heads;
        }
    }
    if (longest == 0) return;
    const unsigned first_query = first_of_block + warp % warps_per_head * TILE;
    const bool has_queries = first_query < length;
    const unsigned thread = threadIdx.x % (warps_per_head * WARP);
    const unsigned threads = warps_per_head * WARP;

    T *keys = reinterpret_cast<T *>(shared_memory) + group * 2 * KEYS * ROW;
    T *values = keys + KEYS * ROW;
    unsigned char *own =
        shared_memory + heads_per_block * 2 * KEYS * ROW * sizeof(T) + warp * OF_WARP;
    T *of_queries = reinterpret_cast<T *>(own);
    float *scores = reinterpret_cast<float *>(own);
    T *weights = reinterpret_cast<T *>(own + OF_SCORES);
    float *biases = reinterpret_cast<float *>(own + OF_WARP) - (KEYS + TILE);

    fragment<matrix_a, 16, 16, 16, T, row_major> query[D / 16];
    fragment<accumulator, 16, 16, 16, float> sums[D / 16];
    if (has_queries) {
        stage_part<D>(a, start + first_query, head, Q, min(TILE, length - first_query), TILE,
                      of_queries, lane, WARP);
        __syncwarp();
#pragma unroll
        for (unsigned k = 0; k < D / 16; k++) {
            load_matrix_sync(query[k], of_queries + k * 16, ROW);
            fill_fragment(sums[k], 0.0f);
        }
        __syncwarp();
    }

    // Two lanes have a row of scores: one its even columns, one its odd ones.
    const unsigned row = lane / 2, odd = lane % 2;
    float largest = -INFINITY, sum = 0.0f;
    for (unsigned first_key = 0; first_key < longest; first_key += KEYS) {
        const unsigned here = first_key < length ? min(KEYS, length - first_key) : 0;
        __syncthreads();
        if (here > 0) {
            stage_part<D>(a, start + first_key, head, K, here, KEYS, keys, thread, threads);
            stage_part<D>(a, start + first_key, head, V, here, KEYS, values, thread, threads);
        }
        __syncthreads();
        if (!has_queries || here == 0) continue;

        if (a.kind == BIAS) {
            // Of all distances between these queries and keys.
            for (unsigned i = lane; i < KEYS + TILE - 1; i += WARP) {
                const int distance = int(first_key + i) - int(first_query + TILE - 1);
                const bool inside = distance < int(length) && -distance < int(length);
                biases[i] = inside ? a.bias_at(head, distance) : 0.0f;
            }
        }
#pragma unroll
        for (unsigned n = 0; n < KEYS / 16; n++) {
            fragment<accumulator, 16, 16, 16, float> product;
            fill_fragment(product, 0.0f);
#pragma unroll
            for (unsigned k = 0; k < D / 16; k++) {
                fragment<matrix_b, 16, 16, 16, T, col_major> key;
                load_matrix_sync(key, keys + n * 16 * ROW + k * 16, ROW);
                mma_sync(product, query[k], key, product);
            }
            store_matrix_sync(scores + n * 16, product, SCORES, mem_row_major);
        }
        __syncwarp();
        float found[KEYS / 2];
        float most = largest;
#pragma unroll
        for (unsigned i = 0; i < KEYS / 2; i++) {
            const unsigned key = 2 * i + odd;
            float s = -INFINITY;
            if (key < here) {
                s = scores[row * SCORES + key] * a.scale;
                if (a.kind == BIAS) s += biases[key + TILE - 1 - row];
            }
            found[i] = s;
            most = fmaxf(most, s);
        }
        most = fmaxf(most, __shfl_xor_sync(ALL_LANES, most, 1));
        const float factor = expf(largest - most);
        largest = most;
        float total = 0.0f;
#pragma unroll
        for (unsigned i = 0; i < KEYS / 2; i++) {
            // The sum is of the weights as the values are multiplied with them.
            const T weight = from_float<T>(expf(found[i] - most));
            weights[row * WEIGHTS + 2 * i + odd] = weight;
            total += to_float(weight);
        }
        total += __shfl_xor_sync(ALL_LANES, total, 1);
        sum = sum * factor + total;
        __syncwarp();
        if (first_key > 0 && __any_sync(ALL_LANES, factor != 1.0f)) {
            // By way of shared memory: which lane has which value is not documented.
#pragma unroll
            for (unsigned k = 0; k < D / 16; k++) {
                store_matrix_sync(scores, sums[k], SCORES, mem_row_major);
                __syncwarp();
#pragma unroll
                for (unsigned i = 0; i < 8; i++) scores[row * SCORES + 2 * i + odd] *= factor;
                __syncwarp();
                load_matrix_sync(sums[k], scores, SCORES, mem_row_major);
                __syncwarp();
            }
        }
#pragma unroll
        for (unsigned n = 0; n < KEYS / 16; n++) {
            fragment<matrix_a, 16, 16, 16, T, row_major> weight;
            load_matrix_sync(weight, weights + n * 16, WEIGHTS);
#pragma unroll
            for (unsigned k = 0; k < D / 16; k++) {
                fragment<matrix_b, 16, 16, 16, T, row_major> value;
                load_matrix_sync(value, values + n * 16 * ROW + k * 16, ROW);
                mma_sync(sums[k], weight, value, sums[k]);
            }
        }
        __syncwarp();
    }
    if (!has_queries) return;
    const unsigned token = first_query + row;
    T *target = out + size_t(start + token) * a.hidden() + head * D;
#pragma unroll
    for (unsigned k = 0; k < D / 16; k++) {
        store_matrix_sync(scores, sums[k], SCORES, mem_row_major);
        __syncwarp();
        if (token < length) {
            float v[VALUES];
#pragma unroll
            for (unsigned i = 0; i < VALUES; i++)
                v[i] = scores[row * SCORES + odd * VALUES + i] / sum;
            write(target + k * 16 + odd * VALUES, VALUES, true, v);
        }
        __syncwarp();
    }
}

#define DEFINE_SIZE(name, T, size)                                                                 \
    KERNEL(128, attention_tiles_##size##_##name,                                                   \
           (const __grid_constant__ Attention a, T *out, unsigned warps_per_head),                 \
           attention_tiles<T, size>(a, out, warps_per_head))
#define DEFINE(name, T)                                                                            \
    DEFINE_SIZE(name, T, 32)                                                                       \
    DEFINE_SIZE(name, T, 64)                                                                       \
    DEFINE_SIZE(name, T, 128)
FOR_16_BIT_SCALARS(DEFINE)
#undef DEFINE
#undef DEFINE_SIZE
