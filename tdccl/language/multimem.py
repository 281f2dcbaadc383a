"""multimem: one access that the switch turns into an access to the memory of all ranks (NVLink SHARP).

A table of base addresses (`team.heap`, `Symmetric.bases`) ends with the multicast address of the memory, behind those
of the ranks. What is read and written here are *quads*: 16 bytes, at a multiple of 16 in the memory, as a row of words:
four int32, or two int64 for types of 8 bytes (see `packets`).

MULTIMEM says how an access reaches all ranks: "switch" by one multimem instruction through the multicast address (in
emulation a Python function expands such an address to all peers), "unicast" by loads from and stores to every rank, on
any GPUs, which proves addressing and waits of a kernel where there is no multicast.

To the memory model the multicast address is an alias: an access through the switch and an ordinary one to the same
memory, one of which writes, are ordered only by what has a proxy fence on its way. The start and the end of a kernel
have; within one call `multimem_fence` before the signal between the two, and `multimem_barrier` has it inside.

The switch adds in an order of its own, and rounds its sum to the element type: sums of floats need not have the bits of
`fold`. "unicast" and emulation add in rank order, 16-bit floats in fp32.
"""

import triton
import triton.language as tl

from tdccl.language.packets import fold_words, lane_of, lane_word, load_words, store_words
from tdccl.language.reduce import settle, widen
from tdccl.language.signals import fence, local_at, look, may_go_on, record_fault
from tdccl.language.target import device
from tdccl.language.team import BARRIER, DEAD, MAX_RANKS, STATE_BYTES, block_of
from tdccl.language.tiles import slot_offset, span_start

QUAD = tl.constexpr(16)

# Of a block's state (see `team`): a byte a rank counts its arrivals at barriers, and what they were after the last one.
_ARRIVED, _PASSED = tl.constexpr(16), tl.constexpr(32)


@triton.constexpr_function
def word_of(dtype):
    """Type of the words of quads that hold elements of `dtype`."""
    return tl.int64 if dtype.primitive_bitwidth == 64 else tl.int32


@triton.constexpr_function
def words_a_quad(dtype):
    """How many words of elements of `dtype` make 16 bytes."""
    return 128 // word_of(dtype).primitive_bitwidth


@triton.jit
def quads_in(count, DTYPE: tl.constexpr):
    """Number of quads that `count` elements make; the last may be partly filled."""
    PER_QUAD: tl.constexpr = 128 // DTYPE.primitive_bitwidth
    return (count + PER_QUAD - 1) // PER_QUAD


@triton.jit
def words_of(quads, DTYPE: tl.constexpr):
    """Numbers ([n, words a quad]) of the words of the quads of these numbers ([n])."""
    WORDS: tl.constexpr = words_a_quad(DTYPE)
    return quads[:, None] * WORDS + tl.arange(0, WORDS)[None, :]


@triton.jit
def _quads_at(base, offset, WORD: tl.constexpr):
    """Pointers ([n, words a quad]) to the words of the quads `offset` ([n]) bytes behind the address `base`."""
    WORDS: tl.constexpr = 128 // WORD.primitive_bitwidth
    pointers = tl.multiple_of((base + offset).to(tl.pointer_type(WORD)), 16)
    return pointers[:, None] + tl.arange(0, WORDS)[None, :]


@triton.constexpr_function
def _typed(op, dtype):
    """(operation and type as multimem instructions spell them, whether one takes a whole quad)."""
    name, wide = dtype.name, dtype.primitive_bitwidth == 64
    vectors = {"fp32": "f32", "fp16": "f16x2", "bf16": "bf16x2", "fp8e4nv": "e4m3x4", "fp8e5": "e5m2x4"}
    if op in ("and", "or", "xor"):
        return f"{op}.{'b64' if wide else 'b32'}", False
    if op == "sum":
        op = "add"
        scalars = {"fp64": "f64", "int64": "u64", "int32": "u32"}
    else:
        scalars = {"int64": "s64", "int32": "s32"}
        vectors.pop("fp32")
    if op in ("add", "min", "max") and name in vectors:
        return f"{op}.v4.{vectors[name]}", True
    assert op in ("add", "min", "max") and name in scalars, f"multimem cannot reduce {name} by {op}"
    return f"{op}.{scalars[name]}", False


