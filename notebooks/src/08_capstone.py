# Chapter 08: the capstone. A router of one's own, in the engine and in a race on traces that nobody has seen. Rules: nanopd.workbook.

# %% [markdown] lang="en"
# # 08 Capstone
#
# Seven chapters built an engine. In this one you write the part that decides: **a router of your own**. It will run in the real
# engine, and it will race, on traces that neither you nor we have seen, against fixed policies, the engine's own router, and what is
# known only afterwards. At the end there is a score card.
#
# The race is **simulated**, by the profile of an H200 with Qwen3-8B: the scheduler, the block pool and the central scheduler are the
# engine's own, only times are made up by the cost model of chapter 04. What counts is **goodput**: requests a second that come and
# keep the promise, here a first token within 500 ms and 10 ms for each after it. It takes about an hour and needs no GPU.

# %% [markdown] lang="zh" en_hash="70bafbc1"
# # 08 综合练习
#
# 前面几章搭起了一台引擎。这一章，你来写做决定的那部分：**自己的路由器**。它要在真的引擎里跑，还要参加一场比赛：负载谁都没见过——你没有，我们也没有；
# 对手是几个固定策略、引擎自带的路由器，以及事后才知道的最好结果。最后发一张成绩单。
#
# 比赛是**仿真**的，按 H200 跑 Qwen3-8B 的测量数据计时：调度器、块池、中央调度器都是引擎自己的，只有时间来自第 04 章的代价模型。
# 算成绩的是**有效吞吐**：每秒到来的请求里，有多少个守住了承诺。这里的承诺是：首 token 不超过 500 毫秒，之后平均每个不超过 10 毫秒。
# 大约需要一个小时，不需要 GPU。

# %%
import math
from collections import Counter
from IPython.display import display
import nanopd
from nanopd import Cluster, SamplingParams
from nanopd.cost_model.presets import preset
from nanopd.router.length_predictor import BayesianLengthPredictor
from nanopd.router.policies import RoundRobin, Threshold
from nanopd.router.routing import Decision, Route
from nanopd.workbook import capstone, routing

# %% [markdown] lang="en"
# ## 8.1 What a router sees
#
# Six simulated GPUs: two C, which do everything, two P, which read, two D, which write. The practice trace has eighty requests:
# forty questions with long answers, then forty documents of 2,000 to 8,000 tokens. A router gets a `Question` (how long the prompt is,
# how long the answer may get, **not** how long it will be) and a view of each worker.
#
# `Scribe` below takes turns between the two ways and writes down what it is shown. **The longest queue at one worker, in tokens of
# prompts? And how many milliseconds of reading is that?** (Chapter 04: an H200 reads a token in about 22 µs.)

# %% [markdown] lang="zh" en_hash="1f83ed21"
# ## 8.1 路由器看得见什么
#
# 六块仿真的 GPU：两个 C，什么都做；两个 P，只读；两个 D，只写。练习负载有八十个请求：先是四十个问题，回答很长；然后是四十篇文档，2,000 到 8,000 个 token。
# 路由器拿到一个 `Question`（提示多长、回答最多多长，但**没有**回答会有多长），以及每个 Worker 的样子。
#
# 下面的 `Scribe` 让两条路轮流走，同时把看到的记下来。**单个 Worker 前面最长的队，有多少个提示 token？读完要多少毫秒？**
# （第 04 章：H200 读一个 token 大约 22 微秒。）

# %%
promise = capstone.PROMISE
guess = nanopd.predict("08.1", longest_queue_tokens=..., milliseconds=...)

# %%
class Scribe(RoundRobin):
    seen = []

    def choose(self, question, workers):
        self.seen += [(worker.queued.prompt_tokens, question.request_id, worker.worker_id) for worker in workers]
        if question.request_id == "60":
            print(question, *workers, sep="\n")
        return super().choose(question, workers)

_, result = capstone.simulate(Scribe(), capstone.practice())
read = preset(routing.PROFILE).cost.prefill.token_seconds  # seconds
longest, request_id, worker_id = max(Scribe.seen)
print(f"\nrequest {request_id} finds {longest:,} tokens at {worker_id}; {result.summary(promise).attainment:.0%} of all were in time")
guess.reveal(longest, 1e3 * read * longest)

