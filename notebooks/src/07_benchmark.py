# Chapter 07: benchmark. Loads that do not wait, figures that can be trusted, and when disaggregation loses. Rules: nanopd.workbook.

# %% [markdown] lang="en"
# # 07 Benchmark
#
# Chapter 06 decides where a request goes. Was it worth it? For that you need a load, some figures, and the right to believe
# them, and each of the three can deceive you: a client that politely waits hides a slow server; a mean hides its victims; a
# p99 from fifty requests is a rumour. In this chapter you build a load that doesn't wait, learn to read what it says, and look
# at recorded H200s to see **when disaggregation pays and when it loses**.
#
# It takes about an hour, and all of it runs on a CPU. The code is in `nanopd/benchmark/load/`. What is simulated says so.

# %% [markdown] lang="zh" en_hash="3144f0a8"
# # 07 基准测试
#
# 第 06 章决定请求往哪里去。那么，值不值呢？要回答这个问题，得有负载，有指标，还得有底气相信它们，而这三样都可能骗人：客户端客客气气地等着，
# 慢服务器就藏起来了；平均值一算，受害者就不见了；五十个请求算出来的 p99，只能当传闻听。这一章里，你要造一个不等人的负载，学会读它说的话，
# 再看看 H200 上录下来的数据：**分离什么时候划算，什么时候会输**。
#
# 大约需要一个小时，全部在 CPU 上就能跑。代码在 `nanopd/benchmark/load/`。凡是仿真出来的，都会注明。

# %%
import random
import time
from statistics import fmean, median
import nanopd
from nanopd import Cluster, SamplingParams, widgets
from nanopd.benchmark import results
from nanopd.benchmark.load import ClientRecord, Load, Schedule, load_metrics, poisson_schedule, serve_cluster, workload
from nanopd.config import SLO
from nanopd.metrics import meets, quantile
from nanopd.simulator import Arrival
from nanopd.widgets.sweep_explorer import Cell
from nanopd.workbook import loads

# %% [markdown] lang="en"
# ## 7.1 A client that waits
#
# The simplest load generator there is: send a request, wait for the answer, send the next one. Below it has a timetable, 20
# requests a second for five seconds. In the middle we **stop the worker's process for one second**, as a hanging driver or a
# greedy neighbour might. Ask any user who came in that second.
#
# **Of 100 requests, what percent takes longer than 0.3 s, says the client that waits? And a client that sends each request
# when it is due, whatever has become of the others?**

# %% [markdown] lang="zh" en_hash="5ae27d30"
# ## 7.1 会等的客户端
#
# 最简单的压测工具：发一个请求，等它答完，再发下一个。下面这个有一张时刻表，每秒 20 个请求，持续五秒。跑到一半，我们**让 Worker 的进程停一秒**，
# 就像驱动卡住了，或者来了个贪心的邻居。那一秒里来的用户是什么感受，不用问也知道。
#
# **100 个请求里，超过 0.3 秒的占百分之几？会等的客户端怎么说？另一个客户端到点就发，不管前面的有没有答完，它又怎么说？**

# %%
guess = nanopd.predict("07.1", client_that_waits=..., client_that_does_not=...)

# %%
cluster = Cluster("tiny", "C:cpu", "collocated", executor="process", dtype="float32", max_num_seqs=16, max_queued=40,
                  enable_prefix_caching=False)

def one_at_a_time(schedule: Schedule) -> list[float]:
    """Seconds from when each was sent."""
    begin, seconds = time.monotonic(), []
    for one in schedule.arrivals:
        time.sleep(max(0.0, begin + one.time - time.monotonic()))
        sent = time.monotonic()
        greedy = SamplingParams(temperature=0, max_tokens=one.output_len, ignore_eos=True)
        cluster.submit({"prompt_token_ids": [300] * one.prompt_len}, greedy).result()
        seconds.append(time.monotonic() - sent)
    return seconds

# %%
timetable = Schedule([Arrival(number / 20, prompt_len=30, output_len=4) for number in range(100)], 0.0, 5.0)
one_at_a_time(Schedule(timetable.arrivals[:10], 0.0, 1.0))  # warms the worker up
loads.hold(cluster, after=2.0, seconds=1.0)
waited = one_at_a_time(timetable)
loads.hold(cluster, after=2.0, seconds=1.0)
# Who is refused, for too many are open, waits for ever.
did_not = [one.e2e if one.status == "completed" else float("inf") for one in serve_cluster(cluster, timetable).counted]
for name, seconds in {"waits": waited, "does not": did_not}.items():
    print(f"{name:9} median {1e3 * median(seconds):6.0f} ms   p99 {1e3 * quantile(seconds, 0.99):6.0f} ms   "
          f"longest {1e3 * max(seconds):6.0f} ms")
guess.reveal(*(100 * fmean(second > 0.3 for second in seconds) for seconds in (waited, did_not)))

