// The kernels as torch operators, torch.ops.nanopd.*, by torch's stable ABI: one binary serves several versions.
//
// Each operator checks what it is given, so that a mistake becomes a Python error that names the argument. Tensors
// that are written come first and are allocated by the caller.
#include <dlfcn.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <climits>
#include <initializer_list>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>

#include "kernels.h"

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

namespace {

using namespace nanopd;

// ------------------------------------------------------------------------------------------------------ checks

template <typename... Parts>
[[noreturn]] void fail(const Parts&... parts) {
    std::ostringstream message;
    (message << ... << parts);
    throw std::runtime_error(message.str());
}

template <typename... Parts>
void require(bool condition, const Parts&... parts) {
    if (!condition) fail(parts...);
}

const char* name_of(ScalarType type) {
    switch (type) {
        case ScalarType::Float: return "float32";
        case ScalarType::Half: return "float16";
        case ScalarType::BFloat16: return "bfloat16";
        case ScalarType::Double: return "float64";
        case ScalarType::Int: return "int32";
        case ScalarType::Long: return "int64";
        case ScalarType::Bool: return "bool";
        case ScalarType::Byte: return "uint8";
        default: return "another type";
    }
}

constexpr int64_t any = -1;

std::string shape_text(const int64_t* sizes, size_t count) {
    std::ostringstream text;
    text << "[";
    for (size_t i = 0; i < count; ++i) {
        if (i) text << ", ";
        if (sizes[i] == any) text << "any"; else text << sizes[i];
    }
    text << "]";
    return text.str();
}

// An argument with its name, and what can be asked of it. Each check returns the argument, so that they chain.
class Argument {
public:
    Argument(const Tensor& tensor, const char* name) : tensor_(tensor), name_(name) {}

    const Argument& type(ScalarType wanted) const {
        require(tensor_.scalar_type() == wanted, name_, " must be ", name_of(wanted), ", but is ",
                name_of(tensor_.scalar_type()));
        return *this;
    }

    const Argument& shape(std::initializer_list<int64_t> wanted) const {
        const auto sizes = tensor_.sizes();
        bool fits = sizes.size() == wanted.size();
        for (size_t i = 0; fits && i < wanted.size(); ++i)
            fits = wanted.begin()[i] == any || wanted.begin()[i] == sizes[i];
        require(fits, name_, " must have the shape ", shape_text(wanted.begin(), wanted.size()), ", but has ",
                shape_text(sizes.data(), sizes.size()));
        return *this;
    }

    // At least this many bytes, whatever its type and shape.
    const Argument& holds(int64_t bytes) const {
        const int64_t size = tensor_.numel() * static_cast<int64_t>(tensor_.element_size());
        require(size >= bytes, name_, " must have at least ", bytes, " bytes, but has ", size);
        return *this;
    }

    const Argument& contiguous() const {
        require(tensor_.is_contiguous(), name_, " must be contiguous");
        return *this;
    }

    // Contiguous but for the first dimension, whose stride may be anything.
    const Argument& contiguous_rows() const {
        int64_t stride = 1;
        for (int64_t d = tensor_.dim() - 1; d > 0; stride *= tensor_.size(d--))
            require(tensor_.stride(d) == stride || tensor_.size(d) == 1, name_,
                    " must be contiguous in all but its first dimension");
        return *this;
    }

    const Argument& on_cuda() const {
        require(tensor_.is_cuda(), name_, " must be on a CUDA device; on a CPU nanopd.paged_attention.ops serves");
        return *this;
    }

    const Argument& on_device_of(const Argument& other) const {
        on_cuda();
        require(tensor_.get_device_index() == other.tensor_.get_device_index(), name_, " is on cuda:",
                tensor_.get_device_index(), ", but ", other.name_, " on cuda:", other.tensor_.get_device_index());
        return *this;
    }

    DType dtype() const {
        switch (tensor_.scalar_type()) {
            case ScalarType::Float: return DType::f32;
            case ScalarType::Half: return DType::f16;
            case ScalarType::BFloat16: return DType::bf16;
            default: fail(name_, " must be float32, float16 or bfloat16, but is ", name_of(tensor_.scalar_type()));
        }
    }

