// Prefill attention: many new tokens of a row at once, over everything the row has in the paged cache.
//
// The idea is FlashAttention-2. A thread block keeps a tile of queries and walks over the keys 64 at a time; scores
// live only in registers, and the softmax is corrected as larger scores turn up, so memory traffic is one pass over
// the cached tokens for each tile of queries. Three things are particular to this place:
//
// - Query heads that share a KV head share its tiles: the rows of a tile are (token, head of the group) pairs, token
//   by token. A chunk of 32 tokens with 4 heads a group fills a tile of 128, and a speculative verification of 4
//   tokens reads the cache once, not once for each query head.
// - Keys come through the block table. Each lane finds the slot of one of its warp's 16 keys, one tile ahead, and
//   hands it to the lanes that copy the key, so a table entry is read once and nobody waits for it.
// - A key past the tile's last visible one is not read but filled with zeros: memory there may hold NaN, which a
//   weight of 0 would not stop (0 * NaN is NaN).
//
// Rows of a tile in shared memory are padded by 16 bytes: an odd number of 16-byte words a row puts the eight rows
// of an ldmatrix on different banks, for every head size.

#include "common.cuh"

namespace nanopd {
namespace {

constexpr int kWarps = 4;
constexpr int kThreads = 32 * kWarps;
constexpr int kKeys = 64;                      // keys of a tile
constexpr int kKeysPerWarp = kKeys / kWarps;   // keys of a tile that a warp copies
constexpr float kLowest = -1e30f;              // a running maximum never is -inf: -inf - -inf would be NaN

// What one thread block works on: `count` (token, head of the group) pairs of one row and KV head, from `first` on.
struct Tile {
    int first, count;
    int token;    // of the row's first new token, in query and output
    int before;   // cached tokens before the row's new ones
    int keys;     // as many keys as the tile's last token sees
    int group, head;

    __device__ int visible(int pair) const { return before + (first + pair) / group + 1; }
    __device__ int64_t token_of(int pair) const { return token + (first + pair) / group; }
    __device__ int head_of(int pair) const { return head + (first + pair) % group; }
};

// Grid: KV head, tile, row. The last tiles see the most keys and come first, so that the short ones fill the gaps.
__device__ Tile find_tile(const Rows& rows, int kv_heads, int tile_rows) {
    const int row = blockIdx.z;
    const int start = rows.query_starts ? rows.query_starts[row] : row;
    const int query_len = rows.query_starts ? rows.query_starts[row + 1] - start : 1;
    const int context = rows.context_lens[row];
    Tile tile;
    tile.group = rows.heads / kv_heads;
    tile.head = blockIdx.x * tile.group;
    tile.first = (gridDim.y - 1 - blockIdx.y) * tile_rows;
    tile.count = min(tile_rows, query_len * tile.group - tile.first);
    tile.token = start;
    tile.before = context - query_len;
    tile.keys = context == 0 ? 0 : tile.visible(tile.count - 1);
    return tile;
}

// Where keys lie: token `position` of the row is at slot(position) of the cache, counted in tokens.
struct Slots {
    const int* table;
    unsigned block_size, reciprocal;

    // position * ceil(2^32 / size) / 2^32 is exact for sizes to 256 and positions to 16 million.
    __device__ unsigned at(unsigned position) const {
        const unsigned index = __umulhi(position, reciprocal);
        return table[index] * block_size + position - index * block_size;
    }
};

__device__ Slots slots_of_row(const Rows& rows, int block_size) {
    return {rows.block_tables + static_cast<int64_t>(blockIdx.z) * rows.table_width, unsigned(block_size),
            0xffffffffu / block_size + 1};
}

// ----------------------------------------------------------------------------------------- PTX, one line each

__device__ __forceinline__ unsigned shared_address(const void* pointer) {
    return static_cast<unsigned>(__cvta_generic_to_shared(pointer));
}

// 16 bytes from global to shared memory, or 16 bytes of zeros.
__device__ __forceinline__ void copy_async(unsigned target, const void* source, bool exists) {
    asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(target), "l"(source),
                 "r"(exists ? 16 : 0));
}
__device__ __forceinline__ void commit_copies() { asm volatile("cp.async.commit_group;"); }
__device__ __forceinline__ void wait_for_copies() { asm volatile("cp.async.wait_group 0;" ::: "memory"); }

__device__ __forceinline__ void load_matrices(unsigned (&r)[4], unsigned address) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(address));
}
__device__ __forceinline__ void load_matrices_transposed(unsigned (&r)[4], unsigned address) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(address));
}

