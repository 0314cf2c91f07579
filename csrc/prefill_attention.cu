// Prefill attention: many new tokens of a row at once, over everything the row has in the paged cache.
//
// The idea is FlashAttention-2. A thread block keeps a tile of queries and walks over the keys 64 at a time; scores
// live only in registers, and the softmax is corrected as larger scores turn up, so memory traffic is one pass over
// the cached tokens for each tile of queries. Four things are particular to this place:
//
// - Query heads that share a KV head share its tiles: the rows of a tile are (token, head of the group) pairs, token
//   by token. A chunk of 32 tokens with 4 heads a group fills a tile of 128, and a speculative verification of 4
//   tokens reads the cache once, not once for each query head.
// - Keys come through the block table. Each lane finds the slot of one of its warp's 16 keys and hands it to the
//   lanes that copy the key and later its value, so a warp reads a table entry once.
// - Where few queries meet a long context, the thread blocks of a cluster divide the keys (on sm_90 and newer).
// - A key past the tile's last visible one is not read but filled with zeros: memory there may hold NaN, which a
//   weight of 0 would not stop (0 * NaN is NaN).
//
// Rows of a tile in shared memory are padded by 16 bytes: an odd number of 16-byte words a row puts the eight rows
// of an ldmatrix on different banks, for every head size. prefill_hopper.cu does the same with Hopper's instructions.
//
// Why not the library's attention for long chunks? On Hopper at head size 128 prefill_hopper.cu is about as fast
// without gathering the keys first; and cuDNN compiles a plan for every new length, 32 ms on an H200, while hardly two
// prompts are equally long.

#include <cooperative_groups.h>

#include "prefill.cuh"

namespace nanopd {
namespace {

namespace cg = cooperative_groups;

constexpr int kWarps = 4;
constexpr int kThreads = 32 * kWarps;
constexpr int kKeys = 64;                     // keys of a step
constexpr int kKeysPerWarp = kKeys / kWarps;  // of them, those a warp copies

// ----------------------------------------------------------------------------------------- PTX, one line each

__device__ __forceinline__ void commit_copies() { asm volatile("cp.async.commit_group;"); }
__device__ __forceinline__ void wait_for_copies() { asm volatile("cp.async.wait_group 0;" ::: "memory"); }

__device__ __forceinline__ void load_matrices_transposed(unsigned (&r)[4], unsigned address) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(address));
}

// c[16 x 8] += a[16 x 16] b[16 x 8]
__device__ __forceinline__ void multiply_add(float (&c)[4], const unsigned (&a)[4], unsigned b0, unsigned b1,
                                             __half) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
                 "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
__device__ __forceinline__ void multiply_add(float (&c)[4], const unsigned (&a)[4], unsigned b0, unsigned b1,
                                             __nv_bfloat16) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
                 "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// ----------------------------------------------------------------------------------- the tensor core kernel

// kHeadDim: the head size, or the next larger one there is an instance for; what is missing counts as zeros.
// kStack: 16-row pieces of queries to a warp. Two use each key fragment from shared memory twice, one suits few rows.
template <typename T, int kHeadDim, int kStack>
struct TileShape {
    static constexpr int rows = 16 * kStack * kWarps;
    static constexpr int pitch = kHeadDim + 8;  // elements from row to row in shared memory
    static constexpr int words = kHeadDim / 8;  // 16-byte words to a row
    static constexpr size_t shared_bytes = (rows + 2 * kKeys) * pitch * sizeof(T);
};

// The rows of one warp: their output so far, before it is divided by `sum`. A lane holds of each 16 x 8 piece two
// neighbouring columns in row lane / 4 (elements 0 and 1) and in row lane / 4 + 8 (elements 2 and 3); of `sum`, its
// own columns' part.
template <typename T, int kHeadDim, int kStack>
struct WarpRows {
    static constexpr int pitch = TileShape<T, kHeadDim, kStack>::pitch;
    using Scores = float[kStack][kKeys / 8][4];

    float output[kStack][kHeadDim / 8][4] = {};
    float top[kStack][2], sum[kStack][2] = {};

    __device__ WarpRows() {
        for (auto& tops : top) tops[0] = tops[1] = kLowest;
    }

