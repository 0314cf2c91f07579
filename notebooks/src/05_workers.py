# Chapter 05: workers. Messages, leases, transfers, processes, and what happens when one dies. Rules for authors: nanopd.workbook.

# %% [markdown] lang="en"
# # 05 Workers
#
# One GPU reads prompts, another writes answers. It sounds like an afternoon's work: send the KV cache over, go on there.
# Then the questions come. Who may write into whose blocks, and when? What if the client hangs up while the bytes are on
# their way? What if the machine that writes dies in the middle of a sentence? In this chapter you drive two workers **by
# hand**, message by message; then you let processes do it; then you kill one.
#
# It takes about an hour, and all of it runs on a CPU. The code is in `nanopd/messages.py`, `nanopd/workers/` and
# `nanopd/router/central_scheduler.py`.

# %% [markdown] lang="zh" en_hash="8911006c"
# # 05 Worker
#
# 一块 GPU 读提示，另一块写回答。听起来一个下午就能写完：把 KV 缓存发过去，在那边接着跑就是了。可问题跟着就来了：谁可以往谁的块里写，什么时候写？
# 字节还在路上，客户端挂断了怎么办？负责写的那台机器，一句话写到一半死了怎么办？这一章里，你先**亲手**给两个 Worker 递消息，一条一条推着它们走；
# 再把这件事交给进程；最后杀掉其中一个。
#
# 大约需要一个小时，全部在 CPU 上就能跑。代码在 `nanopd/messages.py`、`nanopd/workers/` 和 `nanopd/router/central_scheduler.py`。

# %%
import inspect
from statistics import median
import nanopd
from nanopd import Cluster, SamplingParams, widgets
from nanopd.core import PlanRow, Request, Sequence
from nanopd.messages import Cancel, Destination, Prefill, Prefilled, ReleaseLease, Reserve, Resume, Written
from nanopd.tiny import demo_prompts, recall_prompt
from nanopd.workers.transfer import Arrived, Transfer
from nanopd.workers.worker import Worker

greedy = SamplingParams(temperature=0, max_tokens=60)

# %% [markdown] lang="en"
# ## 5.1 Two phases, one worker
#
# Four answers are streaming. A prompt of 1,400 tokens comes in and is read in one go. **Of the worker that writes: how many
# times as long as its usual step is its longest one, if it reads the prompt itself? And if another worker does?**

# %% [markdown] lang="zh" en_hash="8011fe5d"
# ## 5.1 两个阶段，一个 Worker
#
# 四个回答正在往外流，这时来了一个 1,400 token 的提示，一口气读完。只看负责写的那个 Worker：**如果提示由它自己读，它最长的一步是平常一步的几倍？
# 如果由另一个 Worker 读呢？**

# %%
guess = nanopd.predict("05.1", collocated=..., disaggregated=...)

# %%
def longest_step(topology: str, mode: str, writer: str) -> float:
    with Cluster("tiny", topology, mode, dtype="float32", max_num_batched_tokens=2048, enable_prefix_caching=False) as cluster:
        writing = SamplingParams(temperature=0, max_tokens=50, ignore_eos=True)
        answers = [cluster.submit(task.prompt, writing) for task in demo_prompts()[:4]]
        for _ in range(15):
            cluster.step()
        cluster.submit({"prompt_token_ids": list(range(100, 1500))}, SamplingParams(max_tokens=1)).result()
        for answer in answers:
            answer.result()
        steps = [step.duration for step in cluster.workers[writer].engine.history]
        return max(steps[1:]) / median(steps)  # the first step of all read their prompts

guess.reveal(longest_step("C:cpu", "collocated", "C0"), longest_step("P:cpu D:cpu", "disaggregated", "D0"))

# %% [markdown] lang="en"
# Chunks make the long step shorter and more frequent (chapter 02); they do not make it go away. Two workers do. Honestly:
# here both share one CPU and take turns, so the clock on the wall gained nothing. What was measured is what D0 itself had
# to do, and that is what it would feel on a GPU of its own. From 5.6 on, each has a process of its own.
#
# ## 5.2 One class
#
# There is no prefill worker in the code, and no decode worker. There is `Worker`: an engine with an inbox and an outbox.
# Its role is only a word that tells others what to ask of it. Below, `tell` puts messages into a worker's inbox, lets it
# take one step, and returns what it has to say. No scheduler, no thread: you are the central scheduler now.