// c[16 x 8] += a[16 x 16] b[16 x 8]
__device__ __forceinline__ void multiply_add(float (&c)[4], const unsigned (&a)[4], unsigned b0, unsigned b1, __half) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
__device__ __forceinline__ void multiply_add(float (&c)[4], const unsigned (&a)[4], unsigned b0, unsigned b1,
                                             __nv_bfloat16) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

__device__ __forceinline__ unsigned pack(float low, float high, __half) {
    const __half2 pair = __floats2half2_rn(low, high);
    return reinterpret_cast<const unsigned&>(pair);
}
__device__ __forceinline__ unsigned pack(float low, float high, __nv_bfloat16) {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
    return reinterpret_cast<const unsigned&>(pair);
}

// A row of a 16 x 8 result lies in four neighbouring lanes.
__device__ __forceinline__ float quad_max(float x) {
    x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 1));
    return fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 2));
}
__device__ __forceinline__ float quad_sum(float x) {
    x += __shfl_xor_sync(0xffffffffu, x, 1);
    return x + __shfl_xor_sync(0xffffffffu, x, 2);
}

// ----------------------------------------------------------------------------------- the tensor core kernel

// kHeadDim: the head size, or the next larger one there is an instance for; what is missing counts as zeros.
// kStack: 16-row tiles of queries to a warp. Two use each key fragment from shared memory twice, one suits few rows.
template <typename T, int kHeadDim, int kStack>
struct TileShape {
    static constexpr int rows = 16 * kStack * kWarps;
    static constexpr int pitch = kHeadDim + 8;    // elements from row to row in shared memory
    static constexpr int chunks = kHeadDim / 8;   // 16-byte copies to a row
    static constexpr size_t shared_bytes = (rows + 2 * kKeys) * pitch * sizeof(T);
};

// The softmax of one warp's rows as it grows: lane holds row lane / 4 (index 0) and lane / 4 + 8 (index 1) of each
// 16-row tile. `sum` is the lane's own part until the end.
template <int kStack>
struct Softmax {
    float top[kStack][2], sum[kStack][2];
};

