# Chapter 00: what prefill and decode cost, and why one would want to keep them apart. Rules for authors: nanopd.workbook.

# %% [markdown] lang="en"
# # 00 Start here
#
# A language model answers in two phases. First it reads your whole prompt at once: **prefill**. Then it writes one
# token after another: **decode**. They run through the same weights, yet they are two different kinds of work, and
# most of what makes serving language models interesting follows from that.
#
# In this chapter you measure both on this machine, see them get in each other's way, put them on two workers, and
# break the result on purpose. Everything runs on the real engine with its embedded model, "tiny": 4.5 million
# parameters, made for this book, at home on any laptop. Allow 45 minutes.
#
# ## 0.1 What runs here?
#
# The doctor looks at the machine and says what nanoPD can do on it, and what to do about the rest. A row in yellow is
# no obstacle: every chapter has a way through without a GPU.

# %% [markdown] lang="zh" en_hash="96e528ad"
# # 00 从这里开始
#
# 语言模型回答问题分两个阶段。先把整个提示一口气读完：**预填充（prefill）**；再一个 token 接一个 token 地写：
# **解码（decode）**。两个阶段用的是同一份权重，干的却是两种性质完全不同的活——大模型推理服务里大部分有意思的事，
# 都由此而来。
#
# 这一章里，你会在自己的机器上把两个阶段都量一遍，看它们怎样互相妨碍，再把它们放到两个工作进程（Worker）上，
# 最后亲手把结果弄坏。
# 所有代码都跑在真正的引擎上，用的是内置模型 tiny：450 万参数，专为这本书训练，普通笔记本电脑就能跑。大约需要 45 分钟。
#
# ## 0.1 这台机器能跑什么？
#
# doctor 会检查这台机器，告诉你 nanoPD 在上面能做什么，做不了的又该怎么补。黄色的行不是障碍：没有 GPU，每一章也都走得通。（它的输出是英文，和命令行里的 `nanopd doctor` 一样。）

# %%
from rich.console import Console
from nanopd import doctor

Console(width=92).print(doctor.render(doctor.examine()))

# %% [markdown] lang="en"
# Now meet the model. It knows a few kinds of question, in English and Chinese, and nothing else. It is small, but it
# is honest: each code below is stated once, somewhere in the prompt, and can't be guessed. An engine that mixes up
# its memory gives wrong codes, and we will use that again and again.

# %% [markdown] lang="zh" en_hash="5974cc0e"
# 再来认识一下这个模型。它只会用中英文回答几类问题，别的一概不懂。它虽小，却很老实：下面每个密码都只在提示里出现过一次，
# 猜是猜不出来的。引擎只要把记忆弄混，密码就会答错——后面我们会反复利用这一点。

# %%
import statistics
import nanopd
from nanopd import LLM, Cluster, SamplingParams, widgets
from nanopd.tiny import demo_prompts, recall_prompt

llm = LLM("tiny", max_num_batched_tokens=4096, enable_prefix_caching=False)
here = "0" if llm.device.type == "cuda" else "cpu"  # as a topology writes it
greedy = SamplingParams(temperature=0, max_tokens=256)
tasks = demo_prompts()
for task, output in zip(tasks, llm.generate([task.prompt for task in tasks], greedy, use_tqdm=False)):
    print(f"... {task.prompt[-60:]}\n    -> {output.outputs[0].text}\n")

# %% [markdown] lang="en"
# ## 0.2 Reading against writing
#
# Every step of the engine leaves a record: how many tokens it ran, and how long it took. So we can ask the engine
# itself what the phases cost.
#
# **Reading a prompt of 1,024 tokens takes one step. Writing one token takes one step too. How many times longer is the
# first? And how much dearer is a written token than a read one?** Commit your two numbers.

# %% [markdown] lang="zh" en_hash="bf1d9b39"
# ## 0.2 读与写
#
# 引擎的每一步都会留下记录：跑了多少个 token，花了多长时间。所以两个阶段各要多少代价，直接问引擎就行。
#
# **读完 1,024 个 token 的提示要一步，写出一个 token 也要一步。前者的耗时是后者的多少倍？
# 平摊下来，写一个 token 的价钱又是读一个 token 的多少倍？** 先写下你的两个数。

# %%
guess = nanopd.predict("00.2", step_ratio=..., price_ratio=...)