    int size(int64_t dimension) const {
        const int64_t size = tensor_.size(dimension);
        require(size <= INT_MAX, name_, " has too many elements in dimension ", dimension, ": ", size);
        return static_cast<int>(size);
    }

    void require_dim(int64_t wanted) const {
        require(tensor_.dim() == wanted, name_, " must have ", wanted, " dimensions, but has ", tensor_.dim());
    }

    const Tensor& tensor() const { return tensor_; }
    const char* name() const { return name_; }

    template <typename T = void>
    T* data() const { return static_cast<T*>(tensor_.data_ptr()); }

private:
    const Tensor& tensor_;
    const char* name_;
};

// The pointer of an argument that may be left out; where it is there, it must be like `other` and of that shape.
const void* optional_data(const std::optional<Tensor>& tensor, const char* name, const Argument& other,
                          std::initializer_list<int64_t> shape) {
    if (!tensor) return nullptr;
    return Argument(*tensor, name).on_device_of(other).type(other.tensor().scalar_type()).shape(shape).contiguous().data();
}

int positive(int64_t value, const char* name) {
    require(value > 0 && value <= INT_MAX, name, " must be positive, but is ", value);
    return static_cast<int>(value);
}

// ------------------------------------------------------------------------------------------------------ launches

// Makes the device of an argument the current one, and finds torch's current stream there.
class On {
public:
    explicit On(const Argument& argument) : device_(argument.tensor().get_device_index()) {
        check(cudaGetDevice(&before_), "cudaGetDevice");
        if (device_ != before_) check(cudaSetDevice(device_), "cudaSetDevice");
        require(current_stream_of_torch()(device_, &stream_) == 0, "torch did not tell its current CUDA stream");
    }
    ~On() {
        if (device_ != before_) cudaSetDevice(before_);
    }
    On(const On&) = delete;
    On& operator=(const On&) = delete;

    cudaStream_t stream() const { return static_cast<cudaStream_t>(stream_); }
    int device() const { return device_; }

    static void check(cudaError_t error, const char* what) {
        if (error == cudaSuccess) return;
        cudaGetLastError();  // or the next one to ask would be told of it
        fail(what, ": ", cudaGetErrorString(error));
    }

private:
    using CurrentStream = int32_t (*)(int32_t device, void** stream);

    // Looked up when needed, because a torch built for the CPU does not have it, and this library loads there too.
    static CurrentStream current_stream_of_torch() {
        static const auto function = [] {
            void* library = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
            return library ? reinterpret_cast<CurrentStream>(dlsym(library, "aoti_torch_get_current_cuda_stream")) : nullptr;
        }();
        require(function, "this torch is built without CUDA");
        return function;
    }

