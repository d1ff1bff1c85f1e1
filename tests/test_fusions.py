"""Every fusion in the package, found by listing it: its equation, its shapes, no look-ahead, gradients to both branches."""

from __future__ import annotations

import copy
import importlib
import inspect
import pkgutil
from functools import partial

import pytest
import torch
import yaml
from torch.nn import functional as F

from flowhn.config import build_model, check_targets, compose, config_dir, to_dict
from flowhn.errors import UserError
from flowhn.models import fusions as package
from flowhn.models.blocks import ParallelBlock
from flowhn.models.fusions import (
    ConcatProj,
    CrossFusion,
    Fusion,
    GatedFusion,
    MeanFusion,
    NoFusion,
    NormMeanFusion,
    SumFusion,
)
from flowhn.models.mixers import Attention, Mamba1
from flowhn.models.splits import (
    AlternatingEqualSplit,
    FlopAwareCirculatingSplit,
    FlopAwareSplit,
    NoSplit,
    TokenSplit,
)

FULL = TokenSplit(5, ((0, 5),), ((0, 5),))
PART = TokenSplit(5, ((0, 1), (3, 5)), ((1, 3),))
SPLITS = {
    "no": NoSplit,
    "ae": AlternatingEqualSplit,
    "fa": FlopAwareSplit,
    "fac": FlopAwareCirculatingSplit,
    "fac-w5": partial(FlopAwareCirculatingSplit, window=5),
    "attention-empty": partial(FlopAwareSplit, ratio=0.0),
    "ssm-empty": partial(FlopAwareSplit, ratio=1.0),
}


def fusions() -> list[type[Fusion]]:
    """Concrete fusions of all modules of the package."""
    found = set()
    for module in pkgutil.iter_modules(package.__path__, package.__name__ + "."):
        for _, item in inspect.getmembers(importlib.import_module(module.name), inspect.isclass):
            if issubclass(item, Fusion) and not inspect.isabstract(item):
                found.add(item)
    return sorted(found, key=lambda cls: cls.__name__)


# (fusion, full): `none` exists in split modes only
CASES = [(cls, full) for cls in fusions() for full in (True, False) if not (full and cls is NoFusion)]
PAIRS = [(cls, name) for cls in fusions() for name in SPLITS if not (name == "no" and cls is NoFusion)]


def make(cls: type[Fusion], *, d_model: int = 3, full: bool, **options) -> Fusion:
    torch.manual_seed(0)
    return cls(d_model=d_model, full=full, **options)


def branches(split: TokenSplit, *, d_model: int = 3, dtype: torch.dtype = torch.float32, leaf: bool = False):
    generator = torch.Generator().manual_seed(1)
    made = (torch.randn(2, n, d_model, generator=generator).to(dtype) for n in (split.n_attn, split.n_ssm))
    return [y.requires_grad_(leaf) for y in made]


def block_with(cls, split, *, layer_idx: int = 0, **options) -> ParallelBlock:
    torch.manual_seed(layer_idx)
    return ParallelBlock(
        d_model=16,
        d_ff=24,
        attention=lambda: Attention(d_model=16, n_heads=2),
        ssm=lambda: Mamba1(d_model=16, d_state=4),
        split=split,
        fusion=partial(cls, **options),
        layer_idx=layer_idx,
        n_layers=3,
    )


def test_the_fusions_are_found():
    assert {ConcatProj, CrossFusion, GatedFusion, MeanFusion, NoFusion, NormMeanFusion, SumFusion} <= set(fusions())


def test_full_concatenates_ssm_before_attention():
    fusion = ConcatProj(d_model=3, full=True)
    y_attn, y_ssm = torch.randn(2, 2, 5, 3)
    left, right = fusion.proj.weight[:, :3], fusion.proj.weight[:, 3:]
    assert fusion.proj.bias is None
    torch.testing.assert_close(fusion(y_attn, y_ssm, FULL), y_ssm @ left.T + y_attn @ right.T)


def in_order(y_attn, y_ssm):
    """The tokens of PART in sequence order, token by token."""
    return torch.stack([y_attn[:, 0], y_ssm[:, 0], y_ssm[:, 1], y_attn[:, 1], y_attn[:, 2]], dim=1)


