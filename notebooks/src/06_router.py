# Chapter 06: router. How long an answer will be, where a request should go, and what it cost to be wrong. Rules: nanopd.workbook.

# %% [markdown] lang="en"
# # 06 Router
#
# Chapter 05 left you with two ways to serve a request: all of it on one worker, or read here and written there. Which one is
# better depends on the prompt, on who waits where, and on a number that nobody knows when the request comes: **how long the
# answer will be**. In this chapter you learn that number as answers end, price both ways, watch decisions fall live, and then
# measure what each decision cost.
#
# It takes about an hour, and all of it runs on a CPU. The code is in `nanopd/router/`. What is simulated says so.

# %% [markdown] lang="zh" en_hash="cf27b6d0"
# # 06 路由器
#
# 第 05 章留给你两条路：整个请求都在一个 Worker 上做；或者在这边读、在那边写。哪条更好，要看提示多长、谁在哪儿排队，还要看一个请求到来时谁也不知道的数：
# **回答会有多长**。这一章里，你会随着回答一个个结束把这个数学出来，给两条路各算一笔账，现场看决策怎么做出来，最后量一量每个决策值不值。
#
# 大约需要一个小时，全部在 CPU 上就能跑。代码在 `nanopd/router/`。凡是仿真出来的，都会注明。

# %%
import math
import random
import time
from statistics import fmean
import nanopd
from nanopd import Cluster, SamplingParams, widgets
from nanopd.router.length_baselines import ConstantLength, WindowedMean
from nanopd.router.length_predictor import BayesianLengthPredictor, Belief, Evidence
from nanopd.router.length_scores import Answer, score
from nanopd.router.policies import AlwaysCollocated, AlwaysDisaggregated, RoundRobin, Threshold
from nanopd.router.routing import Decision, Route
from nanopd.workbook import routing

# %% [markdown] lang="en"
# ## 6.1 How long will it be?
#
# Lengths of answers are lopsided: many short ones, a few very long. Their **logarithms** are nearly a bell, so that is what we
# learn. Before anything has ended we believe in e^4.85 = 128 tokens, but only as firmly as from **half** an answer
# (`kappa = 0.5`). Now two answers end, of 16 and of 64 tokens. Each counts as one.
#
# On paper, in powers of two: 128 = 2^7, 16 = 2^4, 64 = 2^6. The new centre is the weighted mean of the exponents. **How many
# tokens do we believe in now?**

# %% [markdown] lang="zh" en_hash="41f4dbc5"
# ## 6.1 回答会有多长？
#
# 回答的长度很不对称：短的多，偶尔有几个特别长。但取了**对数**，就很接近一条钟形曲线，所以我们学的是对数。还没有任何回答结束时，我们相信是
# e^4.85 = 128 个 token，不过信得很浅，只抵**半个**回答（`kappa = 0.5`）。现在结束了两个回答，分别是 16 和 64 个 token，各算一个。
#
# 用笔算，写成 2 的幂：128 = 2^7，16 = 2^4，64 = 2^6。新的中心是这些指数的加权平均。**现在我们相信是多少个 token？**

# %%
guess = nanopd.predict("06.1", tokens=...)

# %%
prior = BayesianLengthPredictor.PRIOR
evidence = Evidence()
for length in (16, 64):
    evidence.add(math.log(length))
after = evidence.posterior(prior)
print("before:", prior)
print("after: ", after)
guess.reveal(tokens=math.exp(after.mean))

# %% [markdown] lang="en"
# (0.5 · 7 + 4 + 6) / 2.5 = 5.4, and 2^5.4 is 42. Two answers outweigh half a one. The same bookkeeping holds for the spread:
# `dof` says from how many answers the variance is known. A posterior of this shape is again a prior of the same shape; that is
# what **conjugate** means, and why an update costs a handful of additions and no integral.
#
# **Exercise 6.1.** Write the update, for any number of lengths at once. The new sum of squares has three parts: what the
# prior brings (`dof * variance`), how far the logarithms lie from their own mean, and how far the two means lie apart.

