// What a decoder layer does between its matrix products: norms, activations, rotary embeddings, the cache's store.
//
// All of it is bound by memory, so the kernels only take care to move 16 bytes an access and to read nothing twice.
// Where sizes or addresses do not allow 16 bytes, the same kernels move single elements.
// Results are rounded where Hugging Face's modules round, so that greedy tokens agree with theirs.
#include <algorithm>
#include <climits>

#include "common.cuh"

namespace nanopd {
namespace {

// Each rounded to T, as an operation of torch's is, and never fused into one.
template <typename T>
__device__ __forceinline__ T product(T a, T b) {
    if constexpr (sizeof(T) == 4) return __fmul_rn(a, b); else return __hmul_rn(a, b);
}
template <typename T>
__device__ __forceinline__ T sum(T a, T b) {
    if constexpr (sizeof(T) == 4) return __fadd_rn(a, b); else return __hadd_rn(a, b);
}
template <typename T>
__device__ __forceinline__ T difference(T a, T b) {
    if constexpr (sizeof(T) == 4) return __fsub_rn(a, b); else return __hsub_rn(a, b);
}

bool aligned(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 == 0; }

template <typename... Pointers>
bool all_aligned(Pointers... pointers) {
    return (aligned(pointers) && ...);
}

int divide_up(int64_t a, int64_t b) { return static_cast<int>((a + b - 1) / b); }

// -------------------------------------------------------------------------------------------------- RMS norm

__device__ __forceinline__ float block_sum(float value) {
    __shared__ float partial[32];
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    value = warp_sum(value);
    if (lane == 0) partial[warp] = value;
    __syncthreads();
    return warp_sum(lane < blockDim.x / 32 ? partial[lane] : 0.f);
}

// A thread block to a row, which stays in registers: `items` vectors a thread.
template <typename T, typename V, int items>
__global__ void rms_norm_kernel(T* out, const T* x, const T* weight, int size, float eps) {
    const int count = size / V::size;
    V weights[items], row[items];
#pragma unroll
    for (int i = 0; i < items; ++i) {
        const int index = threadIdx.x + i * blockDim.x;
        if (index < count) weights[i] = reinterpret_cast<const V*>(weight)[index];
    }
    let_next_start();
    wait_for_previous();

    const V* source = reinterpret_cast<const V*>(x + int64_t(blockIdx.x) * size);
    float squares = 0;
#pragma unroll
    for (int i = 0; i < items; ++i) {
        const int index = threadIdx.x + i * blockDim.x;
        if (index >= count) continue;
        row[i] = source[index];
#pragma unroll
        for (int j = 0; j < V::size; ++j) squares += to_float(row[i].values[j]) * to_float(row[i].values[j]);
    }
    const float scale = rsqrtf(block_sum(squares) / size + eps);

    V* target = reinterpret_cast<V*>(out + int64_t(blockIdx.x) * size);
#pragma unroll
    for (int i = 0; i < items; ++i) {
        const int index = threadIdx.x + i * blockDim.x;
        if (index >= count) continue;
#pragma unroll
        for (int j = 0; j < V::size; ++j) {
            const T normed = from_float<T>(to_float(row[i].values[j]) * scale);
            row[i].values[j] = product(weights[i].values[j], normed);
        }
        target[index] = row[i];
    }
}

template <typename T, typename V>
cudaError_t launch_rms_norm(void* out, const void* x, const void* weight, int rows, int size, float eps,
                            cudaStream_t stream) {
    const int count = size / V::size;
    // Few rows want all threads on one; many rows fill the GPU anyway, and then small blocks overlap better.
    const int most_threads = rows <= multiprocessor_count() ? 1024 : 256;
    const auto run = [&](auto kernel, int items) {
        const int threads = divide_up(divide_up(count, items), 32) * 32;
        return launch(kernel, rows, threads, 0, stream, static_cast<T*>(out), static_cast<const T*>(x),
                      static_cast<const T*>(weight), size, eps);
    };
    if (count <= most_threads) return run(rms_norm_kernel<T, V, 1>, 1);
    if (count <= 2 * most_threads) return run(rms_norm_kernel<T, V, 2>, 2);
    if (count <= 4 * most_threads) return run(rms_norm_kernel<T, V, 4>, 4);
    if (count <= 8 * 1024) return run(rms_norm_kernel<T, V, 8>, 8);
    return cudaErrorInvalidValue;
}

// ---------------------------------------------------------------------------------------- SiLU and multiply

template <typename T, typename V>
__global__ void silu_and_mul_kernel(T* out, const T* gate_up, int size, int chunks) {
    let_next_start();
    wait_for_previous();
    const int64_t row = blockIdx.x / chunks;
    const int index = (blockIdx.x % chunks) * blockDim.x + threadIdx.x;
    if (index >= size / V::size) return;
    const V gate = reinterpret_cast<const V*>(gate_up + row * 2 * size)[index];
    const V up = reinterpret_cast<const V*>(gate_up + (row * 2 + 1) * size)[index];
    V result;
#pragma unroll
    for (int j = 0; j < V::size; ++j) {
        const float x = to_float(gate.values[j]);
        result.values[j] = product(from_float<T>(x / (1.f + __expf(-x))), up.values[j]);
    }
    reinterpret_cast<V*>(out + row * size)[index] = result;
}

template <typename T, typename V>
cudaError_t launch_silu_and_mul(void* out, const void* gate_up, int rows, int size, cudaStream_t stream) {
    const int threads = std::min(256, divide_up(size / V::size, 32) * 32);
    const int chunks = divide_up(size / V::size, threads);
    return launch(silu_and_mul_kernel<T, V>, dim3(rows * chunks), threads, 0, stream, static_cast<T*>(out),
                  static_cast<const T*>(gate_up), size, chunks);
}

// ------------------------------------------------------------------------------------------ rope and store

template <typename T>
struct RopeArguments {
    T* qkv;
    const T *cos, *sin, *q_weight, *k_weight;
    T *key_cache, *value_cache;
    const int64_t* slot_mapping;
    float eps;
    int num_tokens, heads, kv_heads, head_dim;
    int lanes;  // a power of two, at most 32, that work on one head
};

// Sum over groups of `lanes` neighbouring threads.
__device__ __forceinline__ float group_sum(float value, int lanes) {
    for (int offset = lanes / 2; offset > 0; offset /= 2) value += __shfl_xor_sync(0xffffffffu, value, offset);
    return value;
}

// A group of lanes to each head of each token. Dimension i turns with i + head_dim / 2, so a thread holds the same
// vectors of both halves, and nothing passes between threads but the norm's sum.
template <typename T, typename V, int items>
__global__ void rope_and_store_kernel(const RopeArguments<T> a) {
    const unsigned group = blockIdx.x * (blockDim.x / a.lanes) + threadIdx.x / a.lanes;
    const int lane = threadIdx.x % a.lanes;
    const unsigned all_heads = a.heads + 2 * a.kv_heads;
    const int half = a.head_dim / 2;
    const bool working = group < a.num_tokens * all_heads;
    const int64_t token = working ? group / all_heads : 0;
    const int head = working ? group % all_heads : 0;
    const bool is_query = head < a.heads, is_value = head >= a.heads + a.kv_heads;
    const T* weight = is_query ? a.q_weight : is_value ? nullptr : a.k_weight;
    T* const self = a.qkv + (token * all_heads + head) * a.head_dim;

    const auto each = [&](auto body) {
#pragma unroll
        for (int i = 0; i < items; ++i) {
            const int d = (lane + i * a.lanes) * V::size;
            if (working && d < half) body(i, d);
        }
    };
    const auto load = [](const T* from) { return *reinterpret_cast<const V*>(from); };

    V weights[2][items];
    if (weight) {
        each([&](int i, int d) {
            weights[0][i] = load(weight + d);
            weights[1][i] = load(weight + half + d);
        });
    }
    // Before the wait: decode_attention, the next, may start while the products before this kernel still run. What it reads
    // early was complete before these could start, as is said there.
    let_next_start();
    wait_for_previous();

    // All that is read is asked for at once, also what a value has no use for.
    const int64_t slot = working && !is_query ? a.slot_mapping[token] : -1;
    const T *cos = a.cos + token * a.head_dim, *sin = a.sin + token * a.head_dim;
    V x[2][items], cosines[2][items], sines[2][items];
    each([&](int i, int d) {
#pragma unroll
        for (int k = 0; k < 2; ++k) {
            x[k][i] = load(self + k * half + d);
            cosines[k][i] = load(cos + k * half + d);
            sines[k][i] = load(sin + k * half + d);
        }
    });

    if (a.q_weight || a.k_weight) {  // the same for all threads of a warp, which the shuffles need
        float squares = 0;
        each([&](int i, int) {
#pragma unroll
            for (int j = 0; j < V::size; ++j) {
                const float first = to_float(x[0][i].values[j]), second = to_float(x[1][i].values[j]);
                squares += first * first + second * second;
            }
        });
        const float scale = rsqrtf(group_sum(squares, a.lanes) / a.head_dim + a.eps);
        if (weight) {
            each([&](int i, int) {
#pragma unroll
                for (int j = 0; j < V::size; ++j) {
#pragma unroll
                    for (int k = 0; k < 2; ++k) {
                        const T normed = from_float<T>(to_float(x[k][i].values[j]) * scale);
                        x[k][i].values[j] = product(weights[k][i].values[j], normed);
                    }
                }
            });
        }
    }

    if (!is_value) {
        each([&](int i, int) {
#pragma unroll
            for (int j = 0; j < V::size; ++j) {
                const T first = x[0][i].values[j], second = x[1][i].values[j];
                x[0][i].values[j] = difference(product(first, cosines[0][i].values[j]), product(second, sines[0][i].values[j]));
                x[1][i].values[j] = sum(product(second, cosines[1][i].values[j]), product(first, sines[1][i].values[j]));
            }
        });
    }

    T* target = self;
    if (!is_query) {
        if (slot < 0) return;
        const int kv_head = head - a.heads - (is_value ? a.kv_heads : 0);
        target = (is_value ? a.value_cache : a.key_cache) + (slot * a.kv_heads + kv_head) * a.head_dim;
    }
    each([&](int i, int d) {
        *reinterpret_cast<V*>(target + d) = x[0][i];
        *reinterpret_cast<V*>(target + half + d) = x[1][i];
    });
}

template <typename T, typename V, int items>
cudaError_t launch_rope_and_store(RopeArguments<T> arguments, cudaStream_t stream) {
    const int vectors = arguments.head_dim / 2 / V::size;
    arguments.lanes = 1;
    while (arguments.lanes < 32 && arguments.lanes < vectors) arguments.lanes *= 2;
    const int64_t groups = int64_t(arguments.num_tokens) * (arguments.heads + 2 * arguments.kv_heads);
    if (vectors > arguments.lanes * items || groups > INT_MAX) return cudaErrorInvalidValue;
    constexpr int threads = 128;
    return launch(rope_and_store_kernel<T, V, items>, divide_up(groups * arguments.lanes, threads), threads, 0, stream,
                  arguments);
}

}  // namespace

cudaError_t rms_norm(void* out, const void* x, const void* weight, int rows, int size, float eps, DType dtype,
                     cudaStream_t stream) {
    if (rows == 0) return cudaSuccess;
    return dispatch(dtype, [&](auto zero) {
        using T = decltype(zero);
        if (size % Pack<T>::size == 0 && all_aligned(out, x, weight))
            return launch_rms_norm<T, Pack<T>>(out, x, weight, rows, size, eps, stream);
        return launch_rms_norm<T, Pack<T, 1>>(out, x, weight, rows, size, eps, stream);
    });
}

cudaError_t silu_and_mul(void* out, const void* gate_up, int rows, int size, DType dtype, cudaStream_t stream) {
    if (rows == 0) return cudaSuccess;
    return dispatch(dtype, [&](auto zero) {
        using T = decltype(zero);
        if (size % Pack<T>::size == 0 && all_aligned(out, gate_up))
            return launch_silu_and_mul<T, Pack<T>>(out, gate_up, rows, size, stream);
        return launch_silu_and_mul<T, Pack<T, 1>>(out, gate_up, rows, size, stream);
    });
}

cudaError_t rope_and_store(void* qkv, const void* cos, const void* sin, const void* q_weight, const void* k_weight,
                           float eps, const PagedCache& cache, const int64_t* slot_mapping, int num_tokens, int heads,
                           cudaStream_t stream) {
    if (num_tokens == 0) return cudaSuccess;
    return dispatch(cache.dtype, [&](auto zero) {
        using T = decltype(zero);
        const RopeArguments<T> arguments{
            static_cast<T*>(qkv), static_cast<const T*>(cos), static_cast<const T*>(sin),
            static_cast<const T*>(q_weight), static_cast<const T*>(k_weight), static_cast<T*>(cache.key),
            static_cast<T*>(cache.value), slot_mapping, eps, num_tokens, heads, cache.kv_heads, cache.head_dim, 0};
        if (cache.head_dim % (2 * Pack<T>::size) == 0 &&
            all_aligned(qkv, cos, sin, q_weight, k_weight, cache.key, cache.value))
            return launch_rope_and_store<T, Pack<T>, 1>(arguments, stream);
        return launch_rope_and_store<T, Pack<T, 1>, 8>(arguments, stream);
    });
}

}  // namespace nanopd
