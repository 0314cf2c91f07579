# Chapter 02: the engine. Scheduler, chunks, preemption, sampling, several answers. Rules for authors: nanopd.workbook.

# %% [markdown] lang="en"
# # 02 The engine
#
# Many people ask at once, each with a prompt of another length, each answer ending when it likes. One device, one step
# at a time. **Which tokens run in the next step?** Whoever answers that question well serves several times as many
# people on the same hardware. The answer is called a scheduler, and in this chapter you build one up, piece by piece,
# beside the engine's own.
#
# It takes about an hour. The code is in `nanopd/engine/`: `scheduler.py` decides, `runner.py` computes, `engine.py`
# ties both together in a handful of lines.

# %% [markdown] lang="zh" en_hash="c1a7aa48"
# # 02 引擎
#
# 很多人同时来问，提示长短各异，回答什么时候结束也说不准。设备只有一个，一次只能走一步。
# **下一步该跑哪些 token？** 这个问题答得好，同样的硬件就能服务几倍的人。负责回答它的，就叫调度器。
# 这一章里，你会对照着引擎自己的调度器，一点一点把它搭出来。
#
# 大约需要一个小时。代码在 `nanopd/engine/`：`scheduler.py` 做决定，`runner.py` 做计算，`engine.py` 用寥寥几行把两者串起来。

# %%
import inspect
import nanopd
from nanopd import LLM, BeamSearchParams, SamplingParams, widgets
from nanopd.engine.engine import Engine
from nanopd.tiny import demo_prompts, recall_prompt

greedy = SamplingParams(temperature=0, max_tokens=200)
print(inspect.getsource(Engine.step))

# %% [markdown] lang="en"
# Schedule, execute, commit. Everything below is about the first and the last of these three.
#
# ## 2.1 Seats that never stay empty
#
# Eight requests will write 3, 12, 5, 2, 9, 4, 11 and 6 tokens, and the batch has four seats. The classic way takes four,
# waits until **all** of them are done, then takes the next four. **Continuous batching** gives a seat to the next
# request the moment its holder is done. **How many steps does each need?**

# %% [markdown] lang="zh" en_hash="c14b593a"
# 调度、执行、提交。下面讲的全是头尾这两件事。
#
# ## 2.1 座位不留空
#
# 八个请求，分别要写 3、12、5、2、9、4、11、6 个 token，批里有四个座位。老办法是先上四个，等它们**全部**写完，
# 再上后四个。**连续批处理**则是谁写完，座位立刻让给下一位。**两种办法各要多少步？**

# %%
guess = nanopd.predict("02.1", static=..., continuous=...)

# %%
lengths = [3, 12, 5, 2, 9, 4, 11, 6]
static = sum(max(lengths[i : i + 4]) for i in range(0, len(lengths), 4))

llm = LLM("tiny", max_num_seqs=4, dtype="float32")
each = [SamplingParams(temperature=0, max_tokens=length, ignore_eos=True) for length in lengths]
llm.generate([task.prompt for task in demo_prompts()[:8]], each, use_tqdm=False)
guess.reveal(static=static, continuous=llm.engine.num_steps)

# %%
widgets.BatchTimeline(llm.engine.history, token_budget=512)

# %% [markdown] lang="en"
# The engine's count is measured, not computed: `num_steps` after the run. Look at the picture: a row of bars begins in
# the very step after another has ended. (A request's first token comes with the step that reads its prompt, so a
# request of n tokens sits for n steps.) Where it does not help: if all answers had one length, both ways would be equal.
#
# **Exercise 2.1.** Compute the number of steps without an engine: a freed seat goes to the next request in line.

# %% [markdown] lang="zh" en_hash="cff220e1"
# 引擎的步数是跑出来的，不是算出来的：运行之后的 `num_steps`。看图：一行条刚结束，紧接着的下一步就有另一行开始。
# （请求的首个 token 和读提示在同一步里出来，所以写 n 个 token 的请求要坐 n 步。）
# 它也有帮不上忙的时候：要是所有回答一样长，两种办法就没有区别。
#
# **练习 2.1** 不用引擎，算出步数：座位一空，就让给队里的下一个请求。

