"""Paths in the repository that tests read."""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TABLE_RECORDING = ROOT / "test" / "data" / "table"
GOLDEN_COMPACT = ROOT / "test" / "golden_compact"