# %% [markdown] lang="en"
# Both clients met the same stop. The one that waits has **one** bad request to show for it: the twenty that should have come
# meanwhile it sent afterwards, and started their clocks then. It has agreed with the server not to look when things go
# badly; hence the name **coordinated omission**. Its p99 doesn't even notice. The other one is an **open loop**: users
# don't wait for each other, and a clock starts when a request is **due**, not when the client got round to it.
#
# By how much a client was late is worth a column of its own (`mean_lateness_ms`): if it is large, the client is the
# bottleneck, and you have measured that.
#
# **Exercise 7.1.** Write the loop. `server.now` is the time in seconds; `server.send(i)` starts request i and returns at once;
# `server.wait(until)` returns `[(i, when it ended), ...]` as soon as there is one, or an empty list when it is `until`, or a
# little later. Return how long each request took for its user.

# %% [markdown] lang="zh" en_hash="19a7a233"
# 两个客户端遇到的是同一次停顿。会等的那个只交出**一个**慢请求：停顿期间本该发出的那二十个，它等恢复了才发，表也是那时才掐的。
# 它等于和服务器串通好了：情况一坏，就都别看。所以这种毛病叫**协同遗漏**（coordinated omission）。它的 p99 甚至毫无察觉。
# 另一个才是**开环**：用户之间谁也不等谁；表从请求**该发**的那一刻掐起，而不是客户端腾出手来的那一刻。
#
# 客户端自己迟了多少，值得单列一栏（`mean_lateness_ms`）：要是很大，瓶颈就是客户端，你量到的也就是它。
#
# **练习 7.1** 写出这个循环。`server.now` 是当前时间，单位秒；`server.send(i)` 发出请求 i，立刻返回；`server.wait(until)` 一有请求结束就返回
# `[(i, 结束时刻), ...]`，没有的话，到了 `until`（或者稍晚一点）返回空列表。返回每个请求的用户各等了多久。

# %% nbgrader={"grade_id": "ex-7-1", "solution": true}
def open_loop(due: list[float], server) -> list[float]:
    """Send request i at `due[i]`. Returns the seconds that each took."""
    ### BEGIN SOLUTION
    ended, sent = {}, 0
    while len(ended) < len(due):
        while sent < len(due) and due[sent] <= server.now:
            server.send(sent)
            sent += 1
        ended |= dict(server.wait(due[sent] if sent < len(due) else float("inf")))
    return [ended[i] - due[i] for i in range(len(due))]
    ### END SOLUTION

# %% nbgrader={"grade_id": "check-7-1", "points": 3}
nanopd.check("07.1", open_loop)

# %% [markdown] lang="en"
# ## 7.2 The same rate, another load
#
# Real users don't come by a timetable. If they know nothing of each other, gaps are exponential: a **Poisson** process.
# Often it is worse: one page sends ten requests. `burstiness` is the shape of a Gamma distribution of the gaps (as in `vllm
# bench serve`): 1 is Poisson, 0.25 comes in bursts, 50 is nearly a timetable. Below, the same 18 requests a second on one
# simulated H200. **How many times as long is the p99 of TTFT in bursts as by timetable?**

# %% [markdown] lang="zh" en_hash="3f4328b8"
# ## 7.2 速率一样，负载不一样
#
# 真实的用户不按时刻表来。要是他们互不相干，间隔就服从指数分布，这就是**泊松**过程。实际往往更糟：一个页面一口气发十个请求。
# `burstiness` 是间隔的 Gamma 分布的形状参数（和 `vllm bench serve` 一样）：1 就是泊松，0.25 是一阵一阵地来，50 差不多就是时刻表了。
# 下面都是每秒 18 个请求，一块仿真的 H200。**一阵一阵来的时候，TTFT 的 p99 是按时刻表来的几倍？**

# %%
guess = nanopd.predict("07.2", times_as_long=...)

# %%
tails = {}
for burstiness in (50, 1, 0.25):
    schedule = poisson_schedule(18, workload("mixed"), window=15, burstiness=burstiness)
    ttfts = [one.ttft for one in loads.simulate(schedule, {"C": 1})]
    tails[burstiness] = quantile(ttfts, 0.99)
    print(f"burstiness {burstiness:5}: {len(ttfts)} requests, TTFT median {1e3 * median(ttfts):3.0f} ms, "
          f"p99 {1e3 * tails[burstiness]:4.0f} ms (simulated)")
guess.reveal(tails[0.25] / tails[50])

# %% [markdown] lang="en"
# So a rate alone describes no load. Beside it belong the arrivals, the lengths of prompts and answers, and the seed, so
# that every mode is given the very same requests.
#
# ## 7.3 Four times and a quantile
#
# Of each request: **TTFT**, until the first token; **ITL**, each gap between two tokens; **TPOT**, the mean of those gaps; **E2E**,
# all of it. Below are the tokens of one answer: find the gap that TPOT doesn't show.
#
# Then two workers. A has served 900 requests and its p99 is 99 ms; B 100 requests, p99 2,000 ms. The mean of the two is 1,050
# ms, and a dashboard would say so. **What is the p99 of all 1,000 if B's times are evenly spread from 20 to 2,020 ms? And if
# two of B's took 2,000 ms, and the rest 50?**

