// y = x @ weight.T for the few tokens of a decode step, where the time is the time to read the weights once.
//
// A thread block owns tiles of 16 weight rows and its eight warps split the columns. A lane copies 16 bytes of a row
// at a time into its own slots of shared memory (cp.async), many pieces ahead, and it alone reads them back: the ring
// is a first-in first-out queue per lane, without barriers. Those 16 bytes are 8 consecutive columns, not the 2 + 2
// that an mma's fragment wants, but a sum over columns has no order: as long as the tokens' fragments are taken in the
// same way, the tensor cores never notice.
//
// Weights are constants, so the queue is filled before wait_for_previous(): with the next kernel's queue resting beside
// this one's on each multiprocessor, memory keeps streaming across the boundaries between kernels.
//
// On Hopper this instruction is the bottleneck (22 cycles for the 512 bytes of a warp's copy: 15 of the 19 bytes a cycle
// that a multiprocessor's share of the memory could deliver), and linear_hopper.cu does the same work with TMA.
#include "common.cuh"
#include "linear.cuh"

namespace nanopd {
namespace {

constexpr int kWarps = 8;
constexpr int kThreads = 32 * kWarps;
constexpr int kTileRows = 16;   // rows of an mma's A operand
constexpr int kTileTokens = 8;  // columns of its B operand
constexpr int kPiece = 32;  // columns of a row that four lanes copy at once, 16 bytes each

__device__ __forceinline__ uint64_t read_once_policy() {
    uint64_t policy;
    asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
    return policy;
}

// 16 bytes to shared memory, zeros where `valid` is false.
__device__ __forceinline__ void copy_weights(void* target, const void* source, bool valid, uint64_t policy) {
    asm volatile("cp.async.cg.shared.global.L2::cache_hint [%0], [%1], 16, %2, %3;" ::"r"(
                     static_cast<uint32_t>(__cvta_generic_to_shared(target))),
                 "l"(source), "r"(valid ? 16 : 0), "l"(policy));
}

__device__ __forceinline__ void copy_tokens(void* target, const void* source, bool valid) {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 16, %2;" ::"r"(
                     static_cast<uint32_t>(__cvta_generic_to_shared(target))),
                 "l"(source), "r"(valid ? 16 : 0));
}

__device__ __forceinline__ void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }

