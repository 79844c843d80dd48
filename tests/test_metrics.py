"""Peak speeds of devices; the rest of metrics is tested with whole runs."""

import pytest

from jaxlm.metrics import peak_flops


@pytest.mark.parametrize(
    "kind, teraflops",
    [
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H100 NVL", 835),
        ("NVIDIA H200", 989),
        ("NVIDIA GB200", 2500),
        ("NVIDIA B200", 2250),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA L40S", 362),
        ("NVIDIA L40", 181),
        ("NVIDIA L4", 121),
        ("Tesla T4", 65),
        ("NVIDIA T400", None),
        ("NVIDIA GeForce RTX 4090", 165),
        ("cpu", None),
    ],
)
def test_peak_of_a_device(kind: str, teraflops: float | None) -> None:
    assert peak_flops(kind) == (None if teraflops is None else teraflops * 1e12)
