// Every kernel of nanoPD, as plain functions over pointers: no torch in here or in any .cu file.
//
// Pointers are device pointers unless said otherwise, tensors are contiguous and row-major unless a stride is given,
// and strides count elements. Nothing here allocates or synchronises, so all of it may be captured in a CUDA graph.
// `bindings.cpp` checks shapes, types and devices before it calls; these functions return what CUDA says of the
// launch, or cudaErrorInvalidValue for a combination that has no kernel.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace nanopd {

enum class DType : int { f32 = 0, f16 = 1, bf16 = 2 };

// One layer's keys and values: [num_blocks, block_size, kv_heads, head_dim] each, contiguous.
struct PagedCache {
    void* key;
    void* value;
    int64_t num_blocks;
    int block_size;
    int kv_heads;
    int head_dim;
    DType dtype;
};

// R rows of new tokens laid end to end, T in all. Query and output are [T, heads, head_dim]; a token of the query is
// `query_stride` elements after the one before (it may be a part of the fused QKV output), the output is contiguous.
struct Rows {
    const int* block_tables;  // [R, table_width], padded with any valid block
    int table_width;
    const int* query_starts;  // [R + 1], where each row's new tokens begin; null for decodes: row r is token r
    const int* context_lens;  // [R], the new tokens included; 0 marks a row of padding, whose output becomes 0
    int num_rows;
    int heads;
    int64_t query_stride;
    float scale;
};

// ----------------------------------------------------------------------------------------------- layer.cu

// out[r] = weight * normed(x[r]), the root mean square taken in float32 and rounded to the dtype before the weight,
// as Hugging Face does. x, out [rows, size].
cudaError_t rms_norm(void* out, const void* x, const void* weight, int rows, int size, float eps, DType dtype,
                     cudaStream_t stream);

// out[r, i] = silu(gate_up[r, i]) * gate_up[r, size + i]. gate_up [rows, 2 * size], out [rows, size].
cudaError_t silu_and_mul(void* out, const void* gate_up, int rows, int size, DType dtype, cudaStream_t stream);

// For each of T new tokens of qkv [T, (heads + 2 * kv_heads) * head_dim]: normalise its queries and keys per head
// where weights are given (null: no norm), turn them by cos and sin [T, head_dim], write the queries back in place,
// and store keys and values in the cache at slot_mapping[t] (block * block_size + offset; -1: nowhere).
cudaError_t rope_and_store(void* qkv, const void* cos, const void* sin, const void* q_weight, const void* k_weight,
                           float eps, const PagedCache& cache, const int64_t* slot_mapping, int num_tokens, int heads,
                           cudaStream_t stream);

// ----------------------------------------------------------------------------------------------- embed.cu

// For each of num_tokens tokens: out = weight[id] (weight [vocab, hidden_size]), and cos, sin = the rows of the tables
// [max_position, head_dim] at its position. An id below zero stands for last_drawn[-1 - id], a token that the step
// before drew and the host does not know yet.
struct EmbedArguments {
    void* out;
    void* cos;
    void* sin;
    const int64_t* token_ids;
    const int64_t* positions;
    const int64_t* last_drawn;
    const void* weight;
    const void* cos_table;
    const void* sin_table;
    int num_tokens;
    int hidden_size;
    int head_dim;
};
cudaError_t embed(const EmbedArguments& arguments, DType dtype, cudaStream_t stream);

// --------------------------------------------------------------------------------------------- sampling.cu

// For each row of logits [rows, vocab], in the dtype given: the likeliest token (the first of equals), its
// log-probability in float32, and whether the row holds a NaN or +inf or is all -inf.
cudaError_t greedy_sample(int64_t* token_ids, float* logprobs, bool* broken, const void* logits, int rows, int vocab,
                          DType dtype, cudaStream_t stream);

// ------------------------------------------------------------------------------------------------ cache.cu

// Copy n blocks of `block_bytes` (an even number) in each of `planes` planes, source_ids[i] to target_ids[i].
// Plane p of the source begins p * source_plane_bytes after `source`, likewise the target's; a null id list means
// 0..n-1. Source and target may lie on different GPUs that can reach each other. One launch, of at most
// `max_thread_blocks` thread blocks (0: as many as fill the GPU), for copies beside which something else shall run.
cudaError_t move_blocks(void* target, const int64_t* target_ids, int64_t target_plane_bytes, const void* source,
                        const int64_t* source_ids, int64_t source_plane_bytes, int planes, int num_blocks,
                        int64_t block_bytes, int max_thread_blocks, cudaStream_t stream);

// --------------------------------------------------------------------------------------- naive_attention.cu

// The first version, for chapter 03 and as a baseline: one thread block for each new token and head, no split, no
// tensor cores. Any rows.
cudaError_t naive_attention(void* out, const void* query, const PagedCache& cache, const Rows& rows, int num_tokens,
                            cudaStream_t stream);

// -------------------------------------------------------------------------------------- decode_attention.cu

// Splits the rows' cached tokens evenly over the GPU. Runs once a step; all layers use the plan. Its layout is
// decode_attention.cu's own affair. Works from context_lens on the device, so that a graph replays with new lengths.
int64_t decode_plan_bytes(int num_rows);
cudaError_t plan_decode(void* plan, const int* context_lens, int num_rows, int block_size, int heads, int kv_heads,
                        int head_dim, DType dtype, cudaStream_t stream);

// One new token a row (query_starts is ignored). Partial results live in `scratch` between the split and the merge.
// Reads the plan, the block tables and all but the rows' newest keys and values before it waits for the kernel launched
// before it. So after the kernels that write these must come one that waits before it lets the next start, or the last
// of them must let none start early.
// The plan counts arrivals at the merge, and is as it was after each call. No virtual head (a KV head and up to 16 of
// its queries, 8 above a head size of 128 or in float32) may go without a thread block: cudaErrorInvalidValue.
int64_t decode_scratch_bytes(int num_rows, int heads, int head_dim);
cudaError_t decode_attention(void* out, const void* query, const PagedCache& cache, const Rows& rows, void* plan,
                             void* scratch, cudaStream_t stream);

// ------------------------------------------------------------------------------------- prefill_attention.cu

// Causal attention of each row's new tokens over all that the row has cached, themselves included. Any rows.
cudaError_t prefill_attention(void* out, const void* query, const PagedCache& cache, const Rows& rows,
                              int max_query_len, cudaStream_t stream);

// ------------------------------------------------------------------------------------------------ linear.cu

// A matrix product for few tokens, bound by the time to read the weights, with its neighbours fused:
//   h   = norm_weight ? rms_norm(x, norm_weight, eps) : x                 x [tokens, in], weight [out_features, in]
//   y   = h @ weight.T + bias                                             [tokens, out_features]
//   out = silu ? silu(y[:, :half]) * y[:, half:] : y                      half = out_features / 2
//   out = residual ? out + residual : out                                 residual may be `out`
// fp32 accumulation, rounded once to the dtype at the end (h is rounded to the dtype as rms_norm rounds).
// `linear_supports` says whether there is a kernel for it on the current device that beats the library's.
struct LinearArguments {
    void* out;
    const void* x;
    const void* weight;
    const void* bias;         // or null
    const void* norm_weight;  // or null
    const void* residual;     // or null
    float eps;
    int tokens;
    int in_features;
    int out_features;
    bool silu;
    DType dtype;
};
bool linear_supports(int tokens, int in_features, int out_features, bool silu, DType dtype);
cudaError_t linear(const LinearArguments& arguments, cudaStream_t stream);

}  // namespace nanopd
