# Chapter 03: paged attention on a GPU, from a naive kernel to the bandwidth limit. Rules for authors: nanopd.workbook.

# %% [markdown] lang="en"
# # 03 The CUDA kernel
#
# Chapter 02 decided *which* tokens run. Now we make them run fast. The reference attention is right, and on a GPU it is
# slow; in this chapter you take a first kernel of our own, ask why it is slow, and follow it, step by step, to the point
# where the memory itself is the limit and nothing is left to gain.
#
# It takes about an hour. The kernels are in `csrc/`, plain CUDA C++; `nanopd/paged_attention/` builds and calls them. With a
# GPU, every time below is measured on yours. **Without one the chapter runs too**: times then come from a recorded run, and
# every figure that was not measured here says so.

# %% [markdown] lang="zh" en_hash="625b3cb7"
# # 03 CUDA 内核
#
# 第 02 章决定了*哪些* token 来跑，这一章让它们跑得快。参考实现的注意力是对的，可在 GPU 上很慢。我们从自己写的第一版内核出发，
# 追问它为什么慢，一步一步往前改，直到瓶颈只剩下内存本身，再没有什么可榨的。
#
# 大约需要一个小时。内核在 `csrc/`，是不掺别的东西的 CUDA C++；`nanopd/paged_attention/` 负责编译和调用。有 GPU 的话，
# 下面的时间全都在你的 GPU 上实测。**没有 GPU 也能走完这一章**：时间取自在别处录得的数据，凡不是在这里量的，都会注明。

# %%
import random
import torch
import nanopd
from nanopd import widgets
from nanopd.paged_attention.ops import AttentionBatch, paged_attention
from nanopd.widgets.kernel_estimate import Shape, estimate
from nanopd.widgets.kernel_times import show_recorded
from nanopd.workbook import race

times = widgets.KernelTimes()
device = times.device
print(times.source, *times.conditions, sep="\n- ")
print(f"{device.num_sms} SMs, {device.bandwidth / 1e9:,.0f} GB/s, {device.peak_flops / 1e12:,.0f} TFLOP/s")

# %% [markdown] lang="en"
# ## 3.1 How long must it take?
#
# Sixty-four people are talking to Qwen3-8B, each with 1,024 tokens in the KV cache. In every decode step, each layer's
# attention has to look at all of it once: a key and a value for each token and KV head, 8 heads of 128 numbers of 2 bytes.
# **How many megabytes is that, for one layer? And how many microseconds must it take at the least, at the bandwidth printed
# above?**

# %% [markdown] lang="zh" en_hash="c9ae3715"
# ## 3.1 至少要多久？
#
# 六十四个人同时在和 Qwen3-8B 说话，每人的 KV 缓存里有 1,024 个 token。每走一步解码，每一层的注意力都得把这些从头到尾看一遍：
# 每个 token、每个 KV 头各有一个键和一个值，共 8 个头，每头 128 个数，每个数 2 字节。
# **一层一共是多少 MB？按上面打印的带宽，最少要多少微秒？**

# %%
guess = nanopd.predict("03.1", megabytes=..., microseconds=...)

# %%
shape = Shape(batch=64, context=1024, kv_heads=8, group=4, head_dim=128)
floor = shape.kv_bytes / device.bandwidth
guess.reveal(megabytes=shape.kv_bytes / 1e6, microseconds=floor * 1e6)
print(f"{shape.flops / shape.kv_bytes:.0f} operations a byte; the ridge is at {device.peak_flops / device.bandwidth:.0f}")

# %% [markdown] lang="en"
# That is the **floor**, and it came before any code. A query head does two operations with each number it reads, and four
# heads share each KV head, so there are four operations a byte: far left of the ridge (chapter 00). Decode attention is
# **memory-bound**, arithmetic is as good as free, and one figure tells how good a kernel is: which share of the bandwidth it
# reaches, counting every key and value **once**.
#
# ## 3.2 Through the block table, by hand
#
# The cache lies in blocks, anywhere (chapter 01). Blocks of 4 tokens, a table `[5, 2, 7]`, a context of 10: position 6 is in
# block `table[6 // 4]`, at `6 % 4`, so in slot 2 * 4 + 2 = 10. **In which slot is position 9, and how many slots of the three
# blocks hold nothing?**