# %% [markdown] lang="zh" en_hash="773f1bb9"
# 所以光报一个速率，等于没说清负载。旁边还得写上到达方式、提示和回答的长度，还有随机种子——这样，各个模式拿到的才是一模一样的请求。
#
# ## 7.3 四个时间，一个分位数
#
# 每个请求有四个时间：**TTFT**，到首个 token 为止；**ITL**，相邻两个 token 的间隔，每个间隔算一个；**TPOT**，这些间隔的平均；**E2E**，从头到尾。
# 下面先看一个回答里各个 token 的时刻，找出被 TPOT 藏起来的那个间隔。
#
# 然后是两个 Worker。A 处理了 900 个请求，p99 是 99 毫秒；B 处理了 100 个，p99 是 2,000 毫秒。两个一平均，1,050 毫秒，监控大盘上就这么写。
# **如果 B 的时间均匀分布在 20 到 2,020 毫秒之间，这 1,000 个请求的 p99 是多少？如果 B 只有两个是 2,000 毫秒，其余都是 50 呢？**

# %%
guess = nanopd.predict("07.3", evenly_spread=..., two_slow_ones=...)

# %%
one = ClientRecord(0.0, prompt_len=100, output_len=5, tokens=[0.30, 0.35, 0.40, 1.20, 1.25])
print(f"TTFT {one.ttft:.2f} s, TPOT {one.tpot:.2f} s, longest ITL {max(one.itl):.2f} s, E2E {one.e2e:.2f} s")
a = [10 + number / 10 for number in range(900)]
spread, two_slow = [20 * number for number in range(2, 102)], [50] * 98 + [2000] * 2
for b in (spread, two_slow):
    print(f"p99 of A {quantile(a, 0.99):.0f} ms, of B {quantile(b, 0.99):.0f} ms; mean of the two "
          f"{fmean([quantile(a, 0.99), quantile(b, 0.99)]):.0f} ms; of all {quantile(a + b, 0.99):.0f} ms")
by_hand = sorted(spread)[int(0.99 * len(spread))]  # everybody's first p99
print(f"by hand: {by_hand} ms, which all of the {sum(value <= by_hand for value in spread)} do not exceed")
guess.reveal(quantile(a + spread, 0.99), quantile(a + two_slow, 0.99))

# %% [markdown] lang="en"
# The same two p99s, and of all it is one or the other: **quantiles do not average**. Nor over seeds, minutes, or GPUs: put
# the requests together, or say "the p99 of each run". And p99 by hand was the maximum: off by one place, which of a hundred
# values is everything.
#
# ## 7.4 When to count
#
# An empty server is quick: the first requests flatter it, so they **warm up** and don't count. Then the **window**, and then
# everybody in it is answered (**drain**); breaking off would leave out just the slow ones. That gives a number. Is it the
# server's? On one simulated H200 that bears about 30 requests a second, we offer 42. **By which factor does the mean TTFT
# grow if the window is four times as long?**

# %% [markdown] lang="zh" en_hash="9db5c531"
# 同样的两个 p99，合在一起却可以天差地别：**分位数是不能平均的**。跨随机种子、跨分钟、跨 GPU 都不行：要么把请求合起来算，要么老老实实说“每一次的 p99”。
# 还有，手算的那个 p99 其实是最大值：只差了一位，可一百个数里，差一位就差了全部。
#
# ## 7.4 什么时候算数
#
# 空着的服务器当然快，最早的请求会给它脸上贴金，所以那一段是**预热**，不算数。接着是**窗口**，窗口里来的请求全部等到答完（**排空**）；
# 要是到点就掐，漏掉的恰恰是慢的那些。这样就得到一个数。可这个数是服务器的吗？一块仿真的 H200，每秒大约能扛 30 个请求，我们给它 42 个。
# **窗口拉长到四倍，平均 TTFT 会变成几倍？**

# %%
guess = nanopd.predict("07.4", times_as_long=...)

# %%
means = {}
for window in (3, 6, 12):
    served = loads.simulate(poisson_schedule(42, workload("mixed"), window=window), {"C": 1})
    means[window] = fmean(one.ttft for one in served)
    print(f"window {window:2} s: mean TTFT {means[window]:.2f} s (simulated)")
guess.reveal(means[12] / means[3])

# %% [markdown] lang="en"
# The longer you look, the slower it gets, for the queue grows from the moment that the empty server is full. A queue that grows
# has no latency of its own: what you have measured is **your patience**. So every run is asked whether it was steady, by how many requests are open in each tenth of the window
# (`metrics["steady"]`); a run that wasn't says one thing only: more than it can take.
#
# ## 7.5 The knee
#
# How much can it take? For that one question the client that waits is right: 32 of them keep the server full, and what it
# does then is its capacity. Next, the open loop at some shares of that. **From 0.3 to 1.5 of the capacity, the rate grows by
# a factor of five. By which do tokens a second grow, and by which the median TTFT?**

