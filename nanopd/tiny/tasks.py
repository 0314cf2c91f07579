"""Questions with checkable answers, in English and Chinese, made from a seed.

The embedded model is trained on these generators and the tests ask it fresh questions from them. Every
prompt is complete in itself: the answer comes right after it, either as the next text (raw prompt) or as
the assistant's turn (chat template), and ends with the end-of-sequence token.

Recall is the task that watches the KV cache. Each value is four random digits, stated once, so it can be
read from its place in the list and from nowhere else: one wrong KV block there makes a wrong answer.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

Lang = Literal["en", "zh"]
Kind = Literal["recall", "arithmetic", "copy", "reverse", "count", "sort", "story"]

LANGS: tuple[Lang, ...] = ("en", "zh")
KINDS: tuple[Kind, ...] = ("recall", "arithmetic", "copy", "reverse", "count", "sort", "story")

# The ranges the model is trained in (both ends included); outside them it is out of its depth.
LIST_LENGTH = (3, 8)
COUNT_LENGTH = (4, 12)
SORT_LENGTH = (3, 7)
STORY_SENTENCES = (6, 16)
MAX_DIGITS = 3

ADJECTIVES: dict[Lang, tuple[str, ...]] = {
    "en": tuple(
        "red blue green yellow black white gray brown pink purple golden silver big small tall short "
        "long round flat thin old new young fast slow warm cold hot cool wet dry soft hard loud quiet "
        "bright dark clean dusty happy sad brave shy kind proud calm wild tame sweet sour salty fresh "
        "empty full heavy light deep shallow wide narrow rich poor strong weak".split()
    ),
    "zh": tuple(
        "红色 蓝色 绿色 黄色 黑色 白色 灰色 棕色 粉色 紫色 金色 银色 巨大 细小 高大 矮小 修长 圆形 扁平 单薄 "
        "古老 崭新 年轻 快速 缓慢 温暖 寒冷 炎热 凉爽 潮湿 干燥 柔软 坚硬 响亮 安静 明亮 黑暗 干净 陈旧 快乐 "
        "悲伤 勇敢 害羞 善良 骄傲 平静 野生 温顺 香甜 酸涩 咸味 新鲜 空心 饱满 沉重 轻巧 深沉 浅色 宽阔 狭窄 "
        "富有 贫穷 强壮 虚弱".split()
    ),
}

NOUNS: dict[Lang, tuple[str, ...]] = {
    "en": tuple(
        "fox cat dog bear wolf lion tiger horse cow pig sheep goat duck hen bird owl frog fish whale crab "
        "ant bee rabbit mouse lamp table chair door window clock book pen cup plate spoon knife bottle box "
        "bag coat hat shoe ring key coin drum bell flute tree leaf flower grass seed rock sand hill lake "
        "river sea island cloud star moon sun rain snow wind fire field forest garden road apple pear plum "
        "peach grape lemon melon bread cake rice soup tea milk honey egg nut boat ship train bus bike kite "
        "ball doll".split()
    ),
    "zh": tuple(
        "狐狸 小猫 小狗 黑熊 野狼 狮子 老虎 骏马 奶牛 小猪 绵羊 山羊 鸭子 母鸡 小鸟 夜莺 青蛙 金鱼 鲸鱼 螃蟹 "
        "蚂蚁 蜜蜂 兔子 老鼠 台灯 桌子 椅子 大门 窗户 时钟 书本 钢笔 杯子 盘子 勺子 小刀 瓶子 盒子 书包 大衣 "
        "帽子 鞋子 戒指 钥匙 硬币 大鼓 铃铛 笛子 树木 树叶 花朵 青草 种子 石头 沙子 山丘 湖泊 河流 大海 岛屿 "
        "云朵 星星 月亮 太阳 雨水 雪花 微风 火焰 田野 森林 花园 道路 苹果 梨子 李子 桃子 葡萄 柠檬 西瓜 面包 "
        "蛋糕 米饭 热汤 绿茶 牛奶 蜂蜜 鸡蛋 坚果 小船 轮船 火车 汽车 单车 风筝 皮球 布偶".split()
    ),
}

HEROES: dict[Lang, tuple[str, ...]] = {
    "en": tuple("fox cat dog bear wolf lion tiger horse duck frog rabbit mouse".split()),
    "zh": tuple("狐狸 小猫 小狗 黑熊 野狼 狮子 老虎 骏马 鸭子 青蛙 兔子 老鼠".split()),
}
MOODS: dict[Lang, tuple[str, ...]] = {
    "en": tuple("brave shy kind proud calm happy sad young".split()),
    "zh": tuple("勇敢 害羞 善良 骄傲 平静 快乐 悲伤 年轻".split()),
}
THINGS: dict[Lang, tuple[str, ...]] = {
    "en": tuple("lamp key coin drum bell ring kite ball book hat".split()),
    "zh": tuple("台灯 钥匙 硬币 大鼓 铃铛 戒指 风筝 皮球 书本 帽子".split()),
}
PLACES: dict[Lang, tuple[str, ...]] = {
    "en": tuple("hill lake river sea forest garden field road".split()),
    "zh": tuple("山丘 湖泊 河流 大海 森林 花园 田野 道路".split()),
}

# A story is the opening, some of the events in this order, and the ending: one sentence each.
STORY_OPENING: dict[Lang, str] = {
    "en": "Once upon a time, a {mood} {hero} lived near the {place}.",
    "zh": "从前，{place}旁边住着一只{mood}的{hero}。",
}
STORY_EVENTS: dict[Lang, tuple[str, ...]] = {
    "en": (
        "One morning the {hero} dreamed of a {thing}.",
        "Nobody near the {place} had seen such a {thing} before.",
        "So the {hero} packed some bread and walked to the {place}.",
        "The sun was warm and the road was long.",
        "On the way the {hero} met a {friend}.",
        "The {friend} asked where the {mood} {hero} was going.",
        "The {hero} told the {friend} about the {thing}.",
        "They shared the bread and became good friends.",
        "Soon it began to rain, and they hid under a tree.",
        "The {friend} sang a song until the rain stopped.",
        "Then they looked for the {thing} all over the {place}.",
        "At last the {friend} saw something bright in the grass.",
        "It was the {thing}, and it was very old.",
        "The {hero} laughed and danced with the {friend}.",
    ),
    "zh": (
        "一天早上，{hero}梦见了一个{thing}。",
        "{place}旁边没有谁见过这样的{thing}。",
        "于是{hero}带上面包，向{place}走去。",
        "太阳很温暖，道路很长。",
        "在路上，{hero}遇见了一只{friend}。",
        "{friend}问{mood}的{hero}要去哪里。",
        "{hero}给{friend}讲了{thing}的故事。",
        "他们分着吃了面包，成了好朋友。",
        "不久下起了雨，他们躲在树下。",
        "{friend}唱着歌，一直唱到雨停。",
        "然后他们在{place}到处寻找{thing}。",
        "终于，{friend}看见草里有东西在发光。",
        "那正是{thing}，它非常古老。",
        "{hero}笑了，和{friend}一起跳舞。",
    ),
}
STORY_ENDING: dict[Lang, str] = {
    "en": "In the end the {mood} {hero} took the {thing} home.",
    "zh": "最后，{mood}的{hero}把{thing}带回了家。",
}


@dataclass(frozen=True)
class Task:
    """One question. A story has no single right answer: its `answer` is one that the grammar allows."""

    kind: Kind
    lang: Lang
    prompt: str
    answer: str


def make_recall(rng: random.Random, num_pairs: int, lang: Lang) -> Task:
    """Ask for one value from a list of `num_pairs` distinct keys, each place equally likely."""
    return make_recall_dialogue(rng, num_pairs, 1, lang)[0]


def make_recall_dialogue(rng: random.Random, num_pairs: int, num_questions: int, lang: Lang) -> list[Task]:
    """A list and several questions about it: only the first prompt states the list."""
    keys = _sample_keys(rng, num_pairs, lang)
    codes = [f"{rng.randrange(10_000):04d}" for _ in keys]
    asked = rng.sample(range(num_pairs), num_questions)
    pairs = [f"{key}={code}" for key, code in zip(keys, codes)]
    if lang == "en":
        stated = f"Remember these codes: {'; '.join(pairs)}. "
        questions = [f"What is the code of {keys[i]}?" for i in asked]
    else:
        stated = f"请记住这些密码：{'；'.join(pairs)}。"
        questions = [f"“{keys[i]}”的密码是多少？" for i in asked]
    questions[0] = stated + questions[0]
    return [Task("recall", lang, question, codes[i]) for question, i in zip(questions, asked)]


def make_arithmetic(rng: random.Random, lang: Lang) -> Task:
    """Add or subtract two numbers of up to three digits; no result is negative."""
    left, right = (rng.randrange(10 ** rng.randint(1, MAX_DIGITS)) for _ in range(2))
    if rng.random() < 0.5:
        sign, result = "+", left + right
    else:
        left, right = max(left, right), min(left, right)
        sign, result = "-", left - right
    prompt = f"What is {left}{sign}{right}?" if lang == "en" else f"{left}{sign}{right}等于多少？"
    return Task("arithmetic", lang, prompt, str(result))


def make_copy(rng: random.Random, lang: Lang) -> Task:
    """Repeat a short list of words."""
    words = _join(rng.sample(NOUNS[lang], rng.randint(*LIST_LENGTH)), lang)
    prompt = f"Copy this list: {words}." if lang == "en" else f"抄写这个列表：{words}。"
    return Task("copy", lang, prompt, words)


def make_reverse(rng: random.Random, lang: Lang) -> Task:
    """Say a short list of words backwards."""
    words = rng.sample(NOUNS[lang], rng.randint(*LIST_LENGTH))
    listed = _join(words, lang)
    prompt = f"Reverse this list: {listed}." if lang == "en" else f"倒写这个列表：{listed}。"
    return Task("reverse", lang, prompt, _join(words[::-1], lang))


def make_count(rng: random.Random, lang: Lang) -> Task:
    """Count how often a word appears in a short list (at least once)."""
    length = rng.randint(*COUNT_LENGTH)
    target, *others = rng.sample(NOUNS[lang], 4)
    repeats = rng.randint(1, min(length, 9))
    words = [target] * repeats + rng.choices(others, k=length - repeats)
    rng.shuffle(words)
    listed = _join(words, lang)
    if lang == "en":
        prompt = f"How many times does {target} appear in this list: {listed}?"
    else:
        prompt = f"“{target}”在这个列表里出现几次：{listed}？"
    return Task("count", lang, prompt, str(repeats))


def make_sort(rng: random.Random, lang: Lang) -> Task:
    """Put a few distinct numbers below 100 in ascending order."""
    numbers = rng.sample(range(100), rng.randint(*SORT_LENGTH))
    listed = _join([str(number) for number in numbers], lang)
    prompt = f"Sort these numbers: {listed}." if lang == "en" else f"从小到大排列：{listed}。"
    return Task("sort", lang, prompt, _join([str(number) for number in sorted(numbers)], lang))


def make_story(rng: random.Random, lang: Lang) -> Task:
    """Tell a story whose hero, thing and number of sentences the prompt gives."""
    hero, friend = rng.sample(HEROES[lang], 2)
    words = {
        "mood": rng.choice(MOODS[lang]),
        "hero": hero,
        "friend": friend,
        "thing": rng.choice(THINGS[lang]),
        "place": rng.choice(PLACES[lang]),
    }
    length = rng.randint(*STORY_SENTENCES)
    chosen = sorted(rng.sample(range(len(STORY_EVENTS[lang])), length - 2))
    sentences = [STORY_OPENING[lang], *(STORY_EVENTS[lang][i] for i in chosen), STORY_ENDING[lang]]
    story = (" " if lang == "en" else "").join(sentences).format(**words)
    if lang == "en":
        prompt = f"Tell a story about a {words['mood']} {hero} and a {words['thing']} in {length} sentences."
    else:
        prompt = f"用{length}句话讲一个故事，主角是{words['mood']}的{hero}，还有一个{words['thing']}。"
    return Task("story", lang, prompt, story)


def make_task(rng: random.Random, kind: Kind, lang: Lang, num_pairs: int = 8) -> Task:
    """A task of any kind; `num_pairs` is the length of the list when the kind is recall."""
    if kind == "recall":
        return make_recall(rng, num_pairs, lang)
    return _MAKERS[kind](rng, lang)


def characters(lang: Lang) -> set[str]:
    """Every character that the tasks of a language are written in."""
    rng = random.Random(0)
    sampled = (make_task(rng, kind, lang) for kind in KINDS for _ in range(200))
    written = {character for task in sampled for character in task.prompt + task.answer}
    return written.union(*ADJECTIVES[lang], *NOUNS[lang])


def is_right(task: Task, text: str) -> bool:
    """Whether `text` answers the task; a story needs its opening, its ending and its number of sentences."""
    if task.kind != "story":
        return text == task.answer
    stop = "." if task.lang == "en" else "。"
    wanted, told = task.answer.split(stop), text.split(stop)
    opens = text.startswith(STORY_OPENING[task.lang].split("{")[0])
    return opens and told[-2:] == wanted[-2:] and len(told) == len(wanted)


_MAKERS: dict[str, Callable[[random.Random, Lang], Task]] = {
    "arithmetic": make_arithmetic,
    "copy": make_copy,
    "reverse": make_reverse,
    "count": make_count,
    "sort": make_sort,
    "story": make_story,
}


def _sample_keys(rng: random.Random, count: int, lang: Lang) -> list[str]:
    adjectives, nouns = ADJECTIVES[lang], NOUNS[lang]
    space = " " if lang == "en" else ""
    chosen = rng.sample(range(len(adjectives) * len(nouns)), count)
    return [f"{adjectives[i // len(nouns)]}{space}{nouns[i % len(nouns)]}" for i in chosen]


def _join(words: list[str], lang: Lang) -> str:
    return (", " if lang == "en" else "、").join(words)
