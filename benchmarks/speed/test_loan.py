"""The script for a GPU that is at hand for minutes, run dry on a CPU: stopped, continued, and not repeated."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parent / "loan.py"


def test_a_loan_in_two_pieces(tmp_path: Path) -> None:
    def loan(*more: str) -> str:
        command = [sys.executable, str(SCRIPT), str(tmp_path), "--dry", "--runs", "fedavg-iid,fedftg-dir03", *more]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout

    first = loan("--minutes", "0")
    assert "fedavg-iid 0 rounds" in first
    checks = (tmp_path / "checks.txt").read_text()
    assert "skipped" in checks or "passed" in checks
    second = loan()
    assert "fedavg-iid 4 rounds, {'selected': " in second
    assert (tmp_path / "fedftg-dir03" / "summary.json").exists()
    loan()
    timings = [json.loads(line) for line in (tmp_path / "timings.jsonl").read_text().splitlines()]
    assert [row["executor"] for row in timings] == ["sequential", "workers"] * 2