# %% [markdown] lang="zh" en_hash="46bafeff"
# 看得越久，它就越慢：空服务器一满，队列就开始涨，再也不停。队列一直在涨，就谈不上什么“延迟”了：你量到的是**你自己的耐心**。所以每次运行都要问一句：稳不稳？
# 看的是窗口切成十段，每段里有多少请求还没答完（`metrics["steady"]`）。不稳的运行只说明一件事：超过它的能力了。
#
# ## 7.5 拐点
#
# 那它的能力是多少？唯独在这个问题上，会等的客户端是对的：32 个这样的客户端让服务器一直满着，这时它干多少，就是它的容量。
# 接下来，用开环按容量的若干比例加压。**从容量的 0.3 到 1.5，速率涨到五倍。每秒 token 数涨到几倍？TTFT 的中位数呢？**

# %%
guess = nanopd.predict("07.5", tokens_per_second=..., median_ttft=...)

# %%
def capacity(users: int = 32, num_requests: int = 80) -> float:
    """Requests a second, by clients that wait."""
    sixteen = SamplingParams(temperature=0, max_tokens=16, ignore_eos=True)
    begin, ended, num_open = time.monotonic(), 0, 0
    while ended < num_requests:
        for _ in range(min(users, num_requests - ended) - num_open):
            cluster.submit({"prompt_token_ids": [300] * 60}, sixteen)
            num_open += 1
        now_ended = sum(event.finish_reason is not None for event in cluster.step())
        ended, num_open = ended + now_ended, num_open - now_ended
    return num_requests / (time.monotonic() - begin)

# %%
most, runs, figures = capacity(), {}, {}
print(f"{most:.0f} requests/s at most, so 32 users wait {32 / most:.2f} s each (Little's law)")
for share in (0.3, 0.6, 0.9, 1.5):
    gap = 1 / (share * most)  # so that each run has about as many requests
    runs[share] = serve_cluster(cluster, poisson_schedule(share * most, workload("40-80/16"), window=60 * gap, warmup=15 * gap))
    figures[share] = load_metrics(runs[share])
    f = figures[share]
    print(f"{share:.1f}: {f['window_output_throughput']:4.0f} tokens/s, TTFT median {f['median_ttft_ms']:4.0f} p99 {f['p99_ttft_ms']:5.0f}"
          f" ms, dropped {f['dropped']:2}, client late {f['mean_lateness_ms']:.0f} ms, steady: {f['steady']['is_steady']}")
guess.reveal(*(figures[1.5][name] / figures[0.3][name] for name in ("window_output_throughput", "median_ttft_ms")))

# %% [markdown] lang="en"
# Throughput climbs, then lies flat; TTFT lies flat, then climbs. Where they change places is the **knee**, and anything past
# it is a plan for being late. Refusing (`dropped`) keeps the queue, and so TTFT, from growing for ever; a queue that is always full
# even counts as steady. (On a machine that does other things besides, a line or two will be off. Run the cell again: that it
# changes is a result, too; see 7.7.)
#
# Find the knee by hand as well: Start, and push the rate up until the queue no longer comes down.

# %% [markdown] lang="zh" en_hash="81c2198e"
# 吞吐先爬坡，后躺平；TTFT 先躺平，后爬坡。两者交接的地方就是**拐点**，过了它，等于计划好了要迟到。拒收（`dropped`）让队列有个头，TTFT 也就不会一直涨下去；一直满着的队列，甚至也算“稳”。
# （机器上还跑着别的东西的话，总有一两行会不像样。再跑一遍这一格试试：数会变，这本身也是个结果，见 7.7。）
#
# 也亲手找一找拐点：按“开始”，把速率往上推，推到队列再也下不来为止。

# %%
from nanopd.widgets.live_load import Load as LiveLoad

live = widgets.LiveServing(topologies=["C:cpu"], router="collocated", dtype="float32",
                           load=LiveLoad(rate=3, mix="short", output_tokens=16))
live.start()  # or press the button; this runs it for five seconds
time.sleep(5)
live.stop()
live

# %% [markdown] lang="en"
# ## 7.6 Goodput
#
# A token that comes too late is of no use, but throughput counts it. So promise something: an **SLO**, here five times the
# TTFT and the TPOT of the quietest run. **Goodput** is how many requests a second keep the promise; **attainment** is
# the share of them. **At 1.5 times the capacity, what percent of its best does throughput have? And goodput?**

# %% [markdown] lang="zh" en_hash="5c00298d"
# ## 7.6 有效吞吐
#
# 来得太晚的 token 没有用，吞吐却照样算它。那就先许个诺：定一个 **SLO**，这里取最清闲那次运行的 TTFT 和 TPOT 各五倍。
# **有效吞吐**是每秒有多少个请求兑现了承诺；**达标率**是它们占的比例。**在容量的 1.5 倍处，吞吐还有它最好时的百分之几？有效吞吐呢？**

