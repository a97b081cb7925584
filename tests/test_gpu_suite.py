# SPDX-License-Identifier: Apache-2.0
"""The tests for GPUs, where there is none: skipped with the reason, but not idle.

Their programs run here too, on a device that keeps its values on the CPU: that shows
that they are right as programs, not that a GPU is.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import device_stand_in as stand_in
import pytest
import torch
from distributed import RankPool

ROOT = Path(__file__).resolve().parent.parent
GPU_TESTS = ROOT / "tests" / "gpu"
sys.path.insert(0, str(GPU_TESTS))

import gpu_cases  # noqa: E402
import gpu_operators as programs  # noqa: E402
import gpu_paths  # noqa: E402
from gpu_cases import Case  # noqa: E402

no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")


def run_on_stand_in(name: str, *args: object) -> None:
    """Run a program of gpu_operators with a device that there is everywhere."""
    stand_in.set_up()
    device = torch.device(stand_in.DEVICE)
    gpu_cases.KIND = device.type
    gpu_cases.own_device = lambda: device
    getattr(programs, name)(*args)


@pytest.mark.parametrize("rank_pool", [[2, 1]], indirect=True)
@pytest.mark.parametrize(
    ("name", "args"),
    [
        ("compare_exchange", (Case(hidden=7, dtype="float16", holes=True),)),
        ("compare_exchange", (Case(tokens=(0, 9), align=4, topk=6),)),
        ("compare_type", ("float8_e4m3fn", 3)),
        ("compare_type", ("bool", 3)),
        ("compare_capacity", ()),
        ("compare_parts", ()),
        ("compare_gradients", (Case(dtype="float32", hidden=33), 0, True)),
        ("compare_gradients", (Case(hidden=9), 3, False)),
        ("compare_calls_in_flight", ()),
        ("compare_local", (Case(topk=6, align=4, holes=True),)),
        ("compare_local", (Case(tokens=(0,)),)),
    ],
)
def test_programs(rank_pool: RankPool, name: str, args: tuple) -> None:
    rank_pool.run(run_on_stand_in, name, *args)


def compare_fp8_on_stand_in() -> None:
    """The stand-in sends rows as they are: so the program of the wire of 8-bit floats
    fails, but where it takes them for such."""
    stand_in.set_up()
    device = torch.device(stand_in.DEVICE)
    gpu_cases.KIND = device.type
    gpu_paths.own_device = lambda: device
    with pytest.raises(AssertionError, match="bytes differ"):
        gpu_paths.compare_fp8()
    gpu_paths.quantize = lambda rows: rows
    gpu_paths.compare_fp8()


def test_fp8_program(make_rank_pool) -> None:
    make_rank_pool([1, 1]).run(compare_fp8_on_stand_in)


def test_quantized_rows() -> None:
    # The largest of a block becomes 448 times the scale, whatever it is.
    rows = torch.zeros(2, 130)
    rows[0, :4] = torch.tensor([-896.0, 2.0, 17.0, 19.0])  # scale 2
    rows[0, 128:] = torch.tensor([7.0, 0.0])  # a block of its own
    found = gpu_paths.quantize(rows)
    # 8.5 lies between 8 and 9, 9.5 between 9 and 10: ties go to the even one.
    assert found[0, :4].tolist() == [-896.0, 2.0, 16.0, 20.0]
    assert found[0, 128:].tolist() == [7.0, 0.0]
    assert not found[1].any() and found.is_contiguous()
    assert gpu_paths.quantize(rows.double()[:, :3]).tolist() == rows[:, :3].tolist()
    assert gpu_paths.quantize(rows.half()[:0]).shape == (0, 130)


def tell_bits_apart() -> None:
    """What is the same passes, and one bit or the wrong device does not."""
    expected = torch.tensor([1.0, 2.0])
    stand_in.set_up()
    gpu_cases.KIND = torch.device(stand_in.DEVICE).type
    same = stand_in.to_device(expected.clone())
    other = stand_in.to_device(torch.tensor([1.0, 2.0000002]))
    gpu_cases.assert_same([same], [expected])
    with pytest.raises(AssertionError, match=r"result\[0\]: 1 of 8 bytes differ"):
        gpu_cases.assert_same([other], [expected])
    with pytest.raises(AssertionError):
        gpu_cases.assert_same([expected], [expected])


# In a process of its own: a device that torch knows is known until that ends.
@pytest.mark.parametrize("rank_pool", [[2, 1]], indirect=True)
def test_bits_are_compared(rank_pool: RankPool) -> None:
    rank_pool.run(tell_bits_apart)


@no_gpu
def test_all_are_skipped() -> None:
    command = [sys.executable, "-m", "pytest", str(GPU_TESTS), "-p", "no:cacheprovider"]
    found = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=240
    )
    assert found.returncode == 0, found.stdout + found.stderr
    last = found.stdout.strip().splitlines()[-1]
    assert "skipped" in last and "passed" not in last and "failed" not in last
    for name in ("operators", "streams", "paths"):
        lines = [
            line
            for line in found.stdout.splitlines()
            if line.startswith("SKIPPED") and f"test_gpu_{name}.py" in line
        ]
        assert lines
        assert all("there is no CUDA device: " in line for line in lines)


@no_gpu
def test_the_script_says_that_there_is_no_device() -> None:
    found = subprocess.run(
        [str(ROOT / "tools" / "test_gpu.sh")],
        env={**os.environ, "PYTHON": sys.executable},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert found.returncode == 1
    assert found.stdout == ""
    (line,) = found.stderr.splitlines()
    assert line.startswith("there is no CUDA device: ")


# In place of a Python with a GPU, and of NVIDIA's programs.
FAKE_PYTHON = """#!/bin/bash
case "$*" in
  -) echo "torch 2.99" ;;
  *pip*) exit $BUILD_STATUS ;;
  *pytest*)
    echo "SKIPPED [2] tests/gpu/test_x.py:31: needs NCCL"
    exit $PYTEST_STATUS ;;
