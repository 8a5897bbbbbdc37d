"""The kernels of cross-entropy that are CUDA's: one for each shape, on the emulator and on a GPU.

The tests of the op run on them too.
"""

import emulated
import pytest
import torch
import torch.nn.functional as F

from mnist_ext import functional

# One for each kernel: one block for everything, with as many rows as threads and with more; several
# blocks of a thread per row, with and without padding; a warp, a block, a cluster per row, with
# rows that do not begin at multiples of 16 bytes; positions side by side.
SHAPES = [
    (64, 10),
    (700, 10),
    (4000, 10),
    (4000, 32),
    (300, 257),
    (9, 5003),
    (3, 33_001),
    (2, 140_001),
    (3, 11, 1000),
]


def loss_and_gradient(logits, target, **options):
    leaf = logits.detach().requires_grad_()
    loss = functional.cross_entropy(leaf, target, **options)
    (gradient,) = torch.autograd.grad(loss, leaf)
    return loss.detach(), gradient


def make(shape, dtype=torch.float32):
    logits = (torch.randn(shape) * 3).to(dtype)
    target = torch.randint(0, shape[1], shape[:1] + shape[2:])
    target.view(-1)[1::7] = -100
    return logits, target


def assert_accurate(logits, target, **options):
    ours = loss_and_gradient(logits, target, **options)
    leaf = logits.double().requires_grad_()
    loss = F.cross_entropy(leaf, target, **options)
    truth = loss.detach(), torch.autograd.grad(loss, leaf)[0]
    eps = torch.finfo(logits.dtype).eps
    for our, true in zip(ours, truth, strict=True):
        torch.testing.assert_close(
            our.double(), true, rtol=8 * eps, atol=4 * eps * true.abs().max()
        )


@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "x".join(map(str, s)))
class TestEveryKernel:
    def test_results_do_not_depend_on_the_order_of_threads(self, emulator, shape):
        """A barrier that is missing shows here."""
        logits, target = make(shape)
        emulated.set_seed(1)
        first = loss_and_gradient(logits, target, label_smoothing=0.1)
        for seed in (2, 3):
            emulated.set_seed(seed)
            again = loss_and_gradient(logits, target, label_smoothing=0.1)
            assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    def test_accurate(self, device, shape, dtype):
        assert_accurate(*(t.to(device) for t in make(shape, dtype)))

    def test_accurate_on_a_device_without_clusters(self, emulator, shape):
        """And with too little shared memory for the longest rows, which are read twice."""
        emulated.set_device(compute_capability_major=8, shared_kilobytes=99)
        assert_accurate(*make(shape))

    def test_logits_at_any_address(self, device, shape):
        logits, target = (t.to(device) for t in make(shape))
        moved = torch.empty(logits.numel() + 1, device=device)[1:].view(shape)
        moved.copy_(logits)
        assert moved.data_ptr() % 16 != 0
        assert_accurate(moved, target)


def test_gradient_at_any_address(emulator):
    """The op may be called with a gradient of the caller's; rows of an odd number of classes."""
    logits, target = make((300, 9))
    moved = torch.empty(logits.numel() + 1)[1:].view(300, 9)
    assert moved.data_ptr() % 16 != 0
    arguments = torch.tensor(0.5), logits, target, None, -100, 0.0, 2
    torch.ops.mnist_ext.cross_entropy_gradient_(moved, *arguments)
    leaf = logits.double().requires_grad_()
    F.cross_entropy(leaf, target, reduction="sum").backward(torch.tensor(0.5).double())
    torch.testing.assert_close(moved.double(), leaf.grad, rtol=1e-5, atol=1e-6)


def test_launches(emulator):
    """One forward and one backward for a small batch; one more where the mean must count first."""
    for shape, expected in (((64, 10), [1, 1]), ((4000, 10), [2, 2])):
        logits, target = make(shape)
        leaf = logits.requires_grad_()
        before = emulated.launches()
        loss = functional.cross_entropy(leaf, target)
        between = emulated.launches()
        loss.backward()
        assert [between - before, emulated.launches() - between] == expected


@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "x".join(map(str, s)))
@pytest.mark.parametrize("bad", [-1, 2**40])
def test_bad_target_ends_the_kernel(emulator, shape, bad, capfd):
    logits, target = make(shape)
    target.view(-1)[-1] = bad
    with pytest.raises(IndexError):
        functional.cross_entropy(logits, target)
    # What the device prints, as its assertion cannot say more.
    assert f"got {bad} at position {target.numel() - 1}" in capfd.readouterr().out


# What only a device can show.


def on_gpu(shape, dtype=torch.float32):
    logits, target = make(shape, dtype)
    return logits.cuda(), target.cuda()


@pytest.mark.gpu
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "x".join(map(str, s)))
class TestOnGpu:
    def test_the_host_never_waits(self, shape):
        logits, target = on_gpu(shape)
        loss_and_gradient(logits, target)
        torch.cuda.set_sync_debug_mode("error")
        try:
            loss_and_gradient(logits, target)
            loss_and_gradient(logits, target, reduction="sum", label_smoothing=0.1)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    def test_cuda_graph(self, shape):
        logits, target = on_gpu(shape)
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            loss_and_gradient(logits, target)
        stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            loss, gradient = loss_and_gradient(logits, target)
        other = torch.randn_like(logits)
        logits.copy_(other)
        graph.replay()
        expected = loss_and_gradient(other, target)
        assert torch.equal(loss, expected[0])
        assert torch.equal(gradient, expected[1])

    def test_the_current_stream_is_used(self, shape):
        logits, target = on_gpu(shape)
        expected = loss_and_gradient(logits, target)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            torch.cuda._sleep(50_000_000)
            late = logits.clone()
            ours = loss_and_gradient(late, target)
        stream.synchronize()
        assert all(torch.equal(a, b) for a, b in zip(ours, expected, strict=True))

    def test_peak_memory_is_one_gradient(self, shape):
        logits, target = on_gpu(shape)
        loss_and_gradient(logits, target)
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        loss_and_gradient(logits, target)
        extra = torch.cuda.max_memory_allocated() - before
        assert extra <= logits.numel() * logits.element_size() + (64 << 10)

    def test_deterministic(self, shape):
        logits, target = on_gpu(shape)
        results = [loss_and_gradient(logits, target) for _ in range(3)]
        for again in results[1:]:
            assert all(torch.equal(a, b) for a, b in zip(results[0], again, strict=True))


@pytest.mark.gpu
def test_more_than_two_to_the_31_logits_on_gpu():
    logits = torch.randn(2**31 // 4096 + 3, 4096, dtype=torch.bfloat16, device="cuda")
    target = torch.arange(len(logits), device="cuda") % 4096
    loss = functional.cross_entropy(logits, target, reduction="none")
    expected = F.cross_entropy(logits[-4:].float(), target[-4:], reduction="none")
    torch.testing.assert_close(loss[-4:].float(), expected, rtol=1e-2, atol=1e-2)