@triton.constexpr_function
def _ld_reduce_text(op, dtype):
    """Loads a quad, reduced over all ranks, into the outputs; zeros where the last operand is 0.

    It branches around the instruction: some versions of ptxas drop a predicate on those that write.
    """
    form, whole = _typed(op, dtype)
    if whole and op == "sum" and dtype.name != "fp32":
        form = form.replace("add.", "add.acc::f16." if dtype.is_fp8() else "add.acc::f32.")
    words = words_a_quad(dtype)
    load = f"multimem.ld_reduce.relaxed.sys.global.{form} "
    if whole:
        loads = load + f"{{{', '.join(f'${i}' for i in range(words))}}}, [${words}];"
    else:
        loads = "\n".join(f"{load} ${i}, [${words}+{i * QUAD.value // words}];" for i in range(words))
    zeros = "\n".join(f"mov.b{128 // words} ${i}, 0;" for i in range(words))
    return f"""{{
        .reg .pred skip;
        setp.eq.s32 skip, ${words + 1}, 0;
        {zeros}
        @skip bra PAST_${{:uid}};
        {loads}
        PAST_${{:uid}}:
    }}"""


_ST_TEXT = tl.constexpr("""{
    .reg .pred skip;
    setp.eq.s32 skip, $6, 0;
    mov.b32 $0, 0;
    @skip bra PAST_${:uid};
    multimem.st.relaxed.sys.global.v4.f32 [$1], {$2, $3, $4, $5};
    PAST_${:uid}:
}""")


@triton.constexpr_function
def _red_text(op, dtype):
    """Thread t of T reduces quads t, t + T, ... of $3 quads at address $2 into those at the multicast address $1.

    On scalars a piece of assembly runs once on each thread, on tensors as often as a layout holds an element: hence
    the loop in here.
    """
    form, whole = _typed(op, dtype)
    bits, words = word_of(dtype).primitive_bitwidth, words_a_quad(dtype)
    values = [f"value{i}" for i in range(words)]
    red = f"multimem.red.relaxed.sys.global.{form}"
    if whole:
        reds = f"{red} [to], {{{', '.join(values)}}};"
    else:
        reds = "\n".join(f"{red} [to+{i * QUAD.value // words}], {value};" for i, value in enumerate(values))
    return f"""{{
        .reg .pred done;
        .reg .b32 quad, threads;
        .reg .b64 offset, from, to;
        .reg .b{bits} {", ".join(values)};
        mov.b32 $0, 0;
        mov.u32 quad, %tid.x;
        mov.u32 threads, %ntid.x;
        NEXT_${{:uid}}:
        setp.ge.s32 done, quad, $3;
        @done bra DONE_${{:uid}};
        mul.wide.s32 offset, quad, {QUAD.value};
        add.s64 from, $2, offset;
        add.s64 to, $1, offset;
        ld.global.v{words}.b{bits} {{{", ".join(values)}}}, [from];
        {reds}
        add.s32 quad, quad, threads;
        bra NEXT_${{:uid}};
        DONE_${{:uid}}:
    }}"""


def _by_one_thread(instructions: str) -> str:
    return f"""{{
    .reg .pred skip;
    .reg .b32 thread;
    mov.u32 thread, %tid.x;
    setp.ne.s32 skip, thread, 0;
    mov.b32 $0, 0;
    @skip bra PAST_${{:uid}};
    {instructions}
    PAST_${{:uid}}:
}}"""


_FENCE_TEXT = tl.constexpr(_by_one_thread("fence.proxy.alias;"))
# The first fence is for what the block did before, the second for the count, which is waited for by ordinary reads.
_COUNT_TEXT = tl.constexpr(
    _by_one_thread("fence.proxy.alias; multimem.red.release.sys.global.add.u64 [$1], $2; fence.proxy.alias;")
)


def _peers_behind(base) -> tuple:
    """Every rank's address, as a Triton scalar, of the memory with this emulated multicast address."""
    from tdccl.transport import host

    return tuple(base * 0 + peer for peer in host.behind_multicast(int(base.handle.data.reshape(-1)[0])))


def _emulated_ld_reduce(base, offset, mask, OP, DTYPE):
    word = word_of(DTYPE)
    values = tuple(_load_quads(peer, offset, mask, word) for peer in _peers_behind(base))
    return fold_words(values, OP, DTYPE)


def _emulated_st(base, offset, words, mask):
    for peer in _peers_behind(base):
        _store_quads(peer, offset, words, mask)


def _emulated_red(base, offset, source, quads, OP, DTYPE):
    for peer in _peers_behind(base):
        _reduce_into(peer + offset, source, quads, OP, DTYPE)


def _emulated_count(base, offset, value):
    for peer in _peers_behind(base):
        tl.atomic_add((peer + offset).to(tl.pointer_type(tl.int64)), value, sem="release", scope="sys")


