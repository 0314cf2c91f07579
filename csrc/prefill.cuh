// What the prefill kernels share: which part of which row a thread block works on, and where its keys lie.
#pragma once

#include "common.cuh"

namespace nanopd {

// A running maximum begins here and never is -inf: -inf - -inf would be NaN.
constexpr float kLowest = -1e30f;
constexpr float kLog2e = 1.4426950408889634f;  // the hardware has exp2

// `count` (token, head of the group) pairs of one row and KV head, from pair `first` on, token by token. Query heads
// that share a KV head so share a tile, and its keys are read once for all of them.
struct Tile {
    int first, count;
    int token;   // the row's first new token, in query and output
    int before;  // cached tokens before the row's new ones
    int keys;    // as many keys as the tile's last token sees
    int group, head;

    __device__ int visible(int pair) const { return before + (first + pair) / group + 1; }
    __device__ int64_t token_of(int pair) const { return token + (first + pair) / group; }
    __device__ int head_of(int pair) const { return head + (first + pair) % group; }
};

// Tile `index` of `row` for one KV head; its count is below 1 past the row's end.
__device__ inline Tile find_tile(const Rows& rows, int row, int kv_head, int kv_heads, int index, int tile_rows) {
    const int start = rows.query_starts ? rows.query_starts[row] : row;
    const int query_len = rows.query_starts ? rows.query_starts[row + 1] - start : 1;
    const int context = rows.context_lens[row];
    Tile tile;
    tile.group = rows.heads / kv_heads;
    tile.head = kv_head * tile.group;
    tile.first = index * tile_rows;
    tile.count = min(tile_rows, query_len * tile.group - tile.first);
    tile.token = start;
    tile.before = context - query_len;
    tile.keys = context == 0 ? 0 : tile.visible(tile.count - 1);
    return tile;
}

// Where a row's keys lie: token `position` is at slot at(position) of the cache, counted in tokens.
struct Slots {
    const int* table;
    unsigned block_size, reciprocal;

    __device__ Slots(const Rows& rows, int row, int block_size)
        : table(rows.block_tables + static_cast<int64_t>(row) * rows.table_width),
          block_size(block_size),
          reciprocal(0xffffffffu / block_size + 1) {}

    // position * ceil(2^32 / size) / 2^32 is exact for sizes to 256 and positions to 16 million.
    __device__ unsigned at(unsigned position) const {
        const unsigned index = __umulhi(position, reciprocal);
        return table[index] * block_size + position - index * block_size;
    }
};

// exp2f without its care for results below 1e-38, which costs three instructions a score.
__device__ __forceinline__ float exp2_fast(float x) {
    float result;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
    return result;
}

__device__ __forceinline__ unsigned shared_address(const void* pointer) {
    return static_cast<unsigned>(__cvta_generic_to_shared(pointer));
}

// 16 bytes from global to shared memory, or 16 bytes of zeros.
__device__ __forceinline__ void copy_async(unsigned target, const void* source, bool exists) {
    asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(target), "l"(source),
                 "r"(exists ? 16 : 0));
}

// Four 8 x 8 matrices of 2-byte elements; each lane gives one row's address.
__device__ __forceinline__ void load_matrices(unsigned (&r)[4], unsigned address) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(address));
}

__device__ __forceinline__ unsigned pack(float low, float high, __half) {
    const __half2 pair = __floats2half2_rn(low, high);
    return reinterpret_cast<const unsigned&>(pair);
}
__device__ __forceinline__ unsigned pack(float low, float high, __nv_bfloat16) {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
    return reinterpret_cast<const unsigned&>(pair);
}

// A row of a tensor core's result lies in four neighbouring lanes.
__device__ __forceinline__ float quad_max(float x) {
    x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 1));
    return fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 2));
}
__device__ __forceinline__ float quad_sum(float x) {
    x += __shfl_xor_sync(0xffffffffu, x, 1);
    return x + __shfl_xor_sync(0xffffffffu, x, 2);
}

// prefill_hopper.cu: whether there is a kernel for it on the current device, and that kernel.
bool hopper_prefill_supports(const PagedCache& cache);
cudaError_t hopper_prefill(void* out, const void* query, const PagedCache& cache, const Rows& rows, int max_query_len,
                           cudaStream_t stream);

}  // namespace nanopd
