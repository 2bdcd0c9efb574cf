// The second step of low-rank updates: y = act((y + bias) ∘ gain + shift + scale · h Bᵀ) in place.
//
// A block has a tile of 16 rows times 64 columns of y in its threads' registers, eight values
// each, and goes through the updates that concern it in their order.

#pragma once
#include "tile.cuh"

constexpr unsigned UPDATES = 64;

struct Update {
    unsigned first_row, end_row;
    // [width, rank] of T
    const void *b;
    const float *gain;
    const float *shift;
    // Where the update's block of [rows, rank] begins, in values.
    unsigned long long h;
    float scale;
    unsigned rank;
    unsigned column, width;
};

struct UpdateTable {
    Update updates[UPDATES];
    unsigned count, unused;
};

// h as the matrix units take it: what T holds of it and, in 16 bits, what that leaves. (The sum of
// both is exact to 16 bits of mantissa and more; h beyond f16's range is cut off.)
template <class T> __device__ __forceinline__ void split(float value, T &high, T &low) {
    high = from_float<T>(value);
    low = from_float<T>(value - to_float(high));
}
template <> __device__ __forceinline__ void split<__half>(float value, __half &high, __half &low) {
    const float largest = 65504.0f;
    high = from_float<__half>(fminf(fmaxf(value, -largest), largest));
    const float rest = value - to_float(high);
    low = from_float<__half>(fminf(fmaxf(rest, -largest), largest));
}

template <class T>
__device__ void expand(const UpdateTable &table, T *y, const float *h, const float *bias,
                       unsigned begin_row, unsigned end_row, unsigned out, unsigned kind) {
    constexpr unsigned COLUMNS = 64, RANKS = 64, THREADS = 128;
    constexpr unsigned ROW = RANKS + PAD, PRODUCT_ROW = COLUMNS + PAD;
    constexpr bool IS_SPLIT = sizeof(T) == 2;
    T *high = reinterpret_cast<T *>(shared_memory);
    T *low = high + TILE * ROW;
    T *of_b = low + TILE * ROW;
    float *products = reinterpret_cast<float *>(of_b + COLUMNS * ROW);

    const unsigned column_tiles = (out + COLUMNS - 1) / COLUMNS;
    const unsigned first_row = begin_row + blockIdx.x / column_tiles * TILE;
    const unsigned first_column = blockIdx.x % column_tiles * COLUMNS;
    const unsigned rows = min(TILE, end_row - first_row);
    const unsigned columns = min(COLUMNS, out - first_column);
    const unsigned warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;

    // This thread's values.
    const unsigned row = threadIdx.x / 8;
    const unsigned column = threadIdx.x % 8 * VALUES;
    const unsigned valid = row < rows && column < columns ? columns - column : 0;
    T *target = y + size_t(first_row + row) * out + first_column + column;
    const bool wide = is_wide(y, out);
    float values[VALUES];
    read(target, valid, wide, values);
    if (bias) {
        float added[VALUES];
        read(bias + first_column + column, valid, is_wide(bias), added);
#pragma unroll
        for (unsigned i = 0; i < VALUES; i++) values[i] += added[i];
    }

    // Each warp asks of all updates whether they concern the tile.
    unsigned concern[UPDATES / WARP];
#pragma unroll
    for (unsigned part = 0; part < UPDATES / WARP; part++) {
        const unsigned i = part * WARP + lane;
        bool meets = false;
        if (i < table.count) {
            const Update &update = table.updates[i];
            meets = update.first_row < first_row + rows && update.end_row > first_row &&
                    update.column < first_column + columns &&
                    update.column + update.width > first_column;
        }
        concern[part] = __ballot_sync(ALL_LANES, meets);
    }
    for (unsigned i = 0; i < table.count; i++) {
        if ((concern[i / WARP] >> i % WARP & 1) == 0) continue;
        const Update &update = table.updates[i];
        // Columns of the tile before the update's first, and columns of the update before the
        // tile's first; one of them is zero.
        const unsigned before = update.column > first_column ? update.column - first_column : 0;
        const unsigned skipped = first_column > update.column ? first_column - update.column : 0;
        const unsigned width = min(columns - before, update.width - skipped);
        const T *b = static_cast<const T *>(update.b) + size_t(skipped) * update.rank;
        const bool b_wide = is_wide(b, update.rank);

        Product<T> product;
        product.clear();
        for (unsigned first = 0; first < update.rank; first += RANKS) {
            const unsigned ranks = min(RANKS, update.rank - first);
            __syncthreads();
            for (unsigned k = threadIdx.x; k < TILE * RANKS; k += THREADS) {
                const unsigned r = k / RANKS, rank = k % RANKS, token = first_row + r;
                const bool inside = token >= update.first_row && token < update.end_row &&
                                    r < rows && rank < ranks;
                const size_t at =
                    update.h + size_t(token - update.first_row) * update.rank + first + rank;
                const float value = inside ? h[at] : 0.0f;
                if (IS_SPLIT) split(value, high[r * ROW + rank], low[r * ROW + rank]);
                else high[r * ROW + rank] = from_float<T>(value);
            }
            // Row c of B stands at c, whatever column of the tile it belongs to.
            stage<RANKS>(b + first, update.rank, width, COLUMNS, ranks, b_wide, of_b, ROW,
                         threadIdx.x, THREADS);
            __syncthreads();
            const T *right = of_b + warp * TILE * ROW;
            product.add(high, right, ROW, ranks);
            if (IS_SPLIT) product.add(low, right, ROW, ranks);
        }
        __syncthreads();
        product.store(products + warp * TILE, PRODUCT_ROW);
        __syncthreads();
        const unsigned token = first_row + row;
        if (token >= update.first_row && token < update.end_row) {
#pragma unroll
            for (unsigned k = 0; k < VALUES; k++) {
                // In the update's columns; before its first this wraps around.
                const unsigned c = column + k - before;
                if (c >= width) continue;
                const float gain = update.gain ? update.gain[skipped + c] : 1.0f;
                const float shift = update.shift ? update.shift[skipped + c] : 0.0f;
                values[k] = values[k] * gain + shift + update.scale * products[row * PRODUCT_ROW + c];
            }
        }
    }
#pragma unroll
    for (unsigned k = 0; k < VALUES; k++) values[k] = activate(kind, values[k]);
    write(target, valid, wide, values);
}

#define DEFINE(name, T)                                                                            \
    KERNEL(128, expand_##name,                                                                     \
           (const __grid_constant__ UpdateTable table, T *y, const float *h, const float *bias,    \
            unsigned begin_row, unsigned end_row, unsigned out, unsigned kind),                    \
           expand<T>(table, y, h, bias, begin_row, end_row, out, kind))
FOR_SCALARS(DEFINE)
#undef DEFINE
