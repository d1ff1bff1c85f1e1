"""On a GPU: mamba_ssm's SSD, SDPA's kernels and whole mixers at the paper's sizes against plain torch in float64."""

from __future__ import annotations

import math
from contextlib import contextmanager

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from flowhn.models import kernels
from flowhn.models.mixers import Attention, Mamba1, Mamba2
from flowhn.models.mixers.attention import flash_takes, window_mask
from flowhn.models.mixers.ssd import ssd_scan
from flowhn.models.mixers.ssd_cuda import mamba_ssm_ssd
from flowhn.models.splits.base import count, gather

pytestmark = pytest.mark.gpu
LENGTHS = (1, 2, 7, 64, 255, 447, 1023, 4096)
# bfloat16 has 8 bits; float32 products may run in TF32 (11 bits) inside other people's kernels.
LIMIT = {torch.bfloat16: 5e-2, torch.float32: 5e-3}
each_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])


def relative(found, wanted) -> float:
    """Root mean square of the difference over that of the reference."""
    return float((found.double() - wanted.double()).norm() / wanted.double().norm().clamp_min(1e-12))


def compare_all(compare, subject, oracle, dtype, found, wanted):
    """The first tensor is the output, the others are gradients."""
    errors = [relative(a, b) for a, b in zip(found, wanted, strict=True)]
    name = f"{subject}, {str(dtype)[6:]}"
    compare(name, oracle, "output", errors[0], LIMIT[dtype])
    compare(name, oracle, "gradients", max(errors[1:]), LIMIT[dtype])


def needs_mamba_ssm():
    usable, reason = kernels.kernel_status()["mamba_ssm"]
    if not usable:
        pytest.skip(f"mamba_ssm is {reason}")


@contextmanager
def few_tiles():
    """Two tile sizes for each of mamba_ssm's SSD kernels: it would try up to a dozen and compile them all."""
    if not kernels.kernel_status()["mamba_ssm"][0]:
        yield
        return
    from mamba_ssm.ops.triton import ssd_bmm, ssd_chunk_scan, ssd_chunk_state, ssd_combined, ssd_state_passing

    modules = (ssd_bmm, ssd_chunk_scan, ssd_chunk_state, ssd_combined, ssd_state_passing)
    members = {id(member): member for module in modules for member in vars(module).values()}
    tuned = [member for member in members.values() if isinstance(getattr(member, "configs", None), list)]
    with pytest.MonkeyPatch.context() as patch:
        for member in tuned:
            patch.setattr(member, "configs", member.configs[-2:])
            patch.setattr(
                member, "cache", {}, raising=False
            )  # of the best tile by shape: what is found here is not for other tests
        yield


@pytest.fixture(scope="module", name="few_tiles")
def few_tiles_of_a_module():
    with few_tiles():
        yield


def ssd_case(n_tokens, dtype, *, heads=6, headdim=64, groups=1, n_states=128):
    """x, dt, A, B, C, D, dt_bias as Mamba2 hands them over, and y's gradient."""
    generator = torch.Generator("cuda").manual_seed(n_tokens)
    randn = lambda *shape: torch.randn(*shape, generator=generator, device="cuda")  # noqa: E731
    shared = [randn(2, n_tokens, groups, n_states).to(dtype) / n_states**0.25 for _ in range(2)]
    leaves = [randn(2, n_tokens, heads, headdim).to(dtype), randn(2, n_tokens, heads).to(dtype)]
    leaves += [-torch.rand(heads, generator=generator, device="cuda") * 8 - 1, *shared, randn(heads), randn(heads) - 4]
    return leaves, randn(2, n_tokens, heads, headdim).to(dtype)


def run(function, leaves, dy):
    leaves = [leaf.detach().requires_grad_() for leaf in leaves]
    y = function(*leaves)
    return [y.detach(), *torch.autograd.grad(y, leaves, dy.to(y.dtype))]


def plain_ssd(x, dt, A, B, C, D, bias):
    return ssd_scan(x, F.softplus(dt + bias), A, B, C, chunk_size=64) + D[:, None] * x


@each_dtype
@pytest.mark.parametrize(("n_tokens", "chunk_size"), [*((n_tokens, 256) for n_tokens in LENGTHS), (447, 128)])
def test_ssd(n_tokens, chunk_size, dtype, compare, request):
    needs_mamba_ssm()
    request.getfixturevalue("few_tiles")
    leaves, dy = ssd_case(n_tokens, dtype)
    wanted = run(plain_ssd, [leaf.double() for leaf in leaves], dy.double())
    found = run(lambda *inputs: mamba_ssm_ssd(*inputs, chunk_size=chunk_size), leaves, dy)
    compare_all(compare, "mamba_ssm SSD", "plain SSD in float64", dtype, found, wanted)


def mixer_run(mixer, x, dy, *, autocast=False):
    """Output and gradients of input and parameters."""
    mixer.zero_grad(set_to_none=True)
    x = x.detach().requires_grad_()
    with torch.autocast("cuda", torch.bfloat16, enabled=autocast):
        y = mixer(x)
    y.backward(dy.to(y.dtype))
    return [y.detach(), x.grad, *(parameter.grad for parameter in mixer.parameters())]