# %% [markdown] lang="en"
# Each line is a worker: what is queued (tokens of prompts, pairs they attend to) and what it decodes (answers, tokens in their caches).
# Taking turns looks at none of it, so somebody joins a queue that alone takes most of the promise. Everything that a router may look
# at is in `nanopd/router/routing.py`; the fields that this chapter needs are few:
#
# | field | what |
# |---|---|
# | `role`, `is_open` | C, P or D; whether it may be given this request |
# | `queued.prompt_tokens`, `queued_since` | of prompts to be read there; since when the first of them has its turn |
# | `seats` | answers that it writes or will |
# | `prompts_per_second[1]` | tokens of prompts a second that it was given lately |
# | `cached_tokens` | of this prompt, that it has read before |
#
# ## 8.2 A score by hand
#
# A document of 4,000 tokens comes. P0 has nothing to write, but 10,000 tokens are queued there. C0 has no queue, but writes eight
# answers of 100 tokens each. Take 22 µs a token, and 5 ms for a step without prompts.
#
# **The document's TTFT at P0 and at C0, in ms? And each of the eight at C0 pays for it: their TPOT, in ms, if it falls into their time?**

# %% [markdown] lang="zh" en_hash="af5e8222"
# 每行是一个 Worker：排着什么（提示 token 数、要算的注意力对数），正在解码什么（几个回答、缓存里多少 token）。
# 轮流走的路由器一眼都不看，于是有人排进一条队，光这条队就用掉了承诺的一大半。路由器能看的都在 `nanopd/router/routing.py`，
# 这一章用得着的没几个：
#
# | 字段 | 含义 |
# |---|---|
# | `role`、`is_open` | C、P 或 D；能不能把这个请求给它 |
# | `queued.prompt_tokens`、`queued_since` | 等着在那儿读的提示 token；排头那个从什么时候轮到 |
# | `seats` | 正在写和将要写的回答数 |
# | `prompts_per_second[1]` | 最近每秒交给它的提示 token 数 |
# | `cached_tokens` | 这个提示里，它以前读过的 token |
#
# ## 8.2 用手打一次分
#
# 来了一篇 4,000 token 的文档。P0 什么都不用写，但前面排着 10,000 个 token。C0 没人排队，但正在写八个回答，每个 100 个 token。
# 按每 token 22 微秒、没有提示的一步 5 毫秒来算。
#
# **文档走 P0、走 C0，首 token 延迟各是多少毫秒？C0 上那八个回答都得替它埋单：碰上它，它们的每 token 延迟变成多少毫秒？**

# %%
guess = nanopd.predict("08.2", ttft_at_P0=..., ttft_at_C0=..., tpot_of_the_eight=...)

# %%
guess.reveal(1e3 * 22e-6 * (10_000 + 4_000), 1e3 * 22e-6 * 4_000, (100 * 5 + 1e3 * 22e-6 * 4_000) / 100)

# %% [markdown] lang="en"
# 308 ms, 88 ms, and 5.88 ms instead of 5. One document is nothing to the eight; with **six** of them they would be over 10 ms, all
# eight. So the same 22 µs is a queue for some and **interference** for others, and a good choice adds both up. Is the hand any good?
# Below, for every document of the practice trace, our two products beside the TTFT that the engine's own router expects.

# %% [markdown] lang="zh" en_hash="94f7c88c"
# 308 毫秒、88 毫秒，以及 5.88 毫秒（原来是 5）。来一篇文档，这八个回答不痛不痒；来**六篇**，八个就全超过 10 毫秒了。
# 所以同样的 22 微秒，对有的人是排队，对有的人是**干扰**，好的选择要把两头都算上。手算靠得住吗？下面对练习负载里的每篇文档，
# 把手算的结果跟引擎自带路由器预计的首 token 延迟放在一起看。

# %%
class Compare:
    """The engine's router; beside each forecast of a document, ours by hand."""

    router, ratios = routing.reference(), []

    def choose(self, question, workers):
        decision = self.router.choose(question, workers)
        if decision and question.prompt_len > 2000:
            queued = next(w.queued.prompt_tokens for w in workers if w.worker_id == decision.route.prefill)
            hand = question.now - question.arrival + read * (queued + question.prompt_len)
            self.ratios.append(hand / decision.scores[0].ttft)
        return decision

