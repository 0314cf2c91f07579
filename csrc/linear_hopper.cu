// The matrix product of linear.cu on Hopper, where the tensor memory accelerator (TMA) does the copying.
//
// One warp of a thread block is the producer: with one instruction it has 8 rows x 512 columns of the weights brought
// to shared memory. Two such boxes and x for their columns are a stage, and it runs some stages ahead of the eight warps
// that multiply. A stage is full when all its bytes have arrived at an mbarrier (`full`), and the multiplying warps give
// its room back at another (`empty`). The first stages' weights are asked for before wait_for_previous(), so memory
// streams across the boundaries between kernels.
#include "hopper.cuh"
#include "linear.cuh"

namespace nanopd {
namespace {

constexpr int kWarps = 8;  // that multiply
constexpr int kConsumers = 32 * kWarps;
constexpr int kThreads = kConsumers + 32;
constexpr int kTileRows = 16;   // rows of an mma's A operand: two boxes of 8
constexpr int kMaxTokens = 8;   // columns of its B operand
constexpr int kBoxRows = 8;
constexpr int kBoxColumns = 64;  // 128 bytes, the width of the swizzle; each warp multiplies one box's columns
constexpr int kStageColumns = kWarps * kBoxColumns;
constexpr int kBoxBytes = kBoxRows * kStageColumns * 2;
constexpr int kRowBytes = kStageColumns * 2;
constexpr int kMaxStages = 12;

__device__ __forceinline__ void consumers_sync() { asm volatile("bar.sync 1, %0;" ::"n"(kConsumers) : "memory"); }

// ----------------------------------------------------------------------------------------------- the kernel

struct Shared {
    float sums[2][kWarps][4][32];
    float squares[kMaxTokens][kWarps];
    uint64_t full[kMaxStages], empty[kMaxStages];
};

// 1 / the root mean square of a token's row of x; the consumers sum up every row together.
template <typename T>
__device__ __forceinline__ float inverse_rms(Shared& shared, const LinearArguments& arguments, int token_of_lane) {
    const int warp = threadIdx.x / 32, packs = arguments.in_features / Pack<T>::size;
    for (int token = 0; token < arguments.tokens; token++) {
        const Pack<T>* x = static_cast<const Pack<T>*>(arguments.x) + static_cast<int64_t>(token) * packs;
        float squares = 0.0f;
        for (int i = threadIdx.x; i < packs; i += kConsumers) {
            const Pack<T> pack = x[i];
#pragma unroll
            for (T value : pack.values) squares += to_float(value) * to_float(value);
        }
        squares = warp_sum(squares);
        if (threadIdx.x % 32 == 0) shared.squares[token][warp] = squares;
    }
    consumers_sync();
    float squares = 0.0f;
    for (float value : shared.squares[token_of_lane]) squares += value;
    return rsqrtf(squares / arguments.in_features + arguments.eps);
}

// What every thread of a block knows.
template <typename T, bool kSilu>
struct Block {
    static constexpr int kTileOutputs = kSilu ? kBoxRows : kTileRows;  // with silu: 8 rows of the gate, their 8 of up
    const LinearArguments& arguments;
    const int stages;
    const int rows = kSilu ? arguments.out_features / 2 : arguments.out_features;  // of the output
    const int tiles = (rows + kTileOutputs - 1) / kTileOutputs;
    const int steps = (arguments.in_features + kStageColumns - 1) / kStageColumns;  // of a tile
    const int stage_bytes = 2 * kBoxBytes + arguments.tokens * kRowBytes;

