// The matrix product of linear.cu on Hopper for 9 to 128 tokens, still bound by the time to read the weights.
//
// Warpgroups multiply 64 rows of weights by all tokens at once (wgmma), straight from the shared memory that TMA fills.
// The work is a line of units, 128 rows x 64 columns each, row tile after row tile, and every thread block takes an equal
// stretch of it wherever that begins or ends, so all multiprocessors read the same number of bytes (stream-K). A row tile
// that several blocks share is put together by the one that comes last: it adds up their partial sums from scratch memory
// in the order of the columns, whoever it is, so the result is the same every time.
#include "hopper.cuh"
#include "linear.cuh"

namespace nanopd {
namespace {

constexpr int kGroups = 2;  // warpgroups that multiply
constexpr int kGroupRows = 64;
constexpr int kTileRows = kGroups * kGroupRows;
constexpr int kColumns = 64;  // of a unit: 128 bytes, the width of the swizzle
constexpr int kConsumers = 128 * kGroups;
constexpr int kThreads = kConsumers + 32;
constexpr int kWeightBytes = kTileRows * kColumns * 2;
constexpr int kMaxStages = 8;
constexpr int kSharedBudget = 112 * 1024;  // two blocks, this kernel's and the next one's, fit a multiprocessor
constexpr int kMaxBlocks = 256;
constexpr int kMaxTiles = 16384;
constexpr int kMinUnits = 6;  // of a block: below that, putting the parts together costs more than sharing saves

// What a block leaves in scratch: at its start the end of a tile that others began, at its end the beginning of one.
enum Part { kTail = 0, kHead = 1 };

struct Scratch {
    int arrivals[kMaxTiles];
    float4 parts[kMaxBlocks][2][kMaxBlockTokens / 8][kConsumers];
};

__device__ __forceinline__ void consumers_sync() { asm volatile("bar.sync 1, %0;" ::"n"(kConsumers) : "memory"); }

// ---------------------------------------------------------------------------------------------------- wgmma

// A matrix in shared memory as wgmma wants it named: rows of 128 bytes, swizzled, in groups of 8.
__device__ __forceinline__ uint64_t matrix(const void* pointer) {
    constexpr uint64_t kSwizzle128 = 1ull << 62, kGroupStride = static_cast<uint64_t>(1024 >> 4) << 32;
    return kSwizzle128 | kGroupStride | (1ull << 16) | ((shared_address(pointer) & 0x3ffff) >> 4);
}

__device__ __forceinline__ void wgmma_begin() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void wgmma_end() {
    asm volatile("wgmma.commit_group.sync.aligned;\nwgmma.wait_group.sync.aligned 0;" ::: "memory");
}

#define NANOPD_WGMMA(TYPE)                                                                                          \
    asm volatile(                                                                                                  \
        "wgmma.mma_async.sync.aligned.m64n32k16.f32." TYPE "." TYPE                                                \
        " {%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15}, %16, %17, 1, 1, 1, 0, 0;"        \
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7]),          \
          "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15])     \
        : "l"(a), "l"(b))

// d += 64 rows of weights times 32 tokens, over 16 columns.
__device__ __forceinline__ void wgmma(float* d, uint64_t a, uint64_t b, __nv_bfloat16) { NANOPD_WGMMA("bf16"); }
__device__ __forceinline__ void wgmma(float* d, uint64_t a, uint64_t b, __half) { NANOPD_WGMMA("f16"); }

// ----------------------------------------------------------------------------------------------- the kernel

// The line of units, and who does which.
struct Line {
    int64_t units;
    int steps;  // units of a tile
    __device__ __forceinline__ int64_t begin(int block) const { return block * units / gridDim.x; }
    __device__ __forceinline__ int block_of(int64_t unit) const {
        return static_cast<int>(((unit + 1) * gridDim.x - 1) / units);
    }
};

template <int kTokens>
struct Tile {
    static constexpr int kSums = kTokens / 2;  // of a thread
    float sums[kSums];
};

// The last of a tile's blocks to come here returns true, with the sums of all of them.
template <int kTokens>
__device__ bool put_together(Tile<kTokens>& tile, Scratch& scratch, const Line& line, int index, Part part) {
    __shared__ bool last;
    float4* own = &scratch.parts[blockIdx.x][part][0][threadIdx.x];
#pragma unroll
    for (int i = 0; i < Tile<kTokens>::kSums; i += 4)
        own[i / 4 * kConsumers] = make_float4(tile.sums[i], tile.sums[i + 1], tile.sums[i + 2], tile.sums[i + 3]);
    __threadfence();
    consumers_sync();
    const int64_t first_unit = static_cast<int64_t>(index) * line.steps;
    const int first = line.block_of(first_unit), end = line.block_of(first_unit + line.steps - 1) + 1;
    if (threadIdx.x == 0) {
        last = atomicAdd(&scratch.arrivals[index], 1) == end - first - 1;
        if (last) scratch.arrivals[index] = 0;
        __threadfence();
    }
    consumers_sync();
    if (!last) return false;
#pragma unroll
    for (float& sum : tile.sums) sum = 0.0f;
    for (int block = first; block < end; block++) {
        const float4* theirs = &scratch.parts[block][block == first ? kHead : kTail][0][threadIdx.x];
#pragma unroll
        for (int i = 0; i < Tile<kTokens>::kSums; i += 4) {
            const float4 values = __ldcg(theirs + i / 4 * kConsumers);
            tile.sums[i] += values.x, tile.sums[i + 1] += values.y;
            tile.sums[i + 2] += values.z, tile.sums[i + 3] += values.w;
        }
    }
    return true;
}

template <typename T, int kTokens, bool kSilu>
__device__ void finish_tile(const LinearArguments& arguments, const Tile<kTokens>& tile, int index) {
    const int rows = kSilu ? arguments.out_features / 2 : arguments.out_features;
    const int warp = threadIdx.x / 32, group = threadIdx.x % 32 / 4;
#pragma unroll
    for (int i = 0; i < Tile<kTokens>::kSums; i++) {
        if (kSilu && i % 4 >= 2) continue;
        const int token = i / 4 * 8 + threadIdx.x % 4 * 2 + i % 2;
        // With silu, 8 rows of the gate and their 8 of up lie in turns.
        const int row = kSilu ? (index * kTileRows + warp * 16) / 2 + group
                              : index * kTileRows + warp * 16 + i % 4 / 2 * 8 + group;
        if (row < rows && token < arguments.tokens)
            finish<T, kSilu>(arguments, tile.sums[i], kSilu ? tile.sums[i + 2] : 0.0f, token, row, rows);
    }
}

template <typename T, int kTokens, bool kSilu>
__global__ void __launch_bounds__(kThreads) block_kernel(const LinearArguments arguments,
                                                         const __grid_constant__ CUtensorMap weight_map,
                                                         const __grid_constant__ CUtensorMap token_map, int stages) {
    constexpr int kStageBytes = kWeightBytes + kTokens * kColumns * 2;
    extern __shared__ __align__(1024) unsigned char ring[];
    __shared__ uint64_t full[kMaxStages], empty[kMaxStages];
    const int warp = threadIdx.x / 32;
    const int steps = (arguments.in_features + kColumns - 1) / kColumns;
    const Line line{static_cast<int64_t>((arguments.out_features + kTileRows - 1) / kTileRows) * steps, steps};
    const int64_t begin = line.begin(blockIdx.x), end = line.begin(blockIdx.x + 1);

    if (threadIdx.x == 0) {
        for (int s = 0; s < stages; s++) {
            barrier_init(&full[s], 1);
            barrier_init(&empty[s], kGroups * 4);
        }
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    }
    __syncthreads();

    if (warp == kConsumers / 32) {
        if (threadIdx.x % 32 != 0) return;
        const uint64_t once = read_once_policy(), often = read_often_policy();
        auto load_weights = [&](int64_t unit, int s) {
            const int row = static_cast<int>(unit / steps) * kTileRows, column = static_cast<int>(unit % steps) * kColumns;
            barrier_expect(&full[s], kWeightBytes + arguments.tokens * kColumns * 2);
            load_box(ring + s * kStageBytes, &weight_map, column, kSilu ? 0 : row, 0, kSilu ? row / 16 : 0, &full[s], once);
        };
        auto load_tokens = [&](int64_t unit, int s) {
            const int column = static_cast<int>(unit % steps) * kColumns;
            load_box(ring + s * kStageBytes + kWeightBytes, &token_map, column, 0, 0, 0, &full[s], often);
        };
        const int count = static_cast<int>(end - begin);
        for (int i = 0; i < stages && i < count; i++) load_weights(begin + i, i);
        let_next_start();
        wait_for_previous();
        for (int i = 0; i < stages && i < count; i++) load_tokens(begin + i, i);
        for (int i = stages; i < count; i++) {
            const int s = i % stages;
            barrier_wait(&empty[s], (i / stages - 1) & 1);
            load_weights(begin + i, s);
            load_tokens(begin + i, s);
        }
        return;
    }

    let_next_start();
    wait_for_previous();
    int stage = 0, phase = 0;
    for (int64_t unit = begin; unit < end;) {
        const int index = static_cast<int>(unit / steps);
        const int64_t tile_begin = static_cast<int64_t>(index) * steps, tile_end = tile_begin + steps;
        const int64_t stop = min(end, tile_end);
        const bool whole = unit == tile_begin && stop == tile_end;
        const Part part = unit == tile_begin ? kHead : kTail;
        Tile<kTokens> tile{};
        for (; unit < stop; unit++) {
            barrier_wait(&full[stage], phase);
            const uint8_t* const weights = ring + stage * kStageBytes + warp / 4 * kGroupRows * kColumns * 2;
            const uint8_t* const tokens = ring + stage * kStageBytes + kWeightBytes;
            wgmma_begin();
#pragma unroll
            for (int k = 0; k < kColumns; k += 16)
#pragma unroll
                for (int n = 0; n < kTokens; n += 32)
                    wgmma(tile.sums + n / 2, matrix(weights + k * 2), matrix(tokens + n * 128 + k * 2), T{});
            wgmma_end();
            if (threadIdx.x % 32 == 0) barrier_arrive(&empty[stage]);
            if (++stage == stages) stage = 0, phase ^= 1;
        }
        if (whole || put_together(tile, *static_cast<Scratch*>(arguments.scratch), line, index, part))
            finish_tile<T, kTokens, kSilu>(arguments, tile, index);
    }
}

// Weights [rows, columns] as boxes of 128 rows x 64 columns; with silu 64 rows of each half, in turns of 8.
View weight_view(const LinearArguments& arguments) {
    const cuuint64_t rows = arguments.out_features, row_bytes = arguments.in_features * 2ull, width = arguments.in_features;
    if (!arguments.silu) return {arguments.weight, {width, rows, 1, 1}, {row_bytes, 16, 16}, {kColumns, kTileRows, 1, 1}};
    return {arguments.weight, {width, 8, 2, rows / 16}, {row_bytes, rows / 2 * row_bytes, 8 * row_bytes}, {kColumns, 8, 2, kTileRows / 16}};
}

View token_view(const LinearArguments& arguments) {
    const cuuint64_t rows = arguments.tokens, row_bytes = arguments.in_features * 2ull, width = arguments.in_features;
    return {arguments.x, {width, rows, 1, 1}, {row_bytes, 16, 16}, {kColumns, static_cast<cuuint32_t>(rows), 1, 1}};
}

template <typename T, int kTokens, bool kSilu>
cudaError_t launch_block(const LinearArguments& arguments, cudaStream_t stream) {
    const auto kernel = block_kernel<T, kTokens, kSilu>;
    static const int budget = (getenv("BUDGET") ? atoi(getenv("BUDGET")) : 112) * 1024;
    constexpr int kStageBytes = kWeightBytes + kTokens * kColumns * 2;
    const int stages = min(budget / kStageBytes, kMaxStages);
    const cudaError_t error =
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, stages * kStageBytes);
    if (error != cudaSuccess) return error;
    CUtensorMap weight_map, token_map;
    if (!encode(&weight_map, arguments.dtype, weight_view(arguments)) ||
        !encode(&token_map, arguments.dtype, token_view(arguments)))
        return cudaErrorInvalidValue;
    const int64_t units = static_cast<int64_t>((arguments.out_features + kTileRows - 1) / kTileRows) *
                          ((arguments.in_features + kColumns - 1) / kColumns);
    const int blocks = static_cast<int>(min(static_cast<int64_t>(min(multiprocessor_count(), kMaxBlocks)), (units + kMinUnits - 1) / kMinUnits));
    return launch(kernel, dim3(blocks), dim3(kThreads), stages * kStageBytes, stream, arguments, weight_map, token_map, stages);
}

