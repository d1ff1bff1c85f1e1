"""What the two branches of FlowHN's blocks do before the fusion: sizes, similarity, gradients; and the loss by position.

A branch is a whole pre-norm layer with its own residual path, so its output y holds its input x. What the branch adds is
its update y - x; both are measured. Letters: B batch, T tokens, D d_model, n tokens of one branch, N positions compared.

Sizes and gradients are those of the branches as the model runs them, each on its own tokens. Similarity needs two vectors
for one token, which a split never makes: there both branches are run once more on all tokens of the block's input, as
No_Split would. That is a question put to the trained weights, not something the model does; for No_Split it is the same.

- cosine: mean over tokens of cos(y_attn, y_ssm).
- CKA: linear centred kernel alignment of the (N, D) outputs (Kornblith et al. 2019, equation 3), 0 to 1; it ignores rotations.
- gradients: of the mean next-token loss, at a branch's output (before the fusion) and over the branch's parameters.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from flowhn.errors import UserError
from flowhn.models.blocks import ParallelBlock

BRANCHES = ("attention", "ssm")
_CHUNK_TOKENS = 8192  # tokens whose logits are held at a time


def measure_branches(model: nn.Module, input_ids: Tensor, labels: Tensor) -> dict[str, Any]:
    """Sizes, gradients and similarity of both branches in every block, on one batch.

    Args:
        model: a network with :class:`~flowhn.models.blocks.ParallelBlock` layers; its gradients are overwritten and cleared.
        input_ids, labels: (B, T) long.

    Returns:
        ``loss`` (nats per token) and ``blocks``, one entry per block: per branch ``tokens`` (of one sequence), ``input_rms``,
        ``output_rms``, ``update_rms``, ``output_gradient_rms`` (RMS over all numbers of the batch; null without tokens),
        ``parameters``, ``parameter_gradient_norm`` and ``parameter_gradient_rms``; and ``similarity``: ``cosine_output``,
        ``cosine_update``, ``cka_output``, ``cka_update``, ``runs_in_model`` (true for No_Split).

    Raises:
        UserError: the model has no parallel block.
    """
    blocks = [layer for layer in model.layers if isinstance(layer, ParallelBlock)]
    if not blocks:
        raise UserError("there are no two branches to measure: the model has no parallel block; choose a FlowHN model")
    outputs: dict[nn.Module, Tensor] = {}  # of each branch
    inputs: dict[
        nn.Module, Tensor
    ] = {}  # of each block's branches: the block's own, or what its short convolution makes of it

    def keep_output(module: nn.Module, args: Any, output: tuple[Tensor, Any]) -> None:
        output[0].retain_grad()
        outputs[module] = output[0]

    def keep_input(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        inputs[module] = args[0].detach()

    def keep_convolved(block: nn.Module) -> Any:
        def keep(module: nn.Module, args: Any, output: Tensor) -> None:
            inputs[block] = output.detach()

        return keep

    handles = [block.register_forward_pre_hook(keep_input) for block in blocks]
    handles += [b.short_conv.register_forward_hook(keep_convolved(b)) for b in blocks if b.short_conv is not None]
    handles += [getattr(block, name).register_forward_hook(keep_output) for block in blocks for name in BRANCHES]
    model.zero_grad(set_to_none=True)
    try:
        with torch.enable_grad():
            loss = F.cross_entropy(model(input_ids).flatten(0, 1).float(), labels.flatten())
            loss.backward()
    finally:
        for handle in handles:
            handle.remove()
    measured = []
    for number, block in enumerate(blocks):
        entry: dict[str, Any] = {"block": number}
        split, x = block.token_split(input_ids.shape[1]), inputs[block]
        for name, own in (("attention", split.gather_attn(x)), ("ssm", split.gather_ssm(x))):
            branch = getattr(block, name)
            entry[name] = _sizes(own, outputs[branch]) | _parameter_gradients(branch)
        entry["similarity"] = _similarity(block, inputs[block])
        measured.append(entry)
    model.zero_grad(set_to_none=True)
    return {"loss": loss.item(), "blocks": measured}


@torch.no_grad()
def loss_by_position(
    model: nn.Module, batches: Sequence[tuple[Tensor, Tensor]], *, n_bins: int = 16
) -> dict[str, list[Any]]:
    """Next-token loss over the place in the sequence, where a split's cuts show.

    Args:
        model: any network of :class:`~flowhn.models.lm.CausalLM`'s form.
        batches: (input_ids, labels) pairs, each (B, T) long, all of the same T.
        n_bins: into how many stretches of (nearly) equal length the T positions are cut; at most T.

    Returns:
        ``edges``: the stretches' n_bins + 1 borders in tokens; ``losses``: for each sequence its n_bins mean losses in nats per
        token, to four decimals. Two models that read the same sequences can so be compared sequence by sequence.
    """
    n_tokens = batches[0][1].shape[1]
    n_bins = min(n_bins, n_tokens)
    edges = [n_tokens * number // n_bins for number in range(n_bins + 1)]
    found: list[list[float]] = []
    rows = max(1, _CHUNK_TOKENS // n_tokens)
    for batch in batches:
        for input_ids, labels in zip(*(part.split(rows) for part in batch), strict=True):
            logits = model(input_ids).float()  # (b, T, V)
            losses = F.cross_entropy(logits.transpose(1, 2), labels, reduction="none").double()  # (b, T)
            means = torch.stack([losses[:, start:stop].mean(dim=1) for start, stop in pairwise(edges)], dim=1)
            found += [[round(value, 4) for value in row] for row in means.tolist()]
    return {"edges": edges, "losses": found}


def linear_cka(x: Tensor, y: Tensor) -> float:
    """Linear centred kernel alignment of two (N, D) sets of features of the same N tokens; 0 to 1, in float64."""
    x, y = (part.double() - part.double().mean(dim=0) for part in (x, y))
    own = torch.linalg.matrix_norm(x.T @ x) * torch.linalg.matrix_norm(y.T @ y)
    return (torch.linalg.matrix_norm(x.T @ y) ** 2 / own).item()


def _rms(x: Tensor) -> float | None:
    return x.detach().double().square().mean().sqrt().item() if x.numel() else None


def _sizes(x: Tensor, y: Tensor) -> dict[str, Any]:
    """x, y (B, n, D): what a branch got and gave."""
    return {
        "tokens": x.shape[1],
        "input_rms": _rms(x),
        "output_rms": _rms(y),
        "update_rms": _rms(y - x),
        "output_gradient_rms": None if y.grad is None else _rms(y.grad),
    }


def _parameter_gradients(branch: nn.Module) -> dict[str, Any]:
    count = sum(parameter.numel() for parameter in branch.parameters())
    square = sum(p.grad.double().square().sum().item() for p in branch.parameters() if p.grad is not None)
    return {
        "parameters": count,
        "parameter_gradient_norm": square**0.5,
        "parameter_gradient_rms": (square / count) ** 0.5,
    }


@torch.no_grad()
def _similarity(block: ParallelBlock, x: Tensor) -> dict[str, Any]:
    """Both branches on all tokens of the block's input x (B, T, D)."""
    y_attn, _ = block.attention(x, positions=torch.arange(x.shape[1], device=x.device))
    y_ssm, _ = block.ssm(x)
    found: dict[str, Any] = {"runs_in_model": block.split.full}
    for what, a, s in (("output", y_attn, y_ssm), ("update", y_attn - x, y_ssm - x)):
        a, s = a.flatten(0, 1), s.flatten(0, 1)  # (B * T, D)
        found[f"cosine_{what}"] = F.cosine_similarity(a.double(), s.double(), dim=-1).mean().item()
        found[f"cka_{what}"] = linear_cka(a, s)
    return found
