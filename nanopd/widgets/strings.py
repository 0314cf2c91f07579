"""Every sentence that code shows a learner, in English and Chinese.

Code cells are the same in both workbooks, so text printed by code can't sit in the cells: it is looked up here.
To add one, add a line `"panel.key": ("English {field}", "中文 {field}")`; both must use the same fields
(tests/workbook/test_strings.py holds that). Show it with `t("panel.key", field=3)`.

The language is, in this order: what `set_language()` was given, the environment variable NANOPD_LANG, the
innermost folder named `en` or `zh`, or with such an ending (`01_block_manager_zh`, as a course's assignments are
called), on the path of the working directory (Jupyter starts a kernel in the notebook's folder, so
notebooks/zh/*.ipynb speak Chinese), English.
"""

from __future__ import annotations

import os
from pathlib import Path

LANGUAGES = ("en", "zh")

STRINGS: dict[str, tuple[str, str]] = {
    # predict
    "predict.noted": (
        "Prediction {id} noted. Run on and see how it holds up.",
        "预测 {id} 记下了。接着运行，看看猜得准不准。",
    ),
    "predict.nudge": (
        "Prediction {id}: no guess yet for {names}.\nPut a number in place of `...` before you run on. "
        "A wrong guess teaches more than none.",
        "预测 {id}：{names} 还没有猜。\n往下运行之前，先把 `...` 换成一个数吧——猜错了，也比没猜学到的多。",
    ),
    "predict.list_separator": (", ", "、"),
    "predict.title": ("Prediction {id}", "预测 {id}"),
    "predict.guess": ("guess", "你猜的"),
    "predict.measured": ("measured", "实测"),
    "predict.no_guess": ("no guess", "没有猜"),
    "predict.exact": ("spot on", "分毫不差"),
    "predict.close": ("within {percent}%, very close", "相差不到 {percent}%，很准"),
    "predict.above": ("{percent}% too high", "高了 {percent}%"),
    "predict.below": ("{percent}% too low", "低了 {percent}%"),
    "predict.times_above": ("{ratio} times what was measured", "猜成了实际的 {ratio} 倍"),
    "predict.times_below": ("measured {ratio} times as much", "实际是猜测的 {ratio} 倍"),
    "predict.off_by": ("off by {difference}", "差了 {difference}"),
    "predict.different": ("not this time", "这次没猜中"),
    "predict.all_close": ("Your mental model holds here.", "看来这里你心里已经有数了。"),
    "predict.some_off": (
        "The gap is where the learning is: what did the guess leave out?",
        "差距正是值得琢磨的地方：当时漏算了什么？",
    ),
    # check
    "check.passed": ("Exercise {id}: all checks pass ({count}). Nicely done.", "练习 {id}：{count} 项检查全部通过，写得漂亮。"),
    "check.unfinished": (
        "Exercise {id}: not written yet. Replace the line `raise NotImplementedError()` with your own code, "
        "run that cell, then this one.",
        "练习 {id}：还没有写。把 `raise NotImplementedError()` 那一行换成你的代码，先运行那一格，再运行这一格。",
    ),
    "check.failed": (
        "Exercise {id}: {failed} of {count} checks fail.",
        "练习 {id}：{count} 项检查中有 {failed} 项没通过。",
    ),
    "check.raised": ("your code raised {error}", "你的代码抛出了 {error}"),
    "check.hint": ("Hint: {hint}", "提示：{hint}"),
    "check.unknown": (
        "there is no exercise {id!r}. Known in chapter {chapter}: {known}",
        "没有练习 {id!r}。第 {chapter} 章已有的练习：{known}",
    ),
    "check.unknown_chapter": (
        "there is no exercise {id!r}: write it as \"01.4\". Chapters with checks: {known}",
        "没有练习 {id!r}：请写成 \"01.4\" 这样的形式。已有检查的章节：{known}",
    ),
    # panels that are played step by step
    "player.back": ("Back", "后退"),
    "player.step": ("Step", "单步"),
    "player.step_action": ("Step: {label}", "单步：{label}"),
    "player.to_end": ("To the end", "到最后"),
    # block map
    "blockmap.pool": (
        "<b>Block pool</b>  {n} blocks of {size} tokens: {held} held, {free} free ({cached} of them cached)",
        "<b>块池</b>  {n} 个块，每块 {size} 个 token：占用 {held}，空闲 {free}（其中 {cached} 个仍在缓存中）",
    ),
    "blockmap.tables": ("<b>Block tables</b>", "<b>块表</b>"),
    "blockmap.some_tables": ("<b>Block tables</b>  {n} of {total}", "<b>块表</b>  共 {total} 张，显示 {n} 张"),
    "blockmap.pool_numbers": ("(in a cell: its reference count)", "（格中数字：引用计数）"),
    "blockmap.table_numbers": ("(in a cell: the block's number)", "（格中数字：块号）"),
    "blockmap.touched": ("this step", "这一步"),
    "blockmap.findable": ("found by hash", "可按哈希找到"),
    "blockmap.free": ("free", "空闲"),
    "blockmap.cached": ("free, cached", "空闲，有缓存"),
    "blockmap.held_1": ("held ×1", "引用 ×1"),
    "blockmap.held_2": ("×2", "×2"),
    "blockmap.held_3": ("×3", "×3"),
    "blockmap.held_4": ("×4+", "×4+"),
    "blockmap.leased": ("leased", "已租出"),
    "blockmap.block": ("block {block}", "块 {block}"),
    "blockmap.sequence": ("seq {seq}", "序列 {seq}"),
    "blockmap.lease": ("lease {seq}", "租约 {seq}"),
    "blockmap.hash": ("hash {hash}", "哈希 {hash}"),
    "blockmap.no_hash": ("not in the prefix cache", "不在前缀缓存中"),
    "blockmap.separator": (", ", "、"),
    "blockmap.one_block": ("{n} block", "{n} 个块"),
    "blockmap.many_blocks": ("{n} blocks", "{n} 个块"),
    "blockmap.one_reference": ("{n} reference", "{n} 个引用"),
    "blockmap.many_references": ("{n} references", "{n} 个引用"),
    "blockmap.one_more": ("one reference more", "多一个引用"),
    "blockmap.start": ("Nothing has happened yet: every block is free.", "还什么都没发生：所有块都空闲。"),
    "blockmap.no_events": ("The event log is empty: this is the pool as it is.", "事件日志是空的：这就是块池现在的样子。"),
    "blockmap.truncated": (
        "The log keeps only the latest events: the first {n} are gone. This is the state they left, worked out "
        "backwards from the present one.",
        "日志只保留最近的事件，最早的 {n} 个已经丢弃。这里是它们留下的状态，由现在的状态倒推得出。",
    ),
    "blockmap.did_admit": (
        "Sequence {seq} was admitted: {fresh} handed out, {hits} found in the prefix cache.",
        "序列 {seq} 获准进入：新分配 {fresh}，前缀缓存命中 {hits} 个。",
    ),
    "blockmap.did_grow": (
        "Sequence {seq} ran out of room: block {block} joins its table.",
        "序列 {seq} 的空间用完了：块 {block} 加入它的块表。",
    ),
    "blockmap.did_fork": (
        "Sequence {seq} forked from {other}: nothing copied, {blocks} shared, each now with {refs}.",
        "序列 {seq} 由序列 {other} 分叉而来：什么也没复制，共享 {blocks}，现在每块有 {refs}。",
    ),
    "blockmap.did_copy": (
        "Sequence {seq} wants to write to block {source}, which others still read: it gets a copy, block {copy}. "
        "Block {source} is left with {refs}.",
        "序列 {seq} 要写块 {source}，但还有别的持有者在读它：于是得到一份副本，块 {copy}。块 {source} 还剩 {refs}。",
    ),
    "blockmap.did_cache": (
        "Full and computed, so the prefix cache can find them by hash from now on: {block}.",
        "块 {block} 已写满、算完：从此可以在前缀缓存中按哈希找到。",
    ),
    "blockmap.did_forget": (
        "The prefix cache forgets block {block}.",
        "前缀缓存不再记得块 {block}。",
    ),
    "blockmap.did_free": (
        "Sequence {seq} let go of {let_go}: {freed} free now ({findable} of them still cached), {kept} held by others.",
        "序列 {seq} 放开了 {let_go}：{freed} 个变为空闲（其中 {findable} 个仍在缓存中），{kept} 个还被别人持有。",
    ),
    "blockmap.did_lease": (
        "Lease {other}: {blocks} set aside for a KV cache on its way here, {hits} of them cached already.",
        "租约 {other}：为即将传来的 KV 缓存预留 {blocks}，其中 {hits} 个本来就在缓存里。",
    ),
    "blockmap.did_adopt": (
        "The KV cache is here: sequence {seq} takes over {blocks} from its lease.",
        "KV 缓存到了：序列 {seq} 从租约接过 {blocks}。",
    ),
    "blockmap.did_let_go_first": (
        "Lease {other}: one of its two holders let go. The other one keeps the blocks.",
        "租约 {other}：两个持有者中有一个放手了，块由另一个继续保留。",
    ),
    "blockmap.did_let_go_last": (
        "Lease {other}: the last holder let go of {let_go}; {freed} free now, {kept} held by others.",
        "租约 {other}：最后一个持有者也放开了 {let_go}；{freed} 个变为空闲，{kept} 个还被别人持有。",
    ),
    "blockmap.did_pool_take": (
        "Block {block}: taken directly from the pool, for no table.",
        "块 {block}：直接从块池取走，不属于任何块表。",
    ),
    "blockmap.did_pool_release": (
        "Block {block}: given back to the pool directly.",
        "块 {block}：直接还给了块池。",
    ),
    "blockmap.evicted": (" The cached block {block} was evicted to make room.", "为腾出空间，驱逐了缓存着的块 {block}。"),
    "blockmap.unexplained": (
        " <b>The books don't balance: block {block} has a reference count that no table or lease accounts for.</b>",
        "<b>账对不上：块 {block} 的引用计数，与持有它的块表和租约的数目不符。</b>",
    ),
    "blockmap.did_nothing": (
        "<b>{label}</b> · No block changed hands.",
        "<b>{label}</b> · 没有任何块易手。",
    ),
    # roofline
    "roofline.x": ("arithmetic intensity (FLOP per byte)", "算术强度（FLOP/字节）"),
    "roofline.y": ("achieved FLOP/s", "实际达到的 FLOP/s"),
    "roofline.memory_bound": ("memory-bound", "访存受限"),
    "roofline.compute_bound": ("compute-bound", "计算受限"),
    "roofline.ridge": ("ridge: {x} FLOP/byte", "拐点：{x} FLOP/字节"),
    "roofline.intensity_is": ("{x} FLOP per byte", "每字节 {x} FLOP"),
    "roofline.achieved_is": ("{rate}: {percent}% of its roof", "{rate}：达到屋顶的 {percent}%"),
    # kernel explorer
    "explorer.naive": ("naive", "朴素内核"),
    "explorer.grouped": ("one block per KV head", "每个 KV 头一个线程块"),
    "explorer.split_kv": ("split-KV", "split-KV"),
    "explorer.batch": ("batch", "批大小"),
    "explorer.context": ("context", "上下文"),
    "explorer.kv_heads": ("KV heads", "KV 头"),
    "explorer.group": ("group", "组内查询头"),
    "explorer.block_size": ("block size", "块大小"),
    "explorer.num_splits": ("splits", "切分数"),
    "explorer.measure": ("Measure", "实测"),
    "explorer.measure_tip": ("time the engine's kernel at this shape on this GPU", "在这块 GPU 上，按这个形状给引擎的内核计时"),
    "explorer.no_gpu": (
        "nothing to measure on: this machine has no GPU with the engine's kernels. What was recorded elsewhere is shown instead",
        "没有可测的设备：这台机器上没有能跑引擎内核的 GPU。图中显示的是在别处录得的数据",
    ),
    "explorer.moves": (
        "<b>Bytes</b> {needed}B of keys and values must be read; the thread blocks ask for {moved}B, {times} times that",
        "<b>字节</b> 必须读 {needed}B 的键和值；线程块一共要了 {moved}B，是前者的 {times} 倍",
    ),
    "explorer.spreads": (
        "<b>Spread</b> {ctas} thread blocks on {sms} SMs: {waves} wave(s)",
        "<b>铺开</b> {ctas} 个线程块，{sms} 个 SM：{waves} 波",
    ),
    "explorer.takes": (
        "<b>Time</b> floor {floor}; estimate {seconds}, which would be {share}% of the bandwidth",
        "<b>时间</b> 下限 {floor}；估计 {seconds}，相当于带宽的 {share}%",
    ),
    "explorer.measured": (
        "<b>Measured here{source}</b> {times} (of the bandwidth)",
        "<b>本机实测{source}</b> {times}（占带宽）",
    ),
    "explorer.recorded": (
        "<b>Recorded on {source}</b> {times} (of the bandwidth)",
        "<b>录自 {source}</b> {times}（占带宽）",
    ),
    "explorer.legend_estimate": ("estimate", "估计"),
    "explorer.legend_measured": ("measured here", "本机实测"),
    "explorer.legend_recorded": ("recorded elsewhere", "别处录得"),
    "explorer.legend_floor": ("floor", "下限"),
    "explorer.splits_axis": ("splits", "切分数"),
    "explorer.time_axis": ("estimate (µs)", "估计（µs）"),
    # times of kernels
    "times.live": ("measured on this machine: {device}", "本机实测：{device}"),
    "times.recorded": ("recorded on {source}", "录自 {source}"),
    "times.data_sheet": (
        "no recorded run; the ceilings are those of the data sheet: {device}",
        "没有录得的数据；上限取自产品手册：{device}",
    ),
    "times.no_run": ("no recorded run of `nanopd bench {bench}`", "没有 `nanopd bench {bench}` 的录得数据"),
    "times.none": ("no figure", "没有数据"),
    "times.table": (
        "{kernel}: share of the bandwidth; a row for each batch, a column for each context",
        "{kernel}：达到带宽的百分比；每行一个批大小，每列一个上下文长度",
    ),
    "times.not_a_kernel": (
        "the engine has no kernel {kernel!r}: it is the step between the two that can be measured, naive and split-KV",
        "引擎里没有“{kernel}”这个内核：它是朴素内核与 split-KV 之间的一步，能实测的是这两个",
    ),
    # the race of chapter 03
    "race.here": ("run here, on {device}", "在本机运行：{device}"),
    "race.not_recorded": (
        "not run: this machine has no GPU with nvcc, and this kernel was not recorded elsewhere",
        "没有运行：这台机器没有带 nvcc 的 GPU，这个内核也没有在别处录过",
    ),
    # cluster timeline
    "cluster.prefill": ("prefill", "预填充"),
    "cluster.decode": ("decode (pale)", "解码（浅色）"),
    "cluster.transfer": ("transfer, hidden behind computation", "传输（被计算盖住）"),
    "cluster.exposed": ("transfer, exposed", "传输（露在外面）"),
    "cluster.lane_compute": ("steps", "步"),
    "cluster.lane_transfers": ("transfers", "传输"),
    "cluster.time_axis": ("ms; a colour for each request", "毫秒；一种颜色一个请求"),
    "cluster.start": ("Nothing has happened yet.", "还什么都没发生。"),
    "cluster.empty": ("The histories are empty: serve something first.", "历史记录是空的：先处理几个请求。"),
    "cluster.step_was": (
        "{worker} at {at} ms: a step of {ms} ms; prefill {chunks} ({chunk_tokens} tokens), decode {decodes}",
        "{worker}，第 {at} 毫秒：走了一步，用时 {ms} 毫秒；预填充 {chunks} 条（{chunk_tokens} 个 token），解码 {decodes} 条",
    ),
    "cluster.transfer_was": (
        "{worker} at {at} ms: request {request} leaves for {destination} ({transport}); {tokens} tokens, {kb} KB, {ms} ms, "
        "of which {exposed} ms exposed",
        "{worker}，第 {at} 毫秒：请求 {request} 的 KV 发往 {destination}（{transport}）；{tokens} 个 token，{kb} KB，"
        "共 {ms} 毫秒，其中 {exposed} 毫秒露在外面",
    ),
    "cluster.row_was": (
        "<b>{request}</b> · {kind}<br>{new} new tokens after {cached} in the cache<br>step {step}, {ms} ms",
        "<b>{request}</b> · {kind}<br>缓存中已有 {cached} 个 token，新算 {new} 个<br>第 {step} 步，{ms} 毫秒",
    ),
    "cluster.transfer_tip": (
        "<b>{request}</b> → {destination}<br>{tokens} tokens by {transport}, {exposed} ms exposed",
        "<b>{request}</b> → {destination}<br>{tokens} 个 token，方式 {transport}，露在外面 {exposed} 毫秒",
    ),
    # cost-model explorer
    "costs.source": ("parameters of", "参数来自"),
    "costs.five": ("five parameters", "五个参数"),
    "costs.fitted": ("fitted model", "拟合模型"),
    "costs.alpha_ms_per_token": ("alpha, ms/token", "alpha（毫秒/token）"),
    "costs.beta_ms": ("beta, ms", "beta（毫秒）"),
    "costs.batch_thresh": ("batch_thresh", "batch_thresh"),
    "costs.gamma_ms_per_token": ("gamma, ms/token", "gamma（毫秒/token）"),
    "costs.bandwidth_gb_s": ("bandwidth, GB/s", "带宽（GB/s）"),
    "costs.prompt": ("prompt", "提示长度"),
    "costs.output": ("answer", "回答长度"),
    "costs.load": ("load", "负载"),
    "costs.collocated": ("collocated", "混部"),
    "costs.disaggregated": ("disaggregated", "分离"),
    "costs.prefill": ("prefill", "预填充"),
    "costs.decode": ("decode", "解码"),
    "costs.mixed": ("mixed step", "混合步"),
    "costs.term_prefill": ("prefill", "预填充"),
    "costs.term_transfer": ("transfer", "传输"),
    "costs.term_decode": ("decode", "解码"),
    "costs.term_interference": ("interference (the seed's gamma)", "干扰（Seed 的 gamma）"),
    "costs.term_others": ("what the others wait, summed", "其他序列的等待（合计）"),
    "costs.published": (
        "<b>Published</b> with the earlier system: {source}, Qwen3-8B. No measured points were published with them",
        "<b>公布的参数</b> 来自早先的系统：{source}，Qwen3-8B。没有随之公布的测量点",
    ),
    "costs.measured": ("<b>Measured</b> on {source}, {date}", "<b>实测</b> {source}，{date}"),
    "costs.no_mixed": (
        "; no mixed steps among it, so gamma follows from the fitted model",
        "；其中没有混合步，所以 gamma 由拟合模型推出",
    ),
    "costs.verdict": (
        "<b>Predicted</b> collocated {collocated}, disaggregated {disaggregated}: {cheaper} is cheaper by {ms} ms, nobody queueing",
        "<b>预测</b> 混部 {collocated}，分离 {disaggregated}：{cheaper}省 {ms} 毫秒，假定没有人排队",
    ),
    "costs.rule": (
        "<b>Rule</b> gamma / transfer rate = {ratio}: disaggregate from load {load}, whatever the prompt's length",
        "<b>规则</b> gamma / transfer_rate = {ratio}：负载达到 {load} 起就分离，与提示长度无关",
    ),
    "costs.errors": (
        "<b>Median error</b> of the predictions: {errors}",
        "<b>预测误差</b>（中位数）：{errors}",
    ),
    "costs.cheaper_by": ("{cheaper} {share}% cheaper", "{cheaper}省 {share}%"),
    "costs.map_title": ("predicted: blue collocated, red disaggregated", "预测：蓝色宜混部，红色宜分离"),
    "costs.bars_title": ("predicted: both paths, term by term", "预测：两条路径的各项"),
    "costs.prefill_title": ("prefill", "预填充"),
    "costs.decode_title": ("decode step", "解码步"),
    "costs.mixed_title": ("prompt beside decodes", "提示与解码同在一步"),
    "costs.no_rows": ("{title}: none measured", "{title}：没有实测"),
    "costs.prompt_axis": ("prompt, tokens", "提示长度（token）"),
    "costs.load_axis": ("sequences that decode", "正在解码的序列数"),
    "costs.tokens_axis": ("prompt tokens in the step", "这一步里的提示 token"),
    "costs.sequences_axis": ("sequences in the step", "这一步里的序列数"),
    "costs.predicted": ("predicted", "预测"),
    "costs.measured_legend": ("measured", "实测"),
    "costs.row_prefill": ("{new} new tokens after {cached}", "{cached} 个之后新算 {new} 个 token"),
    "costs.row_decode": ("{decodes} decode, {context} tokens of context each", "{decodes} 条解码，各有 {context} 个 token 的上下文"),
    # live serving
    "live.rate": ("requests/s", "每秒请求数"),
    "live.output": ("output tokens", "输出 token 数"),
    "live.mix": ("prompts", "提示"),
    "live.mode": ("mode", "模式"),
    "live.topology": ("topology (restart)", "拓扑（需重启）"),
    "live.chunk": ("tokens a step (restart)", "每步 token 数（需重启）"),
    "live.start": ("Start", "开始"),
    "live.stop": ("Stop", "停止"),
    "live.short": ("short", "短"),
    "live.long": ("long", "长"),
    "live.mixed": ("mixed", "长短混合"),
    "live.collocated": ("collocated", "混部"),
    "live.disaggregated": ("disaggregated", "分离"),
    "live.adaptive": ("adaptive", "自适应"),
    "live.ready": (
        "Press Start. The upper sliders work while it runs; topology and tokens a step need another cluster, and so another Start.",
        "按“开始”。上面一排随时可以拖动；拓扑和每步 token 数要换一个集群，得重新开始才生效。",
    ),
    "live.starting": (
        "Starting: workers load the model; a cluster that chooses by itself also measures this machine, if it was given no profile.",
        "正在启动：Worker 在加载模型；自适应集群若没有拿到现成的测量数据，还要先把这台机器测一遍。",
    ),
    "live.state": (
        "<b>{elapsed} s</b> · open {open}, finished {finished} · of the last minute, p50 / p90 in ms: TTFT {ttft}, TPOT {tpot}",
        "<b>{elapsed} 秒</b> · 进行中 {open}，已完成 {finished} · 最近一分钟 p50 / p90（毫秒）：TTFT {ttft}，TPOT {tpot}",
    ),
    "live.stopped": (" · stopped", " · 已停止"),
    "live.needs_start": (
        " · <b>the new topology or tokens a step take effect with the next Start</b>",
        " · <b>新的拓扑或每步 token 数，下次“开始”时生效</b>",
    ),
    "live.turned_away": (" · turned away {n}", " · 拒收 {n}"),
    "live.sent_title": ("decisions: prompt length (tokens), when it was sent", "决策：提示长度（token），按发出的时刻"),
    "live.ttft_title": ("TTFT (ms)", "TTFT（毫秒）"),
    "live.tpot_title": ("TPOT (ms)", "TPOT（毫秒）"),
    "live.queue_title": ("requests without a first token", "还没有首 token 的请求数"),
    "live.rate_title": ("tokens/s", "每秒 token 数"),
    "live.time_axis": ("seconds since Start", "开始后的秒数"),
    "live.decision": (
        "<b>{request}</b> · {tokens} tokens<br>{way}: {path}",
        "<b>{request}</b> · {tokens} 个 token<br>{way}：{path}",
    ),
    "live.expected": ("<br>expected, itself + what others lose: {costs}", "<br>预计（自身 + 拖累别人）：{costs}"),
    "live.cost": ("{way} {own} + {others} ms", "{way} {own} + {others} 毫秒"),
    # live replay
    "replay.recording": ("recording", "录制的运行"),
    "replay.choice": ("{device}, {date}: {mode}", "{device}，{date}：{mode}"),
    "replay.speed": ("speed", "速度"),
    "replay.badge": (
        "Replay, not live: recorded on {source} · {model}, {topology}",
        "录制回放，不是现场：录自 {source} · {model}，{topology}",
    ),
    "replay.mark": ("RECORDED on {source}", "录制回放，录自 {source}"),
    "replay.load": (
        "<b>Load then</b>: {rate} requests/s, {mix} prompts, answers of {output} tokens on average, mode: {mode}",
        "<b>当时的负载</b>：每秒 {rate} 个请求，提示：{mix}，回答平均 {output} 个 token，模式：{mode}",
    ),
    "replay.over": (" · the recording ends here", " · 录制到此结束"),
    "replay.none_of": (
        "No run was recorded on “{device}”. Where there is such a device, <b>nanopd bench record</b> makes one. "
        "Recorded so far: {there}.",
        "没有在“{device}”上录制过的运行。手边有这种设备的话，用 <b>nanopd bench record</b> 就能录一份。目前录过的有：{there}。",
    ),
    "replay.none": (
        "Nothing to replay: no run has been recorded. <b>nanopd bench record</b> makes one on any machine.",
        "没有可回放的：还没有录制过任何运行。在哪台机器上都可以用 <b>nanopd bench record</b> 录一份。",
    ),
    # routing microscope
    "microscope.request": ("request", "请求"),
    "microscope.title": ("{request}: {tokens} tokens, {path}", "{request}：{tokens} 个 token，{path}"),
    "microscope.measured": ("measured", "实测"),
    "microscope.waited": ("in line", "在中央排队"),
    "microscope.queue": ("queue at the worker", "在 Worker 排队"),
    "microscope.prefill": ("prefill", "预填充"),
    "microscope.transfer": ("transfer, exposed", "传输（露在外面的）"),
    "microscope.handover": ("handover", "交接"),
    "microscope.decode": ("decode", "解码"),
    "microscope.interference": ("interference", "干扰"),
    "microscope.others": ("cost to others", "给别人添的时间"),
    "microscope.requests_title": ("requests: end to end (ms); click one", "请求：端到端（毫秒），点一个看看"),
    "microscope.terms_title": ("the best route of each way as forecast, and what was measured",
                               "两条路各自最好的路线（预测），以及实测"),
    "microscope.arrival_axis": ("seconds since the first arrival", "距第一个请求到达的秒数"),
    "microscope.terms_axis": ("ms", "毫秒"),
    "microscope.empty": (
        "Nothing to look at: no request that the router was asked about has ended.",
        "没有可看的：问过路由器的请求，一个都还没有结束。",
    ),
    "microscope.took": (
        "Request <b>{request}</b>, {tokens} tokens, went <b>{path}</b> and took {e2e} ms.",
        "请求 <b>{request}</b>，{tokens} 个 token，走的是 <b>{path}</b>，实际用时 {e2e} 毫秒。",
    ),
    "microscope.expected": (
        "<br>Forecast beforehand: {e2e} ms; for an answer of its real length: {hindsight} ms.",
        "<br>事先的预测：{e2e} 毫秒；换成它实际的回答长度：{hindsight} 毫秒。",
    ),
    "microscope.no_scores": (" The router that chose it gives no scores.", "选路的路由器没有给出打分。"),
    "microscope.no_other": (" The other way was not open.", "当时另一条路走不了。"),
    "microscope.regret": (
        "<br>The other way ({other}), as forecast for that length: {hindsight} ms. Estimated regret: <b>{regret} ms</b> "
        "(measured less forecast; the road not taken was not measured).",
        "<br>另一条路（{other}）按同样长度的预测：{hindsight} 毫秒。遗憾值的估计：<b>{regret} 毫秒</b>"
        "（实测减预测；没走的那条路没有实测）。",
    ),
    # sweep explorer
    "sweep.measured": ("<b>Measured</b> on this machine ({device})", "<b>实测</b>，就在这台机器上（{device}）"),
    "sweep.recorded": ("<b>Recorded</b> on {device}", "<b>录自</b> {device}"),
    "sweep.simulated": ("<b>Simulated, not measured</b>: {device}", "<b>仿真，非实测</b>：{device}"),
    "sweep.verdict": (
        "Highest offered rate at which {share} of the requests meet the SLO: {lines}",
        "{share} 的请求达标时，所能承受的最高到达速率：{lines}",
    ),
    "sweep.reaches": ("{line} <b>{rate}/s</b>", "{line} <b>{rate} 个/秒</b>"),
    "sweep.none": ("{line} <b>none of these</b>", "{line} <b>一个也不行</b>"),
    "sweep.ttft_bound": ("SLO: TTFT, ms", "SLO：TTFT（毫秒）"),
    "sweep.tpot_bound": ("SLO: TPOT, ms", "SLO：TPOT（毫秒）"),
    "sweep.goodput_title": ("goodput: requests/s within the SLO, 95% intervals", "有效吞吐：每秒达标的请求数，带 95% 区间"),
    "sweep.ttft_title": ("{share} of TTFT (ms)", "TTFT 的 {share}（毫秒）"),
    "sweep.tpot_title": ("{share} of TPOT (ms)", "TPOT 的 {share}（毫秒）"),
    "sweep.rate_axis": ("offered, requests/s", "到达速率（请求/秒）"),
    "sweep.bound": ("SLO", "SLO"),
    "sweep.offered": ("all that was offered", "到达多少，达标多少"),
    "sweep.hover": (
        "offered {rate}/s: {good}/s within the SLO, {share} of {number} requests",
        "每秒到达 {rate} 个：达标 {good} 个/秒，占 {number} 个请求的 {share}",
    ),
    # transfer times
    "transfers.measured": (
        "measured on this machine's CPU, both ends in one process: {transports}",
        "在这台机器的 CPU 上实测，收发两端在同一个进程里：{transports}",
    ),
    "transfers.by_layer": ("{transport}, layer by layer", "{transport}，逐层"),
    "transfers.blocks_axis": ("blocks sent at once", "一次发送的块数"),
    "transfers.rate_axis": ("GB/s", "GB/s"),
    # score card of the capstone
    "capstone.title": ("goodput of each router (simulated)", "各路由器的有效吞吐（仿真）"),
    "capstone.goodput_axis": ("requests in time, a second", "每秒按时完成的请求数"),
    "capstone.in_hindsight": ("in hindsight", "事后所知"),
    "capstone.load.turn": ("chat, then documents", "先聊天，后文档"),
    "capstone.load.bursts": ("bursts of documents", "成批涌来的文档"),
    "capstone.load.library": ("questions about known documents", "围着同一批文档提问"),
    "capstone.router.yours": ("yours", "你的"),
    "capstone.router.reference": ("reference", "参考路由器"),
    "capstone.router.told": ("reference, told the lengths", "参考路由器，预知长度"),
    "capstone.router.collocated": ("always collocated", "总是混部"),
    "capstone.router.disaggregated": ("always disaggregated", "总是分离"),
    "capstone.router.threshold": ("threshold of 512", "512 一刀切"),
    "capstone.router.round-robin": ("taking turns", "两条路轮流"),
    "capstone.column.router": ("router", "路由器"),
    "capstone.column.goodput": ("goodput/s", "有效吞吐/秒"),
    "capstone.column.attainment": ("in time", "按时"),
    "capstone.column.ttft": ("TTFT p50 / p99 ms", "TTFT p50 / p99 毫秒"),
    "capstone.column.tpot": ("TPOT p50 / p99 ms", "TPOT p50 / p99 毫秒"),
    "capstone.column.e2e": ("E2E p50 / p99 ms", "端到端 p50 / p99 毫秒"),
    "capstone.column.disaggregated": ("P -> D", "P -> D"),
    "capstone.column.microseconds": ("µs a choice", "微秒/次"),
    "capstone.score": (
        "Yours serves {ratio} of what the reference serves in time, and at least {fixed} of the best fixed policy of each trace.\n"
        "Regret against hindsight {regret}. Rank {rank} of {count}.",
        "你的路由器按时完成的请求，是参考路由器的 {ratio}；跟每份负载上最好的固定策略比，最低 {fixed}。\n"
        "对事后所知的遗憾值 {regret}。在 {count} 个里排第 {rank}。",
    ),
    "capstone.hindsight": (
        "Hindsight is the best that any router here reached on the trace, one that was told all lengths among them: it can be had, "
        "and is no proof that no more can.",
        "“事后所知”取这份负载上所有路由器（包括预知全部长度的那个）的最好成绩：它确实做得到，但并不证明不能更好。",
    ),
    "capstone.simulated": (
        "Simulated by the profile of an H200; only the microseconds were measured, on this machine, and count for nothing.",
        "按 H200 的测量数据仿真；只有微秒数是在这台机器上实测的，不计分。",
    ),
    "capstone.failed": ("Yours did not finish: {error}", "你的路由器没能跑完：{error}"),
    # batch timeline
    "timeline.prefill": ("prefill", "预填充"),
    "timeline.decode": ("decode", "解码"),
    "timeline.preempted": ("preempted", "被抢占"),
    "timeline.budget": ("token budget of a step", "每步的 token 预算"),
    "timeline.by_step": ("by step", "按步"),
    "timeline.by_time": ("by time", "按时间"),
    "timeline.step_axis": ("step", "步"),
    "timeline.step_axis_of_worker": ("step (each worker counts its own)", "步（每个 Worker 各数各的）"),
    "timeline.time_axis": ("time spent in steps (ms)", "各步累计用时（毫秒）"),
    "timeline.time_axis_of_worker": (
        "time spent in steps (ms, of each worker; not one common clock)",
        "各步累计用时（毫秒，每个 Worker 各自累计，并非同一个时钟）",
    ),
    "timeline.requests": ("requests, with the tokens of each chunk", "请求，以及每个分块的 token 数"),
    "timeline.tokens": ("tokens in the step", "这一步的 token 数"),
    "timeline.free_blocks": ("free blocks", "空闲块"),
    "timeline.start": ("No step has run yet.", "还没有运行过任何一步。"),
    "timeline.empty": ("The history is empty: run some steps, then refresh.", "历史记录是空的：先运行几步，再刷新。"),
    "timeline.step_was": (
        "step {step}: prefill {chunks} ({chunk_tokens} tokens), decode {decodes}; {waiting} waiting, "
        "{free} free blocks, {ms} ms",
        "第 {step} 步：预填充 {chunks} 条（{chunk_tokens} 个 token），解码 {decodes} 条；排队 {waiting}，"
        "空闲块 {free}，用时 {ms} 毫秒",
    ),
    "timeline.copied": ("; blocks copied: {n}", "；复制了 {n} 个块"),
    "timeline.was_preempted": ("; preempted: {names}", "；被抢占：{names}"),
    "timeline.preempted_at": ("{request} is sent back to wait", "{request} 被抢占，回到等待队列"),
    "timeline.row_was": ("{new} new tokens after {cached} in the cache", "缓存中已有 {cached} 个 token，新算 {new} 个"),
    # the gallery's pages
    "gallery.title": ("The workbook, executed", "练习册：运行结果"),
    "gallery.about": (
        "Chapters with their solutions, as they ran on the machine named beside each. Panels are pictures here: as they "
        "are once all cells have run, and what is played step by step after its last step.",
        "各章附解答，在右侧注明的机器上运行。面板在这里是静态图，取自全部单元格运行完之后；逐步播放的面板取最后一步。",
    ),
    "gallery.stamp": ("Executed on {device}, commit {commit}, {date}", "运行于 {device}，commit {commit}，{date}"),
    "gallery.with_changes": (" with changes", "（另有未提交的改动）"),
    "gallery.no_commit": ("unknown", "未知"),
    "gallery.solved": (
        "This page holds the solutions. To try first, open the notebook in JupyterLab (make lab).",
        "本页含解答。想先自己动手，请在 JupyterLab 里打开 notebook（make lab）。",
    ),
    "gallery.index": ("All chapters", "全部章节"),
    "gallery.language": ("English", "中文"),
}

_chosen: str | None = None  # by set_language(); one per process, as a page has one reader


def set_language(language: str | None) -> None:
    """Show everything in `language` ("en" or "zh") from now on; None goes back to finding it out."""
    global _chosen
    if language is not None and language not in LANGUAGES:
        raise ValueError(f"unknown language {language!r}; known are {', '.join(LANGUAGES)}")
    _chosen = language


def current_language() -> str:
    """ "en" or "zh". See the module's own text for where it is taken from."""
    if _chosen is not None:
        return _chosen
    named = os.environ.get("NANOPD_LANG", "").strip().lower()[:2]  # "zh", and "zh_CN.UTF-8" as well
    if named in LANGUAGES:
        return named
    endings = (part.rpartition("_")[2] for part in reversed(Path.cwd().parts))
    return next((ending for ending in endings if ending in LANGUAGES), "en")


def pick(en: str, zh: str) -> str:
    """The one of two texts that the reader reads, for text that belongs beside its code (hints, check messages)."""
    return zh if current_language() == "zh" else en


def t(key: str, **fields: object) -> str:
    """The text of `key` in the current language, with its fields filled in."""
    return pick(*STRINGS[key]).format(**fields)
