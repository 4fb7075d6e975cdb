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
from typing import Any
from xml.etree import ElementTree

from cherry_megatron.versions import git_state

JOURNAL = Path("build/test-full.json")


def main() -> int:
    state = git_state()
    key = json.dumps(state)
    journal: dict[str, Any] = {"key": key, "passed": [], "skipped": 0, "seconds": 0.0}
    if JOURNAL.exists():
        found = json.loads(JOURNAL.read_text())
        # Uncommitted changes make old results worthless.
        journal = found if found["key"] == key and not state.get("modified") else journal
    listing = subprocess.run(
        [sys.executable, "-m", "pytest", "--collect-only"], capture_output=True, text=True, check=True
    )
    tests = [line for line in listing.stdout.splitlines() if "::" in line]
    if not tests:
        sys.exit("pytest lists no tests")
    failed: list[str] = []
    JOURNAL.parent.mkdir(exist_ok=True)
    for file in sorted({test.split("::")[0] for test in tests}):
        todo = [test for test in tests if test.startswith(f"{file}::") and test not in journal["passed"]]
        if not todo:
            continue
        report = JOURNAL.parent / "report.xml"
        done = subprocess.run([sys.executable, "-m", "pytest", f"--junitxml={report}", *todo], check=False)
        if done.returncode == 0:
            suite = next(ElementTree.parse(report).iter("testsuite"))
            journal["passed"] += todo
            journal["skipped"] += int(suite.attrib["skipped"])
            journal["seconds"] += float(suite.attrib["time"])
            JOURNAL.write_text(json.dumps(journal))
        else:
            failed.append(file)
    today = datetime.datetime.now(datetime.UTC).date().isoformat()
    result = Path(f"benchmarks/results/{today}-test-full.md")
    result.write_text(
        f"# All tests, {today}\n\n"
        f"`make test-full`, {platform.machine()}, {os.cpu_count()} cores, no GPU, commit {state.get('commit')}"
        f"{' with uncommitted changes' if state.get('modified') else ''}.\n\n"
        f"{len(journal['passed']) - journal['skipped']} of {len(tests)} passed, {journal['skipped']} were skipped "
        f"(no GPU), in {journal['seconds'] / 60:.0f} minutes"
        + (f"; files with failures: {', '.join(failed)}" if failed else "")
        + ".\n"
    )
    print(result.read_text())
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