    __device__ __forceinline__ uint8_t* stage(int index) const {
        extern __shared__ __align__(1024) uint8_t ring[];
        return ring + index * stage_bytes;
    }
    __device__ __forceinline__ Shared& shared() const { return *reinterpret_cast<Shared*>(stage(stages)); }
    __device__ __forceinline__ T* norm_weight() const { return reinterpret_cast<T*>(&shared() + 1); }
};

// The producer, one thread: the block's tiles are blockIdx.x, blockIdx.x + gridDim.x, and so on, each `steps` stages.
template <typename T, bool kSilu>
__device__ __forceinline__ void produce(const Block<T, kSilu>& block, const CUtensorMap* weights,
                                        const CUtensorMap* tokens) {
    Shared& shared = block.shared();
    const uint64_t once = read_once_policy(), often = read_often_policy();
    const int first = blockIdx.x, blocks = gridDim.x, stages = block.stages, steps = block.steps;
    const int total = (block.tiles - first + blocks - 1) / blocks * steps;
    int row = first * block.kTileOutputs, step = 0;
    auto load_weights = [&](int s) {
        const int high_row = row + (kSilu ? block.rows : kBoxRows);
        barrier_expect(&shared.full[s], block.stage_bytes);
        load_box(block.stage(s), weights, 0, row, step * kWarps, &shared.full[s], once);
        load_box(block.stage(s) + kBoxBytes, weights, 0, high_row, step * kWarps, &shared.full[s], once);
    };
    auto load_tokens = [&](int s, int of_step) {
        load_box(block.stage(s) + 2 * kBoxBytes, tokens, 0, 0, of_step * kWarps, &shared.full[s], often);
    };
    auto advance = [&] {
        if (++step == steps) step = 0, row += blocks * block.kTileOutputs;
    };

    for (int i = 0; i < stages && i < total; i++, advance()) load_weights(i);
    let_next_start();
    wait_for_previous();
    for (int i = 0; i < stages && i < total; i++) load_tokens(i, i % steps);
    for (int i = stages; i < total; i++, advance()) {
        barrier_wait(&shared.empty[i % stages], (i / stages - 1) & 1);
        load_weights(i % stages);
        load_tokens(i % stages, step);
    }
}

// What a lane multiplies of a stage: of its warp's 64 columns it takes 16, in two pieces of 8. The swizzle that TMA has
// laid them down with keeps the lanes' banks apart.
struct Operands {
    Fragment low[2], high[2], x[2];
};

__device__ __forceinline__ Operands read_stage(const uint8_t* stage, int tokens) {
    const int warp = threadIdx.x / 32, group = threadIdx.x % 32 / 4;
    const int token_row = 2 * kWarps * kBoxRows + warp * tokens + min(group, tokens - 1);
    Operands operands;
#pragma unroll
    for (int p = 0; p < 2; p++) {
        const int piece = threadIdx.x % 4 * 2 + p, at = (warp * kBoxRows + group) * 128 + (piece ^ group) * 16;
        operands.low[p] = *reinterpret_cast<const Fragment*>(stage + at);
        operands.high[p] = *reinterpret_cast<const Fragment*>(stage + kBoxBytes + at);
        operands.x[p] = *reinterpret_cast<const Fragment*>(stage + token_row * 128 + (piece ^ token_row % 8) * 16);
    }
    return operands;
}

// Adds the warps' sums, always in the same order, and finishes the tile.
template <typename T, bool kSilu>
__device__ __forceinline__ void finish_tile(const Block<T, kSilu>& block, const float (&sums)[kWarps][4][32],
                                            int tile) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int row = tile * block.kTileOutputs + lane / 4 + warp / 2 * 8, token = lane % 4 * 2 + warp % 2;
    if (warp >= (kSilu ? 2 : 4) || row >= block.rows || token >= block.arguments.tokens) return;
    float y = 0.0f, up = 0.0f;
    for (int k = 0; k < kWarps; k++) {
        y += sums[k][warp][lane];
        if constexpr (kSilu) up += sums[k][warp + 2][lane];
    }
    finish<T, kSilu>(block.arguments, y, up, token, row, block.rows);
}

// The eight warps that multiply; `scale` is 1 / the root mean square of the lane's token, where there is a norm.
template <typename T, bool kSilu>
__device__ __forceinline__ void consume(const Block<T, kSilu>& block, float scale) {
    const LinearArguments& arguments = block.arguments;
    Shared& shared = block.shared();
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    int stage = 0, phase = 0, parity = 0;
    for (int tile = blockIdx.x; tile < block.tiles; tile += gridDim.x, parity ^= 1) {
        float sums[4] = {};
        for (int step = 0; step < block.steps; step++) {
            barrier_wait(&shared.full[stage], phase);
            Operands operands = read_stage(block.stage(stage), arguments.tokens);
            __syncwarp();
            if (lane == 0) barrier_arrive(&shared.empty[stage]);
            if (++stage == block.stages) stage = 0, phase ^= 1;
#pragma unroll
            for (int p = 0; p < 2; p++) {
                if (arguments.norm_weight) {
                    const int column = step * kStageColumns + warp * kBoxColumns + (lane % 4 * 2 + p) * 8;
                    const T* const weight = block.norm_weight() + min(column, arguments.in_features - 8);
                    operands.x[p] = normalise(operands.x[p], *reinterpret_cast<const Pack<T>*>(weight), scale);
                }
                multiply(sums, operands.low[p], operands.high[p], operands.x[p], T{});
            }
        }
#pragma unroll
        for (int j = 0; j < 4; j++) shared.sums[parity][warp][j][lane] = sums[j];
        consumers_sync();
        finish_tile(block, shared.sums[parity], tile);
    }
}

template <typename T, bool kSilu>
__global__ void __launch_bounds__(kThreads) stream_kernel(const LinearArguments arguments,
                                                          const __grid_constant__ CUtensorMap weight_map,
                                                          const __grid_constant__ CUtensorMap token_map, int stages) {
#if __CUDA_ARCH__ >= 900
    const Block<T, kSilu> block{arguments, stages};
    Shared& shared = block.shared();
    if (threadIdx.x == 0) {
        for (int s = 0; s < stages; s++) {
            barrier_init(&shared.full[s], 1);
            barrier_init(&shared.empty[s], kWarps);
        }
        publish_barriers();
    }
    __syncthreads();
    if (threadIdx.x >= kConsumers) {
        if (threadIdx.x == kConsumers) produce(block, &weight_map, &token_map);
        return;
    }
    if (arguments.norm_weight)
        for (int i = threadIdx.x; i < arguments.in_features / Pack<T>::size; i += kConsumers)
            reinterpret_cast<Pack<T>*>(block.norm_weight())[i] = static_cast<const Pack<T>*>(arguments.norm_weight)[i];
    let_next_start();
    wait_for_previous();
    const int token = min(static_cast<int>(threadIdx.x) % 32 / 4, arguments.tokens - 1);
    consume(block, arguments.norm_weight ? inverse_rms<T>(shared, arguments, token) : 0.0f);
#endif
}

// A matrix [rows, columns] in slices of 64 columns; a box is `box_rows` rows of eight slices.
View slices(const void* matrix, int rows, int columns, int box_rows) {
    const cuuint64_t height = rows, width = columns;
    return {matrix, {kBoxColumns, height, width / kBoxColumns}, {width * 2, kBoxColumns * 2},
            {kBoxColumns, static_cast<cuuint32_t>(box_rows), kWarps}};
}

template <typename T, bool kSilu>
cudaError_t launch_stream(const LinearArguments& arguments, cudaStream_t stream) {
    const auto kernel = stream_kernel<T, kSilu>;
    const int in = arguments.in_features, out = arguments.out_features, tokens = arguments.tokens;
    const int fixed = sizeof(Shared) + (arguments.norm_weight ? in * sizeof(T) : 0);
    const int stage_bytes = 2 * kBoxBytes + tokens * kRowBytes;
    const int stages = min(kMaxStages, (kSharedBudget - fixed) / stage_bytes), bytes = fixed + stages * stage_bytes;
    const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
    if (error != cudaSuccess) return error;
    CUtensorMap weight_map, token_map;
    if (!encode(&weight_map, arguments.dtype, slices(arguments.weight, out, in, kBoxRows)) ||
        !encode(&token_map, arguments.dtype, slices(arguments.x, tokens, in, tokens)))
        return cudaErrorInvalidValue;
    constexpr int kTileOutputs = Block<T, kSilu>::kTileOutputs;
    const int blocks = min(((kSilu ? out / 2 : out) + kTileOutputs - 1) / kTileOutputs, multiprocessor_count());
    return launch(kernel, dim3(blocks), dim3(kThreads), bytes, stream, arguments, weight_map, token_map, stages);
}

}  // namespace

bool hopper_linear_supports(int tokens, int in_features) {
    return compute_capability() == 90 && tokens <= kMaxTokens && in_features % kBoxColumns == 0;
}

cudaError_t hopper_linear(const LinearArguments& arguments, cudaStream_t stream) {
    if (arguments.dtype == DType::bf16)
        return arguments.silu ? launch_stream<__nv_bfloat16, true>(arguments, stream)
                              : launch_stream<__nv_bfloat16, false>(arguments, stream);
    return arguments.silu ? launch_stream<__half, true>(arguments, stream)
                          : launch_stream<__half, false>(arguments, stream);
}

}  // namespace nanopd
