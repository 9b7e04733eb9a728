"""Decode attention on Hopper, over pages of 64 tokens: persistent programs that read keys and values at the memory's rate, however long.

Owns the kernel; attention_launch.py owns the launch and says which shapes come here (others go to decode.py). A sequence's keys are cut into
chunks as its own length says, and its result is the chunks' results folded one after the other; so it depends neither on the batch nor on
which program computes what. A program takes a sequence's head whole, or one chunk of it where whole ones would not share the work out evenly.

Three kinds of warps: one copies pages through a ring in shared memory, always ahead and across sequences; four attend; two fold the chunks of
a sequence that was split, in the program that finishes its last one.

Where all sequences have one new token (ROPE), the attending warps do rope.py's work as well: they norm and rotate their own queries, and those
with a sequence's last chunk the new key, which they write to the cache and, with the value, over the stale row of the page in shared memory. So
no page has to wait for the kernel before.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import mma_v2
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from miniinfer.kernels.triton.gluon_names import box_load, reinterpret, thread_barrier
from miniinfer.kernels.triton.rope import inverse_rms, normed, rotated

PAGE_SIZE = gl.constexpr(64)
WIDTH = gl.constexpr(64)  # numbers in a row of a copied box: 128 bytes, the swizzle's width
NOTES = gl.constexpr(4)  # notes from the copying warp that may wait to be done with
FIELDS = gl.constexpr(6)  # of a note: sequence or -1 for the end, kv head, first chunk, end of the chunks, token, length


@gluon.jit
def exp2(x):
    return gl.inline_asm_elementwise("ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=gl.float32, is_pure=True, pack=1)


@gluon.jit
def plus(a, b):
    return a + b


@gluon.jit
def cut(length, WINDOW: gl.constexpr, CHUNK: gl.constexpr, LIMIT: gl.constexpr):
    """(first visible page, visible pages, chunks) of a sequence: chunk i has the visible pages from i * pages // chunks on."""
    first = length * 0
    if WINDOW > 0:
        first = gl.maximum(length - WINDOW, 0) // PAGE_SIZE
    pages = gl.maximum(gl.cdiv(length, PAGE_SIZE), first) - first
    return first, pages, gl.maximum(gl.minimum(gl.cdiv(pages, CHUNK), LIMIT), 1)


@gluon.jit
def fold(acc, top, total, chunk_acc, chunk_top, chunk_total):
    """One more chunk into (weighted sum, maximum, total). Written out to the rounding, so that it is the same in registers and from memory."""
    new_top = gl.maximum(top, chunk_top)
    safe = gl.where(new_top == float("-inf"), 0.0, new_top)
    decay = exp2(top - safe)
    weight = exp2(chunk_top - safe)
    total = gl.fma(chunk_total, weight, total * decay)
    acc = gl.fma(chunk_acc, gl.expand_dims(weight, 1), acc * gl.expand_dims(decay, 1))
    return acc, new_top, total