template <int kPending>
__device__ __forceinline__ void wait_copies() {
    asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// 1 / the root mean square of every token's row of x, which the whole block sums up together.
template <typename T>
__device__ void inverse_rms_of_rows(float* rows, float (*partial)[kWarps], const LinearArguments& arguments) {
    const int packs = arguments.in_features / Pack<T>::size;
    for (int token = 0; token < arguments.tokens; token++) {
        const Pack<T>* x = static_cast<const Pack<T>*>(arguments.x) + static_cast<int64_t>(token) * packs;
        float squares = 0.0f;
        for (int i = threadIdx.x; i < packs; i += kThreads) {
            const Pack<T> pack = x[i];
#pragma unroll
            for (T value : pack.values) squares += to_float(value) * to_float(value);
        }
        squares = warp_sum(squares);
        if (threadIdx.x % 32 == 0) partial[token][threadIdx.x / 32] = squares;
    }
    __syncthreads();
    if (threadIdx.x < arguments.tokens) {
        float squares = 0.0f;
        for (float value : partial[threadIdx.x]) squares += value;
        rows[threadIdx.x] = rsqrtf(squares / arguments.in_features + arguments.eps);
    }
    __syncthreads();
}

// The shared memory of a block. A stage of a warp holds kPiece columns: the row tiles' weights, then the tokens' x.
template <int kRowTiles, int kTokenTiles>
struct Layout {
    static constexpr int kStages = kRowTiles == 2 ? (kTokenTiles == 2 ? 4 : 5) : (kTokenTiles == 2 ? 6 : 8);
    static constexpr int kSums = kRowTiles * kTokenTiles * 4;  // a lane's accumulators
    Fragment weights[kWarps][kStages][kRowTiles][2][32];
    Fragment tokens[kWarps][kStages][kTokenTiles][32];
    float sums[2][kWarps][kSums][32];
    float squares[kTokenTiles * kTileTokens][kWarps];
    float inverse_rms[kTokenTiles * kTileTokens];
};

template <typename T, int kTokenTiles, bool kSilu>
__global__ void __launch_bounds__(kThreads, 2) few_tokens_kernel(LinearArguments arguments) {
    constexpr int kRowTiles = kSilu ? 2 : 1;  // with silu: a tile of the gate and its tile of the up projection
    using Shared = Layout<kRowTiles, kTokenTiles>;
    constexpr int kStages = Shared::kStages;
    extern __shared__ __align__(16) unsigned char shared_bytes[];
    Shared& shared = *reinterpret_cast<Shared*>(shared_bytes);
    T* const norm_weight = reinterpret_cast<T*>(shared_bytes + sizeof(Shared));

    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int lane_row = lane / 4, lane_column = lane % 4 * Pack<T>::size;
    const int in = arguments.in_features, rows = kSilu ? arguments.out_features / 2 : arguments.out_features;
    const int tiles = (rows + kTileRows - 1) / kTileRows;
    const int pieces = (in + kWarps * kPiece - 1) / (kWarps * kPiece);  // of a tile, for each warp
    const int first = blockIdx.x, blocks = gridDim.x, total = (tiles - first + blocks - 1) / blocks * pieces;
    const uint64_t policy = read_once_policy();

    // The queue: piece i of this warp is piece i % pieces of the block's tile i / pieces.
    auto load_weights = [&](int i) {
        const int tile = blockIdx.x + i / pieces * gridDim.x;
        const int column = (i % pieces * kWarps + warp) * kPiece + lane_column;
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const int row = min(tile * kTileRows + half * 8 + lane_row, rows - 1);
#pragma unroll
            for (int t = 0; t < kRowTiles; t++) {
                const T* source = static_cast<const T*>(arguments.weight) + int64_t(row + t * rows) * in + column;
                copy_weights(&shared.weights[warp][i % kStages][t][half][lane],
                             column < in ? source : arguments.weight, column < in, policy);
            }
        }
    };
    auto load_tokens = [&](int i) {
        const int column = (i % pieces * kWarps + warp) * kPiece + lane_column;
#pragma unroll
        for (int n = 0; n < kTokenTiles; n++) {
            const int token = n * kTileTokens + lane_row;
            const bool valid = token < arguments.tokens && column < in;
            const T* source = static_cast<const T*>(arguments.x) + static_cast<int64_t>(token) * in + column;
            copy_tokens(&shared.tokens[warp][i % kStages][n][lane], valid ? source : arguments.x, valid);
        }
    };

    for (int i = 0; i < kStages && i < total; i++) load_weights(i);
    if (arguments.norm_weight)
        for (int i = threadIdx.x; i < in / Pack<T>::size; i += kThreads)
            reinterpret_cast<Pack<T>*>(norm_weight)[i] = static_cast<const Pack<T>*>(arguments.norm_weight)[i];
    let_next_start();
    wait_for_previous();
    for (int i = 0; i < kStages; i++) {
        if (i < total) load_tokens(i);
        commit_copies();
    }
    float inverse_rms[kTokenTiles];
    if (arguments.norm_weight) {
        inverse_rms_of_rows<T>(shared.inverse_rms, shared.squares, arguments);
#pragma unroll
        for (int n = 0; n < kTokenTiles; n++)
            inverse_rms[n] = shared.inverse_rms[min(n * kTileTokens + lane_row, arguments.tokens - 1)];
    }

    float sums[kRowTiles][kTokenTiles][4] = {};
    for (int i = 0; i < total; i++) {
        wait_copies<kStages - 1>();
        Fragment weights[kRowTiles][2], tokens[kTokenTiles];
#pragma unroll
        for (int t = 0; t < kRowTiles; t++) {
            weights[t][0] = shared.weights[warp][i % kStages][t][0][lane];
            weights[t][1] = shared.weights[warp][i % kStages][t][1][lane];
        }
#pragma unroll
        for (int n = 0; n < kTokenTiles; n++) tokens[n] = shared.tokens[warp][i % kStages][n][lane];
        if (i + kStages < total) {
            load_weights(i + kStages);
            load_tokens(i + kStages);
        }
        commit_copies();
        if (arguments.norm_weight) {
            const int column = (i % pieces * kWarps + warp) * kPiece + lane_column;
            const Fragment weight = *reinterpret_cast<const Fragment*>(norm_weight + (column < in ? column : 0));
#pragma unroll
            for (int n = 0; n < kTokenTiles; n++) tokens[n] = normalise<T>(tokens[n], weight, inverse_rms[n]);
        }
#pragma unroll
        for (int t = 0; t < kRowTiles; t++)
#pragma unroll
            for (int n = 0; n < kTokenTiles; n++) {
                multiply(sums[t][n], weights[t][0], weights[t][1], tokens[n], T{});
            }
        if ((i + 1) % pieces != 0) continue;

        // A tile is complete: add the warps' sums, always in the same order, and finish it.
        const int parity = i / pieces % 2;
#pragma unroll
        for (int j = 0; j < Shared::kSums; j++) {
            float& sum = sums[j / 4 / kTokenTiles][j / 4 % kTokenTiles][j % 4];
            shared.sums[parity][warp][j][lane] = sum;
            sum = 0.0f;
        }
        __syncthreads();
        for (int j = warp; j < kTokenTiles * 4; j += kWarps) {
            const int row = (blockIdx.x + i / pieces * gridDim.x) * kTileRows + lane_row + j % 4 / 2 * 8;
            const int token = j / 4 * kTileTokens + lane % 4 * 2 + j % 2;
            if (row >= rows || token >= arguments.tokens) continue;
            const Addends addends = addends_of<T, kSilu>(arguments, token, row, rows);
            float y[2] = {};
#pragma unroll
            for (int t = 0; t < kRowTiles; t++)
                for (int w = 0; w < kWarps; w++) y[t] += shared.sums[parity][w][t * kTokenTiles * 4 + j][lane];
            finish<T, kSilu>(arguments, y[0], y[1], addends, token, row, rows);
        }
    }
}

