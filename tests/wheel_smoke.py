"""Build the wheel, install it in an empty environment, and use it from an empty folder. Run by `make wheel-test`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def run(*command: str | Path, cwd: Path, within_s: float = 600.0) -> str:
    print("+", *command, flush=True)
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [str(part) for part in command],
        check=False,
        cwd=cwd,
        env=environment,
        text=True,
        capture_output=True,
        timeout=within_s,
    )
    if done.returncode:
        sys.exit(f"failed with {done.returncode}:\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}")
    return done.stdout


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        run(sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", folder, ROOT, cwd=folder)
        (wheel,) = folder.glob("farflung-*.whl")
        run(sys.executable, "-m", "venv", folder / "env", cwd=folder)
        python, empty = folder / "env" / "bin" / "python", folder / "empty"
        empty.mkdir()
        constraints = ROOT / "constraints.txt"
        run(python, "-m", "pip", "install", "-q", "-c", constraints, "torch==2.13.0", cwd=empty)
        run(python, "-m", "pip", "install", "-q", "-c", constraints, wheel, cwd=empty)
        where = run(python, "-c", "import farflung; print(farflung.__file__)", cwd=empty).strip()
        assert str(folder) in where, f"farflung was imported from {where}"
        assert "join" in run(folder / "env" / "bin" / "farflung", "--help", cwd=empty)
        report = empty / "demo.json"
        options = "--members 2 --rounds 3 --inner-steps 5 --layers 1 --width 32 --context 32 --batch 4 --plain"
        run(folder / "env" / "bin" / "farflung", "demo", *options.split(), "--json", report, cwd=empty)
        figures = json.loads(report.read_text())
        assert figures["digests_equal"], figures
        assert figures["rounds"] >= 3, figures
        print("the wheel works: 1 passed, 0 failed")


if __name__ == "__main__":
    main()
