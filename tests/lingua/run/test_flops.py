import pytest

from lingua.run.throughput import PEAKS, find_peak


@pytest.mark.parametrize(
    ("name", "row"),
    [
        ("h200", "h200"),
        ("NVIDIA H200", "h200"),
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA H100 PCIe", "h100 pcie"),
        ("NVIDIA H100 NVL", "h100 nvl"),
        ("NVIDIA A100-SXM4-80GB", "a100"),
        ("NVIDIA RTX A6000", "rtx a6000"),
        ("NVIDIA RTX 6000 Ada Generation", "rtx 6000 ada"),
        ("Tesla V100-SXM2-32GB", "v100"),
    ],
)
def test_a_device_finds_its_row(name: str, row: str) -> None:
    assert find_peak(name) == PEAKS[row]


def test_an_unknown_device_has_none() -> None:
    assert find_peak("NVIDIA GeForce GTX 750") is None


def test_every_row_names_its_data_sheet() -> None:
    assert all("data sheet" in peak.sheet for peak in PEAKS.values())