# %%
guess = nanopd.predict("07.6", throughput_percent=..., goodput_percent=...)

# %%
slo = SLO(5e-3 * figures[0.3]["median_ttft_ms"], 5e-3 * figures[0.3]["median_tpot_ms"])
judged = {share: load_metrics(run, slo) for share, run in runs.items()}
for share, f in judged.items():
    print(f"{share:.1f}: {f['request_throughput']:5.1f} requests/s answered, {f['request_goodput']:5.1f} in time, attainment "
          f"{f['attainment']:4.0%}, of {f['completed']} answered and {f['dropped']} refused")
names = ("window_output_throughput", "request_goodput")
guess.reveal(*(100 * judged[1.5][name] / max(f[name] for f in judged.values()) for name in names))

# %% [markdown] lang="en"
# **Exercise 7.6.** Write both figures. `load.counted` are the requests of the window; each has a `status`, "completed",
# "failed" or "dropped", and `meets(record, slo)` looks at a completed one. `seconds` is how long it took, from the first
# arrival that counts to the last token.

# %% [markdown] lang="zh" en_hash="7d39cfc2"
# **练习 7.6** 写出这两个指标。`load.counted` 是窗口里的请求；每个都有 `status`：“completed”“failed”或“dropped”，`meets(record, slo)` 只看答完了的。
# `seconds` 是总共花的时间，从第一个算数的请求到达，到最后一个 token。

# %% nbgrader={"grade_id": "ex-7-6", "solution": true}
def good(load: Load, slo: SLO, seconds: float) -> tuple[float, float]:
    """(attainment, goodput in requests a second)."""
    ### BEGIN SOLUTION
    met = sum(record.status == "completed" and meets(record, slo) for record in load.counted)
    return met / len(load.counted), met / seconds
    ### END SOLUTION

# %% nbgrader={"grade_id": "check-7-6", "points": 2}
nanopd.check("07.6", good)

# %%
widgets.SweepExplorer([Cell.of_load("C:cpu", share * most, run) for share, run in runs.items()], "measured", "C:cpu, tiny", slo)

# %% [markdown] lang="en"
# Move the sliders: the runs stay as they were, and the promise changes which of them were good. Bars are 95% intervals.
#
# ## 7.7 How sure?
#
# The p99 of 100 requests is made by the slowest two. Suppose the server has a true p99, of infinitely many requests. **In what
# percent of runs of 100 requests was even the slowest one quicker than that? And of 1,000?** (Paper will do: each request has
# one chance in a hundred to be slower.)

# %% [markdown] lang="zh" en_hash="ed157715"
# 拖动滑块：运行还是那些运行，承诺一变，哪些算好就跟着变。竖线是 95% 区间。
#
# ## 7.7 有多大把握？
#
# 100 个请求的 p99，是由最慢的两个决定的。假设服务器有一个真正的 p99，由无穷多个请求得出。
# **跑 100 个请求，连最慢的那个都比它快，这样的运行占百分之几？跑 1,000 个呢？**（纸上就能算：每个请求有百分之一的机会比它更慢。）

# %%
guess = nanopd.predict("07.7", of_100=..., of_1000=...)

# %%
draw, below = random.Random(77), {}
for number in (100, 1000):
    samples = [[draw.lognormvariate(0, 0.5) for _ in range(number)] for _ in range(500)]
    truth = 3.200  # the p99 of that lognormal: exp(0.5 * 2.3263)
    estimates = sorted(quantile(sample, 0.99) / truth for sample in samples)
    below[number] = 100 * fmean(max(sample) < truth for sample in samples)
    print(f"{number:4} requests: 95% of the estimates lie between {estimates[12]:.2f} and {estimates[487]:.2f} of the truth")
guess.reveal(below[100], below[1000])

# %% [markdown] lang="en"
# You have one run, not five hundred. The **bootstrap** makes do with it: draw as many values from it as it has, **with
# replacement**, take the quantile of those, and do that a thousand times; what holds the middle 95% of them is the interval.
#
# **Exercise 7.7.** Write it.

# %% [markdown] lang="zh" en_hash="1a29f687"
# 可你手上只有一次运行，没有五百次。**自助法**（bootstrap）就靠这一次：从里面**有放回**地抽出同样多个值，算它们的分位数，
# 这样做一千遍；中间 95% 所在的范围，就是区间。
#
# **练习 7.7** 把它写出来。

# %% nbgrader={"grade_id": "ex-7-7", "solution": true}
def interval(values: list[float], share: float, draws: int = 1000, seed: int = 0) -> tuple[float, float]:
    """Where the quantile lies with 95% confidence: (low, high)."""
    ### BEGIN SOLUTION
    draw = random.Random(seed)
    found = sorted(quantile(draw.choices(values, k=len(values)), share) for _ in range(draws))
    return quantile(found, 0.025), quantile(found, 0.975)
    ### END SOLUTION

