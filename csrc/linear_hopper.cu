// The matrix product of linear.cu on Hopper, where the tensor memory accelerator (TMA) does the copying.
//
// With one instruction a thread has 8 rows x 512 columns of the weights brought to shared memory. Two such boxes are a
// stage, and a ring of stages runs ahead of the eight warps that multiply. A stage is full when all its bytes have arrived
// at an mbarrier (`full`); when each warp has taken its share and said so at another (`empty`), one of them, in turns,
// has it filled again. The first stages' weights are asked for before wait_for_previous(), so memory streams across the
// boundaries between kernels.
//
// A warp multiplies the same columns of every row, so it keeps its part of x, or of x's norm, in registers: it is read and
// normalised once. A longer x, such as an MLP's second product has, comes by TMA, in each stage what goes with its
// weights. Normalising that as often takes too long to go unnoticed, but only models wider than 4096 have to.
#include <utility>

#include "hopper.cuh"
#include "linear.cuh"

namespace nanopd {
namespace {

constexpr int kWarps = 8;
constexpr int kThreads = 32 * kWarps;
constexpr int kTileRows = 16;   // rows of an mma's A operand: two boxes of 8
constexpr int kMaxTokens = 8;   // columns of its B operand
constexpr int kBoxRows = 8;
constexpr int kBoxColumns = 64;  // 128 bytes, the width of the swizzle; each warp multiplies one box's columns
constexpr int kStageColumns = kWarps * kBoxColumns;
constexpr int kBoxBytes = kBoxRows * kStageColumns * 2;
constexpr int kRowBytes = kStageColumns * 2;
constexpr int kMaxStages = 12;
constexpr int kKeptSteps = 8;  // of x: as many as there are registers for

// ----------------------------------------------------------------------------------------------- the kernel

struct Shared {
    float sums[2][kWarps][4][32];
    float squares[kMaxTokens][kWarps];
    uint64_t full[kMaxStages], empty[kMaxStages];
};

// What every thread of a block knows. kSteps: of a tile, at most, where x is kept in registers; 0: it comes in stages.
template <typename T, bool kSilu, int kSteps>
struct Block {
    static constexpr int kTileOutputs = kSilu ? kBoxRows : kTileRows;  // with silu: 8 rows of the gate, their 8 of up
    const LinearArguments& arguments;
    const int stages;
    const int rows = kSilu ? arguments.out_features / 2 : arguments.out_features;  // of the output
    const int tiles = (rows + kTileOutputs - 1) / kTileOutputs;
    const int steps = (arguments.in_features + kStageColumns - 1) / kStageColumns;  // of a tile
    const int stage_bytes = bytes_of_stage(arguments.tokens);

    static __host__ __device__ __forceinline__ int bytes_of_stage(int tokens) {
        return 2 * kBoxBytes + (kSteps ? 0 : tokens * kRowBytes);
    }
    __device__ __forceinline__ uint8_t* stage(int index) const {
        extern __shared__ __align__(1024) uint8_t ring[];
        return ring + index * stage_bytes;
    }
    __device__ __forceinline__ Shared& shared() const { return *reinterpret_cast<Shared*>(stage(stages)); }
    __device__ __forceinline__ T* norm_weight() const { return reinterpret_cast<T*>(&shared() + 1); }
};

// What a block still has to ask for. Its tiles are blockIdx.x, blockIdx.x + gridDim.x, and so on, each `steps` stages.
template <typename T, bool kSilu, int kSteps>
struct Loader {
    const Block<T, kSilu, kSteps>& block;
    const CUtensorMap *weights, *tokens;
    int row = blockIdx.x * block.kTileOutputs, step = 0;
    int left = (block.tiles - blockIdx.x + gridDim.x - 1) / gridDim.x * block.steps;  // stages

