"""A convolution over all channels with its bias and activation, in one launch.

It is a product of matrices: the rows are the pixels of the output, and the depth are the K = k k C
numbers of x that a pixel is made of, which are gathered from x where the tile is loaded. x may have
any strides, so images need not be in channels_last memory format.
"""

from __future__ import annotations

import triton
import triton.language as tl

from swiftkernels.backends.triton.activations import activate
from swiftkernels.backends.triton.tiles import dot, load_transposed, load_vector


@triton.jit(
    do_not_specialize=[
        "num_tiles", "height", "width", "out_height", "out_width", "stride_b", "stride_h",
        "stride_w", "stride_c",
    ]
)  # fmt: skip
def _convolution_kernel(
    x_ptr,  # [B, C, H, W]
    weight_ptr, bias_ptr,  # [D, k, k, C], [D]
    out_ptr,  # [B, H', W', D], contiguous
    num_tiles, height, width, out_height, out_width,
    stride_b, stride_h, stride_w, stride_c,
    C: tl.constexpr, D: tl.constexpr,
    KERNEL: tl.constexpr, STRIDE: tl.constexpr, PADDING: tl.constexpr, ACTIVATION: tl.constexpr,
    CHANNELS_LAST: tl.constexpr, ALIGN: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """BLOCK_D channels of BLOCK_N pixels of an output.

    With CHANNELS_LAST the stride of the channels is 1, and ALIGN divides the others.
    """
    ACC: tl.constexpr = tl.float32
    DTYPE: tl.constexpr = x_ptr.dtype.element_ty
    K: tl.constexpr = KERNEL * KERNEL * C
    across: tl.constexpr = (D + BLOCK_D - 1) // BLOCK_D
    pid = tl.program_id(0)
    tile = pid // across
    batch = (tile // num_tiles).to(tl.int64)
    rows = (tile % num_tiles) * BLOCK_N + tl.arange(0, BLOCK_N)
    ds = pid % across * BLOCK_D + tl.arange(0, BLOCK_D)
    n_pixels = out_height * out_width

    step_h = tl.multiple_of(stride_h.to(tl.int64), ALIGN)
    step_w = tl.multiple_of(stride_w.to(tl.int64), ALIGN)
    x_ptr += batch * tl.multiple_of(stride_b.to(tl.int64), ALIGN)
    # The window of a pixel begins here; it may begin outside of the image.
    top = rows // out_width * STRIDE - PADDING
    left = rows % out_width * STRIDE - PADDING
    corners = top * step_h + left * step_w

    out = tl.zeros([BLOCK_N, BLOCK_D], ACC)
    for k0 in range(0, K, BLOCK_K):
        ks = k0 + tl.arange(0, BLOCK_K)
        cs = ks % C
        down = ks // C // KERNEL
        right = ks // C % KERNEL
        lines = top[:, None] + down[None, :]
        columns = left[:, None] + right[None, :]
        inside = (lines >= 0) & (lines < height) & (columns >= 0) & (columns < width)
        mask = inside & (rows < n_pixels)[:, None] & (ks < K)[None, :]
        if not CHANNELS_LAST:
            cs = cs * stride_c.to(tl.int64)
        offsets = corners[:, None] + (down * step_h + right * step_w + cs)[None, :]
        x_tile = tl.load(x_ptr + offsets, mask=mask, other=0.0)
        out = dot(x_tile, load_transposed(weight_ptr, ds, ks, D, K), out, PRECISION)

    out += load_vector(bias_ptr, ds, D, ACC)[None, :]
    if ACTIVATION == "relu6":
        out = activate(out, "relu", DTYPE)
        out = tl.where(out > 6.0, 6.0, out)
    else:
        out = activate(out, ACTIVATION, DTYPE)
    offsets = (batch * n_pixels + rows)[:, None] * D + ds[None, :]
    mask = (rows < n_pixels)[:, None] & (ds < D)[None, :]
    tl.store(out_ptr + offsets, out.to(DTYPE), mask=mask)
