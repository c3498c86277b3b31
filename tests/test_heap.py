"""Steps that make the same large tensors again find their memory where the last step left it."""

import subprocess
import sys

import pytest

from nndecomp.training.heap import retain_heap

STEPS = """
import resource, sys
import torch
from nndecomp.training.heap import retain_heap
if sys.argv[1] == "retained" and not retain_heap():
    sys.exit("not glibc")

def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

def step():
    x = torch.ones(1024, 64)
    pre = x @ torch.ones(64, 12288)  # 48 MiB: glibc maps what is above 32 anew each time
    active = pre.relu()
    doubled = active * 2
    del pre
    return (doubled @ torch.ones(12288, 64)).sum().item()

for _ in range(3):
    step()
before = faults()
for _ in range(5):
    step()
print((faults() - before) // 5)
"""


def faults_a_step(heap: str) -> int:
    result = subprocess.run([sys.executable, "-c", STEPS, heap], capture_output=True, text=True, check=True)
    return int(result.stdout)


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc is Linux's")
def test_a_retained_heap_faults_on_a_small_part_of_the_pages():
    plain, retained = faults_a_step("plain"), faults_a_step("retained")
    assert plain > 20_000, f"{plain} page faults a step: nothing to save here"
    assert retained < plain / 3, f"{retained} page faults a step, {plain} without"


def test_an_allocator_that_is_not_glibc_is_left_alone(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("platform.libc_ver", lambda: ("musl", "1.2"))
    assert retain_heap() is False
