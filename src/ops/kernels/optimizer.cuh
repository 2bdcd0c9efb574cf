// AdamW and the norm of the gradients, all f32.

#pragma once
#include "common.cuh"

// A block leaves the sum of the squares of every 256th run of 256 values.
KERNEL(256, sum_squares_f32, (const float *x, float *partials, unsigned long long count), {
    float *of_warps = reinterpret_cast<float *>(shared_memory);
    float sum = 0.0f;
    for (size_t i = size_t(blockIdx.x) * blockDim.x + threadIdx.x; i < count;
         i += size_t(gridDim.x) * blockDim.x)
        sum += x[i] * x[i];
    sum = warp_sum(sum);
    if (threadIdx.x % WARP == 0) of_warps[threadIdx.x / WARP] = sum;
    __syncthreads();
    if (threadIdx.x == 0) {
        sum = 0.0f;
        for (unsigned warp = 0; warp < blockDim.x / WARP; warp++) sum += of_warps[warp];
        partials[blockIdx.x] = sum;
    }
})

// `rate` is the learning rate / (1 − β₁ᵗ), `root` 1 / (1 − β₂ᵗ), `rest_i` 1 − βᵢ.
KERNEL(256, adamw_f32,
       (float *value, const float *gradient, float *first, float *second, unsigned long long count,
        float scale, float rate, float root, float decay, float beta_1, float rest_1, float beta_2,
        float rest_2, float epsilon),
       {
           const size_t i = size_t(blockIdx.x) * blockDim.x + threadIdx.x;
           if (i < count) {
               const float g = gradient[i] * scale;
               const float m = beta_1 * first[i] + rest_1 * g;
               const float v = beta_2 * second[i] + rest_2 * g * g;
               first[i] = m;
               second[i] = v;
               value[i] = value[i] * decay - rate * m / (sqrtf(v * root) + epsilon);
           }
       })
