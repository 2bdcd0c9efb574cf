// LayerNorm and its gradients; a warp has a row.

#pragma once
#include "common.cuh"

constexpr unsigned ROWS_PER_BLOCK = 4;

// The row of this warp.
__device__ __forceinline__ unsigned warp_row() {
    return blockIdx.x * ROWS_PER_BLOCK + threadIdx.x / WARP;
}

// Calls f(column, number of values there) for each chunk of the row that this lane has.
template <class F> __device__ __forceinline__ void for_each_chunk(unsigned width, F f) {
    for (unsigned column = threadIdx.x % WARP * VALUES; column < width; column += WARP * VALUES)
        f(column, width - column);
}

struct Moments {
    float mean;
    // 1 / √(variance + ε)
    float scale;
};

// Mean and deviation of a row, in two passes; `value(column, valid, values)` reads it.
template <class F>
__device__ __forceinline__ Moments moments(unsigned width, float eps, F value) {
    float sum = 0.0f;
    for_each_chunk(width, [&](unsigned column, unsigned valid) {
        float v[VALUES];
        value(column, valid, v);
#pragma unroll
        for (unsigned i = 0; i < VALUES; i++) sum += v[i];
    });
    const float mean = warp_sum(sum) / float(width);
    float squares = 0.0f;
    for_each_chunk(width, [&](unsigned column, unsigned valid) {
        float v[VALUES];
        value(column, valid, v);
#pragma unroll
        for (unsigned i = 0; i < VALUES; i++)
            if (i < valid) squares += (v[i] - mean) * (v[i] - mean);
    });
    return {mean, 1.0f / sqrtf(warp_sum(squares) / float(width) + eps)};
}

template <class T>
__device__ __forceinline__ Moments row_moments(const T *row, unsigned width, float eps, bool wide) {
    return moments(width, eps, [&](unsigned column, unsigned valid, float(&v)[VALUES]) {
        read(row + column, valid, wide, v);
    });
}

// x + bias + residual, where they are given.
template <class T> struct Sum {
    const T *x;
    const T *residual;
    const float *bias;
    bool x_wide, residual_wide, bias_wide;

    __device__ Sum(const T *x, const T *residual, const float *bias, unsigned row, unsigned hidden)
        : x(x + size_t(row) * hidden),
          residual(residual ? residual + size_t(row) * hidden : nullptr), bias(bias),
          x_wide(is_wide(x, hidden)), residual_wide(is_wide(residual, hidden)),
          bias_wide(is_wide(bias)) {}

    __device__ __forceinline__ void operator()(unsigned column, unsigned valid,
                                               float (&v)[VALUES]) const {
        read(x + column, valid, x_wide, v);
        float other[VALUES];
        if (bias) {
            read(bias + column, valid, bias_wide, other);
#pragma unroll
            for (unsigned i = 0; i < VALUES; i++) v[i] += other[i];
        }
        if (residual) {
            read(residual + column, valid, residual_wide, other);
#pragma unroll
            for (unsigned i = 0; i < VALUES; i++) v[i] += other[i];
        }
    }
};

// Normalises `v` and stores it.
template <class T>
__device__ __forceinline__ void store_normalised(float (&v)[VALUES], Moments m,
                                                 const float *gamma_beta, unsigned hidden,
                                                 unsigned column, T *row, bool wide) {
    const unsigned valid = hidden - column;
    float gamma[VALUES], beta[VALUES];
    read(gamma_beta + column, valid, is_wide(gamma_beta), gamma);
    read(gamma_beta + hidden + column, valid, is_wide(gamma_beta, hidden), beta);
#pragma unroll
    for (unsigned i = 0; i < VALUES; i++) v[i] = (v[i] - m.mean) * m.scale * gamma[i] + beta[i];
    write(row + column, valid, wide, v);
}

