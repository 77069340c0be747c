"""The Triton kernels write and read the CPU's bytes: on a GPU where there is one, else interpreted."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

TWIN = Path(__file__).with_name("triton_twin.py")


def run_twin(device, size, **environment):
    command = [sys.executable, str(TWIN), device, str(size)]
    return subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, check=False)


def test_interpreted_kernels_write_and_read_the_cpu_s_bytes():
    done = run_twin("cpu", 512, TRITON_INTERPRET="1")
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_kernels_on_the_gpu_write_and_read_the_cpu_s_bytes():
    done = run_twin("cuda", 1 << 20)
    assert done.returncode == 0, done.stdout + done.stderr