template <typename T, int kHeadDim, int kStack>
__global__ void __launch_bounds__(kThreads, kHeadDim * kStack >= 128 ? 2 : 3)
    prefill_kernel(T* out, const T* query, const T* keys, const T* values, Rows rows, int block_size, int kv_heads,
                   int head_dim) {
    using Shape = TileShape<T, kHeadDim, kStack>;
    extern __shared__ __align__(16) unsigned char shared[];
    const unsigned query_tile = shared_address(shared);
    const unsigned key_tile = query_tile + Shape::rows * Shape::pitch * sizeof(T);
    const unsigned value_tile = key_tile + kKeys * Shape::pitch * sizeof(T);
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;

    wait_for_previous();
    let_next_start();
    const Tile tile = find_tile(rows, kv_heads, Shape::rows);
    if (tile.count <= 0) return;
    const Slots slots = slots_of_row(rows, block_size);
    const int64_t token_stride = static_cast<int64_t>(kv_heads) * head_dim;
    keys += static_cast<int64_t>(blockIdx.x) * head_dim;
    values += static_cast<int64_t>(blockIdx.x) * head_dim;

    for (int i = threadIdx.x; i < Shape::rows * Shape::chunks; i += kThreads) {
        const int pair = i / Shape::chunks, column = i % Shape::chunks * 8;
        const bool exists = pair < tile.count && column < head_dim;
        const T* source = query + tile.token_of(pair) * rows.query_stride + tile.head_of(pair) * head_dim + column;
        copy_async(query_tile + (pair * Shape::pitch + column) * sizeof(T), exists ? source : query, exists);
    }

    // The slot of key lane % 16 of the warp's keys in the tile that begins at `start`.
    const auto find_slot = [&](int start) {
        const int key = start + warp * kKeysPerWarp + lane % kKeysPerWarp;
        return key < tile.keys ? slots.at(key) : 0u;
    };
    const auto copy_tile = [&](unsigned target, const T* source, int start, unsigned slot) {
#pragma unroll
        for (int i = lane; i < kKeysPerWarp * Shape::chunks; i += 32) {
            const int key = i / Shape::chunks, column = i % Shape::chunks * 8;
            const bool exists = start + warp * kKeysPerWarp + key < tile.keys && column < head_dim;
            const int64_t offset = __shfl_sync(0xffffffffu, slot, key) * token_stride + column;
            copy_async(target + ((warp * kKeysPerWarp + key) * Shape::pitch + column) * sizeof(T),
                       source + (exists ? offset : 0), exists);
        }
        commit_copies();
    };

    float output[kStack][kHeadDim / 8][4] = {};
    Softmax<kStack> softmax;
    int visible[kStack][2];
#pragma unroll
    for (int stack = 0; stack < kStack; ++stack)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            softmax.top[stack][half] = kLowest;
            softmax.sum[stack][half] = 0;
            visible[stack][half] = tile.visible((warp * kStack + stack) * 16 + half * 8 + lane / 4);
        }
    const int all_visible = tile.visible(warp * kStack * 16);  // keys that every row of the warp sees
    const bool idle = warp * kStack * 16 >= tile.count;
    const float scale = rows.scale * 1.4426950408889634f;      // exp2 is what the hardware has

    // Addresses that this lane gives to ldmatrix; the rest of each is a constant.
    const unsigned query_lane = query_tile + ((warp * kStack * 16 + lane % 16) * Shape::pitch + lane / 16 * 8) * sizeof(T);
    const unsigned key_lane = key_tile + ((lane / 16 * 8 + lane % 8) * Shape::pitch + lane / 8 % 2 * 8) * sizeof(T);
    const unsigned value_lane = value_tile + (lane % 16 * Shape::pitch + lane / 16 * 8) * sizeof(T);

    unsigned slot = find_slot(0);
    if (tile.keys > 0) copy_tile(key_tile, keys, 0, slot);
    for (int start = 0; start < tile.keys; start += kKeys) {
        wait_for_copies();
        __syncthreads();  // the keys are here, and nobody reads the values before them any more
        copy_tile(value_tile, values, start, slot);
        slot = find_slot(start + kKeys);

        float scores[kStack][kKeys / 8][4] = {};
        if (!idle) {
#pragma unroll
            for (int k = 0; k < kHeadDim; k += 16) {
                unsigned a[kStack][4], b[4];
#pragma unroll
                for (int stack = 0; stack < kStack; ++stack)
                    load_matrices(a[stack], query_lane + (stack * 16 * Shape::pitch + k) * sizeof(T));
#pragma unroll
                for (int n = 0; n < kKeys; n += 16) {
                    load_matrices(b, key_lane + (n * Shape::pitch + k) * sizeof(T));
#pragma unroll
                    for (int stack = 0; stack < kStack; ++stack) {
                        multiply_add(scores[stack][n / 8], a[stack], b[0], b[1], T{});
                        multiply_add(scores[stack][n / 8 + 1], a[stack], b[2], b[3], T{});
                    }
                }
            }
        }

        wait_for_copies();
        __syncthreads();  // the values are here, and nobody reads the keys any more
        if (start + kKeys < tile.keys) copy_tile(key_tile, keys, start + kKeys, slot);
        if (idle) continue;

        unsigned weights[kStack][kKeys / 16][4];
#pragma unroll
        for (int stack = 0; stack < kStack; ++stack) {
            if (start + kKeys > all_visible) {
#pragma unroll
                for (int i = 0; i < kKeys / 2; ++i) {
                    const int key = start + i / 4 * 8 + lane % 4 * 2 + i % 2;
                    if (key >= visible[stack][i / 2 % 2]) scores[stack][i / 4][i % 4] = -INFINITY;
                }
            }
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                float top = softmax.top[stack][half];
#pragma unroll
                for (int n = 0; n < kKeys / 8; ++n)
                    top = fmaxf(top, fmaxf(scores[stack][n][2 * half], scores[stack][n][2 * half + 1]));
                top = quad_max(top);
                const float correction = exp2f((softmax.top[stack][half] - top) * scale);
                softmax.top[stack][half] = top;
                float sum = 0;
#pragma unroll
                for (int n = 0; n < kKeys / 8; ++n)
#pragma unroll
                    for (int i = 2 * half; i < 2 * half + 2; ++i) {
                        scores[stack][n][i] = exp2f(scores[stack][n][i] * scale - top * scale);
                        sum += scores[stack][n][i];
                    }
                softmax.sum[stack][half] = softmax.sum[stack][half] * correction + sum;
#pragma unroll
                for (int n = 0; n < kHeadDim / 8; ++n) {
                    output[stack][n][2 * half] *= correction;
                    output[stack][n][2 * half + 1] *= correction;
                }
            }
            // Two 16 x 8 results side by side are laid out just as the 16 x 16 left operand of the next product.
#pragma unroll
            for (int k = 0; k < kKeys / 16; ++k)
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    const float(&pair)[4] = scores[stack][2 * k + i / 2];
                    weights[stack][k][i] = pack(pair[i % 2 * 2], pair[i % 2 * 2 + 1], T{});
                }
        }
