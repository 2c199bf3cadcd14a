"""Run all benchmarks: `python -m benchmarks [--quick]`; results go to benchmarks/results."""

import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
SCRIPTS = ("ops", "students", "decoders", "recipes", "other_weights", "merging", "matching", "masked")


def main() -> int:
    (HERE / "results").mkdir(exist_ok=True)
    failed = 0
    for name in SCRIPTS:
        print(f"== {name}", flush=True)
        command = [sys.executable, str(HERE / f"{name}.py"), "--json", str(HERE / "results" / f"{name}.json")]
        failed |= subprocess.run([*command, *sys.argv[1:]], check=False).returncode
    return failed


if __name__ == "__main__":
    sys.exit(main())
