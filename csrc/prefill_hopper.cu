// Prefill attention for Hopper, head size 128: the idea of prefill_attention.cu on the instructions of sm_90a.
//
// FlashAttention-3's division of labour. One warpgroup (128 threads) only copies keys and values through the block
// table into a ring of two stages; two others only compute, 64 rows of the tile each. wgmma reads its operands from
// shared memory by itself and runs while the warps go on, so a warpgroup starts the scores of the next 128 keys
// together with the weighted sum of the last 128 values, and works out the softmax of the former while the latter
// still multiplies. The two warpgroups take turns, so that one's softmax falls into the other's products.
//
// The grid is as large as the GPU and each thread block takes tile after tile, the longest first: the copying
// warpgroup runs ahead into the next tile while the others finish this one.
//
// Shared memory has the layout that wgmma wants: 64 dimensions (128 bytes) to a row, two such panels side by side,
// the eight 16-byte words of a row permuted by the row's number modulo 8.

#include "prefill.cuh"

namespace nanopd {
namespace {

constexpr int kHeadDim = 128;
constexpr int kRows = 128;       // query rows of a tile: 64 to a computing warpgroup
constexpr int kStages = 2;
constexpr int kGroupThreads = 128;
constexpr int kThreads = 3 * kGroupThreads;
constexpr int kPanelBytes = 128 * 128;          // 128 rows of 64 dimensions
constexpr int kTileBytes = 2 * kPanelBytes;
constexpr int kSharedBytes = (1 + 2 * kStages) * kTileBytes + 1024 + 128;

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
constexpr int kKeys = 128;  // keys of a step

// ----------------------------------------------------------------------------------------------- barriers

// Every barrier counts the arrivals of one phase after the other; a wait names the parity of the phase.
__device__ __forceinline__ void init_barrier(unsigned barrier, int arrivals) {
    asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals));
}
__device__ __forceinline__ void arrive(unsigned barrier) {
    asm volatile("mbarrier.arrive.shared.b64 _, [%0];" ::"r"(barrier) : "memory");
}
__device__ __forceinline__ void arrive_after_copies(unsigned barrier) {
    asm volatile("cp.async.mbarrier.arrive.noinc.shared.b64 [%0];" ::"r"(barrier) : "memory");
}
__device__ __forceinline__ void wait(unsigned barrier, unsigned parity) {
    asm volatile(
        "{\n.reg .pred done;\nagain:\nmbarrier.try_wait.parity.shared.b64 done, [%0], %1;\n@!done bra again;\n}"
        ::"r"(barrier), "r"(parity) : "memory");
}
// What was copied by ordinary threads must be made visible to the tensor cores, which read on their own.
__device__ __forceinline__ void wait_for_tensor_cores(unsigned barrier, unsigned parity) {
    wait(barrier, parity);
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

// The computing warpgroups' turns: barrier 1 + g is group g's.
__device__ __forceinline__ void take_turn(int group) {
    asm volatile("bar.sync %0, 256;" ::"r"(1 + group) : "memory");
}
__device__ __forceinline__ void give_turn(int group) {
    asm volatile("bar.arrive %0, 256;" ::"r"(1 + group) : "memory");
}

// -------------------------------------------------------------------------------------------------- wgmma

// A descriptor says where an operand begins and how its 8 x 128-byte pieces repeat: every 1024 bytes along the rows,
// and every panel along the dimensions (which only the values need: there the dimensions are the result's columns).
__device__ __forceinline__ uint64_t describe(unsigned address) {
    return (uint64_t(1) << 62) | (uint64_t(1024 / 16) << 32) | (uint64_t(kPanelBytes / 16) << 16) |
           ((address & 0x3ffff) / 16);
}

__device__ __forceinline__ void begin_products() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void commit_products() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int kPending>
__device__ __forceinline__ void wait_for_products() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}
// Keeps the compiler from moving uses of registers that a product may still be writing.
__device__ __forceinline__ void pin(float (&c)[64]) {
#pragma unroll
    for (int i = 0; i < 64; ++i) asm volatile("" : "+f"(c[i])::"memory");
}

