"""What only a device can show of cross_entropy and linear: streams, graphs, memory, and cuBLAS."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from accuracy import assert_as_accurate

from mnist_ext import functional

pytestmark = pytest.mark.gpu

LOGITS = [(64, 10), (4000, 32), (300, 257), (9, 5003), (2, 140_001), (3, 11, 1000)]
SIZES = [(64, 784, 128), (64, 64, 10), (357, 789, 333), (2048, 1024, 1024)]
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


def gradients(output, leaves, grad_output=None):
    return [output.detach(), *torch.autograd.grad(output, leaves, grad_output)]


def cross_entropy_case(shape, dtype):
    logits = torch.randn(shape, device="cuda", dtype=dtype).requires_grad_()
    target = torch.randint(0, shape[1], shape[:1] + shape[2:], device="cuda")
    return logits, lambda: gradients(functional.cross_entropy(logits, target), [logits])


def layer(sizes, dtype):
    batch, in_features, out_features = sizes
    shapes = (batch, in_features), (out_features, in_features), (out_features,)
    leaves = [torch.randn(s, device="cuda").to(dtype).requires_grad_() for s in shapes]
    return leaves, torch.randn(batch, out_features, device="cuda").to(dtype)


def linear_case(sizes, dtype):
    leaves, grad_output = layer(sizes, dtype)
    return leaves[0], lambda: gradients(
        functional.linear(*leaves, activation="relu"), leaves, grad_output
    )


def equal(first, second):
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize(
    ("case", "size", "dtype"),
    [
        *itertools.product([cross_entropy_case], LOGITS, [torch.float32]),
        *itertools.product([linear_case], SIZES, DTYPES),
    ],
)
class TestEachCall:
    def test_the_host_never_waits(self, case, size, dtype):
        _, call = case(size, dtype)
        call()
        torch.cuda.set_sync_debug_mode("error")
        try:
            call()
        finally:
            torch.cuda.set_sync_debug_mode("default")

    def test_cuda_graph(self, case, size, dtype):
        leaf, call = case(size, dtype)
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            call()
        stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            results = call()
        leaf.data.copy_(torch.randn_like(leaf))
        graph.replay()
        assert equal(results, call())

    def test_the_current_stream_is_used(self, case, size, dtype):
        leaf, call = case(size, dtype)
        expected, late = call(), leaf.detach().clone()
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            leaf.data.zero_()
            torch.cuda._sleep(50_000_000)
            leaf.data.copy_(late)
            ours = call()
        stream.synchronize()
        assert equal(ours, expected)


@pytest.mark.parametrize("shape", LOGITS, ids=str)
def test_peak_memory_is_one_gradient(shape):
    logits, call = cross_entropy_case(shape, torch.float32)
    call()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    call()
    extra = torch.cuda.max_memory_allocated() - before
    assert extra <= logits.numel() * logits.element_size() + (64 << 10)


def assert_error_within_cublas(sizes, dtype):
    leaves, grad_output = layer(sizes, dtype)
    doubles = [t.detach().double().requires_grad_() for t in leaves]
    truth = gradients(F.linear(*doubles), doubles, grad_output.double())
    torchs = gradients(F.linear(*leaves), leaves, grad_output)
    ours = gradients(functional.linear(*leaves), leaves, grad_output)
    for our, their, true in zip(ours, torchs, truth, strict=True):
        assert_as_accurate(our, their, true, factor=1.1)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_error_within_cublas(sizes, dtype):
    assert_error_within_cublas(sizes, dtype)


@pytest.mark.parametrize("sizes", [(357, 789, 333), (512, 512, 512)], ids=str)
def test_tf32_error_within_cublas(sizes, monkeypatch):
    """By mma.sync, and by wgmma where the GPU has it."""
    monkeypatch.setattr(torch.backends.cuda.matmul, "fp32_precision", "tf32")
    assert_error_within_cublas(sizes, torch.float32)


def test_more_than_two_to_the_31_logits():
    logits = torch.randn(2**31 // 4096 + 3, 4096, dtype=torch.bfloat16, device="cuda")
    target = torch.arange(len(logits), device="cuda") % 4096
    loss = functional.cross_entropy(logits, target, reduction="none")
    expected = F.cross_entropy(logits[-4:].float(), target[-4:], reduction="none")
    torch.testing.assert_close(loss[-4:].float(), expected, rtol=1e-2, atol=1e-2)


def test_more_than_two_to_the_31_elements():
    input = torch.randn(2**31 // 4096 + 3, 4096, dtype=torch.bfloat16, device="cuda")
    weight = torch.randn(16, 4096, dtype=torch.bfloat16, device="cuda")
    output = functional.linear(input, weight)
    expected = input[-4:].float() @ weight.float().t()
    torch.testing.assert_close(output[-4:].float(), expected, rtol=1e-2, atol=1e-1)
