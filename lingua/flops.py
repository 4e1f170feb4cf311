"""Peak rates of accelerators, each row with the data sheet it was read from. Torch-free.

All are dense bf16 (fp16 where there is no bf16) tensor-core rates without sparsity; sheets that print the sparse rate
are halved. Boost clocks, so no run reaches them.
"""

from __future__ import annotations

from typing import NamedTuple


class Peak(NamedTuple):
    """One accelerator."""

    flops_per_s: float
    memory_gib: int
    sheet: str


# By a name that torch's device name contains, lower case; longer names are looked for first.
PEAKS: dict[str, Peak] = {
    "b200": Peak(2250e12, 180, "NVIDIA DGX B200 data sheet: 72 PFLOPS FP8 with sparsity for 8, a quarter dense bf16"),
    "h200": Peak(989.5e12, 141, "NVIDIA H200 data sheet (SXM): BF16 1,979 TFLOPS with sparsity, half dense"),
    "h100": Peak(989.5e12, 80, "NVIDIA H100 data sheet (SXM): BF16 1,979 TFLOPS with sparsity, half dense"),
    "h100 pcie": Peak(756.5e12, 80, "NVIDIA H100 data sheet (PCIe): BF16 1,513 TFLOPS with sparsity, half dense"),
    "h100 nvl": Peak(835.5e12, 94, "NVIDIA H100 data sheet (NVL): BF16 1,671 TFLOPS with sparsity, half dense"),
    "a100": Peak(312e12, 80, "NVIDIA A100 data sheet: BF16 312 TFLOPS"),
    "l40s": Peak(362.05e12, 48, "NVIDIA L40S data sheet: BF16 362.05 TFLOPS"),
    "a40": Peak(149.7e12, 48, "NVIDIA A40 data sheet: BF16 149.7 TFLOPS"),
    "a10": Peak(125e12, 24, "NVIDIA A10 data sheet: BF16 125 TFLOPS"),
    "rtx a6000": Peak(154.85e12, 48, "NVIDIA RTX A6000 data sheet: tensor 309.7 TFLOPS with sparsity, half dense"),
    "rtx 6000 ada": Peak(364.25e12, 48, "NVIDIA RTX 6000 Ada data sheet: tensor (FP8) 1,457 TFLOPS sparse, a quarter"),
    "v100": Peak(125e12, 32, "NVIDIA V100 data sheet (SXM2): FP16 125 TFLOPS; it has no bf16"),
}


def find_peak(device_name: str) -> Peak | None:
    """The row of a device, by torch's name for it ("NVIDIA H100 80GB HBM3") or a short one ("h200")."""
    words = device_name.lower().replace("-", " ").split()
    for name in sorted(PEAKS, key=len, reverse=True):
        if set(name.split()) <= set(words):
            return PEAKS[name]
    return None