# %%
def measure(prompt_len: int, num_written: int = 12) -> tuple[float, float]:
    """Seconds of the step that reads the prompt, and of a typical step that writes a token."""
    prompt = {"prompt_token_ids": [100 + i % 500 for i in range(prompt_len)]}
    first = llm.engine.num_steps
    params = SamplingParams(temperature=0, max_tokens=num_written, ignore_eos=True)
    llm.generate(prompt, params, use_tqdm=False)
    steps = [record.duration for record in llm.engine.history if record.step >= first]
    return steps[0], statistics.median(steps[1:])

measure(1024)  # the first time warms things up
read, write = measure(1024)
print(f"reading 1,024 tokens: {read * 1e3:.1f} ms    writing one: {write * 1e3:.1f} ms")
guess.reveal(step_ratio=read / write, price_ratio=write / (read / 1024))

# %% [markdown] lang="en"
# The prompt has 1,024 times as many tokens, and its step takes nowhere near 1,024 times as long. A token that is read
# together with others is cheap; a token that is written alone pays for the whole trip through the model. Let us see
# how the two prices move with the length of the prompt.

# %% [markdown] lang="zh" en_hash="32011ce3"
# 提示的 token 数是 1,024 倍，这一步的耗时却远远不到 1,024 倍。和别人一起读的 token 很便宜；独自写出来的 token，
# 要为穿过整个模型的这一趟付全价。再看看这两个价钱怎样随提示长度变化。

# %%
print(f"{'prompt':>8} {'read, ms':>10} {'us a token':>12} {'write, ms':>11}")
for length in (16, 64, 256, 1024, 2048):
    read, write = measure(length)
    print(f"{length:>8,} {read * 1e3:>10.1f} {read / length * 1e6:>12.1f} {write * 1e3:>11.1f}")

# %% [markdown] lang="en"
# Two rules to remember. Reading grows with the length, and a token of a long prompt costs less than one of a short
# prompt, until attention (which looks back at everything) makes very long prompts dearer again. Writing hardly cares
# how much has been read.
#
# ## 0.3 Why: operations and bytes
#
# By hand first. A layer of weights is a matrix; to run it, the device **moves** the matrix from memory once, and
# **computes** with it for every token in the step.
#
# - Operations: each parameter is multiplied and added once for each token, so 2 x parameters x tokens.
# - Bytes: each parameter is fetched once a step, however many tokens share it.
#
# Their quotient, operations for each byte moved, is the **arithmetic intensity**. A device has a quotient of its own:
# peak operations a second over bytes a second. Work below it waits for memory (**memory-bound**), work above it waits
# for arithmetic (**compute-bound**).
#
# **Exercise 0.3.** Write the intensity of a step, counting weights alone.

# %% [markdown] lang="zh" en_hash="5c2e7ec9"
# 记住两条规律。读的耗时随长度增长，而长提示平摊到每个 token 的价钱低于短提示——直到注意力（它要回看前面的一切）
# 让特别长的提示重新变贵。写的耗时则几乎与前面读了多少无关。
#
# ## 0.3 为什么：算多少，搬多少
#
# 先用笔算。一层权重就是一个矩阵；要跑这一层，设备得把矩阵从内存里**搬**出来一次，再为这一步里的每个 token **算**一遍。
#
# - 运算量：每个参数对每个 token 各做一次乘法和一次加法，共 2 × 参数量 × token 数。
# - 字节数：每个参数每步只取一次，不管有多少 token 共用它。
#
# 两者之商，即每搬一个字节要做多少次运算，叫**算术强度**。设备也有自己的一个商：峰值运算速率除以内存带宽。
# 强度低于它，活儿就在等内存（**访存受限**）；高于它，就在等运算（**计算受限**）。
#
# **练习 0.3** 写出一步的算术强度，只计权重。

# %% nbgrader={"grade_id": "ex-0-3", "solution": true}
def intensity(num_params: int, bytes_per_param: int, num_tokens: int) -> float:
    """Operations for each byte of weights moved, in a step that runs `num_tokens` tokens."""
    ### BEGIN SOLUTION
    operations = 2 * num_params * num_tokens
    moved = num_params * bytes_per_param
    return operations / moved
    ### END SOLUTION

# %% nbgrader={"grade_id": "check-0-3", "points": 1}
nanopd.check("00.3", intensity)

