import ctypes
import platform
from typing import Any

import pytest

from fedftg.engine import machine


@pytest.mark.parametrize(
    ("variable", "libc", "expected"),
    [
        # M_MMAP_THRESHOLD and M_TRIM_THRESHOLD of malloc.h; 32 MiB is the most that glibc takes.
        (None, "glibc", [(-3, 32 * 1024 * 1024), (-1, 2**31 - 1)]),
        ("GLIBC_TUNABLES", "glibc", []),
        (None, "", []),
    ],
)
def test_freed_memory_is_kept_where_nothing_else_was_chosen(
    monkeypatch: pytest.MonkeyPatch, variable: str | None, libc: str, expected: list[Any]
) -> None:
    calls: list[tuple[int, int]] = []

    class Library:
        def mallopt(self, what: int, value: int) -> None:
            calls.append((what, value))

    for name in ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "GLIBC_TUNABLES", "LD_PRELOAD"):
        monkeypatch.delenv(name, raising=False)
    if variable:
        monkeypatch.setenv(variable, "anything")
    monkeypatch.setattr(platform, "libc_ver", lambda: (libc, "2.36"))
    monkeypatch.setattr(ctypes, "CDLL", lambda _: Library())
    machine.keep_freed_memory()
    assert calls == expected
