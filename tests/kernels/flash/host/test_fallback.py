"""Fall back from kernels that do not compile or fit: smaller tiles, then PyTorch operators, stated in reports."""

import math
import threading
import warnings

import pytest
import torch
from triton.compiler.errors import CompilationError
from triton.runtime.errors import OutOfResources

from attnfx.compiler import choose as deciding
from attnfx.ir import algebra as A
from attnfx.kernels import gpu as device
from attnfx.kernels.call import Call
from attnfx.kernels.flash import tier
from attnfx.kernels.flash.host import decode as split
from attnfx.kernels.flash.host import fallback
from attnfx.kernels.flash.host.launch import Launch
from attnfx.kernels.flash.host.tiles import INTERPRETED, LEAST, backward_tiles, decode_tiles, forward_tiles
from attnfx.kernels.operators import attention as operator
from attnfx.report import records
from attnfx.spec import AttentionSpec, I, J
from attnfx.targets import Target
from tests.support import compiled, new_reports, rand

SPEC = AttentionSpec(score=A.where(A.ge(I, J), A.mul(A.const(0.25), A.DOT), A.const(-math.inf)))
DROPPED = AttentionSpec(score=A.DOT, dropout=0.25)
TOO_LARGE = OutOfResources(300_000, 232_448, "shared memory")


@pytest.fixture(autouse=True)
def nothing_failed(monkeypatch):
    monkeypatch.setattr(fallback, "_failed", {})
    monkeypatch.setattr(records, "_fallbacks", {})


@pytest.fixture
def refuse(monkeypatch):
    """Make launches fail for kernels whose name contains `kernel`, with a tile of more than `keys` keys."""
    counted = []

    def install(problem, kernel="", keys=0):
        original = Launch.run

        def run(self, where):
            if kernel in self.kernel.__name__ and self.tile.keys > keys:
                counted.append(self.kernel.__name__)
                raise problem
            original(self, where)

        monkeypatch.setattr(Launch, "run", run)
        return counted

    return install


def call(spec=SPEC, rows=20, seed=None):
    torch.manual_seed(0)
    return Call(spec, rand(1, 2, rows, 16), rand(1, 2, 40, 16), rand(1, 2, 40, 16), (), (), seed)


def passes(some):
    out, logsumexp = tier.forward(some)
    grad = rand(*out.shape, seed=5)
    return [out, logsumexp, *tier.backward(some, grad, out, logsumexp)[:3]]


def test_a_tile_that_does_not_fit_gives_way_to_a_smaller_one_once_with_one_warning(refuse):
    want = passes(call())
    refused = refuse(TOO_LARGE, keys=LEAST.keys)
    with pytest.warns(RuntimeWarning, match="needs 300000 of shared memory, and the device has 232448") as told:
        got = passes(call())
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    ours = [x for x in told if str(x.message).startswith("attnfx")]  # Triton's interpreter warns, too
    assert len(ours) == 2 == len(refused)  # forward and backward kernel
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "attnfx")
        passes(call())
    assert len(refused) == 2


@pytest.mark.parametrize(
    "problem", [TOO_LARGE, CompilationError("", None, "no such instruction")], ids=["fit", "build"]
)
@pytest.mark.parametrize("kernel", ["", "forward", "keys"])
@pytest.mark.parametrize("spec", [SPEC, DROPPED], ids=["causal", "dropout"])
@pytest.mark.filterwarnings("ignore:attnfx")
def test_without_any_kernel_the_call_runs_in_blocks_with_the_same_draw(refuse, spec, kernel, problem):
    seed = torch.tensor([2**40 + 7]) if spec.random else None
    want = passes(call(spec, seed=seed))
    refuse(problem, kernel)
    torch.testing.assert_close(passes(call(spec, seed=seed)), want, rtol=1e-5, atol=1e-5)
    name = "backward" if kernel == "keys" else "forward"
    with pytest.raises(fallback.CannotLaunch, match=f"the {name} kernel cannot run: (needs|does not compile)"):
        fallback.first_that_runs(name, call(spec, seed=seed), (INTERPRETED, LEAST), lambda tile: None)


@pytest.mark.filterwarnings("ignore:attnfx")
def test_decoding_falls_back_to_the_forward_kernel(refuse):
    some = call(rows=2)
    want = split.forward(some)
    refuse(TOO_LARGE, "decode")
    torch.testing.assert_close(tier.forward_decode(some), want, rtol=1e-5, atol=1e-5)


@pytest.mark.filterwarnings("ignore:attnfx")
def test_the_report_of_a_site_says_what_could_not_run(refuse, monkeypatch):
    monkeypatch.setitem(operator.AUTO, "cpu", ("flash",))
    monkeypatch.setattr(deciding, "target_of", lambda options, device: Target.by_name("h100-sxm"))
    refuse(TOO_LARGE)
    with new_reports() as filed:
        fast = compiled(lambda q, k, v: (q @ k.mT * 0.25).softmax(-1) @ v)
        fast(*(rand(1, 2, 20, 16) for _ in range(3)))
    (site,) = filed[0].sites
    assert site.decision is not None and site.decision.tier == "flash"
    assert any("forward kernel on cpu needs 300000 of shared memory" in x for x in site.fallbacks)
    assert "blocks of PyTorch's operators" in " ".join(site.fallbacks)
    assert "300000" in str(filed[0])


def test_what_is_no_matter_of_tiles_is_raised(refuse):
    refuse(RuntimeError("an illegal memory access was encountered"))
    with pytest.raises(RuntimeError, match="illegal memory access"):
        tier.forward(call())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("capability", [(8, 0), (8, 6), (9, 0), (10, 0)])
def test_every_tile_is_followed_by_smaller_ones(monkeypatch, capability, dtype):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda where: capability)
    for width in (32, 64, 128, 256):
        for tiles in (forward_tiles, decode_tiles):
            some = tiles(torch.device("cuda"), dtype, width)
            assert len(some) == len(set(some)) <= 10
        pairs = backward_tiles(torch.device("cuda"), dtype, width)
        assert len(pairs) == len(set(pairs)) <= 10


def test_what_outlives_a_call_is_not_allocated_by_the_thread_that_may_capture_a_graph():
    # allocations of a capturing thread go to the graph's private pool, where PyTorch rejects tensors that stay alive
    assert device.lasting(threading.get_ident, torch.device("cuda", 0)) != threading.get_ident()
    assert device.lasting(threading.get_ident, torch.device("cpu")) == threading.get_ident()
