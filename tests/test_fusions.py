"""Fusions against their equations."""

from __future__ import annotations

import pytest
import torch

from flowhn.models.fusions import ConcatProj
from flowhn.models.splits import TokenSplit

FULL = TokenSplit(5, ((0, 5),), ((0, 5),))
PART = TokenSplit(5, ((0, 1), (3, 5)), ((1, 3),))


def test_full_concatenates_ssm_before_attention():
    fusion = ConcatProj(d_model=3, full=True)
    y_attn, y_ssm = torch.randn(2, 2, 5, 3)
    left, right = fusion.proj.weight[:, :3], fusion.proj.weight[:, 3:]
    assert fusion.proj.bias is None
    torch.testing.assert_close(fusion(y_attn, y_ssm, FULL), y_ssm @ left.T + y_attn @ right.T)


def test_split_modes_project_each_token_s_one_output():
    fusion = ConcatProj(d_model=3, full=False)
    y_attn, y_ssm = torch.randn(2, 3, 3), torch.randn(2, 2, 3)
    merged = torch.stack([y_attn[:, 0], y_ssm[:, 0], y_ssm[:, 1], y_attn[:, 1], y_attn[:, 2]], dim=1)
    torch.testing.assert_close(fusion(y_attn, y_ssm, PART), merged @ fusion.proj.weight.T)


@pytest.mark.parametrize("split", [TokenSplit(5, ((0, 5),), ()), TokenSplit(5, (), ((0, 5),)), TokenSplit(0, (), ())])
def test_a_branch_without_tokens(split):
    fusion = ConcatProj(d_model=3, full=False)
    y = fusion(torch.randn(2, split.n_attn, 3), torch.randn(2, split.n_ssm, 3), split)
    assert y.shape == (2, split.n_tokens, 3)


@pytest.mark.parametrize(("full", "split", "lengths"), [(True, PART, (3, 2)), (False, FULL, (5, 5))])
def test_the_wrong_kind_of_routing_is_refused(full, split, lengths):
    with pytest.raises(ValueError, match="branch"):
        ConcatProj(d_model=3, full=full)(torch.randn(2, lengths[0], 3), torch.randn(2, lengths[1], 3), split)


@pytest.mark.parametrize("full", [True, False])
def test_flops_count_the_projection(full):
    assert ConcatProj(d_model=3, full=full).flops(7) == 2 * 7 * 3 * (6 if full else 3)