    int device_;
    int before_ = 0;
    void* stream_ = nullptr;
};

template <typename Function>
void launch_on(const Argument& argument, const char* name, Function function) {
    const On on(argument);
    On::check(function(on.stream()), name);
}

// ------------------------------------------------------------------------------------------------- layer and sampling

void rms_norm_op(const Tensor& out_, const Tensor& x_, const Tensor& weight_, double eps) {
    const Argument out(out_, "out"), x(x_, "x"), weight(weight_, "weight");
    x.on_cuda().contiguous().require_dim(2);
    const DType dtype = x.dtype();
    const int rows = x.size(0), size = x.size(1);
    require(size > 0 && size <= 8192, "x has ", size, " elements a row; rms_norm takes 1 to 8192");
    weight.on_device_of(x).type(x_.scalar_type()).shape({size}).contiguous();
    out.on_device_of(x).type(x_.scalar_type()).shape({rows, size}).contiguous();
    launch_on(x, "rms_norm", [&](cudaStream_t stream) {
        return rms_norm(out.data(), x.data(), weight.data(), rows, size, static_cast<float>(eps), dtype, stream);
    });
}

void silu_and_mul_op(const Tensor& out_, const Tensor& gate_up_) {
    const Argument out(out_, "out"), gate_up(gate_up_, "gate_up");
    gate_up.on_cuda().contiguous().require_dim(2);
    const DType dtype = gate_up.dtype();
    const int rows = gate_up.size(0), size = gate_up.size(1) / 2;
    require(size > 0 && gate_up.size(1) % 2 == 0, "gate_up must have an even number of columns, but has ", gate_up.size(1));
    out.on_device_of(gate_up).type(gate_up_.scalar_type()).shape({rows, size}).contiguous();
    launch_on(gate_up, "silu_and_mul", [&](cudaStream_t stream) {
        return silu_and_mul(out.data(), gate_up.data(), rows, size, dtype, stream);
    });
}

PagedCache paged_cache(const Argument& key, const Argument& value) {
    key.on_cuda().contiguous().require_dim(4);
    const PagedCache cache{key.data(), value.data(), key.tensor().size(0), key.size(1), key.size(2), key.size(3), key.dtype()};
    value.on_device_of(key).type(key.tensor().scalar_type()).contiguous()
        .shape({cache.num_blocks, cache.block_size, cache.kv_heads, cache.head_dim});
    require(cache.num_blocks > 0 && cache.block_size > 0 && cache.kv_heads > 0, "key_cache must not be empty");
    require(cache.head_dim > 0 && cache.head_dim <= 256, "key_cache has a head_dim of ", cache.head_dim,
            "; allowed are 1 to 256");
    return cache;
}

void rope_and_store_op(const Tensor& qkv_, const Tensor& cos_, const Tensor& sin_, const std::optional<Tensor>& q_weight,
                       const std::optional<Tensor>& k_weight, double eps, const Tensor& key_cache, const Tensor& value_cache,
                       const Tensor& slot_mapping_, int64_t heads_) {
    const Argument qkv(qkv_, "qkv"), cos(cos_, "cos"), sin(sin_, "sin"), slot_mapping(slot_mapping_, "slot_mapping");
    const PagedCache cache = paged_cache({key_cache, "key_cache"}, {value_cache, "value_cache"});
    const ScalarType type = key_cache.scalar_type();
    const int heads = positive(heads_, "heads");
    require(cache.head_dim % 2 == 0, "key_cache has an odd head_dim, ", cache.head_dim, "; rope turns pairs");
    qkv.on_device_of({key_cache, "key_cache"}).type(type).contiguous()
        .shape({any, int64_t(heads + 2 * cache.kv_heads) * cache.head_dim});
    const int tokens = qkv.size(0);
    cos.on_device_of(qkv).type(type).shape({tokens, cache.head_dim}).contiguous();
    sin.on_device_of(qkv).type(type).shape({tokens, cache.head_dim}).contiguous();
    slot_mapping.on_device_of(qkv).type(ScalarType::Long).shape({tokens}).contiguous();
    const void* q_weight_data = optional_data(q_weight, "q_weight", qkv, {cache.head_dim});
    const void* k_weight_data = optional_data(k_weight, "k_weight", qkv, {cache.head_dim});
    launch_on(qkv, "rope_and_store", [&](cudaStream_t stream) {
        return rope_and_store(qkv.data(), cos.data(), sin.data(), q_weight_data, k_weight_data, static_cast<float>(eps), cache,
                              slot_mapping.data<int64_t>(), tokens, heads, stream);
    });
}

void embed_op(const Tensor& out_, const Tensor& cos_, const Tensor& sin_, const Tensor& token_ids_, const Tensor& positions_,
              const Tensor& last_drawn_, const Tensor& weight_, const Tensor& cos_table_, const Tensor& sin_table_) {
    const Argument out(out_, "out"), cos(cos_, "cos"), sin(sin_, "sin"), token_ids(token_ids_, "token_ids");
    const Argument positions(positions_, "positions"), last_drawn(last_drawn_, "last_drawn"), weight(weight_, "weight");
    const Argument cos_table(cos_table_, "cos_table"), sin_table(sin_table_, "sin_table");
    const ScalarType type = weight_.scalar_type();
    weight.on_cuda().shape({any, any}).contiguous();
    token_ids.on_device_of(weight).type(ScalarType::Long).shape({any}).contiguous();
    last_drawn.on_device_of(weight).type(ScalarType::Long).shape({any}).contiguous();
    const int tokens = token_ids.size(0), hidden_size = weight.size(1);
    positions.on_device_of(weight).type(ScalarType::Long).shape({tokens}).contiguous();
    cos_table.on_device_of(weight).type(type).shape({any, any}).contiguous();
    const int head_dim = cos_table.size(1);
    sin_table.on_device_of(weight).type(type).shape({cos_table.size(0), head_dim}).contiguous();
    out.on_device_of(weight).type(type).shape({tokens, hidden_size}).contiguous();
    for (const Argument* rotation : {&cos, &sin})
        rotation->on_device_of(weight).type(type).shape({tokens, head_dim}).contiguous();
    if (tokens == 0) return;
    const EmbedArguments arguments{out.data(), cos.data(), sin.data(), token_ids.data<int64_t>(), positions.data<int64_t>(),
                                   last_drawn.data<int64_t>(), weight.data(), cos_table.data(), sin_table.data(),
                                   tokens, hidden_size, head_dim};
    launch_on(weight, "embed", [&](cudaStream_t stream) { return embed(arguments, weight.dtype(), stream); });
}

void greedy_sample_op(const Tensor& token_ids_, const Tensor& logprobs_, const Tensor& broken_, const Tensor& logits_) {
    const Argument token_ids(token_ids_, "token_ids"), logprobs(logprobs_, "logprobs"), broken(broken_, "broken");
    const Argument logits(logits_, "logits");
    logits.on_cuda().contiguous().require_dim(2);
    const DType dtype = logits.dtype();
    const int rows = logits.size(0), vocab = logits.size(1);
    require(rows <= 65535, "logits has ", rows, " rows; at most 65535 fit");
    require(vocab > 0, "logits must have at least one column");
    token_ids.on_device_of(logits).type(ScalarType::Long).shape({rows}).contiguous();
    logprobs.on_device_of(logits).type(ScalarType::Float).shape({rows}).contiguous();
    broken.on_device_of(logits).type(ScalarType::Bool).shape({rows}).contiguous();
    launch_on(logits, "greedy_sample", [&](cudaStream_t stream) {
        return greedy_sample(token_ids.data<int64_t>(), logprobs.data<float>(), broken.data<bool>(), logits.data(), rows, vocab,
                             dtype, stream);
    });
}

// --------------------------------------------------------------------------------------------------- moving blocks

// Blocks of a tensor [..., blocks, block_size, kv_heads, head_dim]: what stands before them are planes.
struct Blocks {
    Blocks(const Argument& argument) {
        const Tensor& tensor = argument.on_cuda().contiguous().tensor();
        require(tensor.dim() >= 4 && tensor.dim() <= 6, argument.name(),
                " must be [..., blocks, block_size, kv_heads, head_dim] with at most two dimensions before these, but has ",
                tensor.dim());
        const int64_t first = tensor.dim() - 4;
        for (int64_t d = 0; d < first; ++d) planes *= tensor.size(d);
        count = tensor.size(first);
        block_bytes = tensor.size(first + 1) * tensor.size(first + 2) * tensor.size(first + 3) *
                      static_cast<int64_t>(tensor.element_size());
        plane_bytes = count * block_bytes;
    }
    int64_t planes = 1, count, block_bytes, plane_bytes;
};

// Lets the current device read and write the other's memory.
void reach(int other, const char* name) {
    const cudaError_t error = cudaDeviceEnablePeerAccess(other, 0);
    if (error == cudaErrorPeerAccessAlreadyEnabled) cudaGetLastError();
    else On::check(error, name);
}

// Runs where the ids lie, or on the target's device where there are none.
void move_blocks_op(const Tensor& target_, const std::optional<Tensor>& target_ids_, const Tensor& source_,
                    const std::optional<Tensor>& source_ids_, int64_t max_thread_blocks) {
    const Argument target(target_, "target"), source(source_, "source");
    const Blocks to(target), from(source);
    source.type(target_.scalar_type());
    require(to.planes == from.planes && to.block_bytes == from.block_bytes, "source has ", from.planes, " planes of blocks of ",
            from.block_bytes, " bytes, but target ", to.planes, " of ", to.block_bytes);
    target.dtype();  // one of two or four bytes

    int64_t count = source_ids_ ? source_ids_->numel() : from.count;
    if (target_ids_ && !source_ids_) count = target_ids_->numel();
    const Argument where = target_ids_ ? Argument(*target_ids_, "target_ids")
                                       : source_ids_ ? Argument(*source_ids_, "source_ids") : target;
    const auto ids = [&](const std::optional<Tensor>& tensor, const char* name, const Blocks& blocks) -> const int64_t* {
        if (!tensor) {
            require(blocks.count >= count, "without ", name, " all ", count, " blocks must be there, but ", blocks.count, " are");
            return nullptr;
        }
        return Argument(*tensor, name).on_device_of(where).type(ScalarType::Long).shape({count}).contiguous().data<int64_t>();
    };
    const int64_t* target_ids = ids(target_ids_, "target_ids", to);
    const int64_t* source_ids = ids(source_ids_, "source_ids", from);
    require(count <= INT_MAX && to.planes <= INT_MAX, "target has too many blocks");
    require(max_thread_blocks >= 0 && max_thread_blocks <= INT_MAX, "max_thread_blocks must be positive, or 0 for no limit, but is ",
            max_thread_blocks);

    where.on_cuda();
    const On on(where);
    for (const Argument* side : {&target, &source})
        if (side->tensor().get_device_index() != on.device()) reach(side->tensor().get_device_index(), side->name());
    On::check(move_blocks(target.data(), target_ids, to.plane_bytes, source.data(), source_ids, from.plane_bytes,
                          static_cast<int>(to.planes), static_cast<int>(count), to.block_bytes,
                          static_cast<int>(max_thread_blocks), on.stream()), "move_blocks");
}

// ------------------------------------------------------------------------------------------------------- attention

void require_groups(int heads, int kv_heads) {
    require(heads % kv_heads == 0, "query has ", heads, " heads, which is no multiple of the cache's ", kv_heads);
}

// Checks what all attention kernels have in common and gathers it.
struct Attention {
    Attention(const Tensor& out_, const Tensor& query_, const Tensor& key_cache_, const Tensor& value_cache_,
              const Tensor& block_tables_, const Tensor* query_starts_, const Tensor& context_lens_, double scale)
        : out(out_, "out"), query(query_, "query"), key_cache(key_cache_, "key_cache"),
          cache(paged_cache(key_cache, {value_cache_, "value_cache"})) {
        const Argument block_tables(block_tables_, "block_tables"), context_lens(context_lens_, "context_lens");
        query.on_device_of(key_cache).type(key_cache_.scalar_type()).shape({any, any, cache.head_dim}).contiguous_rows();
        const int heads = query.size(1);
        tokens = query.size(0);
        require(heads > 0, "query must have at least one head");
        require_groups(heads, cache.kv_heads);
        out.on_device_of(key_cache).type(key_cache_.scalar_type()).shape({tokens, heads, cache.head_dim}).contiguous();
        context_lens.on_device_of(key_cache).type(ScalarType::Int).shape({any}).contiguous();
        const int num_rows = context_lens.size(0);
        block_tables.on_device_of(key_cache).type(ScalarType::Int).shape({num_rows, any}).contiguous();
        const int* starts = nullptr;
        if (query_starts_) {
            const Argument query_starts(*query_starts_, "query_starts");
            starts = query_starts.on_device_of(key_cache).type(ScalarType::Int).shape({num_rows + 1}).contiguous().data<int>();
        } else {
            require(tokens == num_rows, "query has ", tokens, " tokens, but context_lens ", num_rows,
                    " rows; a decode has one token a row");
        }
        rows = {block_tables.data<int>(), block_tables.size(1), starts, context_lens.data<int>(), num_rows, heads,
                query_.stride(0), static_cast<float>(scale)};
    }

