"""The table of devices knows them by the names that JAX has for them, and no other."""

import pytest

from tttlm.training.devices import DEVICES, device_of_kind


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("TPU v4", "v4"),
        ("TPU v5 lite", "v5e"),
        ("TPU v5e", "v5e"),
        ("TPU v5", "v5p"),
        ("TPU v5p", "v5p"),
        ("TPU v6 lite", "v6e"),
        ("TPU v6e", "v6e"),
        ("NVIDIA A100-SXM4-80GB", "a100"),
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA H200", "h200"),
    ],
)
def test_every_name_finds_one_device(kind, name):
    found = device_of_kind(kind)
    assert found is not None
    assert found.name == name


@pytest.mark.parametrize("kind", ["cpu", "NVIDIA H100 PCIe", "NVIDIA A100-SXM4-40GB", "TPU v4 lite", "TPU v7x", ""])
def test_a_device_whose_figures_are_not_known_is_none_of_them(kind):
    assert device_of_kind(kind) is None


def test_names_are_unique():
    assert len({device.name for device in DEVICES}) == len(DEVICES)