# %% [markdown] lang="en"
# The parameters cancel: in 16-bit weights, a step of one token has intensity 1 **for a model of any size**, and a step
# of 1,024 tokens has 1,024. A modern GPU wants several hundred. So decode leaves nearly all its arithmetic idle, and
# prefill leaves its memory bandwidth idle. That is the whole reason for this book.
#
# Now your device: two small measurements give its roof.

# %% [markdown] lang="zh" en_hash="54ff63db"
# 参数量约掉了：16 位权重下，一步只跑一个 token 时，**不管多大的模型**强度都是 1；一步跑 1,024 个 token，强度就是 1,024。
# 而现代 GPU 要几百才吃得饱。所以解码时算力几乎全闲着，预填充时内存带宽几乎全闲着——这本书就是为此而写的。
#
# 再看你的设备：两次小测量，就能画出它的屋顶。

# %%
import time
import torch

def best_seconds(work, repeats: int = 5) -> float:
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        work()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return min(times)

# %%
dtype = next(llm.engine.runner.model.parameters()).dtype
side = 8192 if llm.device.type == "cuda" else 1024
matrix = torch.randn(side, side, device=llm.device).to(dtype)
memory = torch.randn(2**28 if llm.device.type == "cuda" else 2**25, device=llm.device)
copy = torch.empty_like(memory)
peak_flops = 2 * side**3 / best_seconds(lambda: matrix @ matrix)
bandwidth = 2 * memory.nbytes / best_seconds(lambda: copy.copy_(memory))  # read and written
print(f"{peak_flops / 1e9:,.0f} GFLOP/s, {bandwidth / 1e9:,.0f} GB/s,",
      f"ridge at {peak_flops / bandwidth:.0f} FLOP a byte")

# %%
num_params = sum(p.numel() for p in llm.engine.runner.model.parameters())
weights = num_params * dtype.itemsize
read, write = measure(1024)
points = [("decode × 1", 2 * num_params, weights, write),
          ("prefill × 1,024", 2 * num_params * 1024, weights, read)]
widgets.Roofline(peak_flops, bandwidth, points)

# %% [markdown] lang="en"
# Decode stands far to the left, under the slope; prefill far to the right, under the flat roof. **How far below the roof
# they stand is a fact about this engine on this machine**, and worth being honest about: tiny's weights fit in a
# CPU's cache and its layers are so small that the cost of *starting* each operation, not of moving bytes, rules its
# decode. For an 8-billion-parameter model the bytes rule. Arithmetic alone gives the floor of its decode step:

# %% [markdown] lang="zh" en_hash="81256f0e"
# 解码远在左边，位于斜坡之下；预填充远在右边，位于平顶之下。**它们离屋顶有多远，取决于这个引擎和这台机器**，
# 这一点要说实话：tiny 的权重装得进 CPU 缓存，每一层又小，所以左右它解码速度的是*启动*每个算子的开销，而不是搬字节。
# 换成 80 亿参数的模型，就是字节说了算了。写一个 token 至少要多久，用纸笔就能算出来：

# %%
from nanopd.models.loader import load_spec

spec = load_spec("qwen3-8b")  # its shape; no weights are fetched
billions, datasheet = 8.19, {"RTX 4090": 1008e9, "H100 SXM": 3350e9, "H200": 4800e9}  # bytes/s
for name, rate in datasheet.items():
    print(f"{name:>9}: a token of Qwen3-8B takes {billions * 1e9 * 2 / rate * 1e3:.1f} ms at the least")

# %% [markdown] lang="en"
# ## 0.4 In each other's way
#
# Somebody's answer is streaming along, one token every few milliseconds. Now a stranger sends a prompt of 3,000 tokens to
# the same engine. **By what factor does the longest pause between two tokens of the first answer grow?** And if the
# engine reads the stranger's prompt in chunks of 256 tokens instead?

# %% [markdown] lang="zh" en_hash="3ffe2881"
# ## 0.4 互相妨碍
#
# 有人的回答正在一个字一个字往外流，每隔几毫秒一个 token。这时一个陌生人给同一个引擎发来 3,000 个 token 的提示。
# **第一个回答里，相邻两个 token 之间最长的停顿会变成平时的多少倍？** 如果引擎改成分块来读，每次只读 256 个 token 呢？

# %%
guess = nanopd.predict("00.4", whole_prompt=..., chunks_of_256=...)

