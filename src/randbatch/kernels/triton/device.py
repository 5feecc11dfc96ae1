"""The device code of the Triton backend; the one file that imports triton.

Every program works for one head of one random batch. It looks the tokens of the batch up in `order` and gathers their
rows where they stand, and scatters its results there: nothing is permuted in memory. Neighbouring programs are
neighbouring heads, so that they share the rows' cache lines. No program adds to what another wrote: there are no
atomics, and the same input gives the same bits.

`shift` is added to the logit of a token with itself. Rows that a tile has too many are loaded as zero and never stored.
In bf16 and fp16 logits are in units of log 2, since the hardware has exp2. In float32 they are not: log₂e · lse would
be rounded at the size of the lse, an error of all weights of a row.

Letters of tiles: M query rows, N key rows, D dimensions of query and key, E of value; both rounded up to powers of two.
"""

from __future__ import annotations

from typing import no_type_check  # tensors of triton have no types, and its kernels take no run-time checks

import triton
import triton.language as tl

__all__ = ["attend_forward", "backward_of_keys", "backward_of_queries"]

_LOG2E = tl.constexpr(1.4426950408889634)
_PHILOX_ROUNDS = tl.constexpr(7)  # the fewest that pass every test of BigCrush (Salmon et al., SC 2011)


@triton.jit
@no_type_check
def _dot(a, b, PRECISION: tl.constexpr, UPCAST: tl.constexpr):
    """`a @ b` in fp32; the interpreter multiplies bf16 as raw bits, hence UPCAST."""
    if UPCAST:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, input_precision=PRECISION)


@triton.jit
@no_type_check
def _scaled(x, PRECISION: tl.constexpr):
    """What is added to logits or multiplies them, in the units of logits."""
    return x if PRECISION == "ieee" else x * _LOG2E


@triton.jit
@no_type_check
def _exp(x, PRECISION: tl.constexpr):
    return tl.exp(x) if PRECISION == "ieee" else tl.exp2(x)


@triton.jit
@no_type_check
def _tokens_of(order, start, width, first, SIZE: tl.constexpr):
    """Slots `first …` of a batch: the slots, whether they exist, their tokens."""
    slots = first + tl.arange(0, SIZE)
    there = slots < width
    return slots, there, tl.load(order + start + slots, mask=there, other=0)


