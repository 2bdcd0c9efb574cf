// Stands in for CUDA's headers, so that a C++ compiler translates the kernels for the host.
//
// The threads of a block are coroutines: each runs until it meets a barrier or a vote, and goes on
// when all that take part are there. What a device would punish ends the process with a message:
// threads that miss a barrier, misaligned vectors, too much shared memory. Fragments of matrices
// are spread over the lanes in an order of our own, as the device's order is not documented either.

#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>
#include <utility>

#define __device__
#define __global__
#define __shared__
#define __forceinline__ inline
#define __grid_constant__
#define __align__(bytes) __attribute__((aligned(bytes)))
#define __launch_bounds__(threads)

struct dim3 {
    unsigned x, y, z;
};
struct alignas(16) uint4 {
    unsigned x, y, z, w;
};
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }

inline unsigned min(unsigned a, unsigned b) { return a < b ? a : b; }
inline unsigned max(unsigned a, unsigned b) { return a < b ? b : a; }

extern dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace emulator {

[[noreturn]] void fail(const char *format, ...);

// Waits for all threads of the block at the same line.
void barrier(int line);
// Waits for all lanes of the warp at the same line, and returns what each has brought (32 values).
const uint64_t *meet(int line, uint64_t brought);

unsigned lane();

inline void check_aligned(const void *p, size_t bytes, const char *what) {
    if (reinterpret_cast<uintptr_t>(p) % bytes != 0)
        fail("%s at %p, which is no multiple of %zu bytes", what, p, bytes);
}

template <class T> uint64_t to_word(T value) {
    static_assert(sizeof(T) <= 8);
    uint64_t word = 0;
    std::memcpy(&word, &value, sizeof(T));
    return word;
}

template <class T> T from_word(uint64_t word) {
    T value;
    std::memcpy(&value, &word, sizeof(T));
    return value;
}

template <class T> T shuffle_xor(int line, unsigned mask, T value, unsigned distance) {
    if (mask != 0xffffffffu) fail("line %d: a vote of some lanes only", line);
    return from_word<T>(meet(line, to_word(value))[lane() ^ distance]);
}

inline unsigned ballot(int line, unsigned mask, bool vote) {
    if (mask != 0xffffffffu) fail("line %d: a vote of some lanes only", line);
    const uint64_t *votes = meet(line, vote);
    unsigned result = 0;
    for (unsigned i = 0; i < 32; i++) result |= unsigned(votes[i] != 0) << i;
    return result;
}

// A kernel by its name: how to call it with a launch's arguments.
struct Kernel {
    const char *name;
    unsigned threads;
    size_t argument_bytes;
    void (*call)(void **);
    const Kernel *next;
};
extern const Kernel *kernels;

template <class... A, size_t... I>
void call_with(void (*kernel)(A...), void **arguments, std::index_sequence<I...>) {
    kernel(*static_cast<A *>(arguments[I])...);
}

template <auto F> struct Entry;
template <class... A, void (*F)(A...)> struct Entry<F> {
    static void call(void **arguments) {
        call_with(F, arguments, std::index_sequence_for<A...>());
    }
    static constexpr size_t bytes() {
        size_t end = 0;
        ((end = (end + alignof(A) - 1) / alignof(A) * alignof(A) + sizeof(A)), ...);
        return end;
    }
};

template <auto F> struct Register {
    Kernel kernel;
    Register(const char *name, unsigned threads)
        : kernel{name, threads, Entry<F>::bytes(), &Entry<F>::call, kernels} {
        kernels = &kernel;
    }
};

} // namespace emulator

#define KERNEL(threads, name, parameters, ...)                                                     \
    static void name parameters { __VA_ARGS__; }                                                   \
    static emulator::Register<&name> registered_##name(#name, threads);

#define CHECK_ALIGNED(p) emulator::check_aligned(p, 16, "a vector")
#define __syncthreads() emulator::barrier(__LINE__)
#define __syncwarp() ((void)emulator::meet(__LINE__, 0))
#define __shfl_xor_sync(mask, value, distance)                                                     \
    emulator::shuffle_xor(__LINE__, mask, value, distance)
#define __ballot_sync(mask, vote) emulator::ballot(__LINE__, mask, vote)
#define __any_sync(mask, vote) (emulator::ballot(__LINE__, mask, vote) != 0)

struct __half {
    uint16_t bits;
};
struct __nv_bfloat16 {
    uint16_t bits;
};

inline float __bfloat162float(__nv_bfloat16 x) {
    return emulator::from_word<float>(uint64_t(x.bits) << 16);
}

