"""Formulas of docs/scaling.md: what a FlowHN model of a given shape needs on S GPUs. Standard library only.

Letters: D width, F hidden width of each branch's MLP, L blocks, V vocabulary, T tokens of a sequence, n tokens of the
attention branch, H heads, K key-value heads, E = 2 D channels, N = 16 states, R = ceil(D / 16), S GPUs, P parameters.
Bytes unless a name says otherwise; seconds; FLOPs count a multiply-add as two.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

N_STATE, D_CONV, EXPAND = 16, 4, 2  # the published mixer


@dataclass(frozen=True)
class Shape:
    """A FlowHN model with Mamba-1 branches and the FLOP-balanced split."""

    name: str
    d_model: int
    d_ff: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    vocab_size: int
    seq_len: int

    @property
    def d_inner(self) -> int:
        return EXPAND * self.d_model

    @property
    def dt_rank(self) -> int:
        return -(-self.d_model // 16)

    @property
    def d_kv(self) -> int:
        """Width of all keys (and of all values) of a token."""
        return self.n_kv_heads * (self.d_model // self.n_heads)

    @property
    def attn_parameters(self) -> int:
        d, f = self.d_model, self.d_ff
        return 2 * d * d + 2 * d * self.d_kv + 3 * d * f + 2 * d

    @property
    def ssm_parameters(self) -> int:
        d, e, r, n, f = self.d_model, self.d_inner, self.dt_rank, N_STATE, self.d_ff
        mixer = 2 * d * e + (D_CONV + 1) * e + e * (r + 2 * n) + (r + 1) * e + e * n + e + e * d + (r + 2 * n)
        return mixer + 3 * d * f + 2 * d

    @property
    def joint_parameters(self) -> int:
        """Fusion, norm and projection behind the branches."""
        return 2 * self.d_model**2 + self.d_model

    @property
    def block_parameters(self) -> int:
        return self.attn_parameters + self.ssm_parameters + self.joint_parameters

    @property
    def parameters(self) -> int:
        return self.n_layers * self.block_parameters + 2 * self.vocab_size * self.d_model + self.d_model

    def attn_flops(self, n: int) -> int:
        """Forward FLOPs of n tokens in the attention branch; causal pairs counted half."""
        d, h = self.d_model, self.n_heads
        linear = 2 * d * (d // h) * (2 * h + 2 * self.n_kv_heads) * n
        return linear + 2 * n * n * d + 6 * d * self.d_ff * n

    def ssm_flops(self, n: int) -> int:
        """Forward FLOPs of n tokens in the SSM branch; the scan counts 9 E N a token."""
        d, e, r = self.d_model, self.d_inner, self.dt_rank
        linear = 2 * (2 * d * e + e * (r + 2 * N_STATE) + r * e + e * d)
        return n * (linear + 2 * D_CONV * e + 9 * e * N_STATE + 6 * d * self.d_ff)

    @cached_property
    def n_attn(self) -> int:
        """Tokens of the attention branch at which both branches cost the same."""
        t = self.seq_len
        return min(range(t + 1), key=lambda n: abs(self.attn_flops(n) - self.ssm_flops(t - n)))

    @property
    def n_ssm(self) -> int:
        return self.seq_len - self.n_attn

    @property
    def forward_flops(self) -> int:
        """Of one sequence; a training step costs three times this."""
        t, d = self.seq_len, self.d_model
        block = self.attn_flops(self.n_attn) + self.ssm_flops(self.n_ssm) + 4 * d * d * t
        return self.n_layers * block + 2 * d * self.vocab_size * t

    # --- activations, as numbers of one sequence that are kept for the backward pass

    def attn_kept(self, n: int, *, cpu: bool = False) -> tuple[int, int]:
        """(residual stream and statistics, the rest) of n tokens: x of both norms; their outputs, q, k, v, the output,
        four times F. On the CPU each norm also keeps its normalised input."""
        wide = 2 * self.d_model + 2 + self.n_heads
        rest = 4 * self.d_model + 2 * self.d_kv + 4 * self.d_ff + (2 * self.d_model if cpu else 0)
        return n * wide, n * rest

    def ssm_kept(self, n: int, *, cpu: bool = False) -> tuple[int, int]:
        """As :meth:`attn_kept`: in_proj's output 2 E, the convolved u, delta, y, silu(z) and their product E each, and
        dt, B, C before and after their norms. Plain torch on the CPU also keeps the padded input and the output of the
        convolution, softplus(delta), and two E N with the scan's states."""
        d, e, r = self.d_model, self.d_inner, self.dt_rank
        wide = 2 * d + 2 + 3
        rest = 2 * d + 7 * e + 2 * (r + 2 * N_STATE) + 4 * self.d_ff
        if cpu:
            rest += 2 * d + 3 * e + r + 2 * N_STATE
        return n * wide, n * rest

    def block_kept(self, *, cpu: bool = False) -> tuple[int, int]:
        """Both branches, and behind them: merged tokens, input and output of the norm."""
        t, d = self.seq_len, self.d_model
        attn, ssm = self.attn_kept(self.n_attn, cpu=cpu), self.ssm_kept(self.n_ssm, cpu=cpu)
        joint = t * (d + 1), t * (2 * d + (d if cpu else 0))
        return attn[0] + ssm[0] + joint[0], attn[1] + ssm[1] + joint[1]

    def activation_bytes(self, *, checkpointed: bool = False) -> int:
        """Of one sequence in bf16-mixed (residual stream fp32, the rest bf16), logits left out. Checkpointed: the input
        of each block and all of one block."""
        wide, rest = self.block_kept()
        block = 4 * wide + 2 * rest
        ends = self.seq_len * self.d_model * (4 + 2)  # the final norm's input and output
        if checkpointed:
            return block + self.n_layers * 4 * self.seq_len * self.d_model + ends
        return self.n_layers * block + ends

    @property
    def logits_bytes(self) -> int:
        """Of one sequence: bf16 logits, which the fused loss turns into their gradient where they lie."""
        return 2 * self.seq_len * self.vocab_size


