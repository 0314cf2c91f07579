// Greedy sampling: the likeliest token of each row and its log-probability, in one pass over the logits.
#include <cooperative_groups.h>

#include "common.cuh"

namespace nanopd {
namespace {

constexpr int threads = 512;
constexpr int warps = threads / 32;
constexpr int loads = 5;  // that each thread has in flight: enough for a row of 160,000 logits of 2 bytes

// One row's vocabulary is too much for one multiprocessor when there are few rows. Where thread blocks can form
// clusters, and so read each other's shared memory, up to eight share a row; on older GPUs one does it alone.
constexpr int largest_cluster = 8;

// What is known of a part of a row. NaN and infinities need no flag of their own: a NaN makes the sum one, so does
// a maximum of +inf (inf - inf), and a row of nothing but -inf keeps -inf as its maximum.
struct Part {
    float max = -INFINITY;
    float sum = 0;           // of exp(x - max)
    int index = 0x7fffffff;  // where the maximum stands first
};

__device__ __forceinline__ float finite(float max) { return max == -INFINITY ? 0.f : max; }

__device__ __forceinline__ Part merged(const Part& a, const Part& b) {
    const bool take_a = a.max > b.max || (a.max == b.max && a.index < b.index);
    const float max = take_a ? a.max : b.max, shift = finite(max);
    return {max, a.sum * __expf(a.max - shift) + b.sum * __expf(b.max - shift), take_a ? a.index : b.index};
}

__device__ __forceinline__ Part merged_over_warp(Part part) {
#pragma unroll
    for (int offset = 16; offset > 0; offset /= 2) {
        part = merged(part, {__shfl_xor_sync(0xffffffffu, part.max, offset), __shfl_xor_sync(0xffffffffu, part.sum, offset),
                             __shfl_xor_sync(0xffffffffu, part.index, offset)});
    }
    return part;
}

// The sum is scaled anew only where a pack raises the maximum, which soon becomes rare.
template <typename V>
__device__ __forceinline__ void add(Part& part, const V& pack, int start) {
    float top = to_float(pack.values[0]);
#pragma unroll
    for (int j = 1; j < V::size; ++j) top = fmaxf(top, to_float(pack.values[j]));
    if (top > part.max) {
        part.sum *= __expf(part.max - top);
        part.max = top;
#pragma unroll
        for (int j = V::size - 1; j >= 0; --j) {
            if (to_float(pack.values[j]) == top) part.index = start + j;
        }
    }
#pragma unroll
    for (int j = 0; j < V::size; ++j) part.sum += __expf(to_float(pack.values[j]) - finite(part.max));
}

// Row blockIdx.y, shared by the gridDim.x thread blocks of a cluster.
template <typename T, typename V>
__global__ void __launch_bounds__(threads)
greedy_sample_kernel(int64_t* token_ids, float* logprobs, bool* broken, const T* logits, int vocab) {
    __shared__ Part parts[warps];
    __shared__ Part whole;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    let_next_start();
    wait_for_previous();

    const V* row = reinterpret_cast<const V*>(logits + int64_t(blockIdx.y) * vocab);
    Part part;
    const int count = vocab / V::size, step = gridDim.x * threads;
    for (int first = blockIdx.x * threads + threadIdx.x; first < count; first += loads * step) {
        V packs[loads];
#pragma unroll
        for (int k = 0; k < loads; ++k) {
            if (first + k * step < count) packs[k] = row[first + k * step];
        }
#pragma unroll
        for (int k = 0; k < loads; ++k) {
            if (first + k * step < count) add(part, packs[k], (first + k * step) * V::size);
        }
    }

    part = merged_over_warp(part);
    if (lane == 0) parts[warp] = part;
    __syncthreads();
    if (warp == 0) part = merged_over_warp(lane < warps ? parts[lane] : Part{});
    if (threadIdx.x == 0) whole = part;

#if __CUDA_ARCH__ >= 900
    if (gridDim.x > 1) {
        const auto cluster = cooperative_groups::this_cluster();
        cluster.sync();
        if (warp == 0 && blockIdx.x == 0)
            part = merged_over_warp(lane < gridDim.x ? *cluster.map_shared_rank(&whole, lane) : Part{});
        cluster.sync();  // nobody leaves while its shared memory is read
    }
#endif
    if (blockIdx.x > 0 || threadIdx.x > 0) return;
    const bool is_broken = isnan(part.sum) || part.max == -INFINITY;
    token_ids[blockIdx.y] = part.index < vocab ? part.index : 0;
    logprobs[blockIdx.y] = -logf(part.sum);
    broken[blockIdx.y] = is_broken;
}

}  // namespace

cudaError_t greedy_sample(int64_t* token_ids, float* logprobs, bool* broken, const void* logits, int rows, int vocab,
                          DType dtype, cudaStream_t stream) {
    if (rows == 0) return cudaSuccess;
    return dispatch(dtype, [&](auto zero) {
        using T = decltype(zero);
        const bool packs = vocab % Pack<T>::size == 0 && reinterpret_cast<uintptr_t>(logits) % 16 == 0;
        const auto kernel = packs ? greedy_sample_kernel<T, Pack<T>> : greedy_sample_kernel<T, Pack<T, 1>>;
        int cluster = compute_capability() >= 90 ? largest_cluster : 1;
        while (cluster > 1 && rows * cluster > 2 * multiprocessor_count()) cluster /= 2;
        return launch_clusters(kernel, cluster, dim3(cluster, rows), threads, 0, stream, token_ids, logprobs, broken,
                               static_cast<const T*>(logits), vocab);
    });
}

}  // namespace nanopd