# %%
def longest_pause(chunk: int | None) -> tuple[float, LLM]:
    """A long prompt arrives while an answer streams: the longest step over the typical one before."""
    busy = LLM("tiny", max_num_batched_tokens=4096, prefill_chunk_size=chunk, enable_prefix_caching=False)
    answer = busy.submit("What is 47+35?", SamplingParams(temperature=0, max_tokens=40, ignore_eos=True))
    while busy.engine.num_steps < 15:
        busy.step()
    busy.submit({"prompt_token_ids": [100 + i % 500 for i in range(3000)]}, SamplingParams(max_tokens=4))
    answer.result()
    steps = [record.duration for record in busy.engine.history][1:]  # the first one warms up
    return max(steps) / statistics.median(steps[:14]), busy

# %%
whole, _ = longest_pause(None)
chunked, busy = longest_pause(256)
guess.reveal(whole_prompt=whole, chunks_of_256=chunked)

# %%
widgets.BatchTimeline(busy.engine.history, token_budget=4096)

# %% [markdown] lang="en"
# That is **interference**. Each tall bar is a chunk of the stranger's prompt, and the thin one beside it, in the same
# step, is the token that had to wait for it. Chunks make the pause shorter and more frequent; they don't make it go
# away, and every chunk delays the stranger's first token a little. Chapter 02 builds this scheduler.
#
# **Exercise 0.4.** A step may run `budget` tokens. `num_decoding` sequences each take one of them first. Into which chunks
# is a prompt of `prompt_len` tokens cut?

# %% [markdown] lang="zh" en_hash="85cfad0d"
# 这就是**干扰**。每根高条是陌生人提示的一个分块；同一步里，旁边那根细条就是不得不等它的那个 token。
# 分块让停顿变短、变密，但不会让它消失；而且每多一个分块，陌生人的首个 token 就晚一点。第 02 章会把这个调度器搭出来。
#
# **练习 0.4** 一步最多跑 `budget` 个 token，`num_decoding` 条正在解码的序列先各占一个。
# 一个 `prompt_len` 个 token 的提示会被切成怎样的几个分块？

# %% nbgrader={"grade_id": "ex-0-4", "solution": true}
def plan_chunks(prompt_len: int, budget: int, num_decoding: int) -> list[int]:
    """The lengths of the prompt's chunks, in order."""
    ### BEGIN SOLUTION
    room = budget - num_decoding
    whole, rest = divmod(prompt_len, room)
    return [room] * whole + ([rest] if rest else [])
    ### END SOLUTION

# %% nbgrader={"grade_id": "check-0-4", "points": 2}
nanopd.check("00.4", plan_chunks)

# %% [markdown] lang="en"
# ## 0.5 Two workers, and what must travel
#
# The other way out: let one worker only read and another only write. **Disaggregation.** Nobody's decode waits for
# a stranger's prefill any more. But the writer needs what the reader has worked out: for every token of the prompt, in
# every layer, a key and a value for each KV head. That is the **KV cache**, and now it has to travel.
#
# **How many kilobytes does tiny's KV cache of a 1,000-token prompt take? And Qwen3-8B's, in megabytes?** Tiny has 5
# layers, 2 KV heads of 64 numbers, 4 bytes each; Qwen3-8B 36 layers, 8 heads of 128, 2 bytes.

# %% [markdown] lang="zh" en_hash="dd6acc1b"
# ## 0.5 两个工作进程，以及路上要运的东西
#
# 还有另一条出路：让一个工作进程只管读，另一个只管写。这就是**分离**。从此谁的解码都不必等陌生人的预填充了。
# 可是写的那个需要读的那个算出来的东西：提示的每个 token，在每一层的每个 KV 头上，都有一个键和一个值。
# 这就是 **KV 缓存**，现在它得上路了。
#
# **1,000 个 token 的提示，tiny 的 KV 缓存占多少 KB？Qwen3-8B 的又占多少 MB？**
# tiny 有 5 层、2 个 KV 头、每头 64 个数、每个数 4 字节；Qwen3-8B 有 36 层、8 个头、每头 128 个数、每个数 2 字节。

# %%
guess = nanopd.predict("00.5", tiny_kilobytes=..., qwen3_8b_megabytes=...)

# %%
cluster = Cluster("tiny", topology=f"P:{here} D:{here}", mode="disaggregated", dtype="float32")
cache = cluster.workers["P0"].cache
tiny_bytes = cache.bytes_per_block // cache.block_size * 1000
guess.reveal(tiny_kilobytes=tiny_bytes / 1e3, qwen3_8b_megabytes=spec.kv_bytes_per_token(2) * 1000 / 1e6)