// Left alone, the assembler puts the softmax off until after the wait that it should fill. A never taken nap that
// depends on its result keeps it in front.
__device__ __forceinline__ void finish(float sum) {
    asm volatile("{\n.reg .pred never;\nsetp.lt.f32 never, %0, 0f00000000;\n@never nanosleep.u32 0;\n}" ::"f"(sum)
                 : "memory");
}

#define FOUR(c, i) "+f"(c[i]), "+f"(c[i + 1]), "+f"(c[i + 2]), "+f"(c[i + 3])
#define SIXTEEN(c, i) FOUR(c, i), FOUR(c, i + 4), FOUR(c, i + 8), FOUR(c, i + 12)
#define RESULT(c) SIXTEEN(c, 0), SIXTEEN(c, 16), SIXTEEN(c, 32), SIXTEEN(c, 48)
#define RESULT_NAMES                                                                                 \
    "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, " \
    "%21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, %36, %37, %38, %39, "  \
    "%40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, "  \
    "%59, %60, %61, %62, %63}"
// c[64 x 128] (+)= a[64 x 16] b[16 x 128]. Of the scores both operands lie in shared memory; of the weighted sum the
// weights are in registers and the values are transposed on the way.
#define DEFINE_PRODUCTS(T, name)                                                                                   \
    __device__ __forceinline__ void multiply(float(&c)[64], uint64_t a, uint64_t b, bool add, T) {                 \
        asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %66, 0;\nwgmma.mma_async.sync.aligned.m64n128k16.f32." name \
                     "." name " " RESULT_NAMES ", %64, %65, p, 1, 1, 0, 0;\n}"                                     \
                     : RESULT(c) : "l"(a), "l"(b), "r"(int(add)));                                                 \
    }                                                                                                              \
    __device__ __forceinline__ void multiply(float(&c)[64], const unsigned(&a)[4], uint64_t b, T) {                \
        asm volatile("wgmma.mma_async.sync.aligned.m64n128k16.f32." name "." name " " RESULT_NAMES                 \
                     ", {%64, %65, %66, %67}, %68, 1, 1, 1, 1;"                                                    \
                     : RESULT(c) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));                            \
    }

DEFINE_PRODUCTS(__half, "f16")
DEFINE_PRODUCTS(__nv_bfloat16, "bf16")

// ------------------------------------------------------------------------------------------------- the parts

// Addresses in shared memory. Of barriers, full: copied, may be used; empty: used, may be overwritten.
struct Shared {
    unsigned query, barriers;

    __device__ explicit Shared(unsigned base)
        : query((base + 1023) / 1024 * 1024), barriers(query + (1 + 2 * kStages) * kTileBytes) {}
    __device__ unsigned key(unsigned step) const { return query + (1 + step % kStages) * kTileBytes; }
    __device__ unsigned value(unsigned step) const { return key(step) + kStages * kTileBytes; }
    __device__ unsigned key_full(unsigned step) const { return barriers + step % kStages * 32; }
    __device__ unsigned key_empty(unsigned step) const { return key_full(step) + 8; }
    __device__ unsigned value_full(unsigned step) const { return key_full(step) + 16; }
    __device__ unsigned value_empty(unsigned step) const { return key_full(step) + 24; }
    __device__ unsigned query_full() const { return barriers + kStages * 32; }
    __device__ unsigned query_empty() const { return query_full() + 8; }

    __device__ void init_barriers() const {
        const int copying = kGroupThreads, computing = 2 * kGroupThreads / 32;  // one arrival to a computing warp
        for (int i = 0; i < 4 * kStages + 2; ++i) init_barrier(barriers + 8 * i, i % 2 ? computing : copying);
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    }
};

// All tiles of a launch, the last of each row first: they see the most keys. Thread blocks take them to and fro,
// as a plough goes, so that who got the longer one in this round gets the shorter one in the next.
struct Work {
    int num_rows, kv_heads, tiles;
    int row, kv_head, index;
    int round = 0;