@gluon.jit
def write_note(notes, note_ready, note_empty, tile, seq, head, chunk, chunk_end, token, length):
    scalar: gl.constexpr = gl.BlockedLayout([1], [32], [1], [0])
    note = tile % NOTES
    mbarrier.wait(note_empty.index(note), ((tile // NOTES) & 1) ^ 1)
    notes.index(note * FIELDS).store(gl.full([1], seq, gl.int32, scalar))
    notes.index(note * FIELDS + 1).store(gl.full([1], head, gl.int32, scalar))
    notes.index(note * FIELDS + 2).store(gl.full([1], chunk, gl.int32, scalar))
    notes.index(note * FIELDS + 3).store(gl.full([1], chunk_end, gl.int32, scalar))
    notes.index(note * FIELDS + 4).store(gl.full([1], token, gl.int32, scalar))
    notes.index(note * FIELDS + 5).store(gl.full([1], length, gl.int32, scalar))
    mbarrier.arrive(note_ready.index(note), count=1)


@gluon.jit
def read_note(notes, note):
    scalar: gl.constexpr = gl.BlockedLayout([1], [32], [gl.num_warps()], [0])
    seq = gl.max(notes.index(note * FIELDS).load(scalar), 0)
    head = gl.max(notes.index(note * FIELDS + 1).load(scalar), 0)
    chunk = gl.max(notes.index(note * FIELDS + 2).load(scalar), 0)
    chunk_end = gl.max(notes.index(note * FIELDS + 3).load(scalar), 0)
    token = gl.max(notes.index(note * FIELDS + 4).load(scalar), 0)
    length = gl.max(notes.index(note * FIELDS + 5).load(scalar), 0)
    return seq, head, chunk, chunk_end, token, length


@gluon.jit
def load_sequences(rows, query_start, lengths, seqs, num_seqs):
    """(length, first token, whether it has one new token, row in the page table)"""
    inside = seqs < num_seqs
    token = gl.load(query_start + seqs, mask=inside, other=0)
    single = gl.load(query_start + seqs + 1, mask=inside, other=0) - token == 1
    return gl.load(lengths + seqs, mask=inside, other=0), token, single, gl.load(rows + seqs, mask=inside, other=0)


@gluon.jit
def copy_page(desc, boxes, ready, empty, at, row, DIM: gl.constexpr, STAGES: gl.constexpr):
    """Starts the copy of one head's rows of a page, once what lay there before has been used."""
    slot = at % STAGES
    mbarrier.wait(empty.index(slot), ((at // STAGES) & 1) ^ 1)
    mbarrier.expect(ready.index(slot), PAGE_SIZE * DIM * 2)
    for half in gl.static_range(DIM // WIDTH):
        box_load(desc, [row, half * WIDTH], ready.index(slot), boxes.index(slot * (DIM // WIDTH) + half))


@gluon.jit
def copy_pages(
    k_desc, v_desc, boxes, notes, note_ready, note_empty, ready, empty, counters, page_table, rows, query_start, lengths, num_seqs, heads,
    table_stride, DIM: gl.constexpr, WINDOW: gl.constexpr, CHUNK: gl.constexpr, LIMIT: gl.constexpr, STAGES: gl.constexpr, BLOCK: gl.constexpr,
    ROPE: gl.constexpr,
):  # fmt: skip
    """The copying warp. Its items are the heads of whole sequences, and the chunks of heads of split ones, numbered through; programs draw
    them from a counter, except for the first. Sequences in large chunks come first, and the last ones are split, which evens out the end."""
    lanes: gl.constexpr = gl.BlockedLayout([BLOCK // 32], [32], [1], [0])
    length, token, single, row = load_sequences(rows, query_start, lengths, gl.arange(0, BLOCK, lanes), num_seqs)
    _, pages, _ = cut(length, WINDOW, CHUNK, LIMIT)
    pages = gl.where(single, pages, 0)
    total = gl.sum(pages, 0)  # pages of all sequences, and the most of one
    most = gl.max(pages, 0)
    for first in range(BLOCK, num_seqs, BLOCK):
        next_length, _, next_single, _ = load_sequences(rows, query_start, lengths, first + gl.arange(0, BLOCK, lanes), num_seqs)
        _, pages, _ = cut(next_length, WINDOW, CHUNK, LIMIT)
        pages = gl.where(next_single, pages, 0)
        total += gl.sum(pages, 0)
        most = gl.maximum(most, gl.max(pages, 0))

    at = 0  # pages of keys, and of values, so far
    tile = 0  # items so far
    item = gl.program_id(0)
    before = 0  # items, and pages, of the sequences before these
    pages_before = 0
    for later in range(gl.where(most > CHUNK * LIMIT, 0, 1), 2):
        for first in range(0, num_seqs, BLOCK):
            seqs = first + gl.arange(0, BLOCK, lanes)
            if num_seqs > BLOCK:
                length, token, single, row = load_sequences(rows, query_start, lengths, seqs, num_seqs)
            _, pages, chunks = cut(length, WINDOW, CHUNK, LIMIT)
            now = single & ((pages <= CHUNK * LIMIT) == (later == 1))
            pages = gl.where(now, pages, 0)
            pages_after = total - pages_before - gl.associative_scan(pages, 0, plus)
            # Whole, if what comes after can still fill a quarter of the time that it takes on every program.
            whole = (chunks == 1) | (pages_after * heads * 4 >= pages * gl.num_programs(0))
            items = gl.where(now, gl.where(whole, 1, chunks) * heads, 0)
            ends = before + gl.associative_scan(items, 0, plus)
            begins = ends - items
            before = gl.max(ends, 0)
            pages_before += gl.sum(pages, 0)
            while item < before:
                mine = (item >= begins) & (item < ends)
                index = item - gl.sum(gl.where(mine, begins, 0), 0)
                head = index % heads
                chunk = index // heads
                size = gl.sum(gl.where(mine, length, 0), 0)
                first_page, visible, count = cut(size, WINDOW, CHUNK, LIMIT)
                chunk_end = chunk + 1
                if gl.max(gl.where(mine & whole, 1, 0), 0) > 0:
                    chunk_end = count
                page_at = first_page + chunk * visible // count
                page_end = first_page + chunk_end * visible // count
                table = page_table + gl.sum(gl.where(mine, row, 0), 0).to(gl.int64) * table_stride
                page = gl.load(table + page_at, mask=page_at < page_end, other=0)
                seq = gl.sum(gl.where(mine, seqs, 0), 0)
                first_token = gl.sum(gl.where(mine, token, 0), 0)
                write_note(notes, note_ready, note_empty, tile, seq, head, chunk, chunk_end, first_token, size)
                tile += 1
                while page_at < page_end:
                    page_at += 1
                    if not ROPE and page_at == first_page + visible:
                        gdc_wait()  # which writes the last token's key and value
                    page_row = (page * heads + head) * PAGE_SIZE
                    page = gl.load(table + page_at, mask=page_at < page_end, other=0)
                    copy_page(k_desc, boxes, ready, empty, at, page_row, DIM, STAGES)
                    copy_page(v_desc, boxes, ready, empty, at + 1, page_row, DIM, STAGES)
                    at += 2
                gdc_wait()  # which may still use the counter
                item = gl.num_programs(0) + gl.atomic_add(counters, 1, sem="relaxed")
    write_note(notes, note_ready, note_empty, tile, -1, 0, 0, 0, 0, 0)
    gdc_wait()
    if gl.atomic_add(counters + 1, 1) == gl.num_programs(0) - 1:  # the last program leaves the counters as it found them
        gl.store(counters, 0)
        gl.store(counters + 1, 0)


@gluon.jit
def load_halves(source, mask, HALF: gl.constexpr):
    return gl.load(source, mask=mask, other=0.0), gl.load(source + HALF, mask=mask, other=0.0)


@gluon.jit
def rope_heads(a, b, weight_a, weight_b, cos, sin, eps, NORM: gl.constexpr):
    """Heads, as halves [n, DIM // 2], normed and rotated; the weights' halves and the angles [1, DIM // 2]. To the bit as rope.py does it."""
    dtype: gl.constexpr = a.dtype
    a = a.to(gl.float32)
    b = b.to(gl.float32)
    if NORM:
        scale = inverse_rms(a, b, eps, a.shape[1])
        scale = gl.expand_dims(gl.convert_layout(scale, gl.SliceLayout(1, a.type.layout)), 1)
        a = normed(a, scale, weight_a, dtype)
        b = normed(b, scale, weight_b, dtype)
    a, b = rotated(a, b, cos, sin)
    return a.to(dtype), b.to(dtype)


@gluon.jit
def patch(lines, slot, line, fresh, which: gl.constexpr, layout: gl.constexpr, DIM: gl.constexpr):
    """Writes a line of a page in shared memory, for all attending warps to read: two halves of `fresh`, in the order in which they lie there."""
    if DIM == WIDTH:
        first = (slot * PAGE_SIZE + line) * 2
        second = first + 1
    else:  # a column block for each
        first = slot * (2 * PAGE_SIZE) + line
        second = first + PAGE_SIZE
    lines.index(first).store(fresh.index(which).load(layout))
    lines.index(second).store(fresh.index(which + 1).load(layout))
    fence_async_shared()  # the next page comes to this place through the other proxy
    thread_barrier()


@gluon.jit
def attend(
    q, out, partial, tops, totals, smem, lines, heads_smem, fresh, notes, note_ready, done, ready, empty, query_start, rope, num_seqs, num_tokens,
    heads, slots, qk_scale, q_stride,
    GROUP: gl.constexpr, DIM: gl.constexpr, WINDOW: gl.constexpr, CHUNK: gl.constexpr, LIMIT: gl.constexpr, STAGES: gl.constexpr,
    ROPE: gl.constexpr, NORM: gl.constexpr,
):  # fmt: skip
    """The attending warps: an item's chunks one after the other, each from nothing, folded in registers."""
    ROWS: gl.constexpr = 16  # of which GROUP count: the least that a tensor-core product takes
    WARPS: gl.constexpr = gl.num_warps()
    mma: gl.constexpr = gl.NVMMADistributedLayout([2, 0], [1, WARPS], [16, 8])
    left: gl.constexpr = gl.DotOperandLayout(0, mma, 2)
    right: gl.constexpr = gl.DotOperandLayout(1, mma, 2)
    by_row: gl.constexpr = gl.SliceLayout(1, mma)
    copy: gl.constexpr = gl.BlockedLayout([1, 8], [256 // DIM, DIM // 8], [WARPS, 1], [1, 0])
    flat: gl.constexpr = gl.BlockedLayout([8], [32], [WARPS], [0])
    dtype: gl.constexpr = q.dtype.element_ty
    copy_m = gl.arange(0, ROWS, gl.SliceLayout(1, copy))
    copy_d = gl.arange(0, DIM, gl.SliceLayout(0, copy))
    offs_m = gl.arange(0, ROWS, by_row)
    offs_d = gl.arange(0, DIM, gl.SliceLayout(0, mma))
    offs_n = gl.arange(0, PAGE_SIZE, gl.SliceLayout(0, mma))
    offs_v = gl.arange(0, PAGE_SIZE, gl.SliceLayout(1, right))
    # Pairs of numbers that rotate together, DIM // 2 apart, lie in one thread; a single head is in every warp.
    HALF: gl.constexpr = DIM // 2
    QUERIES: gl.constexpr = 8 if GROUP <= 8 else ROWS  # a swizzled matrix has its rows in eights
    pairs: gl.constexpr = gl.BlockedLayout([1, 2], [64 // HALF, HALF // 2], [WARPS, 1], [1, 0])
    pair_m = gl.arange(0, QUERIES, gl.SliceLayout(1, pairs))
    pair_d = gl.arange(0, HALF, gl.SliceLayout(0, pairs))
    if ROPE:
        heads_smem.store(gl.zeros([ROWS, DIM], dtype, copy))

    gdc_wait()
    gdc_launch_dependents()
    offs = gl.arange(0, 1024, flat)
    row_size = heads * (GROUP * DIM)
    for token in range(gl.load(query_start + num_seqs) + gl.program_id(0), num_tokens, gl.num_programs(0)):  # of no sequence
        for start in range(0, row_size, 1024):
            zero = gl.zeros([1024], dtype, flat)
            gl.store(out + gl.cast(token, gl.int64) * row_size + start + offs, zero, mask=start + offs < row_size)

    at = 0
    tile = 0
    more = True
    while more:
        note = tile % NOTES
        mbarrier.wait(note_ready.index(note), (tile // NOTES) & 1)
        seq, head, chunk, chunk_end, token, length = read_note(notes, note)
        tile += 1
        more = seq >= 0
        if more:
            own = (gl.cast(token, gl.int64) * heads + head) * (GROUP * DIM)
            first_page, visible, count = cut(length, WINDOW, CHUNK, LIMIT)
            source = q + (gl.cast(token, gl.int64) * q_stride + head * GROUP) * DIM
            if ROPE:
                cos_sin, q_weight, k_weight, eps, token_slots, k_cache, v_cache = rope
                last = (chunk_end == count) & (visible > 0)  # of the sequence's chunks, with its new key
                line = (length - 1) % PAGE_SIZE
                # In the order in which the line lies in the swizzled page: its groups of 8 numbers change places.
                columns = gl.expand_dims(((pair_d // 8) ^ (line & (HALF // 8 - 1))) * 8 + pair_d % 8, 0)
                angle = cos_sin + gl.cast(gl.maximum(length - 1, 0), gl.int64) * DIM
                # All loads come before the first use of one: their latencies are one.
                source += gl.expand_dims(pair_m, 1) * DIM + gl.expand_dims(pair_d, 0)
                a, b = load_halves(source, gl.expand_dims(pair_m < GROUP, 1), HALF)
                cos, sin = load_halves(angle + gl.expand_dims(pair_d, 0), True, HALF)
                new = q + (gl.cast(token, gl.int64) * q_stride + heads * GROUP + head) * DIM + columns
                key_a, key_b = load_halves(new, last, HALF)
                value_a, value_b = load_halves(new + heads * DIM, last, HALF)
                key_cos, key_sin = load_halves(angle + columns, last, HALF)
                place = gl.load(token_slots + token)
                weight_a, weight_b, key_weight_a, key_weight_b = a, b, a, b
                if NORM:
                    weight_a, weight_b = load_halves(q_weight + gl.expand_dims(pair_d, 0), True, HALF)
                    key_weight_a, key_weight_b = load_halves(k_weight + columns, last, HALF)
                a, b = rope_heads(a, b, weight_a, weight_b, cos, sin, eps, NORM)
                heads_smem.slice(0, QUERIES).store(gl.join(a, b).permute((0, 2, 1)).reshape([QUERIES, DIM]))
                queries = heads_smem.load(left)
                if last:
                    key_a, key_b = rope_heads(key_a, key_b, key_weight_a, key_weight_b, key_cos, key_sin, eps, NORM)
                    target = (gl.cast(place // PAGE_SIZE, gl.int64) * heads + head) * (PAGE_SIZE * DIM) + place % PAGE_SIZE * DIM + columns
                    gl.store(k_cache + target, key_a)
                    gl.store(k_cache + target + HALF, key_b)
                    gl.store(v_cache + target, value_a)
                    gl.store(v_cache + target + HALF, value_b)
                    swap = (line // 4) % 2 if DIM == WIDTH else 0  # of halves
                    fresh.index(swap).store(key_a)
                    fresh.index(1 - swap).store(key_b)
                    fresh.index(2 + swap).store(value_a)
                    fresh.index(3 - swap).store(value_b)
            else:
                queries = gl.load(source + copy_m[:, None] * DIM + copy_d[None, :], mask=(copy_m < GROUP)[:, None], other=0.0)
                queries = gl.convert_layout(queries, left)
            lo = 0
            if WINDOW > 0:
                lo = gl.maximum(length - WINDOW, 0)
            page_at = first_page + chunk * visible // count
            acc = gl.zeros([ROWS, DIM], gl.float32, mma)
            top = gl.full([ROWS], float("-inf"), gl.float32, by_row)
            total = gl.zeros([ROWS], gl.float32, by_row)
            for c in range(chunk, chunk_end):
                page_end = first_page + (c + 1) * visible // count
                chunk_acc = gl.zeros([ROWS, DIM], gl.float32, mma)
                chunk_top = gl.full([ROWS], float("-inf"), gl.float32, by_row)
                sums = gl.zeros([ROWS, PAGE_SIZE], gl.float32, mma)  # a total for each column, added up at the end
                while page_at < page_end:
                    start = page_at * PAGE_SIZE
                    slot = at % STAGES
                    mbarrier.wait(ready.index(slot), (at // STAGES) & 1)
                    if ROPE and page_at == first_page + visible - 1:
                        patch(lines, slot, line, fresh, 0, pairs, DIM)
                    keys = smem.index(slot).permute((1, 0)).load(right)
                    scores = mma_v2(queries, keys, gl.zeros([ROWS, PAGE_SIZE], gl.float32, mma))
                    thread_barrier()
                    mbarrier.arrive(empty.index(slot), count=1)
                    at += 1
                    seen_whole = start + PAGE_SIZE <= length
                    if WINDOW > 0:
                        seen_whole = seen_whole & (start >= lo)
                    if not seen_whole:
                        scores = gl.where(((start + offs_n >= lo) & (start + offs_n < length))[None, :], scores, float("-inf"))
                    new_top = gl.maximum(chunk_top, gl.max(scores, 1) * qk_scale)  # a visible page has a visible key: never -inf
                    probs = exp2(gl.fma(scores, qk_scale, -new_top[:, None]))  # written out: with ROPE and without, to the bit the same
                    decay = exp2(chunk_top - new_top)
                    sums = gl.fma(sums, gl.expand_dims(decay, 1), probs)
                    chunk_acc = chunk_acc * decay[:, None]
                    chunk_top = new_top
                    probs = gl.convert_layout(probs.to(dtype), left)
                    slot = at % STAGES
                    mbarrier.wait(ready.index(slot), (at // STAGES) & 1)
                    if ROPE and page_at == first_page + visible - 1:
                        patch(lines, slot, line, fresh, 2, pairs, DIM)
                    values = smem.index(slot).load(right)
                    if not seen_whole:  # what lies there may be anything, and a probability of 0 does not silence a NaN
                        values = gl.where(((start + offs_v >= lo) & (start + offs_v < length))[:, None], values, 0.0).to(dtype)
                    chunk_acc = mma_v2(probs, values, chunk_acc)
                    thread_barrier()
                    mbarrier.arrive(empty.index(slot), count=1)
                    at += 1
                    page_at += 1
                acc, top, total = fold(acc, top, total, chunk_acc, chunk_top, gl.sum(sums, 1))
            if chunk_end - chunk == count:
                result = (acc / gl.where(total == 0.0, 1.0, total)[:, None]).to(dtype)  # 0 only for a sequence of length 0
                gl.store(out + own + offs_m[:, None] * DIM + offs_d[None, :], result, mask=(offs_m < GROUP)[:, None])
            else:
                row = ((gl.cast(seq, gl.int64) * heads + head) * slots + chunk) * GROUP + offs_m
                gl.store(partial + row[:, None] * DIM + offs_d[None, :], acc, mask=(offs_m < GROUP)[:, None])
                gl.store(tops + row, top, mask=offs_m < GROUP)
                gl.store(totals + row, total, mask=offs_m < GROUP)
            thread_barrier()  # all that was written, before it counts
            mbarrier.arrive(done.index(note), count=1)


@gluon.jit
def finish(
    out, partial, tops, totals, notes, note_ready, note_empty, done, counters, heads, slots,
    GROUP: gl.constexpr, DIM: gl.constexpr, WINDOW: gl.constexpr, CHUNK: gl.constexpr, LIMIT: gl.constexpr,
):  # fmt: skip
    """The finishing warps count the chunks of split sequences, and fold those of a head once the last is there."""
    ROWS: gl.constexpr = 2 if GROUP <= 2 else 4 if GROUP <= 4 else 8 if GROUP <= 8 else 16
    BATCH: gl.constexpr = 8 if ROWS <= 4 else 4 if ROWS == 8 else 1  # chunks under way at a time: what the registers hold
    layout: gl.constexpr = gl.BlockedLayout([1, 4], [128 // DIM, DIM // 4], [gl.num_warps(), 1], [1, 0])
    by_row: gl.constexpr = gl.SliceLayout(1, layout)
    group = gl.arange(0, ROWS, by_row)
    dims = gl.arange(0, DIM, gl.SliceLayout(0, layout))
    tile = 0
    more = True
    while more:
        note = tile % NOTES
        phase = (tile // NOTES) & 1
        mbarrier.wait(note_ready.index(note), phase)
        seq, head, chunk, chunk_end, token, length = read_note(notes, note)
        more = seq >= 0
        if more:
            mbarrier.wait(done.index(note), phase)
            mbarrier.arrive(note_empty.index(note), count=1)
            _, _, count = cut(length, WINDOW, CHUNK, LIMIT)
            pair = gl.cast(seq, gl.int64) * heads + head
            last = False
            if chunk_end - chunk < count:
                last = gl.atomic_add(counters + 2 + pair, 1, sem="acq_rel") == count - 1
            if last:
                acc = gl.zeros([ROWS, DIM], gl.float32, layout)
                top = gl.full([ROWS], float("-inf"), gl.float32, by_row)
                total = gl.zeros([ROWS], gl.float32, by_row)
                for start in range(0, count, BATCH):
                    for i in gl.static_range(BATCH):
                        row = (pair * slots + start + i) * GROUP + group
                        valid = (group < GROUP) & (start + i < count)
                        chunk_top = gl.load(tops + row, mask=valid, other=float("-inf"), cache_modifier=".cg")
                        chunk_total = gl.load(totals + row, mask=valid, other=0.0, cache_modifier=".cg")
                        chunk_acc = gl.load(partial + row[:, None] * DIM + dims[None, :], mask=valid[:, None], other=0.0, cache_modifier=".cg")
                        acc, top, total = fold(acc, top, total, chunk_acc, chunk_top, chunk_total)
                target = out + (gl.cast(token, gl.int64) * heads + head) * (GROUP * DIM)
                result = (acc / gl.where(total == 0.0, 1.0, total)[:, None]).to(out.dtype.element_ty)
                gl.store(target + group[:, None] * DIM + dims[None, :], result, mask=(group < GROUP)[:, None])
                gl.store(counters + 2 + pair, 0)
            tile += 1


@gluon.jit(
    do_not_specialize=["num_seqs", "num_tokens", "heads", "slots", "q_stride", "table_stride"],
    do_not_specialize_on_alignment=["tops", "totals", "page_table", "rows", "query_start", "lengths", "q_weight", "k_weight", "token_slots"],
)
def decode_hopper_kernel(
    q, k_desc, v_desc, out, partial, tops, totals, counters, page_table, rows, query_start, lengths,
    cos_sin, q_weight, k_weight, eps, token_slots, k_cache, v_cache, num_seqs, num_tokens, heads, slots, qk_scale, q_stride, table_stride,
    GROUP: gl.constexpr, DIM: gl.constexpr, WINDOW: gl.constexpr, CHUNK: gl.constexpr, LIMIT: gl.constexpr, STAGES: gl.constexpr, BLOCK: gl.constexpr,
    ROPE: gl.constexpr, NORM: gl.constexpr,
):  # fmt: skip
    """Persistent programs of 4 warps and their helpers. Sequences whose number of queries is not 1 are left alone.

    Begins to read before the kernel ahead of it is complete. That one may be at work on q and, without ROPE, on each sequence's last key and
    value; page_table, rows, query_start, lengths and all other keys and values must be complete when it starts, which pdl.py's rule makes of the
    work of all kernels before it. rope_qkv_cache breaks that rule: behind it they must not be the work of the kernel before it, either.
    ROPE: q is the first heads of qkv, not yet normed (NORM) and rotated, with heads for the new keys and values behind them. They become those
    of position length - 1, in slot token_slots[token] of the caches; what lies there is never used.
    k_desc, v_desc: the caches as [pages * heads * PAGE_SIZE, DIM] in boxes [PAGE_SIZE, WIDTH]. q_stride: from token to token, in heads.
    BLOCK: how many sequences are looked at in one go.
    Scratch, fp32: partial [B, heads, slots, GROUP, DIM], tops and totals [B, heads, slots, GROUP], with slots for a sequence's chunks.
    counters: 2 + B * heads zeros, and zeros again at the end."""
    matrix: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    barrier: gl.constexpr = mbarrier.MBarrierLayout()
    dtype: gl.constexpr = q.dtype.element_ty
    smem = gl.allocate_shared_memory(dtype, [STAGES, PAGE_SIZE, DIM], matrix)
    # A swizzled matrix is its column blocks of WIDTH, one after the other, each of them rows of 128 bytes: the boxes as they arrive.
    boxes = reinterpret(smem, dtype, [STAGES * (DIM // WIDTH), PAGE_SIZE, WIDTH], matrix)
    lines = reinterpret(smem, dtype, [STAGES * PAGE_SIZE * 2, 1, DIM // 2], gl.SwizzledSharedLayout(1, 1, 1, [1, 0]))
    heads_smem = gl.allocate_shared_memory(dtype, [16, DIM], gl.SwizzledSharedLayout(8, 1, 8, [1, 0]))
    fresh = gl.allocate_shared_memory(dtype, [4, 1, DIM // 2], gl.SwizzledSharedLayout(1, 1, 1, [1, 0]))
    notes = gl.allocate_shared_memory(gl.int32, [NOTES * FIELDS, 1], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], barrier)
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], barrier)
    note_ready = gl.allocate_shared_memory(gl.int64, [NOTES, 1], barrier)
    note_empty = gl.allocate_shared_memory(gl.int64, [NOTES, 1], barrier)
    done = gl.allocate_shared_memory(gl.int64, [NOTES, 1], barrier)
    for i in gl.static_range(STAGES):
        mbarrier.init(ready.index(i), count=1)
        mbarrier.init(empty.index(i), count=1)
    for i in gl.static_range(NOTES):
        mbarrier.init(note_ready.index(i), count=1)
        mbarrier.init(note_empty.index(i), count=1)
        mbarrier.init(done.index(i), count=1)
    fence_async_shared()
    rope = (cos_sin, q_weight, k_weight, eps, token_slots, k_cache, v_cache)
    gl.warp_specialize(
        [
            (attend, (q, out, partial, tops, totals, smem, lines, heads_smem, fresh, notes, note_ready, done, ready, empty, query_start, rope,
                      num_seqs, num_tokens, heads, slots, qk_scale, q_stride, GROUP, DIM, WINDOW, CHUNK, LIMIT, STAGES, ROPE, NORM)),
            (copy_pages, (k_desc, v_desc, boxes, notes, note_ready, note_empty, ready, empty, counters, page_table, rows, query_start,
                          lengths, num_seqs, heads, table_stride, DIM, WINDOW, CHUNK, LIMIT, STAGES, BLOCK, ROPE)),
            (finish, (out, partial, tops, totals, notes, note_ready, note_empty, done, counters, heads, slots,
                      GROUP, DIM, WINDOW, CHUNK, LIMIT)),
        ],
        [1, 2],
        [80, 80],  # registers a thread; the first gets what is left of 128 * 8 warps: 176
    )  # fmt: skip