template <typename T, int kTokenTiles, bool kSilu>
cudaError_t launch_few_tokens(const LinearArguments& arguments, cudaStream_t stream) {
    const auto kernel = few_tokens_kernel<T, kTokenTiles, kSilu>;
    const size_t norm_bytes = arguments.norm_weight ? arguments.in_features * sizeof(T) : 0;
    const size_t bytes = sizeof(Layout<kSilu ? 2 : 1, kTokenTiles>) + norm_bytes;
    const cudaError_t error =
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes));
    if (error != cudaSuccess) return error;
    const int rows = kSilu ? arguments.out_features / 2 : arguments.out_features;
    const int blocks = min((rows + kTileRows - 1) / kTileRows, multiprocessor_count());
    return launch(kernel, dim3(blocks), dim3(kThreads), bytes, stream, arguments);
}

template <typename T>
cudaError_t launch_linear(const LinearArguments& arguments, cudaStream_t stream) {
    const bool few = arguments.tokens <= kTileTokens;
    if (arguments.silu)
        return few ? launch_few_tokens<T, 1, true>(arguments, stream)
                   : launch_few_tokens<T, 2, true>(arguments, stream);
    return few ? launch_few_tokens<T, 1, false>(arguments, stream)
               : launch_few_tokens<T, 2, false>(arguments, stream);
}

}  // namespace

bool linear_supports(int tokens, int in_features, int out_features, bool silu, DType dtype) {
    const bool shape = tokens >= 1 && in_features % 8 == 0 && in_features <= 16384 && !(silu && out_features % 2);
    // Measured on an H200: from 9 tokens on the library's kernels are faster.
    return shape && dtype != DType::f32 && tokens <= (compute_capability() >= 90 ? 1 : 2) * kTileTokens;
}

cudaError_t linear(const LinearArguments& arguments, cudaStream_t stream) {
    if (!linear_supports(arguments.tokens, arguments.in_features, arguments.out_features, arguments.silu,
                         arguments.dtype))
        return cudaErrorInvalidValue;
    if (hopper_linear_supports(arguments.tokens, arguments.in_features)) return hopper_linear(arguments, stream);
    return arguments.dtype == DType::bf16 ? launch_linear<__nv_bfloat16>(arguments, stream)
                                          : launch_linear<__half>(arguments, stream);
}

}  // namespace nanopd
