# Chapter 04: the cost model. Five numbers, measured and fitted; why they are wrong; the model that is used instead. Rules for
# authors: nanopd.workbook.

# %% [markdown] lang="en"
# # 04 The cost model
#
# A request comes in. Shall one GPU read its prompt and write its answer, or shall one read and another write? Whoever is to
# decide that needs two numbers before anything has run: what it takes here, and what it takes there. In this chapter you
# **measure** this machine, **fit** a formula with five parameters to it, **predict**, and are **wrong**. Then you take the
# model that is wrong by less, and find a fault in the first that no error message would ever have shown.
#
# It takes about an hour, and all of it runs on a CPU. The code is in `nanopd/cost_model/`: `seed.py` is the formula,
# `analytical.py` the model, `fit.py` finds its constants.

# %% [markdown] lang="zh" en_hash="2750da95"
# # 04 代价模型
#
# 来了一个请求。是让一块 GPU 既读提示又写回答，还是一块读、另一块写？要做这个决定，得在什么都没跑之前先有两个数：在这里要多久，
# 在那里要多久。这一章里，你要**测量**这台机器，给它**拟合**一个五参数公式，拿去**预测**，然后**发现错了**。
# 接着换上一个错得少一些的模型，并在前一个里揪出一个毛病——它永远不会报错。
#
# 大约需要一个小时，全部在 CPU 上就能跑。代码在 `nanopd/cost_model/`：`seed.py` 是那个公式，`analytical.py` 是真正用的模型，
# `fit.py` 负责求出它的常数。

# %%
import random
import time
from dataclasses import replace
from datetime import datetime, timezone
import nanopd
from nanopd import LLM, SamplingParams, widgets
from nanopd.cost_model.analytical import CostModel, Shape, StepWork, attended_pairs
from nanopd.cost_model.measurements import DecodeRow, Measurements, MixedRow, PrefillRow, TransferRow
from nanopd.cost_model.profile import Profile
from nanopd.cost_model.seed import fit_seed, seed_preset

# %% [markdown] lang="en"
# ## 4.1 Five numbers
#
# The system that this project began from (we call it the seed) decides by five numbers, measured at start:
#
# | | |
# |---|---|
# | `alpha` | reading a prompt of L tokens takes alpha × L |
# | `beta`, `batch_thresh` | a step that writes a token for each of B sequences takes beta × max(1, B / batch_thresh) |
# | `gamma` | a collocated prompt costs gamma × L × min(load, batch_thresh) / batch_thresh more, by interference with the load |
# | `bandwidth` | a disaggregated prompt costs L × bytes of a token / bandwidth more, to move its KV cache |
#
# Strike out what both paths have in common, and the length L with it. What is left is a rule: **disaggregate when
# gamma / transfer_rate > batch_thresh / load**, where transfer_rate is the time to move one token.
#
# For Qwen3-8B (147,456 bytes a token) it published, for RTX 4090s: gamma 0.0869 ms, 12.9 GB/s; for H20s: gamma 0.1302 ms,
# 392 GB/s; batch_thresh 16 on both. **With pencil and paper: gamma / transfer_rate on each? And from which load on does
# each disaggregate?**

# %% [markdown] lang="zh" en_hash="ea9786c8"
# ## 4.1 五个数
#
# 本项目的起点是早先的一个系统（下面叫它 Seed）。它在启动时测五个数，靠它们做决定：
#
# | | |
# |---|---|
# | `alpha` | 读 L 个 token 的提示，要 alpha × L |
# | `beta`、`batch_thresh` | 给 B 条序列各写一个 token 的一步，要 beta × max(1, B / batch_thresh) |
# | `gamma` | 混部时，提示与负载互相干扰，另加 gamma × L × min(load, batch_thresh) / batch_thresh |
# | `bandwidth` | 分离时，要搬 KV 缓存，另加 L × 每 token 字节数 / bandwidth |
#
# 两条路径共有的部分划掉，长度 L 也跟着约掉，剩下的就是一条规则：**gamma / transfer_rate > batch_thresh / load 时分离**，
# 其中 transfer_rate 是搬一个 token 的时间。
#
# 对 Qwen3-8B（每 token 147,456 字节），它公布的数是：RTX 4090，gamma 0.0869 毫秒，12.9 GB/s；H20，gamma 0.1302 毫秒，392 GB/s；
# 两者 batch_thresh 都是 16。**请用纸笔算：两种卡的 gamma / transfer_rate 各是多少？各从多大的负载起选择分离？**

# %%
guess = nanopd.predict("04.1", ratio_4090=..., load_4090=..., ratio_h20=..., load_h20=...)

