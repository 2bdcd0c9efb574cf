// The gradients of attention, in three kernels with sums in a fixed order: by queries, by keys, and
// by rows of the position table. With P the probabilities and dP = dO Vᵀ, the gradient of the
// scores is dS = P ∘ (dP − D), D the sum of P ∘ dP over a query's keys.

#pragma once
#include "attention.cuh"

// What the kernel by queries leaves of each head and token: [heads, tokens] each.
struct Statistics {
    // Logarithm of the sum of the exponentials of the scores.
    float *logarithm;
    float *d;

    __device__ Statistics(const Attention &a, float *memory, unsigned head)
        : logarithm(memory + size_t(head) * a.tokens),
          d(memory + size_t(a.heads + head) * a.tokens) {}
};

// dQ = scale · dS (K + the positions' keys), and the statistics.
template <class T>
__device__ void attention_gradient_query(const Attention &a, const T *gradient, T *dqkv,
                                         float *memory) {
    const Place place(a, 3, 1);
    if (place.token >= place.length) return;
    const unsigned lane = threadIdx.x % WARP;
    const unsigned i = place.token, head = place.head, token = place.start + i;
    float *sums = place.memory + 2 * place.padded;
    float *chunk = sums + place.padded;
    const Kept query = keep(part<T>(a, token, head, Q), place.padded, place.memory);
    const Kept of_output = keep(output_part(a, gradient, token, head), place.padded,
                                place.memory + place.padded);
    for (unsigned c = lane; c < a.head_dim; c += WARP) sums[c] = 0.0f;
    __syncwarp();

    Running softmax;
    float d = 0.0f;
    for (unsigned first = 0; first < place.length; first += WARP) {
        const unsigned j = first + lane;
        float s = -INFINITY, dp = 0.0f;
        if (j < place.length) {
            s = score<T>(a, head, int(j) - int(i), query, part<T>(a, place.start + j, head, K));
            dp = dot(of_output, part<T>(a, place.start + j, head, V), a.head_dim);
        }
        float weight;
        const float factor = softmax.take(s, weight);
        d = d * factor + warp_sum(weight * dp);
    }
    d /= softmax.sum;
    const float logarithm = softmax.largest + logf(softmax.sum);
    if (lane == 0) {
        const Statistics statistics(a, memory, head);
        statistics.logarithm[token] = logarithm;
        statistics.d[token] = d;
    }

    for (unsigned first = 0; first < place.length; first += WARP) {
        const unsigned j = first + lane;
        float ds = 0.0f;
        if (j < place.length) {
            const float s =
                score<T>(a, head, int(j) - int(i), query, part<T>(a, place.start + j, head, K));
            const float dp = dot(of_output, part<T>(a, place.start + j, head, V), a.head_dim);
            ds = expf(s - logarithm) * (dp - d);
        }
        chunk[lane] = ds;
        __syncwarp();
        const unsigned keys = min(WARP, place.length - first);
        for (unsigned c = lane; c < a.head_dim; c += WARP) {
            float sum = sums[c];
            for (unsigned k = 0; k < keys; k++) {
                float key = part<T>(a, place.start + first + k, head, K).at(c);
                if (a.kind == DISENTANGLED && a.key)
                    key += to_float(a.key_of<T>(a.row(int(first + k) - int(i)), head)[c]);
                sum += chunk[k] * key;
            }
            sums[c] = sum;
        }
        __syncwarp();
    }
    T *target = dqkv + size_t(token) * 3 * a.hidden() + head * a.head_dim;
    for (unsigned c = lane; c < a.head_dim; c += WARP)
        target[c] = from_float<T>(sums[c] * a.scale);
}

// dK = scale · dSᵀ (Q + the positions' queries) and dV = Pᵀ dO.
template <class T>
__device__ void attention_gradient_key(const Attention &a, const T *gradient, T *dqkv,
                                       float *memory) {
    const Place place(a, 4, 2);
    if (place.token >= place.length) return;
    const unsigned lane = threadIdx.x % WARP;
    const unsigned j = place.token, head = place.head, token = place.start + j;
    float *key_sums = place.memory + 2 * place.padded;
    float *value_sums = key_sums + place.padded;
    float *of_scores = value_sums + place.padded;
    float *weights = of_scores + WARP;
    const Kept key = keep(part<T>(a, token, head, K), place.padded, place.memory);
    const Kept value =
        keep(part<T>(a, token, head, V), place.padded, place.memory + place.padded);
    for (unsigned c = lane; c < a.head_dim; c += WARP) key_sums[c] = value_sums[c] = 0.0f;
    __syncwarp();
    const Statistics statistics(a, memory, head);

    for (unsigned first = 0; first < place.length; first += WARP) {
        const unsigned i = first + lane;
        float ds = 0.0f, weight = 0.0f;
        if (i < place.length) {
            const unsigned query = place.start + i;
            const float s =
                score<T>(a, head, int(j) - int(i), part<T>(a, query, head, Q), key);
            const float dp = dot(output_part(a, gradient, query, head), value, a.head_dim);
            weight = expf(s - statistics.logarithm[query]);
            ds = weight * (dp - statistics.d[query]);
        }
        of_scores[lane] = ds;
        weights[lane] = weight;
        __syncwarp();
        const unsigned queries = min(WARP, place.length - first);
        for (unsigned c = lane; c < a.head_dim; c += WARP) {
            float dk = key_sums[c], dv = value_sums[c];
            for (unsigned k = 0; k < queries; k++) {
                const unsigned from = place.start + first + k;
                float query = part<T>(a, from, head, Q).at(c);
                if (a.kind == DISENTANGLED && a.query)
                    query += to_float(a.query_of<T>(a.row(int(j) - int(first + k)), head)[c]);
                dk += of_scores[k] * query;
                dv += weights[k] * output_part(a, gradient, from, head).at(c);
            }
            key_sums[c] = dk;
            value_sums[c] = dv;
        }
        __syncwarp();
    }
    T *target = dqkv + size_t(token) * 3 * a.hidden() + head * a.head_dim;
    for (unsigned c = lane; c < a.head_dim; c += WARP) {
        target[a.hidden() + c] = from_float<T>(key_sums[c] * a.scale);
        target[2 * a.hidden() + c] = from_float<T>(value_sums[c]);
    }
}

