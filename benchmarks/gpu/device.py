"""The device that is measured: its clock, its limits, its condition."""

from __future__ import annotations

import shutil
import statistics
import subprocess
import time

_MATMUL = 8192  # rows and columns
_COPY_BYTES = 1 << 30
_MOST_CALLS = 50  # in a turn: what is queued while the device sleeps


class Cuda:
    """The current CUDA device, timed by events of its stream."""

    kind = "cuda"

    def __init__(self):
        import torch

        # PyTorch makes the context with the first tensor, and the kernels want one that is current.
        torch.zeros(1, device=self.kind)
        self.ordinal = torch.cuda.current_device()
        properties = torch.cuda.get_device_properties(self.ordinal)
        self.name = f"{properties.name}, {properties.multi_processor_count} SMs, CUDA {torch.version.cuda}"
        self.cache_bytes = properties.L2_cache_size
        self.matmul_size, self.copy_bytes = _MATMUL, _COPY_BYTES
        self._torch = torch

    def synchronize(self) -> None:
        self._torch.cuda.synchronize()

    def seconds(self, step, calls: int) -> float:
        """Of one of `calls` calls in a row."""
        torch = self._torch
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        # The device sleeps while calls are queued, or short kernels would be timed by how fast Python can launch them.
        torch.cuda._sleep(200_000 * calls)
        begin.record()
        for _ in range(calls):
            step()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3 / calls

    def release(self) -> None:
        """Gives back the memory that nothing holds any more: the next process may need it."""
        self._torch.cuda.empty_cache()

    def stream(self) -> int:
        return self._torch.cuda.current_stream().cuda_stream

    def condition(self) -> str:
        """Clocks, power and temperature now, from nvidia-smi; "" where there is none."""
        if shutil.which("nvidia-smi") is None:
            return ""
        fields = "clocks.sm,clocks.mem,power.draw,temperature.gpu"
        command = ["nvidia-smi", f"--id={self.ordinal}", f"--query-gpu={fields}"]
        done = subprocess.run([*command, "--format=csv,noheader"], capture_output=True, text=True)
        return done.stdout.strip() + " C" if done.returncode == 0 else ""


class Cpu:
    """Stands in for a device where there is none: so the suite itself can be tested. Its times mean nothing."""

    kind, name = "cpu", "no device: PyTorch on the CPU"
    cache_bytes, matmul_size, copy_bytes = 1 << 16, 64, 1 << 16

    def synchronize(self) -> None:
        pass

    def seconds(self, step, calls: int) -> float:
        begin = time.perf_counter()
        for _ in range(calls):
            step()
        return (time.perf_counter() - begin) / calls

    def release(self) -> None:
        pass

    def condition(self) -> str:
        return ""


def turn(device, step, samples, seconds: float) -> None:
    """A turn of a step in a round (see interleave.run): its time is that of a call among several in a row."""
    once = max(device.seconds(step, 1), 1e-7)  # also what warms up
    calls = min(max(int(seconds / once), 1), _MOST_CALLS)
    samples.wall.append(device.seconds(step, calls))


def limits(device) -> dict:
    """What measures the device itself, by name: a product of bfloat16 matrices, and copying memory within it."""
    import torch

    size = device.matmul_size
    # Normal numbers: with zeros the device needs less power and clocks higher than it ever will at work.
    a, b = (torch.randn(size, size, device=device.kind, dtype=torch.bfloat16) for _ in range(2))
    product = torch.empty_like(a)
    source = torch.randn(device.copy_bytes // 4, device=device.kind)
    target = torch.empty_like(source)

    def rate(work, step):
        return lambda: work / statistics.median(device.seconds(step, 5) for _ in range(3))

    return {
        "matmul": rate(2.0 * size**3, lambda: torch.mm(a, b, out=product)),
        "copy": rate(2.0 * device.copy_bytes, lambda: target.copy_(source)),
    }


def unavailable_reason() -> str | None:
    """Why nothing can be measured here; None when it can."""
    try:
        import torch
    except ImportError as error:
        return f"PyTorch cannot be imported ({error}): pip install torch (memory, events and peers are PyTorch's)"
    if not torch.cuda.is_available():
        return f"PyTorch {torch.__version__} finds no CUDA device"
    return None