# %%
for name, gamma_ms, gb_s in (("rtx-4090", 0.0869, 12.9), ("h20", 0.1302, 392)):
    transfer_ms = 147_456 / (gb_s * 1e9) * 1e3
    ratio = gamma_ms / transfer_ms
    print(f"{name}: {gamma_ms} ms / {transfer_ms:.6f} ms = {ratio:.1f}; load must exceed 16 / {ratio:.1f} = {16 / ratio:.2f}")
rtx, h20 = seed_preset("rtx-4090"), seed_preset("h20")
guess.reveal(rtx.gamma_over_transfer_rate, rtx.crossover_load, h20.gamma_over_transfer_rate, h20.crossover_load)

# %% [markdown] lang="en"
# 7.6 and 346; load 3, and any load at all. The slow link of the 4090s (a relay through pinned memory) is what holds them
# back. Below is the same with all the sliders. Take the load up and down, and then the prompt's length. **Which of the five
# parameters, besides gamma and bandwidth, moves the border between blue and red?** And why does the border run straight across?

# %% [markdown] lang="zh" en_hash="0654b7ec"
# 7.6 和 346；负载 3，以及任何负载。拖住 4090 的是它那条慢链路（锁页内存中转）。下面是同一个公式，配上了全部滑块。先把负载推高、拉低，
# 再动提示长度。**除了 gamma 和带宽，五个参数里还有哪一个能移动红蓝之间的边界？** 边界又为什么是一条横线？

# %%
widgets.CostModelExplorer()

# %% [markdown] lang="en"
# Only batch_thresh. Alpha and beta are in both bars, and the length scales both of what differs, so it can make the gain
# larger but never turn it round. Mind that: a formula in which the length of the prompt does not matter.
#
# **Exercise 4.1.** Write the rule.

# %% [markdown] lang="zh" en_hash="8270b0c6"
# 只有 batch_thresh。alpha 和 beta 两条路径上都有；而有差别的两项都与长度成正比，所以长度能让差距变大，却不能让它掉头。
# 记住这一点：在这个公式里，提示多长无关紧要。
#
# **练习 4.1** 写出这条规则。

# %% nbgrader={"grade_id": "ex-4-1", "solution": true}
def prefers_disaggregated(gamma_ms: float, bandwidth_gb_s: float, batch_thresh: float, bytes_per_token: float, load: int) -> bool:
    """Whether the seed sends a request through both GPUs. `bandwidth_gb_s`: 1e9 bytes a second."""
    ### BEGIN SOLUTION
    transfer_ms = bytes_per_token / (bandwidth_gb_s * 1e9) * 1e3
    return gamma_ms / transfer_ms * load > batch_thresh
    ### END SOLUTION

# %% nbgrader={"grade_id": "check-4-1", "points": 1}
nanopd.check("04.1", prefers_disaggregated)

# %% [markdown] lang="en"
# ## 4.2 Reading
#
# Now to this machine. The engine keeps a record of each step, with its rows and its duration, so measuring is mostly a
# matter of arranging steps of the right kind. Each is taken several times, and **the quickest counts**: whatever else runs
# here can make a step slower, never faster.
#
# **How many times as long as a prompt of 64 tokens does one of 1,024 take?** The formula says 16.

# %% [markdown] lang="zh" en_hash="5373e826"
# ## 4.2 读
#
# 现在轮到这台机器。引擎的每一步都有记录：有哪些行，用了多久。所以测量这件事，主要就是安排出合适的步来。每种测几遍，**取最快的一遍**：
# 机器上别的程序只会让一步变慢，不会让它变快。
#
# **1,024 个 token 的提示，耗时是 64 个 token 的几倍？** 公式说是 16 倍。

# %%
guess = nanopd.predict("04.2", times_as_long=...)

# %%
llm = LLM("tiny", device="cpu", dtype="float32", max_num_batched_tokens=2048, max_num_seqs=64)
draw = random.Random(4)

def fresh(length: int) -> list[int]:
    return draw.choices(range(300, 1600), k=length)

def submit(prompt: list[int], tokens: int):
    return llm.submit({"prompt_token_ids": prompt}, SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True))

def quickest(rows) -> tuple:
    """Of rows that differ in nothing but their seconds, the one with the fewest."""
    return tuple({replace(row, seconds=1.0): row for row in sorted(rows, key=lambda row: -row.seconds)}.values())

# %%
def read_alone(length: int) -> PrefillRow:
    submit(fresh(length), 1).result()
    return PrefillRow(llm.engine.history[-1].duration, length, 0)