    __device__ bool next() {
        const int turned = round % 2 ? gridDim.x - 1 - blockIdx.x : blockIdx.x;
        int i = round++ * gridDim.x + turned;
        kv_head = i % kv_heads, i /= kv_heads;
        row = i % num_rows, i /= num_rows;
        index = tiles - 1 - i;
        return index >= 0;
    }
};

// The copying warpgroup. Eight lanes copy a row's 128 bytes of one panel and then of the other. It has few registers
// and hardly any time, about a thousand cycles for 4096 copies: addresses of whole steps are one multiplication and
// constants, and only the step that reaches past the last key asks which rows exist.
template <typename T>
__device__ void copy_tiles(const Shared& shared, Work work, const T* query, const T* all_keys, const T* all_values,
                           const Rows& rows, int block_size) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, word = lane % 8;
    const unsigned token_bytes = work.kv_heads * kHeadDim * sizeof(T);
    // Row r of the warp's 32 that this lane copies in pass i is i * 4 + lane / 8, so r % 8 has two values.
    const unsigned even = (warp * 32 + lane / 8) * 128 + (word ^ lane / 8) * 16, odd = even ^ 64;
    const auto copy_row = [&](unsigned tile, int pass, const char* source, bool exists) {
        const unsigned target = tile + (pass % 2 ? odd : even) + pass * 4 * 128;
        copy_async(target, source, exists);
        copy_async(target + kPanelBytes, source + 128, exists);
    };

    unsigned step = 0, tile_parity = 1;
    while (work.next()) {
        const Tile tile = find_tile(rows, work.row, work.kv_head, work.kv_heads, work.index, kRows);
        if (tile.count <= 0 || tile.keys == 0) continue;
        const Slots slots(rows, work.row, block_size);
        const auto keys = reinterpret_cast<const char*>(all_keys + work.kv_head * kHeadDim) + word * 16;
        const auto values = reinterpret_cast<const char*>(all_values + work.kv_head * kHeadDim) + word * 16;
        // Each lane finds one key's place, a step ahead, and hands it to the lanes that copy that key.
        const auto find_slot = [&](int start) {
            const int key = start + warp * 32 + lane;
            return key < tile.keys ? slots.at(key) : 0u;
        };
        const auto copy = [&](unsigned to, const char* from, int start, unsigned slot, unsigned full) {
            unsigned row_slots[8];
#pragma unroll
            for (int pass = 0; pass < 8; ++pass)
                row_slots[pass] = __shfl_sync(0xffffffffu, slot, pass * 4 + lane / 8);
            if (start + kKeys <= tile.keys) {
#pragma unroll
                for (int pass = 0; pass < 8; ++pass)
                    copy_row(to, pass, from + uint64_t(row_slots[pass]) * token_bytes, true);
            } else {
                const int left = tile.keys - start - warp * 32 - lane / 8;
#pragma unroll
                for (int pass = 0; pass < 8; ++pass)
                    copy_row(to, pass, from + uint64_t(row_slots[pass]) * token_bytes, pass * 4 < left);
            }
            arrive_after_copies(full);
        };

        unsigned slot = find_slot(0);
        wait(shared.query_empty(), tile_parity);
        tile_parity ^= 1;
#pragma unroll 2
        for (int pass = 0; pass < 8; ++pass) {
            const int r = warp * 32 + pass * 4 + lane / 8;
            const bool exists = r < tile.count;
            const T* source = query + tile.token_of(r) * rows.query_stride + tile.head_of(r) * kHeadDim;
            copy_row(shared.query, pass, reinterpret_cast<const char*>(exists ? source : query) + word * 16, exists);
        }
        arrive_after_copies(shared.query_full());
        for (int start = 0; start < tile.keys; start += kKeys, ++step) {
            const unsigned parity = step / kStages % 2 ^ 1, next_slot = find_slot(start + kKeys);
            wait(shared.key_empty(step), parity);
            copy(shared.key(step), keys, start, slot, shared.key_full(step));
            wait(shared.value_empty(step), parity);
            copy(shared.value(step), values, start, slot, shared.value_full(step));
            slot = next_slot;
        }
    }
    asm volatile("cp.async.wait_all;" ::: "memory");
}

