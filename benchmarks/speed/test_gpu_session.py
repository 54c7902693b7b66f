"""The script for a GPU that is at hand for minutes, run dry on a CPU: stopped, continued, and not repeated."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parent / "gpu_session.py"


def test_a_session_in_two_pieces(tmp_path: Path) -> None:
    def session(*more: str) -> str:
        command = [sys.executable, str(SCRIPT), str(tmp_path), "--dry", "--runs", "fedavg-iid,fedftg-dir03", *more]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout

    first = session("--minutes", "0")
    assert "fedavg-iid 0 rounds" in first
    checks = (tmp_path / "checks.txt").read_text()
    assert "skipped" in checks or "passed" in checks
    second = session()
    assert "fedavg-iid 4 rounds, {'selected': " in second
    assert (tmp_path / "fedftg-dir03" / "summary.json").exists()
    session()
    timings = [json.loads(line) for line in (tmp_path / "timings.jsonl").read_text().splitlines()]
    assert [row["executor"] for row in timings] == ["sequential", "workers"] * 2