# %% nbgrader={"grade_id": "ex-2-1", "solution": true}
def continuous_steps(lengths: list[int], seats: int) -> int:
    """Steps until all requests are done; request i sits for lengths[i] steps, first come, first served."""
    ### BEGIN SOLUTION
    free_from = [0] * seats  # the step from which each seat is free
    for length in lengths:
        seat = free_from.index(min(free_from))
        free_from[seat] += length
    return max(free_from)
    ### END SOLUTION

# %% nbgrader={"grade_id": "check-2-1", "points": 2}
nanopd.check("02.1", continuous_steps)

# %% [markdown] lang="en"
# ## 2.2 One arithmetic for both phases
#
# A sequence knows its tokens, and how many of them already have their keys and values in the cache: `num_computed`.
# What is left to run is the difference. A long prompt has a thousand left; a sequence that decodes has exactly one, the
# token drawn last. The scheduler needs no more than that, so prefill and decode fit in **one** batch, as rows of
# different length. Here is a real plan, taken in the middle of a run:

# %% [markdown] lang="zh" en_hash="afdc1b00"
# ## 2.2 两个阶段，一套算术
#
# 一条序列知道自己有哪些 token，也知道其中前多少个的键和值已经在缓存里：`num_computed`。两者之差，就是还要跑的。
# 长提示还剩上千个；正在解码的序列只剩一个，就是刚抽出来的那个。调度器知道这些就够了，
# 所以预填充和解码可以放进**同一个**批，只是各行长短不一。下面是运行途中截取的一份真实计划：

# %%
mixed = LLM("tiny", max_num_batched_tokens=128)
for task in (*demo_prompts()[-2:], demo_prompts()[5]):
    mixed.submit(task.prompt, greedy)
for _ in range(4):
    mixed.step()
mixed.submit(recall_prompt(1, 400, "en").prompt, greedy)
plan = mixed.engine.scheduler.schedule()
for row in plan.rows:
    print(f"request {row.request.request_id}: {row.kind:>7}, {row.num_cached:>3} cached + {row.num_new:>3} new, "
          f"draws {row.num_samples}, blocks {row.block_table}")
print(plan.num_tokens, "tokens in all")

# %% [markdown] lang="en"
# Three sequences write one token each; the newcomer reads as much of its prompt as the budget of 128 tokens has left.
# It draws nothing yet: only the prompt's **last** chunk ends in logits that matter. Prompts are of different lengths and
# nothing is padded: the rows lie end to end, and attention finds each row's past through its block table.
#
# ## 2.3 Chunks
#
# Why not read the whole prompt at once? Because all who decode wait for it (you measured the pause in chapter 00). So a
# step has a budget, and a long prompt is read in chunks. **With a budget of 64 tokens, while four others decode: in which
# step does a 1,000-token prompt get its first token?**

# %% [markdown] lang="zh" en_hash="69da1b67"
# 三条序列各写一个 token；新来的那个，在 128 个 token 的预算里，剩多少读多少。它暂时什么也不抽：
# 只有提示的**最后一个**分块算出的 logits 才有用。提示长短不一，却不需要填充：各行首尾相接，注意力靠块表找到每一行的过去。
#
# ## 2.3 分块
#
# 为什么不把整个提示一次读完？因为所有在解码的都得等它（第 00 章里你量过那个停顿）。所以每一步都有预算，长提示分块来读。
# **预算为 64 个 token，另有四条序列在解码：1,000 个 token 的提示，要到第几步才能拿到首个 token？**

# %%
guess = nanopd.predict("02.3", steps_to_first_token=...)

# %%
def read_among_others(budget: int) -> tuple[LLM, list]:
    """Four answers stream, then a 1,000-token prompt arrives. Returns the records of the steps that read it."""
    busy = LLM("tiny", max_num_batched_tokens=budget, enable_prefix_caching=False)
    for task in demo_prompts()[:4]:
        busy.submit(task.prompt, SamplingParams(temperature=0, max_tokens=60, ignore_eos=True))
    while busy.engine.scheduler.waiting or any(
            entry.group.live[0].num_output == 0 for entry in busy.engine.scheduler.running):
        busy.step()
    start = busy.engine.num_steps
    busy.submit({"prompt_token_ids": list(range(100, 1100))}, SamplingParams(max_tokens=1)).result()
    return busy, [record for record in busy.engine.history if record.step >= start]