    Argument out, query, key_cache;
    PagedCache cache;
    int tokens;
    Rows rows;
};

void naive_attention_op(const Tensor& out, const Tensor& query, const Tensor& key_cache, const Tensor& value_cache,
                        const Tensor& block_tables, const Tensor& query_starts, const Tensor& context_lens, double scale) {
    const Attention a(out, query, key_cache, value_cache, block_tables, &query_starts, context_lens, scale);
    if (a.tokens == 0) return;
    launch_on(a.query, "naive_attention", [&](cudaStream_t stream) {
        return naive_attention(a.out.data(), a.query.data(), a.cache, a.rows, a.tokens, stream);
    });
}

void plan_decode_op(const Tensor& plan_, const Tensor& context_lens_, int64_t block_size, int64_t heads_, int64_t kv_heads_,
                    int64_t head_dim, const Tensor& like_) {
    const Argument plan(plan_, "plan"), context_lens(context_lens_, "context_lens"), like(like_, "like");
    context_lens.on_cuda().type(ScalarType::Int).shape({any}).contiguous();
    const int num_rows = context_lens.size(0), heads = positive(heads_, "heads"), kv_heads = positive(kv_heads_, "kv_heads");
    require_groups(heads, kv_heads);
    plan.on_device_of(context_lens).contiguous().holds(decode_plan_bytes(num_rows));
    if (num_rows == 0) return;
    launch_on(context_lens, "plan_decode", [&](cudaStream_t stream) {
        return plan_decode(plan.data(), context_lens.data<int>(), num_rows, positive(block_size, "block_size"), heads, kv_heads,
                           positive(head_dim, "head_dim"), like.dtype(), stream);
    });
}

void decode_attention_op(const Tensor& out, const Tensor& query, const Tensor& key_cache, const Tensor& value_cache,
                         const Tensor& block_tables, const Tensor& context_lens, const Tensor& plan_, const Tensor& scratch_,
                         double scale) {
    const Attention a(out, query, key_cache, value_cache, block_tables, nullptr, context_lens, scale);
    const Argument plan(plan_, "plan"), scratch(scratch_, "scratch");
    plan.on_device_of(a.query).contiguous().holds(decode_plan_bytes(a.rows.num_rows));
    scratch.on_device_of(a.query).contiguous().holds(decode_scratch_bytes(a.rows.num_rows, a.rows.heads, a.cache.head_dim));
    if (a.tokens == 0) return;
    launch_on(a.query, "decode_attention", [&](cudaStream_t stream) {
        return decode_attention(a.out.data(), a.query.data(), a.cache, a.rows, plan.data(), scratch.data(), stream);
    });
}

void prefill_attention_op(const Tensor& out, const Tensor& query, const Tensor& key_cache, const Tensor& value_cache,
                          const Tensor& block_tables, const Tensor& query_starts, const Tensor& context_lens,
                          int64_t max_query_len, double scale) {
    const Attention a(out, query, key_cache, value_cache, block_tables, &query_starts, context_lens, scale);
    if (a.tokens == 0) return;
    launch_on(a.query, "prefill_attention", [&](cudaStream_t stream) {
        return prefill_attention(a.out.data(), a.query.data(), a.cache, a.rows, positive(max_query_len, "max_query_len"), stream);
    });
}

// ---------------------------------------------------------------------------------------------------------- linear

void linear_op(const Tensor& out_, const Tensor& x_, const Tensor& weight_, const std::optional<Tensor>& bias,
               const std::optional<Tensor>& norm_weight, const std::optional<Tensor>& residual,
               double eps, bool silu) {
    const Argument out(out_, "out"), x(x_, "x"), weight(weight_, "weight");
    x.on_cuda().contiguous().require_dim(2);
    weight.on_device_of(x).type(x_.scalar_type()).shape({any, x.size(1)}).contiguous();
    const DType dtype = x.dtype();
    const int tokens = x.size(0), in_features = x.size(1), out_features = weight.size(0);
    require(!silu || out_features % 2 == 0, "weight must have an even number of rows for silu, but has ", out_features);
    const int columns = silu ? out_features / 2 : out_features;
    out.on_device_of(x).type(x_.scalar_type()).shape({tokens, columns}).contiguous();
    const LinearArguments arguments{out.data(), x.data(), weight.data(),
                                    optional_data(bias, "bias", x, {out_features}),
                                    optional_data(norm_weight, "norm_weight", x, {in_features}),
                                    optional_data(residual, "residual", x, {tokens, columns}),
                                    static_cast<float>(eps), tokens, in_features, out_features, silu, dtype};
    if (tokens == 0) return;
    launch_on(x, "linear", [&](cudaStream_t stream) { return linear(arguments, stream); });
}

bool linear_supports_op(const Tensor& x_, int64_t out_features, bool silu) {
    const Argument x(x_, "x");
    x.on_cuda().require_dim(2);
    const On on(x);
    return linear_supports(x.size(0), x.size(1), positive(out_features, "out_features"), silu, x.dtype());
}

int64_t decode_plan_bytes_op(int64_t num_rows) { return decode_plan_bytes(positive(num_rows, "num_rows")); }

int64_t decode_scratch_bytes_op(int64_t num_rows, int64_t heads, int64_t head_dim) {
    return decode_scratch_bytes(positive(num_rows, "num_rows"), positive(heads, "heads"), positive(head_dim, "head_dim"));
}

}  // namespace