inline __nv_bfloat16 __float2bfloat16_rn(float x) {
    const uint32_t bits = uint32_t(emulator::to_word(x));
    if (std::isnan(x)) return {0x7fff};
    return {uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}

inline float __half2float(__half x) {
    const unsigned exponent = x.bits >> 10 & 31, fraction = x.bits & 1023;
    const float sign = x.bits >> 15 ? -1.0f : 1.0f;
    if (exponent == 31)
        return fraction ? std::numeric_limits<float>::quiet_NaN()
                        : sign * std::numeric_limits<float>::infinity();
    if (exponent == 0) return sign * std::ldexp(float(fraction), -24);
    return sign * std::ldexp(float(1024 + fraction), int(exponent) - 25);
}

inline __half __float2half_rn(float x) {
    const uint16_t sign = std::signbit(x) ? 0x8000 : 0;
    if (std::isnan(x)) return {0x7fff};
    const float size = std::fabs(x);
    if (size >= 65520.0f) return {uint16_t(sign | 0x7c00)};
    int exponent = 0;
    std::frexp(size, &exponent);
    // The last place of a value of this size; nearbyint rounds halves to even.
    const int place = size == 0.0f || exponent < -13 ? -24 : exponent - 11;
    const unsigned units = unsigned(std::nearbyint(std::ldexp(size, -place)));
    // Carries run over into the exponent's bits, as they should.
    const unsigned bits = place == -24 ? units : (unsigned(place + 24) << 10) + units;
    return {uint16_t(sign | bits)};
}

namespace nvcuda::wmma {

struct matrix_a;
struct matrix_b;
struct accumulator;
struct row_major;
struct col_major;
enum layout_t { mem_row_major, mem_col_major };

// Eight of the 256 values: half a row of 16. Operands of 16 bits only, as the kernels have them.
template <class Use, int M, int N, int K, class T, class Layout = void> struct fragment {
    static_assert(M == 16 && N == 16 && K == 16);
    static constexpr int num_elements = 8;
    float x[8];
};

inline unsigned row() { return emulator::lane() / 2; }
inline unsigned column() { return emulator::lane() % 2 * 8; }

inline void check(const void *p, unsigned stride, size_t size) {
    emulator::check_aligned(p, 32, "a matrix");
    if (stride * size % 16 != 0) emulator::fail("rows of a matrix are %u values apart", stride);
}

inline float value(float x) { return x; }
inline float value(__half x) { return __half2float(x); }
inline float value(__nv_bfloat16 x) { return __bfloat162float(x); }

template <class F> void fill_fragment(F &f, float value) {
    for (float &x : f.x) x = value;
}

template <class Use, class T, class Layout>
void load_matrix_sync(fragment<Use, 16, 16, 16, T, Layout> &f, const T *p, unsigned stride) {
    check(p, stride, sizeof(T));
    emulator::meet(__LINE__, 0);
    for (unsigned i = 0; i < 8; i++) {
        const unsigned c = column() + i;
        const bool by_row = std::is_same_v<Layout, row_major>;
        f.x[i] = value(by_row ? p[row() * stride + c] : p[c * stride + row()]);
    }
}

template <class Use>
void load_matrix_sync(fragment<Use, 16, 16, 16, float> &f, const float *p, unsigned stride,
                      layout_t) {
    check(p, stride, sizeof(float));
    emulator::meet(__LINE__, 0);
    for (unsigned i = 0; i < 8; i++) f.x[i] = p[row() * stride + column() + i];
}

template <class Use>
void store_matrix_sync(float *p, const fragment<Use, 16, 16, 16, float> &f, unsigned stride,
                       layout_t) {
    check(p, stride, sizeof(float));
    emulator::meet(__LINE__, 0);
    for (unsigned i = 0; i < 8; i++) p[row() * stride + column() + i] = f.x[i];
    emulator::meet(__LINE__, 0);
}

template <class D, class A, class B> void mma_sync(D &d, const A &a, const B &b, const D &c) {
    // The addresses of all lanes' parts, one operand after the other.
    const A *as[2];
    const B *bs[16];
    const uint64_t *met = emulator::meet(__LINE__, uint64_t(&a));
    for (unsigned i = 0; i < 2; i++)
        as[i] = reinterpret_cast<const A *>(met[row() * 2 + i]);
    met = emulator::meet(__LINE__, uint64_t(&b));
    for (unsigned k = 0; k < 16; k++)
        bs[k] = reinterpret_cast<const B *>(met[k * 2 + column() / 8]);
    float sum[8];
    for (unsigned i = 0; i < 8; i++) sum[i] = c.x[i];
    for (unsigned k = 0; k < 16; k++) {
        const float left = as[k / 8]->x[k % 8];
        for (unsigned i = 0; i < 8; i++) sum[i] += left * bs[k]->x[i];
    }
    emulator::meet(__LINE__, 0);
    for (unsigned i = 0; i < 8; i++) d.x[i] = sum[i];
}

} // namespace nvcuda::wmma