    __device__ __forceinline__ void multiply_keys(Scores& scores, unsigned queries, unsigned keys) {
#pragma unroll
        for (int k = 0; k < kHeadDim; k += 16) {
            unsigned a[kStack][4], b[4];
#pragma unroll
            for (int stack = 0; stack < kStack; ++stack)
                load_matrices(a[stack], queries + (stack * 16 * pitch + k) * sizeof(T));
#pragma unroll
            for (int n = 0; n < kKeys; n += 16) {
                load_matrices(b, keys + (n * pitch + k) * sizeof(T));
#pragma unroll
                for (int stack = 0; stack < kStack; ++stack) {
                    multiply_add(scores[stack][n / 8], a[stack], b[0], b[1], T{});
                    multiply_add(scores[stack][n / 8 + 1], a[stack], b[2], b[3], T{});
                }
            }
        }
    }

    // Scores become weights, and all that came before is corrected to the new highest score.
    __device__ __forceinline__ void soften(Scores& scores, float scale) {
#pragma unroll
        for (int stack = 0; stack < kStack; ++stack)
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                float highest = top[stack][half], own = 0;
#pragma unroll
                for (auto& piece : scores[stack])
                    highest = fmaxf(highest, fmaxf(piece[2 * half], piece[2 * half + 1]));
                highest = quad_max(highest);
                const float correction = exp2_fast((top[stack][half] - highest) * scale);
                top[stack][half] = highest;
#pragma unroll
                for (auto& piece : scores[stack])
#pragma unroll
                    for (int i = 2 * half; i < 2 * half + 2; ++i) {
                        piece[i] = exp2_fast(piece[i] * scale - highest * scale);
                        own += piece[i];
                    }
                sum[stack][half] = sum[stack][half] * correction + own;
#pragma unroll
                for (auto& piece : output[stack]) piece[2 * half] *= correction, piece[2 * half + 1] *= correction;
            }
    }

    __device__ __forceinline__ void add_values(const Scores& weights, unsigned values) {
#pragma unroll
        for (int k = 0; k < kKeys / 16; ++k) {
            unsigned a[kStack][4], b[4];
            // Two 16 x 8 results side by side are laid out just as the 16 x 16 left operand of the next product.
#pragma unroll
            for (int i = 0; i < 4 * kStack; ++i) {
                const float(&piece)[4] = weights[i / 4][2 * k + i % 4 / 2];
                a[i / 4][i % 4] = pack(piece[i % 2 * 2], piece[i % 2 * 2 + 1], T{});
            }
#pragma unroll
            for (int n = 0; n < kHeadDim; n += 16) {
                load_matrices_transposed(b, values + (k * 16 * pitch + n) * sizeof(T));
#pragma unroll
                for (int stack = 0; stack < kStack; ++stack) {
                    multiply_add(output[stack][n / 8], a[stack], b[0], b[1], T{});
                    multiply_add(output[stack][n / 8 + 1], a[stack], b[2], b[3], T{});
                }
            }
        }
    }
};

// Where few queries meet many keys, the thread blocks of a cluster share the keys. At the end each lays its part of
// the output down in its shared memory, and each puts a share of the rows together from everybody's.
template <typename T, int kHeadDim>
__device__ void merge_parts(T* out, const WarpRows<T, kHeadDim, 1>& mine, unsigned char* shared, const Tile& tile,
                            const Rows& rows, int head_dim) {
#if __CUDA_ARCH__ >= 900
    constexpr int tile_rows = TileShape<T, kHeadDim, 1>::rows;
    float* output = reinterpret_cast<float*>(shared);  // [tile_rows, kHeadDim]
    float2* state = reinterpret_cast<float2*>(output + tile_rows * kHeadDim);  // [tile_rows]: top and sum
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const cg::cluster_group cluster = cg::this_cluster();
    const int parts = cluster.num_blocks();

    __syncthreads();  // the tiles that lay here are no longer read
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        const int row = warp * 16 + half * 8 + lane / 4;
        const float sum = quad_sum(mine.sum[0][half]);
        if (lane % 4 == 0) state[row] = {mine.top[0][half], sum};
#pragma unroll
        for (int n = 0; n < kHeadDim / 8; ++n)
            *reinterpret_cast<float2*>(output + row * kHeadDim + n * 8 + lane % 4 * 2) =
                {mine.output[0][n][2 * half], mine.output[0][n][2 * half + 1]};
    }
    cluster.sync();
    for (int row = cluster.block_rank() * kWarps + warp; row < tile.count; row += parts * kWarps) {
        float top = kLowest, sum = 0, merged[kHeadDim / 32] = {};
        for (int part = 0; part < parts; ++part) top = fmaxf(top, cluster.map_shared_rank(state, part)[row].x);
        for (int part = 0; part < parts; ++part) {
            const float2 theirs = cluster.map_shared_rank(state, part)[row];
            const float weight = exp2_fast((theirs.x - top) * rows.scale * kLog2e);
            const float* source = cluster.map_shared_rank(output, part) + row * kHeadDim + lane;
            sum += theirs.y * weight;
#pragma unroll
            for (int i = 0; i < kHeadDim / 32; ++i) merged[i] += source[i * 32] * weight;
        }
        T* target = out + (tile.token_of(row) * rows.heads + tile.head_of(row)) * head_dim;
#pragma unroll
        for (int i = 0; i < kHeadDim / 32; ++i)
            if (i * 32 + lane < head_dim)
                target[i * 32 + lane] = from_float<T>(tile.keys == 0 ? 0 : merged[i] / sum);
    }
    cluster.sync();  // nobody leaves while others read its shared memory