@triton.jit
@no_type_check
def _load_rows(x, tokens, there, row, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    dims = tl.arange(0, BLOCK)
    mask = there[:, None] if SIZE == BLOCK else there[:, None] & (dims < SIZE)[None, :]
    return tl.load(x + tokens[:, None] * row + dims[None, :], mask=mask, other=0.0)


@triton.jit
@no_type_check
def _store_rows(x, y, tokens, there, row, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    dims = tl.arange(0, BLOCK)
    mask = there[:, None] if SIZE == BLOCK else there[:, None] & (dims < SIZE)[None, :]
    tl.store(x + tokens[:, None] * row + dims[None, :], y.to(x.dtype.element_ty), mask=mask)


@triton.jit
@no_type_check
def _logits(q, k, rows, cols, scale, own, SHIFT: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr):
    s = _dot(q, tl.trans(k), PRECISION, UPCAST) * _scaled(scale, PRECISION)
    if SHIFT:
        s = tl.where(rows[:, None] == cols[None, :], s + _scaled(own, PRECISION), s)
    return s


@triton.jit
@no_type_check
def _kept(seed, queries, keys, head, dropout_p):
    """Which weights dropout keeps: a function of seed, token, key and head, however the tiles lie."""
    row, col = queries.to(tl.int32)[:, None], keys.to(tl.int32)[None, :]
    bits, _, _, _ = tl.philox(seed, row, col, head.to(tl.int32), 0, _PHILOX_ROUNDS)
    return tl.random.uint_to_uniform_float(bits) >= dropout_p


@triton.jit
@no_type_check
def _place(starts, widths, shift, first, num_heads, num_tiles, SHIFT: tl.constexpr):
    """Of this program: head, tile, start and width of the batch, shift of the own logit. Heads are fastest."""
    program = tl.program_id(0)
    head, rest = (program % num_heads).to(tl.int64), program // num_heads  # times a stride it may pass 2³¹
    tile, batch = rest % num_tiles, rest // num_tiles + first
    own = 0.0
    if SHIFT:
        own = tl.load(shift + batch * num_heads + head)
    return head, tile, tl.load(starts + batch), tl.load(widths + batch).to(tl.int32), own


@triton.jit(do_not_specialize=["first", "num_tiles", "scale", "dropout_p"])
@no_type_check
def attend_forward(
    query,
    key,
    value,
    order,
    starts,
    widths,
    shift,
    seed,
    out,
    lse,
    query_row,
    query_head,
    key_row,
    key_head,
    value_row,
    value_head,
    first,
    num_heads,
    num_tiles,
    scale,
    dropout_p,
    SIZE_D: tl.constexpr,
    SIZE_E: tl.constexpr,
    D: tl.constexpr,
    E: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    SHIFT: tl.constexpr,
    DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Output and log-sum-exp of M query rows of a batch: the keys stream by, softmax is online.

    Source: Milakov, Gimelshein, arXiv 1805.02867; Dao, Fu, Ermon, Rudra, Ré, arXiv 2205.14135.
    """
    head, tile, start, width, own = _place(starts, widths, shift, first, num_heads, num_tiles, SHIFT)
    if tile * M >= width:
        return
    rows, row_there, tokens = _tokens_of(order, start, width, tile * M, M)
    q = _load_rows(query + head * query_head, tokens, row_there, query_row, SIZE_D, D)
    top = tl.full([M], float("-inf"), tl.float32)
    total = tl.zeros([M], tl.float32)
    acc = tl.zeros([M, E], tl.float32)
    for begin in range(0, width, N):
        cols, col_there, others = _tokens_of(order, start, width, begin, N)
        k = _load_rows(key + head * key_head, others, col_there, key_row, SIZE_D, D)
        s = _logits(q, k, rows, cols, scale, own, SHIFT, PRECISION, UPCAST)
        s = tl.where(col_there[None, :], s, float("-inf"))
        new_top = tl.maximum(top, tl.max(s, axis=1))
        base = tl.where(new_top == float("-inf"), 0.0, new_top)  # no key yet: weights 0, not nan
        p = _exp(s - base[:, None], PRECISION)
        decay = _exp(top - base, PRECISION)
        total = total * decay + tl.sum(p, axis=1)
        if DROPOUT:
            p = tl.where(_kept(tl.load(seed), tokens, others, head, dropout_p), p / (1.0 - dropout_p), 0.0)
        v = _load_rows(value + head * value_head, others, col_there, value_row, SIZE_E, E)
        acc = acc * decay[:, None] + _dot(p.to(v.dtype), v, PRECISION, UPCAST)
        top = new_top
    total = tl.where(total == 0.0, 1.0, total)  # a token without keys: output 0, log-sum-exp −∞, which top already is
    acc = acc / total[:, None]
    _store_rows(out + head * SIZE_E, acc, tokens, row_there, num_heads * SIZE_E, SIZE_E, E)
    norm = top + tl.log(total) if PRECISION == "ieee" else (top + tl.log2(total)) / _LOG2E
    tl.store(lse + tokens * num_heads + head, norm, mask=row_there)


@triton.jit
@no_type_check
def _weights_and_slopes(
    q,
    k,
    v,
    grad,
    norm,
    delta,
    rows,
    cols,
    col_there,
    tokens,
    others,
    head,
    scale,
    own,
    seed,
    dropout_p,
    SHIFT: tl.constexpr,
    DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """The weights after dropout, and `ds = p (dp − δ)`, both `[M, N]`."""
    s = _logits(q, k, rows, cols, scale, own, SHIFT, PRECISION, UPCAST)
    p = tl.where(col_there[None, :], _exp(s - norm[:, None], PRECISION), 0.0)
    dp = _dot(grad, tl.trans(v), PRECISION, UPCAST)
    dropped = p
    if DROPOUT:
        kept = _kept(tl.load(seed), tokens, others, head, dropout_p)
        dropped = tl.where(kept, p / (1.0 - dropout_p), 0.0)
        dp = tl.where(kept, dp / (1.0 - dropout_p), 0.0)
    return dropped, p * (dp - delta[:, None])


@triton.jit
@no_type_check
def _load_norm(lse, tokens, there, num_heads, head, PRECISION: tl.constexpr):
    """The log-sum-exp; +∞, that is weights of 0, for rows that are not there or have no key."""
    norm = tl.load(lse + tokens * num_heads + head, mask=there, other=float("-inf"))
    return tl.where(norm == float("-inf"), float("inf"), _scaled(norm, PRECISION))


@triton.jit(do_not_specialize=["first", "num_tiles", "scale", "dropout_p"])
@no_type_check
def backward_of_queries(
    grad,
    query,
    key,
    value,
    out,
    lse,
    grad_lse,
    order,
    starts,
    widths,
    shift,
    seed,
    delta,
    grad_query,
    grad_key,
    grad_value,
    grad_row,
    grad_head,
    query_row,
    query_head,
    key_row,
    key_head,
    value_row,
    value_head,
    first,
    num_heads,
    num_tiles,
    scale,
    dropout_p,
    SIZE_D: tl.constexpr,
    SIZE_E: tl.constexpr,
    D: tl.constexpr,
    E: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    WHOLE: tl.constexpr,
    GRAD_LSE: tl.constexpr,
    SHIFT: tl.constexpr,
    DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Gradient of M query rows; the keys stream by. If the tile is WHOLE, those of keys and values as well.

    `δ_i = g_i·y_i − ∂L/∂lse_i`. Where the M rows are all of the batch, the gradients of a tile of keys are complete as
    soon as it has been seen, and every row is gathered once. Otherwise δ is kept for `backward_of_keys`.
    """
    head, tile, start, width, own = _place(starts, widths, shift, first, num_heads, num_tiles, SHIFT)
    if tile * M >= width:
        return
    rows, row_there, tokens = _tokens_of(order, start, width, tile * M, M)
    g = _load_rows(grad + head * grad_head, tokens, row_there, grad_row, SIZE_E, E)
    y = _load_rows(out + head * SIZE_E, tokens, row_there, num_heads * SIZE_E, SIZE_E, E)
    d = tl.sum(g.to(tl.float32) * y.to(tl.float32), axis=1)
    if GRAD_LSE:
        d -= tl.load(grad_lse + tokens * num_heads + head, mask=row_there, other=0.0)
    if not WHOLE:
        tl.store(delta + tokens * num_heads + head, d, mask=row_there)
    norm = _load_norm(lse, tokens, row_there, num_heads, head, PRECISION)
    q = _load_rows(query + head * query_head, tokens, row_there, query_row, SIZE_D, D)
    dq = tl.zeros([M, D], tl.float32)
    for begin in range(0, width, N):
        cols, col_there, others = _tokens_of(order, start, width, begin, N)
        k = _load_rows(key + head * key_head, others, col_there, key_row, SIZE_D, D)
        v = _load_rows(value + head * value_head, others, col_there, value_row, SIZE_E, E)
        p, ds = _weights_and_slopes(
            q, k, v, g, norm, d, rows, cols, col_there, tokens, others, head, scale, own, seed, dropout_p,
            SHIFT, DROPOUT, PRECISION, UPCAST,
        )  # fmt: skip
        ds = ds.to(k.dtype)
        dq += _dot(ds, k, PRECISION, UPCAST)
        if WHOLE:
            dv = _dot(tl.trans(p.to(g.dtype)), g, PRECISION, UPCAST)
            _store_rows(grad_value + head * SIZE_E, dv, others, col_there, num_heads * SIZE_E, SIZE_E, E)
            dk = _dot(tl.trans(ds), q, PRECISION, UPCAST) * scale
            _store_rows(grad_key + head * SIZE_D, dk, others, col_there, num_heads * SIZE_D, SIZE_D, D)
    _store_rows(grad_query + head * SIZE_D, dq * scale, tokens, row_there, num_heads * SIZE_D, SIZE_D, D)


@triton.jit(do_not_specialize=["first", "num_tiles", "scale", "dropout_p"])
@no_type_check
def backward_of_keys(
    grad,
    query,
    key,
    value,
    lse,
    delta,
    order,
    starts,
    widths,
    shift,
    seed,
    grad_key,
    grad_value,
    grad_row,
    grad_head,
    query_row,
    query_head,
    key_row,
    key_head,
    value_row,
    value_head,
    first,
    num_heads,
    num_tiles,
    scale,
    dropout_p,
    SIZE_D: tl.constexpr,
    SIZE_E: tl.constexpr,
    D: tl.constexpr,
    E: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    SHIFT: tl.constexpr,
    DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Gradients of N rows of key and value; the queries stream by. `backward_of_queries` has stored δ before."""
    head, tile, start, width, own = _place(starts, widths, shift, first, num_heads, num_tiles, SHIFT)
    if tile * N >= width:
        return
    cols, col_there, others = _tokens_of(order, start, width, tile * N, N)
    k = _load_rows(key + head * key_head, others, col_there, key_row, SIZE_D, D)
    v = _load_rows(value + head * value_head, others, col_there, value_row, SIZE_E, E)
    dk = tl.zeros([N, D], tl.float32)
    dv = tl.zeros([N, E], tl.float32)
    for begin in range(0, width, M):
        rows, row_there, tokens = _tokens_of(order, start, width, begin, M)
        q = _load_rows(query + head * query_head, tokens, row_there, query_row, SIZE_D, D)
        g = _load_rows(grad + head * grad_head, tokens, row_there, grad_row, SIZE_E, E)
        norm = _load_norm(lse, tokens, row_there, num_heads, head, PRECISION)
        d = tl.load(delta + tokens * num_heads + head, mask=row_there, other=0.0)
        p, ds = _weights_and_slopes(
            q, k, v, g, norm, d, rows, cols, col_there, tokens, others, head, scale, own, seed, dropout_p,
            SHIFT, DROPOUT, PRECISION, UPCAST,
        )  # fmt: skip
        dv += _dot(tl.trans(p.to(g.dtype)), g, PRECISION, UPCAST)
        dk += _dot(tl.trans(ds.to(q.dtype)), q, PRECISION, UPCAST)
    _store_rows(grad_key + head * SIZE_D, dk * scale, others, col_there, num_heads * SIZE_D, SIZE_D, D)
    _store_rows(grad_value + head * SIZE_E, dv, others, col_there, num_heads * SIZE_E, SIZE_E, E)
