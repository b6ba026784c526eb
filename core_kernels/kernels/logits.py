"""Per-element maths of a tile of logits: scale and softcap, its argmax, its gradient. Device functions, no kernels.

Throughout, a *final* logit is ``z = cap(scale * (x @ w + bias))`` in float32, a column past the vocab holds ``-inf``,
and a token is *valid* when its label is a class.
"""

import torch
import triton
import triton.language as tl

from core_kernels.engine import interpreting

INTERPRETED = tl.constexpr(interpreting())
ON_NVIDIA = tl.constexpr(torch.version.hip is None and not interpreting())
LOG2_E = tl.constexpr(1.4426950408889634)
# Nats from 0 up to which rounding ``base * log2(e)`` changes exponentials by less than rounding them to bfloat16 does;
# and those from which float32 numbers are 64 apart or more, so that an exponential is that of 0, or as good as 0.
FAR, SPARSE = tl.constexpr(2.0**14), tl.constexpr(2.0**30)
NO_COLUMN = tl.constexpr(2147483647)
NAN_COLUMN = tl.constexpr(-2147483648)


@triton.jit
def round_to(value, dtype: tl.constexpr):
    """Round float32 to the nearest ``dtype``. The interpreter truncates to bfloat16: there the bits are made here."""
    if INTERPRETED and dtype == tl.bfloat16:
        bits = value.to(tl.int32, bitcast=True)
        nearest = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        rounded = tl.where(value == value, nearest, 0x7FC0).to(tl.int16).to(tl.bfloat16, bitcast=True)
    else:
        rounded = value.to(dtype)
    return rounded


@triton.jit
def multiply_add(a, b, total):
    """``total + a @ b`` in float32, exact products included (no TF32).

    The interpreter multiplies 16-bit operands by their raw bits, and float32 ones in an order that depends on the CPU
    and on both shapes, where a logit shall have the same bits in any tile: there they are upcast first.
    """
    if INTERPRETED:
        total += tl.dot(a.to(tl.float64), b.to(tl.float64), out_dtype=tl.float64).to(tl.float32)
    else:
        total = tl.dot(a, b, total, input_precision="ieee")
    return total


@triton.jit
def exp(x):
    """exp in float32; on an NVIDIA GPU one instruction after the scaling, which flushes what is below 2^-126 to 0."""
    if ON_NVIDIA:
        y = exp2(x * LOG2_E)
    else:
        y = tl.exp(x)
    return y