# %% nbgrader={"grade_id": "check-7-7", "points": 3}
nanopd.check("07.7", interval)

# %% [markdown] lang="en"
# One assumption is in it, that requests are independent, and in a queue they are not: who comes behind a slow one is slow as
# well. Below, one simulated run with its interval, and seven more with other seeds. Count how many lie outside.

# %% [markdown] lang="zh" en_hash="c3e78956"
# 这里头有个假设：请求之间互相独立。可排着队的时候并不是，前面的慢，后面的也跟着慢。下面是一次仿真和它的区间，再加上换了种子的七次。
# 数一数有几个落在外面。

# %%
def record_of(one) -> ClientRecord:
    return ClientRecord(one.arrival, one.prompt_len, one.num_tokens, sent=one.arrival, ended=one.arrival + one.e2e, status="completed",
                        tokens=[one.arrival + one.ttft, one.arrival + one.e2e], num_reported=one.num_tokens)

tails = []
for seed in range(8):
    schedule = poisson_schedule(24, workload("mixed"), window=6, warmup=2, seed=seed)
    f = load_metrics(Load([record_of(one) for one in loads.simulate(schedule, {"C": 1})], 2.0, 8.0), bootstrap=1000 if seed == 0 else 0)
    tails.append(f["p99_ttft_ms"])
    low, high = f["ci"]["p99_ttft_ms"] if seed == 0 else (low, high)
print(f"p99 of TTFT {tails[0]:.0f} ms, 95% interval {low:.0f} to {high:.0f} ms; other seeds (simulated):")
print([f"{tail:.0f}{'' if low <= tail <= high else ' outside'}" for tail in tails[1:]])

# %% [markdown] lang="en"
# ## 7.8 Three modes, the same GPUs
#
# More lie outside than one in twenty. Some would even if requests were independent, for the interval speaks of the truth, not of
# the next run; here they are not, so it is too narrow. Trust several seeds more than one interval.
#
# Now the question that this workbook is about. Two H200s, Qwen3-8B, an open loop: both collocated, or one reads and the other
# writes. Not simulated: **recorded**, and read from the package. Prompts of 1,024 to 2,048 tokens, at 0.9 of what the lesser
# mode was estimated to bear. **How many times as long is disaggregated TTFT (p99)? How many times as long is collocated TPOT?**

# %% [markdown] lang="zh" en_hash="640b539b"
# ## 7.8 三种模式，同样多的 GPU
#
# 落在外面的远不止二十分之一。就算请求互相独立，也会有几个在外面，因为区间说的是真值，不是下一次运行；何况它们并不独立，所以区间偏窄了。
# 与其信一个区间，不如多信几个种子。
#
# 现在来到这本书真正要问的问题。两块 H200，Qwen3-8B，开环负载：要么两块都混部，要么一块读、一块写。这不是仿真，是**录下来**的，从包里读出来。
# 提示 1,024 到 2,048 个 token，负载是估计中较弱那个模式所能承受的 0.9。**分离的 TTFT（p99）是混部的几倍？混部的 TPOT 又是分离的几倍？**

# %%
guess = nanopd.predict("07.8", ttft_disaggregated=..., tpot_collocated=...)

# %%
report = results.load("routing", "h200")
print("recorded:", report.source)
at = {(row["prompts"], row["load"], row["mode"]): row for row in report.rows}
for (prompts, level, mode), row in at.items():
    print(f"{prompts:5} {level:4} {row['rate']:4.1f}/s {mode:13}  p99: TTFT {row['ttft_p99_ms']:6.0f} ms, TPOT {row['tpot_p99_ms']:4.1f}"
          f" ms   within 500 and 12 ms: {row['attainment']:4.0%}")
here, there = at["long", "0.9", "collocated"], at["long", "0.9", "disaggregated"]
guess.reveal(there["ttft_p99_ms"] / here["ttft_p99_ms"], here["tpot_p99_ms"] / there["tpot_p99_ms"])

# %% [markdown] lang="en"
# Read down the TPOT of the disaggregated rows: about 6 ms, **whatever the load**; the writer is never disturbed. Collocated it
# climbs with every prompt that is read in between. Now TTFT: disaggregated, one GPU reads what two share otherwise, so it is
# two to three times as long, and at full load (what the better mode just bears) that GPU is overrun and nearly nobody is
# served in time. So which mode is better has **no answer** without an SLO.
#
# The recorded file has quantiles only. To move the SLO you need requests: here is such a sweep **simulated**, with the adaptive
# mode as well, whose two workers may take any part. Its router is told the SLO before it starts, so there are two: one was told
# 12 ms of TPOT, the other 7. Pull TPOT from 12 ms to 7. Then put it back and pull TTFT to 150.