STABLE_TORCH_LIBRARY(nanopd, m) {
    m.def("rms_norm(Tensor(a!) out, Tensor x, Tensor weight, float eps) -> ()");
    m.def("silu_and_mul(Tensor(a!) out, Tensor gate_up) -> ()");
    m.def("rope_and_store(Tensor(a!) qkv, Tensor cos, Tensor sin, Tensor? q_weight, Tensor? k_weight, float eps, "
          "Tensor(b!) key_cache, Tensor(c!) value_cache, Tensor slot_mapping, int heads) -> ()");
    m.def("embed(Tensor(a!) out, Tensor(b!) cos, Tensor(c!) sin, Tensor token_ids, Tensor positions, Tensor last_drawn, "
          "Tensor weight, Tensor cos_table, Tensor sin_table) -> ()");
    m.def("greedy_sample(Tensor(a!) token_ids, Tensor(b!) logprobs, Tensor(c!) broken, Tensor logits) -> ()");
    m.def("move_blocks(Tensor(a!) target, Tensor? target_ids, Tensor source, Tensor? source_ids, "
          "int max_thread_blocks=0) -> ()");
    m.def("naive_attention(Tensor(a!) out, Tensor query, Tensor key_cache, Tensor value_cache, Tensor block_tables, "
          "Tensor query_starts, Tensor context_lens, float scale) -> ()");
    m.def("plan_decode(Tensor(a!) plan, Tensor context_lens, int block_size, int heads, int kv_heads, int head_dim, "
          "Tensor like) -> ()");
    m.def("decode_attention(Tensor(a!) out, Tensor query, Tensor key_cache, Tensor value_cache, Tensor block_tables, "
          "Tensor context_lens, Tensor(b!) plan, Tensor(c!) scratch, float scale) -> ()");
    m.def("prefill_attention(Tensor(a!) out, Tensor query, Tensor key_cache, Tensor value_cache, Tensor block_tables, "
          "Tensor query_starts, Tensor context_lens, int max_query_len, float scale) -> ()");
    m.def("linear(Tensor(a!) out, Tensor x, Tensor weight, Tensor? bias, Tensor? norm_weight, Tensor? residual, "
          "float eps, bool silu) -> ()");
    m.def("linear_supports(Tensor x, int out_features, bool silu) -> bool");
    m.def("decode_plan_bytes(int num_rows) -> int");
    m.def("decode_scratch_bytes(int num_rows, int heads, int head_dim) -> int");
}