template <typename T, bool kSilu>
cudaError_t launch_tokens(const LinearArguments& arguments, cudaStream_t stream) {
    if (arguments.tokens <= 32) return launch_block<T, 32, kSilu>(arguments, stream);
    if (arguments.tokens <= 64) return launch_block<T, 64, kSilu>(arguments, stream);
    return launch_block<T, 128, kSilu>(arguments, stream);
}

}  // namespace

bool block_linear_supports(int tokens, int in_features, int out_features, bool silu) {
    return compute_capability() == 90 && tokens <= kMaxBlockTokens && in_features <= kMaxBlockColumns &&
           in_features % 8 == 0 && (!silu || out_features % 16 == 0) && out_features <= kMaxTiles * kTileRows;
}

int64_t block_linear_scratch_bytes() { return sizeof(Scratch) + kMaxBlockTokens * kMaxBlockColumns * 2; }

cudaError_t block_linear(const LinearArguments& given, cudaStream_t stream) {
    LinearArguments arguments = given;
    if (given.norm_weight) {  // once, not in every block: many tokens' norms are work
        void* const h = static_cast<Scratch*>(given.scratch) + 1;
        const cudaError_t error = rms_norm(h, given.x, given.norm_weight, given.tokens, given.in_features, given.eps,
                                           given.dtype, stream);
        if (error != cudaSuccess) return error;
        arguments.x = h;
        arguments.norm_weight = nullptr;
    }
    if (arguments.dtype == DType::bf16)
        return arguments.silu ? launch_tokens<__nv_bfloat16, true>(arguments, stream)
                              : launch_tokens<__nv_bfloat16, false>(arguments, stream);
    return arguments.silu ? launch_tokens<__half, true>(arguments, stream) : launch_tokens<__half, false>(arguments, stream);
}

}  // namespace nanopd
