// Paged attention of one new token a row: split-KV, planned on the device.
//
// The work of a step is cut into tiles of 16 tokens, all rows laid end to end, and dealt out in equal shares, so that
// one long row keeps the whole GPU as busy as many short ones:
//
//     rows    | row 0          | row 1 | row 2                            | row 3 ...
//     shares  [   share 0   ][   share 1   ][   share 2   ][   share 3   ][ ...
//     pieces   a            b  c      d     e              f              g
//
// A thread block takes one share for one KV head. Its warps take turns at the tiles and run independently of each
// other, each with a ring of tiles in shared memory that asynchronous copies fill ahead:
//
//     HBM -> | tile | tile | tile | -> warp 0      tiles 0, 4, 8, ... of the piece
//     HBM -> | tile | tile | tile | -> warp 1      tiles 1, 5, 9, ...
//
// At the end of a row's piece the warps put their results together. A piece that is all of its row (c) is done; the
// others leave a partial result, and the block that arrives last at a row puts these together, in the same way.
//
// All query heads of a group share the KV head's tile: it is read once. Keys are the rows of the matrix products and
// queries the columns, because tensor cores want 16 rows but are content with 8 columns:
//
//     scores [16 keys, 8 queries]   = K [16 keys, dim] x Q^T [dim, 8 queries]
//     output [dim, 8 queries]      += V^T [dim, 16 keys] x weights [16 keys, 8 queries]
//
// The plan, the block tables and all keys and values but a row's newest are read before wait_for_previous(), while earlier
// kernels may still run. A kernel that lets the next start before its own wait says nothing about those before it; one
// that waits first says that they are complete. The first of that kind, going back from here, is the attention of the
// layer before, or embed: by then all that is read early has been written. Of those in between, rope_and_store alone
// writes to the cache, and only new tokens' keys and values.
#include <algorithm>
#include <cstring>
#include <type_traits>

#include "common.cuh"