# %%
busy, steps = read_among_others(64)
guess.reveal(steps_to_first_token=len(steps))

# %%
print(f"{'budget':>7} {'steps':>6} {'first token after, ms':>22} {'longest step, ms':>17}")
for budget in (64, 256, 1024):
    _, steps = read_among_others(budget)
    seconds = [record.duration for record in steps]
    print(f"{budget:>7} {len(steps):>6} {sum(seconds) * 1e3:>22.0f} {max(seconds) * 1e3:>17.0f}")

# %% [markdown] lang="en"
# The **longest step** is what those who decode feel (their TPOT); the **first token** is what the newcomer feels (their
# TTFT), and each extra chunk adds the fixed cost of a step. The budget is where you choose between them, and
# disaggregation is the attempt not to have to choose. (If the largest budget is not the quickest on your machine: the
# reference attention computes the masked half of a chunk as well, which grows with the square of the chunk.)
#
# A chunk must see **everything before it**, not only itself. Then it makes no difference to the answer how a prompt is
# cut, and that is how we test it:

# %% [markdown] lang="zh" en_hash="9e869c9f"
# **最长的一步**，是正在解码的人感受到的（他们的 TPOT）；**首个 token**，是新来的人感受到的（他的 TTFT），
# 而每多一个分块，就要多付一份每步固定的开销。预算就是你在两者之间做取舍的地方；而分离，就是想办法不必取舍。
# （如果在你的机器上，最大的预算反而不是最快的：参考注意力把分块里被掩掉的那一半也算了，这部分随分块长度的平方增长。）
#
# 一个分块必须看得见**它之前的一切**，而不只是自己。这样提示怎么切都不影响回答——我们也正是这样检验它的：

# %%
questions = [recall_prompt(seed, 300, lang) for seed in range(3) for lang in ("en", "zh")]
for chunk in (None, 64, 16, 7):
    cut = LLM("tiny", prefill_chunk_size=chunk, enable_prefix_caching=False)
    outputs = cut.generate([question.prompt for question in questions], greedy, use_tqdm=False)
    right = sum(output.outputs[0].text == question.answer for question, output in zip(questions, outputs))
    print(f"chunks of {chunk or 'any size'}: {cut.engine.num_steps:>3} steps, {right} of {len(questions)} right")

# %% [markdown] lang="en"
# ## 2.4 When the blocks run out
#
# A request is let in when its prompt's blocks are free, oldest first; the first that does not fit holds the others back,
# or a big prompt would wait for ever while small ones slip past. Some blocks are left free, the **watermark**, for those
# already running to grow into.
#
# **Exercise 2.4.** How many of the waiting requests are let in now?

# %% [markdown] lang="zh" en_hash="318cb196"
# ## 2.4 块用完的时候
#
# 提示所需的块空得出来，请求才能进场，先到先进；第一个放不下的会挡住后面的，否则小提示一个个溜过去，大提示就永远等下去了。
# 还要留一些块不动，叫**水位线**，给已经在跑的序列留出生长的余地。
#
# **练习 2.4** 排队的请求里，现在能放进来几个？

# %% nbgrader={"grade_id": "ex-2-4", "solution": true}
def admit(blocks_needed: list[int], free_blocks: int, watermark: int, running: int) -> int:
    """How many of the waiting requests come in, in order. An engine where nothing runs ignores the watermark."""
    ### BEGIN SOLUTION
    admitted = 0
    for needed in blocks_needed:
        keep = watermark if running + admitted > 0 else 0
        if needed + keep > free_blocks:
            break
        free_blocks -= needed
        admitted += 1
    return admitted
    ### END SOLUTION

# %% nbgrader={"grade_id": "check-2-4", "points": 2}
nanopd.check("02.4", admit)

# %% [markdown] lang="en"
# Answers grow, so the blocks can still run out in the middle. Then somebody has to give theirs back: **preemption**. The
# engine takes the **youngest**, drops its blocks, keeps its tokens, and reads them again later as if they were a prompt.
# Recomputing costs time and loses nothing. And since the oldest is never sent back for another's sake, everybody is the
# oldest one day: nobody starves.
#
# Six requests of up to 100 tokens share 30 blocks. **How many preemptions will it take, and how many of the six answers
# will differ from a run with plenty of blocks?**

