"""What the kernels in Triton share: one step of a softmax over many keys, and a key or value as codes."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from octavo.attention.pages import Pages, Scoring

LOG2E = 1.4426950408889634  # exponentials are in base 2


def power_of_2(n: int) -> int:
    """The smallest that is at least n; Triton's own function takes longer than a launch."""
    return 1 << (n - 1).bit_length()


def precision(query: Tensor) -> str:
    """How `product` multiplies for these queries: float32 is not shortened to tf32, since results are compared."""
    if not query.is_cuda:
        return "interpreted"
    return "ieee" if query.dtype == torch.float32 else "tf32"


def stages(most: int, stored: Tensor, query: Tensor) -> int:
    """How many tiles of keys and values [..., D] may be on their way at once, given a core's memory; `most` at most."""
    width = power_of_2(stored.shape[-1]) * max(stored.element_size(), query.element_size())
    return max(1, min(most, 1024 // width))  # of 64 keys and values each; there are 227 KiB, and queries take some


def scale_of(scale: Tensor | None, pages: Pages) -> Tensor:
    """The scales, or something that stands for none."""
    return pages.position if scale is None else scale


def codes_of(pages: Pages) -> int:
    """What the pages hold: 0 numbers, 1 int8 codes, 2 float8 codes."""
    if pages.key_scale is None:
        return 0
    return 1 if pages.key.dtype == torch.int8 else 2


@triton.jit
def product(a, b, PRECISION: tl.constexpr):
    """a @ b in float32. Triton's interpreter cannot multiply bfloat16, so there both are widened first."""
    if PRECISION == "interpreted":
        return tl.dot(a.to(tl.float32), b.to(tl.float32), input_precision="ieee")
    else:
        return tl.dot(a, b, input_precision=PRECISION)


@triton.jit
def for_codes(q, CODES: tl.constexpr, PRECISION: tl.constexpr):
    """(queries [Q, D] for products with what `number` gives, what scores [Q] must be multiplied by then).

    Codes become float16, which holds each of them exactly and into which a GPU turns them fastest. Queries may be
    larger than float16 allows, so they are divided by their largest element.
    """
    if (CODES == 0) or (PRECISION != "tf32"):
        return q, tl.full([q.shape[0]], 1.0, tl.float32)
    else:
        wide = q.to(tl.float32)
        most = tl.maximum(tl.max(tl.abs(wide), 1), 1e-30)
        return (wide / most[:, None]).to(tl.float16), most


@triton.jit
def number(x, q, CODES: tl.constexpr, PRECISION: tl.constexpr):
    """Stored keys or values in the dtype of queries `q`, without their scale."""
    if CODES == 0:
        return x.to(q.dtype)
    elif PRECISION != "tf32":
        return x.to(tl.float32).to(q.dtype)
    elif CODES == 1:
        # Four codes at once: with its sign bit flipped a code is 0 to 255, and behind the byte 0x64 that is 1024 more
        # as a float16.
        return tl.inline_asm_elementwise(
            """
            {
            .reg .b32 r, low, high, bias;
            xor.b32 r, $2, 0x80808080;
            prmt.b32 low, r, 0x64646464, 0x4140;
            prmt.b32 high, r, 0x64646464, 0x4342;
            mov.b32 bias, 0x64806480;
            sub.f16x2 $0, low, bias;
            sub.f16x2 $1, high, bias;
            }
            """,
            "=r,=r,r", [x], dtype=tl.float16, is_pure=True, pack=4,
        )  # fmt: skip
    else:
        return x.to(tl.float16)


@triton.jit
def scaled(p, scale):
    """(p [Q, K] times the values' scales [K] over the largest of them, which is the second result).

    Scales may be so small that weights times scales would vanish in float16.
    """
    largest = tl.maximum(tl.max(scale, 0), 1e-30)
    return p * (scale / largest)[None, :], largest


@triton.jit
def attended(x, m, s, acc):
    """Take scores `x` [Q, K] in base 2 (-inf: not seen) into a running softmax; values are the caller's to add.

    `m` [Q] is the largest score so far (-1e30 before any), `s` [Q] the sum of weights and `acc` [Q, D] of weighted
    values, both relative to `m`. Returns the weights [Q, K] and all three anew.
    """
    top = tl.maximum(m, tl.max(x, 1))
    p = tl.exp2(x - top[:, None])
    shrink = tl.exp2(m - top)
    return p, top, s * shrink + tl.sum(p, 1), acc * shrink[:, None]


def scoring_of(scoring: Scoring | None, stand_in: Tensor) -> tuple[Tensor, float, bool]:
    """(sinks [Hq] float32 or what stands for none, the cap of scores in base 2 or 0 for none, whether sinks are)."""
    if scoring is None:
        return stand_in, 0.0, False
    sinks = None if scoring.sinks is None else scoring.sinks.detach().float().contiguous()
    return stand_in if sinks is None else sinks, (scoring.softcap or 0.0) * LOG2E, sinks is not None


@triton.jit
def capped(x, CAP: tl.constexpr):
    """Scores in base 2 under a cap: CAP * tanh(x / CAP); 0 is none."""
    if CAP == 0.0:
        return x
    else:
        return CAP - 2.0 * CAP / (tl.exp2(tl.minimum(x * (2.8853900817779268 / CAP), 60.0)) + 1.0)  # 2 / ln 2


@triton.jit
def joined(s, m, sinks, head, SINKS: tl.constexpr):
    """The sum of weights `s` relative to `m`, with the sinks of query heads `head` [Q] among them. A sink that is
    larger than all scores by 2^120 leaves nothing of them anyway."""
    if SINKS:
        return s + tl.exp2(tl.minimum(tl.load(sinks + head) * 1.4426950408889634 - m, 120.0))
    else:
        return s


@triton.jit
def coded(x, CODES: tl.constexpr):
    """(codes, scale) of a key or value [..., D] as `pages.quantised` gives them, but for the scale's last bit: there a
    GPU multiplies by a rounded 1 / 127. `CODES` 1: int8, 2: float8."""
    x = x.to(tl.float32)
    most = tl.maximum(tl.max(tl.abs(x), -1, keep_dims=True), 1e-30)
    if CODES == 1:
        scale = tl.div_rn(most, 127.0)
        codes = (tl.div_rn(x, scale) + 12582912.0) - 12582912.0  # to the nearest integer, ties to even
    else:
        scale = tl.div_rn(most, 448.0)
        codes = tl.div_rn(x, scale)
    return codes, tl.max(scale, -1)