@dataclass(frozen=True)
class Cluster:
    """Assumptions about the machine; sources in docs/scaling.md."""

    peak_flops: float = 989.4e12
    memory: float = 141e9
    memory_bandwidth: float = 4.8e12
    nvlink: float = 450e9  # a GPU, one direction
    nic: float = 50e9  # a GPU's own network card, one direction
    per_node: int = 8
    efficiency: float = 0.8  # reached share of a link's rate
    latency: float = 10e-6  # of one exchange, times log2 of the partners

    def seconds(self, volume: float, partners: int, *, exchanges: int = 1, nic_only: bool = False) -> float:
        """Time to send ``volume`` bytes per GPU in collectives among ``partners`` GPUs. Across nodes each of the rings
        leaves through another card, so that a node's cards count together."""
        if partners < 2:
            return 0.0
        inside = partners <= self.per_node and not nic_only
        across = self.nic if nic_only else min(self.nvlink, self.per_node * self.nic)
        rate = self.efficiency * (self.nvlink if inside else across)
        return volume / rate + exchanges * self.latency * math.log2(partners)


@dataclass(frozen=True)
class Job:
    """A way to train: ``rows`` sequences on a GPU at once, ``accumulate`` times per step."""

    shape: Shape
    gpus: int
    strategy: str  # ddp, fsdp (sharded over all GPUs) or hsdp (sharded over a node's, copied over nodes)
    rows: int
    accumulate: int = 1
    checkpointed: bool = False

    @property
    def global_tokens(self) -> int:
        return self.gpus * self.rows * self.accumulate * self.shape.seq_len

    def shards(self, cluster: Cluster) -> int:
        return {"ddp": 1, "fsdp": self.gpus, "hsdp": min(self.gpus, cluster.per_node)}[self.strategy]

    def memory(self, cluster: Cluster) -> dict[str, float]:
        """Bytes of one GPU by purpose."""
        p, s, shape = self.shape.parameters, self.shards(cluster), self.shape
        unit = max(shape.block_parameters, shape.vocab_size * shape.d_model)
        # DDP: autocast's bf16 copies. FSDP: two gathered units in bf16, one unit's gradient in bf16 and fp32.
        working = 2 * p if s == 1 else (2 * 2 + 2 + 4) * unit
        parts = {"weights": 4 * p / s, "gradients": 4 * p / s, "AdamW": 8 * p / s, "working copies": working}
        parts["activations"] = self.rows * shape.activation_bytes(checkpointed=self.checkpointed)
        parts["logits"] = self.rows * shape.logits_bytes
        return parts | {"sum": sum(parts.values())}

    def volume(self, cluster: Cluster) -> dict[str, float]:
        """Bytes that one GPU sends in a step: within its shard group, and between copies of the shards."""
        p, s = self.shape.parameters, self.shards(cluster)
        copies = self.gpus // s
        # each part of the batch: gathered in bf16 before its forward and its backward pass, gradients scattered in fp32
        inside = (s - 1) / s * (2 * 2 + 4) * p * self.accumulate
        between = 2 * (copies - 1) / copies * 4 * p / s
        return {"inside": inside, "between": between}

    def step(self, cluster: Cluster, mfu: float) -> dict[str, float]:
        """Expected seconds and MFU of a step; ``mfu`` is what one GPU reaches alone."""
        shape, s = self.shape, self.shards(cluster)
        flops = 3 * shape.forward_flops * self.rows * self.accumulate
        compute = flops / (cluster.peak_flops * mfu) * (4 / 3 if self.checkpointed else 1)
        volume, embedding = self.volume(cluster), shape.vocab_size * shape.d_model
        copies = self.gpus // s
        inside = cluster.seconds(volume["inside"], s, exchanges=3 * shape.n_layers * self.accumulate)
        between = cluster.seconds(volume["between"], copies, exchanges=shape.n_layers, nic_only=s > 1)
        # The last backward pass hides what copies exchange; the whole step hides gathering. The embedding's gradient
        # comes last, and its gathering first: neither can hide.
        last = 2 / 3 * compute / self.accumulate
        tail = cluster.seconds(2 * 4 * embedding / s, copies, nic_only=s > 1)
        tail += cluster.seconds((2 + 4) * embedding, s) if s > 1 else 0.0
        exposed = max(0.0, between - last) + max(0.0, inside - compute) + tail
        update = 7 * 4 * shape.parameters / s / (cluster.efficiency * cluster.memory_bandwidth)
        total = compute + exposed + update
        out = {"compute": compute, "communication": inside + between, "exposed": exposed, "update": update}
        return out | {"step": total, "mfu": flops / (cluster.peak_flops * total), "tps": self.global_tokens / total}