# %% [markdown] lang="zh" en_hash="c40b8719"
# 这就是**下限**，一行代码没写就有了。查询头每读一个数要做两次运算，四个查询头共用一个 KV 头，合起来每字节四次运算：
# 远在拐点左边（第 00 章）。解码注意力是**访存受限**的，算力几乎白送。一个内核好不好，只看一个数：
# 每个键和值只计**一次**，它达到了带宽的百分之几。
#
# ## 3.2 顺着块表走一遍
#
# 缓存分成块，散落在各处（第 01 章）。设块大小为 4，块表是 `[5, 2, 7]`，上下文长 10：位置 6 在块 `table[6 // 4]` 的第 `6 % 4` 格，
# 也就是槽位 2 × 4 + 2 = 10。**位置 9 在哪个槽位？这三个块里，有几个槽位是空的？**

# %%
guess = nanopd.predict("03.2", slot_of_position_9=..., empty_slots=...)

# %%
table, block_size, context = [5, 2, 7], 4, 10
slots = [table[p // block_size] * block_size + p % block_size for p in range(context)]
print(slots)
guess.reveal(slot_of_position_9=slots[9], empty_slots=len(table) * block_size - context)

# %% [markdown] lang="en"
# The empty slots are not zero: nobody has written there, and what lies there may be NaN. A weight of 0 does not help, since
# 0 * NaN is NaN. They must not be touched at all.
#
# **Exercise 3.2.** Write decode attention for one sequence: gather its keys and values through the table, scores, softmax,
# weighted sum. Query head h reads KV head `h // group`, where `group` is query heads over KV heads.

# %% [markdown] lang="zh" en_hash="bfc5567d"
# 空槽位里不是零：那里没人写过，什么都可能有，包括 NaN。乘上权重 0 也没用，因为 0 × NaN 还是 NaN。这些槽位碰都不能碰。
#
# **练习 3.2** 给一条序列写出解码注意力：顺着块表收集键和值，算分数，softmax，加权求和。
# 查询头 h 读 KV 头 `h // group`，`group` 是查询头数除以 KV 头数。

# %% nbgrader={"grade_id": "ex-3-2", "solution": true}
def attend(query, key_cache, value_cache, block_table: list[int], context: int, scale: float):
    """query [heads, head_dim], caches [num_blocks, block_size, kv_heads, head_dim]. Returns [heads, head_dim]."""
    ### BEGIN SOLUTION
    size = key_cache.shape[1]
    slots = torch.tensor([block_table[p // size] * size + p % size for p in range(context)])
    group = query.shape[0] // key_cache.shape[2]
    keys, values = (cache.flatten(0, 1)[slots].repeat_interleave(group, 1) for cache in (key_cache, value_cache))
    weights = (torch.einsum("hd,shd->hs", query, keys) * scale).softmax(-1)
    return torch.einsum("hs,shd->hd", weights, values)
    ### END SOLUTION

# %% nbgrader={"grade_id": "check-3-2", "points": 2}
nanopd.check("03.2", attend)

# %% [markdown] lang="en"
# ## 3.3 A naive kernel
#
# `csrc/naive_attention.cu` is that function as one would first write it in CUDA: **a thread block for each row and query
# head**. Thread t multiplies key t of a tile with the query; after a barrier, thread d adds up number d of the values. It is
# right for any input, and it stays in the engine as a baseline.
#
# **For our 64 x 1,024 tokens: how many megabytes do its thread blocks ask for, all together? And which percentage of the
# bandwidth does it reach?** (The percentage counts the bytes of 3.1, as always.)

# %% [markdown] lang="zh" en_hash="8161616b"
# ## 3.3 朴素内核
#
# `csrc/naive_attention.cu` 就是把上面那个函数按最先想到的写法搬进 CUDA：**每一行、每个查询头一个线程块**。线程 t 负责把一段里的第 t 个键和查询相乘；
# 过一道屏障，线程 d 再把值的第 d 个数加权累加起来。什么输入它都算得对，也一直留在引擎里当基线。
#
# **还是 64 × 1,024 个 token：它的线程块一共要读多少 MB？达到带宽的百分之几？**（百分比照例按 3.1 的字节数算。）

# %%
guess = nanopd.predict("03.3", megabytes_asked_for=..., percent_of_bandwidth=...)

# %%
naive = estimate(shape, device, "naive")
times.table("naive", [1, 16, 64], [1024, 4096])
guess.reveal(megabytes_asked_for=naive.moved / 1e6, percent_of_bandwidth=times.percent("naive", shape))

# %% [markdown] lang="en"
# It asks for every key **four times**, once for each query head of the group. The cache (L2) catches many of the repeats, but
# not for free. The rest is in how it reads: neighbouring threads take neighbouring *keys*, which lie 2 KiB apart, so each
# load of a warp touches 32 places to use two bytes of each; and between its barriers all wait for the slowest. The memory
# sits idle while threads wait. Three cures, one after the other: ask once, keep all SMs busy, keep many bytes under way.
#
# ## 3.4 Ask once, then keep everybody busy
#
# **Grouped queries**: one thread block for each row and **KV head**, which holds all four queries and uses each key for all of
# them. That quarters the bytes. It also quarters the thread blocks. Now take a single user with 16,384 tokens: **how many SMs
# have any work? If an SM draws its fair share of the bandwidth at most, how many times the floor does it take?**

# %% [markdown] lang="zh" en_hash="42847254"
# 每个键它都要了**四遍**，组里每个查询头各一遍。L2 缓存能挡下不少重复，但不是白挡的。剩下的问题在读法：相邻的线程读的是相邻的*键*，
# 而相邻的键隔着 2 KiB，于是一个 warp 的每次加载要碰 32 个地方，每处只用两个字节；加上一道道屏障，人人都在等最慢的那个。
# 线程在等，内存就闲着。药方有三副，一副一副来：只读一遍，让所有 SM 都有活干，让足够多的字节同时在路上。
#
# ## 3.4 只读一遍，人人有活
#
# **分组查询**：每一行、每个 **KV 头**一个线程块，四个查询都放在里面，每个键读一次，四个查询都用上。字节数降到四分之一——
# 线程块的数目也降到四分之一。现在只有一个用户，上下文 16,384 个 token：**有几个 SM 有活干？
# 假设一个 SM 最多只能分到平均的那份带宽，耗时是下限的多少倍？**

# %%
guess = nanopd.predict("03.4", busy_sms=..., times_the_floor=...)

# %%
lone = Shape(batch=1, context=16384)
grouped = estimate(lone, device, "grouped")
guess.reveal(busy_sms=min(grouped.ctas, device.num_sms), times_the_floor=grouped.seconds / grouped.floor)

# %% [markdown] lang="en"
# (It is a model: while others idle, a real SM can draw more than its fair share, but by far not the whole.) The cure is
# **split-KV**: cut the context into splits of whole blocks, a thread block for each. But in how many? Thread blocks run in
# **waves** of one for each SM; a wave takes as long as its longest split. With 132 SMs and 8 KV heads, 16 splits make 128
# thread blocks: one wave. 17 make 136: a second wave for four stragglers.
#
# **Exercise 3.4.** The time is *waves* times *blocks of the longest split*. Return the number of splits, from 1 to
# `num_blocks`, for which it is least; of equals the smallest.

# %% [markdown] lang="zh" en_hash="c3d6859f"
# （这只是个模型：别的 SM 闲着的时候，真实的 SM 能拿到的比平均份额多一些，但离独占全部还差得远。）药方是 **split-KV**：把上下文切成几份，
# 每份是整数个块，各给一个线程块。可是切几份好？线程块一**波**一波地跑，每波每个 SM 一个；一波的时间由最长的那份决定。
# 132 个 SM、8 个 KV 头，切 16 份就是 128 个线程块，一波跑完；切 17 份是 136 个，为了四个掉队的又要多跑一波。
#
# **练习 3.4** 时间 = *波数* × *最长那份的块数*。切分数从 1 到 `num_blocks`，返回让时间最短的那个；并列时取最小的。

# %% nbgrader={"grade_id": "ex-3-4", "solution": true}
def best_splits(num_sms: int, batch: int, kv_heads: int, num_blocks: int) -> int:
    """Into how many splits to cut each row's `num_blocks` blocks."""
    ### BEGIN SOLUTION
    def cost(splits: int) -> int:
        waves = -(-batch * kv_heads * splits // num_sms)
        return waves * -(-num_blocks // splits)

    return min(range(1, num_blocks + 1), key=cost)
    ### END SOLUTION

# %% nbgrader={"grade_id": "check-3-4", "points": 2}
nanopd.check("03.4", best_splits)

# %% [markdown] lang="en"
# Play with it. Find a batch for which splitting does not help any more, and one for which it hurts. Hollow rings are the
# model's estimate; only stars are measured here, and diamonds were recorded elsewhere.

# %% [markdown] lang="zh" en_hash="6969b9b1"
# 动手玩一玩。找一个批大小，再切也没用了；再找一个，切了反而更慢。空心圆是模型的估计；星形才是在这里实测的，菱形是在别处录得的。

# %%
times.explorer(lone)

# %% [markdown] lang="en"
# ## 3.5 Splits must be merged
#
# Each split takes the softmax over its own keys only. Three keys have scores ln 1, ln 2 and ln 5 and values 12, 6 and 2. The
# whole: (1 * 12 + 2 * 6 + 5 * 2) / 8. Cut after the second key, the first split says (12 + 12) / 3 = 8, the second says 2.
# **What is the whole, and what would the plain mean of the two splits be?**

# %% [markdown] lang="zh" en_hash="4d91632f"
# ## 3.5 切开了还要合并
#
# 每一份只在自己的键上做 softmax。设三个键，分数是 ln 1、ln 2、ln 5，值是 12、6、2。整体结果是 (1 × 12 + 2 × 6 + 5 × 2) / 8。
# 在第二个键后面切一刀，第一份说 (12 + 12) / 3 = 8，第二份说 2。**整体是多少？两份直接取平均又是多少？**

# %%
guess = nanopd.predict("03.5", whole=..., mean_of_splits=...)

# %%
scores, values = torch.tensor([1.0, 2.0, 5.0]).log(), torch.tensor([12.0, 6.0, 2.0])
whole = scores.softmax(0) @ values
parts = [s.softmax(0) @ v for s, v in zip(scores.split([2, 1]), values.split([2, 1]))]
guess.reveal(whole=whole.item(), mean_of_splits=(sum(parts) / 2).item())

# %% [markdown] lang="en"
# A split must say how much weight it stands for: the sum of its exponentials, here 3 and 5. Then (3 * 8 + 5 * 2) / 8 is the
# whole again. Exponentials overflow, so a split reports their logarithm, the **log-sum-exp**, and whoever merges takes the
# largest off first.
#
# **Exercise 3.5.** Merge the outputs of S splits.

# %% [markdown] lang="zh" en_hash="2f9f5b92"
# 每一份都得说明自己占多少分量：指数之和，这里是 3 和 5。于是 (3 × 8 + 5 × 2) / 8，又回到整体。指数会溢出，所以各份报的是它的对数，
# 即 **log-sum-exp**；合并时先减去其中最大的。
#
# **练习 3.5** 合并 S 份的输出。

# %% nbgrader={"grade_id": "ex-3-5", "solution": true}
def merge(outputs: torch.Tensor, lses: torch.Tensor) -> torch.Tensor:
    """outputs [splits, heads, head_dim], log-sum-exps [splits, heads]. Returns [heads, head_dim]."""
    ### BEGIN SOLUTION
    weights = (lses - lses.max(0).values).exp()
    weights = weights / weights.sum(0)
    return (weights[..., None] * outputs).sum(0)
    ### END SOLUTION

# %% nbgrader={"grade_id": "check-3-5", "points": 2}
nanopd.check("03.5", merge)

# %% [markdown] lang="en"
# You have written a softmax over the log-sum-exps. Now the general case against the reference: a paged context of 100 tokens
# as one row, and cut into blocks 0-2, 3-4 and 5-6, each attended to alone, then merged.

# %% [markdown] lang="zh" en_hash="288587fc"
# 你写出来的，其实就是对 log-sum-exp 再做一次 softmax。下面换成一般情形，与参考实现比对：100 个 token 的分页上下文，
# 一次整行算；另一次切成块 0–2、3–4、5–6 三份，各算各的，再合并。

# %%
torch.manual_seed(3)
keys, values, query = torch.randn(9, 16, 2, 64), torch.randn(9, 16, 2, 64), torch.randn(1, 8, 64)
table = [4, 0, 7, 2, 8, 1, 5]
rows = [(table, 100), (table[:3], 48), (table[3:5], 32), (table[5:], 20)]  # the last block holds 4 tokens
whole, *outputs = (paged_attention(query, keys, values, AttentionBatch(
    torch.empty(0, dtype=torch.int64), torch.tensor([blocks]), [1], [length]), 0.125)[0] for blocks, length in rows)
lses = [torch.einsum("hd,shd->hs", query[0], keys[blocks].flatten(0, 1)[:length].repeat_interleave(4, 1)).mul(0.125).logsumexp(1)
        for blocks, length in rows[1:]]
merged = (torch.stack(lses).softmax(0)[..., None] * torch.stack(outputs)).sum(0)
print(f"largest difference: {(merged - whole).abs().max():.1e}")

# %% [markdown] lang="en"
# **Exercise 3.5b.** The same in CUDA. A thread block for each head, a thread for each of its numbers; every thread walks over the
# splits on its own, so no barrier is needed. Replace the two marked lines, between the braces, by C++. The check compiles it
# with `nvcc` and runs it on your GPU; without a GPU, the C++ compiler of this machine runs its threads one after the other.

# %% [markdown] lang="zh" en_hash="76cf5b56"
# **练习 3.5b** 用 CUDA 再写一遍。每个头一个线程块，头里的每个数一个线程；每个线程自己把各份走一遍，所以不需要屏障。
# 把花括号里标出的那两行换成 C++。检查会用 `nvcc` 编译，在你的 GPU 上运行；没有 GPU 时，就用这台机器的 C++ 编译器，让线程一个接一个地跑。

# %% nbgrader={"grade_id": "ex-3-5b", "solution": true}
merge_cuda = r"""
// out [heads, head_dim], outputs [heads, splits, head_dim], lses [heads, splits]
__global__ void merge_splits(float* out, const float* outputs, const float* lses, int splits) {
    int head = blockIdx.x, d = threadIdx.x, head_dim = blockDim.x;
    // ### BEGIN SOLUTION
    float largest = -INFINITY, total = 0, sum = 0;
    for (int s = 0; s < splits; ++s) largest = fmaxf(largest, lses[head * splits + s]);
    for (int s = 0; s < splits; ++s) {
        float weight = expf(lses[head * splits + s] - largest);
        total += weight;
        sum += weight * outputs[(head * splits + s) * head_dim + d];
    }
    out[head * head_dim + d] = sum / total;
    // ### END SOLUTION
}
"""

# %% nbgrader={"grade_id": "check-3-5b", "points": 3}
nanopd.check("03.5b", merge_cuda)

# %% [markdown] lang="en"
# ## 3.6 Near the limit
#
# A load takes its time to arrive. Say 600 ns. To draw the full bandwidth, so many bytes must be **under way** at any moment:
# bandwidth times latency. **How many kilobytes must each SM have on order, all the time?**

# %% [markdown] lang="zh" en_hash="f3aa7d1d"
# ## 3.6 逼近极限
#
# 一次加载要过一会儿才到货，就算 600 纳秒吧。要吃满带宽，任何时刻都得有这么多字节**在路上**：带宽乘以延迟。
# **每个 SM 时时刻刻要有多少 KB 的订单挂着？**

# %%
guess = nanopd.predict("03.6", kilobytes_per_sm=...)

# %%
guess.reveal(kilobytes_per_sm=device.bandwidth * 600e-9 / device.num_sms / 1e3)
times.table("split_kv", [1, 16, 64, 256], [1024, 4096, 16384])
peers = show_recorded("kernels", ["kernel", "batch", "context", "us", "share"], op="decode_attention", batch=64, context=4096)

# %% [markdown] lang="en"
# No thread can wait for that many loads in registers and compute as well. So `csrc/decode_attention.cu` orders its tiles with
# **asynchronous copies**, which land in shared memory while earlier tiles are still being worked on: a pipeline of several
# stages. A group of four queries is a small matrix, so scores and output are matrix products, done by the **tensor cores**; not
# for their speed, which nobody needs here, but because one instruction then replaces dozens, and the SM's schedulers have
# time to keep ordering. The splits are cut evenly over **all** rows, long or short, by a small plan kernel on the GPU, once a step;
# and whoever is the last to finish a row merges it, so that no second launch is needed.
#
# Small batches of short contexts stay below the limit: a few megabytes have been read before the pipeline is well filled. There
# the next section counts for more. (The last lines are a yardstick: FlashInfer, a library many engines use, on the same inputs.)
#
# ## 3.7 Around the kernel
#
# A decode step is not only attention. In plain torch, a layer of Qwen3-8B takes about 20 operations: norms, rope, additions,
# matrix products. The CPU launches each. **At `times.launch_us` microseconds a launch and 36 layers: how many milliseconds
# does launching alone take? And how long must the step take at least, which reads 15.1 GB of weights?**

# %% [markdown] lang="zh" en_hash="4d25e18c"
# 没有哪个线程能把这么多加载都攥在寄存器里等着，同时还要计算。所以 `csrc/decode_attention.cu` 用**异步拷贝**来订货：前面的还在算，
# 后面的已经往共享内存里落，这就是一条好几级的流水线。一组四个查询是个小矩阵，算分数、算输出就都是矩阵乘，交给 **Tensor Core**——
# 图的不是它快（这里用不上），而是一条指令顶几十条，SM 的调度器才腾得出手不停地订货。切分由 GPU 上一个小小的 plan 内核来定，
# 每步一次，把**所有**行不论长短均匀切开；一行由谁最后算完，就由谁顺手合并，不必再启动一个内核。
#
# 批小、上下文又短的时候，离极限还有距离：总共才几兆字节，流水线还没灌满就读完了。这种情形要看下一节。（最后几行是一把尺子：许多引擎都在用的库 FlashInfer，在同样的输入上。）
#
# ## 3.7 内核之外
#
# 一步解码不只有注意力。用朴素的 torch 写，Qwen3-8B 的一层大约要 20 个算子：归一化、旋转、加法、矩阵乘，每个都要 CPU 启动一次。
# **每次启动 `times.launch_us` 微秒，共 36 层：光是启动就要多少毫秒？而这一步要读 15.1 GB 权重，最少又要多少毫秒？**

# %%
print(f"{times.launch_us:.1f} us a launch")
guess = nanopd.predict("03.7", launching_ms=..., floor_ms=...)

# %%
guess.reveal(launching_ms=36 * 20 * times.launch_us / 1e3, floor_ms=15.14e9 / device.bandwidth * 1e3)

# %% [markdown] lang="en"
# Left alone, the GPU would wait for the CPU. Three answers, which you find in the engine:
#
# - **Fuse.** Query and key norm, rope and the store into the cache are one kernel (`rope_and_store`); where tokens are
#   few, norms, SiLU and the residual additions join the matrix products.
# - **CUDA graphs.** The launches of a whole step are recorded once, for each size of batch, and replayed as one. The kernels
#   read lengths and block tables from the GPU's memory, so the same graph serves the next step.
# - **Programmatic dependent launch.** A kernel may start while the one before it is still ending: it fetches what nobody writes
#   (its weights), then waits. The gap between two kernels is used instead of lost.

# %% [markdown] lang="zh" en_hash="e0f86d6d"
# 放着不管，就是 GPU 等 CPU。对策有三个，引擎里都能找到：
#
# - **融合。** 查询和键的归一化、旋转、写入缓存合成一个内核（`rope_and_store`）；token 少的时候，归一化、SiLU 和残差加法也都并进矩阵乘。
# - **CUDA Graph。** 整步的启动序列按批大小各录一次，之后一次性重放。长度和块表由内核从显存里读，所以同一张图下一步还能用。
# - **程序化依赖启动（PDL）。** 前一个内核还在收尾，后一个就可以先起来：先取谁也不会写的东西（权重），然后再等。
#   两个内核之间的空隙，就从浪费变成了利用。

# %%
if times.live:
    from nanopd.benchmark.serving import steady_decode
    small = dict(load_format="dummy", max_num_seqs=8, max_model_len=2048, num_gpu_blocks_override=512)
    for eager in (True, False):
        llm = nanopd.LLM("qwen3-0.6b", enforce_eager=eager, **small)
        print(f"enforce_eager={eager}: {steady_decode(llm.engine, 1, 512, 50).step_ms:.2f} ms a step (qwen3-0.6b, measured here)")
decodes = show_recorded("decode", ["model", "batch", "context", "ms", "floor_ms", "over_floor", "gpu_idle_share"])

# %% [markdown] lang="en"
# `over_floor` is the whole step over its floor: weights and KV cache read once (or multiplied with, where that takes longer). What
# is left above 1 is all that the engine could still gain, attention, matrix products and gaps together.
#
# ## 3.8 Prefill is the other animal
#
# A chunk of prompt brings many queries for the same keys. With n new tokens there are about 4n operations a byte. **From how
# many new tokens on is attention compute-bound on this device?**

# %% [markdown] lang="zh" en_hash="a86384a6"
# `over_floor` 是整步用时除以它的下限，也就是权重和 KV 缓存各读一遍的用时（乘法更慢的话，按乘法算）。比 1 多出来的部分，
# 就是引擎还能榨的全部：注意力、矩阵乘和间隙都在里面。
#
# ## 3.8 预填充是另一种动物
#
# 提示的一个分块，会带着许多查询来问同一批键。有 n 个新 token，每字节大约就有 4n 次运算。
# **在这台设备上，从多少个新 token 起，注意力就变成计算受限了？**

# %%
guess = nanopd.predict("03.8", new_tokens=...)

# %%
guess.reveal(new_tokens=device.peak_flops / device.bandwidth / shape.group)
chunks = times.prefill_rows()
print(times.source)
for row in chunks:
    print(f"{row['new']:>6,} new after {row['prefix']:>5,}: {row['kernel']:<18}{row['us']:>7,.0f} us, "
          f"{row['share']:.0%} of the matmul rate")

# %%
from nanopd.benchmark.floors import attention_flops

points = [(f"{kernel}, 64 × 1,024", shape.flops, shape.kv_bytes, times.seconds(kernel, shape))
          for kernel in ("naive", "split_kv") if times.seconds(kernel, shape)]
for row in chunks:
    if row["kernel"] == "engine" and row["prefix"] == 0:
        moved = (4096 + 16384) * row["new"]  # keys and values; queries and output
        points.append((f"prefill, {row['new']:,}", attention_flops(32, 128, row["new"]), moved, row["us"] / 1e6))
widgets.Roofline(device.peak_flops, device.bandwidth, points)

# %% [markdown] lang="en"
# So prefill has a kernel of its own, whose whole concern is to keep the tensor cores fed. The vendor's library, cuDNN, is very good
# at this on contiguous keys, and stands beside it above. (A recorded run says under its badge which version of our kernels it is
# of.) Where the library is quicker, why does the engine not call it? A paged prefix would have to be copied together first, and
# cuDNN plans anew for each length that it has not met, which takes far longer than the attention itself. For matrix products of
# more than a few tokens the library is quicker without such a price, and there the engine does call it. Measure, choose, and say
# what it costs: your own kernel is not better for being your own.
#
# ## 3.9 Break it
#
# Threads of a block run in warps of 32, in any order. Where one warp reads from shared memory what another has written, a
# barrier, `__syncthreads()`, must stand between. An earlier engine of this kind shipped without one. First on paper: four
# warps add up a row's softmax denominator; each has one turn before the barrier and one after. **Without the barrier, in how
# many of 200 random orders is the sum wrong?**

# %% [markdown] lang="zh" en_hash="8b1d054d"
# 所以预填充另有一个内核，一门心思让 Tensor Core 别饿着。键若连续存放，厂商的库 cuDNN 做这件事非常拿手，上面就有它的时间作对照。
# （录得的数据会在开头注明，测的是我们内核的哪个版本。）库更快的时候，引擎为什么不用它？分页的前缀得先拷到一起；
# 而且每遇到一个没见过的长度，cuDNN 都要重新做计划，比注意力本身慢得多。token 多过几个的矩阵乘，库更快，又没有这些代价，那里引擎就用库。
# 先测，再选，把代价说清楚：内核不会因为是自己写的就更好。
#
# ## 3.9 弄坏它
#
# 一个线程块里，线程每 32 个组成一个 warp，谁先谁后没有定数。一个 warp 写进共享内存的东西，另一个 warp 要读，中间就必须有一道屏障
# `__syncthreads()`。有个早先的同类引擎，发布时就漏了一道。先在纸上演一遍：四个 warp 一起求一行的 softmax 分母，
# 每个 warp 在屏障前走一步，屏障后走一步。**没有屏障的话，随机排 200 次顺序，有几次加出来是错的？**

# %%
guess = nanopd.predict("03.9", wrong_of_200=...)

# %%
def denominator(numbers: list[int], barrier: bool, rng: random.Random) -> int:
    parts, total = [0] * 4, []
    def warp(w: int):
        parts[w] = sum(numbers[w::4])
        yield  # here __syncthreads() ought to stand
        if w == 0:
            total.append(sum(parts))
    warps = [warp(w) for w in range(4)]
    turns = [*rng.sample(warps, 4), *rng.sample(warps, 4)] if barrier else rng.sample(warps * 2, 8)
    for turn in turns:
        next(turn, None)
    return total[0]

# %%
rng = random.Random(39)
wrong = {barrier: sum(denominator(list(range(40)), barrier, rng) != 780 for _ in range(200)) for barrier in (True, False)}
print(wrong)
guess.reveal(wrong_of_200=wrong[False])

# %% [markdown] lang="en"
# Now the real thing, on a GPU: eight warps, one row a thread block, thousands of rows. The toy drew its orders fairly; real warps
# are not fair, and how often it goes wrong depends on the device, the length of the rows and who else is running. That is what
# makes such a fault nasty: it may pass a thousand tests on one machine and fail on the next.

# %% [markdown] lang="zh" en_hash="22fccf13"
# 再到 GPU 上来真的：八个 warp，一个线程块负责一行，几千行。玩具程序排顺序是公平的，真实的 warp 可不讲公平：多久错一次，
# 要看设备、看行的长短、看旁边还有谁在跑。这种毛病难缠就难缠在这里：在一台机器上通过一千次测试，换一台就错。

# %%
print(race.RACY)
race.run(race.RACY)

# %% [markdown] lang="en"
# Staring at the code rarely finds it; a tool does. `compute-sanitizer --tool racecheck` watches every access to shared memory
# and reports two that no barrier keeps apart, also when the sum came out right by luck:

# %% [markdown] lang="zh" en_hash="10a61a2c"
# 光盯着代码看，很难看出来；得靠工具。`compute-sanitizer --tool racecheck` 盯住对共享内存的每一次访问，凡是没有屏障隔开的两次冲突访问，
# 哪怕这回碰巧算对了，也会报出来：

# %%
race.racecheck(race.RACY)

# %% [markdown] lang="en"
# It names both lines: the write of `parts` and the read of `parts`. One line mends it.

# %% [markdown] lang="zh" en_hash="15d83476"
# 它把两行都点了出来：写 `parts` 的那行，和读 `parts` 的那行。补上一行就好。

# %%
mended = race.RACY.replace("// a barrier belongs here", "__syncthreads();")
race.run(mended)
race.racecheck(mended)

# %% [markdown] lang="en"
# Whoever touches a kernel of the engine runs its tests under racecheck, and under memcheck, initcheck and synccheck as well. A
# barrier too many costs time; one too few costs answers.
#
# ## Where you are
#
# - Bytes over bandwidth is the floor, and known before any code (3.1). Attention finds its bytes through the block table (3.2).
# - Ask for every key once (3.3, 3.4); cut long contexts so that all SMs work, and merge by log-sum-exp (3.4, 3.5).
# - Keep enough bytes under way (3.6); launch little, replay graphs, overlap what is left (3.7).
# - Prefill is compute-bound and has a kernel of its own (3.8). A missing barrier is found by a tool, not by luck (3.9).
#
# The deep dive is `docs_en/03_cuda_kernel.md`. Next, chapter 04 turns such times into a model that predicts them.

# %% [markdown] lang="zh" en_hash="4aa79bd0"
# 谁动了引擎的内核，谁就要把它的测试放到 racecheck 下跑一遍，还有 memcheck、initcheck 和 synccheck。屏障多一道，费的是时间；少一道，赔的是答案。
#
# ## 现在到了哪里
#
# - 字节数除以带宽就是下限，一行代码没写就知道（3.1）。注意力顺着块表找到自己的字节（3.2）。
# - 每个键只要一遍（3.3、3.4）；把长上下文切开，让所有 SM 都有活，再用 log-sum-exp 合并（3.4、3.5）。
# - 让足够多的字节在路上（3.6）；少启动，重放 CUDA Graph，剩下的用重叠来藏（3.7）。
# - 预填充是计算受限的，另有自己的内核（3.8）。漏掉的屏障靠工具找，不靠运气（3.9）。
#
# 深入讲解见 `docs_zh/03_cuda_kernel.md`。下一章是 04，把这样的时间变成一个能预测它们的模型。
