"""What is asked of the C library about memory, and when nothing is."""

import ctypes
import platform
from importlib.metadata import PackageNotFoundError

import pytest

from fedftg.engine import machine


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """Calls of mallopt, as on glibc and with nothing set."""
    calls: list[tuple[int, int]] = []

    class Library:
        def __init__(self, name: object) -> None:
            assert name is None

        def mallopt(self, what: int, value: int) -> int:
            calls.append((what, value))
            return 1

    for name in ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "GLIBC_TUNABLES", "LD_PRELOAD"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(platform, "libc_ver", lambda: ("glibc", "2.36"))
    monkeypatch.setattr(ctypes, "CDLL", Library)
    return calls


def test_freed_memory_is_kept(asked: list[tuple[int, int]]) -> None:
    """-3 and -1 are M_MMAP_THRESHOLD and M_TRIM_THRESHOLD of malloc.h; 32 MiB is the most that glibc takes."""
    machine.keep_freed_memory()
    assert asked == [(-3, 32 * 1024 * 1024), (-1, 2**31 - 1)]


@pytest.mark.parametrize("name", ["MALLOC_TRIM_THRESHOLD_", "GLIBC_TUNABLES", "LD_PRELOAD"])
def test_the_users_choice_counts(asked: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv(name, "anything")
    machine.keep_freed_memory()
    assert asked == []


def test_other_libraries_are_left_alone(asked: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "libc_ver", lambda: ("", ""))
    machine.keep_freed_memory()
    assert asked == []


def test_versions_of_what_is_installed_and_what_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    def version(package: str) -> str:
        if package == "fedftg":
            raise PackageNotFoundError(package)
        return "9.9"

    monkeypatch.setattr(machine, "version", version)
    packages = machine.environment(1, "cpu")["packages"]
    assert (packages["fedftg"], packages["torch"]) == ("not installed", "9.9")
