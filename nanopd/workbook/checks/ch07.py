"""Checks of chapter 07: an open loop's client, goodput, a bootstrap interval, and reading a sweep."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence

from nanopd.benchmark.load import ClientRecord, Load, load_metrics
from nanopd.config import SLO
from nanopd.metrics import quantile
from nanopd.workbook.check import exercise, say

# ----------------------------------------------------------------------------------------- 07.1, the client's loop

SERVICE, STOP, STOPPED = 0.03, 2.0, 1.0  # seconds: of a request, when the server stops, and for how long
LATE = 0.02  # by which a client that waits for a moment is woken too late
LOOK = 1e-5  # that a look at the clock takes, so that a loop which only looks gets somewhere
MOST_CALLS = 200_000


class _Server:
    """One request at a time, in the order they were sent, in virtual time; nothing is done from STOP on for a while."""

    def __init__(self, due: Sequence[float]) -> None:
        self.due = list(due)
        self.sent: dict[int, float] = {}
        self.ended: dict[int, float] = {}
        self._clock = self._free_at = 0.0
        self._untold: list[int] = []
        self._calls = 0

    @property
    def now(self) -> float:
        self._pass(LOOK)
        return self._clock

    def send(self, number: int) -> None:
        self._pass(0.0)
        assert number in range(len(self.due)) and number not in self.sent, say(
            f"request {number} was sent twice, or there is none of that number", f"请求 {number} 发了两次，或者根本没有这个编号")
        self.sent[number] = self._clock
        self.ended[number] = self._free_at = _end(max(self._clock, self._free_at))
        self._untold.append(number)

    def wait(self, until: float) -> list[tuple[int, float]]:
        self._pass(0.0)
        next_end = min((self.ended[number] for number in self._untold), default=math.inf)
        assert min(next_end, until) < math.inf, say("you wait for ever: nothing is open, and no moment was named",
                                                    "你会永远等下去：没有未答完的请求，也没有说等到什么时候")
        self._clock = max(self._clock, next_end if next_end <= until else until + LATE)
        told = [number for number in self._untold if self.ended[number] <= self._clock]
        self._untold = [number for number in self._untold if number not in told]
        return [(number, self.ended[number]) for number in told]

    def _pass(self, seconds: float) -> None:
        self._calls += 1
        assert self._calls < MOST_CALLS, say("your loop does not end", "你的循环停不下来")
        self._clock += seconds


def _end(begin: float) -> float:
    """Of a request that is begun then."""
    if STOP <= begin < STOP + STOPPED:
        return STOP + STOPPED + SERVICE
    return begin + SERVICE + (STOPPED if begin < STOP < begin + SERVICE else 0.0)


def _timetables() -> list[list[float]]:
    """Even gaps; two requests due at once; a random one, with a last request long after the others."""
    rng, now, gaps = random.Random(71), 0.0, []
    for _ in range(60):
        now += rng.expovariate(20)
        gaps.append(now)
    return [[number / 20 for number in range(100)], [0.0, 0.0, 0.5, 0.5, 0.5, 4.0], [*gaps, now + 3]]


def _served(theirs: Callable[..., list[float]], due: list[float]) -> tuple[_Server, list[float]]:
    server = _Server(due)
    seconds = list(theirs(list(due), server))
    assert len(server.sent) == len(seconds) == len(due), say(
        f"of {len(due)} requests you sent {len(server.sent)} and returned the times of {len(seconds)}",
        f"{len(due)} 个请求里，你发了 {len(server.sent)} 个，返回了 {len(seconds)} 个时间")
    return server, seconds


@exercise("07.1", hint_en="Before you wait, send all whose due[i] is at or before server.now, however many are open; then wait until "
                          "the next one is due, and no longer. When none is left to send, wait until math.inf.",
          hint_zh="等之前，先把 due[i] 不晚于 server.now 的全部发出去，不管还有多少没答完；然后只等到下一个该发的时刻。"
                  "全发完了，就 wait(math.inf)。")
def check_each_is_sent_when_it_is_due(theirs: Callable[..., list[float]]) -> None:
    for due in _timetables():
        server, _ = _served(theirs, due)
        for number, sent in server.sent.items():
            assert sent >= due[number], say(f"request {number} was due at {due[number]:.2f} s, and you sent it at {sent:.2f} s",
                                            f"请求 {number} 应在 {due[number]:.2f} 秒发，你在 {sent:.2f} 秒就发了")
        late = max(range(len(due)), key=lambda number: server.sent[number] - due[number])
        by = server.sent[late] - due[late]
        assert by <= LATE + 0.005, say(
            f"request {late} was due at {due[late]:.2f} s and was sent {by:.2f} s later: who waits for an answer holds others back",
            f"请求 {late} 应在 {due[late]:.2f} 秒发出，晚了 {by:.2f} 秒：等别人的回答，就压住了后面的请求")


@exercise("07.1", hint_en="A request's time is when it ended less due[i], in the order of the requests: that it was sent late is felt by "
                          "its user as well.",
          hint_zh="一个请求花的时间，是结束时刻减去 due[i]，按请求的顺序返回：发晚了，用户一样要等。")
def check_the_clock_starts_when_it_is_due(theirs: Callable[..., list[float]]) -> None:
    for due in _timetables():
        server, seconds = _served(theirs, due)
        for number, got in enumerate(seconds):
            wanted = server.ended[number] - due[number]
            assert math.isclose(got, wanted, abs_tol=1e-9), say(
                f"request {number}: due at {due[number]:.3f} s, sent at {server.sent[number]:.3f}, ended at {server.ended[number]:.3f}; "
                f"its user waited {wanted:.3f} s, you say {got:.3f}",
                f"请求 {number}：应在 {due[number]:.3f} 秒发，实际 {server.sent[number]:.3f} 秒发出，{server.ended[number]:.3f} 秒结束；"
                f"用户等了 {wanted:.3f} 秒，你说是 {got:.3f}")


# ----------------------------------------------------------------------------------------- 07.6, goodput


def _load(seed: int) -> Load:
    """Some before the window, some refused, some that broke off, answers of one token, and good and bad ones."""
    rng, records = random.Random(seed), []
    for number in range(200):
        arrival = number / 20
        record = ClientRecord(arrival, 100, 5, counts=2.0 <= arrival < 8.0, sent=arrival)
        record.status = rng.choices(["completed", "dropped", "failed"], [7, 2, 1])[0]
        if record.status != "dropped":
            first = arrival + rng.uniform(0.1, 0.9)
            gap = rng.uniform(0.01, 0.09)
            record.tokens = [first + gap * token for token in range(rng.choice([1, 5, 9]))]
        records.append(record)
    return Load(records, 2.0, 8.0)


@exercise("07.6", hint_en="Met are those of load.counted with status \"completed\" for which meets(record, slo) is true. Attainment "
                          "divides by all of load.counted: who was refused had a bad time, too. Goodput divides by seconds.",
          hint_zh="达标的，是 load.counted 里 status 为 \"completed\"、并且 meets(record, slo) 为真的。达标率除以 load.counted 的全部："
                  "被拒收的人也没有好受。有效吞吐除以 seconds。")
def check_good_is_what_the_load_metrics_say(theirs: Callable[[Load, SLO, float], tuple[float, float]]) -> None:
    for seed in range(4):
        load, slo = _load(seed), SLO(0.6, 0.06)
        expected = load_metrics(load, slo, bootstrap=0)
        got = theirs(load, slo, expected["duration"])
        counts = {status: expected[status] for status in ("completed", "failed", "dropped")}
        for name, wanted, found in zip(("attainment", "request_goodput"), (expected["attainment"], expected["request_goodput"]), got):
            assert math.isclose(wanted, found, rel_tol=1e-9), say(
                f"a window with {counts} in {expected['duration']:.2f} s: {name} is {wanted:.4f} in the engine, {found:.4f} in yours",
                f"窗口里有 {counts}，共 {expected['duration']:.2f} 秒：引擎的 {name} 是 {wanted:.4f}，你的是 {found:.4f}")


@exercise("07.6", hint_en="A record that was refused or broke off may have no token at all: look at its status before anything else.",
          hint_zh="被拒收或中断的记录可能一个 token 也没有：先看 status，再看别的。")
def check_who_was_refused_has_not_been_served(theirs: Callable[[Load, SLO, float], tuple[float, float]]) -> None:
    fine = ClientRecord(0.1, 10, 2, sent=0.1, status="completed", tokens=[0.2, 0.21])
    refused = [ClientRecord(0.1, 10, 2, sent=0.1, status="dropped") for _ in range(3)]
    got = theirs(Load([fine, *refused], 0.0, 1.0), SLO(1.0, 1.0), 0.5)
    assert tuple(got) == (0.25, 2.0), say(
        f"one of four was answered in time and three were refused, in 0.5 s: attainment 0.25, goodput 2/s; you say {tuple(got)}",
        f"0.5 秒里四个请求，一个按时答完，三个被拒收：达标率 0.25，有效吞吐每秒 2 个；你说是 {tuple(got)}")


# ----------------------------------------------------------------------------------------- 07.7, how sure

Interval = Callable[..., tuple[float, float]]


def _sample(number: int, seed: int) -> list[float]:
    rng = random.Random(seed)
    return [rng.lognormvariate(0, 0.5) for _ in range(number)]


@exercise("07.7", hint_en="`random.Random(seed).choices(values, k=len(values))` draws with replacement. `quantile(..., share)` of each "
                          "draw; then the 0.025 and 0.975 quantiles of those.",
          hint_zh="`random.Random(seed).choices(values, k=len(values))` 是有放回地抽。对每次抽到的值算 `quantile(..., share)`，"
                  "再取它们的 0.025 和 0.975 分位数。")
def check_its_ends_are_as_wide_as_the_quantile_is_unsure(theirs: Interval) -> None:
    for share in (0.5, 0.9):
        values = _sample(400, 7)
        low, high = theirs(list(values), share, 400, 3)
        expected = [_reference(values, share, 400, seed) for seed in range(3)]
        width = sum(end - begin for begin, end in expected) / len(expected)
        assert low <= quantile(values, share) <= high, say(
            f"the quantile itself, {quantile(values, share):.3f}, lies outside of your interval {low:.3f} to {high:.3f}",
            f"分位数本身 {quantile(values, share):.3f} 就落在你的区间 {low:.3f} 到 {high:.3f} 之外")
        assert high - low > 0.7 * width, say(
            f"share {share}, 400 values: your interval is {high - low:.3f} wide, and should be about {width:.3f}. Did you draw with "
            "replacement, as many values as there are, and keep 95%?",
            f"分位 {share}，400 个值：你的区间宽 {high - low:.3f}，应该在 {width:.3f} 左右。是有放回地抽、抽同样多个、留 95% 吗？")
        assert high - low < 1.4 * width, say(
            f"share {share}, 400 values: your interval is {high - low:.3f} wide, and should be about {width:.3f}. It holds the middle 95% "
            "of the draws, not all; and each draw has as many values as there are",
            f"分位 {share}，400 个值：你的区间宽 {high - low:.3f}，应该在 {width:.3f} 左右。要的是各次抽样中间的 95%，不是全部；"
            "而且每次要抽同样多个值")


def _reference(values: Sequence[float], share: float, draws: int, seed: int) -> tuple[float, float]:
    rng = random.Random(seed)
    found = sorted(quantile(rng.choices(values, k=len(values)), share) for _ in range(draws))
    return quantile(found, 0.025), quantile(found, 0.975)


@exercise("07.7", hint_en="Take the quantile of each draw that was asked for (`share`), and let `seed` alone decide what is drawn.",
          hint_zh="每次抽样都取要求的那个分位数（`share`）；抽到什么只由 `seed` 决定。")
def check_more_values_make_it_narrower(theirs: Interval) -> None:
    few, many = theirs(_sample(200, 8), 0.5, 300, 0), theirs(_sample(3200, 8), 0.5, 300, 0)
    ratio = (few[1] - few[0]) / max(many[1] - many[0], 1e-12)
    assert 2 < ratio < 8, say(
        f"sixteen times as many values make it about 4 times as narrow; yours became {ratio:.1f} times",
        f"值多到十六倍，区间应该窄到四分之一左右；你的窄到了 {ratio:.1f} 分之一")
    twice = [[theirs(_sample(3200, 8), 0.5, 20, seed) for seed in range(4)] for _ in range(2)]  # few draws: chance would show
    assert twice[0] == twice[1], say("the same seed gave another interval", "同样的种子，却给出了不同的区间")


# ----------------------------------------------------------------------------------------- 07.8, reading a sweep

Sweep = dict[str, dict[float, tuple[float, float]]]
C, D, A = "collocated", "disaggregated", "adaptive"
_CASES: tuple[tuple[Sweep, dict[float, str | None]], ...] = (
    ({C: {10: (9, 10), 20: (18, 20), 30: (12, 15)}, D: {10: (8.5, 9.8), 20: (15, 17), 30: (22, 26)}}, {10: None, 20: C, 30: D}),
    ({C: {30: (1, 2), 10: (9, 10)}, D: {30: (4, 6), 10: (3, 5), 40: (2, 3)}}, {10: C, 30: D}),
    ({C: {10: (5, 9), 20: (1, 2)}, D: {10: (6, 8), 20: (5, 9)}, A: {10: (10, 12), 20: (8, 12)}}, {10: A, 20: None}),
    ({C: {10: (0, 0)}, D: {10: (0, 0)}}, {10: None}),
)


@exercise("07.8", hint_en="Only rates that every mode has, in ascending order. The best one's low end must lie above the high ends of all "
                          "others; where intervals overlap or touch, None.",
          hint_zh="只看每个模式都跑过的速率，从小到大。最好的那个，下限要高于其他所有模式的上限；区间有重叠或者碰上了，就是 None。")
def check_the_best_mode_is_sure(theirs: Callable[[Sweep], dict[float, str | None]]) -> None:
    for sweep, expected in _CASES:
        got = theirs({mode: dict(curve) for mode, curve in sweep.items()})
        assert got == expected, say(f"goodput {sweep}: surely best is {expected}, you say {got}",
                                    f"有效吞吐 {sweep}：肯定最好的是 {expected}，你说是 {got}")
        assert list(got) == sorted(got), say(f"the rates should ascend, yours are {list(got)}", f"速率要从小到大，你的是 {list(got)}")