def test_split_modes_project_each_token_s_one_output():
    fusion, (a, s) = make(ConcatProj, full=False), branches(PART)
    torch.testing.assert_close(fusion(a, s, PART), in_order(a, s) @ fusion.proj.weight.T)


def test_sum_mean_and_none_coincide_in_split_modes_and_not_with_no_split():
    a, s = branches(PART)
    for cls in (SumFusion, MeanFusion, NoFusion):
        assert torch.equal(make(cls, full=False)(a, s, PART), in_order(a, s))
        assert not list(make(cls, full=False).parameters())
    a, s = branches(FULL)
    torch.testing.assert_close(make(SumFusion, full=True)(a, s, FULL), a + s)
    torch.testing.assert_close(make(MeanFusion, full=True)(a, s, FULL), (a + s) / 2)
    with pytest.raises(UserError, match="fusion=none"):
        NoFusion(d_model=3, full=True)


@pytest.mark.parametrize("full", [True, False])
def test_the_other_fusions_coincide_with_none(full):
    split = FULL if full else PART
    a, s = branches(split)
    outputs = {cls: make(cls, full=full)(a, s, split) for cls, kind in CASES if kind == full}
    same = {SumFusion, MeanFusion, NoFusion} if not full else set()
    for first in outputs:
        for second in outputs:
            if first is not second:
                assert torch.equal(outputs[first], outputs[second]) == ({first, second} <= same)


def test_norm_mean_against_its_equation():
    for full, split in ((True, FULL), (False, PART)):
        fusion, (a, s) = make(NormMeanFusion, full=full), branches(split)
        torch.nn.init.normal_(fusion.attn_norm.weight)
        torch.nn.init.normal_(fusion.ssm_norm.weight)
        a_hat = fusion.attn_norm.weight * a / (a.square().mean(-1, keepdim=True) + 1e-6).sqrt()
        s_hat = fusion.ssm_norm.weight * s / (s.square().mean(-1, keepdim=True) + 1e-6).sqrt()
        expected = (a_hat + s_hat) / 2 if full else in_order(a_hat, s_hat)
        torch.testing.assert_close(fusion(a, s, split), expected)


def test_gated_against_its_equation_and_an_absent_branch_is_zero():
    fusion, (a, s) = make(GatedFusion, full=True), branches(FULL)
    gate = torch.sigmoid(a @ fusion.gate_attn.weight.T + s @ fusion.gate_ssm.weight.T)
    torch.testing.assert_close(fusion(a, s, FULL), gate * a + (1 - gate) * s)
    part = make(GatedFusion, full=False)
    a, s = branches(PART)
    zeros = [torch.zeros(2, 5, 3) for _ in range(2)]
    zeros[0][:, [0, 3, 4]], zeros[1][:, [1, 2]] = a, s
    torch.testing.assert_close(part(a, s, PART), fusion(*zeros, FULL))


def test_cross_adds_the_mean_of_the_other_branch_s_earlier_outputs():
    fusion, (a, s) = make(CrossFusion, full=False), branches(PART)
    of_attn, of_ssm = fusion.cross_attn.weight.T, fusion.cross_ssm.weight.T
    nothing = torch.zeros(2, 3)
    seen = [nothing, a[:, 0] @ of_attn, a[:, 0] @ of_attn, s.mean(1) @ of_ssm, s.mean(1) @ of_ssm]
    expected = in_order(a, s) @ fusion.proj.weight.T + torch.stack(seen, dim=1)
    torch.testing.assert_close(fusion(a, s, PART), expected)

    fusion, (a, s) = make(CrossFusion, full=True), branches(FULL)
    means = [torch.stack([y[:, : t + 1].mean(1) for t in range(5)], dim=1) for y in (a, s)]
    expected = torch.cat([s, a], -1) @ fusion.proj.weight.T
    expected = expected + means[0] @ fusion.cross_attn.weight.T + means[1] @ fusion.cross_ssm.weight.T
    torch.testing.assert_close(fusion(a, s, FULL), expected)