# %% [markdown] lang="zh" en_hash="25bb45cf"
# 分块能让长的那一步变短、变多（第 02 章），却不能让它消失；两个 Worker 可以。说句老实话：这里两个 Worker 共用一个 CPU，轮流走，墙上的钟并没有快。
# 量到的是 D0 自己要干的活——等它有了自己的 GPU，感受到的就是这个。从 5.6 起，它们各有各的进程。
#
# ## 5.2 只有一个类
#
# 代码里没有“预填充 Worker”，也没有“解码 Worker”，只有一个 `Worker`：一台引擎，外加一个收件箱和一个发件箱。角色只是一个字，
# 告诉别人可以派它什么活。下面的 `tell` 往 Worker 的收件箱里放消息，让它走一步，再把它说的话取回来。没有调度器，没有线程：现在你就是中央调度器。

# %%
hand = Cluster("tiny", "P:cpu D:cpu", "disaggregated", dtype="float32", max_num_batched_tokens=512)
p0, d0 = hand.workers["P0"], hand.workers["D0"]
question = recall_prompt(5, 700, "en")
request = Request("by hand", hand.tokenizer(question.prompt)["input_ids"], greedy)

def tell(worker: Worker, *messages) -> list:
    """One step. Returns what the worker has to say."""
    worker.inbox.extend(messages)
    worker.step()
    said = list(worker.outbox)
    worker.outbox.clear()
    return said

print(inspect.getsource(Worker.step))

# %% [markdown] lang="en"
# ## 5.3 A lease
#
# D0's memory may be full, so nobody reads a prompt before there is room for its KV. You say `Reserve`, and D0 answers
# `Granted` with the blocks it has set aside, or `Refused`. Then P0 gets `Prefill`, with those blocks as the destination.
#
# The prompt has 700 tokens, blocks hold 16, P0 reads at most 512 tokens a step. **How many blocks does D0 set aside? In
# which of P0's steps does it have something to say?**

# %% [markdown] lang="zh" en_hash="ad6efe21"
# ## 5.3 租约
#
# D0 的显存可能满了，所以在给 KV 找好位置之前，谁也不去读提示。你说 `Reserve`，D0 回答 `Granted`，附上它留出来的块；或者回答 `Refused`。
# 然后你对 P0 说 `Prefill`，目的地就是这些块。
#
# 提示 700 个 token，块大小 16，P0 每步最多读 512 个 token。**D0 会留出多少块？P0 走到第几步才有话说？**

# %%
guess = nanopd.predict("05.3", blocks_on_d0=..., step_of_p0=...)

# %%
[granted] = tell(d0, Reserve(request))
said = [tell(p0, Prefill(request, granted.destination)), tell(p0)]
for number, messages in enumerate(said, 1):
    print(f"P0, step {number}:", [type(message).__name__ for message in messages])
guess.reveal(blocks_on_d0=len(granted.destination.block_ids), step_of_p0=[bool(messages) for messages in said].index(True) + 1)
print("D0:", d0.manager.num_used_blocks, "blocks in use, held by", sorted(d0.manager.leases[0].holders))
print("P0:", p0.manager.num_used_blocks, "blocks in use")

# %% [markdown] lang="en"
# In its second step P0 has read the whole prompt. `Tokens` carries the first token of the answer: **the reader draws it**,
# since it has the logits, and it goes to the client at once. `Prefilled` says that all of the KV lies in D0's blocks; P0
# has let go of its own. All this rests on one rule:
#
# > A lease's blocks may be written from `Granted` on, and until `Prefilled`. Nobody else touches them meanwhile.
#
# That is why D0 sends what it has to say **after** its step, not at once. A step that runs may still write into a block
# whose owner has just ended; until it is over, no other GPU may write there.
#
# Now `Resume`: the lease, and what has been written so far. D0's first step runs a single token, the one that P0 drew,
# whose own key and value nobody has computed yet. From there it is any decode.

# %% [markdown] lang="zh" en_hash="b63023d7"
# 到第二步，P0 读完了整个提示。`Tokens` 里是回答的第一个 token：**由读的一方来抽**，因为 logits 在它手上；抽出来立刻发给客户端。
# `Prefilled` 表示全部 KV 都已经在 D0 的块里，P0 自己的块也放掉了。这一切靠一条规矩撑着：
#
# > 租约里的块，从 `Granted` 起可以写，到 `Prefilled` 为止；这期间别人谁也不碰。
#
# 所以 D0 要说的话，总是**走完一步之后**才发出去，而不是立刻发。正在跑的那一步，也许还在往某个块里写，而这个块的主人刚刚结束；
# 这一步没走完，别的 GPU 就不能往那里写。
#
# 接下来是 `Resume`：带上租约，以及到目前为止写了什么。D0 的第一步只跑一个 token，就是 P0 抽出来的那个，它自己的键和值还没人算过。往后就是普通的解码了。