// One lane's part of 64 rows: rows lane / 4 and lane / 4 + 8 of its warp's 16, two neighbouring columns in eight.
// Element i is of row half i / 2 % 2 and column i / 4 * 8 + lane % 4 * 2 + i % 2.
struct Softmax {
    float top[2], sum[2];  // sum: of the lane's own columns

    // Scores become weights; `correction` is what everything before has to be multiplied by.
    __device__ __forceinline__ void update(float (&scores)[64], float (&correction)[2], float scale) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            float highest = top[half];
#pragma unroll
            for (int i = 2 * half; i < 64; i += 4) highest = fmaxf(highest, fmaxf(scores[i], scores[i + 1]));
            highest = quad_max(highest);
            correction[half] = exp2_fast((top[half] - highest) * scale);
            top[half] = highest;
            float own = 0;
#pragma unroll
            for (int i = 2 * half; i < 64; i += 4) {
                scores[i] = exp2_fast(scores[i] * scale - highest * scale);
                scores[i + 1] = exp2_fast(scores[i + 1] * scale - highest * scale);
                own += scores[i] + scores[i + 1];
            }
            sum[half] = sum[half] * correction[half] + own;
        }
    }
};

template <typename T>
__device__ void compute_tiles(const Shared& shared, Work work, T* out, const Rows& rows) {
    const int group = threadIdx.x / kGroupThreads - 1, lane = threadIdx.x % 32;
    const int first_row = threadIdx.x % kGroupThreads / 32 * 16 + group * 64 + lane / 4;
    const float scale = rows.scale * kLog2e;
    const bool speaker = lane == 0;
    unsigned step = 0, tile_parity = 0;
    if (group == 1) give_turn(0);

    while (work.next()) {
        const Tile tile = find_tile(rows, work.row, work.kv_head, work.kv_heads, work.index, kRows);
        if (tile.count <= 0) continue;
        const int visible[2] = {tile.visible(first_row), tile.visible(first_row + 8)};
        const int all_visible = tile.visible(group * 64);
        float scores[64], output[64] = {}, correction[2];
        unsigned weights[8][4];
        Softmax softmax{{kLowest, kLowest}, {0, 0}};

        const uint64_t query = describe(shared.query + group * 64 * 128);
        const auto start_scores = [&](unsigned i) {
            const uint64_t key = describe(shared.key(i));
            wait_for_tensor_cores(shared.key_full(i), i / kStages % 2);
            pin(scores);
            begin_products();
#pragma unroll
            for (int k = 0; k < 8; ++k) {  // 16 dimensions: 32 bytes
                const int offset = (k / 4 * kPanelBytes + k % 4 * 32) / 16;
                multiply(scores, query + offset, key + offset, k > 0, T{});
            }
            commit_products();
        };
        const auto start_sum = [&](unsigned i) {
            const uint64_t value = describe(shared.value(i));
            wait_for_tensor_cores(shared.value_full(i), i / kStages % 2);
            pin(output);
            begin_products();
#pragma unroll
            for (int k = 0; k < 8; ++k) multiply(output, weights[k], value + k * (16 * 128 / 16), T{});  // 16 keys
            commit_products();
        };
        const auto mask = [&](int start) {
            if (start + kKeys <= all_visible) return;
#pragma unroll
            for (int i = 0; i < 64; ++i)
                if (start + i / 4 * 8 + lane % 4 * 2 + i % 2 >= visible[i / 2 % 2]) scores[i] = -INFINITY;
        };
        const auto set_weights = [&] {
#pragma unroll
            for (int i = 0; i < 32; ++i) weights[i / 4][i % 4] = pack(scores[2 * i], scores[2 * i + 1], T{});
        };

        if (tile.keys > 0) {
            wait_for_tensor_cores(shared.query_full(), tile_parity);
            tile_parity ^= 1;
            take_turn(group);
            start_scores(step);
            give_turn(1 - group);
            wait_for_products<0>();
            pin(scores);
            if (speaker) arrive(shared.key_empty(step));
            mask(0);
            softmax.update(scores, correction, scale);
            set_weights();
            for (int start = kKeys; start < tile.keys; start += kKeys, ++step) {
                take_turn(group);
                start_scores(step + 1);
                start_sum(step);
                give_turn(1 - group);
                wait_for_products<1>();
                pin(scores);
                if (speaker) arrive(shared.key_empty(step + 1));
                mask(start);
                softmax.update(scores, correction, scale);
                finish(softmax.sum[0] + softmax.sum[1]);
                wait_for_products<0>();
                pin(output);
                if (speaker) arrive(shared.value_empty(step));
#pragma unroll
                for (int i = 0; i < 64; ++i) output[i] *= correction[i / 2 % 2];
                set_weights();
            }
            if (speaker) arrive(shared.query_empty());
            start_sum(step);
            wait_for_products<0>();
            pin(output);
            if (speaker) arrive(shared.value_empty(step));
            ++step;
        }
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const float inverse = tile.keys == 0 ? 0 : 1 / quad_sum(softmax.sum[half]);
            const int pair = first_row + half * 8;
            if (pair >= tile.count) continue;
            T* target = out + (tile.token_of(pair) * rows.heads + tile.head_of(pair)) * kHeadDim + lane % 4 * 2;
#pragma unroll
            for (int n = 0; n < 16; ++n)
                *reinterpret_cast<unsigned*>(target + n * 8) =
                    pack(output[4 * n + 2 * half] * inverse, output[4 * n + 2 * half + 1] * inverse, T{});
        }
    }
    if (group == 0) take_turn(0);  // the turn that nobody will take
}
#endif