# %% [markdown] lang="zh" en_hash="980274ee"
# 顺着分离那几行的 TPOT 往下看：**不管负载多高**，都是 6 毫秒左右——写的那块从不被打扰。混部的则随着夹在中间读的提示一路往上爬。再看 TTFT：
# 分离时，本来两块一起读的，现在归一块读，所以长到两三倍；到了满载（较强的模式刚好扛得住），这块 GPU 被压垮，几乎没有请求能按时。
# 所以不先定 SLO，“哪个模式好”就**没有答案**。
#
# 录下来的文件里只有分位数。要移动 SLO，得有一个个请求：下面是一份类似的扫描，**仿真**的，还加上了自适应模式，它的两个 Worker 什么角色都可以当。
# 自适应的路由器开工之前就得知道 SLO，所以有两条线：一个听说的 TPOT 是 12 毫秒，一个是 7 毫秒。把 TPOT 从 12 毫秒拉到 7；再放回去，把 TTFT 拉到 150。

# %%
promise, cells = SLO(ttft=0.5, tpot=0.012), []
ways = {"collocated": ({"C": 2}, promise), "disaggregated": ({"P": 1, "D": 1}, promise), "adaptive": ({"C": 2}, promise),
        "adaptive (7 ms)": ({"C": 2}, SLO(ttft=0.5, tpot=0.007))}
for rate in (14, 20, 26, 32):
    schedule = poisson_schedule(rate, workload("long"), window=80 / rate, warmup=20 / rate)
    for way, (workers, told) in ways.items():
        cells.append(Cell.of_simulated(way, rate, loads.simulate(schedule, workers, way.split()[0], told)))
simulated = (cells, "simulated", "2 x NVIDIA H200, Qwen3-8B, 1024-2048/128", promise)
sweep = widgets.SweepExplorer(*simulated)
sweep

# %% [markdown] lang="en"
# That was a simulation. Now a sweep that was **recorded**, with its requests: on GPUs if one comes with this package, else on a CPU,
# which shows the form of it and says nothing of GPUs. The line above the figure says which (and if none was recorded at all, you
# see the simulated one again). **Pull TPOT down until one mode is left; put it back, and do the same with TTFT. Is the order that
# of the simulation?**

# %% [markdown] lang="zh" en_hash="37a27b95"
# 那是仿真。再看一份**录制的**扫描，一个个请求都在：包里有 GPU 上录的就用 GPU 的，没有就用 CPU 上录的，那只能看个样子，说明不了 GPU。
# 图上面那行字写着是哪一种（要是一份也没录过，看到的就还是仿真的那份）。**把 TPOT 往下拉，拉到只剩一个模式；放回去，再拉 TTFT。先后次序和仿真的一样吗？**

# %%
recorded = loads.recorded_sweep()
sweep = widgets.SweepExplorer(*(recorded or simulated))
sweep

# %% [markdown] lang="en"
# So disaggregation **wins** where TPOT is tight and prompts are long. It **loses** where TTFT is tight; near saturation, for
# parts of a fixed size are rarely both full (recorded, closed loop: 42 requests/s against 49 collocated on the same two
# GPUs); with short prompts, which disturb nobody; and over a slow link. The adaptive mode can be either, if it is told what was
# promised. (Replace `long` by `short` above, with rates to 240. And try `seed=1`: near the knee, one seed decides nothing.)
#
# **Exercise 7.8.** Read a sweep. Of each mode you are given the 95% interval of goodput at each rate. Say for each rate that
# **all** modes were run at which mode is surely the best: its interval lies above all others. None where nobody can tell. The
# crossover is where the name changes.

# %% [markdown] lang="zh" en_hash="843b8e49"
# 所以，TPOT 卡得紧、提示又长的时候，分离**赢**。它**输**在这些地方：TTFT 卡得紧；接近饱和时——两边的大小是固定的，很少能同时吃满
# （录得的闭环数据：同样两块 GPU，分离每秒 42 个请求，混部 49 个）；提示很短时，本来就打扰不到谁；还有链路慢的时候。
# 自适应模式两样都做得来，只要告诉它许了什么诺。（把上面的 `long` 换成 `short`，速率加到 240 试试。再试试 `seed=1`：在拐点附近，一个种子说了不算。）
#
# **练习 7.8** 读一份扫描。给你每个模式在每个速率下有效吞吐的 95% 区间。对**所有**模式都跑过的每个速率，说出哪个模式肯定最好：
# 它的区间在其他所有区间之上。分不出来就是 None。名字变了的地方，就是交叉点。

# %% nbgrader={"grade_id": "ex-7-8", "solution": true}
def winners(sweep: dict[str, dict[float, tuple[float, float]]]) -> dict[float, str | None]:
    """`sweep[mode][rate]` is (low, high). Returns the surely best mode by rate, in the order of the rates."""
    ### BEGIN SOLUTION
    found = {}
    for rate in sorted(set.intersection(*(set(curve) for curve in sweep.values()))):
        best = max(sweep, key=lambda mode: sweep[mode][rate][0])
        others = [curve[rate][1] for mode, curve in sweep.items() if mode != best]
        found[rate] = best if all(high < sweep[best][rate][0] for high in others) else None
    return found
    ### END SOLUTION