# %% [markdown] lang="en"
# **Exercise 0.5.** Write it down in general. `spec` has `num_layers`, `num_kv_heads` and `head_dim`.

# %% [markdown] lang="zh" en_hash="89a41ba2"
# **练习 0.5** 把它写成通式。`spec` 里有 `num_layers`、`num_kv_heads` 和 `head_dim`。

# %% nbgrader={"grade_id": "ex-0-5", "solution": true}
def kv_bytes(spec, num_tokens: int, bytes_per_element: int) -> int:
    """Bytes of the KV cache of `num_tokens` tokens."""
    ### BEGIN SOLUTION
    per_layer = 2 * spec.num_kv_heads * spec.head_dim  # a key and a value
    return num_tokens * spec.num_layers * per_layer * bytes_per_element
    ### END SOLUTION

# %% nbgrader={"grade_id": "check-0-5", "points": 1}
nanopd.check("00.5", kv_bytes)

# %% [markdown] lang="en"
# What does the trip cost? Bytes over bandwidth. Change `link` to what joins your GPUs (about 25 GB/s for PCIe 4.0 in
# practice, several hundred for NVLink), and compare with the time to read such a prompt. The slower the link, the
# less disaggregation can win. Chapter 05 measures it instead of dividing.

# %% [markdown] lang="zh" en_hash="d27ffc5a"
# 这趟路要花多少时间？字节数除以带宽。把 `link` 改成你那几块 GPU 之间的带宽（PCIe 4.0 实际约 25 GB/s，
# NVLink 有几百 GB/s），再和读完这样一个提示的时间比一比。链路越慢，分离就越难赢。第 05 章不靠除法，直接实测。

# %%
link = 25e9  # bytes a second
for length in (512, 2048, 8192):
    travelling = spec.kv_bytes_per_token(2) * length
    print(f"{length:>6,} tokens: {travelling / 1e6:>7,.0f} MB, {travelling / link * 1e3:>6.1f} ms on the way")

# %% [markdown] lang="en"
# Now both pipelines on the same prompts. Collocated, one worker does everything. Disaggregated, P0 reads and D0 writes,
# and each layer's blocks leave as soon as the layer has run. The answers must agree token by token.

# %% [markdown] lang="zh" en_hash="6b38a20d"
# 现在让两条流水线处理同样的提示。混部时，一个工作进程包办一切；分离时，P0 读、D0 写，每一层算完，
# 那一层的块就立刻出发。两边的回答必须逐个 token 一致。

# %%
prompts = [task.prompt for task in tasks]
with Cluster("tiny", topology=f"C:{here}", mode="collocated", dtype="float32") as collocated:
    together = collocated.generate(prompts, greedy, use_tqdm=False)
apart = cluster.generate(prompts, greedy, use_tqdm=False)
same = [a.outputs[0].token_ids == b.outputs[0].token_ids for a, b in zip(together, apart)]
print("same tokens:", same)
timeline = cluster.timeline(apart[0].request_id)
for what, when in timeline.marks:
    print(f"{(when - timeline.marks[0][1]) * 1e3:8.1f} ms  {what}")

# %%
widgets.BatchTimeline({name: worker.engine.history for name, worker in cluster.workers.items()})

# %% [markdown] lang="en"
# P0 has nothing but tall bars, D0 nothing but thin ones. On one device this is no faster, and can't be: two workers share
# it, and the transfer is extra work. What you see here is the *mechanism*. Whether it pays depends on the
# load, the prompts and the link, and chapters 04 to 07 measure exactly that, including where it loses.
#
# ## 0.6 Break it
#
# A prompt's KV has arrived on D0, in blocks of 16 tokens. Before the decode starts we play two tricks on it, eight
# questions each.
#
# - **Swap**: the block with the code that was asked for changes places with the first block. Every byte is still there.
# - **Lose**: the first block is copied over it. One block of 16 tokens, out of some thirty, is gone.
#
# **How many of the eight answers are still right, each time?** One of the two may surprise you.

