"""The kernels of cross-entropy that are CUDA's: one for each shape, on the emulator and on a GPU.

The tests of the op run on them too.
"""

import emulated
import pytest
import torch
import torch.nn.functional as F

from mnist_ext import functional

# One for each kernel: a thread to a row, in one block and in several, with padded rows; a warp and
# a block to a row, with rows that do not begin at multiples of 16 bytes; positions side by side.
SHAPES = [(64, 10), (700, 10), (4000, 32), (300, 257), (9, 5003), (3, 11, 1000)]


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

    def test_logits_at_any_address(self, device, shape):
        logits, target = (t.to(device) for t in make(shape))
        moved = torch.empty(logits.numel() + 1, device=device)[1:].view(shape)
        moved.copy_(logits)
        assert moved.data_ptr() % 16 != 0
        assert_accurate(moved, target)


def test_a_gradient_of_one_is_left_alone(emulator):
    """The forward has already made it: the kernel writes nothing."""
    logits, target = make((64, 10))
    gradient = torch.full_like(logits, 7)
    arguments = torch.tensor(1.0), logits, target, None, -100, 0.0, 2
    torch.ops.mnist_ext.cross_entropy_gradient_(gradient, *arguments)
    assert (gradient == 7).all()


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