# %%
prefilled = said[1][-1]
answer = list(prefilled.written[0].token_ids)
inbox = [Resume(request.request_id, prefilled.destination.lease_id, prefilled.written)]
while inbox or d0.has_work:
    events = [event for message in tell(d0, *inbox) for event in message.events]
    answer += [event.token_id for event in events]
    inbox = []
print("tokens in each step of D0:", [sum(row.num_new for row in step.rows) for step in d0.engine.history])
print(hand.tokenizer.decode(answer), "expected:", question.answer)

# %% [markdown] lang="en"
# Why does the lease have **two** holders? Suppose the client hangs up after P0's first step. D0 must not hand out those
# blocks while P0 may still write there. So the request lets go at once, and the writer when P0 says `WriteEnded`. How many
# blocks does D0 hold after the first, and after the second?

# %% [markdown] lang="zh" en_hash="568ffd2a"
# 租约为什么要有**两个**持有者？假设 P0 走完第一步，客户端挂断了。只要 P0 还可能往里写，D0 就不能把这些块分给别人。所以请求那一方立刻放手，
# 写的那一方要等 P0 说了 `WriteEnded` 才放手。第一方放手后，D0 还占着多少块？第二方也放手之后呢？

# %%
other = recall_prompt(6, 700, "en")
hung_up = Request("hung up", hand.tokenizer(other.prompt)["input_ids"], greedy)
[granted] = tell(d0, Reserve(hung_up))
tell(p0, Prefill(hung_up, granted.destination))
tell(d0, ReleaseLease(granted.destination.lease_id, "request"))
print(d0.manager.num_used_blocks, "blocks in use on D0 after the request has let go")
print("P0:", [type(message).__name__ for message in tell(p0, Cancel("hung up"))])
tell(d0, ReleaseLease(granted.destination.lease_id, "writer"))
print(d0.manager.num_used_blocks, "after the writer has, too")

# %% [markdown] lang="en"
# ## 5.4 Moving blocks
#
# P0 does not wait for the end of the prompt. As soon as a layer of a chunk is stored, its blocks leave, while the next
# layer computes. What travels are blocks, not tokens, so a block that a chunk leaves half full goes **again**, fuller, with
# the next one.
#
# By hand: a prompt of 100 tokens, read in chunks of 40, blocks of 16. It fills 7 blocks. **How many are sent, counting one
# layer? 512 tokens in one chunk, 5 layers: how many times is the transport called?**
#
# The cheapest block to send is the one that is there already. D0 keeps what it has decoded from in its own prefix cache,
# and `Granted` says how much of the prompt that is. **You ask the 700-token question of 5.3 again, word for word. How many
# of its 44 blocks are sent?**

# %% [markdown] lang="zh" en_hash="7a52895a"
# ## 5.4 搬运块
#
# P0 不会等整个提示读完。一个分块的某一层刚存好，这一层的块就出发了，下一层接着算。上路的是块，不是 token；
# 所以一个分块末尾没装满的块，会跟着下一个分块**再发一次**，里面的东西多一些。
#
# 先用笔算：提示 100 个 token，每个分块 40 个，块大小 16，一共占 7 个块。**只数一层，要发多少个块？
# 512 个 token 一个分块读完，模型有 5 层：传输方法会被调用几次？**
#
# 最便宜的块，是已经在那边的块。D0 解码用过的块都留在它自己的前缀缓存里，`Granted` 会说明提示里有多少已经有了。
# **5.3 里那个 700 token 的问题，一字不差再问一遍：44 个块要发几个？**

# %%
guess = nanopd.predict("05.4", blocks_of_100=..., calls_for_512=..., blocks_sent_again=...)

# %%
from nanopd.workbook.streams import Ledger