# %% [markdown] lang="zh" en_hash="d61a72bd"
# 回答会越写越长，所以块还是可能半路用光。这时就得有人把块让出来：**抢占**。引擎挑**最年轻**的，收回它的块，留下它的 token，
# 以后再像读提示那样把它们重读一遍。重算费时间，但什么也不会丢。而且最老的请求绝不会为了别人被请下去，
# 每个请求总有一天会成为最老的——所以谁也不会饿死。
#
# 六个请求，每个最多写 100 个 token，共用 30 个块。**会发生几次抢占？六个回答里，又有几个和块充足时不一样？**

# %%
guess = nanopd.predict("02.4", preemptions=..., different_answers=...)

# %%
stories = [task.prompt for task in demo_prompts() if task.kind == "story"] * 3
hundred = SamplingParams(temperature=0, max_tokens=100, ignore_eos=True)
plenty = LLM("tiny", dtype="float32").generate(stories, hundred, use_tqdm=False)
tight = LLM("tiny", dtype="float32", num_gpu_blocks_override=30, enable_prefix_caching=False)
short = tight.generate(stories, hundred, use_tqdm=False)
different = sum(a.outputs[0].token_ids != b.outputs[0].token_ids for a, b in zip(plenty, short))
guess.reveal(preemptions=tight.engine.scheduler.num_preemptions, different_answers=different)
widgets.BatchTimeline(tight.engine.history, token_budget=512)

# %% [markdown] lang="en"
# Step through it: each mark is a request sent back; the tall bar that follows later is its recomputation. Preemption is a
# safety net, not a way of life. If you see many marks, admit fewer requests or give the cache more blocks.
#
# ## 2.5 Drawing a token
#
# The model gives a number for every token in the vocabulary. By hand, with five tokens of probability 0.45, 0.25, 0.15,
# 0.10 and 0.05: **top-k** 2 keeps the first two; **top-p** 0.8 keeps the fewest whose sum reaches 0.8, here three;
# **min-p** 0.3 keeps those with at least 0.3 times the best, again three. What is kept is scaled to sum to 1, and one
# uniform number `u` picks: walk along the sums until they pass `u`.

# %% [markdown] lang="zh" en_hash="9c99e2c1"
# 一步步看过去：每个标记都是一个被请下去的请求，后面出现的那根高条，就是它在重算。抢占是安全网，不是过日子的办法。
# 如果标记很多，就少放些请求进来，或者多给缓存一些块。
#
# ## 2.5 抽一个 token
#
# 模型给词表里的每个 token 打一个分。先用笔算，设五个 token 的概率为 0.45、0.25、0.15、0.10、0.05：
# **top-k** 取 2，留下前两个；**top-p** 取 0.8，留下累加能到 0.8 的最少几个，这里是三个；
# **min-p** 取 0.3，留下概率不低于最大值 0.3 倍的，也是三个。留下的重新归一，再用一个均匀随机数 `u` 来挑：
# 沿着累加和往前走，走到超过 `u` 为止。

# %% nbgrader={"grade_id": "ex-2-5", "solution": true}
def draw(probs: list[float], u: float, top_k: int, top_p: float) -> int:
    """The index of the token that `u` in [0, 1) picks. `probs` is sorted, likeliest first; top_k 0 keeps all."""
    ### BEGIN SOLUTION
    kept = probs[: top_k or len(probs)]
    kept = [p / sum(kept) for p in kept]
    nucleus = [p for i, p in enumerate(kept) if sum(kept[:i]) < top_p]
    target, walked = u * sum(nucleus), 0.0
    for index, p in enumerate(nucleus):
        walked += p
        if walked > target:
            return index
    return len(nucleus) - 1
    ### END SOLUTION

# %% nbgrader={"grade_id": "check-2-5", "points": 3}
nanopd.check("02.5", draw)

# %% [markdown] lang="en"
# Where does `u` come from? In most engines from a generator whose state moves on with every draw, so that your answer
# depends on who else was in the batch. Here it is a pure function of three counters: the request's seed, which of its
# answers, and the position. **The same request, alone and in a crowd, chunked, preempted and on two workers: how many
# different answers do you get?**

