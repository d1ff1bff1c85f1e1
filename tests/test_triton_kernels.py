"""The Triton kernels of the convolution and the loss against plain torch in float64: on a GPU, or in Triton's interpreter."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from flowhn.models.mixers.conv import causal_conv, causal_conv_silu
from flowhn.training.loss import IGNORE, token_loss, training_loss
from interpreter import interpret, needs_interpreter

SHAPES = [(2, 37, 150, 4), (1, 1, 5, 4), (3, 2, 128, 3), (1, 70, 300, 4)]  # batch, tokens, channels, taps


def conv_case(shape, device, dtype):
    """x is the second half of a wider tensor, as in the mixers; returns leaves in float64 and inputs."""
    n_batch, n_tokens, n_channels, taps = shape
    generator = torch.Generator().manual_seed(n_tokens)
    wide = torch.randn(n_batch, n_tokens, 2 * n_channels, generator=generator).to(device, dtype)
    weight = torch.randn(n_channels, 1, taps, generator=generator).to(device)
    bias = torch.randn(n_channels, generator=generator).to(device)
    dy = torch.randn(n_batch, n_tokens, n_channels, generator=generator).to(device, dtype)
    return wide, weight, bias, dy


def conv_reference(wide, weight, bias, dy):
    leaves = [wide.chunk(2, -1)[1].double(), weight.double(), bias.double()]
    leaves = [leaf.detach().requires_grad_() for leaf in leaves]
    y = F.silu(causal_conv(*leaves))
    y.backward(dy.double())
    return [y.detach(), *(leaf.grad for leaf in leaves)]


def relative(found, wanted) -> float:
    return float((found.double() - wanted).norm() / wanted.norm().clamp_min(1e-12))


def check_conv(compare, function, subject, shape, dtype, limit):
    wide, weight, bias, dy = conv_case(shape, "cuda", dtype)
    expected = conv_reference(wide, weight, bias, dy)
    leaves = [leaf.clone().requires_grad_() for leaf in (wide, weight, bias)]
    y = function(leaves[0].chunk(2, -1)[1], *leaves[1:], kernel="triton")
    y.backward(dy)
    found = [y.detach(), leaves[0].grad.chunk(2, -1)[1], leaves[1].grad, leaves[2].grad]
    errors = [relative(a, b) for a, b in zip(found, expected, strict=True)]
    name = f"{subject}, {str(dtype)[6:]}"
    compare(name, "plain torch in float64", "output", errors[0], limit)
    compare(name, "plain torch in float64", "gradients", max(errors[1:]), limit)


DTYPES = pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])


@pytest.mark.gpu
@DTYPES
@pytest.mark.parametrize("shape", [*SHAPES, (4, 447, 1536, 4), (2, 1023, 160, 4), (1, 4096, 200, 4)])
def test_convolution_on_the_gpu(shape, dtype, limit, compare):
    check_conv(compare, causal_conv_silu, "Triton convolution with SiLU", shape, dtype, limit)


@pytest.mark.gpu
@DTYPES
@pytest.mark.parametrize("shape", [SHAPES[0], (4, 447, 1536, 4)])
def test_compiled_convolution_on_the_gpu(shape, dtype, limit, compare):
    torch._dynamo.reset()  # each shape compiles anew, up to torch's recompile limit
    compiled = torch.compile(causal_conv_silu, dynamic=False, fullgraph=True)
    check_conv(compare, compiled, "Triton convolution with SiLU, compiled", shape, dtype, limit)


@pytest.mark.gpu
@DTYPES
@pytest.mark.parametrize("n_tokens", [1, 33, 1023])
@pytest.mark.parametrize("n_classes", [65_536, 2048, 1000])
def test_loss_on_the_gpu(n_classes, n_tokens, dtype, limit, compare):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(2, n_tokens, 64, generator=generator)
    weight = torch.randn(n_classes, 64, generator=generator) / 4
    labels = torch.randint(n_classes, (2, n_tokens), generator=generator)
    labels[0, 3:9] = IGNORE
    results = []
    for kind, function in ((torch.float64, token_loss), (torch.float32, training_loss)):
        leaves = [leaf.to("cuda", kind).requires_grad_() for leaf in (hidden, weight)]
        with torch.autocast("cuda", dtype=dtype, enabled=kind == torch.float32 and dtype == torch.bfloat16):
            loss = function(leaves[0], leaves[1], None, labels.cuda())
        (3 * loss).backward()
        results.append([loss.detach(), *(leaf.grad for leaf in leaves)])
    errors = [relative(a, b.double()) for a, b in zip(results[1], results[0], strict=True)]
    name = f"Triton cross-entropy, {str(dtype)[6:]}"
    compare(name, "plain torch in float64", "loss", errors[0], limit)
    compare(name, "plain torch in float64", "gradients", max(errors[1:]), limit)


def test_without_cuda_the_plain_paths_run():
    hidden, weight = torch.randn(1, 4, 8), torch.randn(16, 8)
    labels = torch.tensor([[1, 2, IGNORE, 3]])
    assert torch.equal(training_loss(hidden, weight, None, labels), token_loss(hidden, weight, None, labels))
    x, taps, bias = torch.randn(1, 5, 3), torch.randn(3, 1, 4), torch.randn(3)
    assert torch.equal(causal_conv_silu(x, taps, bias, kernel="mamba_ssm"), F.silu(causal_conv(x, taps, bias)))


INTERPRETED = """
import torch
from torch.nn import functional as F
from test_triton_kernels import SHAPES, conv_case, conv_reference, relative
from flowhn.models.mixers.conv_triton import conv_silu_backward, conv_silu_forward
from flowhn.training import cross_entropy_triton

for shape in SHAPES:
    wide, weight, bias, dy = conv_case(shape, "cpu", torch.float32)
    x, taps = wide.chunk(2, -1)[1], weight.squeeze(1).contiguous()
    dx, dw, dbias = conv_silu_backward(dy, x, taps, bias)
    found = [conv_silu_forward(x, taps, bias), dx, dw[:, None], dbias]
    assert max(relative(a, b) for a, b in zip(found, conv_reference(wide, weight, bias, dy))) < 1e-5, shape
for rows, classes, block in ((7, 1000, 256), (3, 64, 8192), (5, 513, 128)):
    logits, labels = torch.randn(rows, classes) * 5, torch.randint(classes, (rows,))
    labels[2] = -100
    leaf = logits.double().requires_grad_()
    loss = F.cross_entropy(leaf, labels)
    loss.backward()
    share = 1 / (labels != -100).sum().float()
    losses = cross_entropy_triton.cross_entropy_and_gradient_(logits, labels, share, -100, block=block)
    assert relative(losses.sum() * share, loss.detach()) < 1e-5
    assert relative(logits, leaf.grad) < 1e-5
"""


@needs_interpreter
def test_kernels_in_the_interpreter():
    interpret(INTERPRETED)