@pytest.mark.parametrize("cls", fusions())
@pytest.mark.parametrize("coordinate", [False, True])
@pytest.mark.parametrize("split", [TokenSplit(5, ((0, 5),), ()), TokenSplit(5, (), ((0, 5),)), TokenSplit(0, (), ())])
def test_a_branch_without_tokens(cls, coordinate, split):
    fusion = make(cls, full=False, coordinate_gradients=coordinate)
    a, s = branches(split, leaf=True)
    y = fusion(a, s, split)
    assert y.shape == (2, split.n_tokens, 3)
    y.square().sum().backward()
    present = a if split.n_attn else s
    assert bool(present.grad.abs().sum() > 0) == bool(split.n_tokens)
    assert all(bool(grad.isfinite().all()) for grad in (a.grad, s.grad) if grad is not None)


@pytest.mark.parametrize("cls", fusions())
@pytest.mark.parametrize(("full", "split", "lengths"), [(True, PART, (3, 2)), (False, FULL, (5, 5))])
def test_the_wrong_kind_of_routing_is_refused(cls, full, split, lengths):
    if (cls, full) in CASES and (full or not cls.takes_shared):  # these take tokens that both branches see
        with pytest.raises(ValueError, match="branch"):
            make(cls, full=full)(torch.randn(2, lengths[0], 3), torch.randn(2, lengths[1], 3), split)


@pytest.mark.parametrize(("cls", "full"), CASES)
def test_flops_are_those_of_the_matrix_products(cls, full):
    from torch.utils.flop_counter import FlopCounterMode

    split = TokenSplit(70, ((0, 70),), ((0, 70),)) if full else TokenSplit(70, ((0, 30),), ((30, 70),))
    fusion = make(cls, full=full)
    with FlopCounterMode(display=False) as counter:
        fusion(*branches(split), split)
    per_range = (
        2 * 2 * 2 * 2 * 3 * 3 if cls is CrossFusion and not full else 0
    )  # two ranges, two sequences, two matmuls
    assert counter.get_total_flops() - 2 * fusion.flops(70) in ({0} if not per_range else range(per_range + 1))


@pytest.mark.parametrize(("cls", "name"), PAIRS)
def test_a_block_with_it_does_not_look_ahead(cls, name):
    for layer_idx in range(3):
        block = block_with(cls, SPLITS[name](), layer_idx=layer_idx)
        for n_tokens in (1, 2, 7):
            x = torch.randn(1, n_tokens, 16)
            with torch.no_grad():
                y, _ = block(x)
                assert y.shape == x.shape
                for t in range(n_tokens):
                    changed = x.clone()
                    changed[:, t] += torch.randn(16)
                    z, _ = block(changed)
                    assert torch.allclose(y[:, :t], z[:, :t], atol=1e-6), f"token {t} changed an earlier output"
                    assert not torch.allclose(y[:, t], z[:, t], atol=1e-6), f"token {t} did not reach its own output"


@pytest.mark.parametrize("coordinate", [False, True])
@pytest.mark.parametrize(("cls", "name"), PAIRS)
def test_gradients_reach_both_branches_and_every_weight_of_the_fusion(cls, name, coordinate):
    block = block_with(cls, SPLITS[name](), coordinate_gradients=coordinate)
    y, _ = block(torch.randn(2, 12, 16))
    y.square().sum().backward()
    routing = block.token_split(12)
    for branch, n in ((block.attention, routing.n_attn), (block.ssm, routing.n_ssm)):
        grads = [parameter.grad for parameter in branch.parameters()]
        reached = [grad is not None and bool(grad.abs().sum() > 0) for grad in grads]
        assert all(reached) if n > 2 else n > 0 or not any(reached)
    if name in ("no", "ae", "fa", "fac"):
        assert all(parameter.grad is not None for parameter in block.fusion.parameters())


def test_each_fusion_has_one_yaml_that_sets_all_its_options():
    seen = {}
    for path in sorted((config_dir() / "fusion").glob("*.yaml")):
        options = yaml.safe_load(path.read_text())
        target = options.pop("_target_")
        cls = getattr(importlib.import_module("flowhn.models"), target.rpartition(".")[2])
        assert options.pop("_partial_") is True
        parameters = dict(inspect.signature(cls).parameters)
        assert set(options) == set(parameters) - {"d_model", "full"}, path.name
        assert all(options[key] == parameters[key].default for key in options), path.name
        seen[cls] = path.name
    assert set(seen) == set(fusions())