// For every device, so that tensors on the wrong one are refused in our words.
STABLE_TORCH_LIBRARY_IMPL(nanopd, CompositeExplicitAutograd, m) {
    m.impl("rms_norm", TORCH_BOX(&rms_norm_op));
    m.impl("silu_and_mul", TORCH_BOX(&silu_and_mul_op));
    m.impl("rope_and_store", TORCH_BOX(&rope_and_store_op));
    m.impl("embed", TORCH_BOX(&embed_op));
    m.impl("greedy_sample", TORCH_BOX(&greedy_sample_op));
    m.impl("move_blocks", TORCH_BOX(&move_blocks_op));
    m.impl("naive_attention", TORCH_BOX(&naive_attention_op));
    m.impl("plan_decode", TORCH_BOX(&plan_decode_op));
    m.impl("decode_attention", TORCH_BOX(&decode_attention_op));
    m.impl("prefill_attention", TORCH_BOX(&prefill_attention_op));
    m.impl("linear", TORCH_BOX(&linear_op));
    m.impl("linear_supports", TORCH_BOX(&linear_supports_op));
    m.impl("decode_plan_bytes", TORCH_BOX(&decode_plan_bytes_op));
    m.impl("decode_scratch_bytes", TORCH_BOX(&decode_scratch_bytes_op));
}