#pragma unroll
        for (int k = 0; k < kKeys; k += 16)
#pragma unroll
            for (int n = 0; n < kHeadDim; n += 16) {
                unsigned b[4];
                load_matrices_transposed(b, value_lane + (k * Shape::pitch + n) * sizeof(T));
#pragma unroll
                for (int stack = 0; stack < kStack; ++stack) {
                    multiply_add(output[stack][n / 8], weights[stack][k / 16], b[0], b[1], T{});
                    multiply_add(output[stack][n / 8 + 1], weights[stack][k / 16], b[2], b[3], T{});
                }
            }
    }

#pragma unroll
    for (int stack = 0; stack < kStack; ++stack)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int pair = (warp * kStack + stack) * 16 + half * 8 + lane / 4;
            const float sum = quad_sum(softmax.sum[stack][half]);
            const float inverse = tile.keys == 0 ? 0 : 1 / sum;
            if (pair >= tile.count) continue;
            T* target = out + (tile.token_of(pair) * rows.heads + tile.head_of(pair)) * head_dim + lane % 4 * 2;
#pragma unroll
            for (int n = 0; n < kHeadDim / 8; ++n)
                if (n * 8 < head_dim)
                    *reinterpret_cast<unsigned*>(target + n * 8) =
                        pack(output[stack][n][2 * half] * inverse, output[stack][n][2 * half + 1] * inverse, T{});
        }
}

// ------------------------------------------------------------------------------------------- exact float32

// Models in float32 are for comparing, so this one does without tensor cores, whose float32 mode drops bits. A warp
// takes four pairs; for a score its lanes share the head's dimensions, and for the output each lane keeps its own.
constexpr int kExactRows = 4;
constexpr int kMaxPerLane = 256 / 32;

__global__ void __launch_bounds__(kThreads)
    prefill_exact_kernel(float* out, const float* query, const float* keys, const float* values, Rows rows,
                         int block_size, int kv_heads, int head_dim) {
    wait_for_previous();
    const Tile tile = find_tile(rows, kv_heads, kExactRows * kWarps);
    const Slots slots = slots_of_row(rows, block_size);
    const int64_t token_stride = static_cast<int64_t>(kv_heads) * head_dim;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;

    for (int pair = warp; pair < tile.count; pair += kWarps) {
        const float* q = query + tile.token_of(pair) * rows.query_stride + tile.head_of(pair) * head_dim;
        float own_query[kMaxPerLane], output[kMaxPerLane] = {}, top = kLowest, sum = 0;
#pragma unroll
        for (int i = 0; i < kMaxPerLane; ++i) own_query[i] = i * 32 + lane < head_dim ? q[i * 32 + lane] : 0;
        const int num_keys = tile.keys == 0 ? 0 : tile.visible(pair);
        for (int key = 0; key < num_keys; ++key) {
            const int64_t offset = slots.at(key) * token_stride + blockIdx.x * head_dim + lane;
            float score = 0;
#pragma unroll
            for (int i = 0; i < kMaxPerLane; ++i)
                if (i * 32 + lane < head_dim) score += own_query[i] * keys[offset + i * 32];
            score = warp_sum(score) * rows.scale;
            const float new_top = fmaxf(top, score);
            const float correction = expf(top - new_top), weight = expf(score - new_top);
            top = new_top;
            sum = sum * correction + weight;
#pragma unroll
            for (int i = 0; i < kMaxPerLane; ++i)
                if (i * 32 + lane < head_dim) output[i] = output[i] * correction + weight * values[offset + i * 32];
        }
        float* target = out + (tile.token_of(pair) * rows.heads + tile.head_of(pair)) * head_dim;
#pragma unroll
        for (int i = 0; i < kMaxPerLane; ++i)
            if (i * 32 + lane < head_dim) target[i * 32 + lane] = num_keys == 0 ? 0 : output[i] / sum;
    }
}

// ------------------------------------------------------------------------------------------------- launching

struct Call {
    void* out;
    const void* query;
    const PagedCache& cache;
    const Rows& rows;
    int max_query_len;
    cudaStream_t stream;