read_alone(64)  # the very first step of a process is slow
lengths = (16, 32, 64, 128, 256, 512, 768, 1024)
prefill = sorted(quickest(read_alone(length) for _ in range(3) for length in lengths), key=lambda row: row.new_tokens)
for row in prefill:
    print(f"{row.new_tokens:>5} tokens {row.seconds * 1e3:8.1f} ms {row.seconds / row.new_tokens * 1e6:8.1f} us a token")
took = {row.new_tokens: row.seconds for row in prefill}
guess.reveal(took[1024] / took[64])

# %% [markdown] lang="en"
# Look at the last column. If alpha were a constant, so would it be. It falls first: a step has a **floor**, the work that is
# there however few tokens there are. Then it rises: each token looks at all those before it, so that attention is
# **quadratic**. (On a CPU, where attention is plain torch and computes the masked half too, you see that within 1,000 tokens.) A
# straight line through zero can be right in the middle, if at all.
#
# ## 4.3 Writing
#
# Next, steps that only decode. A trick makes them cheap to arrange: all sequences get the **same** prompt, so that the prefix
# cache reads it once. **How many times as long as a step of 1 sequence is one of 16, at 32 tokens of context? And with 16
# sequences, how many times as long is a step at 1,024 tokens of context as one at 32?** Beta says: 1 up to batch_thresh, and 1.

# %% [markdown] lang="zh" en_hash="89d474a3"
# 看最后一列。alpha 若真是常数，这一列就该不变。可它先降：每步都有一块**地板**，token 再少也要干的活。然后又升：每个 token 都要看它前面的所有 token，
# 所以注意力是**二次**的。（CPU 上的注意力是普通的 torch 实现，连被掩掉的那一半也算了，所以一千个 token 之内就看得出来。）
# 一条过原点的直线，顶多只能在中间对上。
#
# ## 4.3 写
#
# 接下来是只有解码的步。有个省事的办法：让所有序列用**同一个**提示，前缀缓存只要读一遍。**上下文 32 个 token 时，16 条序列的一步是 1 条的几倍？
# 同样 16 条，上下文 1,024 的一步又是 32 的几倍？** beta 说：不超过 batch_thresh 就是 1 倍；后一问，也是 1 倍。

# %%
guess = nanopd.predict("04.3", batch_16_over_1=..., context_1024_over_32=...)

# %%
def share(prompt: list[int], batch: int, tokens: int) -> list:
    """`batch` sequences after the same prompt, all of them decoding."""
    submit(prompt, 1).result()
    streams = [submit(prompt, tokens) for _ in range(batch)]
    llm.step()
    return streams

# %%
def write_together(batch: int, context: int) -> DecodeRow:
    streams, start = share(fresh(context), batch, 7), llm.engine.num_steps
    for stream in streams:
        stream.result()
    steps = [step for step in llm.engine.history if step.step >= start and len(step.rows) == batch]
    step = min(steps, key=lambda step: step.duration)
    return DecodeRow(step.duration, batch, float(batch * context))

# %%
cells = [(batch, context) for context in (32, 256, 1024) for batch in (1, 2, 4, 8, 16, 32) if batch * context <= 16384]
decode = quickest(write_together(*cell) for _ in range(2) for cell in cells)
step_ms = {(row.decodes, row.context_tokens / row.decodes): row.seconds * 1e3 for row in decode}
for context in (32, 256, 1024):
    print(f"context {context:>4}:", *(f"{step_ms[batch, context]:7.1f}" for batch, at in cells if at == context), "ms")
guess.reveal(step_ms[16, 32] / step_ms[1, 32], step_ms[16, 1024] / step_ms[16, 32])

# %% [markdown] lang="en"
# To the right the batch grows, downwards the context. The first effect is in the formula, after a fashion: flat, then
# proportional. The second is missing. On a GPU too, every step reads every key and value of every sequence once.
#
# **Exercise 4.3.** Fit alpha and beta by least squares: the numbers with the smallest sum of squared differences, over all rows,
# between what is predicted and what was measured. `batch_thresh` is given. (Hint: both are slopes of a line through 0, and the
# slope is Σ x·y / Σ x·x. Of what is x in the second?)

# %% [markdown] lang="zh" en_hash="ed9bc828"
# 往右是批变大，往下是上下文变长。前一个效应公式里算是有：先平，再成正比。后一个根本没有。可就算在 GPU 上，每一步也要把每条序列的每个键和值都读一遍。
#
# **练习 4.3** 用最小二乘法拟合 alpha 和 beta：让所有行上预测与实测之差的平方和最小的那两个数。`batch_thresh` 已给定。
# （提示：两者都是过原点直线的斜率，斜率等于 Σ x·y / Σ x·x。问题是，第二条直线的 x 是什么？）

