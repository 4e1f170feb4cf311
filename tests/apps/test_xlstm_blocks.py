"""The two blocks of the first xLSTM paper against loops written from its equations, one head and position at a time."""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from apps.main.args import TrainArgs
from lingua.config.keys.model import HybridArgs
from lingua.model.context import ForwardContext
from lingua.train.check import problems
from tests.families import FAMILIES, SHARED, build


def drawn(name: str) -> Any:
    """Return a layer whose parameters are all random, also those that begin as 0."""
    layer: Any = build(FAMILIES[name]).layers[1].get_submodule("xlstm")
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.5)
    return layer.double()


def blockwise(weight: Tensor, x: Tensor) -> Tensor:
    return torch.cat([w @ part for w, part in zip(weight, x.split(weight.shape[2]), strict=True)])


def convolved(layer: Any, x: Tensor) -> Tensor:
    """silu(convolution over positions) of x (S, channels)."""
    taps = layer.conv_weight
    padded = functional.pad(x, (0, 0, taps.shape[1] - 1, 0))
    found = [(padded[t : t + taps.shape[1]] * taps.T).sum(0) + layer.conv_bias for t in range(len(x))]
    return functional.silu(torch.stack(found))


def normed(layer: Any, heads: list[Tensor]) -> Tensor:
    parts = [(h - h.mean()) / (h.var(unbiased=False) + layer.args.norm_eps).sqrt() for h in heads]
    return torch.cat(parts) * layer.multihead_norm.weight


@torch.no_grad()
def test_the_block_of_the_first_paper_is_its_equations():
    layer = drawn("mlstm_v0")
    n_heads, width = layer.args.n_heads, layer.args.width
    u = torch.randn(2, 21, layer.args.dim, generator=torch.Generator().manual_seed(1)).double()
    found = layer(u, ForwardContext())
    for row, wanted in zip(u, found, strict=True):
        up = row @ layer.proj_up.weight.T
        x, z = up[:, :width], up[:, width:]
        mixed = convolved(layer, x)
        memories = [
            (torch.zeros(width // n_heads, width // n_heads).double(), torch.zeros(width // n_heads).double())
        ] * n_heads
        for t in range(len(row)):
            q, k = blockwise(layer.q_proj.weight, mixed[t]), blockwise(layer.k_proj.weight, mixed[t])
            v = blockwise(layer.v_proj.weight, x[t])
            seen = torch.cat((q, k, v))
            i, f = (gate.weight @ seen + gate.bias for gate in (layer.igate_preact, layer.fgate_preact))
            heads = []
            for h, (qh, kh, vh) in enumerate(zip(*(each.split(width // n_heads) for each in (q, k, v)), strict=True)):
                c, n = memories[h]
                kept, added = f[h].sigmoid(), i[h].exp()
                c, n = kept * c + added * torch.outer(kh, vh), kept * n + added * kh
                memories[h] = c, n
                qh = qh * len(qh) ** -0.5
                heads.append((qh @ c) / (n @ qh).abs().clamp(min=1.0))
            out = (normed(layer, heads) + layer.learnable_skip * mixed[t]) * functional.silu(z[t])
            torch.testing.assert_close(wanted[t], layer.proj_down.weight @ out, rtol=1e-3, atol=1e-4)


@torch.no_grad()
def test_slstm_is_its_equations():
    layer = drawn("slstm")
    n_heads, size = layer.args.n_heads, layer.args.dim // layer.args.n_heads
    rows = torch.randn(2, 21, layer.args.dim, generator=torch.Generator().manual_seed(1)).double()
    found = layer(rows, ForwardContext())
    for row, wanted in zip(rows, found, strict=True):
        mixed = convolved(layer, row)
        states = [[torch.zeros(size).double()] * 3 for _ in range(n_heads)]  # y, c, n, without any scale
        for t in range(len(row)):
            for h in range(n_heads):
                y, c, n = states[h]
                part = slice(h * size, (h + 1) * size)
                inputs = (layer.igate, mixed), (layer.fgate, mixed), (layer.zgate, row), (layer.ogate, row)
                raw = torch.cat([gate.weight[h] @ of[t, part] for gate, of in inputs])
                i, f, z, o = (raw + y @ layer.recurrent[h] + layer.gate_bias[h, 0]).split(size)
                c, n = f.sigmoid() * c + i.exp() * z.tanh(), f.sigmoid() * n + i.exp()
                states[h] = [o.sigmoid() * c / n, c, n]
            torch.testing.assert_close(wanted[t], normed(layer, [y for y, _, _ in states]), rtol=1e-3, atol=1e-4)


def test_the_price_of_one_position_after_another_is_told():
    for layers, told in ((["mlstm_v0", "slstm"], ["slstm"]), (["mlstm_v0"], [])):
        args = TrainArgs(model=HybridArgs(**SHARED, layers=layers), steps=300)
        warnings = [finding.text for finding in problems(args, 1)[1] if finding.key == "model"]
        assert [text.split()[0] for text in warnings] == told
