// What all kernels use: types, reads of several values, sums of a warp, activations.
//
// Values are loaded as T, computed with as f32 and stored as T. All shared memory is dynamic.
// Every loop that contains a barrier or a vote has a trip count that is the same for all of its
// threads.

#pragma once

#ifdef __CUDACC__
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <mma.h>

#define CHECK_ALIGNED(p)

// A kernel that can be launched, with the most threads of its blocks.
#define KERNEL(threads, name, parameters, ...)                                                     \
    extern "C" __global__ void __launch_bounds__(threads) name parameters { __VA_ARGS__; }
#else
#include "host/emulator.hpp"
#endif

#define FOR_SCALARS(DEFINE)                                                                        \
    DEFINE(f32, float)                                                                             \
    DEFINE(f16, __half)                                                                            \
    DEFINE(bf16, __nv_bfloat16)

#define FOR_16_BIT_SCALARS(DEFINE)                                                                 \
    DEFINE(f16, __half)                                                                            \
    DEFINE(bf16, __nv_bfloat16)

constexpr unsigned WARP = 32;
constexpr unsigned ALL_LANES = 0xffffffffu;
// Values that a thread reads at once.
constexpr unsigned VALUES = 8;

extern __shared__ __align__(128) unsigned char shared_memory[];

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(__half x) { return __half2float(x); }
__device__ __forceinline__ float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }

template <class T> __device__ __forceinline__ T from_float(float x);
template <> __device__ __forceinline__ float from_float<float>(float x) { return x; }
template <> __device__ __forceinline__ __half from_float<__half>(float x) {
    return __float2half_rn(x);
}
template <> __device__ __forceinline__ __nv_bfloat16 from_float<__nv_bfloat16>(float x) {
    return __float2bfloat16_rn(x);
}

// Whether rows `stride` values apart, the first at `p`, all begin at a multiple of 16 bytes.
template <class T> __device__ __forceinline__ bool is_wide(const T *p, size_t stride = 0) {
    return ((reinterpret_cast<size_t>(p) | (stride * sizeof(T))) & 15) == 0;
}

__device__ __forceinline__ uint4 load_16_bytes(const void *p) {
    CHECK_ALIGNED(p);
    return *reinterpret_cast<const uint4 *>(p);
}

__device__ __forceinline__ void store_16_bytes(void *p, uint4 value) {
    CHECK_ALIGNED(p);
    *reinterpret_cast<uint4 *>(p) = value;
}

// Eight values from `p` on, of which the first `valid` exist; the others are zero. `wide`: `p` is a
// multiple of 16 bytes.
template <class T>
__device__ __forceinline__ void read(const T *p, unsigned valid, bool wide, float (&values)[VALUES]) {
    constexpr unsigned per_load = 16 / sizeof(T);
    if (wide && valid >= VALUES) {
#pragma unroll
        for (unsigned i = 0; i < VALUES; i += per_load) {
            const uint4 raw = load_16_bytes(p + i);
            const T *loaded = reinterpret_cast<const T *>(&raw);
#pragma unroll
            for (unsigned k = 0; k < per_load; k++) values[i + k] = to_float(loaded[k]);
        }
    } else {
#pragma unroll
        for (unsigned i = 0; i < VALUES; i++) values[i] = i < valid ? to_float(p[i]) : 0.0f;
    }
}

// The reverse of `read`.
template <class T>
__device__ __forceinline__ void write(T *p, unsigned valid, bool wide, const float (&values)[VALUES]) {
    constexpr unsigned per_store = 16 / sizeof(T);
    if (wide && valid >= VALUES) {
#pragma unroll
        for (unsigned i = 0; i < VALUES; i += per_store) {
            uint4 raw;
            T *stored = reinterpret_cast<T *>(&raw);
#pragma unroll
            for (unsigned k = 0; k < per_store; k++) stored[k] = from_float<T>(values[i + k]);
            store_16_bytes(p + i, raw);
        }
    } else {
#pragma unroll
        for (unsigned i = 0; i < VALUES; i++)
            if (i < valid) p[i] = from_float<T>(values[i]);
    }
}

__device__ __forceinline__ float warp_sum(float x) {
#pragma unroll
    for (unsigned distance = WARP / 2; distance > 0; distance /= 2)
        x += __shfl_xor_sync(ALL_LANES, x, distance);
    return x;
}

__device__ __forceinline__ float warp_max(float x) {
#pragma unroll
    for (unsigned distance = WARP / 2; distance > 0; distance /= 2)
        x = fmaxf(x, __shfl_xor_sync(ALL_LANES, x, distance));
    return x;
}

// The numbers by which launches name activations.
enum Activation : unsigned { NONE = 0, GELU = 1, TANH = 2, RELU = 3 };

__device__ __forceinline__ float normal_cdf(float x) {
    return 0.5f * (1.0f + erff(x * 0.70710678118654752f));
}

__device__ __forceinline__ float activate(unsigned kind, float x) {
    switch (kind) {
    case GELU: return x * normal_cdf(x);
    case TANH: return tanhf(x);
    case RELU: return fmaxf(x, 0.0f);
    default: return x;
    }
}

__device__ __forceinline__ float activation_derivative(unsigned kind, float x) {
    switch (kind) {
    case GELU: return normal_cdf(x) + x * 0.3989422804f * expf(-0.5f * x * x);
    case TANH: {
        const float t = tanhf(x);
        return 1.0f - t * t;
    }
    case RELU: return x > 0.0f ? 1.0f : 0.0f;
    default: return 1.0f;
    }
}