# %% nbgrader={"grade_id": "ex-4-3", "solution": true}
def fit_alpha_and_beta(prefill: list[PrefillRow], decode: list[DecodeRow], batch_thresh: float) -> tuple[float, float]:
    """alpha in seconds a token, beta in seconds."""
    ### BEGIN SOLUTION
    def slope(points: list[tuple[float, float]]) -> float:
        return sum(x * y for x, y in points) / sum(x * x for x, _ in points)

    return (slope([(row.new_tokens, row.seconds) for row in prefill]),
            slope([(max(1, row.decodes / batch_thresh), row.seconds) for row in decode]))
    ### END SOLUTION

# %% nbgrader={"grade_id": "check-4-3", "points": 2}
nanopd.check("04.3", fit_alpha_and_beta)

# %% [markdown] lang="en"
# ## 4.4 Beside each other, and across
#
# Two are left. The **bandwidth** is simple: move some blocks from one cache into another. **gamma** is what a prompt does to
# those that decode. So let some sequences decode, let a prompt come in, take the step in which both run, and subtract what a
# step takes without the prompt. Divide by the prompt's length. That is how the seed did it.
#
# **How many times alpha is that?** (16 sequences decode; the prompt has 512 tokens.)

# %% [markdown] lang="zh" en_hash="96e7b9cf"
# ## 4.4 并排，与过河
#
# 还剩两个。**带宽**简单：从一个缓存往另一个缓存搬些块。**gamma** 是一个提示对正在解码的序列做了什么。那就让几条序列解码，来一个提示，
# 取两者同在的那一步，减去没有提示时一步的时间，再除以提示长度。Seed 就是这么做的。
#
# **这样得到的数是 alpha 的几倍？**（16 条序列在解码，提示 512 个 token。）

# %%
guess = nanopd.predict("04.4", gamma_over_alpha=...)

# %%
def read_beside(length: int, batch: int, context: int) -> MixedRow:
    streams = share(fresh(context), batch, 6)
    submit(fresh(length), 1).result()
    step = llm.engine.history[-1]
    for stream in streams:
        stream.result()
    return MixedRow(step.duration, length, 0, batch, float(batch * context))

beside = [(length, *batch) for length in (128, 256, 512, 1024) for batch in ((4, 64), (16, 64), (16, 256))]
mixed = quickest(read_beside(*cell) for _ in range(2) for cell in beside)
prefill = quickest([*prefill, *map(read_alone, lengths)])  # once more: the machine may have been busier before
both = next(row.seconds for row in mixed if (row.new_tokens, row.context_tokens) == (512, 16 * 256))
guess.reveal((both - step_ms[16, 256] / 1e3) / next(row.seconds for row in prefill if row.new_tokens == 512))

# %%
from nanopd.widgets.transfer_times import measure_here

block_bytes = 16 * llm.spec.kv_bytes_per_token(4)
sent = [(point.num_blocks * block_bytes, point.gb_s) for point in measure_here("peer")]
transfer = tuple(TransferRow(size / (gb_s * 1e9), "cpu", "cpu", "peer", size) for size, gb_s in sent)
measured = Measurements(tuple(prefill), decode, mixed, transfer)
five = fit_seed(measured, llm.spec.kv_bytes_per_token(4))
print(five)
print(f"gamma / transfer rate = {five.gamma_over_transfer_rate:.1f}: disaggregate from load {five.crossover_load}")

# %% [markdown] lang="en"
# There they are, the five numbers of this machine. Keep the ratio in mind that you have just seen: what the prompt did to the
# others is, per token, **about what reading it takes** (more or less, as quiet as your machine was). We shall come back to it.
#
# ## 4.5 Predict, and be wrong
#
# Eight sequences decode after prompts of 256 tokens. A request comes in: 600 tokens of prompt, 16 of answer, collocated. The
# five numbers give its time from arrival to end. **How many times what is then measured is it?**

# %% [markdown] lang="zh" en_hash="fe6d38b4"
# 这台机器的五个数都齐了。刚才看到的那个比值，请先记住：提示给别人添的时间，摊到每个 token 上，**和读它自己的时间差不多**
# （多一点还是少一点，要看你的机器当时忙不忙）。后面还会回到这里。
#
# ## 4.5 预测，然后出错
#
# 八条序列正在解码，提示各 256 个 token。来了一个请求：提示 600 个 token，回答 16 个，混部。五个数可以算出它从到达到结束的时间。
# **它是随后实测值的几倍？**

# %%
guess = nanopd.predict("04.5", predicted_over_measured=...)