#endif
}

// Grid: KV head and part of the keys, tile, row. The last tiles see the most keys and come first, so that the short
// ones fill the gaps.
template <typename T, int kHeadDim, int kStack>
__global__ void __launch_bounds__(kThreads, kStack == 2 || kHeadDim > 128 ? 2 : 3)
    prefill_kernel(T* out, const T* query, const T* keys, const T* values, const __grid_constant__ Rows rows,
                   int block_size, int kv_heads, int head_dim) {
    using Shape = TileShape<T, kHeadDim, kStack>;
    extern __shared__ __align__(16) unsigned char shared[];
    const unsigned query_tile = shared_address(shared);
    const unsigned key_tile = query_tile + Shape::rows * Shape::pitch * sizeof(T);
    const unsigned value_tile = key_tile + kKeys * Shape::pitch * sizeof(T);
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, warp_row = warp * kStack * 16;
    const int parts = gridDim.x / kv_heads, kv_head = blockIdx.x / parts;

    wait_for_previous();
    let_next_start();
    // Found anew where it is needed: the registers that it takes are better used in the loop.
    const auto find = [&] {
        return find_tile(rows, blockIdx.z, kv_head, kv_heads, gridDim.y - 1 - blockIdx.y, Shape::rows);
    };
    const Tile tile = find();
    if (tile.count <= 0) return;
    const Slots slots(rows, blockIdx.z, block_size);
    const unsigned token_stride = kv_heads * head_dim;
    keys += kv_head * head_dim;
    values += kv_head * head_dim;

    for (int i = threadIdx.x; i < Shape::rows * Shape::words; i += kThreads) {
        const int pair = i / Shape::words, column = i % Shape::words * 8;
        const bool exists = pair < tile.count && column < head_dim;
        const T* source = query + tile.token_of(pair) * rows.query_stride + tile.head_of(pair) * head_dim + column;
        copy_async(query_tile + (pair * Shape::pitch + column) * sizeof(T), exists ? source : query, exists);
    }
    // Each lane finds one key's place (of the warp's 16: lanes 16 and up repeat) and hands it to those that copy it.
    const auto find_slot = [&](int start) {
        const int key = start + warp * kKeysPerWarp + lane % kKeysPerWarp;
        return key < tile.keys ? slots.at(key) : 0u;
    };
    const auto copy_tile = [&](unsigned target, const T* source, int start, unsigned slot) {
#pragma unroll 4
        for (int i = lane; i < kKeysPerWarp * Shape::words; i += 32) {
            const int key = i / Shape::words, column = i % Shape::words * 8;
            const bool exists = start + warp * kKeysPerWarp + key < tile.keys && column < head_dim;
            const uint64_t offset = uint64_t(__shfl_sync(0xffffffffu, slot, key)) * token_stride + column;
            copy_async(target + ((warp * kKeysPerWarp + key) * Shape::pitch + column) * sizeof(T),
                       source + (exists ? offset : 0), exists);
        }
        commit_copies();
    };

    // Addresses that this lane gives to ldmatrix; the rest of each is a constant.
    const unsigned lane_rows = (lane % 16 * Shape::pitch + lane / 16 * 8) * sizeof(T);
    const unsigned lane_keys = ((lane / 16 * 8 + lane % 8) * Shape::pitch + lane / 8 % 2 * 8) * sizeof(T);
    const unsigned lane_queries = query_tile + warp_row * Shape::pitch * sizeof(T) + lane_rows;
    const bool idle = warp_row >= tile.count;
    const int all_visible = tile.visible(warp_row);       // keys that every row of the warp sees
    const float scale = rows.scale * kLog2e;
    WarpRows<T, kHeadDim, kStack> mine;

    int start = 0, end = tile.keys;
    if constexpr (kStack == 1) {  // a cluster's thread blocks share the keys
        const int steps = (tile.keys + kKeys - 1) / kKeys, part = blockIdx.x % parts;
        start = steps * part / parts * kKeys;
        end = min(tile.keys, steps * (part + 1) / parts * kKeys);
    }
    unsigned slot = find_slot(start);
    if (start < end) copy_tile(key_tile, keys, start, slot);
    for (; start < end; start += kKeys) {
        typename WarpRows<T, kHeadDim, kStack>::Scores scores = {};
        wait_for_copies();
        __syncthreads();  // the keys are here, and nobody reads the values before them any more
        copy_tile(value_tile, values, start, slot);
        if (!idle) mine.multiply_keys(scores, lane_queries, key_tile + lane_keys);
        wait_for_copies();
        __syncthreads();  // the values are here, and nobody reads the keys any more
        slot = find_slot(start + kKeys);
        if (start + kKeys < end) copy_tile(key_tile, keys, start + kKeys, slot);
        if (idle) continue;
        if (start + kKeys > all_visible) {
            const Tile tile = find();
#pragma unroll
            for (int row = 0; row < 2 * kStack; ++row) {
                const int own_visible = tile.visible(warp_row + row * 8 + lane / 4) - start - lane % 4 * 2;
#pragma unroll
                for (int i = 0; i < kKeys / 4; ++i)
                    if (i / 2 * 8 + i % 2 >= own_visible) scores[row / 2][i / 2][row % 2 * 2 + i % 2] = -INFINITY;
            }
        }
        mine.soften(scores, scale);
        mine.add_values(scores, value_tile + lane_rows);
    }

    if constexpr (kStack == 1)
        if (parts > 1) return merge_parts(out, mine, shared, find(), rows, head_dim);
    const Tile again = find();
#pragma unroll
    for (int row = 0; row < 2 * kStack; ++row) {
        const int pair = warp_row + row * 8 + lane / 4, half = row % 2 * 2;
        const float inverse = again.keys == 0 ? 0 : 1 / quad_sum(mine.sum[row / 2][row % 2]);
        if (pair >= again.count) continue;
        T* target = out + (again.token_of(pair) * rows.heads + again.head_of(pair)) * head_dim + lane % 4 * 2;
#pragma unroll
        for (int n = 0; n < kHeadDim / 8; ++n) {
            const float(&piece)[4] = mine.output[row / 2][n];
            if (n * 8 < head_dim)
                *reinterpret_cast<unsigned*>(target + n * 8) =
                    pack(piece[half] * inverse, piece[half + 1] * inverse, T{});
        }
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
    const int kv_head = blockIdx.x;
    const Tile tile = find_tile(rows, blockIdx.z, kv_head, kv_heads, gridDim.y - 1 - blockIdx.y, kExactRows * kWarps);
    const Slots slots(rows, blockIdx.z, block_size);
    const int64_t token_stride = static_cast<int64_t>(kv_heads) * head_dim;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;

    for (int pair = warp; pair < tile.count; pair += kWarps) {
        const float* q = query + tile.token_of(pair) * rows.query_stride + tile.head_of(pair) * head_dim;
        float own_query[kMaxPerLane], output[kMaxPerLane] = {}, top = kLowest, sum = 0;
#pragma unroll
        for (int i = 0; i < kMaxPerLane; ++i) own_query[i] = i * 32 + lane < head_dim ? q[i * 32 + lane] : 0;
        const int num_keys = tile.keys == 0 ? 0 : tile.visible(pair);
        for (int key = 0; key < num_keys; ++key) {
            const int64_t offset = slots.at(key) * token_stride + kv_head * head_dim + lane;
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

    int64_t num_tiles(int tile_rows) const { return int64_t(tiles(tile_rows)) * cache.kv_heads * rows.num_rows; }
    int tiles(int tile_rows) const {
        return (int64_t(max_query_len) * (rows.heads / cache.kv_heads) + tile_rows - 1) / tile_rows;
    }
    // Into how many parts to divide the keys so that the GPU is full: a power of 2, the size of a cluster, with
    // four steps or more to a part as far as the block tables tell.
    int key_parts(int tile_rows) const {
        const int64_t blocks = num_tiles(tile_rows);
        const int64_t longest = int64_t(rows.table_width) * cache.block_size;
        const int64_t room = compute_capability() >= 90 ? 3 * multiprocessor_count() : 0;
        int parts = 1;
        while (parts < 8 && blocks * parts * 2 <= room && longest >= 8 * kKeys * parts) parts *= 2;
        return parts;
    }
    template <typename T>
    cudaError_t run(void (*kernel)(T*, const T*, const T*, const T*, Rows, int, int, int), int tile_rows,
                    size_t shared_bytes, int parts = 1) const {
        if (shared_bytes > 48 * 1024) {
            const auto limit = cudaFuncAttributeMaxDynamicSharedMemorySize;
            if (cudaError_t error = cudaFuncSetAttribute(kernel, limit, int(shared_bytes))) return error;
        }
        cudaLaunchAttribute attributes[2]{};
        attributes[0].id = cudaLaunchAttributeProgrammaticStreamSerialization;
        attributes[0].val.programmaticStreamSerializationAllowed = 1;
        attributes[1].id = cudaLaunchAttributeClusterDimension;
        attributes[1].val.clusterDim = {unsigned(parts), 1, 1};
        cudaLaunchConfig_t config{};
        config.gridDim = dim3(cache.kv_heads * parts, tiles(tile_rows), rows.num_rows);
        config.blockDim = dim3(kThreads);
        config.dynamicSmemBytes = shared_bytes;
        config.stream = stream;
        config.attrs = attributes;
        config.numAttrs = compute_capability() >= 90 ? 2 : 0;
        return cudaLaunchKernelEx(&config, kernel, static_cast<T*>(out), static_cast<const T*>(query),
                                  static_cast<const T*>(cache.key), static_cast<const T*>(cache.value), rows,
                                  cache.block_size, cache.kv_heads, cache.head_dim);
    }
    template <typename T, int kHeadDim, int kStack>
    cudaError_t run_tiles() const {
        using Shape = TileShape<T, kHeadDim, kStack>;
        const int parts = kStack == 1 ? key_parts(Shape::rows) : 1;
        return run<T>(prefill_kernel<T, kHeadDim, kStack>, Shape::rows, Shape::shared_bytes, parts);
    }
    // Large tiles where there are enough of them to fill the GPU.
    template <typename T, int kHeadDim>
    cudaError_t run_head_dim() const {
        const bool few = tiles(TileShape<T, kHeadDim, 1>::rows) == 1 ||
                         num_tiles(TileShape<T, kHeadDim, 2>::rows) < multiprocessor_count();
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

}  // namespace

cudaError_t prefill_attention(void* out, const void* query, const PagedCache& cache, const Rows& rows,
                              int max_query_len, cudaStream_t stream) {
    if (cache.head_dim % 8 || cache.head_dim > 256 || rows.heads % cache.kv_heads) return cudaErrorInvalidValue;
    if (rows.num_rows == 0 || max_query_len == 0) return cudaSuccess;
    const Call call{out, query, cache, rows, max_query_len, stream};
    // Hopper's kernel cannot divide keys among thread blocks, so it needs tiles to fill at least half of the GPU.
    if (hopper_prefill_supports(cache) && call.num_tiles(64) > call.num_tiles(128) &&
        2 * call.num_tiles(128) >= multiprocessor_count())
        return hopper_prefill(out, query, cache, rows, max_query_len, stream);
    return dispatch(cache.dtype, [&](auto type) { return call.run(type); });
}

}  // namespace nanopd