class NaiveAttention(nn.Module):
    """The mixer's formula with every score in memory."""

    def __init__(self, mixer):
        super().__init__()
        self.mixer = mixer

    def forward(self, x):
        m, n_tokens = self.mixer, x.shape[1]
        k, v = (t.repeat_interleave(m.n_heads // m.n_kv_heads, 1) for t in m.project_kv(x))
        q = m._rotate(m.q_proj(x).unflatten(-1, (m.n_heads, m.d_head)).transpose(1, 2), None)
        sees = window_mask(n_tokens, m.sliding_window or n_tokens, m.n_meta_tokens, x.device)
        scores = (q @ k.transpose(2, 3) / math.sqrt(m.d_head)).masked_fill(~sees, -torch.inf)
        return m.o_proj((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))


ATTENTIONS = {
    "d_head 24, grouped (FlowHN 135m)": {"d_model": 192, "n_heads": 8, "n_kv_heads": 2},
    "d_head 64, grouped, RoPE": {"d_model": 256, "n_heads": 4, "n_kv_heads": 1, "rope": True},
    "window and meta tokens (Hymba)": {
        "d_model": 192, "n_heads": 8, "n_kv_heads": 4, "rope": True, "sliding_window": 256, "n_meta_tokens": 128,
    },
}  # fmt: skip


@each_dtype
@pytest.mark.parametrize("n_tokens", LENGTHS)
@pytest.mark.parametrize("name", ATTENTIONS)
def test_attention(name, n_tokens, dtype, compare):
    torch.manual_seed(n_tokens)
    with torch.device("cuda"):
        mixer = Attention(**ATTENTIONS[name])
        x, dy = torch.randn(1, n_tokens, mixer.d_model), torch.randn(1, n_tokens, mixer.d_model)
    found = mixer_run(mixer, x, dy, autocast=dtype == torch.bfloat16)
    wanted = mixer_run(NaiveAttention(mixer).double(), x.double(), dy.double())
    if n_tokens == 1:  # one key: the scores do not matter, and their gradients are zero
        keys = [key for key, _ in mixer.named_parameters()]
        kept = [i for i in range(len(found)) if i < 2 or keys[i - 2] not in ("q_proj.weight", "k_proj.weight")]
        found, wanted = ([tensors[i] for i in kept] for tensors in (found, wanted))
    compare_all(compare, f"attention, {name}", "softmax of all scores in float64", dtype, found, wanted)


class Asking(nn.Module):
    """The outputs of the tokens that ask."""

    def __init__(self, mixer, queries):
        super().__init__()
        self.mixer, self.queries = mixer, queries

    def forward(self, x):
        if isinstance(self.mixer, Attention):
            return self.mixer(x, queries=self.queries)
        return gather(self.mixer(x), self.queries)


@pytest.mark.parametrize("queries", [((0, 447),), ((577, 1024),), ((130, 577),), ((0, 317), (894, 1024))])
@pytest.mark.parametrize("name", list(ATTENTIONS)[:2])
def test_attention_of_some_tokens_to_all(name, queries, compare):
    """split.keys=all on flash attention's own causal mask, under autocast and compiled as training runs it."""
    torch.manual_seed(queries[0][1])
    with torch.device("cuda"):
        mixer = Attention(**ATTENTIONS[name])
        x, dy = torch.randn(2, 1024, mixer.d_model), torch.randn(2, count(queries), mixer.d_model)
        assert flash_takes(torch.empty(1, 1, 1, mixer.d_head, dtype=torch.bfloat16))
    found = mixer_run(torch.compile(Asking(mixer, queries), fullgraph=True, dynamic=False), x, dy, autocast=True)
    wanted = mixer_run(Asking(NaiveAttention(mixer), queries).double(), x.double(), dy.double())
    compare_all(
        compare, f"attention to all keys, {name}", "softmax of all scores in float64", torch.bfloat16, found, wanted
    )


MIXERS = {
    "Mamba-1 (FlowHN 135m)": lambda: Mamba1(d_model=768, bcdt_rms_norm=True),
    "Mamba-2 (135m)": lambda: Mamba2(d_model=768),
}


@pytest.mark.parametrize("n_tokens", [1, 447, 1023])
@pytest.mark.parametrize("name", MIXERS)
def test_whole_mixer(name, n_tokens, compare, request):
    """Projections, convolution, scan, norms and gate as training runs them: under bfloat16 autocast, by auto."""
    if "Mamba-2" in name:
        request.getfixturevalue("few_tiles")
    torch.manual_seed(n_tokens)
    # Of one token alone the gradients of dt, B and C hang on one product of B and C, which may cancel to nothing but rounding.
    rows = 64 if n_tokens == 1 else 1
    with torch.device("cuda"):
        mixer = MIXERS[name]()
        x, dy = torch.randn(rows, n_tokens, 768), torch.randn(rows, n_tokens, 768)
    found = mixer_run(mixer, x, dy, autocast=True)
    subject = f"{name} on {mixer.kernel('cuda')}"
    mixer.backend = "torch"
    wanted = mixer_run(mixer.double(), x.double(), dy.double())
    if n_tokens == 1:  # a state that starts from zero does not decay: A has no gradient
        keys = ["output", "input", *(key for key, _ in mixer.named_parameters())]
        kept = [i for i, key in enumerate(keys) if key != "A_log"]
        found, wanted = ([tensors[i] for i in kept] for tensors in (found, wanted))
    compare_all(compare, subject, "plain torch in float64", torch.bfloat16, found, wanted)