# %%
def serve_among(load: int, length: int, output: int) -> float:
    """Seconds from a request's arrival to its end."""
    others = share(fresh(256), load, output + 8)
    start = time.perf_counter()
    submit(fresh(length), output).result()
    seconds = time.perf_counter() - start
    for stream in others:
        stream.result()
    return seconds

cases = [(8, 600, 16), (2, 100, 32), (16, 1024, 8)]
served = {case: min(serve_among(*case) for _ in range(2)) for case in cases}
guess.reveal(five.collocated_seconds(600, 16, batch=9, load=8) / served[8, 600, 16])

# %%
here = datetime.now(timezone.utc).isoformat(timespec="seconds")
from nanopd.benchmark.environment import device_facts, versions

profile = Profile.of(measured, Shape(llm.spec.num_layers, llm.spec.kv_bytes_per_token(4)), device=device_facts(on_cpu=True)["cpu"],
                     model="tiny", dtype="float32", date=here, versions=versions())
widgets.CostModelExplorer(profile)

# %% [markdown] lang="en"
# Filled diamonds were measured, open circles are what the five numbers say about the very same steps. Nobody asks for
# perfection here. But look at **how** they are wrong: at both ends of the prompts, at short contexts and at long ones, and in
# the third plot nearly all in one direction. Errors that have a shape are not noise; they are a term that is missing, or one too many.
#
# ## 4.6 A model of a step
#
# Think of a step instead of a request. A step takes the longer of two times: a **floor** that depends on no token (reading the
# weights, launching), and what its tokens **compute**. On hardware that does both at once, the shorter hides behind the longer;
# where one thread does all, they add up. One more number, the **sharpness** s, lets the measurement say which: (a^s + b^s)^(1/s),
# a sum at s = 1 and a maximum when s is large. Contexts come on top: attention waits for the layer before it.
#
# By hand: floor 5 ms, 25 µs a sequence, 36 ns a token of context; 256 sequences, contexts of 1,000. With sharpness 1 that is
# 5 + 6.4 + 9.2 = 20.6 ms; with a sharpness so large that it is a maximum, 6.4 + 9.2 = 15.6 ms.
#
# **Exercise 4.6.** Write it: a roofline in the batch, and the contexts on top.

# %% [markdown] lang="zh" en_hash="808f7a3d"
# 实心菱形是实测，空心圆是五个数对同样这些步的说法。这里没人要求完美。但请看它们**怎么错**：提示的两头都错，短的上下文和长的上下文也都错，
# 第三张图里更是几乎全往一边倒。有形状的误差不是噪声，而是少了一项，或者多了一项。
#
# ## 4.6 一步的模型
#
# 不看请求，改看一步。一步的时间，取两者中较长的：一块与 token 无关的**地板**（读权重、启动内核），和 token 的**计算**。
# 两件事能同时做的硬件上，短的藏在长的后面；只有一个线程时，两者相加。再加一个数，**锐度** s，让测量自己来说是哪一种：(a^s + b^s)^(1/s)，
# s = 1 是求和，s 很大就是取最大值。上下文另加：注意力要等前面的计算。
#
# 笔算一遍：地板 5 毫秒，每条序列 25 微秒，每个上下文 token 36 纳秒；256 条序列，上下文各 1,000。锐度为 1 时是
# 5 + 6.4 + 9.2 = 20.6 毫秒；锐度大到等于取最大值时，是 6.4 + 9.2 = 15.6 毫秒。
#
# **练习 4.6** 写出来：对批大小是一条屋顶线，上下文另加。

# %% nbgrader={"grade_id": "ex-4-6", "solution": true}
def decode_step_seconds(decodes: int, context_tokens: float, floor: float, per_sequence: float, per_context_token: float,
                        sharpness: float) -> float:
    """`context_tokens`: of all sequences together. All constants in seconds, but for the sharpness, which has no unit."""
    ### BEGIN SOLUTION
    compute = decodes * per_sequence
    return (floor**sharpness + compute**sharpness) ** (1 / sharpness) + context_tokens * per_context_token
    ### END SOLUTION

# %% nbgrader={"grade_id": "check-4-6", "points": 2}
nanopd.check("04.6", decode_step_seconds)

# %% [markdown] lang="en"
# A prompt's compute has a part for each token and one for each **pair** of a token and one that it looks at: 4 tokens make
# 1 + 2 + 3 + 4 = 10 pairs (`attended_pairs`). A step with a prompt *and* decodes is one pass over all of its tokens. Nothing is
# added for interference, because nothing happens twice. But the pass has constants of its own: on a GPU, a worker that decodes
# has queued the step before the last one has ended, while a lone prompt waits for its launch, so that a short one may take
# longer *without* company. `fit` finds the constants by relative error, says how sure it is of each, and predicts every row once
# by a fit that has not seen it. `Profile.of`, above, has called it already:

# %% [markdown] lang="zh" en_hash="bc2b8111"
# 提示的计算量有两部分：每个 token 一份，每一**对**“token 与它要看的 token”一份。4 个 token 有 1 + 2 + 3 + 4 = 10 对（`attended_pairs`）。
# **既有**提示**又有**解码的一步，就是带着所有 token 过一遍模型。干扰不用另加，因为没有哪件事做了两遍。不过这一遍有自己的一组常数：
# 在 GPU 上，正在解码的 Worker 不等上一步结束，就已经把下一步排好了；单独一个提示却要等内核启动。所以短提示**没有**同伴时反而可能更慢。
# `fit` 按相对误差求常数，说出每个常数有多大把握，并且每一行都由一次没见过它的拟合预测过一遍。上面的 `Profile.of` 已经调用过它了：

# %%
print("pairs of 4 tokens:", attended_pairs(4), "and of 1,024:", attended_pairs(1024))
for found in profile.fits:
    print(f"\n{found.quantity}: held-out error {found.held_out_median_error:.1%} in the median, {found.held_out_p95_error:.1%} at p95")
    for name, (low, high) in found.intervals.items():
        print(f"  {name:<24} between {low:.3g} and {'no bound' if high is None else f'{high:.3g}'}")
explorer = widgets.CostModelExplorer(profile)
explorer.show(model="fitted", prompt=512, output=16, load=8)
explorer

# %% [markdown] lang="en"
# Switch between the two models with the buttons, and watch the circles. Then watch the map: its border is no straight line any
# more. The orange bar is new. It is what the request costs **the others**, all of them together. And the bottom row is blue:
# with nobody beside it a prompt disturbs nobody, and the transfer is paid for nothing.
#
# Back to the three requests of 4.5, now by both:

# %% [markdown] lang="zh" en_hash="7ba41f50"
# 用按钮在两个模型之间切换，看圆圈怎么动。再看热图：边界不再是一条横线。橙色那一条是新的，它是这个请求让**其他序列**等的时间，合在一起。
# 最下面一行是蓝色：旁边没有人，提示就打扰不到谁，传输的钱白花了。
#
# 回到 4.5 的三个请求，这回两个模型都来算：

# %%
print("others  prompt  answer   measured   five numbers   fitted model")
for (load, length, output), seconds in served.items():
    by_five = five.collocated_seconds(length, output, batch=load + 1, load=load)
    request = profile.cost.request(length, 0, output - 1, StepWork(decodes=load, context_tokens=load * 256))
    by_model = request.prefill_seconds + request.decode_seconds
    print(f"{load:>6} {length:>7} {output:>7} {seconds * 1e3:>7.0f} ms {by_five / seconds:>13.2f}x {by_model / seconds:>13.2f}x")

# %% [markdown] lang="en"
# A factor of 1 would be perfect. The fitted model is not, either, least of all on a machine that has other things to do:
# we kept the quickest of several steps, which is what a quiet machine does, and a request of many steps meets the average. Then
# all factors are below 1. A profile is as good as the hour in which it was made. `nanopd profile` measures a machine in one go and writes the rows and the
# fit to a file; `profile_cluster` does the same to a running cluster. Give it some seconds:

# %% [markdown] lang="zh" en_hash="84d0fd53"
# 比值为 1 才算完美。拟合模型也做不到，机器忙着别的事时更是如此：我们留下的是几步里最快的一步，那是机器清闲时的样子，
# 而一个请求要走很多步，碰上的是平均水平，这时各个比值都小于 1。一份 Profile 有多准，要看测它的那一个小时。`nanopd profile` 一次测完一台机器，
# 把测量数据和拟合结果写进文件；`profile_cluster` 对正在运行的集群做同样的事。给它几秒钟：

# %%
from nanopd import Cluster
from nanopd.cost_model.profiler import profile_cluster

with Cluster("tiny", "C:cpu P:cpu D:cpu", dtype="float32", max_num_batched_tokens=2048) as cluster:
    at_once = profile_cluster(cluster, seconds=12)
for found in at_once.fits:
    print(f"{found.quantity:<32} {len(found.errors):>3} rows, held-out error {found.held_out_median_error:.1%} in the median")

# %% [markdown] lang="en"
# ## 4.7 A GPU, from what was recorded
#
# Now a real one: an NVIDIA H200 with Qwen3-8B, recorded by `nanopd bench decode`, `prefill` and `transfer`. Numbers first, by
# hand. Of its 8.19 billion parameters, 0.62 are the input embedding, which is looked up and not multiplied; the other 7.57
# billion are read in every step, 2 bytes each. A token of context has 147,456 bytes. Memory gives about 4,470 GB/s. **What
# would be the floor of a decode step, in ms? How many ns does a token of context take?** And a prompt: 24 µs a token, floor
# 9 ms. **How many tokens long must it be before its length matters more than the floor?**

