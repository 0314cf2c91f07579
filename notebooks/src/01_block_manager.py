# Chapter 01: the block manager. Where KV blocks live, who may write to them, when they are free. Rules: nanopd.workbook.

# %% [markdown] lang="en"
# # 01 The block manager
#
# Chapter 00 ended with blocks in the wrong places, and answers that didn't care. Here is who keeps the books: which
# block holds whose tokens, who may write there, and when a block is free again. A few hundred lines of plain Python
# decide how many requests fit on a GPU.
#
# You will build the parts by hand, meet the real ones, and at the end let a careless engine hand one customer's secret
# to another, with books in perfect order. No GPU is needed: nearly everything here is counting. Allow 60 minutes.

# %% [markdown] lang="zh" en_hash="750a9648"
# # 01 块管理器
#
# 第 00 章的结尾，我们把块挪错了地方，回答却毫不在意。这一章来看管账的人：哪个块里放着谁的 token，谁能往里写，
# 什么时候算空闲。一块 GPU 能装下多少请求，就由这几百行纯 Python 说了算。
#
# 你会先用手搭出各个零件，再看真正的实现；最后让一个粗心的引擎把一位客户的秘密交到另一位手里，而账面分毫不差。
# 不需要 GPU：这里做的几乎全是数数。大约 60 分钟。

# %%
import random
import nanopd
from nanopd import LLM, SamplingParams, widgets
from nanopd.block_manager import BlockPool, BlockSpaceManager, InvariantError, hash_block
from nanopd.core import Sequence
from nanopd.models.loader import load_spec

# %% [markdown] lang="en"
# ## 1.1 What a reservation wastes
#
# A sequence grows by one token a step, and nobody knows how long it will get. The obvious cache is one array for each
# sequence, as long as the longest that is allowed. By hand: four requests end at 3, 9, 5 and 14 tokens, and 16 are
# allowed. Reserved, they take 64 places. Given blocks of 4 as they grow, they take 1 + 3 + 2 + 4 = 10 blocks, 40 places,
# for 31 tokens.
#
# **Now a cache of 65,536 tokens, sequences of up to 2,048, and the lengths in the next cell but one (half of them under
# 270). How many sequences fit at once if each reserves its longest? And with blocks of 16?**

# %% [markdown] lang="zh" en_hash="7c0d81c4"
# ## 1.1 预留浪费了多少
#
# 序列每一步长一个 token，最后多长谁也不知道。最直接的缓存是给每条序列留一个数组，按允许的最大长度来留。先用笔算：
# 四个请求最后分别是 3、9、5、14 个 token，上限是 16。预留要占 64 格；换成随长随给、每块 4 格，要 1 + 3 + 2 + 4 = 10 块，
# 共 40 格，装 31 个 token。
#
# **现在缓存能放 65,536 个 token，序列最长 2,048，长度分布见下下格（一半不到 270）。
# 每条都按最长预留，同时放得下几条？改用 16 个 token 的块呢？**

# %%
guess = nanopd.predict("01.1", reserved=..., paged=...)

# %%
capacity, longest = 65_536, 2_048
rng = random.Random(1)
lengths = [min(longest, 16 + int(rng.lognormvariate(5.5, 0.8))) for _ in range(4000)]  # a made-up workload