# %% [markdown] lang="zh" en_hash="862d42b3"
# P0 上全是高条，D0 上全是细条。在同一个设备上，这样不会更快，也不可能更快：两个工作进程分的是同一份算力，传输还是额外的活。
# 你在这里看到的是*机制*。划不划算，要看负载、提示和链路；第 04 到 07 章量的正是这个，包括它什么时候输。
#
# ## 0.6 弄坏它
#
# 提示的 KV 已经到了 D0，按每块 16 个 token 放着。在解码开始之前，我们对它动两种手脚，各问八个问题。
#
# - **对调**：存着所问密码的那一块，和第一块互换位置。每个字节都还在。
# - **丢失**：用第一块的内容把它盖掉。三十来块里丢了一块，也就是 16 个 token。
#
# **两种情况下，八个回答里各还有几个是对的？** 其中一个可能会出乎你的意料。

# %%
guess = nanopd.predict("00.6", right_after_swap=..., right_after_loss=...)

# %%
def ask(task, trick) -> bool:
    """Ask on the disaggregated pipeline; tamper with D0's cache between the transfer and the decode."""
    stream = cluster.submit(task.prompt, greedy)
    d0 = cluster.workers["D0"]
    while not d0.engine.scheduler.running:  # D0 has adopted the blocks, and written nothing yet
        cluster.step()
    ahead = task.prompt.index("=" + task.answer + ";") + len(task.answer)
    position = len(cluster.tokenizer(task.prompt[:ahead])["input_ids"])
    table = d0.manager.block_table(d0.engine.scheduler.running[0].group.live[0])
    d0.cache.copy_blocks(trick(table[0], table[position // 16]))
    return stream.result().outputs[0].text == task.answer

# %%
def swap(first: int, asked: int) -> list[tuple[int, int]]:
    return [(first, asked), (asked, first)]

def lose(first: int, asked: int) -> list[tuple[int, int]]:
    return [(first, asked)]

cluster = Cluster("tiny", f"P:{here} D:{here}", "disaggregated", dtype="float32", enable_prefix_caching=False)
questions = [recall_prompt(seed, 480, "en") for seed in range(60, 68)]
guess.reveal(right_after_swap=sum(ask(question, swap) for question in questions),
             right_after_loss=sum(ask(question, lose) for question in questions))

# %% [markdown] lang="en"
# A swapped block does no harm at all! Attention looks at a **set** of keys and values, and each key had its position
# turned into it (that is what rotary embedding does) before it was stored. Where in memory it lies is of no account;
# that is why paging works in the first place, as chapter 01 shows. (The order does matter for prefix caching, where a
# block stands for *which tokens in a row*.)
#
# A lost block is another matter: the digits of the code were there and nowhere else. No crash, no warning, a fluent
# wrong number. A model with random weights would have hidden it, since its gibberish is as good as any other; this
# is why the embedded model was trained, and why every path of the engine is tested on its answers.
#
# ## Where you are
#
# - Prefill computes, decode moves bytes: the same weights, an intensity a thousand times apart (0.3).
# - Together they interfere; chunks soften that (0.4). Apart, the KV cache must travel (0.5).
# - A wrong block makes a wrong answer, silently (0.6).
#
# Each of the chapters to come builds up one package of `nanopd/`. Next is 01, the block manager: where those blocks live, who
# may write to them, and when they are free.

# %% [markdown] lang="zh" en_hash="d4e98d19"
# 对调居然毫发无伤！注意力看的是键和值的**集合**，而每个键在存进去之前，位置就已经旋进它里面了（旋转位置编码做的正是这件事）。
# 它躺在内存的哪个角落并不要紧；分页之所以行得通，道理就在这里，第 01 章会细说。
# （顺序对前缀缓存倒是要紧的：在那里，一个块代表*依次是哪些 token*。）
#
# 丢一块就是另一回事了：密码的那几位数字只在那里，别处没有。没有崩溃，没有警告，只有一个流畅的错误数字。
# 换成随机权重的模型，这个错就藏住了，反正它说的都是胡话，哪句都差不多。所以我们才专门训练了内置模型，
# 引擎的每条路径都要拿它的回答来检验。
#
# ## 现在到了哪里
#
# - 预填充忙着算，解码忙着搬：同一份权重，算术强度相差上千倍（0.3）。
# - 放在一起会互相干扰，分块能缓和（0.4）；分开之后，KV 缓存就得上路（0.5）。
# - 一个块错了，答案就错，而且悄无声息（0.6）。
#
# 后面的每一章，都会搭出 `nanopd/` 里的一个包。下一章是 01，块管理器：那些块住在哪里，谁能往里写，什么时候算空闲。

# %%
cluster.shutdown()
