"""A launch is looked up once: from then on it goes to the GPU as it is, as long as its tensors lie as they did."""

from __future__ import annotations

import pytest

from formats.kernels.launch import ALIGNMENT, Launch


class Kernel:
    """As much of Triton's as a launch takes; `calls` are (who was called, on which grid, with what)."""

    arg_names = ("x", "y", "n", "L", "BLOCK")

    def __init__(self):
        self.calls = []

    def __getitem__(self, grid):
        def look_up(*arguments, **options):
            self.calls.append(("kernel", grid, arguments, options))
            return Compiled(self.calls)

        return look_up


class Compiled:
    def __init__(self, calls):
        self.calls = calls

    def __getitem__(self, grid):
        return lambda *arguments: self.calls.append(("compiled", grid, arguments, {}))


class Tensor:
    def __init__(self, address, is_cuda=True):
        self.address, self.is_cuda = address, is_cuda

    def data_ptr(self):
        return self.address


@pytest.fixture
def kernel():
    return Kernel()


OPTIONS = {"BLOCK": 8, "L": "layout", "num_warps": 4}


def test_the_second_call_goes_by_what_the_first_compiled(kernel):
    launch = Launch(kernel, (5, 2), (7,), **OPTIONS)
    x, y, z = Tensor(0), Tensor(ALIGNMENT), Tensor(5 * ALIGNMENT)
    launch(x, y)
    launch(z, y)
    assert kernel.calls == [
        ("kernel", (5, 2), (x, y, 7), OPTIONS),
        ("compiled", (5, 2, 1), (z, y, 7, "layout", 8), {}),
    ]


def test_a_tensor_that_lies_elsewhere_is_looked_up_and_changes_nothing(kernel):
    """Compiled for it is another kernel, which reads less at once."""
    launch = Launch(kernel, (1,), (7,), **OPTIONS)
    odd, even = Tensor(ALIGNMENT + 2), Tensor(0)
    for x in (odd, even, odd, even):
        launch(x, even)
    assert [who for who, *_ in kernel.calls] == ["kernel", "kernel", "kernel", "compiled"]


def test_on_the_cpu_it_is_looked_up_each_time(kernel):
    launch = Launch(kernel, (1,), (7,), **OPTIONS)
    for _ in range(3):
        launch(Tensor(0, is_cuda=False), Tensor(0, is_cuda=False))
    assert [who for who, *_ in kernel.calls] == ["kernel"] * 3