# %% nbgrader={"grade_id": "check-7-8", "points": 3}
nanopd.check("07.8", winners)

# %% [markdown] lang="en"
# ## 7.9 Break it
#
# Three benchmarks by people in a hurry. All are given the same load, 1.6 times what the server can take, and the same SLO (half
# of those whom the honest benchmark saw answered are in time), and report how well it did. One **holds requests back** while the server is slow. One **counts the warming up**. One **leaves out
# who was refused**. All three come out better than the honest one. **Which is which?** Guess A, B or C, in quotation marks,
# once before you look and once after.

# %% [markdown] lang="zh" en_hash="59d138e7"
# ## 7.9 弄坏它
#
# 三个赶时间的人写的基准测试。负载都一样，是服务器容量的 1.6 倍；SLO 也一样：老实的那份里，答完的请求有一半按时。然后各自报告成绩。有一个在服务器慢的时候**压着请求不发**；
# 有一个**把预热也算进去**；有一个**不算被拒收的**。三份成绩都比老实的那份好看。**谁是谁？** 用引号写上 A、B 或 C，看结果之前猜一次，看完再猜一次。

# %%
guess = nanopd.predict("07.9", holds_back=..., counts_the_warm_up=..., leaves_out_the_refused=...)

# %%
overload = poisson_schedule(1.6 * most, workload("40-80/16"), window=60 / (1.6 * most), warmup=25 / (1.6 * most))
suspects = loads.suspects(cluster, overload)
half = SLO(1e-3 * load_metrics(suspects["honest"], bootstrap=0)["median_ttft_ms"], tpot=60.0)
print(f"the window is from {overload.begin:.1f} to {overload.end:.1f} s")
for name, run in suspects.items():
    f, counted = load_metrics(run, half, bootstrap=0), run.counted
    parts = " ".join(f"{1e3 * part:.0f}" if part else "-" for part in loads.in_parts(run))
    print(f"{name:6} attainment {f['attainment']:4.0%} | {len(counted):3} count, of which refused {f['dropped']:2}, due from "
          f"{counted[0].arrival:4.1f} to {counted[-1].arrival:4.1f} s | TTFT in quarters: {parts} ms")
guess.reveal(**loads.FAULTS)
cluster.shutdown()
live.shutdown()

# %% [markdown] lang="en"
# The figures give each away. **A** refused nobody, in an overload where the honest run did, and fewer requests count: those that
# are missing are the very ones that were served worst. **B** has a TTFT like an idle server's, and its last request claims to
# have been due long after the window: the load lasted until the server had the time for it. **C** counts the most, from
# 0 on, and its first quarter is quicker than the honest one's.
#
# So beside every figure for quality belong those that make it believable: how many were offered, how many refused or failed,
# from when to when, how late the client was, and whether it was steady. A report without them is an advertisement.
#
# ## Where you are
#
# - An open loop sends when a request is due, and counts from then (7.1). A rate alone is no load (7.2).
# - Quantiles don't average (7.3); a window says something only of a steady run (7.4).
# - Past the knee throughput is flat and goodput falls (7.5, 7.6). A p99 needs hundreds of requests, and several seeds (7.7).
# - Disaggregation buys an even TPOT with a longer TTFT, at equal GPUs. The SLO decides (7.8).
# - What is left out makes figures good (7.9).
#
# The deep dive is `docs_en/07_benchmark.md`. Next, chapter 08: your own router against the reference, on a trace you haven't
# seen.

# %% [markdown] lang="zh" en_hash="cf2b001b"
# 数字自己会露馅。**A** 一个也没拒收，可同样的过载下，老实的那份有拒收；而且它算数的请求少了：少掉的恰恰是待遇最差的那些。
# **B** 的 TTFT 像台空闲的服务器，而最后一个请求声称窗口过了很久才该发：服务器什么时候有空，负载就拖到什么时候。
# **C** 算数的请求最多，从 0 秒算起，而且它的第一个四分之一比老实的那份快。
#
# 所以，每个好看的指标旁边，都得摆上让人能相信它的指标：来了多少，拒收和失败多少，从几时到几时，客户端迟了多少，稳不稳。没有这些的报告，就是广告。
#
# ## 现在到了哪里
#
# - 开环到点就发，从该发的那一刻算起（7.1）。光有速率不算负载（7.2）。
# - 分位数不能平均（7.3）；只有稳的运行，窗口里的数才有意义（7.4）。
# - 过了拐点，吞吐躺平，有效吞吐往下掉（7.5、7.6）。p99 需要几百个请求，还要换几个种子（7.7）。
# - GPU 同样多时，分离是拿更长的 TTFT 换平稳的 TPOT。听谁的，看 SLO（7.8）。
# - 指标漂亮，往往是因为漏掉了什么（7.9）。
#
# 深入讲解见 `docs_zh/07_benchmark.md`。下一章是 08：你自己的路由器，在一份没见过的负载上，对阵参考实现。