// Rows that a warp keeps in its registers: up to 1024 values.
template <class T>
__device__ void norm(const T *x, const T *residual, const float *bias, const float *gamma_beta,
                     T *y, unsigned rows, unsigned hidden, float eps) {
    constexpr unsigned CHUNKS = 4;
    const unsigned row = warp_row();
    if (row >= rows) return;
    const Sum<T> value(x, residual, bias, row, hidden);
    const unsigned first = threadIdx.x % WARP * VALUES;
    float kept[CHUNKS][VALUES];
    float sum = 0.0f;
#pragma unroll
    for (unsigned c = 0; c < CHUNKS; c++) {
        const unsigned column = first + c * WARP * VALUES;
        if (column < hidden) {
            value(column, hidden - column, kept[c]);
#pragma unroll
            for (unsigned i = 0; i < VALUES; i++) sum += kept[c][i];
        }
    }
    const float mean = warp_sum(sum) / float(hidden);
    float squares = 0.0f;
#pragma unroll
    for (unsigned c = 0; c < CHUNKS; c++) {
        const unsigned column = first + c * WARP * VALUES;
#pragma unroll
        for (unsigned i = 0; i < VALUES; i++)
            if (column + i < hidden) squares += (kept[c][i] - mean) * (kept[c][i] - mean);
    }
    const Moments m = {mean, 1.0f / sqrtf(warp_sum(squares) / float(hidden) + eps)};
    T *target = y + size_t(row) * hidden;
    const bool wide = is_wide(y, hidden);
#pragma unroll
    for (unsigned c = 0; c < CHUNKS; c++) {
        const unsigned column = first + c * WARP * VALUES;
        if (column < hidden)
            store_normalised(kept[c], m, gamma_beta, hidden, column, target, wide);
    }
}

// Longer rows, read again for each pass. `y` may be `x`: a lane writes what it alone reads.
template <class T>
__device__ void norm_long(const T *x, const T *residual, const float *bias,
                          const float *gamma_beta, T *y, unsigned rows, unsigned hidden,
                          float eps) {
    const unsigned row = warp_row();
    if (row >= rows) return;
    const Sum<T> value(x, residual, bias, row, hidden);
    const Moments m = moments(hidden, eps, value);
    T *target = y + size_t(row) * hidden;
    const bool wide = is_wide(y, hidden);
    for_each_chunk(hidden, [&](unsigned column, unsigned valid) {
        float v[VALUES];
        value(column, valid, v);
        store_normalised(v, m, gamma_beta, hidden, column, target, wide);
    });
}

// (d − mean(d) − x̂ · mean(d ∘ x̂)) / σ for d = γ ∘ gradient.
template <class T>
__device__ void norm_gradient(const T *gradient, const T *x, const float *gamma_beta, T *dx,
                              unsigned rows, unsigned hidden, float eps) {
    const unsigned row = warp_row();
    if (row >= rows) return;
    const size_t start = size_t(row) * hidden;
    const bool x_wide = is_wide(x, hidden), d_wide = is_wide(gradient, hidden);
    const bool gamma_wide = is_wide(gamma_beta), wide = is_wide(dx, hidden);
    const Moments m = row_moments(x + start, hidden, eps, x_wide);
    const auto values = [&](unsigned column, unsigned valid, float(&normalised)[VALUES],
                            float(&d)[VALUES]) {
        float gamma[VALUES];
        read(x + start + column, valid, x_wide, normalised);
        read(gradient + start + column, valid, d_wide, d);
        read(gamma_beta + column, valid, gamma_wide, gamma);
#pragma unroll
        for (unsigned i = 0; i < VALUES; i++) {
            normalised[i] = (normalised[i] - m.mean) * m.scale;
            d[i] *= gamma[i];
        }
    };
    float sum_d = 0.0f, sum_dx = 0.0f;
    for_each_chunk(hidden, [&](unsigned column, unsigned valid) {
        float normalised[VALUES], d[VALUES];
        values(column, valid, normalised, d);
#pragma unroll
        for (unsigned i = 0; i < VALUES; i++) {
            sum_d += d[i];
            sum_dx += d[i] * normalised[i];
        }
    });
    const float mean_d = warp_sum(sum_d) / float(hidden);
    const float mean_dx = warp_sum(sum_dx) / float(hidden);
    for_each_chunk(hidden, [&](unsigned column, unsigned valid) {
        float normalised[VALUES], d[VALUES];
        values(column, valid, normalised, d);
#pragma unroll
        for (unsigned i = 0; i < VALUES; i++)
            d[i] = (d[i] - mean_d - normalised[i] * mean_dx) * m.scale;
        write(dx + start + column, valid, wide, d);
    });
}