esac
"""
FAKE_SANITIZER = """#!/bin/bash
[[ "$*" != *racecheck* ]] || echo "Error: $HAZARD"
[[ "$*" != *racecheck* ]] || exit 9
"""


def run_script(folder: Path, **environment: str) -> subprocess.CompletedProcess:
    """Run tools/test_gpu.sh with the fakes."""
    for name, text in (
        ("python", FAKE_PYTHON),
        ("compute-sanitizer", FAKE_SANITIZER),
        ("nvidia-smi", "#!/bin/bash\necho GPU 0\n"),
        ("nvcc", "#!/bin/bash\n"),
    ):
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    return subprocess.run(
        [str(ROOT / "tools" / "test_gpu.sh")],
        env={
            "PATH": f"{folder}:{os.environ['PATH']}",
            "PYTHON": str(folder / "python"),
            **environment,
        },
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.mark.parametrize(
    ("status", "text"),
    [
        ("3", "FAILED: the build (exit status 3)"),
        ("124", "FAILED: the build, ended at the limit of 480 s (GPU_TEST_SECONDS)"),
    ],
)
def test_the_script_says_that_the_build_failed(
    tmp_path: Path, status: str, text: str
) -> None:
    found = run_script(tmp_path, BUILD_STATUS=status)
    assert found.returncode == 1, found.stdout + found.stderr
    assert found.stdout.splitlines()[-1] == text


@pytest.mark.parametrize(
    ("status", "hazard", "failures"),
    [
        (0, "Device not supported", []),
        (0, "hazard in at::native::copy", []),
        (0, "hazard in automoe::kernels::gather", ["racecheck (exit status 9)"]),
        (1, "Device not supported", ["tests/gpu (exit status 1)"]),
    ],
)
def test_the_script_lists_what_was_not_run(
    tmp_path: Path, status: int, hazard: str, failures: list[str]
) -> None:
    found = run_script(
        tmp_path, GPU_TEST_BUILD="0", PYTEST_STATUS=str(status), HAZARD=hazard
    )
    lines = found.stdout.splitlines()
    assert found.returncode == bool(failures), found.stdout + found.stderr
    assert "not run: tests/gpu: needs NCCL" in lines
    assert [line for line in lines if line.startswith("FAILED: ")] == [
        f"FAILED: {failure}" for failure in failures
    ]
    said = "not run: racecheck: needs a machine on which" in found.stdout
    assert said == (hazard == "Device not supported")


@no_gpu
def test_the_program_for_the_sanitizer_says_so_too() -> None:
    found = subprocess.run(
        [sys.executable, str(GPU_TESTS / "kernels_program.py")],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert found.returncode == 2
    assert found.stdout.startswith("there is no CUDA device: ")
