"""Muon for the matrices of the blocks, AdamW for embeddings, head and vectors: one optimizer.

    momentum  b <- mu b + (1 - mu) g;  u = mu b + (1 - mu) g (Nesterov), else b
    update    O = NewtonSchulz(u): u's singular vectors with singular values near 1
    step      W <- (1 - lr * weight_decay) W - lr * scale(shape) * O

Sources: Keller Jordan, https://kellerjordan.github.io/posts/muon/ (iteration, coefficients, Nesterov, `original`
scale); Moonlight, arXiv 2502.16982, section 2.2 (decoupled weight decay, scale `match_rms_adamw`).

On one rank the results equal torch.optim.Muon's; on any layout of FSDP2 they are the same within rounding. One rank
orthogonalizes a whole matrix, and all replicas take its result, so they stay equal bit for bit. A step that is skipped
by `found_inf` leaves parameters and momentum unchanged, bit for bit, without a host sync.

There is one fp32 momentum per matrix instead of AdamW's two moments. A step takes about 5 * 6 m^2 n FLOPs for a matrix
of m x n (m <= n), shared by all ranks: 5 m / (tokens per step) of forward and backward. Sharded matrices are exchanged
twice in `ns_dtype`, replicated ones are broadcast once. Each rank holds one whole matrix at a time.
torch.optim.Muon takes only matrices, does the same work on every rank, and cannot skip a step by a flag.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate, Shard

from lingua.config.keys.optim import AdamWArgs, MuonArgs
from lingua.optim.adamw import build_adamw, is_matrix
from lingua.optim.update import amp_scaling, divide_gradients

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""Coefficients of the quintic iteration, chosen for the steepest slope at 0 (Keller Jordan's post)."""
EPSILON = 1e-7
Scale = Literal["match_rms_adamw", "original"]
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def takes_muon(name: str, parameter: Tensor) -> bool:
    """Return whether a parameter is a matrix of a block; AdamW takes embeddings, head and everything else."""
    return is_matrix(name, parameter) and name.startswith("layers.")


def ns_dtype_on(device: torch.device, wanted: Literal["auto", "bf16", "fp32"]) -> torch.dtype:
    """Return the type to orthogonalize in. On a CPU without bf16 units, bf16 took 30 times as long for 256 x 256."""
    if wanted == "auto":
        wanted = "fp32" if device.type == "cpu" else "bf16"
    return DTYPES[wanted]


def newton_schulz(matrix: Tensor, steps: int, dtype: torch.dtype) -> Tensor:
    """Return the matrix (m, n) with its singular values moved to between 0.7 and 1.2, in `dtype`."""
    a, b, c = COEFFICIENTS
    x = matrix.to(dtype)
    tall = x.shape[0] > x.shape[1]
    x = x.mT if tall else x
    x = x / x.norm().clamp(min=EPSILON)  # singular values of at most 1
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


def scale_of(shape: Sequence[int], rule: Scale) -> float:
    """Return the factor of a matrix's update."""
    n_rows, n_columns = shape
    if rule == "original":
        return math.sqrt(max(1.0, n_rows / n_columns))
    return 0.2 * math.sqrt(max(n_rows, n_columns))


# -- distribution over ranks ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Axis:
    """Ranks along one axis of the mesh. A group of None: one rank."""

    group: dist.ProcessGroup | None = None
    size: int = 1
    rank: int = 0