def send_prompt(length: int, chunk: int) -> tuple[int, list]:
    ledger, table = Ledger(), list(range(-(-length // 16)))  # a transport that only takes notes
    transfer = Transfer(ledger, Destination("D0", 0, table, num_cached=0), block_size=16, num_layers=5)
    for start in range(0, length, chunk):
        row = PlanRow(Sequence(range(length)), request, min(chunk, length - start), start, table)
        for layer in range(5):
            transfer.send_layer(row, layer)
    return transfer.blocks_sent, ledger.sends

blocks, sends = send_prompt(100, 40)
print(*sends, sep="\n")

# %%
again = hand.generate(question.prompt, greedy, use_tqdm=False)[0]
sent = p0.sent[-1]
print(f"{again.outputs[0].text}; P0 sent {sent.num_bytes:,} bytes by {sent.transport!r}")
print("and read", [row.num_new for row in p0.engine.history[-1].rows], "of 700 tokens, the rest is in its own prefix cache")
guess.reveal(blocks, len(send_prompt(512, 512)[1]), sent.num_bytes // p0.cache.bytes_per_block)

# %% [markdown] lang="en"
# Eight instead of seven: block 2 goes twice. Chunks that are a multiple of the block size cost nothing extra. A long chunk
# travels **layer by layer**, so that all but the last layer hides behind computing. Of a short one
# several layers go together (the three lines above: all five), for one layer takes less time to travel than to launch.
#
# And one block of 44: the last, which is not full, and only full blocks can be found by hash. The two caches are two: P0
# knows prompts, D0 knows prompts **and answers**. In a conversation the next prompt holds the last answer, and P0 has to
# read that again although D0 has it. Collocated, nobody would.
#
# **Exercise 5.4.** Which blocks does a chunk have to send? `num_sent` tokens are there or on their way; the chunk adds
# `num_new` to the `num_cached` before it. `num_sent` may be ahead of the chunk: D0 had more of the prompt in its prefix
# cache than P0 has read, or P0 was preempted and reads it again.

# %% [markdown] lang="zh" en_hash="157cb8c8"
# 是八个，不是七个：块 2 发了两次。分块若是块大小的整数倍，就没有这份额外的开销。长分块**逐层**发送，除了最后一层，都藏在计算后面；
# 短分块攒几层一起发（上面那三行就是：五层一起走），因为单独一层在路上的时间还不如启动一次拷贝长。
#
# 44 个块只发一个：最后那个，因为它没满，而只有满块才能按哈希找到。要注意缓存有两份：P0 认得提示，D0 认得提示**和回答**。多轮对话里，
# 下一轮的提示带着上一轮的回答，D0 明明有，P0 还得再读一遍。混部就没有这回事。
#
# **练习 5.4** 一个分块该发哪些块？`num_sent` 个 token 已经到了，或者正在路上；这个分块在前面 `num_cached` 个的基础上又算了 `num_new` 个。
# `num_sent` 有可能跑在分块前面：或是 D0 的前缀缓存里有的比 P0 读到的还多，或是 P0 被抢占过，正在重读。

# %% nbgrader={"grade_id": "ex-5-4", "solution": true}
def blocks_to_send(num_sent: int, num_cached: int, num_new: int, block_size: int) -> range:
    """Places in the block table, first to last, that hold tokens which have not been sent."""
    ### BEGIN SOLUTION
    computed = num_cached + num_new
    if computed <= num_sent:
        return range(0)
    return range(num_sent // block_size, -(-computed // block_size))
    ### END SOLUTION

# %% nbgrader={"grade_id": "check-5-4", "points": 2}
nanopd.check("05.4", blocks_to_send)

# %% [markdown] lang="en"
# ## 5.5 Four ways across
#
# | transport | who copies | needs | in its favour |
# |---|---|---|---|
# | `local` | one kernel, or the CPU | both caches in one process, on one device | nothing travels |
# | `peer` | the sender alone | GPUs that can address each other; on CPUs, shared memory | one hop; the receiver does nothing |
# | `relay` | sender: GPU to pinned memory; receiver: pinned memory to GPU | one machine | any two GPUs; both hops run at once |
# | `collective` | NCCL or gloo, on both sides | a network | no shared memory at all |
#
# All have one method, `send(layers, source_blocks, destination_blocks)`. It queues and never waits, for the device as
# little as for the other worker; and it makes a fixed number of launches however many blocks there are. That last clause
# decides the speed. Below, this machine's CPU moves 1, 4, 16, ... blocks at a time (a block of the embedded model has 82
# KB).

# %% [markdown] lang="zh" en_hash="1b2b8431"
# ## 5.5 过河的四条路
#
# | 传输方式 | 谁来拷 | 需要什么 | 好处 |
# |---|---|---|---|
# | `local` | 一个内核，或者 CPU | 两个缓存在同一进程、同一设备上 | 不用上路 |
# | `peer` | 发送方独自写进对方的内存 | GPU 之间能互相寻址；CPU 上则是共享内存 | 只有一跳，接收方什么也不用做 |
# | `relay` | 发送方从 GPU 拷到锁页内存，接收方再拷到自己的 GPU | 同一台机器 | 任意两块 GPU 都行；两跳同时进行 |
# | `collective` | NCCL 或 gloo，两边都要参与 | 一张网络 | 完全不需要共享内存 |
#
# 它们都只有一个方法：`send(layers, source_blocks, destination_blocks)`。它只排队，从不等待，既不等设备，也不等对方；而且不管有多少块，
# 启动的次数都是固定的。快不快，就看这最后一条。下面让这台机器的 CPU 一次搬 1、4、16……个块（内置模型的一个块是 82 KB）。

# %%
times = widgets.TransferTimes()
times.measure()
times

# %% [markdown] lang="en"
# With one block, what you measure is the call; with many, the memory. (From some dozen blocks on they no longer fit into
# the CPU's own cache, so a line may come down again.) A loop over blocks would stay at the left end for ever. Who has a
# partner to tell and an answer to wait for pays most for small sends. Times of GPUs, where the order is decided by wires,
# are shown where somebody has recorded them with `nanopd bench transfer`; the line above the figure says whose they are.
#
# ## 5.6 Processes
#
# Now let others do the work. `executor="process"` gives every GPU a process of its own; on a CPU, every worker. All they
# share is messages, and memory that one maps from another. A worker whose inbox is empty sleeps.
#
# Six questions of 700 tokens, one reader, two writers. **How many answers differ from those of the two workers that took
# turns? And how much of the transfers is exposed: time in which a prompt was ready, and waited only for its last bytes, as
# a percentage of the time it took to read?**

# %% [markdown] lang="zh" en_hash="599917c7"
# 只有一个块时，量到的其实是一次调用的开销；块多了，量到的才是内存。（从几十个块起，CPU 自己的缓存就装不下了，曲线可能又会掉下来。）
# 要是一个块一个块地循环，就永远停在最左端。发送时要通知对方、还要等回音的那几种，发得越少越吃亏。GPU 上谁快谁慢，由线路说了算；
# 有人用 `nanopd bench transfer` 录过，这里才有数据，图上方那一行写着是谁的。
#
# ## 5.6 各有各的进程
#
# 现在不用你动手了。`executor="process"` 给每块 GPU 一个进程；在 CPU 上，则是每个 Worker 一个。它们共有的只有消息，以及一方映射过来的另一方的内存。
# 收件箱空了，Worker 就睡觉。
#
# 六个问题，提示各 700 个 token，一个 Worker 读，两个 Worker 写。**有几个回答和刚才那对轮流走的 Worker 不一样？传输又有多少露在外面——
# 提示已经读完、只为最后几个字节干等的时间，占读提示时间的百分之几？**

# %%
guess = nanopd.predict("05.6", different_answers=..., exposed_percent=...)

# %%
from nanopd.widgets.cluster_timeline import exposed

apart = Cluster("tiny", "P:cpu D:cpu D:cpu", "disaggregated", executor="process", dtype="float32")
for name, status in apart.status().items():
    print(f"{name}: process {status.pid}, {status.num_free_blocks:,} of {status.num_blocks:,} blocks free")
prompts = [recall_prompt(seed, 700, "en").prompt for seed in range(20, 26)]
outputs = apart.generate(prompts, greedy, use_tqdm=False)
in_turns = hand.generate(prompts, greedy, use_tqdm=False)
different = sum(a.outputs[0].token_ids != b.outputs[0].token_ids for a, b in zip(outputs, in_turns))
histories = apart.history()
waited = sum(exposed(record) for history in histories.values() for record in history.transfers)
reading = sum(step.duration for step in histories["P0"].steps)
guess.reveal(different, 100 * waited / reading)

# %%
widgets.ClusterTimeline(histories)

# %% [markdown] lang="en"
# Hatched bars below the reader are prompts on their way **while** it still reads; only what is red, if you can find any,
# cost somebody time. Drag over a piece to look closer. The lanes share one clock, so you also see a writer begin before the
# other prompts are read: that is the overlap that one process cannot have. (Three processes on fewer cores still wait for
# one another. On GPUs of their own they do not. And on a CPU the copying is part of the reader's step; on a GPU it runs
# beside it, on a stream of its own.)
#
# ## 5.7 When a writer dies
#
# An answer of 60 tokens is streaming. After the 20th we kill the process that writes it, with the signal that nobody can
# catch. Its blocks are gone. What is not gone is the **tokens**: the client has them, so the central scheduler has them.
# The request is tried again, under a new name, with what is written.
#
# **In how many places will the client's 60 tokens differ from those of an undisturbed run? And how many of the 700 tokens
# of the prompt does P0 run again?**

# %% [markdown] lang="zh" en_hash="1905e8ac"
# 读的 Worker 下面，带斜纹的条是**一边读一边**发走的提示；只有红色的部分才真的费了谁的时间——如果你找得到的话。拖动鼠标可以放大看。
# 各条泳道用的是同一个时钟，所以还能看到：别的提示没读完，写的一方就开始了。这种重叠，一个进程里是没有的。
# （三个进程挤在更少的核上，仍然要互相等；各有各的 GPU 时就不用了。
# 另外，在 CPU 上，拷贝算在读的那一步里；在 GPU 上，它在另一条流上与计算并行。）
#
# ## 5.7 写的那个死了
#
# 一个 60 token 的回答正在往外流。第 20 个 token 之后，我们杀掉写它的进程，用的是谁也拦不住的那个信号。它的块没了；没丢的是 **token**：
# 客户端已经拿到了，所以中央调度器手里也有。这个请求会换个名字，带着已经写好的部分再来一次。
#
# **客户端收到的 60 个 token，和没出事的那次相比，有几处不一样？提示的 700 个 token，P0 要重跑几个？**

# %%
guess = nanopd.predict("05.7", places_that_differ=..., tokens_read_again=...)

# %%
import os
import signal

sixty = SamplingParams(temperature=0, max_tokens=60, ignore_eos=True)
undisturbed = apart.generate(prompts[0], sixty, use_tqdm=False)[0].outputs[0].token_ids
stream, seen = apart.submit(prompts[0], sixty), []
for event in stream:
    seen.append(event.token_id)
    if len(seen) == 20:
        victim = apart.timeline(stream.request_id).path[-1]
        os.kill(apart.status()[victim].pid, signal.SIGKILL)
timeline = apart.timeline(stream.request_id)
print(f"killed {victim}; path {timeline}; known to workers as {timeline.jobs}")

# %%
def tokens_run(worker_id: str) -> list[int]:
    rows = [row for step in apart.history()[worker_id].steps for row in step.rows]
    return [row.num_new for row in rows if row.request_id == timeline.jobs[1]]

differ = sum(a != b for a, b in zip(seen, undisturbed)) + abs(len(seen) - len(undisturbed))
guess.reveal(places_that_differ=differ, tokens_read_again=sum(tokens_run("P0")))
print(f"the other writer's steps: {tokens_run(timeline.path[-1])[:3]}, ... tokens")
for what, when in timeline.marks:
    print(f"{(when - timeline.marks[0][1]) * 1e3:8.1f} ms  {what}")

# %% [markdown] lang="en"
# No gap and no repeat. The reader found most of the prompt in its own prefix cache, sent the blocks to the other writer,
# and drew a first token again, which the central scheduler dropped. The new writer ran the tokens written so far in one
# step, as if they were a prompt, and went on. Since a draw depends on the request alone (chapter 02), this holds for
# sampled answers too, not only for greedy ones.
#
# A request is given four attempts. When no worker of a role is left, it ends with an error that says what happened to each.
#
# **Exercise 5.7.** Do the retry by hand. `tell`, `p0` and `d1` are as above; `written` is what the client has seen of its
# one answer. Return the tokens that it has not seen yet.

# %% [markdown] lang="zh" en_hash="204381f6"
# 不少，也不重。读的一方在自己的前缀缓存里找到了提示的绝大部分，把块发给另一个写的 Worker，又抽了一遍第一个 token——中央调度器把它扔掉了。
# 接手的 Worker 把已经写好的 token 当作提示，一步跑完，接着往下写。抽样只取决于请求自己（第 02 章），所以不光贪心解码如此，采样的回答也一样。
#
# 一个请求有四次机会。某种角色的 Worker 一个不剩时，它以错误结束，错误里写明每一次出了什么事。
#
# **练习 5.7** 亲手做一次重试。`tell`、`p0`、`d1` 和上面的一样；`written` 是客户端已经看到的部分（只有一个回答）。返回它还没看到的 token。

# %% nbgrader={"grade_id": "ex-5-7", "solution": true}
def retry(tell, p0: Worker, d1: Worker, request: Request, written: Written) -> list[int]:
    """The worker that decoded `request` is lost. Have p0 and d1 finish it."""
    ### BEGIN SOLUTION
    [granted] = tell(d1, Reserve(request))
    said = tell(p0, Prefill(request, granted.destination))
    while not any(isinstance(message, Prefilled) for message in said):
        said = tell(p0)
    said = tell(d1, Resume(request.request_id, granted.destination.lease_id, [written]))
    while d1.has_work:
        said += tell(d1)
    return [event.token_id for message in said for event in message.events]
    ### END SOLUTION

# %% nbgrader={"grade_id": "check-5-7", "points": 3}
nanopd.check("05.7", retry)

# %% [markdown] lang="en"
# ## 5.8 Deadlines and roles
#
# A client may lose patience. A **deadline** goes with the request; past it, the request is cancelled wherever it is, and
# the error says so. What it held is given back, on every worker, also in the middle of a transfer.
#
# Roles can change, too, while requests flow. Take two readers and a single writer, which is one reader too many for short
# prompts. A role is a word, so let P1 write from here on: it finishes what it has, takes nothing more of the old kind, then
# changes. Six requests are under way, six more come in; none may be lost.

# %% [markdown] lang="zh" en_hash="1ce71eb7"
# ## 5.8 截止时间与角色
#
# 客户端也可能失去耐心。**截止时间**跟着请求走，一过时就在它所在的地方取消，错误里会写明。它占着的东西，每个 Worker 上的都会还回来，哪怕正传到一半。
#
# 角色也可以在请求不断的时候换。设有两个读的、一个写的，提示又短，读的就多了一个。角色只是一个字，那就让 P1 从此改为写：
# 手上的活干完，旧的活不再接，然后换。换之前有六个请求在跑，换的时候又来六个，一个也不能丢。

# %%
late = apart.submit(prompts[1], SamplingParams(max_tokens=2000, ignore_eos=True), timeout=0.3).result()
print(late.outputs[0].finish_reason, "after", len(late.outputs[0].token_ids), "tokens:", late.error)
print({name: (status.num_running, status.num_leases) for name, status in apart.status().items()})

# %%
changing = Cluster("tiny", "P:cpu P:cpu D:cpu", "disaggregated", dtype="float32")
flow = [changing.submit(task.prompt, sixty) for task in demo_prompts()[:6]]
for _ in range(3):
    changing.step()
changing.set_role("P1", "D")
flow += [changing.submit(task.prompt, sixty) for task in demo_prompts()[:6]]
results = [stream.result() for stream in flow]
paths = [str(changing.timeline(stream.request_id)) for stream in flow]
print("lost:", sum(result.error is not None for result in results), {path: paths.count(path) for path in sorted(set(paths))})
print("roles:", {name: status.role for name, status in changing.status().items()})

# %% [markdown] lang="en"
# P1 writes now. Its id is a name and no more. Which roles a load needs, and when it pays to change one, is the matter of
# chapter 06.
#
# ## 5.9 Break it
#
# On a GPU the CPU only queues. It has queued the copies of a whole step, on a stream of their own, before the first layer
# has run, and nothing holds a copy back but an **event**, recorded behind the layer that it copies.
# `nanopd.workbook.streams` plays both streams on the CPU. Below is a transport by somebody in a hurry.
#
# Eight people ask it for eight codes of four digits, one after the other, 600 tokens each. **How many answers are right?
# How many have the right first digit?**

# %% [markdown] lang="zh" en_hash="144a439c"
# P1 改行写了，编号没变：那只是个名字。什么样的负载需要哪些角色、什么时候换才划算，是第 06 章的事。
#
# ## 5.9 弄坏它
#
# 在 GPU 上，CPU 只管排队：第一层还没开始跑，整步的拷贝就已经全部排进了另一条流。能拦住一次拷贝的，只有一个**事件**，它记录在要拷的那一层后面。
# `nanopd.workbook.streams` 在 CPU 上把这两条流都演出来。下面这个传输方式，出自一个赶时间的人。
#
# 八个人先后来问八个四位数的密码，提示各 600 个 token。**有几个回答是对的？有几个第一位是对的？**

# %%
from nanopd.workbook import streams

print(inspect.getsource(streams.HastyTransport))
guess = nanopd.predict("05.9", right=..., first_digit_right=...)

# %%
questions = [recall_prompt(seed, 600, "en") for seed in range(40, 48)]

def ask_all(transport, **options) -> list[tuple[str, int]]:
    """Each answer, and how many attempts it took."""
    with Cluster("tiny", "P:cpu D:cpu", "disaggregated", dtype="float32", **options) as cluster:
        streams.use(cluster, transport)
        outputs = [cluster.generate(question.prompt, greedy, use_tqdm=False)[0] for question in questions]
        return [(output.outputs[0].text, len(cluster.timeline(output.request_id).jobs)) for output in outputs]

answers = [text for text, _ in ask_all(streams.HastyTransport, enable_prefix_caching=False)]
print(*(f"expected {question.answer}, got {answer}" for question, answer in zip(questions, answers)), sep="\n")
guess.reveal(right=sum(answer == question.answer for question, answer in zip(questions, answers)),
             first_digit_right=sum(answer[0] == question.answer[0] for question, answer in zip(questions, answers)))

# %% [markdown] lang="en"
# The first digit is always right: P0 draws it, and P0's cache is in order. Now hold the rest of each answer against the
# code **one line above**. The copies left before the layers were stored, so they took what lay in those blocks before: the
# previous person's prompt. This is not noise. It is somebody else's secret, fluently told.
#
# Nothing noticed: no error, `check()` is content, and a timeline would look better than ever, since nobody waits. What
# finds it is comparing bytes: with `checksums=True`, P0 adds up the KV that it sends, D0 does the same with what has
# arrived, and a prompt that differs is tried again. The checksum costs reading all of the KV twice more, so it is off by
# default: it is for finding such a fault, not for living with it. The mend is one line.

# %% [markdown] lang="zh" en_hash="20783d3f"
# 第一位总是对的：它由 P0 抽，而 P0 的缓存没有毛病。再拿后几位和**上一行**的密码对一对。拷贝走得比存储还早，带走的是那些块里原来的东西：
# 上一个人的提示。这不是噪声，是别人的秘密，而且说得很流利。
#
# 谁也没有察觉：没有报错，`check()` 说一切正常，时间线只会更漂亮——谁都不等了嘛。要抓住它，得比对字节：加上 `checksums=True`，
# P0 给发出去的 KV 求一个校验和，D0 对收到的也求一遍，对不上就重来。校验和要把全部 KV 再读两遍，所以默认不开：它是用来找毛病的，
# 不是用来带着毛病过日子的。修好只要一行。

# %%
class MendedTransport(streams.HastyTransport):
    def send(self, layers, source_blocks, destination_blocks):
        self.stream.wait_event(layers.stop - 1)
        return super().send(layers, source_blocks, destination_blocks)

for transport in (streams.HastyTransport, MendedTransport):
    print(transport.__name__, ask_all(transport, enable_prefix_caching=False, checksums=True))

# %% [markdown] lang="en"
# With the checksum even the hasty one answers rightly, and each request takes **two** attempts. Why is the second one
# right? P0 got the same blocks again, and by now the first attempt's KV lies there: a copy that comes too early takes that.
# A retry hides a fault like this behind a longer wait, so count retries. Mended, one attempt is enough.
#
# One thing more. Above, prefix caching was off. Now turn it on, let the hasty transport run once, then mend it without a
# restart, and ask the same eight questions again. How many answers are right?

# %% [markdown] lang="zh" en_hash="51837b6b"
# 有了校验和，赶时间的那个也答对了，可每个请求都花了**两次**机会。第二次为什么就对了？因为 P0 又分到同样的块，里面躺着的正是第一次算好的 KV：
# 拷早了，拷走的就是它。重试会把这样的毛病藏起来，看上去只是慢一点——所以要数重试的次数。修好之后，一次就够。
#
# 还有一件事。上面前缀缓存是关着的。现在把它打开，让那个赶时间的传输先跑一遍，然后不重启、就地修好，同样的八个问题再问一遍。这回几个对？

# %%
cluster = Cluster("tiny", "P:cpu D:cpu", "disaggregated", dtype="float32")
for transport in (streams.HastyTransport, MendedTransport):
    streams.use(cluster, transport)
    outputs = [cluster.generate(question.prompt, greedy, use_tqdm=False)[0] for question in questions]
print("right after mending:", sum(o.outputs[0].text == question.answer for question, o in zip(questions, outputs)), "of 8")
for served in (hand, apart, changing, cluster):
    served.shutdown()

# %% [markdown] lang="en"
# The fault is gone and its bytes are not: D0 has filed them under the hash of the right tokens, and hands them to everybody
# who asks for that prefix. No checksum helps now, since what D0 has is not sent. A wrong byte in a cache outlives its
# cause. Whoever mends such a fault restarts the workers.
#
# ## Where you are
#
# - One class; a role is what it is asked to do (5.2, 5.8). Reserve, Granted, Prefill, Prefilled, Resume (5.3).
# - A lease has two holders, and its blocks are free when both have let go (5.3).
# - Layers leave while the next one computes; what D has already is not sent (5.4, 5.6).
# - Blocks are lost with a worker, tokens are not: retry from those, without gap or repeat (5.7).
# - An event wait that is missing makes fluent wrong answers, and a checksum finds it (5.9).
#
# The deep dive is `docs_en/05_workers.md`. Next, chapter 06 decides which of the two ways a request should go.

# %% [markdown] lang="zh" en_hash="f7534a16"
# 毛病没了，它留下的字节还在：D0 把它们归到了正确 token 的哈希名下，谁来要这个前缀，就发给谁。
# 这时校验和也帮不上忙，因为 D0 有的就不发了。缓存里一个错的字节，比弄错它的原因活得还久。
# 修好这种毛病的人，记得重启 Worker。
#
# ## 现在到了哪里
#
# - 只有一个类，角色就是派它什么活（5.2、5.8）。Reserve、Granted、Prefill、Prefilled、Resume（5.3）。
# - 租约有两个持有者，两个都放手了，块才空闲（5.3）。
# - 一层存好就出发，下一层接着算；D 已经有的不发（5.4、5.6）。
# - Worker 没了，块就没了，token 还在：从 token 重来，不少也不重（5.7）。
# - 漏掉一次事件等待，答案就会流利地错；校验和能找到它（5.9）。
#
# 深入讲解见 `docs_zh/05_workers.md`。下一章是 06，决定一个请求该走哪条路。
