// Products of small matrices that stand in shared memory.

#pragma once
#include "common.cuh"

// Rows and columns of a product.
constexpr unsigned TILE = 16;
// Padding of rows in shared memory, against bank conflicts.
constexpr unsigned PAD = 8;

// Brings a matrix of `all_rows` × COLUMNS to shared memory, zeros beyond the first `rows` and
// `columns`. `from`'s rows lie `stride` values apart. `thread` of `threads` do it together.
template <unsigned COLUMNS, class T>
__device__ __forceinline__ void stage(const T *from, size_t stride, unsigned rows,
                                      unsigned all_rows, unsigned columns, bool wide, T *to,
                                      unsigned to_stride, unsigned thread, unsigned threads) {
    constexpr unsigned per_store = 16 / sizeof(T);
    constexpr unsigned per_row = COLUMNS / per_store;
    for (unsigned i = thread; i < all_rows * per_row; i += threads) {
        const unsigned row = i / per_row, column = i % per_row * per_store;
        uint4 raw = make_uint4(0, 0, 0, 0);
        if (row < rows && column < columns) {
            const T *p = from + row * stride + column;
            if (wide && column + per_store <= columns) {
                raw = load_16_bytes(p);
            } else {
                T *values = reinterpret_cast<T *>(&raw);
#pragma unroll
                for (unsigned k = 0; k < per_store; k++)
                    if (column + k < columns) values[k] = p[k];
            }
        }
        store_16_bytes(to + row * to_stride + column, raw);
    }
}

// A warp's 16 × 16 sums of left · rightᵀ, by tensor cores.
template <class T> struct Product {
    nvcuda::wmma::fragment<nvcuda::wmma::accumulator, 16, 16, 16, float> sums;

    __device__ __forceinline__ void clear() { nvcuda::wmma::fill_fragment(sums, 0.0f); }

    // Adds the product of matrices of 16 × `depth`, whose rows are zeros up to the next multiple
    // of 16.
    __device__ __forceinline__ void add(const T *left, const T *right, unsigned stride,
                                        unsigned depth) {
        using namespace nvcuda::wmma;
        for (unsigned k = 0; k < depth; k += 16) {
            fragment<matrix_a, 16, 16, 16, T, row_major> a;
            fragment<matrix_b, 16, 16, 16, T, col_major> b;
            load_matrix_sync(a, left + k, stride);
            load_matrix_sync(b, right + k, stride);
            mma_sync(sums, a, b, sums);
        }
    }

    __device__ __forceinline__ void store(float *to, unsigned stride) {
        nvcuda::wmma::store_matrix_sync(to, sums, stride, nvcuda::wmma::mem_row_major);
    }
};

// The same in f32: a lane has half a row of eight sums.
template <> struct Product<float> {
    float sums[8];

    __device__ __forceinline__ void clear() {
#pragma unroll
        for (unsigned i = 0; i < 8; i++) sums[i] = 0.0f;
    }

    __device__ __forceinline__ void add(const float *left, const float *right, unsigned stride,
                                        unsigned depth) {
        const unsigned lane = threadIdx.x % WARP;
        left += lane / 2 * stride;
        right += lane % 2 * 8 * stride;
        for (unsigned k = 0; k < depth; k++)
#pragma unroll
            for (unsigned i = 0; i < 8; i++) sums[i] += left[k] * right[i * stride + k];
    }

    __device__ __forceinline__ void store(float *to, unsigned stride) {
        const unsigned lane = threadIdx.x % WARP;
#pragma unroll
        for (unsigned i = 0; i < 8; i++) to[lane / 2 * stride + lane % 2 * 8 + i] = sums[i];
    }
};
