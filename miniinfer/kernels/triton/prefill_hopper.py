"""Prefill attention on Hopper, over pages of 64 tokens: FlashAttention-3's schedule [Shah et al. 2024] in Gluon.

Owns the kernel; attention_launch.py owns the launch and says which shapes come here (others go to prefill.py). A warp takes tiles of
queries off a counter and copies them, and their keys and values block by block, to shared memory through the tensor memory accelerator.
Two groups of four warps attend 64 rows each: they start the scores of a block before they weigh the values of the one before it, so that
softmax runs under matrix products. Blocks lie at absolute positions and every row is computed alone, so a token's result depends neither
on the batch nor on where chunks of its prompt were cut.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, warpgroup_mma, warpgroup_mma_wait

from miniinfer.kernels.triton.gluon_names import box_load, reinterpret

PAGE_SIZE = gl.constexpr(64)
BLOCK_N = gl.constexpr(128)  # keys of a block
STAGES = gl.constexpr(2)  # blocks of keys, and of values, in shared memory
WIDTH = gl.constexpr(64)  # numbers in a row of a copied box: 128 bytes, the swizzle's width
MATRIX = gl.constexpr(gl.NVMMASharedLayout(128, 16, 2))
BARRIER = gl.constexpr(mbarrier.MBarrierLayout())


@gluon.jit
def find_tile(work, query_start, lengths, num_seqs, tiles, heads, TILE: gl.constexpr, SKIP_SINGLE: gl.constexpr):
    """(sequence, kv head, the sequence's first token, its count, its length, the tile's first query, blocks of keys or 0 if nothing to do).

    Tiles are numbered as in prefill_kernel and taken from the end, since the last of a causal sequence are the longest."""
    head = work % heads
    index = tiles - 1 - work // heads
    seq = 0
    end = num_seqs
    while end - seq > 1:  # the last sequence that begins at or before this tile
        middle = (seq + end) // 2
        before = gl.load(query_start + middle) // TILE + middle <= index
        seq = gl.where(before, middle, seq)
        end = gl.where(before, end, middle)
    begin = gl.load(query_start + seq)
    count = gl.load(query_start + seq + 1) - begin
    length = gl.load(lengths + seq)
    first = (index - begin // TILE - seq) * TILE
    live = first < count
    if SKIP_SINGLE:
        live = live & (count > 1)
    hi = gl.minimum(length, length - count + first + TILE)  # past the last key that any query of the tile sees
    blocks = gl.where(live, gl.maximum(1, gl.cdiv(hi, BLOCK_N)), 0)
    return seq, head, begin, count, length, first, blocks


@gluon.jit
def copy_block(desc, boxes, ready, empty, at, row0, row1, DIM: gl.constexpr):
    """Starts the copy of two pages' rows of one head, once the block that lay there before has been used."""
    HALVES: gl.constexpr = DIM // WIDTH
    stage = at % STAGES
    mbarrier.wait(empty.index(stage), ((at // STAGES) & 1) ^ 1)
    mbarrier.expect(ready.index(stage), BLOCK_N * DIM * 2)
    for half in gl.static_range(HALVES):
        box = (stage * HALVES + half) * 2
        box_load(desc, [row0, half * WIDTH], ready.index(stage), boxes.index(box))
        box_load(desc, [row1, half * WIDTH], ready.index(stage), boxes.index(box + 1))


@gluon.jit
def copy_tiles(
    q_desc, k_desc, v_desc, q_boxes, k_boxes, v_boxes, notes, tile_ready, tile_empty, k_ready, k_empty, v_ready, v_empty,
    tickets, page_table, rows, query_start, lengths, num_seqs, tiles, heads, table_stride,
    GROUP: gl.constexpr, DIM: gl.constexpr, TILE: gl.constexpr, SKIP_SINGLE: gl.constexpr, COPY_Q: gl.constexpr,
):  # fmt: skip
    """The copying warp. It writes down each tile for the other warps, a tile ahead of them; one of no blocks is the end."""
    HALVES: gl.constexpr = DIM // WIDTH
    scalar: gl.constexpr = gl.BlockedLayout([1], [32], [1], [0])
    at = 0  # blocks so far
    tile = 0
    work = gl.program_id(0)
    while work < tiles * heads:
        seq, head, begin, count, length, first, blocks = find_tile(work, query_start, lengths, num_seqs, tiles, heads, TILE, SKIP_SINGLE)
        if blocks > 0:
            slot = tile & 1
            mbarrier.wait(tile_empty.index(slot), ((tile >> 1) & 1) ^ 1)
            notes.index(slot * 8).store(gl.full([1], begin, gl.int32, scalar))
            notes.index(slot * 8 + 1).store(gl.full([1], count, gl.int32, scalar))
            notes.index(slot * 8 + 2).store(gl.full([1], length, gl.int32, scalar))
            notes.index(slot * 8 + 3).store(gl.full([1], first, gl.int32, scalar))
            notes.index(slot * 8 + 4).store(gl.full([1], head, gl.int32, scalar))
            notes.index(slot * 8 + 5).store(gl.full([1], blocks, gl.int32, scalar))
            if COPY_Q:
                mbarrier.expect(tile_ready.index(slot), 2 * 64 * DIM * 2)
                for part in gl.static_range(2 * HALVES):
                    box_load(
                        q_desc, [begin + first + part // HALVES * (TILE // 2), head * GROUP, part % HALVES * WIDTH],
                        tile_ready.index(slot), q_boxes.index(slot * 2 * HALVES + part),
                    )  # fmt: skip
            mbarrier.arrive(tile_ready.index(slot), count=1)
            tile += 1
            table = page_table + gl.load(rows + seq).to(gl.int64) * table_stride
            for j in range(blocks):
                page0 = gl.load(table + j * 2, mask=j * BLOCK_N < length, other=0)
                page1 = gl.load(table + j * 2 + 1, mask=j * BLOCK_N + PAGE_SIZE < length, other=0)
                row0 = (page0 * heads + head) * PAGE_SIZE
                row1 = (page1 * heads + head) * PAGE_SIZE
                copy_block(k_desc, k_boxes, k_ready, k_empty, at, row0, row1, DIM)
                copy_block(v_desc, v_boxes, v_ready, v_empty, at, row0, row1, DIM)
                at += 1
        work = gl.num_programs(0) + gl.atomic_add(tickets, 1)
    slot = tile & 1
    mbarrier.wait(tile_empty.index(slot), ((tile >> 1) & 1) ^ 1)
    notes.index(slot * 8 + 5).store(gl.full([1], 0, gl.int32, scalar))
    mbarrier.arrive(tile_ready.index(slot), count=2 if COPY_Q else 1)
    if gl.atomic_add(tickets + 1, 1) == gl.num_programs(0) - 1:  # the last program leaves the counters as it found them
        gl.store(tickets, 0)
        gl.store(tickets + 1, 0)


@gluon.jit
def exp2(x):
    return gl.inline_asm_elementwise("ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=gl.float32, is_pure=True, pack=1)


@gluon.jit
def attend_block(
    queries, k_smem, v_smem, k_ready, k_empty, v_ready, v_empty, at, start, position, acc, probs, top, total, qk_scale,
    MASKED: gl.constexpr, scores_layout: gl.constexpr, acc_layout: gl.constexpr, probs_layout: gl.constexpr,
):  # fmt: skip
    """Scores of block `at`, whose first key is `start`, while the values of the block before are weighed by `probs`."""
    stage = at % STAGES
    before = (at - 1) % STAGES
    zero = gl.zeros([64, BLOCK_N], gl.float32, scores_layout)
    mbarrier.wait(k_ready.index(stage), (at // STAGES) & 1)
    scores = warpgroup_mma(queries, k_smem.index(stage).permute((1, 0)), zero, use_acc=False, is_async=True)
    mbarrier.wait(v_ready.index(before), ((at - 1) // STAGES) & 1)
    acc = warpgroup_mma(probs, v_smem.index(before), acc, is_async=True)
    scores = warpgroup_mma_wait(1, deps=[scores])
    mbarrier.arrive(k_empty.index(stage), count=1)
    if MASKED:
        keys = start + gl.arange(0, BLOCK_N, gl.SliceLayout(0, scores_layout))
        scores = gl.where(keys[None, :] <= position[:, None], scores, float("-inf"))
    new_top = gl.maximum(top, gl.max(scores, 1) * qk_scale)
    weights = exp2(scores * qk_scale - new_top[:, None])
    decay = exp2(top - new_top)
    total = total * decay + gl.sum(weights, 1)
    acc, probs = warpgroup_mma_wait(0, deps=[acc, probs])
    mbarrier.arrive(v_empty.index(before), count=1)
    acc = acc * gl.convert_layout(decay, gl.SliceLayout(1, acc_layout))[:, None]
    probs = gl.convert_layout(weights.to(queries.dtype), probs_layout)
    return acc, probs, new_top, total


@gluon.jit
def attend(
    q, out, q_smem, k_smem, v_smem, notes, tile_ready, tile_empty, k_ready, k_empty, v_ready, v_empty, heads, qk_scale, q_stride,
    PART: gl.constexpr, GROUP: gl.constexpr, DIM: gl.constexpr, TILE: gl.constexpr, COPY_Q: gl.constexpr,
):  # fmt: skip
    """Four warps: half PART of every tile's queries, each with all GROUP heads of the kv head."""
    HALF: gl.constexpr = TILE // 2
    scores_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    acc_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, DIM, 16])
    probs_layout: gl.constexpr = gl.DotOperandLayout(0, acc_layout, 2)
    rows_layout: gl.constexpr = gl.BlockedLayout([1, 8], [256 // DIM, DIM // 8], [4, 1], [1, 0])
    scalar: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    offs_m = gl.arange(0, 64, gl.SliceLayout(1, rows_layout))
    offs_d = gl.arange(0, DIM, gl.SliceLayout(0, rows_layout))
    query = PART * HALF + offs_m // GROUP
    query_of_scores = PART * HALF + gl.arange(0, 64, gl.SliceLayout(1, scores_layout)) // GROUP

    at = 0
    tile = 0
    more = True
    while more:
        slot = tile & 1
        mbarrier.wait(tile_ready.index(slot), (tile >> 1) & 1)
        begin = gl.max(notes.index(slot * 8).load(scalar), 0)
        count = gl.max(notes.index(slot * 8 + 1).load(scalar), 0)
        length = gl.max(notes.index(slot * 8 + 2).load(scalar), 0)
        first = gl.max(notes.index(slot * 8 + 3).load(scalar), 0)
        head = gl.max(notes.index(slot * 8 + 4).load(scalar), 0)
        blocks = gl.max(notes.index(slot * 8 + 5).load(scalar), 0)
        more = blocks > 0
        if more:
            queries = q_smem.index(slot * 2 + PART)
            valid = ((offs_m < HALF * GROUP) & (first + query < count))[:, None]
            row = (begin + first + query).to(gl.int64)[:, None]
            column = (head * GROUP + offs_m % GROUP)[:, None] * DIM + offs_d[None, :]
            if not COPY_Q:
                queries.store(gl.load(q + row * q_stride + column, mask=valid, other=0.0))
                fence_async_shared()
            context = length - count + first  # tokens before the tile's first query
            position = context + query_of_scores

            # The first block has no values before it to weigh.
            stage = at % STAGES
            zero = gl.zeros([64, BLOCK_N], gl.float32, scores_layout)
            mbarrier.wait(k_ready.index(stage), (at // STAGES) & 1)
            scores = warpgroup_mma(queries, k_smem.index(stage).permute((1, 0)), zero, use_acc=False, is_async=True)
            scores = warpgroup_mma_wait(0, deps=[scores])
            mbarrier.arrive(k_empty.index(stage), count=1)
            keys = gl.arange(0, BLOCK_N, gl.SliceLayout(0, scores_layout))
            scores = gl.where(keys[None, :] <= position[:, None], scores, float("-inf"))
            top = gl.max(scores, 1) * qk_scale
            top = gl.where(top == float("-inf"), 0.0, top)  # only in a sequence of length 0
            weights = exp2(scores * qk_scale - top[:, None])
            total = gl.sum(weights, 1)
            probs = gl.convert_layout(weights.to(queries.dtype), probs_layout)
            acc = gl.zeros([64, DIM], gl.float32, acc_layout)
            at += 1

            whole = (context + PART * HALF + 1) // BLOCK_N  # blocks before it are seen whole by every query
            masked_from = gl.minimum(gl.maximum(whole, 1), blocks)
            for j in range(1, masked_from):
                acc, probs, top, total = attend_block(
                    queries, k_smem, v_smem, k_ready, k_empty, v_ready, v_empty, at, j * BLOCK_N, position,
                    acc, probs, top, total, qk_scale, False, scores_layout, acc_layout, probs_layout,
                )  # fmt: skip
                at += 1
            for j in range(masked_from, blocks):
                acc, probs, top, total = attend_block(
                    queries, k_smem, v_smem, k_ready, k_empty, v_ready, v_empty, at, j * BLOCK_N, position,
                    acc, probs, top, total, qk_scale, True, scores_layout, acc_layout, probs_layout,
                )  # fmt: skip
                at += 1

            last = (at - 1) % STAGES
            values = v_smem.index(last)
            mbarrier.wait(v_ready.index(last), ((at - 1) // STAGES) & 1)
            left = length - (blocks - 1) * BLOCK_N
            if left < BLOCK_N:
                # Values past the end may be anything, and a probability of 0 does not silence a NaN. Both groups clear them; the rows
                # before the end are written back as they were, which the other group may be reading.
                inside = gl.arange(0, BLOCK_N, gl.SliceLayout(1, rows_layout)) < left
                values.store(gl.where(inside[:, None], values.load(rows_layout), 0.0).to(queries.dtype))
                fence_async_shared()
            acc = warpgroup_mma(probs, values, acc, is_async=True)
            acc, probs = warpgroup_mma_wait(0, deps=[acc, probs])
            mbarrier.arrive(v_empty.index(last), count=1)

            total = gl.convert_layout(total, gl.SliceLayout(1, acc_layout))
            acc = acc * (1.0 / gl.where(total == 0.0, 1.0, total))[:, None]
            queries.store(acc.to(queries.dtype))  # by way of shared memory, so that rows are written whole
            gl.store(out + row * (heads * GROUP * DIM) + column, queries.load(rows_layout), mask=valid)
            fence_async_shared()
            mbarrier.arrive(tile_empty.index(slot), count=1)
            tile += 1


@gluon.jit(do_not_specialize=["num_seqs", "num_tokens", "tiles", "table_stride"])
def prefill_hopper_kernel(
    q, q_desc, k_desc, v_desc, out, tickets, page_table, rows, query_start, lengths, num_seqs, num_tokens, tiles, heads, qk_scale,
    q_stride, table_stride,
    GROUP: gl.constexpr, DIM: gl.constexpr, SKIP_SINGLE: gl.constexpr, COPY_Q: gl.constexpr,
):  # fmt: skip
    """Persistent programs of 4 warps, of `tiles` * `heads` tiles to do in all.

    q_desc: the queries in boxes [64 // GROUP, GROUP, WIDTH], if COPY_Q; k_desc, v_desc: the cache as [pages * heads * PAGE_SIZE, DIM] in
    boxes [PAGE_SIZE, WIDTH]. tickets: two zeros, and zeros again at the end. A tile has 2 * (64 // GROUP) queries."""
    TILE: gl.constexpr = 64 // GROUP * 2
    dtype: gl.constexpr = q.dtype.element_ty
    q_smem = gl.allocate_shared_memory(dtype, [4, 64, DIM], MATRIX)
    k_smem = gl.allocate_shared_memory(dtype, [STAGES, BLOCK_N, DIM], MATRIX)
    v_smem = gl.allocate_shared_memory(dtype, [STAGES, BLOCK_N, DIM], MATRIX)
    # A swizzled matrix is its column blocks of WIDTH, one after the other, each of them rows of 128 bytes: the boxes as they arrive.
    BOXES: gl.constexpr = STAGES * 2 * (DIM // WIDTH)
    k_boxes = reinterpret(k_smem, dtype, [BOXES, PAGE_SIZE, WIDTH], MATRIX)
    v_boxes = reinterpret(v_smem, dtype, [BOXES, PAGE_SIZE, WIDTH], MATRIX)
    if COPY_Q:
        q_boxes = reinterpret(q_smem, dtype, [4 * (DIM // WIDTH), 64 // GROUP, GROUP, WIDTH], gl.NVMMASharedLayout(128, 16, 3))
    else:
        q_boxes = q_smem
    notes = gl.allocate_shared_memory(gl.int32, [16, 1], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    k_ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    k_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    v_ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    v_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    tile_ready = gl.allocate_shared_memory(gl.int64, [2, 1], BARRIER)
    tile_empty = gl.allocate_shared_memory(gl.int64, [2, 1], BARRIER)
    for i in gl.static_range(STAGES):
        mbarrier.init(k_ready.index(i), count=1)
        mbarrier.init(k_empty.index(i), count=2)
        mbarrier.init(v_ready.index(i), count=1)
        mbarrier.init(v_empty.index(i), count=2)
    for i in gl.static_range(2):
        mbarrier.init(tile_ready.index(i), count=2 if COPY_Q else 1)
        mbarrier.init(tile_empty.index(i), count=2)
    fence_async_shared()

    clear_layout: gl.constexpr = gl.BlockedLayout([8], [32], [4], [0])
    offs = gl.arange(0, 1024, clear_layout)
    size = heads * (GROUP * DIM)
    for token in range(gl.load(query_start + num_seqs) + gl.program_id(0), num_tokens, gl.num_programs(0)):  # of no sequence
        for start in range(0, size, 1024):
            gl.store(out + gl.cast(token, gl.int64) * size + start + offs, gl.zeros([1024], dtype, clear_layout), mask=start + offs < size)

    gl.warp_specialize(
        [
            (attend, (q, out, q_smem, k_smem, v_smem, notes, tile_ready, tile_empty, k_ready, k_empty, v_ready, v_empty, heads, qk_scale,
                      q_stride, 0, GROUP, DIM, TILE, COPY_Q)),
            (attend, (q, out, q_smem, k_smem, v_smem, notes, tile_ready, tile_empty, k_ready, k_empty, v_ready, v_empty, heads, qk_scale,
                      q_stride, 1, GROUP, DIM, TILE, COPY_Q)),
            (copy_tiles, (q_desc, k_desc, v_desc, q_boxes, k_boxes, v_boxes, notes, tile_ready, tile_empty, k_ready, k_empty, v_ready,
                          v_empty, tickets, page_table, rows, query_start, lengths, num_seqs, tiles, heads, table_stride,
                          GROUP, DIM, TILE, SKIP_SINGLE, COPY_Q)),
        ],
        [4, 1],
        [240, 24],  # registers a thread; the first gets what is left of 168 * 12 warps: 240
    )  # fmt: skip