def kv_bytes(shape: Shape, n: int) -> int:
    """Keys and values of n tokens in bf16."""
    return 2 * 2 * n * shape.d_kv


def state_bytes(shape: Shape) -> int:
    """What one chunk of the SSM hands to the next, fp32: the scan's state and the convolution's last tokens."""
    return 4 * (shape.d_inner * N_STATE + (D_CONV - 1) * shape.d_inner)


def contiguous_imbalance(shape: Shape) -> float:
    """Time of the slowest GPU over the mean's when each holds a stretch of the sequence, so that some have tokens of
    the dearer branch alone: the branches cost the same, so the one with fewer tokens is the dearer per token."""
    return shape.seq_len / (2 * min(shape.n_attn, shape.n_ssm))


def moved_tokens(shape: Shape, split: str) -> int:
    """Tokens of a sequence that change from one branch to the other between two blocks, in each direction."""
    n, t = shape.n_attn, shape.seq_len
    return {"fa": 0, "fac": min(n, t - n), "ae": t // 2}[split]


def branch_bytes_per_token(shape: Shape, split: str) -> float:
    """Bytes that one GPU of a pair sends per token of the sequence in a step: bf16 vectors that change the branch,
    forward and, as gradients, backward, between all blocks."""
    return 2 * 2 * shape.d_model * moved_tokens(shape, split) / shape.seq_len * (shape.n_layers - 1)


def pair_flops(shape: Shape) -> int:
    """Forward FLOPs of a sequence on the busier GPU of a pair: its branch, and what acts on each token alone."""
    own = max(shape.n_attn, shape.n_ssm)
    branch = max(shape.attn_flops(shape.n_attn), shape.ssm_flops(shape.n_ssm))
    d = shape.d_model
    return shape.n_layers * (branch + 4 * d * d * own) + 2 * d * shape.vocab_size * own


def branch_parameters(shape: Shape) -> int:
    """Parameters of the larger half of a pair: one branch of each block, what is joint, and all ends."""
    ends = 2 * shape.vocab_size * shape.d_model + shape.d_model
    return shape.n_layers * (max(shape.attn_parameters, shape.ssm_parameters) + shape.joint_parameters) + ends