@pytest.mark.parametrize("name", sorted(path.stem for path in (config_dir() / "fusion").glob("*.yaml")))
def test_each_yaml_trains_a_step(name):
    words = ["size=tiny", f"fusion={name}", "fusion.coordinate_gradients=true"]
    config = to_dict(compose("train", words))
    check_targets(config["model"])
    torch.manual_seed(0)
    model = build_model(config)
    assert all(layer.fusion.coordinate_gradients for layer in model.layers)
    ids = torch.randint(0, model.vocab_size, (2, 33))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    losses = []
    for _ in range(3):
        loss = F.cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


def test_none_with_no_split_says_what_to_do():
    with pytest.raises(UserError, match="fusion=sum"):
        build_model(to_dict(compose("train", ["size=tiny", "split=no", "fusion=none"])))


# ---- coordinate_gradients ----


def loss_of(fusion: Fusion, split: TokenSplit):
    weight = torch.randn(2, split.n_tokens, 3, generator=torch.Generator().manual_seed(2)).double()
    return lambda a, s: (fusion(a, s, split) * weight).sin().sum()


def finite_differences(function, inputs: list[torch.Tensor], step: float = 1e-5) -> list[torch.Tensor]:
    """Central differences, number by number, of a scalar function of two tensors."""
    grads = []
    for index, tensor in enumerate(inputs):
        grad = torch.zeros_like(tensor).flatten()
        for i in range(grad.numel()):
            values = []
            for sign in (1, -1):
                moved = [other.detach().clone() for other in inputs]
                moved[index].view(-1)[i] += sign * step
                values.append(function(*moved).item())
            grad[i] = (values[0] - values[1]) / (2 * step)
        grads.append(grad.view_as(tensor))
    return grads


def rms(x: torch.Tensor) -> float:
    return x.double().square().mean().sqrt().item()


def total(*xs: torch.Tensor) -> float:
    return sum(x.double().square().sum() for x in xs).sqrt().item()


@pytest.mark.parametrize(("cls", "full"), CASES)
def test_coordinated_gradients_against_finite_differences(cls, full):
    split = FULL if full else PART
    fusion = make(cls, full=full, coordinate_gradients=True).double()
    a, s = branches(split, dtype=torch.float64)
    a, s = (a * 3).requires_grad_(), (s * 0.2).requires_grad_()
    plain = copy.deepcopy(fusion)
    plain.coordinate_gradients = False
    assert torch.equal(fusion(a, s, split), plain(a, s, split))  # identity in the forward pass
    loss_of(fusion, split)(a, s).backward()
    expected = finite_differences(loss_of(fusion, split), [a.detach(), s.detach()])
    for grad, difference in zip((a.grad, s.grad), expected, strict=True):
        cosine = F.cosine_similarity(grad.flatten(), difference.flatten(), dim=0).item()
        assert cosine == pytest.approx(1, abs=1e-7)
    assert rms(a.grad) == pytest.approx(rms(s.grad), rel=1e-9)
    assert total(a.grad, s.grad) == pytest.approx(total(*expected), rel=1e-6)


def test_without_the_switch_the_norms_differ():
    a, s = (y.double().requires_grad_() for y in branches(FULL))
    fusion = make(ConcatProj, full=True).double()
    with torch.no_grad():
        fusion.proj.weight[:, :3] *= 10
    loss_of(fusion, FULL)(a, s).backward()
    assert rms(s.grad) > 3 * rms(a.grad)
    for (grad, y), difference in zip(
        ((a.grad, a), (s.grad, s)), finite_differences(loss_of(fusion, FULL), [a.detach(), s.detach()]), strict=True
    ):
        torch.testing.assert_close(grad, difference, rtol=1e-5, atol=1e-6)
        assert y.shape == grad.shape


def test_a_branch_with_zero_gradient_leaves_both_as_they_are():
    fusion = make(SumFusion, full=False, coordinate_gradients=True)
    a, s = branches(PART, leaf=True)
    fusion(a, s, PART)[:, 1:3].sum().backward()  # the SSM's two tokens only
    assert torch.equal(s.grad, torch.ones_like(s))
    assert not a.grad.any()


def arriving(block, x):
    """The gradients that the branches' last layers hand to the branches, by the block's own backward pass."""
    caught = {}

    def watch(branch: torch.nn.Module, name: str) -> None:
        def on_output(module, args, output) -> None:
            output[0].register_hook(lambda grad: caught.__setitem__(name, grad))

        branch.register_forward_hook(on_output)

    watch(block.attention, "attention")
    watch(block.ssm, "ssm")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y, _ = block(x)
    y.float().square().sum().backward()
    return caught["attention"], caught["ssm"]


