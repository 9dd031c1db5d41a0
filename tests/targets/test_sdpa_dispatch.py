"""Name the kernel that PyTorch's fused operator takes on each GPU."""

import pytest

from attnfx.targets import sdpa_dispatch as fused


@pytest.mark.parametrize(
    ("dtype", "capability", "widths", "cudnn", "expected"),
    [
        ("bfloat16", 90, (128, 128), True, fused.CUDNN),
        ("bfloat16", 90, (128, 64), True, fused.CUDNN),
        ("bfloat16", 100, (64, 64), True, fused.CUDNN),
        ("bfloat16", 90, (128, 128), False, fused.FLASH),
        ("bfloat16", 90, (192, 192), True, fused.FLASH),
        ("float16", 80, (256, 256), True, fused.FLASH),
        ("bfloat16", 80, (128, 64), True, fused.EFFICIENT),
        ("bfloat16", 89, (192, 192), True, fused.FLASH),
        ("bfloat16", 89, (200, 200), True, fused.EFFICIENT),
        ("bfloat16", 80, (264, 264), True, fused.EFFICIENT),
        ("bfloat16", 90, (100, 100), True, None),
        ("bfloat16", 80, (100, 64), True, None),
        ("bfloat16", 75, (128, 128), True, None),
        ("bfloat16", 130, (128, 128), True, None),
        ("float32", 90, (128, 128), True, fused.EFFICIENT),
        ("float32", 80, (36, 12), True, fused.EFFICIENT),
        ("float32", 80, (34, 34), True, None),
        ("float32", 75, (33, 7), True, fused.EFFICIENT),
        ("float32", 61, (64, 64), True, None),
        ("float16", 75, (128, 128), True, fused.EFFICIENT),
        ("float16", 70, (100, 100), True, None),
        ("float64", 80, (64, 64), True, None),
    ],
)
def test_the_kernel_is_the_one_that_pytorch_takes(dtype, capability, widths, cudnn, expected):
    assert fused.kernel(dtype, capability, *widths, cudnn=cudnn) == expected


def test_masks_and_oblong_causality_go_past_flash_attention_and_shared_heads_past_the_last_kernel():
    assert fused.kernel("bfloat16", 80, 64, 64, plain=False) == fused.EFFICIENT
    assert fused.kernel("bfloat16", 80, 64, 64, grouped=True) == fused.FLASH
    assert fused.kernel("bfloat16", 80, 64, 64, grouped=True, plain=False) is None
    assert fused.kernel("float32", 80, 64, 64, grouped=True) is None