@triton.jit
def exp2(x):
    """On an NVIDIA GPU: that instruction."""
    return tl.inline_asm_elementwise("ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)


@triton.jit
def exponent_of(base):
    """For ``exp_from``: ``base * log2(e)``, and the factor of ``z`` that goes with it: 1 where numbers are ``SPARSE``,
    and the rounding of the product would be more than an exponent of 2 has room for.
    """
    factor = tl.where(tl.abs(base) < SPARSE, LOG2_E, 1.0)
    return base * factor, factor


@triton.jit
def exp_from(z, exponent, factor):
    """``exp(z - base)`` by two instructions, on an NVIDIA GPU; of all of a row times one factor, near 1 unless the base
    is ``FAR``.
    """
    return exp2(tl.fma(z, factor, -exponent))


@triton.jit
def correction_of(base, exponent, factor):
    """What a sum of ``exp_from`` is times, to make up for the rounding of the exponent."""
    return exp2(-tl.fma(base, factor, -exponent))


@triton.jit
def tanh(u):
    """tanh in float32, accurate relative to its value near 0 as well (an exponential alone cancels there)."""
    a = tl.abs(u)
    e = tl.exp(-2.0 * a)
    far = (1.0 - e) / (1.0 + e)
    s = u * u
    p = -5.883185137e-03 * s + 2.078510944e-02  # a least-squares fit of (tanh(u) - u) / u^3, error 3e-9
    p = p * s - 5.378038901e-02
    p = p * s + 1.333188019e-01
    p = p * s - 3.333329618e-01
    return tl.where(a < 0.55, u + u * (s * p), tl.where(u < 0, -far, far))


@triton.jit
def cap_logits(z, logit_scale, softcap, HAS_SCALE: tl.constexpr, HAS_SOFTCAP: tl.constexpr):
    if HAS_SCALE:
        z = z * logit_scale
    if HAS_SOFTCAP:
        z = softcap * tanh(z / softcap)
    return z


@triton.jit
def final_logits(z, in_vocab, logit_scale, softcap, HAS_SCALE: tl.constexpr, HAS_SOFTCAP: tl.constexpr):
    """Scale, cap, and only then mask: a padded column masked before the cap would come out as ``-softcap``."""
    z = cap_logits(z, logit_scale, softcap, HAS_SCALE, HAS_SOFTCAP)
    return tl.where(in_vocab, z, float("-inf"))


@triton.jit
def finite_or_zero(row_max):
    """A maximum that is safe to subtract: ``-inf - -inf`` would turn a block of masked logits into NaN."""
    return tl.where(row_max == float("-inf"), 0.0, row_max)


@triton.jit
def argmax_minding_nan(z, columns, AXIS: tl.constexpr):
    """The maximum that is not NaN, and the argmax; a NaN's column is offset to below 0, so that it wins."""
    is_nan = z != z
    top = tl.max(tl.where(is_nan, float("-inf"), z), AXIS)
    at_top = z == (top[:, None] if AXIS == 1 else top)
    return top, tl.min(tl.where(is_nan, columns + NAN_COLUMN, tl.where(at_top, columns, NO_COLUMN)), AXIS)


@triton.jit
def tile_statistics(z, columns, row_max, ARGMAX: tl.constexpr):
    """Of each row of a tile of final logits: the maximum, its column, a base that is safe to subtract (the maximum of
    it and ``row_max``), and the sum of exponentials relative to that base.

    NaN and inf make the sum NaN; only then is the argmax taken again, minding NaN.
    """
    top = tl.max(z, 1)
    base = finite_or_zero(tl.maximum(row_max, top))
    total = tl.sum(exp(z - base[:, None]), 1)
    column = tl.full(top.shape, NO_COLUMN, tl.int32)
    if ARGMAX:
        column = tl.min(tl.where(z == top[:, None], columns[None, :], NO_COLUMN), 1)
    if tl.max((total != total).to(tl.int32), 0) > 0:
        top, column = argmax_minding_nan(z, columns[None, :], 1)
        base = finite_or_zero(tl.maximum(row_max, top))
    return top, column, base, total


@triton.jit
def merge_argmax(top, column, next_top, next_column):
    """Merge the argmax of later columns into that of earlier ones: the first NaN, else the largest, else the lowest."""
    larger = (next_top > top) | ((next_top == top) & (next_column < column))
    return tl.where((column >= 0) & ((next_column < 0) | larger), next_column, column)


@triton.jit
def argmax_column(column):
    """The column that ``argmax_minding_nan`` encoded."""
    return tl.where(column < 0, column - NAN_COLUMN, column)


@triton.jit
def is_valid(label, ignore_index, V):
    label = label.to(tl.int64)
    return (label != ignore_index) & (label >= 0) & (label < V)


@triton.jit
def gradient_coefficients(
    token, label, valid, base, log_sum,
    grad_loss, group_tokens, divisors, token_scale, class_weight, class_weight_sum,
    V, smoothing, lse_square_scale,
    MEAN: tl.constexpr, TOKEN_SCALING: tl.constexpr, CLASS_WEIGHT: tl.constexpr,
    SMOOTHING: tl.constexpr, Z_LOSS: tl.constexpr,
):  # fmt: skip
    """Row factors of ``dL/dz_v = target * (p_v - [v == label]) + soft * p_v - uniform * w_v``, upstream included.

    Each group of ``group_tokens`` tokens has its own upstream gradient (``None`` for 1) and divisors.
    """
    group = token // group_tokens
    g = valid.to(tl.float32)
    if grad_loss is not None:
        g = tl.load(grad_loss + group, mask=valid, other=0.0)
    if TOKEN_SCALING:
        g = g * tl.load(token_scale + token, mask=valid, other=0.0)
    g_z = g
    if MEAN:
        g_z = g * tl.load(divisors + 2 * group + 1, mask=valid, other=0.0)
        g = g * tl.load(divisors + 2 * group, mask=valid, other=0.0)
    target = g
    soft = g * 0.0
    uniform = soft
    if CLASS_WEIGHT:
        target = g * tl.load(class_weight + label, mask=valid, other=0.0).to(tl.float32)
    if SMOOTHING:
        target = target * (1.0 - smoothing)
        uniform = g * (smoothing / V)
        soft = uniform * (tl.load(class_weight_sum) if CLASS_WEIGHT else V)
    if Z_LOSS:
        soft = soft + 2.0 * lse_square_scale * (base + log_sum) * g_z
    return soft, target, uniform


@triton.jit
def logits_gradient(
    z, exact, columns, in_vocab, label, base, log_sum, soft, target, uniform,
    class_weight, logit_scale, softcap,
    CLASS_WEIGHT: tl.constexpr, SMOOTHING: tl.constexpr, Z_LOSS: tl.constexpr,
    HAS_SCALE: tl.constexpr, HAS_SOFTCAP: tl.constexpr,
):  # fmt: skip
    """Gradient of the loss by the raw logits, from final logits ``z`` and the row factors above.

    ``exact``: whether some label may be among the columns, or some base is ``FAR``.
    """
    if exact:
        p = exp((z - base) - log_sum)
        g = tl.where(columns == label, p - 1.0, p)
    else:  # where nothing is subtracted from it, and the lse is not far, its error is below what is rounded
        exponent, factor = exponent_of(base + log_sum)
        p = exp_from(z, exponent, factor)
        g = p
    g = g * target
    if SMOOTHING or Z_LOSS:
        g = g + soft * p
    if SMOOTHING:
        if CLASS_WEIGHT:
            g = g - uniform * tl.load(class_weight + columns, mask=in_vocab, other=0.0).to(tl.float32)
        else:
            g = g - uniform
    if HAS_SOFTCAP:
        capped = z / softcap
        g = g * (1.0 - capped * capped)
    if HAS_SCALE:
        g = g * logit_scale
    return g