// The gradient of one row of the table for one head: a block goes through all pairs of tokens at
// that relative position, its warps through every fourth sequence.
template <class T>
__device__ void attention_table_gradient(const Attention &a, const T *gradient, float *memory,
                                         float *out) {
    const unsigned row = blockIdx.x, head = blockIdx.y;
    const unsigned warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
    const bool has_vectors = a.kind == DISENTANGLED;
    const unsigned padded = (a.head_dim + VALUES - 1) / VALUES * VALUES;
    const unsigned of_warp = (has_vectors ? 2 * padded : 0) + WARP;
    float *query_sums = reinterpret_cast<float *>(shared_memory) + warp * of_warp;
    float *key_sums = query_sums + padded;
    float *chunk = query_sums + of_warp - WARP;
    if (has_vectors)
        for (unsigned c = lane; c < 2 * padded; c += WARP) query_sums[c] = 0.0f;
    __syncwarp();
    const Statistics statistics(a, memory, head);
    float total = 0.0f;

    const int reach = int(a.longest) - 1;
    for (int distance = -reach; distance <= reach; distance++) {
        if (a.row(distance) != row) continue;
        for (unsigned s = warp; s < a.sequences; s += ATTENTION_WARPS) {
            const unsigned start = a.borders[a.first_sequence + s];
            const int length = int(a.borders[a.first_sequence + s + 1] - start);
            const int begin = distance < 0 ? -distance : 0;
            const int end = distance > 0 ? length - distance : length;
            for (int first = begin; first < end; first += int(WARP)) {
                const int i = first + int(lane);
                float ds = 0.0f;
                if (i < end) {
                    const unsigned query = start + unsigned(i), key = query + unsigned(distance);
                    const float found = score<T>(a, head, distance, part<T>(a, query, head, Q),
                                                 part<T>(a, key, head, K));
                    const float dp = dot(output_part(a, gradient, query, head),
                                         part<T>(a, key, head, V), a.head_dim);
                    ds = expf(found - statistics.logarithm[query]) * (dp - statistics.d[query]);
                }
                total += ds;
                if (!has_vectors) continue;
                chunk[lane] = ds;
                __syncwarp();
                const unsigned pairs = min(WARP, unsigned(end - first));
                for (unsigned c = lane; c < a.head_dim; c += WARP) {
                    float dquery = query_sums[c], dkey = key_sums[c];
                    for (unsigned k = 0; k < pairs; k++) {
                        const unsigned query = start + unsigned(first) + k;
                        dquery += chunk[k] * part<T>(a, query + unsigned(distance), head, K).at(c);
                        dkey += chunk[k] * part<T>(a, query, head, Q).at(c);
                    }
                    query_sums[c] = dquery;
                    key_sums[c] = dkey;
                }
                __syncwarp();
            }
        }
    }

    if (!has_vectors) {
        total = warp_sum(total);
        if (lane == 0) chunk[0] = total;
        __syncthreads();
        if (threadIdx.x == 0) {
            for (unsigned w = 1; w < ATTENTION_WARPS; w++) total += chunk[w * of_warp];
            out[size_t(row) * a.heads + head] = total;
        }
        return;
    }
    __syncthreads();
    float *target = out + size_t(row) * a.columns() + head * a.head_dim;
    const float *sums = reinterpret_cast<const float *>(shared_memory);
    for (unsigned c = threadIdx.x; c < a.head_dim; c += blockDim.x) {
        float dquery = 0.0f, dkey = 0.0f;
        for (unsigned w = 0; w < ATTENTION_WARPS; w++) {
            dquery += sums[w * of_warp + c];
            dkey += sums[w * of_warp + padded + c];
        }
        if (a.query) target[c] = dquery * a.scale;
        if (a.key) target[a.query * a.hidden() + c] = dkey * a.scale;
    }
}

#define DEFINE(name, T)                                                                            \
    KERNEL(128, attention_gradient_query_##name,                                                   \
           (const __grid_constant__ Attention a, const T *gradient, T *dqkv, float *memory),       \
           attention_gradient_query<T>(a, gradient, dqkv, memory))                                 \
    KERNEL(128, attention_gradient_key_##name,                                                     \
           (const __grid_constant__ Attention a, const T *gradient, T *dqkv, float *memory),       \
           attention_gradient_key<T>(a, gradient, dqkv, memory))                                   \
    KERNEL(128, attention_table_gradient_##name,                                                   \
           (const __grid_constant__ Attention a, const T *gradient, float *memory, float *out),    \
           attention_table_gradient<T>(a, gradient, memory, out))
FOR_SCALARS(DEFINE)
#undef DEFINE