def fill(lengths: list[int], block_size: int) -> tuple[BlockSpaceManager, int]:
    """Admit sequences until the next one doesn't fit."""
    manager = BlockSpaceManager(capacity // block_size, block_size)
    for admitted, length in enumerate(lengths):
        sequence = Sequence([admitted] * length)
        if not manager.can_allocate(sequence):
            return manager, admitted
        manager.allocate(sequence)

guess.reveal(reserved=capacity // longest, paged=fill(lengths, 16)[1])

# %% [markdown] lang="en"
# The same memory serves several times as many sequences, so each decode step has that many more to share one trip through
# the weights. What still goes to waste is the end of each sequence's last block. If every length is equally likely to
# end anywhere in a block, that is (size - 1) / 2 tokens a sequence. Is it?

# %% [markdown] lang="zh" en_hash="07c2248f"
# 同样的内存，能同时服务的序列多了好几倍，每个解码步里也就有这么多条序列来分摊同一趟权重。还浪费的，只剩每条序列最后一块的
# 尾巴。如果长度落在块内任何位置的机会均等，每条序列平均浪费 (块大小 - 1) / 2 个 token。真是这样吗？

# %%
spec = load_spec("qwen3-8b")
print(f"{'block size':>10} {'sequences':>10} {'wasted each':>12} {'expected':>9} {'table entries':>14} {'KB in a row':>12}")
for size in (1, 4, 16, 64, 256, 1024):
    manager, admitted = fill(lengths, size)
    wasted = (manager.num_used_blocks * size - sum(lengths[:admitted])) / admitted
    run = size * spec.num_kv_heads * spec.head_dim * 2 / 1024  # keys of a block in one layer, 16-bit
    print(f"{size:>10} {admitted:>10} {wasted:>12.1f} {(size - 1) / 2:>9.1f} "
          f"{manager.num_used_blocks / admitted:>14.1f} {run:>12.0f}")
print("all of them as long as allowed:", fill([longest] * 100, 16)[1], "paged,", capacity // longest, "reserved")

# %% [markdown] lang="en"
# It is, until blocks are longer than most sequences. So why not blocks of 1? Look at the last two columns: the table grows,
# the runs of memory that a kernel reads in one go shrink, and all the bookkeeping below happens more often. Sixteen is a
# compromise, not a law.
#
# And the last line is the case where paging loses: when every sequence grows to the limit, it saves nothing, and the
# kernel still has to look each block up (chapter 03 measures what that costs).
#
# ## 1.2 Blocks and block tables
#
# Blocks needn't lie side by side, so each sequence carries a list of them, its **block table**. Position `p` lives in block
# `table[p // size]`, at offset `p % size`. With blocks of 4 and the table [7, 2, 9], position 9 is in entry 2, so block 9,
# offset 1; counting all places of the cache in one row, that is **slot** 9 x 4 + 1 = 37.
#
# **A prompt has 1,000 tokens, blocks hold 16. Where does the next token, position 1,000, go: which entry, which
# offset (both count from 0)? And how many bytes is that sequence's table, at 4 bytes an entry?**

# %% [markdown] lang="zh" en_hash="a439f319"
# 的确如此，直到块比多数序列还长为止。那为什么不用大小为 1 的块？看最后两列：块表变长，kernel 一口气能读的连续内存变短，
# 后面讲的各种记账也更频繁。16 是折中，不是定律。
#
# 最后一行是分页输的情形：如果每条序列都会长到上限，它一格也省不下，kernel 却照样要逐块查表（代价由第 03 章来量）。
#
# ## 1.2 块与块表
#
# 块不必挨在一起，所以每条序列都带着一份清单，叫**块表**。位置 `p` 在块 `table[p // size]` 里，偏移是 `p % size`。
# 块大小为 4、块表为 [7, 2, 9] 时，位置 9 落在第 2 项，也就是块 9、偏移 1；把整个缓存的格子排成一行来数，
# 就是**槽位** 9 × 4 + 1 = 37。
#
# **提示有 1,000 个 token，每块放 16 个。下一个 token，即位置 1,000，该放进块表第几项、偏移多少（都从 0 数起）？
# 每项 4 字节，这条序列的块表一共多少字节？**

# %%
guess = nanopd.predict("01.2", table_entry=..., offset=..., table_bytes=...)

# %%
manager = BlockSpaceManager(num_blocks=256, block_size=16)
prompt = Sequence(range(1000))
manager.allocate(prompt)
prompt.num_computed = 1000  # as the engine does once it has run them
prompt.append_token(7)
manager.append_slot(prompt)  # position 1,000 is writable now
guess.reveal(table_entry=1000 // 16, offset=1000 % 16, table_bytes=4 * len(manager.block_table(prompt)))
print(f"Qwen3-8B keeps {spec.kv_bytes_per_token(2) * 1000 / 1e6:.0f} MB behind that table")

# %%
manager = BlockSpaceManager(num_blocks=8, block_size=4)
first, second, third = Sequence(range(6)), Sequence(range(100, 105)), Sequence(range(200, 211))
manager.allocate(first)
manager.allocate(second)
manager.free(first)
manager.allocate(third)
table, memory = manager.block_table(third), [None] * 32
for position, token in enumerate(third.token_ids):
    memory[table[position // 4] * 4 + position % 4] = token
print("table of third:", table, " of second:", manager.block_table(second))
print("read back:", [token for block in table for token in memory[block * 4 : block * 4 + 4]])

# %% [markdown] lang="en"
# In the second cell `third` got what `first` had left behind and one block from further on. Written through its table into
# scattered slots and read back the same way, its tokens are all there and in order.
#
# **Exercise 1.2.** Before each step the engine tells the kernel where to write: the slots of positions [start, start +
# num_new). Write that function. The check compares it with the engine's own, `build_batch`.

# %% [markdown] lang="zh" en_hash="de9d2901"
# 第二个格子里，`third` 拿到的是 `first` 腾出来的块，外加后面的一块。token 通过块表写进散落的槽位，再照样读回来，
# 一个不少，顺序也没乱。
#
# **练习 1.2** 每一步之前，引擎都要告诉 kernel 往哪里写：位置 [start, start + num_new) 各自的槽位。
# 请写出这个函数。检查会拿它和引擎自己的 `build_batch` 对比。

# %% nbgrader={"grade_id": "ex-1-2", "solution": true}
def slot_mapping(table: list[int], block_size: int, start: int, num_new: int) -> list[int]:
    """The slot of each position from `start` on, `num_new` of them."""
    ### BEGIN SOLUTION
    positions = range(start, start + num_new)
    return [table[p // block_size] * block_size + p % block_size for p in positions]
    ### END SOLUTION

# %% nbgrader={"grade_id": "check-1-2", "points": 1}
nanopd.check("01.2", slot_mapping)

# %% [markdown] lang="en"
# ## 1.3 Who holds a block?
#
# A pool of 8 blocks. Alice's prompt takes 3. Bob has the same prompt, so he points at Alice's blocks instead of computing
# his own. Alice leaves. **How many blocks are free now, if leaving puts one's blocks back on the free list? And how many
# in nanoPD?**

# %% [markdown] lang="zh" en_hash="4a32d0c8"
# ## 1.3 块归谁？
#
# 池子里有 8 个块。Alice 的提示占 3 块。Bob 的提示一模一样，于是他直接指向 Alice 的块，不再自己算一遍。接着 Alice 走了。
# **如果谁走就把谁的块放回空闲列表，现在有几块空闲？在 nanoPD 里又是几块？**

# %%
guess = nanopd.predict("01.3", naive=..., counted=...)

# %%
free = list(range(8))
alice = [free.pop(0) for _ in range(3)]
bob = list(alice)
free += alice  # Alice leaves
naive, carol = len(free), free[:6]
print("Bob still reads", bob, "and Carol writes", carol, ": both have", set(bob) & set(carol))

manager = BlockSpaceManager(num_blocks=8, block_size=4)
alice = Sequence(range(12))
manager.allocate(alice)
bob = manager.fork(alice)
manager.free(alice)
guess.reveal(naive=naive, counted=manager.num_free_blocks)

# %% [markdown] lang="en"
# Each block counts its holders: allocating sets 1, sharing adds 1, letting go takes 1 off, and only at 0 is the block free.
# One invariant carries the whole module:
#
# > reference count == number of block tables (and leases, see 1.6) that hold the block
#
# The pool does the counting; the manager, which knows the tables, can prove the count from scratch. That is `check()`,
# and it looks at every block, so it belongs in tests and idle moments rather than in every step.
#
# **Exercise 1.3.** Write the heart of it: which blocks have a count that the tables don't explain?

# %% [markdown] lang="zh" en_hash="86b8f0a3"
# 每个块都数着自己有几个持有者：分配时为 1，共享一次加 1，放手一次减 1，减到 0 才算空闲。整个模块靠一条不变式撑着：
#
# > 引用计数 == 持有这个块的块表数（还有租约，见 1.6）
#
# 池子负责计数；管理器手里有全部块表，可以从头把这个数验证一遍，这就是 `check()`。它要看遍每一个块，
# 所以适合放在测试里和空闲时跑，不适合每一步都跑。
#
# **练习 1.3** 写出它的核心：哪些块的计数和块表对不上？

# %% nbgrader={"grade_id": "ex-1-3", "solution": true}
def wrong_blocks(ref_counts: list[int], tables: list[list[int]]) -> list[int]:
    """The blocks, ascending, whose reference count is not the number of tables that hold them."""
    ### BEGIN SOLUTION
    holders = [0] * len(ref_counts)
    for table in tables:
        for block in table:
            holders[block] += 1
    return [block for block, count in enumerate(ref_counts) if count != holders[block]]
    ### END SOLUTION

# %% nbgrader={"grade_id": "check-1-3", "points": 1}
nanopd.check("01.3", wrong_blocks)

# %% [markdown] lang="en"
# ## 1.4 Four answers from one prompt
#
# You ask for four different answers to the same 1,000-token prompt, 63 blocks of 16. **How many blocks do the four need
# before any of them has said a word? And after each has said one token?** The cell after the next one will not flatter
# you.

# %% [markdown] lang="zh" en_hash="4ab46548"
# ## 1.4 一个提示，四个回答
#
# 同一个 1,000 个 token 的提示，占 63 个大小为 16 的块，要四个不同的回答。**四条序列一个字还没说，一共要占多少块？
# 每条各说出一个 token 之后呢？** 后面的结果可不会给你留面子。

# %%
guess = nanopd.predict("01.4", before_first_token=..., after_one_token=...)

# %%
manager = BlockSpaceManager(num_blocks=256, block_size=16)
parent = Sequence(range(1000))
manager.allocate(parent)
parent.num_computed = 1000
answers = [parent] + [manager.fork(parent) for _ in range(3)]
before, last = manager.num_used_blocks, manager.block_table(parent)[-1]
for answer in answers:
    answer.append_token(7)
    holders = manager.ref_count(last)
    print(f"block {last} is held by {holders}: copies asked for {manager.append_slot(answer)}")
    answer.num_computed += 1
guess.reveal(before, manager.num_used_blocks)

# %% [markdown] lang="en"
# 63, then 66. Forking copied nothing: four tables point at the same 63 blocks. The prompt ends eight tokens into the last
# one, so the first writer may not write there while three others still read it: it gets a copy. So does the second, and
# the third. The fourth finds itself alone and writes in place. **Three copies of one block, instead of three copies of
# sixty-three.** That is **copy-on-write**.
#
# Note what the manager does *not* do: it never touches the cache. It returns pairs, and whoever holds the tensors has to
# carry them out. Below is the same in small, move by move: press Step.

# %% [markdown] lang="zh" en_hash="fd1529e7"
# 先是 63，然后 66。分叉什么也没有复制：四张块表指向同样的 63 个块。提示在最后一块的第 8 格处结束，所以第一个要写的序列
# 不能直接写——另外三条还在读它——于是它拿到一个副本。第二条、第三条也是。轮到第四条时只剩它自己，就地写入。
# **复制了三次一个块，而不是三次六十三个块。** 这就是**写时复制**。
#
# 注意管理器*不*做什么：它从不碰缓存里的数据，只返回一对对块号，复制得由手握张量的人去执行。
# 下面是同一件事的缩小版，一步一步看：按“单步”。

# %%
small = BlockSpaceManager(num_blocks=16, block_size=4)
family = [Sequence(range(10)) for _ in range(4)]

def read_prompt() -> None:
    small.allocate(family[0])
    family[0].num_computed = 10  # two and a half blocks

actions = [("allocate", read_prompt)]
actions += [(f"fork {family[i].seq_id}", lambda i=i: small.fork(family[0], family[i])) for i in (1, 2, 3)]
actions += [(f"write {family[i].seq_id}", lambda i=i: small.append_slot(family[i])) for i in range(4)]
widgets.BlockMap(small, watch=family, actions=actions)

# %% [markdown] lang="en"
# **Exercise 1.4.** Write `append_slot` over the bare pool: `table` is the sequence's list of blocks, `num_computed` the
# position it writes next. Make that position writable, change `table` accordingly, and return the copies the engine must
# carry out as `(source, destination)` pairs. You have `pool.allocate()`, `pool.release(block)`, `pool.ref_count(block)`
# and `pool.block_size`. Mind the case in which the last block is full.

# %% [markdown] lang="zh" en_hash="c60a316a"
# **练习 1.4** 直接在池子上实现 `append_slot`：`table` 是这条序列的块表，`num_computed` 是它接下来要写的位置。
# 让这个位置可写，相应地改好 `table`，并以 `(源块, 目标块)` 的形式返回引擎必须执行的复制。
# 你能用的有 `pool.allocate()`、`pool.release(block)`、`pool.ref_count(block)` 和 `pool.block_size`。
# 别忘了最后一块正好写满的情况。

# %% nbgrader={"grade_id": "ex-1-4", "solution": true}
def append_slot(pool: BlockPool, table: list[int], num_computed: int) -> list[tuple[int, int]]:
    """The (source, destination) blocks to copy before the next token is written."""
    ### BEGIN SOLUTION
    if num_computed == len(table) * pool.block_size:
        table.append(pool.allocate())
        return []
    shared = table[-1]
    if pool.ref_count(shared) == 1:
        return []
    table[-1] = pool.allocate()
    pool.release(shared)
    return [(shared, table[-1])]
    ### END SOLUTION

# %% nbgrader={"grade_id": "check-1-4", "points": 2}
nanopd.check("01.4", append_slot)

# %% [markdown] lang="en"
# ## 1.5 Prefixes that were read before
#
# Bob in 1.3 knew that Alice had his prompt. In general one has to find out. Twenty users come one after the other, each
# with the same system prompt of 500 tokens and then 100 of their own. **How many of the 12,000 tokens must be computed,
# with blocks of 16? And how many if somebody puts a clock at the very top, one token that differs each time?**

# %% [markdown] lang="zh" en_hash="194a6d78"
# ## 1.5 读过的前缀
#
# 1.3 里的 Bob 事先知道 Alice 的提示和自己的一样；一般情况下得自己去查。二十个用户先后到来，提示都以同样的 500 个 token
# 的系统提示开头，后面接各自的 100 个。**12,000 个 token 里，块大小为 16 时要算多少个？
# 如果有人在最开头放了一个时钟，也就是一个每次都不同的 token，又要算多少个？**

# %%
guess = nanopd.predict("01.5", computed=..., with_clock=...)

# %%
def computed_tokens(prompts: list[list[int]]) -> int:  # if they come one after the other
    manager, computed = BlockSpaceManager(num_blocks=4096, block_size=16), 0
    for sequence in map(Sequence, prompts):
        computed += len(sequence) - manager.allocate(sequence)  # allocate returns the cached tokens
        sequence.num_computed = len(sequence)  # as if it had been run
        manager.commit(sequence)  # its full blocks can be found from now on
        manager.free(sequence)
    return computed

system = list(range(500))
own = [[rng.randrange(1000, 9000) for _ in range(100)] for _ in range(20)]
guess.reveal(computed=computed_tokens([system + user for user in own]),
             with_clock=computed_tokens([[10_000 + i] + system + user for i, user in enumerate(own)]))

# %% [markdown] lang="en"
# Only full blocks can be shared: 31 of them, 496 tokens, so every user after the first computes 104. With the clock, all
# 20 x 601. A key or value depends on **all** tokens before it, so a block is worth reusing only if everything in front of
# it is the same too. That is what the chain does: each block's hash takes in the hash of the block before.

# %% [markdown] lang="zh" en_hash="4d00f323"
# 只有写满的块能共享：31 块、496 个 token，所以第一位之后的每位用户都要算 104 个。加上时钟，就是 20 × 601 个，一个也没省下。
# 一个键或值取决于它前面的**所有** token，所以只有前面的内容也全都相同，这个块才能拿来复用。哈希链干的正是这件事：
# 每一块的哈希都把前一块的哈希算了进去。

# %%
start = hash_block(None, [1, 2, 3, 4])
print(f"[5, 6, 7, 8] after [1, 2, 3, 4]: {hash_block(start, [5, 6, 7, 8]):016x}")
print(f"[5, 6, 7, 8] at the beginning:   {hash_block(None, [5, 6, 7, 8]):016x}")

pool = BlockPool(num_blocks=4, block_size=4, hash_fn=lambda *_: 0)  # every hash collides
pool.register(pool.allocate(), None, [1, 2, 3, 4])
print("find [1, 2, 3, 4]:", pool.find(None, [1, 2, 3, 4]), "  find [5, 6, 7, 8]:", pool.find(None, [5, 6, 7, 8]))

# %%
manager = BlockSpaceManager(num_blocks=8, block_size=4)
old = Sequence(range(17))  # 4 full blocks and one token
manager.allocate(old)
old.num_computed = 17
manager.commit(old)
manager.free(old)
print("found before:", manager.cached_prefix(old.token_ids), " free:", manager.num_free_blocks)
manager.allocate(Sequence(range(500, 524)))  # needs 6 blocks: 4 are blank, so 2 are evicted
print("evicted:", [event.block for event in manager.events if event.kind == "evict"])
print("found after: ", manager.cached_prefix(old.token_ids))

# %% [markdown] lang="en"
# Two prompts taken for one because their hashes agree: somebody would go on from somebody else's memory. So the hash only
# says where to look; then the tokens themselves are compared, all the way up the chain. In the pool above every hash is 0,
# and the stranger still gets a miss. The price: the pool remembers the tokens of each cached block.
#
# A cached block that nobody holds is free *and* findable, until somebody needs the place; then the one that has been free
# longest goes. The second cell shows why a prompt lets go of its last block first: a chain is of use only from its
# beginning. Had block 0 been evicted, the other three would have been dead weight until somebody computed it again.
#
# **Exercise 1.5.** Write `longest_cached_prefix`: the blocks of the longest cached run that `token_ids` starts with.
# `pool.find(parent, tokens)` gives a block or None, `pool.prefix_of(block)` the `parent` for the next. One catch: the last
# token must always be left to compute. What would the model sample from otherwise?

# %% [markdown] lang="zh" en_hash="43408931"
# 如果哈希一样就当成同一个提示，就会有人接着别人的记忆往下写。所以哈希只用来指路，找到以后还要逐个比对 token，
# 沿着链一直比到头。上面那个池子里所有哈希都是 0，陌生的提示照样不命中。代价是：池子得记住每个缓存块里的 token。
#
# 没人持有的缓存块既空闲*又*查得到，直到有人要用这块地方；那时，空闲最久的先走。第二个格子说明了提示放手时为什么
# 从最后一块开始：链只有从头开始才有用。要是先驱逐块 0，在有人重新算出它之前，
# 剩下三块都只是白占地方。
#
# **练习 1.5** 实现 `longest_cached_prefix`：返回 `token_ids` 开头最长的那一串已缓存的块。
# `pool.find(parent, tokens)` 返回块号或 None，`pool.prefix_of(block)` 给出查下一块要用的 `parent`。
# 有个坑：最后一个 token 必须留着现算，否则模型拿什么来采样？

# %% nbgrader={"grade_id": "ex-1-5", "solution": true}
def longest_cached_prefix(pool: BlockPool, token_ids: list[int]) -> list[int]:
    """The cached full blocks that `token_ids` starts with, never covering its last token."""
    ### BEGIN SOLUTION
    found, parent, size = [], None, pool.block_size
    for start in range(0, len(token_ids) - size, size):
        block = pool.find(parent, token_ids[start : start + size])
        if block is None:
            break
        found.append(block)
        parent = pool.prefix_of(block)
    return found
    ### END SOLUTION

# %% nbgrader={"grade_id": "check-1-5", "points": 2}
nanopd.check("01.5", longest_cached_prefix)

# %% [markdown] lang="en"
# ## 1.6 Blocks for something that is still on its way
#
# Disaggregated, the decode worker sets blocks aside for a prompt that another GPU is reading, and that GPU writes into
# them from afar. Now the client hangs up. Freeing the blocks at once looks tidy, and the first cell does it. nanoPD gives
# a **lease** instead, with two holders, the request and the writer; its blocks are free only when both have let go.
#
# **A prompt of 100 tokens, blocks of 16. In the tidy version, how many of a newcomer's 6 blocks are being written by that
# other GPU? With a lease, how many blocks are held after the client has hung up, and once the writer has stopped too?**

# %% [markdown] lang="zh" en_hash="e9d19ac2"
# ## 1.6 给还在路上的东西留块
#
# 在分离模式下，解码的那一方要为另一块 GPU 正在读的提示先留好块，由那块 GPU 远程往里写。这时客户端挂断了。
# 立刻释放这些块，看起来很利落，第一个格子就是这么做的。nanoPD 用的则是**租约**：它有两个持有者，请求方和写入方，
# 两边都放手，块才算空闲。
#
# **提示 100 个 token，块大小 16。按那种利落的做法，新来者的 6 个块里，有几个正被另一块 GPU 写着？
# 有租约时，客户端挂断之后还占着几个块？等写入方也停了手，又是几个？**

# %%
guess = nanopd.predict("01.6", overwritten=..., after_hanging_up=..., after_the_last_write=...)

# %%
manager = BlockSpaceManager(num_blocks=8, block_size=16)
travelling, newcomer = Sequence(range(100)), Sequence(range(500, 590))
manager.allocate(travelling)
being_written = manager.block_table(travelling)
manager.free(travelling)  # the client hangs up
manager.allocate(newcomer)
overwritten = set(being_written) & set(manager.block_table(newcomer))
print("the other GPU still writes", being_written, "and the newcomer has", manager.block_table(newcomer))

# %%
manager = BlockSpaceManager(num_blocks=8, block_size=16)
lease = manager.grant_lease(travelling.token_ids)
manager.release_lease(lease, "request")
hung_up = manager.num_used_blocks
print("room for the newcomer:", manager.can_allocate(newcomer))
manager.release_lease(lease, "writer")
guess.reveal(len(overwritten), hung_up, manager.num_used_blocks)
lease = manager.grant_lease(travelling.token_ids)  # and when all goes well
manager.adopt(travelling, lease)
print("copies needed to write, writer still there:", manager.blocks_to_append(travelling))
manager.release_lease(lease, "writer")
print("copies needed to write, writer gone:       ", manager.blocks_to_append(travelling))

# %% [markdown] lang="en"
# Without the lease, the late layers of one conversation land in another. The price of it: room is held back for a
# request that is dead, and a writer that never reports back holds it for ever, so somebody has to let go in its name. And while the writer is still a holder, copy-on-write protects the adopted last
# block as it protects any other that is shared. One rule, no special case. Chapter 05 sends real bytes into these blocks.
#
# ## 1.7 Break it
#
# A careless engine throws the pairs away that `append_slot` returned. We ask the embedded model about a list of codes, four
# answers at once, with `top_k=1`, so that all four should say the same. First Ann's question, on the sound engine. Then
# Ben's on the careless one: another code from the same list. **How many of Ben's four answers are right? And how many
# faults will `check()` find?** (On the CPU, so that everybody sees the same.)

# %% [markdown] lang="zh" en_hash="c7affbfc"
# 没有租约，一段对话迟到的那几层就会写进另一段对话里。代价也得说清楚：请求已经死了，位置还得替它留着；要是写入方从此没了音信，位置就会一直占着，必须有人替它放手。
# 另外，只要写入方还没放手，被接管的最后一块就和任何共享块一样，受写时复制保护。一条规则，没有特例。
# 第 05 章会把真正的字节送进这些块里。
#
# ## 1.7 弄坏它
#
# 一个粗心的引擎把 `append_slot` 返回的那些块对扔掉了。我们拿一张密码表来问内置模型，一次要四个回答，并设 `top_k=1`，
# 所以四个回答理应一模一样。先在正常的引擎上问 Ann 的问题，再在粗心的引擎上问 Ben 的：同一张表里的另一个密码。
# **Ben 的四个回答有几个是对的？`check()` 会查出几处错误？**（在 CPU 上跑，这样人人看到的都一样。）

# %%
guess = nanopd.predict("01.7", right_answers=..., faults=...)

# %%
from nanopd.tiny.tasks import make_recall_dialogue

ann, ben = make_recall_dialogue(random.Random(4), num_pairs=22, num_questions=2, lang="en")
stated = ann.prompt[: ann.prompt.index("What is")]
four = SamplingParams(n=4, temperature=1.0, top_k=1, max_tokens=8)

def engine(block_size: int) -> LLM:
    llm = LLM(device="cpu", block_size=block_size, num_gpu_blocks_override=64, enable_prefix_caching=False)
    llm.engine.runner.cache.data.zero_()  # starts uninitialised: make the lab the same each time
    return llm

def ask(llm: LLM, prompt: str) -> list[str]:
    return [answer.text for answer in llm.generate(prompt, four, use_tqdm=False)[0].outputs]

# %%
llm = engine(block_size=16)
cache, manager = llm.engine.runner.cache, llm.engine.scheduler.manager
print(ann.prompt[len(stated):], "right:", ann.answer, " answers:", ask(llm, ann.prompt))
since = manager.events[-1].step
cache.copy_blocks = lambda pairs: None  # the careless engine
answers = ask(llm, stated + ben.prompt)
print(ben.prompt, "right:", ben.answer, " answers:", answers)
manager.check()
guess.reveal(right_answers=answers.count(ben.answer), faults=0)  # check() has raised nothing

# %% [markdown] lang="en"
# Nothing crashed, the books are in order, and three of four answers are wrong. Find out **which, and why only those**, and
# look closely at their last three digits. Tools: the log of the same engine, and its block map: press *To the end*, then
# *Back* a few times, and look for the copies.

# %% [markdown] lang="zh" en_hash="08b91f36"
# 没有崩溃，账面没有问题，四个回答却错了三个。请查出**错的是哪几个，为什么偏偏是它们**；再仔细看看错误答案的后三位数字。
# 工具就是这个引擎的日志和块图：按“到最后”，再按几次“后退”，找到那几次复制。

# %%
events = [event for event in manager.events if event.step > since]
leader = next(event.seq_id for event in events if event.kind == "allocate")
askers = [leader] + [event.seq_id for event in events if event.kind == "fork"]
copied = {event.seq_id: (event.block, event.other) for event in events if event.kind == "copy"}
earlier = [event for event in manager.events if event.step <= since and event.kind == "copy"]
print("first question's copies:", [(event.block, event.other) for event in earlier])
for index, seq_id in enumerate(askers):
    print(f"answer {index}: {answers[index]}  copy it was owed: {copied.get(seq_id)}")
widgets.BlockMap(manager)

# %% [markdown] lang="en"
# <details><summary>The solution, once you have one of your own</summary>
#
# The first digit of all four is right: it was drawn when the prompt had just been read, before anybody wrote. Then answers
# 0, 1 and 2 were each given a fresh block for the prompt's tail, and nobody filled it. The last to write was alone by
# then, wrote in place, and is right.
#
# The "fresh" blocks weren't empty. Freed blocks keep their bytes, and these, says the log, were the very ones that Ann's
# copies had gone to: the tail of **Ann's** question was still there. So the model, asked by Ben, went on with the digits
# of **Ann's code**. A bookkeeping slip had become a leak between customers. `check()` couldn't know: it proves who *holds*
# which block, not what is *in* it.
# </details>
#
# ### How long could this hide?
#
# The prompt has 188 tokens: we try the same bug with other block sizes. And what would have
# shown it? **Poison**: fill all blocks with NaN first, and whoever reads what nobody wrote can't look plausible any more.

# %% [markdown] lang="zh" en_hash="1284fc7d"
# <details><summary>答案（先自己想一个）</summary>
#
# 四个回答的第一位都对：那一位是在提示刚读完时采样的，谁都还没有写。接着，回答 0、1、2 各拿到一个新块来放提示的尾巴，
# 却没有人往里填。最后一个写的已经是独自持有，就地写入，所以它是对的。
#
# 这些“新”块并不空。块释放之后字节还在；从日志可以看到，Ann 那次的副本恰好就放在这几块里，**Ann** 那个问题的尾巴还留着。
# 于是 Ben 来问，模型接着往下写的却是 **Ann 的密码**。记账上的一个小疏忽，变成了客户之间的数据泄漏。`check()` 无从得知：它证明的是谁*持有*哪个块，
# 而不是块*里面*是什么。
# </details>
#
# ### 能藏多久？
#
# 这个提示有 188 个 token，我们拿同样的错误去试几种块大小。那什么办法能让它现形？**投毒**：
# 先把所有块填成 NaN，谁要是读到没人写过的地方，就再也装不出像样的答案。

# %%
for size in (47, 32, 16, 8, 4):
    careless = engine(size)
    careless.engine.runner.cache.copy_blocks = lambda pairs: None
    right = ask(careless, stated + ben.prompt).count(ben.answer)
    print(f"blocks of {size:>2}: {188 % size:>2} tokens in the unfilled last block, {right} of 4 right")
for kind in ("careless", "sound"):
    cache.poison(range(cache.num_blocks))
    output = llm.generate(stated + ben.prompt, four, use_tqdm=False)[0]
    print(f"{kind} on poison:", output.error or [answer.text for answer in output.outputs])
    vars(cache).pop("copy_blocks", None)  # the class's own method is back

# %% [markdown] lang="en"
# Where the prompt happens to fill its last block there is nothing to copy, and the bug is invisible; a test suite whose
# prompts are all 64 tokens long would never see it. On poison it can't be missed, and nanoPD's tests poison their caches.
#
# Another slip: somebody shares a block and never lets go. No answer is ever wrong; the cache only gets smaller, one block
# at a time, until nothing fits. Here `check()` is the right tool: it names the block, the map says so too (*To the end*), and the log knows
# the culprit, a `share` that belongs to no sequence. **Which block is it?**

# %% [markdown] lang="zh" en_hash="132d4565"
# 提示恰好写满最后一块时，没有东西要复制，错误便无影无踪；如果测试用的提示全是 64 个 token，永远也测不出来。
# 投了毒，它就藏不住了——nanoPD 的测试也给缓存投毒。
#
# 再看另一种疏忽：有人共享了一个块，之后再也没放手。答案一个也不会错；只是缓存一块一块地变小，直到什么都放不下。
# 这回 `check()` 就是对症的工具：它报出是哪一块，块图也会指出来（按“到最后”），日志则记着元凶——一次不属于任何序列的 `share`。
# **是哪一块？**

# %%
leaky = BlockSpaceManager(num_blocks=48, block_size=4)
forgotten = rng.randrange(20)
for turn in range(20):
    sequence = Sequence([rng.randrange(100) for _ in range(rng.randrange(9, 60))])
    leaky.allocate(sequence)
    if turn == forgotten:
        leaky.pool.share(rng.choice(leaky.block_table(sequence)))  # and no release, ever
    leaky.free(sequence)
try:
    leaky.check()
except InvariantError as error:
    print(f"{error}\n{leaky.num_free_blocks} of {leaky.num_blocks} free, though nobody is being served")

# %%
print(*[event for event in leaky.events if event.kind == "share"])
widgets.BlockMap(leaky)

# %% [markdown] lang="en"
# ## What you have now
#
# - Paging wastes half a block a sequence instead of most of a reservation, unless everything grows to the limit (1.1, 1.2).
# - Reference counts say who holds a block, and `check()` proves them (1.3). Sharing is free, writing copies (1.4).
# - Equal prefixes are found by chained hashes, and believed only token by token (1.5).
# - Blocks in flight have two holders (1.6). Right books don't make right bytes (1.7).
#
# In the code: `nanopd/block_manager/pool.py` has the counts, hashes and eviction, `manager.py` tables, copy-on-write and
# leases, `cache.py` the tensors. `docs_en/01_block_manager.md` goes through them one by one. The ideas come from
# *Efficient Memory Management for Large Language Model Serving with PagedAttention* (Kwon et al., SOSP 2023: vLLM), and
# *SGLang: Efficient Execution of Structured Language Model Programs* (Zheng et al., 2024: RadixAttention, which keeps
# prefixes in a tree instead of a table of hashes).
#
# Next is 02, the engine: who gets these blocks when there aren't enough for everybody.

# %% [markdown] lang="zh" en_hash="4ba4bc50"
# ## 你现在有了什么
#
# - 分页把浪费从大半个预留区降到每条序列半个块——除非人人都长到上限（1.1、1.2）。
# - 引用计数说明谁持有块，`check()` 能把它验证一遍（1.3）。共享不花钱，写入才复制（1.4）。
# - 相同的前缀靠哈希链找到，但要逐个 token 核对过才算数（1.5）。
# - 还在路上的块有两个持有者（1.6）。账对了，不等于字节对了（1.7）。
#
# 代码在哪里：计数、哈希和驱逐在 `nanopd/block_manager/pool.py`，块表、写时复制和租约在 `manager.py`，张量在 `cache.py`；
# `docs_zh/01_block_manager.md` 有逐一讲解。思想出自 *Efficient Memory Management for Large Language Model Serving with
# PagedAttention*（Kwon 等，SOSP 2023，即 vLLM）和 *SGLang: Efficient Execution of Structured Language Model Programs*
# （Zheng 等，2024，其中的 RadixAttention 用一棵树而不是哈希表来存前缀）。
#
# 下一章是 02，引擎：块不够分的时候，该给谁。
