// Linears of many segments of rows, each with a weight of its own; LoRA's h = x Aᵀ among them.
//
// A block computes 16 rows times 16 columns. Its four warps share out the inputs: each brings its
// part of x and of the weight to shared memory and multiplies there, with tensor cores where T has
// 16 bits. At the end the warps' sums are added.

#pragma once
#include "tile.cuh"

constexpr unsigned SEGMENTS = 96;

struct Segment {
    unsigned first_row, rows;
    const void *weight;
    const float *bias;
    // Where the block of [rows, out_features] begins, in values.
    unsigned long long output;
    unsigned out_features;
    // Tiles of the segments before.
    unsigned first_tile;
};

struct SegmentTable {
    Segment segments[SEGMENTS];
    unsigned count, unused;
};

template <class T>
__device__ void segment_linear(const SegmentTable &table, const T *x, unsigned input, void *out,
                               unsigned is_float, unsigned kind) {
    constexpr unsigned INPUTS = 64, WARPS = 4, ROW = INPUTS + PAD;
    unsigned low = 0, high = table.count;
    while (high - low > 1) {
        const unsigned middle = (low + high) / 2;
        if (table.segments[middle].first_tile <= blockIdx.x) low = middle;
        else high = middle;
    }
    const Segment &segment = table.segments[low];
    const unsigned column_tiles = (segment.out_features + TILE - 1) / TILE;
    const unsigned tile = blockIdx.x - segment.first_tile;
    const unsigned first_row = tile / column_tiles * TILE;
    const unsigned first_column = tile % column_tiles * TILE;
    const unsigned rows = min(TILE, segment.rows - first_row);
    const unsigned columns = min(TILE, segment.out_features - first_column);

    const unsigned warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
    T *of_x = reinterpret_cast<T *>(shared_memory) + warp * 2 * TILE * ROW;
    T *of_weight = of_x + TILE * ROW;
    const T *x_rows = x + size_t(segment.first_row + first_row) * input;
    const T *weight_rows = static_cast<const T *>(segment.weight) + size_t(first_column) * input;
    const bool x_wide = is_wide(x, input), weight_wide = is_wide(weight_rows, input);

    Product<T> product;
    product.clear();
    for (unsigned first = warp * INPUTS; first < input; first += WARPS * INPUTS) {
        const unsigned inputs = min(INPUTS, input - first);
        stage<INPUTS>(x_rows + first, input, rows, TILE, inputs, x_wide, of_x, ROW, lane, WARP);
        stage<INPUTS>(weight_rows + first, input, columns, TILE, inputs, weight_wide, of_weight,
                      ROW, lane, WARP);
        __syncwarp();
        product.add(of_x, of_weight, ROW, inputs);
        __syncwarp();
    }
    __syncthreads();
    constexpr unsigned SUM_ROW = TILE + 4;
    float *sums = reinterpret_cast<float *>(shared_memory);
    product.store(sums + warp * TILE * SUM_ROW, SUM_ROW);
    __syncthreads();
    for (unsigned i = threadIdx.x; i < TILE * TILE; i += WARPS * WARP) {
        const unsigned row = i / TILE, column = i % TILE;
        if (row >= rows || column >= columns) continue;
        float value = 0.0f;
#pragma unroll
        for (unsigned w = 0; w < WARPS; w++) value += sums[(w * TILE + row) * SUM_ROW + column];
        if (segment.bias) value += segment.bias[first_column + column];
        value = activate(kind, value);
        const size_t at = segment.output + size_t(first_row + row) * segment.out_features +
                          first_column + column;
        if (is_float) static_cast<float *>(out)[at] = value;
        else static_cast<T *>(out)[at] = from_float<T>(value);
    }
}

#define DEFINE(name, T)                                                                            \
    KERNEL(128, segment_linear_##name,                                                             \
           (const __grid_constant__ SegmentTable table, const T *x, unsigned input, void *out,     \
            unsigned is_float, unsigned kind),                                                     \
           segment_linear<T>(table, x, input, out, is_float, kind))
FOR_SCALARS(DEFINE)
#undef DEFINE