def _emulated_fence():
    """One process sees its stores in order, by whichever address."""


@device(_emulated_ld_reduce)
def _switch_ld_reduce(base, offset, mask, OP: tl.constexpr, DTYPE: tl.constexpr):
    TEXT: tl.constexpr = _ld_reduce_text(OP, DTYPE)
    address, wanted = base + offset, mask.to(tl.int32)
    if DTYPE.primitive_bitwidth == 64:
        low, high = tl.inline_asm_elementwise(
            TEXT, "=&l,=&l,l,r", [address, wanted], dtype=(tl.int64, tl.int64), is_pure=False, pack=1
        )
        return tl.join(low, high)
    else:
        a, b, c, d = tl.inline_asm_elementwise(
            TEXT, "=&r,=&r,=&r,=&r,l,r", [address, wanted],
            dtype=(tl.int32, tl.int32, tl.int32, tl.int32), is_pure=False, pack=1,
        )  # fmt: skip
        return tl.join(tl.join(a, c), tl.join(b, d)).reshape([mask.shape[0], 4])


@device(_emulated_st)
def _switch_st(base, offset, words, mask):
    if words.dtype == tl.int64:
        low, high = tl.split(words)
        a, b, c, d = low.to(tl.int32), (low >> 32).to(tl.int32), high.to(tl.int32), (high >> 32).to(tl.int32)
    else:
        even, odd = tl.split(words.reshape([mask.shape[0], 2, 2]))
        a, c = tl.split(even)
        b, d = tl.split(odd)
    operands = [base + offset, a, b, c, d, mask.to(tl.int32)]
    tl.inline_asm_elementwise(_ST_TEXT, "=r,l,r,r,r,r,r", operands, dtype=tl.int32, is_pure=False, pack=1)


@device(_emulated_red)
def _switch_red(base, offset, source, quads, OP: tl.constexpr, DTYPE: tl.constexpr):
    TEXT: tl.constexpr = _red_text(OP, DTYPE)
    number = (tl.full([], 0, tl.int64) + quads).to(tl.int32)  # quads may be a constant, when there is 1
    tl.inline_asm_elementwise(TEXT, "=r,l,l,r", [base + offset, source, number], dtype=tl.int32, is_pure=False, pack=1)


@device(_emulated_count)
def _switch_count(base, offset, value):
    tl.inline_asm_elementwise(_COUNT_TEXT, "=r,l,l", [base + offset, value], dtype=tl.int32, is_pure=False, pack=1)


@device(_emulated_fence)
def _switch_fence():
    tl.inline_asm_elementwise(_FENCE_TEXT, "=r", [], dtype=tl.int32, is_pure=False, pack=1)


@triton.jit
def _load_quads(base, offset, mask, WORD: tl.constexpr):
    return tl.load(_quads_at(base, offset, WORD), mask=mask[:, None], other=0)


@triton.jit
def _store_quads(base, offset, words, mask):
    tl.store(_quads_at(base, offset, words.dtype), words, mask=mask[:, None])


@triton.jit
def _reduce_into(target, source, quads, OP: tl.constexpr, DTYPE: tl.constexpr):
    """Reduces quads from one address into those at another, whoever else does so at the same time.

    Word by word: what a scalar compare-and-swap finds is the same for all threads of a block, and done once.
    """
    WORD: tl.constexpr = word_of(DTYPE)
    words = tl.full([], 0, tl.int64) + quads * words_a_quad(DTYPE)
    for index in range(words):
        pointer = target.to(tl.pointer_type(WORD)) + index
        value = tl.load(source.to(tl.pointer_type(WORD)) + index)
        seen = look(pointer)
        found = tl.atomic_cas(pointer, seen, fold_words((seen, value), OP, DTYPE), sem="relaxed", scope="sys")
        while found != seen:
            seen = found
            found = tl.atomic_cas(pointer, seen, fold_words((seen, value), OP, DTYPE), sem="relaxed", scope="sys")


@triton.jit
def _averaged(words, SIZE: tl.constexpr, DTYPE: tl.constexpr):
    """Sums of SIZE ranks' elements, divided as in `settle`."""
    LANES: tl.constexpr = 1 if DTYPE.primitive_bitwidth >= 32 else 32 // DTYPE.primitive_bitwidth
    result = tl.zeros(words.shape, words.dtype)
    for lane in tl.static_range(LANES):
        average = settle(widen(lane_of(words, lane, DTYPE), DTYPE), "avg", SIZE, DTYPE)
        result |= lane_word(average, lane, DTYPE)
    return result


