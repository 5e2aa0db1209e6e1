"""Fails when fewer test cases ran on a backend than tests/backend_cases.json asks for: a silent skip is a failure."""

import json
import sys
from pathlib import Path


def main() -> int:
    """Compare the counts of the last test run with the wanted minimum, backend by backend."""
    wanted = json.loads(Path("tests/backend_cases.json").read_text())
    counts_file = Path(".cache/backend_cases.json")
    if not counts_file.is_file():
        print(f"{counts_file} is missing: the test run did not count its backend cases")
        return 1
    ran = json.loads(counts_file.read_text())
    right = True
    for backend, minimum in wanted.items():
        # A minimum of 0 would guard nothing.
        enough = ran.get(backend, 0) >= minimum > 0
        right = right and enough
        verdict = "ok" if enough else "TOO FEW"
        print(f"{backend:10} {ran.get(backend, 0):5} cases ran, at least {minimum} wanted: {verdict}")
    return 0 if right else 1


if __name__ == "__main__":
    sys.exit(main())
