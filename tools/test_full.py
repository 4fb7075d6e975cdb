"""All tests, resumable: those that passed with this very code are not run again.

The result is kept in benchmarks/results/, dated, with hardware and commit.
"""

import datetime
import json
import os
import platform
import subprocess
import sys
from pathlib import Path

from cherry_megatron.runs import git_state

JOURNAL = Path("build/test-full.json")


def main() -> int:
    state = git_state()
    key = json.dumps(state)
    passed: list[str] = []
    if JOURNAL.exists():
        journal = json.loads(JOURNAL.read_text())
        # Uncommitted changes make old results worthless.
        passed = journal["passed"] if journal["key"] == key and not state.get("modified") else []
    listing = subprocess.run(
        [sys.executable, "-m", "pytest", "--collect-only", "-q"], capture_output=True, text=True, check=True
    )
    tests = [line for line in listing.stdout.splitlines() if "::" in line]
    failed: list[str] = []
    JOURNAL.parent.mkdir(exist_ok=True)
    for file in sorted({test.split("::")[0] for test in tests}):
        todo = [test for test in tests if test.startswith(f"{file}::") and test not in passed]
        if not todo:
            continue
        report = JOURNAL.parent / "report.xml"
        done = subprocess.run([sys.executable, "-m", "pytest", f"--junitxml={report}", *todo], check=False)
        if done.returncode == 0:
            passed += todo
            JOURNAL.write_text(json.dumps({"key": key, "passed": passed}))
        else:
            failed.append(file)
    today = datetime.datetime.now(datetime.UTC).date().isoformat()
    result = Path(f"benchmarks/results/{today}-test-full.md")
    result.write_text(
        f"# All tests, {today}\n\n"
        f"`make test-full`, {platform.machine()}, {os.cpu_count()} cores, no GPU, commit {state.get('commit')}"
        f"{' with uncommitted changes' if state.get('modified') else ''}.\n\n"
        f"{len(passed)} of {len(tests)} passed"
        + (f"; files with failures: {', '.join(failed)}" if failed else "")
        + ".\n"
    )
    print(result.read_text())
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
