"""Name the kernel that PyTorch's fused operator takes on each GPU."""

import pytest
import torch
from torch.nn.attention import SDPBackend, _registry, sdpa_kernel

from attnfx.targets import sdpa_dispatch as fused
from attnfx.targets.detection import _flash, present_backends


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
    backends = fused.Backends() if cudnn else fused.Backends(cudnn=0)
    assert fused.kernel(fused.Shape(dtype, capability, *widths), backends) == expected


def test_masks_and_oblong_causality_go_past_flash_attention_and_shared_heads_past_the_last_kernel():
    assert fused.kernel(fused.Shape("bfloat16", 80, 64, 64, plain=False)) == fused.EFFICIENT
    assert fused.kernel(fused.Shape("bfloat16", 80, 64, 64, grouped=True)) == fused.FLASH
    assert fused.kernel(fused.Shape("bfloat16", 80, 64, 64, grouped=True, plain=False)) is None
    assert fused.kernel(fused.Shape("float32", 80, 64, 64, grouped=True)) is None


def offered(capability=90, width=128, training=False, plain=True, **backends):
    shape = fused.Shape("bfloat16", capability, width, width, plain=plain)
    return fused.offered(shape, fused.Backends(**backends), training)


def test_training_is_not_moved_to_a_backward_pass_of_cudnn_off_the_list(monkeypatch):
    assert offered() == (fused.CUDNN,)
    assert offered(training=True) == (fused.FLASH,)
    assert "cuDNN 9.20.0 may be NaN" in offered(training=True, flash="")
    monkeypatch.setattr(fused, "CUDNN_BACKWARD", {93100: "a test"})
    assert offered(training=True, cudnn=93100) == (fused.CUDNN,)
    assert offered(training=True, cudnn=93000) == (fused.FLASH,)


def test_an_activated_flash_attention_is_offered_behind_cudnn_and_in_the_place_of_version_2():
    assert offered(flash="FA3") == (fused.CUDNN, fused.FLASH3)
    assert offered(flash="FA4", training=True) == (fused.FLASH4,)
    assert offered(flash="FA3", cudnn=0) == (fused.FLASH3,)
    assert offered(100, flash="FA4") == (fused.CUDNN, fused.FLASH4)
    assert offered(100, flash="FA3") == (fused.CUDNN,)
    assert offered(width=256, flash="FA3") == (fused.FLASH3,)


def test_a_call_that_the_activated_flash_attention_does_not_take_is_refused():
    """PyTorch selects the kernel all the same, which raises an error."""
    assert offered(80, flash="FA3") == "flash-attention-3 is active, and needs compute capability 9.x"
    assert offered(89, flash="FA4") == "flash-attention-4 is active, and needs compute capability 9.x or 10.x"
    assert offered(width=256, flash="FA4") == "flash-attention-4 is active, and takes heads of width 64, 96 and 128"
    assert "and flash-attention-4 is active" in offered(width=80, flash="FA4", training=True)
    assert offered(80, flash="FA3", plain=False) == (fused.EFFICIENT,)


def test_the_kernels_of_this_process_follow_its_settings(monkeypatch):
    deterministic = [False]
    monkeypatch.delenv("TORCH_CUDNN_SDPA_DEPRIORITIZED", raising=False)
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: 92000)
    monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: True)
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: deterministic[0])
    assert present_backends() == fused.Backends(92000, "FA2", True)
    monkeypatch.setattr(torch.nn.attention, "current_flash_attention_impl", lambda: "FA4")
    assert present_backends().flash == "FA4"
    with sdpa_kernel([SDPBackend.EFFICIENT_ATTENTION]):
        assert present_backends() == fused.Backends(0, "", True)
    deterministic[0] = True
    assert present_backends().cudnn == 0
    deterministic[0] = False
    monkeypatch.setenv("TORCH_CUDNN_SDPA_DEPRIORITIZED", "1")
    assert present_backends().cudnn == 0


def test_the_implementation_that_pytorch_activates_is_seen():
    class Handle:
        def remove(self):
            pass

    names = set(torch.nn.attention.list_flash_attention_impls())
    assert {"FA3", "FA4"} <= names
    register, own = torch.nn.attention.register_flash_attention_impl, _registry._FLASH_ATTENTION_IMPLS["FA3"]
    register("FA3", register_fn=Handle)
    try:
        torch.nn.attention.activate_flash_attention_impl("FA3")
        assert _flash() == "FA3"
    finally:
        torch.nn.attention.restore_flash_attention_impl()
        register("FA3", register_fn=own)
    assert _flash() == "FA2"
