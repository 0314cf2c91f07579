"""What the figures and the page say, in both languages; the language is that of `nanopd.widgets.strings`."""

from __future__ import annotations

from nanopd.widgets.strings import pick

WORDS: dict[str, tuple[str, str]] = {
    # the modes, and how the workers are shared out
    "collocated": ("collocated", "混部"),
    "disaggregated": ("disaggregated", "分离"),
    "adaptive": ("adaptive", "自适应"),
    "endpoint": ("server at {url}", "服务器 {url}"),
    "none": ("no mode", "都不行"),
    # workloads
    "short": ("short prompts", "短提示"),
    "long": ("long prompts", "长提示"),
    "mixed": ("mixed prompts", "长短混合"),
    "documents": ("documents", "文档"),
    "chat": ("chat", "对话"),
    "summaries": ("summaries", "摘要"),
    "stories": ("stories", "故事"),
    # axes
    "rate": ("requests/s offered", "每秒到达的请求数"),
    "seconds": ("seconds", "秒"),
    "ms": ("ms", "毫秒"),
    "tokens_s": ("output tokens/s", "每秒输出 token 数"),
    "goodput": ("requests/s within the SLO", "每秒达标的请求数"),
    "requests": ("requests", "请求数"),
    "prompt": ("prompt, tokens", "提示长度（token）"),
    "batch": ("sequences in the batch", "批里的序列数"),
    "time": ("seconds since the load began", "负载开始后的秒数"),
    "regret_axis": ("share of the best goodput lost", "比最佳 goodput 少的比例"),
    "load_axis": ("load, as a share of the best fixed way's highest rate", "负载，相对于最佳固定方案的最高速率"),
    "percent": ("% of the requests disaggregated", "走分离路径的请求（%）"),
    "advantage": ("disaggregated over collocated", "分离相对混部"),
    # quantities
    "e2e": ("end-to-end time", "端到端时间"),
    "ttft": ("TTFT", "TTFT"),
    "tpot": ("TPOT", "TPOT"),
    "completed": ("completed", "完成"),
    "failed": ("failed", "失败"),
    "dropped": ("dropped", "拒收"),
    "queue": ("queue", "排队"),
    "prefill": ("prefill", "预填充"),
    "transfer": ("transfer, exposed", "传输（露在外面的）"),
    "decode": ("decode", "解码"),
    "handover": ("handover", "交接"),
    "first_wait": ("until the first token", "等首 token"),
    "writing": ("writing", "输出中"),
    "step": ("step", "一步"),
    "floor": ("what the bandwidth allows", "带宽允许的下限"),
    "measured": ("measured", "实测"),
    "simulated": ("simulated", "模拟"),
    "fitted": ("fitted", "拟合"),
    "slo": ("SLO", "SLO"),
    "seed_dot": ("one seed", "单个种子"),
    "median": ("median", "中位数"),
    "beside": ("what {decodes} decode(s) wait, summed", "拖住 {decodes} 条解码（合计）"),
    "sent": ("transfer by {transport}", "传输（{transport}）"),
    # titles
    "latency.title": ("{what} against rate: p50 and p99", "{what}随速率的变化：p50 与 p99"),
    "throughput.title": ("Throughput against rate", "吞吐量随速率的变化"),
    "outcomes.title": ("What became of the requests", "请求的结局"),
    "violin.title": ("Distribution of {what} by mode", "各模式下{what}的分布"),
    "violin.at": ("{workload}, {rate} requests/s", "{workload}，每秒 {rate} 个请求"),
    "length.title": ("TTFT against prompt length", "TTFT 与提示长度"),
    "routing.title": ("Where adaptive mode sent requests", "自适应模式把请求送到了哪里"),
    "breakdown.title": ("Where a request's time goes, mean", "一个请求的时间花在哪里（平均）"),
    "goodput.title": ("Goodput under TTFT ≤ {ttft}, TPOT ≤ {tpot}", "Goodput：TTFT ≤ {ttft}，TPOT ≤ {tpot}"),
    "crossover.title": ("Which mode serves the most requests in time", "哪种模式按时完成的请求最多"),
    "regret.title": ("What adaptive mode lost to the best mode", "自适应模式比最佳模式差多少"),
    "timeline.title": ("Requests of one run: {mode}, {workload}, {rate} requests/s",
                       "一次运行里的请求：{mode}，{workload}，每秒 {rate} 个"),
    "decode.title": ("Decode: a step's time and what it yields, by batch size", "解码：批越大，一步的时间与产出"),
    "decode.step": ("ms a step", "每步毫秒数"),
    "decode.rate": ("tokens/s", "每秒 token 数"),
    "transfer.title": ("Moving a prompt's KV, or holding others up", "搬走提示的 KV，还是拖住别人"),
    "lone.title": ("A lone prompt, by way and length", "单个提示：不同路径、不同长度"),
    "lone.prompt": ("a prompt of {prompt}", "{prompt} 个 token 的提示"),
    "predicted.title": ("Measured and simulated, two GPUs", "实测与模拟，两块 GPU"),
    "predicted.e2e": ("p99 end to end, ms", "端到端 p99（毫秒）"),
    "predicted.goodput": ("goodput, requests/s", "goodput（每秒请求数）"),
    "study.crossover": ("Which way of using {workers} workers serves the highest rate", "{workers} 个 Worker 怎么用，能按时服务的速率最高"),
    "study.regret": ("Regret of adaptive mode over {cells} settings", "自适应模式在 {cells} 种设置下的遗憾"),
    "tight": ("tight SLO", "严格 SLO"),
    "loose": ("loose SLO", "宽松 SLO"),
    "workers": ("{hardware}, {workers} workers", "{hardware}，{workers} 个 Worker"),
    # the stamp
    "stamp.simulated": ("simulated, not measured", "模拟，并非实测"),
    "stamp.changes": ("with changes", "有改动"),
    "stamp.commit": ("commit {commit}", "提交 {commit}"),
    "stamp.no_commit": ("no commit", "无提交号"),
    "stamp.hollow": ("hollow: the load was not steady", "空心：负载未达稳态"),
    "stamp.cpu": ("on a CPU to see that it works; says nothing of GPUs", "在 CPU 上运行，只说明能用，不代表 GPU"),
    "stamp.runs": ("{runs} runs", "{runs} 次运行"),
    # the page
    "page.title": ("nanoPD: what was measured", "nanoPD：实测结果"),
    "page.missing": ("Figures without data", "还没有数据的图"),
    "page.missing_line": ("{figure}: run <code>{command}</code>", "{figure}：请运行 <code>{command}</code>"),
    "page.seed": ("Beside the seed", "与 Seed 对照"),
    "page.svg": ("as SVG", "SVG 图"),
    "page.source": ("from {source}", "取自 {source}"),
    "seed.what": ("what", "项目"),
    "seed.theirs": ("seed", "Seed"),
    "seed.ours": ("here", "本项目"),
    "seed.ratio": ("ratio", "倍数"),
    "seed.where": ("measured on", "测于"),
    "seed.differs": ("what differs", "条件差异"),
    "seed.none": ("not recorded: <code>{command}</code>", "还没有记录：<code>{command}</code>"),
}


def w(key: str, **fields: object) -> str:
    """The text of `key` in the current language, with its fields filled in."""
    return pick(*WORDS[key]).format(**fields)


def named(name: str) -> str:
    """A mode, workload or SLO by its word; as it is where it has none, as "64-256" has."""
    return w(name) if name in WORDS else name
