"""Fully sharded data parallel (FSDP2): every device keeps a share of each weight, gradient and optimiser state.

``fully_shard`` (torch.distributed.fsdp) is applied to every block and then to the rest of the network (embedding, final
norm, LM head), on the mesh that Lightning's ModelParallelStrategy makes. The network computes in the same precision as
under ddp: weights are gathered as they are (fp32) and cast by autocast.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor

from flowhn.errors import UserError
from flowhn.training.checkpoints import AtomicCheckpointIO, space_error
from flowhn.training.distributed import configure_launcher
from flowhn.training.sharded_checkpoint import load_into, moments, save_sharded

_MARKS = ("_no_weight_decay", "_no_reinit")  # what mixers write on their parameters


def shard(net: nn.Module, mesh: Any) -> None:
    """Shard ``net`` in place: each of ``net.layers``, then what is left, with ``net.body`` as the forward method.

    Args:
        net: the network; all its weights are on every device beforehand.
        mesh: one-dimensional device mesh.

    Raises:
        UserError: this torch cannot shard over CPU processes.
    """
    for block in net.layers:
        fully_shard(block, mesh=mesh)
    fully_shard(net, mesh=mesh)
    register_fsdp_forward_method(net, "body")
    if mesh.device_type == "cpu":  # gloo adds up but does not average
        for module in net.modules():
            if isinstance(module, FSDPModule):
                if not hasattr(module, "set_force_sum_reduction_for_comms"):
                    raise UserError("trainer=fsdp on the CPU needs torch 2.9 or newer; use trainer=ddp, or a GPU")
                module.set_force_sum_reduction_for_comms(True)


def parameter_marks(net: nn.Module) -> dict[str, dict[str, Any]]:
    """What mixers wrote on their parameters, by name: sharding, and moving what is sharded, makes new ones without it."""
    return {name: {key: vars(p)[key] for key in _MARKS if key in vars(p)} for name, p in net.named_parameters()}


def mark_parameters(net: nn.Module, marks: Mapping[str, Mapping[str, Any]]) -> None:
    """Write it on them again; before the optimiser is built, which decays by it."""
    for name, parameter in net.named_parameters():
        for key, value in marks[name].items():
            setattr(parameter, key, value)


def reshard(module: nn.Module) -> None:
    """Let go of weights that a forward pass without a backward pass gathered, so that the parameters are shares again."""
    for part in module.modules():
        if isinstance(part, FSDPModule):
            part.reshard()


def full_weights(module: nn.Module) -> dict[str, Tensor]:
    """Every weight as a whole on the CPU; all processes have to call it together."""
    reshard(module)
    found = {}
    for name, tensor in module.state_dict().items():
        whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        found[name] = whole.detach().cpu().clone()
    return found


class ShardedStrategy(ModelParallelStrategy):
    """Lightning's ModelParallelStrategy with checkpoints that are atomic, hashed, free of pickle and readable by any number
    of devices (:mod:`flowhn.training.sharded_checkpoint`), and that reads checkpoints of the other strategies too."""

    def _configure_launcher(self) -> None:
        configure_launcher(self)

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """The weights of this device's share, by name."""
        reshard(self.model)
        return dict(self.model.state_dict())

    def optimizer_state(self, optimizer: Any) -> dict[str, Any]:
        """Moments by parameter name, and the groups with the names of their parameters."""
        names = {parameter: name for name, parameter in self.model.named_parameters()}
        optimizer = getattr(optimizer, "_optimizer", optimizer)
        groups = [
            {key: value for key, value in group.items() if key != "params"}
            | {"params": [names[parameter] for parameter in group["params"]]}
            for group in optimizer.param_groups
        ]
        return {"state": {names[p]: dict(state) for p, state in optimizer.state.items()}, "param_groups": groups}

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None) -> None:
        """Each process writes its share; the folder appears under its name when all are done.

        Raises:
            UserError: a disk is full or not writable; earlier checkpoints are untouched.
        """
        try:
            save_sharded(checkpoint, Path(self.broadcast(filepath)))
        except CheckpointException as error:
            causes = [failure[0] for failure in error.failures.values() if isinstance(failure[0], OSError)]
            if not causes:
                raise
            raise space_error(Path(filepath), causes[0]) from error

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        """Load a folder of any number of processes, or a single file, into the sharded network and optimiser.

        Raises:
            UserError: torn, of another model, or holding more than tensors and plain values.
        """
        path = Path(self.broadcast(checkpoint_path))
        reshard(self.model)
        optimizer = self.optimizers[0]
        if path.is_dir():
            return load_into(path, self.model, optimizer)
        checkpoint = AtomicCheckpointIO().load_checkpoint(path)
        self.lightning_module.check_shapes(checkpoint.get("state_dict", {}))
        with torch.no_grad():
            own = dict(self.model.state_dict())
            for name, whole in checkpoint["state_dict"].items():
                _fill(own[name], whole)
        self._fill_optimizer(optimizer, checkpoint["optimizer_states"][0])
        return checkpoint

    @staticmethod
    def _fill_optimizer(optimizer: Any, plain: Mapping[str, Any]) -> None:
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        for number, state in plain["state"].items():
            own = moments(parameters[int(number)])
            for key, value in state.items():
                _fill(own[key], value)
            optimizer.state[parameters[int(number)]] = own
        for mine, theirs in zip(optimizer.param_groups, plain["param_groups"], strict=True):
            mine.update({key: value for key, value in theirs.items() if key != "params"})


def _fill(target: Tensor, whole: Tensor) -> None:
    """Copy a whole tensor into one that may be sharded; every process has the whole."""
    if isinstance(target, DTensor):
        whole = distribute_tensor(whole.to(target.device), target.device_mesh, target.placements, src_data_rank=None)
    target.copy_(whole)
