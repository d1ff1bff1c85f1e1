"""Which kernels are taken, what a missing or broken package does, and the calls made to packages that cannot run here.

mamba_ssm and flash_attn need a GPU: on CPU, fakes stand in for them that check the arguments, compute the result in
plain torch and record that they were called.
"""

from __future__ import annotations

import sys
import types
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from flowhn.errors import UserError
from flowhn.models import kernels
from flowhn.models.mixers import Attention, Mamba1, Mamba2, attention, mamba1, mamba2, scan_triton
from flowhn.models.mixers.scan import scan_backward, scan_forward
from flowhn.models.mixers.ssd import ssd_scan

SSD_MODULE = "mamba_ssm.ops.triton.ssd_combined"


@pytest.fixture(autouse=True)
def fresh_cache():
    kernels.clear_cache()
    yield
    kernels.clear_cache()


def fake_module(monkeypatch, name, **members):
    """Put a module and its parent packages into sys.modules."""
    parts = name.split(".")
    for i in range(1, len(parts) + 1):
        module = types.ModuleType(".".join(parts[:i]))
        if i == len(parts):
            module.__dict__.update(members)
        monkeypatch.setitem(sys.modules, module.__name__, module)
    return module


def install_fake_mamba_ssm(monkeypatch):
    """Fakes of selective_scan_cuda and ssd_combined; returns the list of calls made."""
    calls = []

    def to_tokens(*tensors):
        return [t.squeeze(1).transpose(1, 2) if t.dim() == 4 else t.transpose(1, 2) for t in tensors]

    def check_scan(u, delta, A, B, C, D, z, bias, softplus):
        batch, _, n_tokens = u.shape
        assert z is None
        assert softplus is True
        assert delta.shape == u.shape
        assert B.shape == C.shape == (batch, 1, A.shape[1], n_tokens)
        assert {t.dtype for t in (u, delta, B, C)} == {u.dtype}
        assert {t.dtype for t in (A, D, bias)} == {torch.float32}
        assert all(t.stride(-1) == 1 for t in (u, delta, B, C, A, D, bias))

    def scan_fwd(*args):
        check_scan(*args)
        calls.append("scan_fwd")
        u, delta, A, B, C, D, _, bias, _ = args
        x, dt, B, C = to_tokens(u.float(), F.softplus(delta.float() + bias[:, None]), B.float(), C.float())
        y, _ = scan_forward(x.contiguous(), dt, A, B, C)
        states = torch.zeros(u.shape[0], u.shape[1], -(-u.shape[2] // 2048), 2 * A.shape[1])
        return [(y + D * x).transpose(1, 2).to(u.dtype).contiguous(), states]

    def scan_bwd(u, delta, A, B, C, D, z, bias, dy, states, out, dz, softplus, recompute_out_z):
        check_scan(u, delta, A, B, C, D, z, bias, softplus)
        assert out is None
        assert dz is None
        assert recompute_out_z is False
        assert dy.stride(-1) == 1
        assert states.shape == (u.shape[0], u.shape[1], 1, 2 * A.shape[1])
        calls.append("scan_bwd")
        dt_raw = delta.float() + bias[:, None]
        x, dt, B, C, g = to_tokens(u.float(), F.softplus(dt_raw), B.float(), C.float(), dy.float())
        _, kept = scan_forward(x.contiguous(), dt, A, B, C)
        dx, ddt, dA, dB, dC = scan_backward(g, x.contiguous(), dt, A, B, C, kept)
        ddelta = ddt.transpose(1, 2) * torch.sigmoid(dt_raw)
        back = [t.transpose(1, 2).unsqueeze(1) for t in (dB, dC)]
        return [(dx + D * g).transpose(1, 2), ddelta, dA, *back, (g * x).sum((0, 1)), ddelta.sum((0, 2))]

    def ssd(x, dt, A, B, C, D, bias):
        return ssd_scan(x, F.softplus(dt + bias), A, B, C, chunk_size=8) + D[:, None] * x

    def ssd_fwd(x, dt, A, B, C, chunk_size, D=None, z=None, dt_bias=None, dt_softplus=False):
        assert z is None
        assert dt_softplus is True
        assert x.dtype == dt.dtype == B.dtype == C.dtype
        assert A.shape == D.shape == dt_bias.shape == x.shape[2:3] == dt.shape[2:]
        assert B.shape == C.shape
        assert B.dim() == 4
        calls.append(("ssd_fwd", chunk_size))
        return ssd(x, dt, A, B, C, D, dt_bias), None, None, None, None, None

    def ssd_bwd(dy, x, dt, A, B, C, out, chunk_size, D=None, z=None, dt_bias=None, dt_softplus=False):
        assert dt_softplus is True
        assert out.shape == dy.shape == x.shape
        calls.append(("ssd_bwd", chunk_size))

        def differentiate():
            leaves = [t.detach().requires_grad_() for t in (x, dt, A, B, C, D, dt_bias)]
            return torch.autograd.grad(ssd(*leaves), leaves, dy)

        # An operator's body runs below autograd; another thread starts above it.
        with ThreadPoolExecutor(1) as pool:
            *five, dD, dbias = pool.submit(differentiate).result()
        return *five, dD, None, dbias, None

    fake_module(monkeypatch, "selective_scan_cuda", fwd=scan_fwd, bwd=scan_bwd)
    halves = {"_mamba_chunk_scan_combined_fwd": ssd_fwd, "_mamba_chunk_scan_combined_bwd": ssd_bwd}
    fake_module(monkeypatch, SSD_MODULE, **halves)
    for module in (mamba1, mamba2):
        monkeypatch.setattr(module, "resolve_ssm", lambda requested, device, has_triton=False: "mamba_ssm")
    return calls


def output_and_grads(mixer, x):
    mixer.zero_grad()
    x = x.clone().requires_grad_()
    y = mixer(x)
    y.square().sum().backward()
    return [y.detach(), x.grad, *(p.grad.clone() for p in mixer.parameters())]


@pytest.mark.parametrize("build", [
    lambda: Mamba1(d_model=12, d_state=4, bcdt_rms_norm=True),
    lambda: Mamba2(d_model=12, d_state=6, headdim=4, n_groups=2, chunk_size=16),
])  # fmt: skip
def test_mamba_ssm_path_gives_the_plain_result(monkeypatch, build):
    torch.manual_seed(0)
    mixer, x = build(), torch.randn(2, 21, 12)
    plain = output_and_grads(mixer, x)
    calls = install_fake_mamba_ssm(monkeypatch)
    for ours, expected in zip(output_and_grads(mixer, x), plain, strict=True):
        torch.testing.assert_close(ours, expected, rtol=2e-4, atol=1e-5)
    names = [call if isinstance(call, str) else call[0] for call in calls]
    assert names in (["scan_fwd", "scan_bwd"], ["ssd_fwd", "ssd_bwd"])
    assert all(call[1] == 16 for call in calls if not isinstance(call, str))


@pytest.mark.parametrize("mixer", [Mamba1(d_model=12, d_state=4), Mamba2(d_model=12, d_state=6, headdim=4)])
def test_mamba_ssm_path_compiles_without_graph_break(monkeypatch, mixer):
    install_fake_mamba_ssm(monkeypatch)
    torch.compiler.reset()
    x = torch.randn(2, 21, 12)
    compiled = torch.compile(mixer, backend="aot_eager", fullgraph=True)
    y = compiled(x)
    y.sum().backward()
    torch.testing.assert_close(y, mixer(x), rtol=1e-4, atol=1e-5)


def test_mamba_ssm_path_under_autocast(monkeypatch):
    """The checks inside the fakes hold for bfloat16 activations over float32 parameters too."""
    calls = install_fake_mamba_ssm(monkeypatch)
    with torch.autocast("cpu", torch.bfloat16):
        y = Mamba1(d_model=12, d_state=4, bcdt_rms_norm=True)(torch.randn(2, 9, 12))
    y.float().sum().backward()
    assert y.dtype == torch.bfloat16
    assert calls == ["scan_fwd", "scan_bwd"]


def install_fake_flash_attn(monkeypatch):
    calls = []

    def flash_attn_func(q, k, v, *, causal, window_size):
        assert causal is True
        assert {t.dtype for t in (q, k, v)} == {torch.bfloat16}
        assert k.shape == v.shape
        assert q.shape[:2] == k.shape[:2]
        calls.append((tuple(q.shape), tuple(k.shape), window_size))
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        behind = q.shape[2] if window_size[0] < 0 else window_size[0]
        mask = attention.window_mask(q.shape[2], behind + 1, 0, q.device)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True).transpose(1, 2)

    fake_module(monkeypatch, "flash_attn", flash_attn_func=flash_attn_func)
    monkeypatch.setattr(attention, "resolve_attention", lambda requested, device: "flash_attn")
    return calls


@pytest.mark.parametrize(("window", "n_meta", "expected"), [
    (None, 0, (-1, -1)), (8, 0, (7, 0)), (64, 0, (-1, -1)), (64, 2, (-1, -1)), (8, 2, None),
])  # fmt: skip
def test_flash_attn_path(monkeypatch, window, n_meta, expected):
    """Layout (B, T, heads, d_head), the window's meaning, and SDPA where a window must show meta tokens."""
    torch.manual_seed(0)
    mixer = Attention(
        d_model=32, n_heads=4, n_kv_heads=2, sliding_window=window, n_meta_tokens=n_meta, rope=True
    ).bfloat16()
    x = torch.randn(2, 20, 32, dtype=torch.bfloat16)
    plain = mixer(x)
    calls = install_fake_flash_attn(monkeypatch)
    torch.testing.assert_close(mixer(x), plain, rtol=3e-2, atol=3e-2)
    assert calls == ([] if expected is None else [((2, 20, 4, 8), (2, 20, 2, 8), expected)])


def test_flash_attn_refuses_float32(monkeypatch):
    install_fake_flash_attn(monkeypatch)
    with pytest.raises(UserError, match="bf16-mixed"):
        Attention(d_model=32, n_heads=4)(torch.randn(1, 4, 32))


# Resolution


def test_auto_is_plain_torch_without_packages():
    for device in ("cpu", "mps", "meta"):
        assert kernels.resolve_ssm("auto", device) == "torch"
        assert kernels.resolve_attention("auto", device) == "sdpa"
    status = kernels.kernel_status()
    assert set(status) == {"mamba_ssm", "flash_attn"}


@pytest.mark.parametrize(("resolve", "name"), [
    (kernels.resolve_ssm, "mamba_ssm"), (kernels.resolve_attention, "flash_attn"),
])  # fmt: skip
def test_asked_by_name_but_unusable(monkeypatch, resolve, name):
    def missing():
        raise ModuleNotFoundError(f"No module named {name!r}")

    monkeypatch.setitem(kernels._PROBES, name, missing)
    for device in ("cpu", "cuda"):
        with pytest.raises(UserError, match=r"pip install 'flowhn\[gpu\]'"):
            resolve(name, device)


@pytest.mark.parametrize("resolve", [kernels.resolve_ssm, kernels.resolve_attention])
def test_unknown_name(resolve):
    with pytest.raises(UserError, match="choose one of auto"):
        resolve("warp", "cpu")


@pytest.mark.parametrize("body", [
    "raise OSError('libcudart.so.99: cannot open shared object file')", "raise RuntimeError('bad build\\nline two')",
    "import no_such_dependency", "import sys; sys.exit", "raise SystemError",
])  # fmt: skip
def test_broken_package_counts_as_unusable(monkeypatch, tmp_path, body):
    (tmp_path / "flash_attn.py").write_text(body)
    (tmp_path / "selective_scan_cuda.py").write_text(body)
    monkeypatch.syspath_prepend(tmp_path)
    for name in ("flash_attn", "selective_scan_cuda"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    for usable, reason in kernels.kernel_status().values():
        assert not usable
        assert reason.startswith(("broken", "not installed"))
        assert "\n" not in reason
    assert kernels.resolve_ssm("auto", "cuda") == "torch"
    for name in ("flash_attn", "selective_scan_cuda"):
        sys.modules.pop(name, None)


def test_usable_package_is_taken_on_cuda_alone(monkeypatch):
    monkeypatch.setitem(kernels._PROBES, "mamba_ssm", lambda: None)
    monkeypatch.setitem(kernels._PROBES, "flash_attn", lambda: None)
    assert kernels.resolve_ssm("auto", "cuda") == "mamba_ssm"
    assert kernels.resolve_ssm("auto", "cpu") == "torch"
    assert kernels.resolve_attention("flash_attn", "cuda") == "flash_attn"
    assert kernels.resolve_attention("auto", "cuda") == "sdpa"
    with pytest.raises(UserError, match="the device is cpu"):
        kernels.resolve_ssm("mamba_ssm", "cpu")


def test_probe_accepts_the_functions_that_are_called(monkeypatch):
    install_fake_mamba_ssm(monkeypatch)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert kernels.kernel_status()["mamba_ssm"] == (True, "usable")
    del sys.modules[SSD_MODULE]._mamba_chunk_scan_combined_bwd
    kernels.clear_cache()
    usable, reason = kernels.kernel_status()["mamba_ssm"]
    assert not usable
    assert "_mamba_chunk_scan_combined_bwd" in reason


def test_kernels_used(monkeypatch):
    monkeypatch.setitem(kernels._PROBES, "flash_attn", lambda: None)
    windowed = Attention(d_model=8, n_heads=2, sliding_window=4, n_meta_tokens=2, backend="flash_attn")
    full = Attention(d_model=8, n_heads=2, backend="flash_attn")
    assert kernels.kernels_used(nn.ModuleList([windowed, full]), "cuda")["attention"] == "flash_attn+sdpa"
    assert kernels.kernels_used(nn.ModuleList([Mamba1(d_model=8)]), "cpu") == {"ssm": "torch", "attention": None}


def test_registers_are_capped_on_hopper_and_later_alone(monkeypatch):
    asked = kernels.takes_register_caps.__wrapped__  # its answers are cached by device
    assert not asked(torch.device("cpu"))
    for capability, hip, wanted in (
        ((8, 9), None, False),
        ((9, 0), None, True),
        ((10, 0), None, True),
        ((9, 4), "6", False),
    ):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, found=capability: found)
        monkeypatch.setattr(torch.version, "hip", hip)
        assert asked(torch.device("cuda", 0)) is wanted
    monkeypatch.setattr(scan_triton, "takes_register_caps", lambda device: device.type == "cuda")
    cut = [int(value) for value in vars(scan_triton.DEFAULT_TILES).values()]
    assert scan_triton._registers(cut, 8, torch.device("cuda")) == {"maxnreg": cut[8]} != {"maxnreg": 0}
    assert (
        scan_triton._registers(cut, 9, torch.device("cuda"))
        == scan_triton._registers(cut, 8, torch.device("cpu"))
        == {}
    )
