"""How long commands take to say hello, beside a trivial typer program. Figures, not a test: machines differ."""

import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

_TRIVIAL = """
import typer
app = typer.Typer()
@app.command()
def one(number: int = 1) -> None: ...
@app.command()
def two() -> None: ...
app()
"""
_RUNS = 15


def median_seconds(command: list[str]) -> float:
    took = []
    for _ in range(_RUNS):
        began = time.perf_counter()
        subprocess.run(command, capture_output=True, check=False)
        took.append(time.perf_counter() - began)
    return statistics.median(took)


def main() -> None:
    sage = [str(Path(sys.executable).with_name("sage"))]
    with tempfile.TemporaryDirectory() as name:
        trivial = Path(name) / "trivial.py"
        trivial.write_text(_TRIVIAL)
        base = median_seconds([sys.executable, str(trivial), "--help"])
    print(f"{'a trivial typer program, --help':40} {base * 1000:6.0f} ms")
    for words in (["--help"], ["validate", "manifests"], ["plan", "manifests"], ["status"]):
        took = median_seconds([*sage, *words])
        print(f"{'sage ' + ' '.join(words):40} {took * 1000:6.0f} ms   {took / base:.2f} x")


if __name__ == "__main__":
    main()
