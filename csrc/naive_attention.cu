// Paged attention as one would write it first: a thread block for each new token and head, which walks all keys that
// the token may see, a tile at a time, with the online softmax.
//
//   scores   thread t takes key t of the tile and multiplies it with the query, number by number
//   softmax  the block agrees on the highest score so far; what was summed under a lower one is scaled down
//   output   thread d takes dimension d and adds up the tile's values, weighted
//
// It is right for any rows. What makes it slow is for chapter 03 to find: the heads of a group read the same keys
// again, threads of a warp read keys that lie far apart, a few long rows leave most of the GPU idle.
#include "common.cuh"

namespace nanopd {
namespace {

constexpr int block_threads = 256;  // one for each key of a tile, and for each dimension of a head

// The last row that begins at or before `token`.
__device__ int row_of(int token, const int* query_starts, int num_rows) {
    int low = 0, high = num_rows - 1;
    while (low < high) {
        const int middle = (low + high + 1) / 2;
        if (query_starts[middle] <= token) low = middle; else high = middle - 1;
    }
    return low;
}

template <typename T>
__global__ void attend(T* out, const T* query, PagedCache cache, Rows rows) {
    __shared__ float q[block_threads], weights[block_threads];
    __shared__ int64_t slots[block_threads];  // where the tile's keys and values begin in the cache
    wait_for_previous();
    let_next_start();
    const int token = blockIdx.x, head = blockIdx.y, thread = threadIdx.x;
    const int dim = cache.head_dim, kv_head = head / (rows.heads / cache.kv_heads);
    const int row = rows.query_starts ? row_of(token, rows.query_starts, rows.num_rows) : token;
    const int later = rows.query_starts ? rows.query_starts[row + 1] - 1 - token : 0;  // new tokens it may not see
    const int num_keys = rows.context_lens[row] - later;
    const T* keys = static_cast<const T*>(cache.key);
    const T* values = static_cast<const T*>(cache.value);

    if (thread < dim) q[thread] = rows.scale * to_float(query[token * rows.query_stride + head * dim + thread]);
    float highest = -INFINITY, total = 0.0f, sum = 0.0f;  // sum: this thread's dimension of the output
    for (int start = 0; start < num_keys; start += block_threads) {
        const int size = min(block_threads, num_keys - start);
        float score = -INFINITY;
        __syncthreads();
        if (thread < size) {
            const int position = start + thread;
            const int64_t block = rows.block_tables[int64_t(row) * rows.table_width + position / cache.block_size];
            const int64_t slot = block * cache.block_size + position % cache.block_size;
            slots[thread] = (slot * cache.kv_heads + kv_head) * dim;
            score = 0.0f;
            for (int d = 0; d < dim; d++) score += q[d] * to_float(keys[slots[thread] + d]);
        }
        weights[thread] = score;
        __syncthreads();
        float new_highest = highest;
        for (int i = 0; i < size; i++) new_highest = fmaxf(new_highest, weights[i]);
        __syncthreads();
        weights[thread] = expf(score - new_highest);
        __syncthreads();
        const float shrink = expf(highest - new_highest);
        total *= shrink;
        sum *= shrink;
        for (int i = 0; i < size; i++) {
            total += weights[i];
            if (thread < dim) sum += weights[i] * to_float(values[slots[i] + thread]);
        }
        highest = new_highest;
    }
    if (thread < dim) {
        out[(int64_t(token) * rows.heads + head) * dim + thread] = from_float<T>(num_keys > 0 ? sum / total : 0.0f);
    }
}

}  // namespace

cudaError_t naive_attention(void* out, const void* query, const PagedCache& cache, const Rows& rows, int num_tokens,
                            cudaStream_t stream) {
    if (cache.head_dim > block_threads) return cudaErrorInvalidValue;
    if (num_tokens == 0) return cudaSuccess;
    return dispatch(cache.dtype, [&](auto element) {
        using T = decltype(element);
        return launch(attend<T>, dim3(num_tokens, rows.heads), block_threads, 0, stream, static_cast<T*>(out),
                      static_cast<const T*>(query), cache, rows);
    });
}

}  // namespace nanopd
