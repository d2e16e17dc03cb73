"""The table of accelerators, and what this machine is."""

import os

import pytest

from kiem.planning.devices import DEVICES, _container_memory, find_device, this_machine


@pytest.mark.parametrize(
    ("reported", "name"),
    [
        ("NVIDIA H100 80GB HBM3", "H100"),
        ("NVIDIA H100 PCIe", "H100 PCIe"),
        ("NVIDIA H100 NVL", "H100 NVL"),
        ("NVIDIA H200", "H200"),
        ("NVIDIA A100-SXM4-80GB", "A100-SXM4-80GB"),
        ("NVIDIA A100-SXM4-40GB", "A100"),
        ("NVIDIA A100 80GB PCIe", "A100 80GB PCIe"),
        ("NVIDIA L4", "L4"),
        ("NVIDIA L40S", "L40S"),
        ("Tesla T4", "T4"),
        ("Tesla V100-SXM2-16GB", "V100"),
        ("NVIDIA GeForce RTX 4090", "RTX 4090"),
        ("NVIDIA GeForce RTX 3090", "RTX 3090"),
    ],
)
def test_a_reported_name_finds_its_chip(reported, name):
    assert find_device(reported).name == name


@pytest.mark.parametrize(
    "reported",
    [
        "NVIDIA L40",
        "NVIDIA GeForce RTX 4090 Laptop GPU",
        "NVIDIA GeForce RTX 4090 D",
        "NVIDIA GeForce RTX 3090 Ti",
        "NVIDIA GeForce RTX 4080 SUPER",
        "NVIDIA H100 80GB HBM3 MIG 1g.10gb",
        "AMD Instinct MI300X",
        "",
    ],
)
def test_a_near_name_is_another_chip(reported):
    assert find_device(reported) is None


def test_the_table_is_plausible_and_sourced():
    for device in DEVICES:
        assert 50e12 < device.peak_flops < 1e15, device  # a number with sparsity would pass 1e15 for Hopper
        assert 10e9 < device.memory_bytes < 200e9, device
        assert device.source
    assert len({device.name for device in DEVICES}) == len(DEVICES)


def test_this_machine():
    machine = this_machine()
    assert 1 <= machine.cores <= os.cpu_count()
    assert 0 < machine.memory_available_bytes <= machine.memory_bytes
    assert machine.processor
    assert set(machine.to_dict()) == {"processor", "cores", "memory_bytes", "memory_available_bytes"}


def test_a_containers_memory_limit_is_read_in_both_versions(tmp_path):
    assert list(_container_memory(tmp_path)) == []
    (tmp_path / "memory.max").write_text("max\n")
    (tmp_path / "memory.current").write_text("5\n")
    assert list(_container_memory(tmp_path)) == []
    (tmp_path / "memory.max").write_text("2000\n")
    (tmp_path / "memory").mkdir()
    (tmp_path / "memory/memory.limit_in_bytes").write_text("3000\n")
    (tmp_path / "memory/memory.usage_in_bytes").write_text("7\n")
    assert list(_container_memory(tmp_path)) == [(2000, 5), (3000, 7)]
