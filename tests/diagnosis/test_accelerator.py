"""What driver and torch say of GPUs, put together."""

import pytest

from miles.diagnosis.accelerator import Card, cards, compute, devices

H100 = Card("NVIDIA H100 80GB HBM3", "81559", "81000", "570.86", "9.0")
ON_GPU = {"name": H100.name, "capability": [9, 0], "free_bytes": 79 << 30, "total_bytes": 80 << 30}


def by_name(findings):
    return {finding.name: finding for finding in findings}


@pytest.fixture
def smi(tmp_path, monkeypatch):
    """An nvidia-smi that prints this and exits with that."""

    def smi(text, code=0):
        program = tmp_path / "nvidia-smi"
        program.write_text(f"#!/bin/sh\ncat <<'END'\n{text}\nEND\nexit {code}\n")
        program.chmod(0o755)
        monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")

    return smi


def test_nvidia_smi_is_read(smi):
    smi("NVIDIA H100 80GB HBM3, 81559, 81000, 570.86, 9.0\nNVIDIA H100 80GB HBM3, 81559, 81000, 570.86, 9.0")
    assert cards() == [H100, H100]


def test_an_nvidia_smi_that_fails_or_is_not_there_sees_nothing(smi, monkeypatch, tmp_path):
    smi("NVIDIA-SMI has failed because it couldn't communicate with the NVIDIA driver.", code=9)
    assert cards() == []
    monkeypatch.setenv("PATH", str(tmp_path / "nothing"))
    assert cards() == []


def test_a_gpu_and_a_torch_for_the_cpu(facts):
    found = by_name(devices(facts, [H100, H100]))
    assert found["gpu"].mark == "fault"
    assert found["gpu"].stops == ("gpu",)
    expected = "nvidia-smi sees 2 (NVIDIA H100 80GB HBM3), but torch 2.13.0+cpu is built for the CPU alone"
    assert found["gpu"].found == expected
    assert "pip install" in found["gpu"].remedy


def test_a_gpu_that_torch_cannot_use(facts, monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    facts["torch"] |= {"cuda_build": "12.8", "cuda_problem": "The NVIDIA driver on your system is too old"}
    found = by_name(devices(facts, [H100]))["gpu"]
    assert "driver 570.86), torch sees none: The NVIDIA driver on your system is too old" in found.found
    assert found.remedy == "a driver for CUDA 12.8"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    hidden = by_name(devices(facts, [H100]))["gpu"]
    assert "CUDA_VISIBLE_DEVICES=''" in hidden.found
    assert hidden.remedy == "unset CUDA_VISIBLE_DEVICES"


def test_no_gpu_is_no_fault(facts):
    found = by_name(devices(facts, []))["gpu"]
    assert (found.mark, found.stops) == ("info", ("gpu",))


def test_a_gpu_in_order_one_in_use_and_one_too_old(facts):
    busy = {**ON_GPU, "free_bytes": 10 << 30}
    old = {**ON_GPU, "name": "Tesla V100", "capability": [7, 0]}
    facts["torch"] |= {"cuda_build": "12.8", "cuda_available": True, "devices": [ON_GPU, busy, old], "nccl": [2, 27, 3]}
    found = by_name(devices(facts, [H100]))
    assert found["cuda:0"].found == (
        "NVIDIA H100 80GB HBM3, 79.0 of 80.0 GiB free, compute capability 9.0, driver 570.86"
    )
    assert [found[f"cuda:{i}"].mark for i in range(3)] == ["ok", "warn", "warn"]
    assert "nvidia-smi names the process" in found["cuda:1"].remedy
    assert "--train-dtype fp32" in found["cuda:2"].remedy
    assert found["nccl"].found == "2.27.3"
    assert "gpu" not in found


def test_no_torch(facts):
    facts["torch"] = {"error": "ModuleNotFoundError: No module named 'torch'"}
    (found,) = devices(facts, [])
    assert (found.mark, found.stops) == ("fault", ("training",))
    facts["compute"] = {"error": "ModuleNotFoundError: No module named 'torch'"}
    assert list(compute(facts)) == []  # said once is enough


def test_products(facts):
    exact, coarse = facts["compute"]["products"]
    wrong = {**exact, "device": "cuda:0", "relative_error": 0.3}
    broken = {"device": "cuda:1", "dtype": "bfloat16", "error": "RuntimeError: no kernel image is available"}
    facts["compute"]["products"] = [exact, coarse, wrong, broken]
    found = by_name(compute(facts))
    assert [f.mark for f in found.values()] == ["ok", "ok", "fault", "fault", "info"]
    assert found["cuda:0 float32"].found.endswith("off by 3e-01: wrong")
    assert found["cuda:0 float32"].stops == ("gpu",)
    assert found["torch.compile"].found == "no triton"
    facts["compute"]["products"] = [{**exact, "relative_error": 0.5}, {**coarse, "error": "RuntimeError: no bf16"}]
    assert [f.stops for f in compute(facts)] == [("training",), (), ()]