@pytest.mark.parametrize("name", ["no", "fac"])
def test_norms_that_arrive_through_a_block_in_bfloat16(name):
    grads = {}
    for coordinate in (True, False):
        block = block_with(ConcatProj, SPLITS[name](), coordinate_gradients=coordinate)
        with torch.no_grad():
            block.ssm.mlp.down.weight *= 30
        grads[coordinate] = arriving(block, torch.randn(2, 32, 16, generator=torch.Generator().manual_seed(0)))
    assert rms(grads[True][0]) == pytest.approx(rms(grads[True][1]), rel=5e-3)
    assert rms(grads[False][0]) != pytest.approx(rms(grads[False][1]), rel=2e-2)
    assert total(*grads[True]) == pytest.approx(total(*grads[False]), rel=5e-3)


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_a_compiled_block_gives_the_same_gradients(backend):
    torch._dynamo.reset()
    block = block_with(ConcatProj, FlopAwareCirculatingSplit(), coordinate_gradients=True)
    compiled = torch.compile(block, backend=backend, dynamic=False)
    grads = []
    for run in (block, compiled):
        block.zero_grad()
        x = torch.randn(2, 12, 16, generator=torch.Generator().manual_seed(0)).requires_grad_()
        run(x)[0].sin().sum().backward()
        grads.append([x.grad, *(parameter.grad.clone() for parameter in block.parameters())])
    torch.testing.assert_close(grads[0], grads[1])


@pytest.mark.parametrize("cls", fusions())
def test_compiled_it_is_one_graph_and_the_norms_are_equal(cls):
    torch._dynamo.reset()
    fusion = make(cls, full=False, coordinate_gradients=True)
    a, s = branches(PART, leaf=True)
    torch.compile(fusion, backend="aot_eager", dynamic=False, fullgraph=True)(a, s, PART).sin().sum().backward()
    assert rms(a.grad) == pytest.approx(rms(s.grad), rel=1e-5)


def two_ranks(rank: int, address: str, results) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=address, rank=rank, world_size=2)
    a, s = (y.double() for y in branches(PART))
    a, s = (a * (3 + 4 * rank)).requires_grad_(), s.requires_grad_()
    make(ConcatProj, full=False, coordinate_gradients=True).double()(a, s, PART).square().sum().backward()
    results[rank] = (a.grad, s.grad)
    torch.distributed.destroy_process_group()


@pytest.mark.slow  # .ci/run runs it
def test_the_rms_is_that_of_all_ranks(tmp_path):
    import torch.multiprocessing as mp

    with mp.Manager() as manager:
        results = manager.dict()
        mp.spawn(two_ranks, args=(f"file://{tmp_path}/store", results), nprocs=2)
        grads = [results[rank] for rank in range(2)]
    plain = []
    for rank in range(2):
        a, s = (y.double() for y in branches(PART))
        a, s = (a * (3 + 4 * rank)).requires_grad_(), s.requires_grad_()
        make(ConcatProj, full=False).double()(a, s, PART).square().sum().backward()
        plain.append((a.grad, s.grad))
    together = [torch.cat([grads[rank][i] for rank in range(2)]) for i in range(2)]
    assert rms(together[0]) == pytest.approx(rms(together[1]), rel=1e-9)
    assert total(*together) == pytest.approx(total(*(grad for pair in plain for grad in pair)), rel=1e-9)
    ratios = [(grads[rank][0] / plain[rank][0]).mean().item() for rank in range(2)]
    assert ratios[0] == pytest.approx(ratios[1], rel=1e-9)  # every rank scales alike
    assert rms(grads[0][0]) != pytest.approx(rms(grads[0][1]), rel=1e-2)  # so one rank's own RMS need not be equal


def test_a_fusion_that_looks_back_is_not_decoded_with_a_cache():
    from flowhn.config import build_model, compose, to_dict

    model = build_model(to_dict(compose("train", ["size=tiny", "fusion=cross", "split.window=16"])))
    with pytest.raises(UserError, match="fusion=cross cannot be decoded with a cache"):
        model.new_cache()
    others = build_model(to_dict(compose("train", ["size=tiny", "fusion=gated", "split.window=16"])))
    others.new_cache()