@triton.jit
def multimem_fence(MULTIMEM: tl.constexpr):
    """Orders this block's earlier accesses, through the switch and ordinary ones, before accesses of the other kind to
    the same memory behind the signal that it sends next.

    Ordering: block barrier, then a proxy fence of one thread; the block barrier of the signal (`signal_all`,
    `signal_peers`, `fence`) takes it to the threads that send it.
    """
    fence()
    if MULTIMEM == "switch":
        _switch_fence()


@triton.jit
def multimem_ld_reduce(
    team, bases, offset, mask, OP: tl.constexpr, DTYPE: tl.constexpr, MULTIMEM: tl.constexpr
):  # fmt: skip
    """Quads at byte `offset` (int64 [n]) of the memory with the table `bases`, reduced over all ranks, zeros where not
    `mask`: [n, words].

    OP, DTYPE: sum and avg of fp64, fp32, fp16, bf16, int64, int32; min and max of fp16, bf16 (by the switch's rule for
    NaN), int64, int32; and, or, xor of any integers. For sm_100 also sum, min and max of fp8e4nv and fp8e5. One
    instruction takes a whole quad of 32-bit floats and smaller ones, else it is one a word.
    Ordering: relaxed at sys scope; wait first until all ranks have released what they wrote, in this kernel behind a
    `multimem_fence`.
    """
    ADDED: tl.constexpr = "sum" if OP == "avg" else OP
    if MULTIMEM == "switch":
        words = _switch_ld_reduce(tl.load(bases + team.size), offset, mask, ADDED, DTYPE)
    else:
        tl.static_assert(MULTIMEM == "unicast", "MULTIMEM is switch or unicast")
        WORD: tl.constexpr = word_of(DTYPE)
        values = ()
        for source in tl.static_range(team.size):
            values = values + (_load_quads(tl.load(bases + source), offset, mask, WORD),)
        words = fold_words(values, ADDED, DTYPE)
    if OP == "avg":
        words = _averaged(words, team.size, DTYPE)
    return words


@triton.jit
def multimem_st(team, bases, offset, words, mask, MULTIMEM: tl.constexpr):
    """Stores quads ([n, words]) at byte `offset` (int64 [n]) of every rank's memory with the table `bases`, this one's
    too, where `mask`.

    Ordering: relaxed at sys scope; signal the peers afterwards (`signal_all` covers it as any store), behind a
    `multimem_fence` where they read it in this kernel.
    """
    if MULTIMEM == "switch":
        _switch_st(tl.load(bases + team.size), offset, words, mask)
    else:
        tl.static_assert(MULTIMEM == "unicast", "MULTIMEM is switch or unicast")
        for distance in tl.static_range(1, team.size + 1):
            _store_quads(tl.load(bases + (team.rank + distance) % team.size), offset, words, mask)


@triton.jit
def multimem_red(
    team, bases, offset, source, quads, OP: tl.constexpr, DTYPE: tl.constexpr, MULTIMEM: tl.constexpr
):  # fmt: skip
    """Reduces `quads` quads of this rank at the address `source` (int64) into those at byte `offset` of every rank's
    memory with the table `bases`; each exactly once, however many threads a block has.

    OP, DTYPE: as `multimem_ld_reduce`, without avg and fp8; each step rounds to the element type.
    Ordering: a block barrier, then relaxed at sys scope; signal the peers afterwards, as for `multimem_st`.
    """
    fence()
    if MULTIMEM == "switch":
        _switch_red(tl.load(bases + team.size), offset, source, quads, OP, DTYPE)
    else:
        tl.static_assert(MULTIMEM == "unicast", "MULTIMEM is switch or unicast")
        for distance in tl.static_range(1, team.size + 1):
            target = tl.load(bases + (team.rank + distance) % team.size) + offset
            _reduce_into(target, source, quads, OP, DTYPE)


@triton.jit
def _count_arrival(team, offset, value, MULTIMEM: tl.constexpr):
    """Adds `value` to the int64 at byte `offset` of all ranks' heaps. Ordering: block barrier, release at sys scope,
    which covers accesses through the switch and ordinary ones to the same memory (see `multimem_fence`)."""
    fence()
    if MULTIMEM == "switch":
        _switch_count(tl.load(team.heap + team.size), offset, value)
    else:
        tl.static_assert(MULTIMEM == "unicast", "MULTIMEM is switch or unicast")
        ranks = tl.arange(0, MAX_RANKS)
        addresses = tl.load(team.heap + ranks, mask=ranks < team.size, other=0) + offset
        values = tl.zeros([MAX_RANKS], tl.int64) + value
        pointers = addresses.to(tl.pointer_type(tl.int64))
        tl.atomic_add(pointers, values, mask=ranks < team.size, sem="release", scope="sys")


