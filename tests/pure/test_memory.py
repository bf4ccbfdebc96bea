"""Free memory of a host, read off files as the kernel writes them, and errors that ran out of it."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron.launch.memory import HostMemory, host_memory, out_of_memory_message

GIB = 2**30


def kernel(root: Path, files: dict[str, str]) -> HostMemory:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    found = host_memory(root)
    assert found is not None
    return found


def meminfo(total: int, available: int, swap: int = 0) -> dict[str, str]:
    rows = {"MemTotal": total, "MemAvailable": available, "SwapFree": swap}
    return {"proc/meminfo": "".join(f"{name}:  {count * 2**20} kB\n" for name, count in rows.items())}


def test_free_memory_of_the_host(tmp_path: Path) -> None:
    found = kernel(tmp_path, meminfo(64, 48, 2))
    assert found == HostMemory(50 * GIB, "this host has 64.0 GiB, of which 48.0 GiB are free, and 2.0 GiB of swap")


def test_free_memory_of_a_control_group(tmp_path: Path) -> None:
    """The tightest of those around the process; what is not the processes' own memory could be freed."""
    group = "sys/fs/cgroup/slurm/job_7"
    files = {
        "proc/self/cgroup": "0::/slurm/job_7/step_0\n",
        f"{group}/step_0/memory.max": "max\n",
        f"{group}/memory.max": f"{8 * GIB}\n",
        f"{group}/memory.stat": f"anon {GIB}\nfile {6 * GIB}\n",
        "sys/fs/cgroup/slurm/memory.max": f"{32 * GIB}\n",
    }
    found = kernel(tmp_path, meminfo(64, 48) | files)
    assert found == HostMemory(7 * GIB, "the control group of this process has 8.0 GiB, of which 1.0 GiB are used")


def test_free_memory_of_a_container(tmp_path: Path) -> None:
    """If the group's own path is not to be seen, its files lie at the root; and in the older form."""
    second = {"proc/self/cgroup": "0::/../../docker/x\n", "sys/fs/cgroup/memory.max": f"{4 * GIB}\n"}
    assert kernel(tmp_path / "v2", meminfo(64, 48) | second).free == 4 * GIB
    place = "sys/fs/cgroup/memory"
    first = {"proc/self/cgroup": "9:cpu:/a\n4:memory:/docker/x\n", f"{place}/memory.limit_in_bytes": f"{4 * GIB}\n"}
    first |= {f"{place}/memory.stat": f"rss 5\ntotal_rss {GIB}\n"}
    assert kernel(tmp_path / "v1", meminfo(64, 48) | first).free == 3 * GIB


def test_nothing_is_known_of_another_system(tmp_path: Path) -> None:
    assert host_memory(tmp_path) is None


class OutOfMemoryError(RuntimeError):
    """By its name as torch's."""


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (
            RuntimeError("[enforce fail at alloc_cpu.cpp:121] err == 0. DefaultCPUAllocator: can't allocate memory: you tried "
                         "to allocate 400 bytes. Error code 12 (Cannot allocate memory)\nframe #0"),
            "out of memory: can't allocate memory: you tried to allocate 400 bytes.",
        ),
        (
            OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total of 79 GiB. If reserved "
                             "but unallocated memory is large try setting X"),
            "out of memory: CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total of 79 GiB.",
        ),
        (MemoryError(), "out of memory: MemoryError"),
        (OSError(12, "Cannot allocate memory"), "out of memory: [Errno 12]"),
    ],
)  # fmt: skip
def test_allocator_errors_become_one_line(error: BaseException, said: str) -> None:
    text = out_of_memory_message(error)
    assert text.startswith(said) and "\n" not in text and "try setting" not in text


def test_other_errors_are_not_out_of_memory() -> None:
    for error in (RuntimeError("shapes differ"), ValueError("out of memory of what came before"), OSError(2, "No such file")):
        assert out_of_memory_message(error) == ""
