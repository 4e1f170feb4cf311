"""Every product of replicas, shards and tensor parallelism that two or four ranks allow, and a model laid out so."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

from apps.main.args import LMTransformerArgs
from apps.main.transformer import LMTransformer
from lingua.config.keys.distributed import DistributedArgs
from lingua.distributed.parallelize import parallelize
from lingua.distributed.place import RankInfo
from lingua.distributed.process_group import World


@dataclass(frozen=True)
class Layout:
    """How ranks stand to each other."""

    replicate: int = 1
    shard: int = 1
    tp: int = 1

    @property
    def n_ranks(self) -> int:
        return self.replicate * self.shard * self.tp

    @property
    def dp_size(self) -> int:
        return self.replicate * self.shard

    @property
    def args(self) -> DistributedArgs:
        return DistributedArgs(**self._keys, model_dtype="fp32")

    @property
    def _keys(self) -> dict[str, Any]:
        fsdp_type = "full_shard" if self.shard > 1 else "no_shard"
        return {"fsdp_type": fsdp_type, "dp_replicate": self.replicate, "dp_shard": self.shard, "tp_size": self.tp}

    @property
    def words(self) -> list[str]:
        """For a command line."""
        return [f"distributed.{key}={value}" for key, value in self._keys.items()]

    def world(self) -> World:
        """Of this rank, inside a process group of n_ranks."""
        if self.n_ranks == 1:
            return World(RankInfo(), torch.device("cpu"), mesh=None)
        shape, names = (self.replicate, self.shard, self.tp), ("dp_replicate", "dp_shard", "tp")
        mesh = init_device_mesh("cpu", shape, mesh_dim_names=names)
        dp_rank, tp_rank = divmod(dist.get_rank(), self.tp)
        return World(RankInfo(), torch.device("cpu"), mesh, dp_rank, self.dp_size, tp_rank=tp_rank)


LAYOUTS = {
    "one": Layout(),
    "replicas": Layout(replicate=2),
    "shards": Layout(shard=2),
    "hybrid": Layout(replicate=2, shard=2),
    "tp": Layout(tp=2),
    "tp of replicas": Layout(replicate=2, tp=2),
    "tp of shards": Layout(shard=2, tp=2),
}


def build(world: World, args: DistributedArgs, **keys: Any) -> LMTransformer:
    """A small model, laid out, with its initial weights; `keys` of its Args."""
    small = {"dim": 32, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "qk_norm": True, "multiple_of": 8}
    with torch.device("meta"):
        model = LMTransformer(LMTransformerArgs(**{"vocab_size": 257, "max_seqlen": 32, **small, **keys}))
    parallelize(model, args, world)
    model.to_empty(device="cpu")
    model.init_weights(1)
    return model


def whole(tensor: Tensor) -> Tensor:
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()