@dataclass(frozen=True)
class Layout:
    """Layout of the matrices on the ranks: rows are split along `shards` and copied along `replicas`."""

    shards: Axis = Axis()
    replicas: Axis = Axis()

    def n_local_rows(self, n_rows: int, shard: int) -> int:
        """Return the number of rows of a matrix on a shard, as torch.chunk and so FSDP2 split them."""
        chunk = -(-n_rows // self.shards.size)
        return max(0, min(chunk, n_rows - shard * chunk))


def layout_of(named: Sequence[tuple[str, Tensor]]) -> Layout:
    """Return the common layout of all matrices. Raises ValueError unless all are split by rows in the same way."""
    found = {name: (p.device_mesh, p.placements) for name, p in named if isinstance(p, DTensor)}
    if not found:
        return Layout()
    first, (mesh, placements) = next(iter(found.items()))
    for name, _ in named:
        if found.get(name) != (mesh, placements):
            raise ValueError(
                f"optim.type muon: {name} is spread over ranks in another way than {first}; "
                "use distributed.tp_size=1, or optim.type=adamw"
            )
    axes: dict[bool, list[Axis]] = {True: [], False: []}
    for dim, placement in enumerate(placements):
        if placement not in (Replicate(), Shard(0)) or type(placement) not in (Replicate, Shard):
            raise ValueError(
                f"optim.type muon: {first} is cut as {placement}, but only whole rows can be put together again; "
                "use distributed.tp_size=1, or optim.type=adamw"
            )
        if mesh.size(dim) > 1:
            axes[placement.is_shard()].append(Axis(mesh.get_group(dim), mesh.size(dim), mesh.get_local_rank(dim)))
    if max(map(len, axes.values())) > 1:
        raise ValueError(f"optim.type muon: {first} lies as {placements}, on more axes than one each; use fewer")
    shards, replicas = ((axes[kind] or [Axis()])[0] for kind in (True, False))
    return Layout(shards, replicas)


def rounds(costs: Sequence[float], n_owners: int) -> list[list[int]]:
    """Return items in rounds of one per owner, the most costly first, so that owners have about equal work."""
    dearest_first = sorted(range(len(costs)), key=lambda item: -costs[item])
    return [dearest_first[i : i + n_owners] for i in range(0, len(costs), n_owners)]


def cost_of(shape: Sequence[int]) -> float:
    """Return the FLOPs of an iteration up to a factor."""
    short, long = sorted(shape)
    return float(short) ** 2 * long


def orthogonalise(
    local: Sequence[Tensor],  # this rank's rows of each matrix, at most one matrix per rank
    shapes: Sequence[Sequence[int]],  # of the whole matrices
    layout: Layout,
    whole: Callable[[Tensor], Tensor],
) -> list[Tensor]:
    """Return this rank's rows of `whole(matrix)` for each matrix; only rank i computes the i-th one. Collective."""
    shards, replicas, results = layout.shards, layout.replicas, list(local)
    by_replica = [slice(r * shards.size, (r + 1) * shards.size) for r in range(replicas.size)]
    own = by_replica[replicas.rank]
    results[own] = _within_replica(local[own], shapes[own], layout, whole)
    for replica, items in enumerate(by_replica if replicas.group is not None else []):
        sizes = [tensor.numel() for tensor in local[items]]
        if sum(sizes) == 0:
            continue
        flat = torch.cat([tensor.reshape(-1) for tensor in results[items]])
        dist.broadcast(flat, group=replicas.group, group_src=replica)
        results[items] = [rows.view_as(old) for rows, old in zip(flat.split(sizes), local[items], strict=True)]
    return results


def _within_replica(
    local: Sequence[Tensor], shapes: Sequence[Sequence[int]], layout: Layout, whole: Callable[[Tensor], Tensor]
) -> list[Tensor]:
    """Do `orthogonalise` on the ranks that share one copy: send each rank all rows of its matrix, and back."""
    shards = layout.shards
    if shards.group is None or not local:
        return [whole(matrix) for matrix in local]
    outgoing = [tensor.numel() for tensor in local] + [0] * (shards.size - len(local))
    n_rows, n_columns = shapes[shards.rank] if shards.rank < len(local) else (0, 0)
    incoming = [layout.n_local_rows(n_rows, shard) * n_columns for shard in range(shards.size)]
    matrix = _exchange(torch.cat([tensor.reshape(-1) for tensor in local]), outgoing, incoming, shards)
    if n_rows:
        matrix = whole(matrix.view(n_rows, n_columns)).reshape(-1)
    returned = _exchange(matrix, incoming, outgoing, shards).split(outgoing)
    return [rows.view_as(old) for rows, old in zip(returned, local, strict=False)]


def _exchange(sent: Tensor, outgoing: list[int], incoming: list[int], axis: Axis) -> Tensor:
    received = sent.new_empty(sum(incoming))
    dist.all_to_all_single(received, sent, incoming, outgoing, group=axis.group)
    return received


# -- the optimizer -------------------------------------------------------------------------------------------------


class Muon(torch.optim.Optimizer):
    """Updates the matrices itself and leaves the other groups to an AdamW that shares its state."""

    def __init__(self, args: MuonArgs, matrices: list[tuple[str, nn.Parameter]], adamw: torch.optim.AdamW) -> None:
        self.layout = layout_of(matrices)
        self._adamw = adamw
        self._scale: Scale = args.scale
        self._ns_steps, self._ns_dtype = args.ns_steps, ns_dtype_on(matrices[0][1].device, args.ns_dtype)
        # GradScaler's flag for optimizers that use `found_inf` and `grad_scale` on the device.
        self._step_supports_amp_scaling = getattr(adamw, "_step_supports_amp_scaling", False)
        own: dict[str, Any] = {
            "params": matrices,
            "muon": True,
            "lr": args.lr,
            "weight_decay": args.weight_decay,
            "momentum": args.momentum,
            "nesterov": args.nesterov,
        }
        others = [
            {**group, "params": list(zip(group["param_names"], group["params"], strict=True)), "muon": False}
            | {"lr_ratio": args.adamw_lr_ratio}
            for group in adamw.param_groups
        ]
        for group in others:
            del group["param_names"]
        super().__init__([own, *others], {})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Make one update with the gradients divided by `grad_scale`, or none if `found_inf` is not 0.

        Both are scalars on the device, set by `optimizer_step`; without them gradients are used unchanged.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        found_inf: Tensor | None = getattr(self, "found_inf", None)
        grad_scale: Tensor | None = getattr(self, "grad_scale", None)
        for group in self.param_groups:
            if group["muon"]:
                divide_gradients(group["params"], grad_scale)
                self._step_matrices(group, None if found_inf is None else found_inf == 0)
        self._step_others(found_inf, grad_scale)
        return loss

    def _step_matrices(self, group: dict[str, Any], wanted: Tensor | None) -> None:
        parameters = [p for p in group["params"] if p.grad is not None]
        n_owners = self.layout.shards.size * self.layout.replicas.size
        for items in rounds([cost_of(p.shape) for p in parameters], n_owners):
            self._step_round([parameters[i] for i in items], group, wanted)

    def _step_round(self, parameters: list[nn.Parameter], group: dict[str, Any], wanted: Tensor | None) -> None:
        """Update one matrix per rank. Takes memory for one whole matrix and for this rank's rows of the others."""
        updates = [self._momentum(p, group, wanted).to(self._ns_dtype) for p in parameters]
        shapes = [tuple(p.shape) for p in parameters]
        orthogonal = orthogonalise(
            updates, shapes, self.layout, lambda matrix: newton_schulz(matrix, self._ns_steps, self._ns_dtype)
        )
        decay = 1 - group["lr"] * group["weight_decay"]
        for parameter, shape, update in zip(parameters, shapes, orthogonal, strict=True):
            values = _local(parameter)
            moved = (values * decay).add_(update, alpha=-group["lr"] * scale_of(shape, self._scale))
            values.copy_(moved if wanted is None else torch.where(wanted, moved, values))

    def _momentum(self, parameter: nn.Parameter, group: dict[str, Any], wanted: Tensor | None) -> Tensor:
        """Update the momentum and return this rank's rows of the matrix to orthogonalize."""
        state = self.state[parameter]
        if "momentum" not in state:
            state["momentum"] = torch.zeros_like(parameter)
        assert parameter.grad is not None
        momentum, grad, mu = _local(state["momentum"]), _local(parameter.grad), group["momentum"]
        moved = torch.lerp(momentum, grad, 1 - mu)
        momentum.copy_(moved if wanted is None else torch.where(wanted, moved, momentum))
        return torch.lerp(grad, moved, mu) if group["nesterov"] else moved

    def _step_others(self, found_inf: Tensor | None, grad_scale: Tensor | None) -> None:
        adamw, groups = self._adamw, [group for group in self.param_groups if not group["muon"]]
        adamw.state = self.state  # in every step, since loading a state replaces them
        adamw.param_groups = groups
        rates = [group["lr"] for group in groups]
        try:
            for group in groups:
                group["lr"] = group["lr"] * group["lr_ratio"]
            with amp_scaling(adamw, found_inf=found_inf, grad_scale=grad_scale):
                adamw.step()
        finally:
            for group, rate in zip(groups, rates, strict=True):
                group["lr"] = rate


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def build_muon(args: MuonArgs, named_parameters: Iterable[tuple[str, nn.Parameter]]) -> torch.optim.Optimizer:
    """Build Muon for the matrices of the blocks and AdamW for the rest."""
    named = [(name, parameter) for name, parameter in named_parameters if parameter.requires_grad]
    matrices = [(name, parameter) for name, parameter in named if takes_muon(name, parameter)]
    if not matrices:
        raise ValueError("optim.type muon: no parameter of the model is a matrix of its layers; use optim.type=adamw")
    shared = AdamWArgs.model_fields.keys() - {"type"}
    adamw_args = AdamWArgs.model_validate(args.model_dump(include=set(shared)))
    adamw = build_adamw(adamw_args, [(name, parameter) for name, parameter in named if not takes_muon(name, parameter)])
    assert isinstance(adamw, torch.optim.AdamW)
    return Muon(args, matrices, adamw)