template <typename T>
__global__ void __launch_bounds__(kThreads, 1)
    hopper_kernel(T* out, const T* query, const T* keys, const T* values, const __grid_constant__ Rows rows,
                  int block_size, int kv_heads, int tiles) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
    extern __shared__ unsigned char memory[];
    const Shared shared(shared_address(memory));
    if (threadIdx.x == 0) shared.init_barriers();
    __syncthreads();
    wait_for_previous();
    let_next_start();
    Work work{rows.num_rows, kv_heads, tiles};
    if (threadIdx.x < kGroupThreads) {
        asm volatile("setmaxnreg.dec.sync.aligned.u32 40;");
        copy_tiles(shared, work, query, keys, values, rows, block_size);
    } else {
        asm volatile("setmaxnreg.inc.sync.aligned.u32 232;");
        compute_tiles(shared, work, out, rows);
    }
#else
    __trap();  // built for sm_90 without the "a"
#endif
}

template <typename T>
cudaError_t launch_hopper(T* out, const void* query, const PagedCache& cache, const Rows& rows, int max_query_len,
                          cudaStream_t stream) {
    const int tiles = (int64_t(max_query_len) * (rows.heads / cache.kv_heads) + kRows - 1) / kRows;
    const int64_t work = int64_t(tiles) * cache.kv_heads * rows.num_rows;
    const int blocks = work < multiprocessor_count() ? int(work) : multiprocessor_count();
    const auto attribute = cudaFuncAttributeMaxDynamicSharedMemorySize;
    if (cudaError_t error = cudaFuncSetAttribute(hopper_kernel<T>, attribute, kSharedBytes)) return error;
    return launch(hopper_kernel<T>, dim3(blocks), dim3(kThreads), kSharedBytes, stream, out,
                  static_cast<const T*>(query), static_cast<const T*>(cache.key), static_cast<const T*>(cache.value),
                  rows, cache.block_size, cache.kv_heads, tiles);
}

}  // namespace

bool hopper_prefill_supports(const PagedCache& cache) {
    return compute_capability() == 90 && cache.dtype != DType::f32 && cache.head_dim == kHeadDim;
}

cudaError_t hopper_prefill(void* out, const void* query, const PagedCache& cache, const Rows& rows, int max_query_len,
                           cudaStream_t stream) {
    if (cache.dtype == DType::f16)
        return launch_hopper(static_cast<__half*>(out), query, cache, rows, max_query_len, stream);
    return launch_hopper(static_cast<__nv_bfloat16*>(out), query, cache, rows, max_query_len, stream);
}

}  // namespace nanopd