# %% [markdown] lang="zh" en_hash="71565693"
# ## 4.7 一块 GPU 的记录
#
# 来看真家伙：NVIDIA H200 上的 Qwen3-8B，数据由 `nanopd bench decode`、`prefill` 和 `transfer` 录得。先动笔。它有 81.9 亿个参数，
# 其中 6.2 亿是输入嵌入，只查表，不参与乘法；其余 75.7 亿每一步都要读，每个 2 字节。一个上下文 token 有 147,456 字节。显存大约给 4,470 GB/s。
# **解码步的地板该是多少毫秒？一个上下文 token 该花多少纳秒？** 再看提示：每 token 24 微秒，地板 9 毫秒。**提示要多少个 token，长度才比地板更要紧？**

# %%
guess = nanopd.predict("04.7", floor_ms=..., context_token_ns=..., prompt_tokens=...)

# %%
from nanopd.benchmark.results import RECORDED
from nanopd.cost_model.presets import from_results
from nanopd.models.spec import load_spec

h200 = from_results(RECORDED / "nvidia-h200", "qwen3-8b", load_spec("qwen3-8b"))
reading, writing = h200.cost.prefill, h200.cost.decode
print(f"{h200.device}, {h200.model}, {h200.dtype}:", *h200.notes, sep="\n  ")
guess.reveal(writing.floor_seconds * 1e3, writing.context_token_seconds * 1e9, reading.floor_seconds / reading.token_seconds)
decode_fit = next(found for found in h200.fits if found.quantity == "decode")
print("what a sequence adds, in seconds:", decode_fit.intervals["sequence_seconds"], "from", len(h200.measurements.decode), "rows")

# %% [markdown] lang="en"
# By hand: 15.1 GB / 4,470 GB/s = 3.4 ms, 33 ns, and 375 tokens; your own measure of the memory's limit and the fit are of the
# same size, and the fit is above the limit, as it has to be. The last line is the most honest of all: **from nothing to
# unbounded**. In the recorded rows, large batches have long contexts together, so nobody can tell what a sequence costs from what
# its context does. No statistics mend that. Only other measurements do: batches of one size with several contexts, as you made
# above, and `nanopd profile` makes.
#
# ## 4.8 Break it
#
# One fault is left to find, and it is built into what you fitted yourself in 4.4. Here is your profile once more, by the five
# numbers. Look at the third plot: what is charged for a step with a prompt beside decodes, against what the step took. **Take
# the gamma slider down until the circles lie on the diamonds. Which share of the fitted gamma is left?**

# %% [markdown] lang="zh" en_hash="473145ae"
# 笔算：15.1 GB / 4,470 GB/s = 3.4 毫秒，33 纳秒，375 个 token。显存的极限和拟合的结果在同一个量级，而且拟合值在极限之上，本该如此。
# 最后一行最老实：**从零到无上界**。录下来的数据里，批大的时候上下文也长，谁也分不清哪些时间是序列花的、哪些是上下文花的。
# 这一点什么统计方法都救不了，只能换一批测量：批大小相同、上下文不同，就像你上面做的那样；`nanopd profile` 也是这样做的。
#
# ## 4.8 弄坏它
#
# 还有一个毛病没找到，它就藏在你自己在 4.4 拟合的东西里。下面还是你的 Profile，用五个数来预测。看第三张图：提示与解码同在一步时，
# 公式收多少钱，这一步实际花了多少。**把 gamma 滑块往下拉，直到圆圈落在菱形上。拟合出来的 gamma 还剩几分之几？**

# %%
guess = nanopd.predict("04.8", share_of_gamma_left=...)
broken = widgets.CostModelExplorer(profile)
broken.show(prompt=512, output=16, load=16)
broken

# %%
from statistics import median

def error_with(gamma_ms: float) -> float:
    broken.show(gamma_ms_per_token=gamma_ms)
    return median(map(abs, broken.errors("mixed")))

shares = [2**-k for k in range(9)]
errors = {share: error_with(five.gamma_ms_per_token * share) for share in shares}
for share, error in errors.items():
    print(f"gamma x {share:<10.4g} median error of a mixed step {error:6.1%}")
broken.show(gamma_ms_per_token=five.gamma_ms_per_token)
guess.reveal(min(errors, key=errors.get))