# %% [markdown] lang="zh" en_hash="33ae1a10"
# `u` 从哪来？多数引擎用的是随机数发生器，每抽一次状态就往前走一步，于是你的回答取决于同批里还有谁。
# 在这里，它是三个计数器的纯函数：请求的种子、第几个回答、第几个位置。
# **同一个请求，独自跑、混在人群里跑、分块、被抢占、在两个工作进程上跑：会得到几种不同的回答？**

# %%
guess = nanopd.predict("02.5", different_answers=...)

# %%
crowd = [task.prompt for task in demo_prompts()]
seeded = SamplingParams(temperature=1.5, top_p=0.95, seed=7, max_tokens=60, ignore_eos=True)
others = SamplingParams(temperature=1.0, max_tokens=60)
here = "0" if llm.device.type == "cuda" else "cpu"
pair = nanopd.Cluster("tiny", f"P:{here} D:{here}", "disaggregated", dtype="float32")
runs = [llm.generate(crowd[-2], seeded, use_tqdm=False),
        llm.generate([*crowd, crowd[-2]], [others] * len(crowd) + [seeded], use_tqdm=False),
        tight.generate([crowd[-2]] * 8, seeded, use_tqdm=False),
        pair.generate(crowd[-2], seeded, use_tqdm=False)]
answers = {outputs[-1].outputs[0].text for outputs in runs}
guess.reveal(different_answers=len(answers))
print(*answers, sep="\n")

# %% [markdown] lang="en"
# ## 2.6 Several answers, and beams
#
# For `n` answers the prompt is read **once**; then the sequence forks, and copy-on-write keeps the writers apart
# (chapter 01). **A prompt of 300 tokens, four answers of 8 tokens: how many blocks at most, and how many are copied?**

# %% [markdown] lang="zh" en_hash="4c4cea78"
# ## 2.6 多个回答，以及束搜索
#
# 要 `n` 个回答时，提示只读**一遍**，然后序列分叉，由写时复制保证各写各的（第 01 章）。
# **300 个 token 的提示，四个回答各 8 个 token：最多同时用多少块，一共复制几块？**

# %%
guess = nanopd.predict("02.6", most_blocks=..., copied=...)

# %%
forked = LLM("tiny", num_gpu_blocks_override=200, enable_prefix_caching=False)
four = SamplingParams(n=4, temperature=1.0, seed=1, max_tokens=8, ignore_eos=True)
forked.generate({"prompt_token_ids": list(range(100, 400))}, four, use_tqdm=False)
free = min(record.num_free_blocks for record in forked.engine.history)
guess.reveal(most_blocks=200 - free, copied=sum(record.num_copies for record in forked.engine.history))

# %% [markdown] lang="en"
# **Beam search** forks all the time: in every step it ranks the continuations of all beams together, keeps the best few,
# and frees the rest. It finds sequences that greedy decoding walks past, since the likeliest first token need not begin
# the likeliest answer. It costs `beam_width` sequences, and a likelier answer is not always a better one.

# %% [markdown] lang="zh" en_hash="262e4aa4"
# **束搜索**时时刻刻都在分叉：每一步把所有束的后续放在一起排名，留下最好的几个，其余释放。
# 它能找到贪心解码错过的序列，因为概率最大的第一个 token，未必引出概率最大的回答。
# 代价是同时占着 `beam_width` 条序列；而且概率更大的回答，也不一定更好。

# %%
twenty = SamplingParams(temperature=0, max_tokens=20)
best = forked.generate(stories[0], twenty, use_tqdm=False)[0].outputs[0]
width_4 = BeamSearchParams(4, max_tokens=20, length_penalty=0)
beams = forked.beam_search(stories[0], width_4, use_tqdm=False)[0].outputs
print(f"greedy {best.cumulative_logprob:8.3f}  {best.text}")
for beam in beams:
    print(f"beam   {beam.cumulative_logprob:8.3f}  {beam.text}")

# %% [markdown] lang="en"
# ## 2.7 Break it
#
# An earlier engine of this kind shipped with this fault: a prefill chunk attended **only to itself**. Nothing
# crashed. Short prompts were answered perfectly. The next cell builds that engine.
#
# Twelve questions of 600 tokens, read in chunks of 256. Before you run on: **how many answers will be right?** Then find out
# *which*, and why those.

