"""Checks the table of devices against the peaks that metrics use, and its names."""

import pytest

from jaxlm.config import UserError
from jaxlm.plan.devices import DEVICES, REACHED, find
from jaxlm.run.metrics import peak_flops


@pytest.mark.parametrize("name", DEVICES)
def test_planned_and_reported_peaks_are_the_same(name: str):
    assert peak_flops(f"NVIDIA {DEVICES[name].name}") == DEVICES[name].flops


def test_names_are_found_in_any_form():
    assert find("h100") is find("H-100") is DEVICES["H100"] and find("rtx 4090") is DEVICES["RTX4090"]
    with pytest.raises(UserError, match=r"--device is 'TPU'; allowed: A100-40, .*CPU"):
        find("TPU")


def test_an_h100_reaches_what_was_measured():
    assert DEVICES["H100"].flops * REACHED == pytest.approx(800e12)