# %% [markdown] lang="zh" en_hash="f4e5dd7f"
# (0.5 · 7 + 4 + 6) / 2.5 = 5.4，而 2^5.4 是 42。两个回答压过了半个。离散程度也是这么记账的：`dof` 表示方差是从几个回答里知道的。
# 更新之后的后验，形状和先验一样，又可以当作下一次的先验——这就是**共轭**的意思，所以一次更新只要几次加法，不用积分。
#
# **练习 6.1** 写出这个更新，一次可以给任意多个长度。新的平方和有三份：先验带来的（`dof * variance`），各个对数偏离它们自己均值的，以及两个均值之间相差的。

# %% nbgrader={"grade_id": "ex-6-1", "solution": true}
def posterior(prior: Belief, lengths: list[int]) -> Belief:
    """What to believe of log length after answers of these lengths."""
    ### BEGIN SOLUTION
    logs = [math.log(length) for length in lengths]
    n, mean = len(logs), fmean(logs)
    kappa, dof = prior.kappa + n, prior.dof + n
    squares = prior.dof * prior.variance + sum((x - mean) ** 2 for x in logs)
    squares += prior.kappa * n / kappa * (mean - prior.mean) ** 2
    return Belief((prior.kappa * prior.mean + n * mean) / kappa, squares / dof, kappa, dof)
    ### END SOLUTION

# %% nbgrader={"grade_id": "check-6-1", "points": 2}
nanopd.check("06.1", posterior)

# %% [markdown] lang="en"
# ## 6.2 Answers that were cut
#
# The earlier system called its predictor Bayesian; it was the mean of the last hundred lengths. What is wrong with a mean?
# Below, 600 answers with a true mean of about 120 tokens, but 100 is all they may have: the rest is **cut**. A cut answer has
# not told its length. It has told that it is **at least** 100.
#
# **After these, somebody comes who allows 1,000 tokens. What does the windowed mean expect? And the posterior?**

# %% [markdown] lang="zh" en_hash="241d302b"
# ## 6.2 被截断的回答
#
# 早先那个系统把自己的预测器叫作“贝叶斯”，其实是最近一百个长度的平均值。平均值有什么不好？下面有 600 个回答，真正的均值在 120 个 token 左右，
# 可最多只许 100 个，多出来的都被**截断**了。被截断的回答没有说出自己的长度，它只说了：**至少** 100。
#
# **看完这些之后，来了一个允许 1,000 个 token 的请求。滑动平均会估多少？后验又会估多少？**

# %%
guess = nanopd.predict("06.2", windowed_mean=..., posterior_mean=...)

# %%
draw = random.Random(62)
lengths = [max(1, round(draw.lognormvariate(4.4, 0.9))) for _ in range(600)]
cut_at_100 = [Answer(64, min(length, 100), length >= 100, 100) for length in lengths]
window, bayes = WindowedMean(), BayesianLengthPredictor()
for answer in cut_at_100:
    window.update(64, answer.output_len, answer.cut)
    bayes.update(64, answer.output_len, answer.cut)
print(f"true mean {fmean(lengths):.0f} tokens; {sum(a.cut for a in cut_at_100) / 6:.0f}% were cut")
guess.reveal(window.predict(64, 1000).mean(), bayes.predict(64, 1000).mean())

# %% [markdown] lang="en"
# The mean believes that 100 was the length. The posterior counts a cut answer with what a length beyond 100 is expected to be,
# and comes out far closer to the truth, though it has seen no length above 100. It has to trust the bell for that: beyond what
# was ever observed it can only extrapolate.
#
# A single number is not enough for a router anyway: it wants to know how sure it may be. A forecast is scored **before** its
# answer is learned: by the log probability of what happened (`log_score`, higher is better), and by how often 90% intervals
# hold 90%. Halfway, the lengths shift to a third.