    __device__ __forceinline__ void load_weights(int stage) const {
        const uint64_t policy = read_once_policy();
        const int high_row = row + (kSilu ? block.rows : kBoxRows);
        uint64_t* const full = &block.shared().full[stage];
        barrier_expect(full, block.stage_bytes);
        load_box(block.stage(stage), weights, 0, row, step * kWarps, full, policy);
        load_box(block.stage(stage) + kBoxBytes, weights, 0, high_row, step * kWarps, full, policy);
    }
    __device__ __forceinline__ void load_tokens(int stage, int of_step) const {
        if constexpr (kSteps == 0)
            load_box(block.stage(stage) + 2 * kBoxBytes, tokens, 0, 0, of_step * kWarps, &block.shared().full[stage],
                     read_often_policy());
    }
    __device__ __forceinline__ void advance() {
        left--;
        if (++step == block.steps) step = 0, row += gridDim.x * block.kTileOutputs;
    }
};

// What a lane multiplies of a step: of its warp's 64 columns it takes 16, in two pieces of 8.
struct Piece {
    Fragment halves[2];
};

// The column of x with which half a piece begins.
__device__ __forceinline__ int column_of(int step, int half) {
    return step * kStageColumns + threadIdx.x / 32 * kBoxColumns + (threadIdx.x % 4 * 2 + half) * 8;
}

// The lane's token: 8 groups of lanes share up to 8 tokens, and those left over repeat the last, for nothing.
__device__ __forceinline__ int token_of_lane(int tokens) {
    return min(static_cast<int>(threadIdx.x) % 32 / 4, tokens - 1);
}

// One of a stage's boxes; the swizzle that TMA has laid it down with keeps the lanes' banks apart.
__device__ __forceinline__ Piece read_box(const uint8_t* box, int rows, int row) {
    const int line = threadIdx.x / 32 * rows + row;
    Piece piece;
#pragma unroll
    for (int half = 0; half < 2; half++) {
        const int at = line * 128 + ((threadIdx.x % 4 * 2 + half) ^ line % 8) * 16;
        piece.halves[half] = *reinterpret_cast<const Fragment*>(box + at);
    }
    return piece;
}

// From global memory; zeros where the row has ended.
__device__ __forceinline__ Piece read_x(const LinearArguments& arguments, int step) {
    const int64_t row = static_cast<int64_t>(token_of_lane(arguments.tokens)) * arguments.in_features;
    Piece piece{};
#pragma unroll
    for (int half = 0; half < 2; half++) {
        const int column = column_of(step, half);
        const uint16_t* x = static_cast<const uint16_t*>(arguments.x) + row + column;
        if (column < arguments.in_features) piece.halves[half] = *reinterpret_cast<const Fragment*>(x);
    }
    return piece;
}

// 1 / the root mean square of the lane's token. A warp sums up the squares of one token, or of a part of its row where
// there are more warps than tokens.
template <typename T>
__device__ __forceinline__ float inverse_rms(Shared& shared, const LinearArguments& arguments) {
    const int warp = threadIdx.x / 32, tokens = arguments.tokens, packs = arguments.in_features / Pack<T>::size;
    const int parts = kWarps / tokens, part = warp / tokens;
    const Fragment* row = static_cast<const Fragment*>(arguments.x) + static_cast<int64_t>(warp % tokens) * packs;
    constexpr int kBatch = 4;  // packs asked for at once
    float squares = 0.0f;
    for (int first = part * 32 + threadIdx.x % 32; part < parts && first < packs; first += kBatch * parts * 32) {
        Fragment batch[kBatch] = {};
#pragma unroll
        for (int i = 0; i < kBatch; i++)
            if (first + i * parts * 32 < packs) batch[i] = row[first + i * parts * 32];
#pragma unroll
        for (const Fragment& pack : batch)
#pragma unroll
            for (T value : reinterpret_cast<const Pack<T>&>(pack).values) squares += to_float(value) * to_float(value);
    }
    squares = warp_sum(squares);
    if (threadIdx.x % 32 == 0 && part < parts) shared.squares[warp % tokens][part] = squares;
    __syncthreads();
    squares = 0.0f;
#pragma unroll
    for (int i = 0; i < kWarps; i++) squares += i < parts ? shared.squares[token_of_lane(tokens)][i] : 0.0f;
    return rsqrtf(squares / arguments.in_features + arguments.eps);
}

template <typename T, bool kSilu, int kSteps>
__device__ __forceinline__ void normalise(const Block<T, kSilu, kSteps>& block, Piece& piece, int step, float scale) {
#pragma unroll
    for (int half = 0; half < 2; half++) {
        const T* const weight = block.norm_weight() + min(column_of(step, half), block.arguments.in_features - 8);
        piece.halves[half] = normalise<T>(piece.halves[half], *reinterpret_cast<const Fragment*>(weight), scale);
    }
}

template <typename T, bool kSilu, int kSteps>
__device__ __forceinline__ void multiply_tiles(const Block<T, kSilu, kSteps>& block,
                                               Loader<T, kSilu, kSteps>& loader) {
    const LinearArguments& arguments = block.arguments;
    Shared& shared = block.shared();
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, steps = block.steps;

    // Calls body(step) for a tile's steps; where x is kept, each is known when compiling, as registers have no index.
    auto for_each_step = [&](auto body) {
        if constexpr (kSteps > 0) {
#pragma unroll
            for (int step = 0; step < kSteps; step++)
                if (step < steps) body(step);
        } else {
            for (int step = 0; step < steps; step++) body(step);
        }
    };
    Piece kept[kSteps ? kSteps : 1];
    if constexpr (kSteps > 0) for_each_step([&](int step) { kept[step] = read_x(arguments, step); });
    const float scale = arguments.norm_weight ? inverse_rms<T>(shared, arguments) : 0.0f;

    int stage = 0, phase = 0, parity = 0;
    for (int tile = blockIdx.x; tile < block.tiles; tile += gridDim.x, parity ^= 1) {
        // The lanes of the first warps finish an output each.
        const int row = tile * block.kTileOutputs + lane / 4 + warp / 2 * 8, token = lane % 4 * 2 + warp % 2;
        const bool finishes = warp < (kSilu ? 2 : 4) && row < block.rows && token < arguments.tokens;
        Addends addends;
        if (finishes) addends = addends_of<T, kSilu>(arguments, token, row, block.rows);

        float sums[2][4] = {};  // of the pieces' halves: two products need not wait for each other
        for_each_step([&](int step) {
            barrier_wait(&shared.full[stage], phase);
            const uint8_t* const boxes = block.stage(stage);
            const Piece low = read_box(boxes, kBoxRows, lane / 4);
            const Piece high = read_box(boxes + kBoxBytes, kBoxRows, lane / 4);
            Piece& x = kept[kSteps ? step : 0];
            if constexpr (kSteps == 0) x = read_box(boxes + 2 * kBoxBytes, arguments.tokens, token_of_lane(arguments.tokens));
            __syncwarp();
            if (lane == 0) barrier_arrive(&shared.empty[stage]);
            if (arguments.norm_weight && (kSteps == 0 || tile == blockIdx.x)) normalise(block, x, step, scale);
#pragma unroll
            for (int half = 0; half < 2; half++)
                multiply(sums[half], low.halves[half], high.halves[half], x.halves[half], T{});

            if (loader.left > 0) {
                if (warp == step % kWarps && lane == 0) {
                    barrier_wait(&shared.empty[stage], phase);
                    loader.load_weights(stage);
                    loader.load_tokens(stage, loader.step);
                }
                loader.advance();
            }
            if (++stage == block.stages) stage = 0, phase ^= 1;
        });
#pragma unroll
        for (int j = 0; j < 4; j++) shared.sums[parity][warp][j][lane] = sums[0][j] + sums[1][j];
        __syncthreads();
        if (!finishes) continue;
        float y = 0.0f, up = 0.0f;  // the warps' sums, always in the same order
        for (int k = 0; k < kWarps; k++) {
            y += shared.sums[parity][k][warp][lane];
            if constexpr (kSilu) up += shared.sums[parity][k][warp + 2][lane];
        }
        finish<T, kSilu>(arguments, y, up, addends, token, row, block.rows);
    }
}

template <typename T, bool kSilu, int kSteps>
__global__ void __launch_bounds__(kThreads, 2) stream_kernel(const LinearArguments arguments,
                                                             const __grid_constant__ CUtensorMap weight_map,
                                                             const __grid_constant__ CUtensorMap token_map,
                                                             int stages) {
#if __CUDA_ARCH__ >= 900
    const Block<T, kSilu, kSteps> block{arguments, stages};
    Loader<T, kSilu, kSteps> loader{block, &weight_map, &token_map};
    Shared& shared = block.shared();
    if (threadIdx.x == 0) {
        for (int s = 0; s < stages; s++) {
            barrier_init(&shared.full[s], 1);
            barrier_init(&shared.empty[s], kWarps);
        }
        publish_barriers();
    }
    const int first_loads = min(stages, loader.left);
    for (int s = 0; s < first_loads; s++, loader.advance())
        if (threadIdx.x == 0) loader.load_weights(s);
    if (arguments.norm_weight)
        for (int i = threadIdx.x; i < arguments.in_features / Pack<T>::size; i += kThreads)
            reinterpret_cast<Pack<T>*>(block.norm_weight())[i] = static_cast<const Pack<T>*>(arguments.norm_weight)[i];
    __syncthreads();
    let_next_start();
    wait_for_previous();
    if (threadIdx.x == 0)
        for (int s = 0; s < first_loads; s++) loader.load_tokens(s, s % block.steps);
    multiply_tiles(block, loader);
#endif
}

// A matrix [rows, columns] in slices of 64 columns; a box is `box_rows` rows of eight slices.
View slices(const void* matrix, int rows, int columns, int box_rows) {
    const cuuint64_t height = rows, width = columns;
    return {matrix, {kBoxColumns, height, width / kBoxColumns}, {width * 2, kBoxColumns * 2},
            {kBoxColumns, static_cast<cuuint32_t>(box_rows), kWarps}};
}

template <typename T, bool kSilu, int kSteps>
cudaError_t launch_stream(const LinearArguments& arguments, cudaStream_t stream) {
    using OfBlock = Block<T, kSilu, kSteps>;
    const auto kernel = stream_kernel<T, kSilu, kSteps>;
    const int in = arguments.in_features, out = arguments.out_features, tokens = arguments.tokens;
    const int fixed = sizeof(Shared) + (arguments.norm_weight ? in * sizeof(T) : 0);
    const int stage_bytes = OfBlock::bytes_of_stage(tokens);
    // In a layer, products with a residual and those without take turns.
    const int budget = arguments.residual ? kLargerBudget : kSmallerBudget;
    const int stages = min(kMaxStages, (budget - fixed) / stage_bytes);
    const int bytes = arguments.residual ? budget : fixed + stages * stage_bytes;
    // A multiprocessor divides its memory between L1 and shared memory anew only when it is empty, so both kinds of
    // kernels ask for the same division.
    const std::pair<cudaFuncAttribute, int> settings[]{
        {cudaFuncAttributeMaxDynamicSharedMemorySize, bytes},
        {cudaFuncAttributePreferredSharedMemoryCarveout, cudaSharedmemCarveoutMaxShared}};
    for (const auto& [attribute, value] : settings)
        if (const cudaError_t error = cudaFuncSetAttribute(kernel, attribute, value); error != cudaSuccess) return error;
    CUtensorMap weight_map, token_map;
    if (!encode(&weight_map, arguments.dtype, slices(arguments.weight, out, in, kBoxRows)) ||
        !encode(&token_map, arguments.dtype, slices(arguments.x, tokens, in, tokens)))
        return cudaErrorInvalidValue;
    const int tiles = ((kSilu ? out / 2 : out) + OfBlock::kTileOutputs - 1) / OfBlock::kTileOutputs;
    return launch(kernel, dim3(min(tiles, multiprocessor_count())), dim3(kThreads), bytes, stream, arguments,
                  weight_map, token_map, stages);
}

template <typename T>
cudaError_t launch_kind(const LinearArguments& arguments, cudaStream_t stream) {
    const bool keeps = arguments.in_features <= kKeptSteps * kStageColumns;
    if (arguments.silu)
        return keeps ? launch_stream<T, true, kKeptSteps>(arguments, stream) : launch_stream<T, true, 0>(arguments, stream);
    return keeps ? launch_stream<T, false, kKeptSteps>(arguments, stream) : launch_stream<T, false, 0>(arguments, stream);
}

}  // namespace

bool hopper_linear_supports(int tokens, int in_features) {
    return compute_capability() == 90 && tokens <= kMaxTokens && in_features % kBoxColumns == 0;
}

cudaError_t hopper_linear(const LinearArguments& arguments, cudaStream_t stream) {
    return arguments.dtype == DType::bf16 ? launch_kind<__nv_bfloat16>(arguments, stream)
                                          : launch_kind<__half>(arguments, stream);
}

}  // namespace nanopd
