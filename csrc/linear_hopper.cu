// The matrix product of linear.cu on Hopper, where the tensor memory accelerator (TMA) does the copying.
//
// One warp of a thread block is the producer: with one instruction it has 8 rows x 512 columns of the weights brought to
// shared memory, and it runs up to kStages such pieces ahead of the eight warps that multiply. A piece announces itself
// by the bytes that arrive at an mbarrier (`full`); the multiplying warps give its room back at another (`empty`).
// The pieces of the first stages are asked for before wait_for_previous(), so memory streams across kernel boundaries.
#include "hopper.cuh"
#include "linear.cuh"

namespace nanopd {
namespace {

constexpr int kWarps = 8;  // that multiply
constexpr int kConsumers = 32 * kWarps;
constexpr int kThreads = kConsumers + 32;
constexpr int kTileRows = 16;     // rows of an mma's A operand: two boxes of 8
constexpr int kMaxTokens = 8;     // columns of its B operand
constexpr int kBoxRows = 8;
constexpr int kBoxColumns = 64;   // 128 bytes, the width of the swizzle; each warp multiplies one box's columns
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

template <typename T, bool kSilu>
__global__ void __launch_bounds__(kThreads) stream_kernel(const LinearArguments arguments,
                                                          const __grid_constant__ CUtensorMap weight_map,
                                                          const __grid_constant__ CUtensorMap token_map, int stages) {
    extern __shared__ __align__(1024) unsigned char shared_bytes[];
    const int tokens = arguments.tokens, in = arguments.in_features, stage_bytes = 2 * kBoxBytes + tokens * kRowBytes;
    Shared& shared = *reinterpret_cast<Shared*>(shared_bytes + stages * stage_bytes);
    T* const norm_weight = reinterpret_cast<T*>(&shared + 1);

    const int rows = kSilu ? arguments.out_features / 2 : arguments.out_features;  // of the output
    constexpr int kTileOutputs = kSilu ? kBoxRows : kTileRows;  // with silu: 8 rows of the gate and their 8 of up
    const int second_box = kSilu ? rows : kBoxRows;
    const int tiles = (rows + kTileOutputs - 1) / kTileOutputs;
    const int steps = (in + kStageColumns - 1) / kStageColumns;  // of a tile
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;

    if (threadIdx.x == 0) {
        for (int s = 0; s < stages; s++) {
            barrier_init(&shared.full[s], 1);
            barrier_init(&shared.empty[s], kWarps);
        }
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    }
    __syncthreads();

    if (warp == kWarps) {
        if (lane == 0) {
            const uint64_t once = read_once_policy(), often = read_often_policy();
            const int total = (tiles - static_cast<int>(blockIdx.x) + static_cast<int>(gridDim.x) - 1) / static_cast<int>(gridDim.x) * steps;
            auto load_weights = [&](int tile, int step, int s) {
                barrier_expect(&shared.full[s], stage_bytes);
                load_box(shared_bytes + s * stage_bytes, &weight_map, 0, tile * kTileOutputs, step * kWarps, 0, &shared.full[s], once);
                load_box(shared_bytes + s * stage_bytes + kBoxBytes, &weight_map, 0, tile * kTileOutputs + second_box, step * kWarps, 0, &shared.full[s], once);
            };
            auto load_tokens = [&](int step, int s) {
                load_box(shared_bytes + s * stage_bytes + 2 * kBoxBytes, &token_map, 0, 0, step * kWarps, 0, &shared.full[s], often);
            };
            int tile = blockIdx.x, step = 0;
            auto advance = [&] {
                if (++step == steps) step = 0, tile += gridDim.x;
            };
            for (int i = 0; i < stages && i < total; i++, advance()) load_weights(tile, step, i);
            let_next_start();
            wait_for_previous();
            for (int i = 0; i < stages && i < total; i++) load_tokens(i % steps, i);
            for (int i = stages; i < total; i++, advance()) {
                const int s = i % stages;
                barrier_wait(&shared.empty[s], (i / stages - 1) & 1);
                load_weights(tile, step, s);
                load_tokens(step, s);
            }
        }
        return;
    }

    if (arguments.norm_weight)
        for (int i = threadIdx.x; i < in / Pack<T>::size; i += kConsumers)
            reinterpret_cast<Pack<T>*>(norm_weight)[i] = static_cast<const Pack<T>*>(arguments.norm_weight)[i];
    let_next_start();
    wait_for_previous();
    const int group = lane / 4, token = min(group, tokens - 1);
    const float scale = arguments.norm_weight ? inverse_rms<T>(shared, arguments, token) : 0.0f;

    int stage = 0, phase = 0, parity = 0;
    for (int tile = blockIdx.x; tile < tiles; tile += gridDim.x, parity ^= 1) {
        float sums[4] = {};
        for (int step = 0; step < steps; step++) {
            barrier_wait(&shared.full[stage], phase);
            Fragment low[2], high[2], x[2];
            const uint8_t* const boxes = shared_bytes + stage * stage_bytes;
#pragma unroll
            for (int p = 0; p < 2; p++) {
                // A lane takes 16 of its box's columns, in two pieces of 8; the swizzle keeps the banks apart.
                const int piece = lane % 4 * 2 + p, at = warp * 1024 + group * 128 + ((piece ^ group) * 16);
                low[p] = *reinterpret_cast<const Fragment*>(boxes + at);
                high[p] = *reinterpret_cast<const Fragment*>(boxes + kBoxBytes + at);
                const int row = 2 * kWarps * kBoxRows + warp * tokens + token;
                x[p] = *reinterpret_cast<const Fragment*>(boxes + row * 128 + ((piece ^ row % 8) * 16));
            }
            __syncwarp();
            if (lane == 0) barrier_arrive(&shared.empty[stage]);
            if (++stage == stages) stage = 0, phase ^= 1;
#pragma unroll
            for (int p = 0; p < 2; p++) {
                if (arguments.norm_weight) {
                    const int column = step * kStageColumns + warp * kBoxColumns + (lane % 4 * 2 + p) * 8;
                    x[p] = normalise(x[p], *reinterpret_cast<const Pack<T>*>(norm_weight + min(column, in - 8)), scale);
                }
                multiply(sums, low[p], high[p], x[p], T{});
            }
        }
#pragma unroll
        for (int j = 0; j < 4; j++) shared.sums[parity][warp][j][lane] = sums[j];
        consumers_sync();
        // Add the warps' sums, always in the same order, and finish the tile.
        if (warp < (kSilu ? 2 : 4)) {
            const int row = tile * kTileOutputs + group + warp / 2 * 8, column = lane % 4 * 2 + warp % 2;
            if (row < rows && column < tokens) {
                float y[2] = {};
                for (int k = 0; k < kWarps; k++) {
                    y[0] += shared.sums[parity][k][warp][lane];
                    if (kSilu) y[1] += shared.sums[parity][k][warp + 2][lane];
                }
                finish<T, kSilu>(arguments, y[0], y[1], column, row, rows);
            }
        }
    }
}

// A matrix [rows, columns] in slices of 64 columns; a box is `box_rows` rows of eight slices.
View slices(const void* matrix, int rows, int columns, int box_rows) {
    const cuuint64_t height = rows, width = columns;
    return {matrix, {kBoxColumns, height, width / kBoxColumns, 1}, {width * 2, kBoxColumns * 2, height * width * 2},
            {kBoxColumns, static_cast<cuuint32_t>(box_rows), kWarps, 1}};
}

template <typename T, bool kSilu>
cudaError_t launch_stream(const LinearArguments& arguments, cudaStream_t stream) {
    const auto kernel = stream_kernel<T, kSilu>;
    static const int budget = (getenv("BUDGET") ? atoi(getenv("BUDGET")) : 113) * 1024;
    const int fixed = sizeof(Shared) + (arguments.norm_weight ? arguments.in_features * sizeof(T) : 0);
    const int stage_bytes = 2 * kBoxBytes + arguments.tokens * kRowBytes, stages = min(kMaxStages, (budget - fixed) / stage_bytes);
    const int bytes = fixed + stages * stage_bytes;
    const cudaError_t error =
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
    if (error != cudaSuccess) return error;
    CUtensorMap weight_map, token_map;
    const int in = arguments.in_features, tokens = arguments.tokens;
    if (!encode(&weight_map, arguments.dtype, slices(arguments.weight, arguments.out_features, in, kBoxRows)) ||
        !encode(&token_map, arguments.dtype, slices(arguments.x, tokens, in, tokens)))
        return cudaErrorInvalidValue;
    const int rows = kSilu ? arguments.out_features / 2 : arguments.out_features;
    const int tile = kSilu ? kBoxRows : kTileRows;
    const int blocks = min((rows + tile - 1) / tile, multiprocessor_count());
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
    return arguments.silu ? launch_stream<__half, true>(arguments, stream) : launch_stream<__half, false>(arguments, stream);
}

}  // namespace nanopd