# %% [markdown] lang="zh" en_hash="f10a74e8"
# 平均值以为 100 就是长度。后验则把被截断的回答按“超过 100 的长度平均会有多长”来计，结果离真相近得多，尽管它一个超过 100 的长度也没见过。
# 代价是它得相信那条钟形曲线：从没观察到的地方，只能外推。
#
# 而且对路由器来说，一个数还不够，它还想知道有多大把握。预测都在学到答案**之前**打分：看实际发生的事当初给了多少对数概率（`log_score`，越高越好），
# 再看 90% 的区间是不是真的装下了 90%。放到一半，长度突然变成三分之一。

# %%
shifted = [Answer(64, length if i < 300 else max(1, length // 3), False, 2000) for i, length in enumerate(lengths)]
for name, predictor in {"posterior": BayesianLengthPredictor(), "windowed mean": WindowedMean(),
                        "constant": ConstantLength(120)}.items():
    found = score(predictor, shifted, skip=20)
    print(f"{name:14} log score {found.log_score:6.2f}   90% intervals hold {found.central_coverage:4.0%}   "
          f"bias {found.bias:+6.1f} tokens")

# %% [markdown] lang="en"
# The constant can't move. The windowed mean moves late, and its bell on the plain (not the log) scale gives probability to
# lengths that can't be. The posterior forgets slowly and sets an alarm: where answers fall too often into corners of its
# forecast, it starts anew.
#
# ## 6.3 Both ways, by term
#
# Now the router. For each route it adds up: waiting in line and at the worker, prefill, the exposed transfer, the handover,
# decoding for the length forecast, interference by prompts yet to come; and, beside it, what the **others** on those workers
# lose. The times come from a cost model (chapter 04), measured now, on this machine. Then two requests, a short and a long one,
# meet four streaming answers on C0; P0 and D0 are idle. **Of the two, how many does the router send away from C0?**

# %% [markdown] lang="zh" en_hash="81dae45c"
# 常数动不了。滑动平均动得慢，而且它的钟形画在原来的尺度上（不是对数），给根本不可能的长度也分了概率。后验一边慢慢遗忘，一边装着警报：
# 回答总是落在预测的边角里，它就重新开始。
#
# ## 6.3 两条路，一项一项算
#
# 轮到路由器了。每条路线它都加一遍：在中央和在 Worker 前排队、预填充、露在外面的传输、交接、按预测长度解码、以后到来的提示造成的干扰；旁边再记上，
# 那些 Worker 上的**别人**因此损失多少。各项时间来自代价模型（第 04 章），现在就在这台机器上测。然后，C0 上有四个回答正在往外流，
# P0 和 D0 闲着，来了一短一长两个请求。**这两个里，路由器会把几个从 C0 支开？**

# %%
guess = nanopd.predict("06.3", sent_away=...)

# %%
from nanopd.cost_model.profiler import profile_cluster

three = "C:cpu P:cpu D:cpu"
with Cluster("tiny", three, "collocated", dtype="float32") as idle:
    profile = profile_cluster(idle, seconds=12)
prefill, decode = profile.cost.prefill, profile.cost.decode
print(f"a prompt's token {prefill.token_seconds * 1e6:.0f} µs; a decode step at least {decode.floor_seconds * 1e3:.1f} ms")

# %%
cluster = Cluster("tiny", three, "adaptive", profile=profile, dtype="float32", enable_prefix_caching=False)
forty = SamplingParams(temperature=0, max_tokens=40, ignore_eos=True)
busy = [cluster.submit({"prompt_token_ids": [300 + i] * 40}, forty, mode="collocated") for i in range(4)]
for _ in range(5):
    cluster.step()
asked = [cluster.submit({"prompt_token_ids": list(range(100, 100 + n))}, forty) for n in (30, 900)]
for stream in busy + asked:
    stream.result()
guess.reveal(sent_away=sum(cluster.explain(one.request_id).decision.route.mode == "disaggregated" for one in asked))
print(cluster.explain(asked[1].request_id))

# %% [markdown] lang="en"
# Read the columns. A star marks the route taken. `objective` is what is compared: end to end, plus what the others lose.
# The last column is what really happened, and here it is **larger** than the forecast: the model prices workers with a device
# each, and in this process all three take turns on one CPU. A router is only as right as its picture of the machine.
#
# ## 6.4 Live
#
# Below, requests come at random moments whether you are ready or not. Press Start and move the sliders: rate, prompts, output
# length and mode work at once; topology and tokens a step need another cluster, hence another Start. Each point on top is a
# decision. Try this: mixed prompts and a rate at which the queue just holds, then change the mode.

# %% [markdown] lang="zh" en_hash="ea0fcfce"
# 一列一列看。星号是走的那条。`objective` 是拿来比较的：端到端时间，加上别人的损失。最后一列是实际发生的，在这里**大于**预测：
# 模型假定每个 Worker 各有一个设备，而在这个进程里，三个 Worker 轮流用同一个 CPU。路由器对机器的认识有多准，它就有多准。
#
# ## 6.4 现场
#
# 下面的请求在随机的时刻到来，不管你准备好了没有。按“开始”，然后拖动滑块：速率、提示、输出长度和模式立刻生效；拓扑和每步 token 数要换一个集群，
# 所以得重新开始。最上面每个点是一次决策。试试看：提示选长短混合，把速率调到队列刚好稳得住，然后切换模式。

# %%
from nanopd.widgets.live_load import Load

live = widgets.LiveServing(topologies=[three, "C:cpu", "P:cpu D:cpu"], profile=profile, dtype="float32",
                           load=Load(rate=2, output_tokens=16, mode="adaptive"))
live

# %%
live.start()  # or press the button; this runs it for ten seconds
time.sleep(10)
live.stop()
picture = live.driver.picture()
print(f"{len(picture.requests)} requests came, {picture.num_finished} of them ended before Stop")
print("ways taken:", {way: sum(one.mode == way for one in picture.requests) for way in ("collocated", "disaggregated")})

# %% [markdown] lang="en"
# One CPU is a small cluster: its three workers take turns. So here are **recorded** runs of other machines, H200s if somebody has
# recorded them, with every request that came. Pick one and press play, at its own pace or five times as fast. Nothing in it is
# measured now; the badge says on what it was made, when, and by which commit. The rate rises past what can be served, then falls,
# and each mode was sent the same requests. Watch where the queue begins to grow, and point at a decision of the adaptive run: it
# says what the router expected of either way.

# %% [markdown] lang="zh" en_hash="51d03c97"
# 一个 CPU 只是个很小的集群，三个 Worker 得轮着来。所以下面放的是在别的机器上**录制的**运行，每个请求都在里面，有人在 H200 上录过的话就有 H200 的。
# 选一份，按播放，原速或五倍速都行。这里没有一个数是现在测的：在什么设备上、哪天、用哪个提交录的，横条上都写着。速率一路升到处理不过来，再降下去；
# 每个模式收到的请求都一样。看看队列从哪一刻开始涨；再把鼠标移到自适应那次的某个决策上，能看到路由器当时对两条路各是怎么估的。

# %%
replay = widgets.LiveReplay("h200")
replay

# %% [markdown] lang="en"
# Back to your own run, under the microscope: click a request. Two bars are forecasts, the best route of either way; the third was measured. The
# **regret** in the line is an estimate, measured time less what the other way was forecast to take for an answer of the length
# that it turned out to have. Nobody measured the road not taken.

# %% [markdown] lang="zh" en_hash="8dd311ff"
# 回到你自己那次运行，放到显微镜下：点一个请求。两根条是预测，两条路各自最好的路线；第三根是实测。那行字里的**遗憾值**是个估计：实测的时间，
# 减去另一条路按它实际的回答长度预测出来的时间。没走的那条路，谁也没有量过。

# %%
microscope = widgets.RoutingMicroscope(live.explanations())
live.shutdown()
cluster.shutdown()
microscope

# %% [markdown] lang="en"
# ## 6.5 Write a router
#
# For a fair race we need the same requests again and again, on a machine with real devices: so from here on it is a
# **simulation**, with the engine's own scheduler, pool and central scheduler, on six simulated GPUs (four C, one P, one D) that
# take the times of the H200's profile. The trace: short questions, and now and then a burst of six long documents.
#
# **Taking turns between the two ways: by how many percent do requests take longer, on average, than with the reference? And
# with a threshold of 512 tokens?**

# %% [markdown] lang="zh" en_hash="9aa1685c"
# ## 6.5 写一个路由器
#
# 要公平地比，就得让同样的请求一遍遍重来，而且要在有真设备的机器上。所以从这里起是**仿真**：调度器、块池、中央调度器都是引擎自己的，
# 六块仿真的 GPU（四个 C，一个 P，一个 D）按 H200 的测量数据计时。负载是短问题，时不时一下子来六篇长文档。
#
# **两条路轮流走，请求平均会比用参考路由器多花百分之几的时间？按 512 个 token 一刀切呢？**

# %%
guess = nanopd.predict("06.5", taking_turns_percent=..., threshold_percent=...)

# %%
load = routing.trace()
simulation, best = routing.simulate(routing.reference(), load)
regrets = {}
for router in (RoundRobin(), Threshold(512), AlwaysCollocated(), AlwaysDisaggregated()):
    result = routing.simulate(router, load)[1]
    regrets[type(router).__name__] = 100 * routing.regret(result, best)
    print(f"{type(router).__name__:20} {regrets[type(router).__name__]:+6.1f}%  {result.summary().shares}")
guess.reveal(regrets["RoundRobin"], regrets["Threshold"])

# %% [markdown] lang="en"
# A fixed rule fails where its premise does: the single P can't take every long document of a burst, and the threshold sends it
# all of them. The always-collocated row leaves two GPUs idle, so don't read it as a verdict on collocation: it would rather
# have six C.
#
# A naive version first: a draw among all routes that are open. It shows the form, too: a class with a method `choose`.

# %% [markdown] lang="zh" en_hash="522e8091"
# 固定的规则，前提一垮就跟着垮：一下子来的长文档，唯一的 P 接不完，而一刀切偏偏全塞给它。“总是混部”那行让两块 GPU 闲着，
# 别把它当成对混部的判决：换成六个 C，它会好得多。
#
# 先来个朴素的版本：在所有走得通的路线里抽签。顺便看看形式：一个类，带一个 `choose` 方法。

# %%
class Lottery:
    """Any route that is open."""

    draw = random.Random(65)

    def choose(self, question, workers):
        here, read, write = ([w.worker_id for w in workers if w.role == role and w.is_open] for role in "CPD")
        routes = [Route.collocated(c) for c in here] + [Route(p, d) for p in read for d in write]
        return Decision(self.draw.choice(routes)) if routes else None

print(f"{100 * routing.regret(routing.simulate(Lottery(), load)[1], best):+.1f}%")

# %% [markdown] lang="en"
# **Exercise 6.5.** Write `choose(question, workers)`. Of each worker you see `role`, `is_open`, `queued.prompt_tokens` (of
# prompts it has yet to read), `seats` (answers it writes or will), and more: `nanopd/router/routing.py`. The check asks it
# directly, runs the real engine with it, and lets it serve the trace: at most 20% regret against the reference.

# %% [markdown] lang="zh" en_hash="443c3393"
# **练习 6.5** 写 `choose(question, workers)`。每个 Worker 你能看到 `role`、`is_open`、`queued.prompt_tokens`（还没读的提示）、
# `seats`（正在写和将要写的回答数），还有更多，见 `nanopd/router/routing.py`。检查会直接问它，用它跑真的引擎，再让它处理这份负载：
# 对参考路由器的遗憾值不超过 20%。

# %% nbgrader={"grade_id": "ex-6-5", "solution": true}
def choose(question, workers) -> Decision | None:
    """Where the request goes, or None to wait."""
    ### BEGIN SOLUTION
    seat = 100  # tokens of a prompt that a seat counts as
    open_ones = [worker for worker in workers if worker.is_open]
    options = [(w.queued.prompt_tokens + seat * w.seats, Route.collocated(w.worker_id)) for w in open_ones if w.role == "C"]
    options += [(p.queued.prompt_tokens + seat * d.seats, Route(p.worker_id, d.worker_id))
                for p in open_ones if p.role == "P" for d in open_ones if d.role == "D"]
    return Decision(min(options, key=lambda option: option[0])[1]) if options else None
    ### END SOLUTION

# %% nbgrader={"grade_id": "check-6-5", "points": 4}
nanopd.check("06.5", choose)

# %% [markdown] lang="en"
# ## 6.6 A regret that can be measured
#
# In a simulation the road not taken **can** be taken: run the trace again with one request sent the other way, and all else
# the same. Below, for six requests, what the explanation estimates and what the replay says. **Of six decisions, how many does
# the replay call wrong for the request itself?**

# %% [markdown] lang="zh" en_hash="056481f1"
# ## 6.6 量得出来的遗憾
#
# 仿真里，没走的路是**可以**走的：同一份负载重放一遍，只把一个请求支到另一条路上，其余照旧。下面挑六个请求，看解释里的估计，再看重放的结果。
# **六个决策里，单就这个请求自己而言，重放会判几个是错的？**

# %%
guess = nanopd.predict("06.6", wrong_of_six=...)

# %%
from nanopd.widgets.routing_microscope import regret

replayed = {}
for request_id in ("20", "50", "80", "110", "140", "170"):
    explained = simulation.central.explain(request_id)
    other = routing.simulate(routing.Detour(routing.reference(), request_id), load)[1]
    replayed[request_id] = best.requests[int(request_id)].e2e - other.requests[int(request_id)].e2e
    print(f"request {request_id:>3}, {explained.question.prompt_len:5} tokens, {explained.measured.path:9}"
          f" regret estimated {1e3 * (regret(explained) or 0):+7.1f} ms, replayed {1e3 * replayed[request_id]:+7.1f} ms")
guess.reveal(sum(lost > 0 for lost in replayed.values()))

# %% [markdown] lang="en"
# Above 0 the other way was quicker for this one request. That alone doesn't make a decision wrong: the router weighs what the
# others lose as well, and it did not know what was going to arrive. And compare the two columns: mostly they come
# near each other, and now and then not even the sign agrees. The estimate holds one forecast against one measurement, and
# knows nothing of how those that came later would have gone elsewhere, too. It is a hint where to look, not a verdict.
#
# ## 6.7 Who has read this before?
#
# Four collocated workers, and questions about forty-eight documents of 2,048 tokens. A worker that has read a document keeps
# its blocks (chapter 01). A router that knows this sends questions where their document lies. **By which factor does the
# median TTFT fall?**

# %% [markdown] lang="zh" en_hash="b8f16405"
# 大于 0，说明对这一个请求来说，另一条路更快。但光凭这一点，不能说决策错了：路由器还要掂量别人的损失，而且它不知道接下来会来什么。
# 再把两列对着看：多半相差不远，偶尔却连正负号都反了。估计只是拿一个预测去比一次实测，并不知道后来的请求也会跟着改道。
# 所以，把它当作“该往哪儿看”的提示，别当判决。
#
# ## 6.7 谁读过这个？
#
# 四个混部 Worker，问题围绕四十八篇 2,048 token 的文档。读过一篇文档的 Worker 会留着它的块（第 01 章）。知道这件事的路由器，就把问题送到文档所在的地方。
# **首 token 延迟的中位数会降到几分之一？**

# %%
guess = nanopd.predict("06.7", times_shorter=...)

# %%
from nanopd.simulator import Arrival

draw, now, questions = random.Random(67), 0.0, []
for _ in range(240):
    now += draw.expovariate(40)
    first = 4 * draw.randrange(48)  # a document is four pieces of 512 tokens
    prompt_len, output_len = 2048 + draw.randint(20, 60), draw.randint(10, 60)
    questions.append(Arrival(now, prompt_len, output_len, 512, prefix=tuple(range(first, first + 4))))

def ttft(**options) -> float:
    result = routing.simulate(routing.reference(**options), questions, {"C": 4})[1]
    print(options or "cache-aware", "| found in caches:", sum(result.cached_tokens.values()), "tokens")
    return result.summary().ttft.p50

guess.reveal(ttft(reads_prefixes=False) / ttft())

# %% [markdown] lang="en"
# The blind router finds some by luck, and the more the longer it runs: in the end every worker has read every document. (With
# a dozen documents that end is near at once, and the gain is gone; try it.) With no shared beginnings there is none either.
# And if everybody asked about one document, all would crowd on its worker, were the queue not in the same sum.
#
# ## 6.8 Break it
#
# Many a production router polls its workers' metrics, say, twice a second. Below, the reference itself, seeing the workers as
# they were up to half a second ago. The numbers are right, only old. **How many percent regret?**

# %% [markdown] lang="zh" en_hash="311e80f9"
# 不看缓存的路由器也能碰巧命中一些，跑得越久命中越多：到头来，每个 Worker 都读过每篇文档。（文档只有一打的话，很快就到这一步，收益也就没了，
# 不妨试试。）没有共同的开头，同样没有收益。要是人人都问同一篇文档，大家就会挤到同一个 Worker 上——好在排队时间也在同一笔账里。
#
# ## 6.8 弄坏它
#
# 线上不少路由器是轮询 Worker 指标的，比如一秒两次。下面还是那个参考路由器，只是它看到的 Worker，是至多半秒之前的样子。数字都对，只是旧了。
# **遗憾值会是百分之几？**

# %%
guess = nanopd.predict("06.8", regret_percent=...)

# %%
from itertools import groupby

stale = routing.simulate(routing.OldNews(routing.reference(), 0.5), load)[1]
guess.reveal(100 * routing.regret(stale, best))
for name, result in {"fresh": best, "old": stale}.items():
    paths = [" -> ".join(dict.fromkeys(one.path)) for one in result.requests]
    longest = max(len([*group]) for _, group in groupby(paths))
    print(f"{name:6} p90 of TTFT {1e3 * result.summary().ttft.p90:,.0f} ms; longest run of one and the same route: {longest}")

# %% [markdown] lang="en"
# The best worker half a second ago is everybody's best worker now: they run to it as a herd, and then to the next. No term of
# the score is wrong, and the log would show sensible decisions one by one; only side by side do they give themselves away.
# nanoPD's books change with every message that is sent, so that a decision already counts in the next one.
#
# Repair it without fresher news: let the stale router also count what it has itself sent since the last look. Which of the
# fields would you change?
#
# ## Where you are
#
# - A posterior over log length: conjugate, censored, quick to notice a shift (6.1, 6.2).
# - A route's cost is a sum of named terms, others' losses included (6.3); decisions fall live (6.4).
# - Estimated regret is no measurement; a replay is one (6.5, 6.6).
# - Caches and fresh books are worth as much as a good formula (6.7, 6.8).
#
# The deep dive is `docs_en/06_router.md`. Next, chapter 07 puts a load on all of it and measures goodput.

# %% [markdown] lang="zh" en_hash="01ded699"
# 半秒前最好的 Worker，现在是所有人眼里最好的：大家一窝蜂涌过去，再涌向下一个。打分里没有一项是错的，日志里一条一条看，决策都合情合理；
# 摆在一起才露馅。nanoPD 的账本随每条发出的消息更新，所以这一次的决定，下一次就已经算在里面了。
#
# 不准看更新的消息，把它修好：让这个消息迟钝的路由器，把上次看过之后自己送出去的也算上。你会改哪几个字段？
#
# ## 现在到了哪里
#
# - 对数长度上的后验：共轭，懂得截断，变化来了很快察觉（6.1、6.2）。
# - 一条路线的代价是若干有名字的项之和，别人的损失也在内（6.3）；决策现场可见（6.4）。
# - 估计出来的遗憾不是实测；重放才是（6.5、6.6）。
# - 缓存和及时的账本，跟一个好公式一样值钱（6.7、6.8）。
#
# 深入讲解见 `docs_zh/06_router.md`。下一章是 07，给这一切加上负载，量一量有效吞吐。