capstone.simulate(Compare(), capstone.practice())
print("by hand / forecast, lowest, median, highest:", [f"{sorted(Compare.ratios)[i]:.2f}" for i in (0, len(Compare.ratios) // 2, -1)])

# %% [markdown] lang="en"
# In the middle a little low: attention adds a term that grows with the square of the length, and every step has a floor. And far too
# high at times, where the prompt at the head of the queue is nearly done: `question.now - worker.queued_since` seconds of it are over.
#
# ## 8.3 Your first router
#
# **Exercise 8.3.** Write a class with `choose(question, workers)`: a `Decision(Route(reader, writer))`, or None to wait. A C may take all of
# it, `Route.collocated("C0")`. Let it look at queues and seats; chapter 06 did. The check asks it directly and races it: it must serve at
# least 75% of what the best fixed policy serves in time.

# %% [markdown] lang="zh" en_hash="ab217e7c"
# 中间的略微偏低：注意力还有一项随长度的平方增长，而且每一步都有个底。有时又高得离谱，那是队头的提示快读完了：
# 已经过去了 `question.now - worker.queued_since` 秒。
#
# ## 8.3 你的第一个路由器
#
# **练习 8.3** 写一个类，带方法 `choose(question, workers)`：返回 `Decision(Route(读的, 写的))`，或者返回 None 表示等一等。
# C 可以全包，即 `Route.collocated("C0")`。让它看看排队和座位，第 06 章做过。检查会直接问它，再让它参加比赛：
# 按时完成的请求，至少要有最好的固定策略的 75%。

# %% nbgrader={"grade_id": "ex-8-3", "solution": true}
class FirstRouter:
    """Where the least is in the way."""

    def choose(self, question, workers):
        ### BEGIN SOLUTION
        seat = 100  # tokens of a prompt that a seat counts as
        open_ones = [worker for worker in workers if worker.is_open]
        options = [(w.queued.prompt_tokens + seat * w.seats, Route.collocated(w.worker_id)) for w in open_ones if w.role == "C"]
        options += [(p.queued.prompt_tokens + seat * d.seats, Route(p.worker_id, d.worker_id))
                    for p in open_ones if p.role == "P" for d in open_ones if d.role == "D"]
        return Decision(min(options, key=lambda option: option[0])[1]) if options else None
        ### END SOLUTION

capstone.race(FirstRouter).show()

# %% nbgrader={"grade_id": "check-8-3", "points": 2}
nanopd.check("08.3", FirstRouter)

# %% [markdown] lang="en"
# ## 8.4 Where it loses
#
# Don't tune yet; look first. We take a router that looks at everything but knows **no promise**: the engine's own without an SLO, which
# adds up seconds. **Of the eighty requests, how many miss the promise? And of those, how many by TTFT, how many by TPOT?**

# %% [markdown] lang="zh" en_hash="7beae545"
# ## 8.4 输在哪里
#
# 先别急着调参，看看再说。我们拿一个什么都看、唯独**不知道承诺**的路由器：引擎自带的那个，不给 SLO，它只会把秒数加起来。
# **八十个请求里，有几个违约？其中几个是首 token 迟了，几个是每 token 延迟超了？**

# %%
guess = nanopd.predict("08.4", missed=..., by_ttft=..., by_tpot=...)

# %%
def late(result):
    """The requests that were late by TTFT, and those that were late by TPOT."""
    return ([one for one in result.requests if one.ttft > promise.ttft],
            [one for one in result.requests if (one.tpot or 0) > promise.tpot])

simulation, result = capstone.simulate(routing.reference(), capstone.practice())
by_ttft, by_tpot = late(result)
missed = {one.request_id: one for one in by_ttft + by_tpot}
guess.reveal(len(missed), len(by_ttft), len(by_tpot))
print("they went:", Counter(" -> ".join(one.path) for one in missed.values()), end="\n\n")
for worst in max(by_ttft, key=lambda one: one.ttft), max(by_tpot, key=lambda one: one.tpot):
    print(simulation.central.explain(worst.request_id), end="\n\n")

# %% [markdown] lang="en"
# Hold the starred column against the measured one. The sum of seconds weighs a document that waits a little longer exactly like a
# hundred tokens that each come a little late. A promise is no sum: a TTFT of 490 ms costs nothing, one of 510 ms costs a request. And
# what is over already can't get worse: a router that counts promises may put those in time first.
#
# ## 8.5 How sure?
#
# The forecast says 400 ms, the promise 500. Is it kept? Forecasts err by a factor rather than by so many milliseconds, because
# queues and lengths do; so let the **logarithm** of the time be a normal with its mean at the forecast and a deviation `spread` of 0.3.
# **With which probability does it come too late, in percent?**
#
# **Exercise 8.5.** Write the chance that a time which is `expected` comes out longer than `bound`.

# %% [markdown] lang="zh" en_hash="5494d915"
# 把带星号的那一列和实测的对着看。按秒数加总，一篇文档多等一会儿，跟一百个 token 各迟一点点，分量一模一样。承诺却不是加总：490 毫秒的首 token 延迟毫无代价，
# 510 毫秒就赔掉一个请求。而已经违约的也不会更糟：按承诺计数的路由器，可以让还来得及的先走。
#
# ## 8.5 有多大把握？
#
# 预测是 400 毫秒，承诺是 500，守得住吗？预测的误差是按倍数来的，不是固定差多少毫秒，因为排队和长度就是这样；所以设时间的**对数**服从正态分布，
# 中心在预测值，标准差 `spread` 取 0.3。**迟到的概率是百分之几？**
#
# **练习 8.5** 写出这个概率：预计为 `expected` 的时间，实际超过 `bound`。

# %%
guess = nanopd.predict("08.5", percent=...)

# %% nbgrader={"grade_id": "ex-8-5", "solution": true}
def chance_late(expected: float, bound: float, spread: float) -> float:
    """Probability of more than `bound` seconds, where the log of the time is normal around that of `expected`."""
    ### BEGIN SOLUTION
    if expected <= 0:
        return 0.0
    return math.erfc(math.log(bound / expected) / (spread * math.sqrt(2))) / 2
    ### END SOLUTION

# %% nbgrader={"grade_id": "check-8-5", "points": 2}
nanopd.check("08.5", chance_late)

# %%
from nanopd.router.cost_router import Spread

guess.reveal(100 * Spread(0.3).chance_above(0.5, 0.4))  # the engine's own

# %% [markdown] lang="en"
# 23%: a fourth of such requests, though the forecast kept the promise. That is how the engine's own router counts when it has an SLO: by
# how many requests are expected to miss it, this one and those beside it. Below, "yours" is the one without a promise; "reference"
# has it; and "told" has it and knows besides **how long every answer will be**, as no router can. **How many of a hundred requests does
# the promise gain? And how many more do the true lengths?**

# %% [markdown] lang="zh" en_hash="5b59cc00"
# 23%：预测明明守得住，这样的请求却有将近四分之一会迟到。引擎自带的路由器有了 SLO 就是这么数的：预计有几个请求会违约，自己的、旁边的都算。
# 下面“你的”那行是不知道承诺的；“参考路由器”知道；“预知长度”那行除了承诺，还知道**每个回答会有多长**——没有哪个路由器能知道。
# **知道承诺，一百个请求里能多守住几个？再知道真实长度呢？**

# %%
guess = nanopd.predict("08.5b", gained_by_the_promise=..., gained_by_the_lengths=...)

# %%
card = capstone.race(routing.reference)
card.show()
runs = card.heats[0].runs
guess.reveal(100 * (runs["reference"].attainment - runs["yours"].attainment),
             100 * (runs["told"].attainment - runs["reference"].attainment))

# %% [markdown] lang="en"
# Knowing what is promised is worth much; knowing the lengths next to nothing, on this trace: a mean length is enough to tell a queue from
# a batch. (Not on every trace: compare the same two rows in 8.8.) "In hindsight" on the card is the best that any
# of them reached. It is a bound that **can be had**, found afterwards; it is no proof that no better exists.
#
# ## 8.6 Your best router
#
# **Exercise 8.6.** Write it. A road that works: list the pairs (reader, writer) that are open; for each, what is expected of TTFT and
# TPOT, the chance of missing either, the seconds, and what those beside it lose; take the least. Learn lengths in `ended(answer)`
# (`answer.prompt_len`, `answer.output_len`, `answer.cut`). A C may also read for a D, or write for a P.
#
# Two points: never under 90% of the best fixed policy. Four more: at least 90% of the reference. Your microseconds are shown and count
# for nothing.

# %% [markdown] lang="zh" en_hash="8b3d42c5"
# 知道承诺很值钱；知道长度，在这份负载上几乎不值钱：要分清排队和批次，一个平均长度就够了。（换一份负载就未必，到 8.8 再比比这两行。）
# 成绩单上的“事后所知”，是这些路由器里的最好成绩。这个界**确实够得着**，只是事后才找到；它并不证明没有更好的。
#
# ## 8.6 你最好的路由器
#
# **练习 8.6** 动手写吧。有一条走得通的路：列出走得通的（读者，写者）对；给每一对算出预计的首 token 延迟和每 token 延迟、违约的概率、总秒数，
# 还有旁边的人的损失；取最小的。在 `ended(answer)` 里学长度（`answer.prompt_len`、`answer.output_len`、`answer.cut`）。
# C 也可以替 D 读，或者替 P 写。
#
# 两分：不低于最好的固定策略的 90%。再加四分：至少是参考路由器的 90%。你的微秒数只显示，不计分。

# %% nbgrader={"grade_id": "ex-8-6", "solution": true}
class MyRouter:
    """The pair that is expected to break the fewest promises; of those alike, the quickest."""

    def __init__(self):
        self.lengths = BayesianLengthPredictor()

    def choose(self, question, workers):
        ### BEGIN SOLUTION
        readers = [worker for worker in workers if worker.is_open and worker.role != "D"]
        writers = [worker for worker in workers if worker.is_open and worker.role != "P"]
        pairs = [(p, d) for p in readers for d in writers if p is not d or p.role == "C"]
        if not pairs:
            return None
        tokens = max(2.0, self.lengths.predict(question.prompt_len, question.max_tokens).mean())
        p, d = min(pairs, key=lambda pair: self.cost(question, *pair, tokens))
        return Decision(Route(p.worker_id, d.worker_id))

    READ, STEP, SEAT = 22e-6, 4.4e-3, 40e-6  # seconds: a token of a prompt, a step, and what each answer adds to it

    def cost(self, question, reader, writer, tokens):
        """Missed promises plus seconds: this request's, and a part of what those beside it lose."""
        queue = 0.0
        if reader.queued.prompt_tokens:
            queue = max(0.0, self.READ * reader.queued.prompt_tokens - (question.now - reader.queued_since))
        reading = self.STEP + self.READ * (question.prompt_len - reader.cached_tokens)
        ttft = question.now - question.arrival + queue + reading
        handover = 0.0 if reader is writer else 0.002 + 0.1 * reading
        busy = min(0.8, self.READ * writer.prompts_per_second[1])  # share of its time that prompts take from its answers
        tpot = (self.STEP + self.SEAT * (writer.seats + 1)) / (1 - busy)
        kept = (1 - chance_late(ttft, 0.5, 0.35)) * (1 - chance_late(tpot + handover / tokens, 0.010, 0.25))
        held_up = reader.seats * reading if reader.role == "C" else 0.0
        return 1 - kept + ttft + handover + tokens * tpot + 0.3 * (held_up + writer.seats * tokens * self.SEAT)
        ### END SOLUTION

    def ended(self, answer):
        self.lengths.update(answer.prompt_len, answer.output_len, answer.cut)

capstone.race(MyRouter).show()

# %% nbgrader={"grade_id": "check-8-6", "points": 2}
nanopd.check("08.6", MyRouter)

# %% nbgrader={"grade_id": "check-8-6b", "points": 4}
nanopd.check("08.6b", MyRouter)

# %% [markdown] lang="en"
# ## 8.7 In the real engine
#
# Enough of made-up times. The cell below serves the embedded model on this machine, one worker of each role, on GPUs where there are some.
# A router decides **where** an answer is written, never **what**. First a threshold of 200 tokens: **of eight prompts of 30 to 450
# tokens, in equal steps, how many leave the collocated worker? And how many answers differ from those of a single one?**
#
# Then yours: the check serves six requests with it and compares every token, and no lease may be left.

# %% [markdown] lang="zh" en_hash="7b456b80"
# ## 8.7 在真的引擎里
#
# 编出来的时间到此为止。下面这一格在这台机器上用内置模型处理请求，每种角色一个 Worker，有 GPU 就用 GPU。
# 路由器决定回答写在**哪儿**，从不决定写**什么**。先用 200 个 token 一刀切：**八个提示，从 30 到 450 个 token，等距排开，有几个会离开混部的 Worker？
# 跟只用一个 Worker 相比，有几个回答不一样？**
#
# 然后轮到你的：检查用它处理六个请求，逐个比对 token，并且一个租约都不许留下。

# %%
guess = nanopd.predict("08.7", sent_away=..., different=...)

# %%
greedy = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
prompts = [{"prompt_token_ids": list(range(200, 230 + 60 * number))} for number in range(8)]

def serve(topology, mode, **options):
    with Cluster("tiny", topology, mode, dtype="float32", num_gpu_blocks_override=256, **options) as cluster:
        outputs = cluster.generate(prompts, greedy, use_tqdm=False)
        return [one.outputs[0].token_ids for one in outputs], [str(cluster.timeline(one.request_id)) for one in outputs]

alone, _ = serve(capstone.topology().split()[0], "collocated")
routed, paths = serve(capstone.topology(), "adaptive", router=Threshold(200))
print(capstone.topology(), "|", *paths)
guess.reveal(sum("D" in path for path in paths), sum(one != other for one, other in zip(alone, routed)))

# %% nbgrader={"grade_id": "check-8-7", "points": 2}
nanopd.check("08.7", MyRouter)

# %% [markdown] lang="en"
# ## 8.8 The hidden traces
#
# You have tuned on one trace; whether you have learned anything shows on others. Three kinds: bursts of documents among questions,
# questions about sixteen documents that workers come to know, and one like the practice trace. Their seed is drawn now, and again in
# every new session. (Of a recorded trace: `capstone.race(MyRouter, [capstone.from_file("azure.csv", speed_up=10)])`.)
#
# **Your rank of six? How many percent of the reference?** Two points for at least 80% of the best fixed policy on every one of them,
# three more for at least 85% of the reference.

# %% [markdown] lang="zh" en_hash="c72de7a9"
# ## 8.8 没见过的负载
#
# 你在一份负载上调过参；到底学到了没有，得看别的。三种：问题当中成批涌来的文档；围着十六篇文档提问，Worker 会渐渐熟悉它们；还有一份跟练习负载相像。
# 种子现在才抽，每开一个新会话就重抽一次。（录制的负载也行：`capstone.race(MyRouter, [capstone.from_file("azure.csv", speed_up=10)])`。）
#
# **你在六个里排第几？是参考路由器的百分之几？** 每一份都不低于最好的固定策略的 80%，得两分；至少是参考路由器的 85%，再得三分。

# %%
guess = nanopd.predict("08.8", rank=..., percent_of_the_reference=...)

# %% nbgrader={"grade_id": "check-8-8", "points": 2}
card = capstone.race(MyRouter, capstone.hidden())
card.show()
guess.reveal(card.rank, 100 * card.of_reference)
nanopd.check("08.8", MyRouter)

# %% nbgrader={"grade_id": "check-8-8b", "points": 3}
display(card.figure())
nanopd.check("08.8b", MyRouter)

# %% [markdown] lang="en"
# The seed was not ours to choose, so you may have been lucky, or not: `capstone.race(MyRouter, capstone.hidden(seed))` for a few seeds tells
# which.
#
# ## 8.9 Break it
#
# The engine's own router, with the promise and with all its formulas, but without the planner, which shares out parts (that costs it
# something: the first line below). Then one weight is 0: what the **others** lose. Every request now looks after itself, and each single
# choice is the best there is, for the one who makes it. **How many percent of the reference is left on the practice trace? And what of
# it goes wrong, how many requests by TTFT, how many by TPOT?**

# %% [markdown] lang="zh" en_hash="3373f96c"
# 种子不是我们挑的，所以你也许走运，也许不走运：换几个种子跑 `capstone.race(MyRouter, capstone.hidden(seed))`，就知道了。
#
# ## 8.9 弄坏它
#
# 还是引擎自带的路由器，知道承诺，公式一个不少，只是没有分派角色的规划器（少了它会差一些，看下面第一行）。再把一个权重设成 0：**别人**的损失。于是每个请求只顾自己，而每一次选择，对做选择的那个请求来说都是最好的。
# **在练习负载上，还剩参考路由器的百分之几？错在哪里：几个请求首 token 迟了，几个每 token 延迟超了？**

# %%
guess = nanopd.predict("08.9", percent_of_the_reference=..., by_ttft=..., by_tpot=...)

# %%
for others in (1.0, 0.0):
    _, result = capstone.simulate(routing.reference(slo=promise, others=others), capstone.practice())
    by_ttft, by_tpot = late(result)
    share = result.summary(promise).attainment / runs["reference"].attainment
    print(f"others count {others:g}: {share:.0%} of the reference; late by TTFT {len(by_ttft)}, by TPOT {len(by_tpot)}")
guess.reveal(100 * share, len(by_ttft), len(by_tpot))

# %% [markdown] lang="en"
# Nobody waits for a first token any more: by TTFT it beats the reference. It is TPOT that breaks, for who reads quickly on a C does so at
# the cost of a dozen who write there. Each forecast was right, and each choice the best for the request that it was made for. Only their
# sum is bad: a tragedy of the commons, in milliseconds. A dashboard of TTFT would applaud.
#
# Where does it show? In the explanation of a choice, in the line `others`, beside the seconds that were saved. Does your router have such a
# term? Set its weight to 0, and to 3, and race again.
#
# ## What the card does not show
#
# - It is a **simulation** by one profile. The engine's decisions are real, the times are a cost model's: no jitter, no slow worker, links
#   that do not disturb each other. Chapter 07 measures.
# - A choice costs no time in it. At a hundred requests a second, 5 ms a choice would be half of a core.
# - Goodput has no mercy: a request that is late already is worth nothing, so giving up on it is free. Users feel otherwise. Read the p99
#   of end to end, too.
# - Eighty requests a trace: some percent up or down are luck. Rank by several seeds.
#
# ## Where you are
#
# You can read a serving engine from block tables to goodput, change it, and say with numbers whether the change was worth it. The
# engine takes your router as it is: `Cluster("tiny", "C:cpu P:cpu D:cpu", "adaptive", router=MyRouter())`.

# %% [markdown] lang="zh" en_hash="70e5481e"
# 谁也不用久等首 token 了：光看首 token 延迟，它胜过参考路由器。垮掉的是每 token 延迟：在 C 上读得快，代价由正在那儿写的十来个回答来付。
# 每个预测都对，每次选择对那个请求自己都是最好的，坏的只是总和：一出以毫秒计的公地悲剧。只盯着首 token 延迟的监控面板，还会叫好呢。
#
# 从哪儿看得出来？看一次选择的解释，看省下的秒数旁边、`others` 那一行。你的路由器里有这样一项吗？把它的权重设成 0，再设成 3，各比一场。
#
# ## 成绩单没有告诉你的
#
# - 这是按一份测量数据做的**仿真**。决策是引擎真做的，时间是代价模型算的：没有抖动，没有掉队者，链路之间互不干扰。要实测，看第 07 章。
# - 在这里，做一次选择不花时间。每秒一百个请求的话，5 毫秒一次就要占掉半个核。
# - 有效吞吐不讲情面：已经迟到的请求一文不值，放弃它没有代价。用户可不这么想，所以也要看端到端的 p99。
# - 每份负载只有八十个请求：上下差几个百分点是运气。要排名次，多换几个种子。
#
# ## 现在到了哪里
#
# 从块表到有效吞吐，你已经能读懂一台推理服务引擎，能改它，还能用数字说清楚改得值不值。引擎可以直接用你的路由器：
# `Cluster("tiny", "C:cpu P:cpu D:cpu", "adaptive", router=MyRouter())`。