    template <typename T>
    cudaError_t run(void (*kernel)(T*, const T*, const T*, const T*, Rows, int, int, int), int tile_rows,
                    size_t shared_bytes) const {
        const int tiles = (max_query_len * (rows.heads / cache.kv_heads) + tile_rows - 1) / tile_rows;
        const dim3 grid(cache.kv_heads, tiles, rows.num_rows);
        if (shared_bytes > 48 * 1024) {
            const auto attribute = cudaFuncAttributeMaxDynamicSharedMemorySize;
            if (cudaError_t error = cudaFuncSetAttribute(kernel, attribute, int(shared_bytes))) return error;
        }
        return launch(kernel, grid, dim3(kThreads), shared_bytes, stream, static_cast<T*>(out),
                      static_cast<const T*>(query), static_cast<const T*>(cache.key),
                      static_cast<const T*>(cache.value), rows, cache.block_size, cache.kv_heads, cache.head_dim);
    }
    template <typename T, int kHeadDim, int kStack>
    cudaError_t run_tiles() const {
        using Shape = TileShape<T, kHeadDim, kStack>;
        return run<T>(prefill_kernel<T, kHeadDim, kStack>, Shape::rows, Shape::shared_bytes);
    }
    // Large tiles where there are rows for them.
    template <typename T, int kHeadDim>
    cudaError_t run_head_dim() const {
        const bool few = max_query_len * (rows.heads / cache.kv_heads) <= TileShape<T, kHeadDim, 1>::rows;
        return few ? run_tiles<T, kHeadDim, 1>() : run_tiles<T, kHeadDim, 2>();
    }
    cudaError_t run(float) const { return run<float>(prefill_exact_kernel, kExactRows * kWarps, 0); }
    template <typename T>
    cudaError_t run(T) const {
        if (cache.head_dim <= 64) return run_head_dim<T, 64>();
        if (cache.head_dim <= 96) return run_head_dim<T, 96>();
        if (cache.head_dim <= 128) return run_head_dim<T, 128>();
        if (cache.head_dim <= 192) return run_tiles<T, 192, 1>();
        return run_tiles<T, 256, 1>();
    }
};

// --------------------------------------------------------------------------------------------------- merging

// Every set of keys brings weight in proportion to exp(its log-sum-exp). One thread to 16 bytes.
template <typename T>
__global__ void merge_kernel(T* out, const T* a, const float* lse_a, const T* b, const float* lse_b, int num_tokens,
                             int heads, int packs) {
    wait_for_previous();
    let_next_start();
    const int64_t i = blockIdx.x * int64_t(blockDim.x) + threadIdx.x;
    if (i >= int64_t(num_tokens) * heads * packs) return;
    const int64_t pair = i / packs, at = pair % heads * num_tokens + pair / heads;
    const float share_b = 1 / (1 + expf(lse_a[at] - lse_b[at])), share_a = 1 - share_b;
    Pack<T> x = reinterpret_cast<const Pack<T>*>(a)[i];
    const Pack<T> y = reinterpret_cast<const Pack<T>*>(b)[i];
#pragma unroll
    for (int j = 0; j < Pack<T>::size; ++j)
        x.values[j] = from_float<T>(share_a * to_float(x.values[j]) + share_b * to_float(y.values[j]));
    reinterpret_cast<Pack<T>*>(out)[i] = x;
}

}  // namespace

cudaError_t prefill_attention(void* out, const void* query, const PagedCache& cache, const Rows& rows,
                              int max_query_len, cudaStream_t stream) {
    if (cache.head_dim % 8 || cache.head_dim > 256 || rows.heads % cache.kv_heads) return cudaErrorInvalidValue;
    if (rows.num_rows == 0 || max_query_len == 0) return cudaSuccess;
    const Call call{out, query, cache, rows, max_query_len, stream};
    return dispatch(cache.dtype, [&](auto type) { return call.run(type); });
}

cudaError_t merge_attention(void* out, const void* a, const float* lse_a, const void* b, const float* lse_b,
                            int num_tokens, int heads, int head_dim, DType dtype, cudaStream_t stream) {
    return dispatch(dtype, [&](auto type) {
        using T = decltype(type);
        const int packs = head_dim / Pack<T>::size;
        const int64_t blocks = (int64_t(num_tokens) * heads * packs + 255) / 256;
        if (blocks == 0) return cudaSuccess;
        return launch(merge_kernel<T>, dim3(unsigned(blocks)), dim3(256), 0, stream, static_cast<T*>(out),
                      static_cast<const T*>(a), lse_a, static_cast<const T*>(b), lse_b, num_tokens, heads, packs);
    });
}

}  // namespace nanopd