@triton.jit
def _not_here(team, arrivals):
    """The highest rank whose byte in `arrivals` is 0, or -1."""
    ranks = tl.arange(0, MAX_RANKS)
    counts = (arrivals >> (ranks * 8)) & 0xFF
    return tl.max(tl.where((ranks < team.size) & (counts == 0), ranks, -1))


@triton.constexpr_function
def _one_of_each(size):
    """What a barrier adds to a word: 1 in the byte of each of `size` ranks."""
    return sum(1 << 8 * rank for rank in range(size))


@triton.jit
def multimem_barrier(team, epoch, MULTIMEM: tl.constexpr):
    """`barrier_block` by one `multimem.red`: each rank adds 1 to its own byte of a word that every rank has.

    Bytes never carry over before they are looked at: as a difference to what they were after the last barrier they are
    0, 1, or 2 where a rank has come to the next one. Returns the epoch to go on with, as `wait_peers`.
    Ordering: what any of these blocks did before the barrier is visible to all of them after it.
    """
    start = (block_of(team) * STATE_BYTES).to(tl.int64)
    arrived = local_at(team, start + _ARRIVED, tl.int64)
    passed = local_at(team, start + _PASSED, tl.int64)
    bits = tl.full([], 8, tl.int64) * team.rank
    _count_arrival(team, start + _ARRIVED, tl.full([], 1, tl.int64) << bits, MULTIMEM)
    before = tl.load(passed)  # behind a block barrier: one thread stored it in the barrier before
    arrivals = tl.atomic_add(arrived, 0, sem="acquire", scope="sys") - before
    late = _not_here(team, arrivals)
    go = tl.full([], 1, tl.int1)
    polls = 0
    started = tl.full([], 0, tl.int64)
    while (late >= 0) & go:
        polls += 1
        go, started = may_go_on(team, polls, started)
        if go:  # who comes after the deadline was late
            arrivals = tl.atomic_add(arrived, 0, sem="acquire", scope="sys") - before
            late = _not_here(team, arrivals)
    if not go:
        record_fault(team, late, BARRIER, epoch, before, before + arrivals)
    tl.debug_barrier()
    tl.store(passed, before + _one_of_each(team.size))
    return tl.where(go, epoch, epoch - DEAD)


@triton.jit
def stage(
    team, epoch, source, ring, step, quads, count,
    DTYPE: tl.constexpr, TILE: tl.constexpr, TILES: tl.constexpr, DEPTH: tl.constexpr, WHOLE: tl.constexpr,
    WIDE: tl.constexpr,
):  # fmt: skip
    """Copies the span of this step of the `count` elements at `source` (`quads` quads; see `load_words`) into a slot of
    this rank's own ring, where multimem reaches it. TILE is in quads. Ordering: none; signal it."""
    span: tl.constexpr = TILE * TILES
    slot = slot_offset(team, epoch, ring, step, span * 16, DEPTH, WHOLE)
    for tile in range(TILES):
        inside = tile * TILE + tl.arange(0, TILE)
        index = span_start(step, span) + inside
        words = load_words(source, words_of(index, DTYPE), count, DTYPE, WIDE)
        _store_quads(team.local.to(tl.int64), slot + inside * 16, words, index < quads)


@triton.jit
def unstage(
    team, epoch, target, ring, step, count,
    DTYPE: tl.constexpr, TILE: tl.constexpr, TILES: tl.constexpr, DEPTH: tl.constexpr, WHOLE: tl.constexpr,
    WIDE: tl.constexpr,
):  # fmt: skip
    """Copies a slot of this rank's own ring to where it belongs among the `count` elements at `target`: the inverse of
    `stage`. Ordering: plain loads; wait for whoever wrote the slot."""
    span: tl.constexpr = TILE * TILES
    slot = slot_offset(team, epoch, ring, step, span * 16, DEPTH, WHOLE)
    for tile in range(TILES):
        inside = tile * TILE + tl.arange(0, TILE)
        index = span_start(step, span) + inside
        words = _load_quads(team.local.to(tl.int64), slot + inside * 16, index < quads_in(count, DTYPE), word_of(DTYPE))
        store_words(target, words_of(index, DTYPE), words, count, DTYPE, WIDE)