# %% [markdown] lang="en"
# Little is left of it, as a rule nothing worth mentioning. What happened? gamma was measured on a step that **holds the prompt**.
# Less a step of decodes, what remains is mostly the reading of the prompt itself. And that has been paid already: by alpha. A
# collocated request pays for its prefill twice, the disaggregated one once.
#
# And yet the number is not false. It answers **another question**. "How long do I take?" is alpha's. "How long do the others
# wait for me?" is gamma's, and they do wait for all of it. But then it is *their* time, and each of them waits, so it grows with
# their number without end, not up to batch_thresh. The fitted model keeps both apart: `prefill_seconds` is yours,
# `delay_by_prefill_seconds` each of theirs.
#
# Mend the seed by taking out the surplus, and gamma is close to nothing: then it would hardly ever disaggregate, since nobody
# speaks for those who wait. Two faults that cancel, as long as nobody mends one of them. **Exercise 4.8.** Return both numbers
# for a prompt that is read in one step: what it takes, and by how much each that decodes is held up. Charge nothing twice.

# %% [markdown] lang="zh" en_hash="570249f0"
# 剩不下多少，通常可以忽略。怎么回事？测 gamma 的那一步里**就有提示本身**。减去一步解码之后，剩下的大部分正是读提示的时间。而这笔钱已经付过了：alpha 付的。
# 混部的请求为预填充付了两遍，分离的只付一遍。
#
# 不过这个数本身没有错，它回答的是**另一个问题**。“我要多久？”归 alpha 管；“别人要为我等多久？”才归 gamma 管，而他们确实要等上全程。
# 但那是**他们的**时间，而且人人都等，所以它随人数一直涨，不会到 batch_thresh 就封顶。拟合模型把两者分开记：`prefill_seconds` 是自己的，
# `delay_by_prefill_seconds` 是其他人每人的。
#
# 若是把多收的部分扣掉，gamma 就所剩无几，Seed 于是几乎从不分离，因为没有谁替等着的人说话。两个错互相抵消，只要没人去修其中一个。
# **练习 4.8** 设提示一步读完，返回两个数：它自己要多久，每条正在解码的序列被耽误多久。一样也别收两遍。

# %% nbgrader={"grade_id": "ex-4-8", "solution": true}
def own_and_delay(model: CostModel, prompt: StepWork, running: StepWork) -> tuple[float, float]:
    """Seconds. `prompt` is what reading it adds to a step; `running` are the decodes that go on beside it."""
    ### BEGIN SOLUTION
    together = model.step_seconds(running + prompt)
    return together, together - model.step_seconds(running)
    ### END SOLUTION

# %% nbgrader={"grade_id": "check-4-8", "points": 2}
nanopd.check("04.8", own_and_delay)

# %% [markdown] lang="en"
# ## Where you are
#
# - Five numbers decide, and the prompt's length is not among what matters to them (4.1).
# - Floors, pairs, contexts: what five numbers leave out has a shape, and the shape tells the term (4.2 to 4.5).
# - A step takes the longer of floor and compute, as sharply as measured, and the contexts on top (4.6).
# - A fit says what it does not know. Rows that vary together can't be told apart by any fit (4.7).
# - Whose time is it? A cost that was measured in one place and charged in another is charged twice (4.8).
#
# What none of this contains is **waiting**: a queue before the worker that reads, blocks that are not free, a link in use. And it
# compares one GPU with two: whether two pay is asked per GPU, in chapter 07. The deep dive is `docs_en/04_cost_model.md`. Chapter
# 05 builds the second path; in chapter 06 a router weighs both by this model, with the queues, and with an answer whose length
# nobody knows yet.

# %% [markdown] lang="zh" en_hash="3f014f5e"
# ## 现在到了哪里
#
# - 五个数做决定，而提示长度不在它们关心的事情里（4.1）。
# - 地板、token 对、上下文：五个数漏掉的东西有形状，看形状就知道漏的是哪一项（4.2 到 4.5）。
# - 一步的时间，取地板与计算中较长的，锐度由测量来定，上下文另加（4.6）。
# - 拟合会说出自己不知道什么。总是一起变的量，哪种拟合也分不开（4.7）。
# - 是谁的时间？在一处测、在另一处收的代价，会收两遍（4.8）。
#
# 这里完全没有的，是**等待**：读的 Worker 前面排着队，块没有空闲，链路被占着。而且比的是一块 GPU 和两块 GPU：两块划不划算，要按每块 GPU 来问，
# 那是第 07 章的事。深入讲解见 `docs_zh/04_cost_model.md`。第 05 章搭起第二条路径；到第 06 章，路由器用这个模型掂量两条路，还要算上排队，
# 以及一个谁也不知道有多长的回答。