namespace nanopd {
namespace {

constexpr int warp_size = 32;
constexpr int tile_tokens = 16;
constexpr int half_tokens = 8;     // half a tile never straddles two blocks, whose size is a multiple of it
constexpr int column_queries = 8;  // the columns of one matrix product
constexpr int max_columns = 2;     // larger groups are split among warps
constexpr float log2_e = 1.4426950408889634f;

// ------------------------------------------------------------------------------------------------------ the plan

// Where a share begins.
struct Share {
    int row, context;
    int tile;  // of the row
    int unused;
};

struct PlanHeader {
    int tiles;        // of all rows
    int share_tiles;  // of a share
    int unused[2];
};

// arrivals: how many blocks are done with a row that is split, counted for each virtual head in the place of the row's
// first share (a share has one row at most that goes on beyond it).
struct Plan {
    PlanHeader* header;
    Share* shares;
    unsigned* arrivals;
};

constexpr int max_warps = 4;
constexpr int max_blocks_each = 2;  // thread blocks on a multiprocessor: while one finishes a row, the other reads

// The grid, fixed by the shapes alone. A virtual head is a KV head with as many of its queries as a warp can take.
struct Geometry {
    int blocks, warps, virtual_heads;
};

int max_blocks() { return multiprocessor_count() * max_blocks_each; }

Plan plan_at(void* memory) {
    Plan plan;
    plan.header = static_cast<PlanHeader*>(memory);
    plan.shares = reinterpret_cast<Share*>(plan.header + 1);
    plan.arrivals = reinterpret_cast<unsigned*>(plan.shares + max_blocks());
    return plan;
}

__host__ __device__ __forceinline__ int ceil_div(int a, int b) { return (a + b - 1) / b; }

// Also a row without context has a tile, so that somebody writes its zeros.
__device__ __forceinline__ int tiles_of(int context) { return max(1, ceil_div(context, tile_tokens)); }

constexpr int plan_threads = 1024;

// One block. Thread t has the rows [t * rows_each, (t + 1) * rows_each).
__global__ void __launch_bounds__(plan_threads)
split_rows(Plan plan, const int* context_lens, int num_rows, Geometry geometry) {
    __shared__ int warp_sums[plan_threads / warp_size];
    wait_for_previous();
    const int thread = threadIdx.x, lane = thread % warp_size, warp = thread / warp_size;
    const int rows_each = ceil_div(num_rows, plan_threads);
    const int first_row = min(thread * rows_each, num_rows), end_row = min(first_row + rows_each, num_rows);

    int own = 0;
    for (int row = first_row; row < end_row; row++) own += tiles_of(context_lens[row]);
    int sum = own;  // becomes the sum over this thread and all before it
    for (int offset = 1; offset < warp_size; offset *= 2) {
        const int other = __shfl_up_sync(0xffffffffu, sum, offset);
        if (lane >= offset) sum += other;
    }
    if (lane == warp_size - 1) warp_sums[warp] = sum;
    __syncthreads();
    int tiles = 0;
    for (int i = 0; i < plan_threads / warp_size; i++) {
        if (i < warp) sum += warp_sums[i];
        tiles += warp_sums[i];
    }

    // Where there are more blocks than work: pieces of a row are put together one after the other, tiles of a piece
    // are read one after the other, and as many of the ones as of the others takes about the least time.
    const int least_tiles = sqrtf(float(tiles) / num_rows);
    const int share_tiles = max(ceil_div(tiles, geometry.blocks / geometry.virtual_heads), least_tiles);
    if (thread == 0) *plan.header = {tiles, share_tiles};
    int row_tile = sum - own;  // of all tiles, the row's first
    for (int row = first_row; row < end_row; row++) {
        const int context = context_lens[row], end_tile = row_tile + tiles_of(context);
        for (int share = ceil_div(row_tile, share_tiles); share * share_tiles < end_tile; share++) {
            plan.shares[share] = {row, context, share * share_tiles - row_tile};
        }
        row_tile = end_tile;
    }
    for (int i = thread; i < geometry.blocks; i += plan_threads) plan.arrivals[i] = 0;
}

// ---------------------------------------------------------------------------------------------------- PTX, wrapped

__device__ __forceinline__ uint32_t shared_address(const void* pointer) {
    return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// The cache is read once a step: it should not push from L2 what will be read again.
__device__ __forceinline__ uint64_t read_once_policy() {
    uint64_t policy;
    asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
    return policy;
}

// Copies 16 bytes to shared memory, or writes 16 zero bytes there.
__device__ __forceinline__ void copy_or_zero(void* target, const void* source, bool copy, uint64_t policy) {
    asm volatile("cp.async.cg.shared.global.L2::cache_hint.L2::128B [%0], [%1], 16, %2, %3;" ::"r"(
                     shared_address(target)), "l"(source), "r"(copy ? 16 : 0), "l"(policy) : "memory");
}

__device__ __forceinline__ void commit_copies() { asm volatile("cp.async.commit_group;"); }

template <int newest>
__device__ __forceinline__ void wait_for_copies_but() {
    asm volatile("cp.async.wait_group %0;" ::"n"(newest) : "memory");
}

// Four matrices of 8 x 8 from rows of 16 bytes, to whose i-th lane i points; transposed or not.
template <bool transposed>
__device__ __forceinline__ void load_matrices(uint32_t (&m)[4], const void* row) {
    if constexpr (transposed) {
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                     : "=r"(m[0]), "=r"(m[1]), "=r"(m[2]), "=r"(m[3]) : "r"(shared_address(row)) : "memory");
    } else {
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                     : "=r"(m[0]), "=r"(m[1]), "=r"(m[2]), "=r"(m[3]) : "r"(shared_address(row)) : "memory");
    }
}

__device__ __forceinline__ uint32_t transpose(uint32_t matrix) {
    uint32_t result;
    asm("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(result) : "r"(matrix));
    return result;
}

// c [16, 8] += a [16, 16] x b [16, 8]
template <typename T>
__device__ __forceinline__ void multiply_add(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    if constexpr (std::is_same_v<T, __half>) {
        asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
            "{%0, %1, %2, %3};" : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
    } else {
        asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
            "{%0, %1, %2, %3};" : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
    }
}

template <typename T>
__device__ __forceinline__ uint32_t pack(float low, float high) {
    const T pair[2] = {from_float<T>(low), from_float<T>(high)};
    uint32_t bits;
    memcpy(&bits, pair, sizeof(bits));
    return bits;
}

__device__ __forceinline__ float power_of_two(float x) {
    float result;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
    return result;
}

// ------------------------------------------------------------------------------------------- the matrix products
//
// Both kinds keep results as the tensor cores do. With `line = lane / 4` and `pair = 2 * (lane % 4)`, a lane holds of a
// [16, 8] result c[0] = (line, pair), c[1] = (line, pair + 1), c[2] = (line + 8, pair), c[3] = (line + 8, pair + 1).

template <typename T, int max_dim>
struct Tile {
    static constexpr int row_size = max_dim + 16 / sizeof(T);  // 16 bytes more, and 8 rows lie in different banks
    T key[tile_tokens][row_size];
    T value[tile_tokens][row_size];
};

// The queries of a warp. Beyond `num_queries` and `dim` they are zeros.
template <typename T, int max_dim, int columns>
struct Queries {
    uint32_t fragments[columns][max_dim / 16][2];

    __device__ void load(const T* query, int num_queries, int dim, int lane) {
#pragma unroll
        for (int c = 0; c < columns; c++) {
            const int q = c * column_queries + lane / 4;
#pragma unroll
            for (int i = 0; i < max_dim / 8; i++) {
                const int d = i * 8 + 2 * (lane % 4);
                uint32_t bits = 0;
                if (q < num_queries && d < dim) bits = *reinterpret_cast<const uint32_t*>(query + q * dim + d);
                fragments[c][i / 2][i % 2] = bits;
            }
        }
    }

    __device__ void score(float (&scores)[columns][4], const Tile<T, max_dim>& tile, int lane) const {
#pragma unroll
        for (int i = 0; i < max_dim / 16; i++) {
            uint32_t keys[4];
            load_matrices<false>(keys, &tile.key[lane % 16][i * 16 + lane / 16 * 8]);
#pragma unroll
            for (int c = 0; c < columns; c++) multiply_add<T>(scores[c], keys, fragments[c][i]);
        }
    }
};

template <int max_dim, int columns>
struct Queries<float, max_dim, columns> {
    const float* query;
    int num_queries, dim;

    __device__ void load(const float* query_, int num_queries_, int dim_, int lane) {
        query = query_, num_queries = num_queries_, dim = dim_;
    }

    __device__ void score(float (&scores)[columns][4], const Tile<float, max_dim>& tile, int lane) const {
#pragma unroll
        for (int c = 0; c < columns; c++) {
#pragma unroll
            for (int e = 0; e < 4; e++) {
                const int q = c * column_queries + 2 * (lane % 4) + e % 2;
                const float* key = tile.key[lane / 4 + e / 2 * 8];
                if (q >= num_queries) continue;
                for (int d = 0; d < dim; d++) scores[c][e] += key[d] * query[q * dim + d];
            }
        }
    }
};

// output [dim, queries] += V^T x weights
template <typename T, int max_dim, int columns>
__device__ __forceinline__ void add_values(float (&output)[columns][max_dim / 16][4],
                                           const float (&weights)[columns][4], const Tile<T, max_dim>& tile, int lane) {
    uint32_t w[columns][2];
#pragma unroll
    for (int c = 0; c < columns; c++) {
#pragma unroll
        for (int h = 0; h < 2; h++) w[c][h] = transpose(pack<T>(weights[c][2 * h], weights[c][2 * h + 1]));
    }
#pragma unroll
    for (int i = 0; i < max_dim / 16; i++) {
        uint32_t values[4];
        load_matrices<true>(values, &tile.value[lane % 8 + lane / 16 * 8][i * 16 + lane / 8 % 2 * 8]);
#pragma unroll
        for (int c = 0; c < columns; c++) multiply_add<T>(output[c][i], values, w[c]);
    }
}

template <int max_dim, int columns>
__device__ __forceinline__ void add_values(float (&output)[columns][max_dim / 16][4],
                                           const float (&weights)[columns][4], const Tile<float, max_dim>& tile,
                                           int lane) {
#pragma unroll
    for (int token = 0; token < tile_tokens; token++) {
#pragma unroll
        for (int c = 0; c < columns; c++) {
            const int from = token % 8 * 4 + lane % 4;
            const float w0 = __shfl_sync(0xffffffffu, weights[c][token / 8 * 2], from);
            const float w1 = __shfl_sync(0xffffffffu, weights[c][token / 8 * 2 + 1], from);
#pragma unroll
            for (int i = 0; i < max_dim / 16; i++) {
#pragma unroll
                for (int h = 0; h < 2; h++) {
                    const float value = tile.value[token][i * 16 + h * 8 + lane / 4];
                    output[c][i][2 * h] += w0 * value;
                    output[c][i][2 * h + 1] += w1 * value;
                }
            }
        }
    }
}

// ----------------------------------------------------------------------------------------------- partial results

// A softmax over some of a row's tokens: for each query the highest score (in units of log 2) and the sum of all
// exp2(score - highest), and the values weighted so, each lane's part as it holds it.
template <int max_dim, int columns>
struct Partial {
    static constexpr int fragments = max_dim / 16;
    float4 output[columns][fragments][warp_size];
    float4 sums[columns][4];  // for lane % 4: highest of its two queries, total of its two queries
};

// Where some partial results lie: the first by itself, the others `stride` bytes apart.
template <typename PartialResult>
struct Partials {
    const PartialResult* first;
    const char* base;
    int64_t stride;
    int count;

    __device__ const PartialResult& operator[](int i) const {
        return i == 0 ? *first : *reinterpret_cast<const PartialResult*>(base + i * stride);
    }
};

__device__ __forceinline__ float finite(float highest) { return highest == -INFINITY ? 0.0f : highest; }

// ---------------------------------------------------------------------------------------------------- the kernel

struct Arguments {
    void* out;
    const void* query;
    PagedCache cache;
    Rows rows;
    Plan plan;
    void* partials;
    int virtual_heads;
};

// What a team has of one row.
struct Piece {
    int row, context;
    int row_tile;    // the row's first tile, among all tiles
    int begin, end;  // tiles of the row
};

template <typename T, int max_dim, int columns>
struct Team {
    static constexpr int stages = sizeof(T) == 4 ? 2 : max_dim == 64 ? 6 : 3;
    static constexpr int fragments = max_dim / 16;
    static constexpr int blocks_each = max_dim <= 128 ? max_blocks_each : 1;  // as many as there are registers for
    static constexpr int max_queries = columns * column_queries;
    using PartialResult = Partial<max_dim, columns>;
    using Ring = Tile<T, max_dim>[stages];
    static_assert(sizeof(PartialResult) <= sizeof(Ring));

    const Arguments& arguments;
    Ring* rings;             // one for each warp
    int* message;            // from the first thread to all
    int warps, warp, lane;
    int share_tiles, share, virtual_head, kv_head, first_head, num_queries;

    float output[columns][fragments][4];
    float highest[columns][2], total[columns][2];

    // In which slots of the cache the halves of 16 of this warp's tiles begin: lane 2 * i + h has half h of tile i.
    __device__ int find_slots(const Piece& piece, int first_tile) const {
        const int block_size = arguments.cache.block_size;
        const int token = (first_tile + lane / 2 * warps) * tile_tokens + lane % 2 * half_tokens;
        if (token >= piece.context) return 0;
        const int* table = arguments.rows.block_tables + int64_t(piece.row) * arguments.rows.table_width;
        return table[token / block_size] * block_size + token % block_size;
    }

    // Zeros stand for what lies past the context or the head: whatever the cache holds there, 0 * NaN would be NaN.
    __device__ void start_copy(Tile<T, max_dim>& tile, const Piece& piece, int index, int slot0, int slot1,
                               uint64_t policy) const {
        constexpr int row_packs = max_dim / Pack<T>::size;
        const int dim = arguments.cache.head_dim;
        const int num_tokens = piece.context - index * tile_tokens;
#pragma unroll
        for (int i = 0; i < tile_tokens * row_packs / warp_size; i++) {
            const int pack = i * warp_size + lane, token = pack / row_packs, d = pack % row_packs * Pack<T>::size;
            const bool copy = token < num_tokens && d < dim;
            const int64_t slot = (token < half_tokens ? slot0 : slot1) + token % half_tokens;
            const int64_t offset = copy ? (slot * arguments.cache.kv_heads + kv_head) * dim + d : 0;
            copy_or_zero(&tile.key[token][d], static_cast<const T*>(arguments.cache.key) + offset, copy, policy);
            copy_or_zero(&tile.value[token][d], static_cast<const T*>(arguments.cache.value) + offset, copy, policy);
        }
    }

    __device__ void attend_tile(const Tile<T, max_dim>& tile, const Queries<T, max_dim, columns>& queries,
                                int num_tokens) {
        float scores[columns][4] = {};
        queries.score(scores, tile, lane);
#pragma unroll
        for (int c = 0; c < columns; c++) {
#pragma unroll
            for (int e = 0; e < 4; e++) {
                scores[c][e] *= arguments.rows.scale * log2_e;
                if (lane / 4 + e / 2 * 8 >= num_tokens) scores[c][e] = -INFINITY;
            }
#pragma unroll
            for (int e = 0; e < 2; e++) {
                float top = fmaxf(scores[c][e], scores[c][e + 2]);
#pragma unroll
                for (int offset = 4; offset < warp_size; offset *= 2) {
                    top = fmaxf(top, __shfl_xor_sync(0xffffffffu, top, offset));
                }
                top = fmaxf(top, highest[c][e]);
                const float shrink = power_of_two(highest[c][e] - finite(top));
                scores[c][e] = power_of_two(scores[c][e] - finite(top));
                scores[c][e + 2] = power_of_two(scores[c][e + 2] - finite(top));
                total[c][e] = total[c][e] * shrink + scores[c][e] + scores[c][e + 2];
                highest[c][e] = top;
#pragma unroll
                for (int i = 0; i < fragments; i++) output[c][i][e] *= shrink, output[c][i][e + 2] *= shrink;
            }
        }
        add_values(output, scores, tile, lane);
    }

    // This warp's tiles of a piece: begin + warp, begin + warp + warps, ...
    __device__ void attend(const Piece& piece) {
#pragma unroll
        for (int c = 0; c < columns; c++) {
            highest[c][0] = highest[c][1] = -INFINITY;
            total[c][0] = total[c][1] = 0.0f;
#pragma unroll
            for (int i = 0; i < fragments; i++) {
#pragma unroll
                for (int e = 0; e < 4; e++) output[c][i][e] = 0.0f;
            }
        }

        Ring& ring = rings[warp];
        const int first = piece.begin + warp;
        const int count = ceil_div(max(piece.end - first, 0), warps);
        constexpr int batch = warp_size / 2;  // tiles whose slots are looked up at once, a batch ahead
        int slots = find_slots(piece, first), next_slots = find_slots(piece, first + batch * warps);
        const uint64_t policy = read_once_policy();
        int loaded = 0, load_stage = 0;
        auto load_next = [&] {
            if (loaded < count) {
                const int i = loaded % batch;
                if (i == 0 && loaded > 0) {
                    slots = next_slots;
                    next_slots = find_slots(piece, first + (loaded + batch) * warps);
                }
                if (first + loaded * warps == tiles_of(piece.context) - 1) wait_for_previous();  // for the newest token
                const int slot0 = __shfl_sync(0xffffffffu, slots, 2 * i);
                const int slot1 = __shfl_sync(0xffffffffu, slots, 2 * i + 1);
                start_copy(ring[load_stage], piece, first + loaded * warps, slot0, slot1, policy);
                loaded++;
                load_stage = load_stage + 1 == stages ? 0 : load_stage + 1;
            }
            commit_copies();  // perhaps of nothing: the number of groups says which tile has come
        };
        for (int i = 0; i < stages - 1; i++) load_next();
        wait_for_previous();
        let_next_start();
        Queries<T, max_dim, columns> queries;
        queries.load(static_cast<const T*>(arguments.query) + piece.row * arguments.rows.query_stride +
                         first_head * arguments.cache.head_dim, num_queries, arguments.cache.head_dim, lane);
        int stage = 0;
        for (int i = 0; i < count; i++) {
            wait_for_copies_but<stages - 2>();
            __syncwarp();
            load_next();
            attend_tile(ring[stage], queries, piece.context - (first + i * warps) * tile_tokens);
            stage = stage + 1 == stages ? 0 : stage + 1;
        }
        wait_for_copies_but<0>();
        __syncwarp();
    }

    __device__ void keep(PartialResult& partial) {
#pragma unroll
        for (int c = 0; c < columns; c++) {
#pragma unroll
            for (int e = 0; e < 2; e++) {
#pragma unroll
                for (int offset = 4; offset < warp_size; offset *= 2) {
                    total[c][e] += __shfl_xor_sync(0xffffffffu, total[c][e], offset);
                }
            }
            if (lane < 4) partial.sums[c][lane] = {highest[c][0], highest[c][1], total[c][0], total[c][1]};
#pragma unroll
            for (int i = 0; i < fragments; i++) {
                partial.output[c][i][lane] = {output[c][i][0], output[c][i][1], output[c][i][2], output[c][i][3]};
            }
        }
    }

    __device__ void write(const Piece& piece, int column, int fragment, const float4& result,
                          const float4& sums) const {
        const int dim = arguments.cache.head_dim;
        const float inverse0 = sums.z > 0.0f ? 1.0f / sums.z : 0.0f;
        const float inverse1 = sums.w > 0.0f ? 1.0f / sums.w : 0.0f;
        const float values[4] = {result.x * inverse0, result.y * inverse1, result.z * inverse0, result.w * inverse1};
        T* out = static_cast<T*>(arguments.out) + (int64_t(piece.row) * arguments.rows.heads + first_head) * dim;
#pragma unroll
        for (int e = 0; e < 4; e++) {
            const int q = column * column_queries + 2 * (lane % 4) + e % 2, d = fragment * 16 + lane / 4 + e / 2 * 8;
            if (q < num_queries && d < dim) out[q * dim + d] = from_float<T>(values[e]);
        }
    }

    // Puts partial results together, in `target` or, if there is none, as the output; each warp some of the fragments.
    __device__ void combine(const Piece& piece, const Partials<PartialResult>& partials,
                            PartialResult* target) const {
        constexpr int batch = 8;  // partial results asked for at once
#pragma unroll 1
        for (int f = warp; f < columns * fragments; f += warps) {
            const int column = f / fragments, fragment = f % fragments;
            if (column * column_queries + 2 * (lane % 4) >= num_queries) continue;
            float4 all = {-INFINITY, -INFINITY, 0.0f, 0.0f}, result = {};  // highest and total of two queries
            for (int first = 0; first < partials.count; first += batch) {
                float4 sums[batch], outputs[batch];
                float top0 = all.x, top1 = all.y;
#pragma unroll
                for (int i = 0; i < batch; i++) {
                    const PartialResult& partial = partials[min(first + i, partials.count - 1)];
                    sums[i] = partial.sums[column][lane % 4];
                    outputs[i] = partial.output[column][fragment][lane];
                    if (first + i >= partials.count) sums[i].x = sums[i].y = -INFINITY;
                }
#pragma unroll
                for (int i = 0; i < batch; i++) top0 = fmaxf(top0, sums[i].x), top1 = fmaxf(top1, sums[i].y);
                const float shrink0 = power_of_two(all.x - finite(top0)), shrink1 = power_of_two(all.y - finite(top1));
                all = {top0, top1, all.z * shrink0, all.w * shrink1};
                result = {result.x * shrink0, result.y * shrink1, result.z * shrink0, result.w * shrink1};
#pragma unroll
                for (int i = 0; i < batch; i++) {
                    const float w0 = power_of_two(sums[i].x - finite(top0));
                    const float w1 = power_of_two(sums[i].y - finite(top1));
                    all.z += w0 * sums[i].z, all.w += w1 * sums[i].w;
                    result.x += w0 * outputs[i].x, result.z += w0 * outputs[i].z;
                    result.y += w1 * outputs[i].y, result.w += w1 * outputs[i].w;
                }
            }
            if (!target) {
                write(piece, column, fragment, result, all);
            } else {
                target->output[column][fragment][lane] = result;
                if (fragment == 0 && lane < 4) target->sums[column][lane] = all;
            }
        }
    }

    // The block's partial results: one of the row with which its share begins, one of a row that begins within.
    __device__ PartialResult* place_of(int share, bool begins_within) const {
        const int64_t place = int64_t(2 * share + begins_within) * arguments.virtual_heads + virtual_head;
        return static_cast<PartialResult*>(arguments.partials) + place;
    }

    // First the warps' results; then, if this block is the last to arrive at a split row, those of all its blocks.
    __device__ void finish(const Piece& piece) {
        const int first_share = piece.row_tile / share_tiles;
        const unsigned others = (piece.row_tile + tiles_of(piece.context) - 1) / share_tiles - first_share;
        const bool begins_within = piece.row_tile % share_tiles != 0;
        keep(*reinterpret_cast<PartialResult*>(&rings[warp]));
        __syncthreads();
        combine(piece,
                {reinterpret_cast<PartialResult*>(rings), reinterpret_cast<char*>(rings), sizeof(Ring), warps},
                others == 0 ? nullptr : place_of(share, share == first_share && begins_within));
        if (others > 0) __threadfence();
        __syncthreads();
        if (others == 0) return;

        if (threadIdx.x == 0) {  // the counter wraps to zero, ready for the next layer
            unsigned* arrived = &arguments.plan.arrivals[first_share * arguments.virtual_heads + virtual_head];
            *message = atomicInc(arrived, others) == others;
        }
        __syncthreads();
        if (!*message) return;
        __threadfence();
        const int64_t stride = 2 * arguments.virtual_heads * sizeof(PartialResult);
        const char* all = reinterpret_cast<const char*>(place_of(first_share, false));
        combine(piece, {place_of(first_share, begins_within), all, stride, int(others) + 1}, nullptr);
    }
};

template <typename T, int max_dim, int columns>
__global__ void __launch_bounds__(max_warps * warp_size, Team<T, max_dim, columns>::blocks_each)
attend_shares(const __grid_constant__ Arguments arguments) {
    extern __shared__ uint4 shared[];
    using ThisTeam = Team<T, max_dim, columns>;
    const PlanHeader plan = *arguments.plan.header;
    const int share = blockIdx.x / arguments.virtual_heads, virtual_head = blockIdx.x % arguments.virtual_heads;
    int tile = share * plan.share_tiles;
    const int end = min(tile + plan.share_tiles, plan.tiles);
    if (tile >= end) return;

    const int warps = blockDim.x / warp_size;
    auto rings = reinterpret_cast<typename ThisTeam::Ring*>(shared);
    const int group = arguments.rows.heads / arguments.cache.kv_heads;
    const int heads_each = arguments.virtual_heads / arguments.cache.kv_heads;
    const int kv_head = virtual_head / heads_each, first_query = virtual_head % heads_each * ThisTeam::max_queries;
    ThisTeam team{arguments, rings, reinterpret_cast<int*>(rings + warps), warps, int(threadIdx.x) / warp_size,
                  int(threadIdx.x) % warp_size, plan.share_tiles, share, virtual_head, kv_head,
                  kv_head * group + first_query, min(group - first_query, ThisTeam::max_queries)};

    const Share start = arguments.plan.shares[share];
    Piece piece{start.row, start.context, tile - start.tile, start.tile, 0};
    while (true) {
        piece.end = min(tiles_of(piece.context), end - piece.row_tile);
        team.attend(piece);
        team.finish(piece);
        tile = piece.row_tile + piece.end;
        if (tile >= end) return;
        piece = {piece.row + 1, arguments.rows.context_lens[piece.row + 1], tile, 0, 0};
    }
}

// -------------------------------------------------------------------------------------------------------- the host

// Calls `function(element, max_dim, columns)` of the kernel's instance for these shapes.
template <typename Function>
cudaError_t dispatch_kernel(DType dtype, int head_dim, int group, Function function) {
    return dispatch(dtype, [&](auto element) {
        using T = decltype(element);
        auto with_columns = [&](auto max_dim) {
            if constexpr (sizeof(T) == 2 && decltype(max_dim)::value <= 128) {
                if (group > column_queries) return function(element, max_dim, std::integral_constant<int, 2>{});
            }
            return function(element, max_dim, std::integral_constant<int, 1>{});
        };
        if (head_dim <= 64) return with_columns(std::integral_constant<int, 64>{});
        if (head_dim <= 128) return with_columns(std::integral_constant<int, 128>{});
        return with_columns(std::integral_constant<int, 256>{});
    });
}

int device_attribute(cudaDeviceAttr attribute) {
    int device = 0, value = 0;
    cudaGetDevice(&device);
    cudaDeviceGetAttribute(&value, attribute, device);
    return value;
}

template <typename Kernel>
int shared_bytes(int warps) { return warps * sizeof(typename Kernel::Ring) + sizeof(int); }

// A GPU with less shared memory runs fewer warps. No blocks: not even one fits.
template <typename Kernel>
Geometry geometry_of(int heads, int kv_heads) {
    const int memory = device_attribute(cudaDevAttrMaxSharedMemoryPerMultiprocessor);
    const int reserved = device_attribute(cudaDevAttrReservedSharedMemoryPerBlock);
    int warps = max_warps;
    while (warps > 1 && shared_bytes<Kernel>(warps) + reserved > memory) warps /= 2;
    const int each = std::min(memory / (shared_bytes<Kernel>(warps) + reserved), Kernel::blocks_each);
    return {multiprocessor_count() * each, warps, kv_heads * ceil_div(heads / kv_heads, Kernel::max_queries)};
}

bool supported(int block_size, int heads, int kv_heads, int head_dim) {
    return head_dim % 8 == 0 && head_dim <= 256 && block_size % half_tokens == 0 && heads % kv_heads == 0;
}

}  // namespace

int64_t decode_plan_bytes(int) { return sizeof(PlanHeader) + max_blocks() * (sizeof(Share) + sizeof(unsigned)); }

cudaError_t plan_decode(void* plan, const int* context_lens, int num_rows, int block_size, int heads, int kv_heads,
                        int head_dim, DType dtype, cudaStream_t stream) {
    if (!supported(block_size, heads, kv_heads, head_dim)) return cudaErrorInvalidValue;
    if (num_rows == 0) return cudaSuccess;
    return dispatch_kernel(dtype, head_dim, heads / kv_heads, [&](auto element, auto max_dim, auto columns) {
        const Geometry geometry = geometry_of<Team<decltype(element), max_dim, columns>>(heads, kv_heads);
        if (geometry.virtual_heads > geometry.blocks) return cudaErrorInvalidValue;
        return launch(split_rows, 1, plan_threads, 0, stream, plan_at(plan), context_lens, num_rows, geometry);
    });
}

int64_t decode_scratch_bytes(int, int heads, int head_dim) {
    const int columns = std::min(ceil_div(heads, column_queries), max_columns);
    const int fragments = head_dim <= 64 ? 4 : head_dim <= 128 ? 8 : 16;
    return int64_t(2) * max_blocks() * columns * sizeof(float4) * (fragments * warp_size + 4);
}

cudaError_t decode_attention(void* out, const void* query, const PagedCache& cache, const Rows& rows, void* plan,
                             void* scratch, cudaStream_t stream) {
    if (!supported(cache.block_size, rows.heads, cache.kv_heads, cache.head_dim)) return cudaErrorInvalidValue;
    if (rows.num_rows == 0) return cudaSuccess;
    const int group = rows.heads / cache.kv_heads;
    return dispatch_kernel(cache.dtype, cache.head_dim, group, [&](auto element, auto max_dim, auto columns) {
        using T = decltype(element);
        using Kernel = Team<T, max_dim, columns>;
        const Geometry geometry = geometry_of<Kernel>(rows.heads, cache.kv_heads);
        if (geometry.virtual_heads > geometry.blocks) return cudaErrorInvalidValue;
        const int bytes = shared_bytes<Kernel>(geometry.warps);
        auto kernel = attend_shares<T, max_dim, columns>;
        const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
        if (error != cudaSuccess) return error;
        return launch(kernel, geometry.blocks, geometry.warps * warp_size, bytes, stream,
                      Arguments{out, query, cache, rows, plan_at(plan), scratch, geometry.virtual_heads});
    });
}

}  // namespace nanopd