# %% [markdown] lang="zh" en_hash="45e78af2"
# ## 2.7 弄坏它
#
# 有个早先的同类引擎，发布时就带着这样一个毛病：预填充的分块**只看得见自己**。没有崩溃，短提示也答得完美。
# 下一格就造一个这样的引擎。
#
# 十二个问题，各 600 个 token，每个分块读 256 个。运行之前先猜：**会答对几个？** 然后查清楚对的是*哪几个*，为什么偏偏是它们。

# %%
guess = nanopd.predict("02.7", right=...)

# %%
from nanopd.engine import runner
whole_build = runner.build_batch

def build_blinkered(plan, block_size, device):
    """A prefill chunk's past is cut off: its block table begins where the chunk does."""
    token_ids, positions, batch = whole_build(plan, block_size, device)
    for i, row in enumerate(plan.rows):
        if row.kind == "prefill":
            skipped = row.num_cached // block_size
            batch.block_tables[i] = batch.block_tables[i].roll(-skipped)
            batch.context_lens[i] -= skipped * block_size
    return token_ids, positions, batch

# %%
broken = LLM("tiny", prefill_chunk_size=256, max_num_batched_tokens=4096, enable_prefix_caching=False)
questions = [recall_prompt(seed, 600, "en") for seed in range(40, 52)]
runner.build_batch = build_blinkered
try:
    outputs = broken.generate([question.prompt for question in questions], greedy, use_tqdm=False)
finally:
    runner.build_batch = whole_build  # mended again
right = [output.outputs[0].text == question.answer for question, output in zip(questions, outputs)]
guess.reveal(right=sum(right))

# %%
for question, output, is_right in zip(questions, outputs, right):
    before = question.prompt[: question.prompt.index("=" + question.answer)]
    position = len(broken.tokenizer(before)["input_ids"])
    print(f"code at token {position:>3} of {len(output.prompt_token_ids)}, chunk {position // 256}: "
          f"{'right' if is_right else 'wrong'} ({output.outputs[0].text})")

# %% [markdown] lang="en"
# The question stands in the last chunk. A code that stands there too is found; the others lie behind a wall. (Decoding
# sees the whole cache, but the keys in it were computed by tokens that had been blind, and the first digit was drawn by a
# chunk that could not see the code.) No assertion in the scheduler could catch it: blocks, tables and counts are in
# perfect order. Only the **answer** is wrong, which is why this engine's tests compare tokens with a reference for every
# way of cutting a prompt.
#
# ## Where you are
#
# - A step is a plan of rows; a row is how many tokens are new and how many are cached (2.2).
# - Decodes first, then chunks, then newcomers, oldest first (2.1, 2.3, 2.4).
# - Preemption gives up blocks and keeps tokens; no request is lost (2.4).
# - A draw depends on the request alone (2.5); answers share what they can (2.6).
#
# The deep dive is `docs_en/02_engine.md`. Next, chapter 03 replaces the reference attention by kernels of our own.

# %% [markdown] lang="zh" en_hash="0aa180bd"
# 问题总在最后一个分块里。密码也在这个分块的，找得到；其余的都隔在墙外。（解码时倒是看得见整个缓存，
# 可缓存里的键是当初蒙着眼的 token 算出来的，而第一位数字，又是由看不见密码的那个分块抽的。）
# 调度器里再怎么断言也抓不住它：块、块表、计数，样样井井有条。错的只有**回答**——
# 所以这个引擎的测试，会对每一种切法都拿 token 去和参考实现比对。
#
# ## 现在到了哪里
#
# - 一步就是由若干行组成的计划；一行就是“多少个新 token、多少个已缓存”（2.2）。
# - 先跑解码，再跑分块，最后放新人，每一类都从最老的开始（2.1、2.3、2.4）。
# - 抢占放弃的是块，留下的是 token，请求一个都不会丢（2.4）。
# - 抽样只取决于请求自己（2.5）；几个回答之间能共享的都共享（2.6）。
#
# 深入讲解见 `docs_zh/02_engine.md`。下一章是 03，用我们自己写的内核换下参考注意力。

# %%
pair.shutdown()