// Sums over the rows of gradient ∘ x̂ and of gradient. A block has 32 columns; its warps find the
// moments of 32 rows at a time, then each adds every eighth of them.
template <class T>
__device__ void norm_parameters_gradient(const T *gradient, const T *x, float *out, unsigned rows,
                                         unsigned hidden, float eps) {
    constexpr unsigned WARPS = 8;
    const unsigned warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
    const unsigned column = blockIdx.x * WARP + lane;
    float *means = reinterpret_cast<float *>(shared_memory);
    float *scales = means + WARP;
    float *sums = scales + WARP;
    const bool wide = is_wide(x, hidden);
    float dgamma = 0.0f, dbeta = 0.0f;
    for (unsigned first = 0; first < rows; first += WARP) {
        __syncthreads();
        for (unsigned r = warp; r < WARP; r += WARPS) {
            if (first + r < rows) {
                const Moments m = row_moments(x + size_t(first + r) * hidden, hidden, eps, wide);
                if (lane == 0) {
                    means[r] = m.mean;
                    scales[r] = m.scale;
                }
            }
        }
        __syncthreads();
        if (column < hidden) {
            for (unsigned r = warp; r < WARP && first + r < rows; r += WARPS) {
                const size_t at = size_t(first + r) * hidden + column;
                const float d = to_float(gradient[at]);
                dgamma += d * (to_float(x[at]) - means[r]) * scales[r];
                dbeta += d;
            }
        }
    }
    sums[threadIdx.x] = dgamma;
    sums[WARPS * WARP + threadIdx.x] = dbeta;
    __syncthreads();
    if (warp < 2 && column < hidden) {
        float sum = 0.0f;
        for (unsigned w = 0; w < WARPS; w++) sum += sums[(warp * WARPS + w) * WARP + lane];
        out[size_t(warp) * hidden + column] = sum;
    }
}

#define DEFINE(name, T)                                                                            \
    KERNEL(128, norm_##name,                                                                       \
           (const T *x, const T *residual, const float *bias, const float *gamma_beta, T *y,       \
            unsigned rows, unsigned hidden, float eps),                                            \
           norm<T>(x, residual, bias, gamma_beta, y, rows, hidden, eps))                           \
    KERNEL(128, norm_long_##name,                                                                  \
           (const T *x, const T *residual, const float *bias, const float *gamma_beta, T *y,       \
            unsigned rows, unsigned hidden, float eps),                                            \
           norm_long<T>(x, residual, bias, gamma_beta, y, rows, hidden, eps))                      \
    KERNEL(128, norm_gradient_##name,                                                              \
           (const T *gradient, const T *x, const float *gamma_beta, T *dx, unsigned rows,          \
            unsigned hidden, float eps),                                                           \
           norm_gradient<T>(gradient, x, gamma_beta, dx, rows, hidden, eps))                       \
    KERNEL(256, norm_parameters_gradient_##name,                                                   \
           (const T *gradient, const T *x, float *out, unsigned rows, unsigned hidden, float eps), \
           norm_parameters_gradient<T>(gradient, x, out, rows, hidden, eps))
FOR_SCALARS(DEFINE)
#undef DEFINE
