"""Ask the package index for known vulnerabilities of what is installed; part of CI.

Run as `python scripts/audit.py`.

pip-audit passes over what its service does not know and then ends well, so a mirror that offers packages
only would read as a clean bill. So one package is asked about first, and without an answer this says that
nothing was audited.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

IGNORED: dict[str, str] = {}
"""Known vulnerabilities that are accepted, by their id or an alias: why they do not concern glmtune, or what
is waited for. The only place for such exceptions."""
PROBE = "numpy"
"""A dependency of ours that every index with data on vulnerabilities knows."""
SERVICE = "the vulnerability data of the package index (its JSON API)"


def pip_audit(*words: str) -> dict[str, Any] | None:
    """Run pip-audit and return what it found; None where its service does not answer."""
    command = [sys.executable, "-m", "pip_audit", "--progress-spinner=off", "--format=json", *words]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    try:
        return json.loads(done.stdout)
    except ValueError:
        if "No module named pip_audit" in done.stderr:
            raise SystemExit("pip-audit is not installed: pip install -e '.[dev]'") from None
        return None


def is_answered() -> bool:
    """Whether the service knows anything: asked about one package."""
    with tempfile.TemporaryDirectory() as folder:
        wanted = Path(folder) / "requirements.txt"
        wanted.write_text(f"{PROBE}=={version(PROBE).partition('+')[0]}\n", encoding="utf-8")
        found = pip_audit("--requirement", str(wanted), "--no-deps", "--disable-pip")
    return found is not None and any("skip_reason" not in each for each in found["dependencies"])


def vulnerabilities(found: dict[str, Any]) -> tuple[list[str], list[str]]:
    """Return what pip-audit found as lines: what must be acted on, and what is accepted with its reason."""
    open_ones, accepted = [], []
    for package in found["dependencies"]:
        for each in package.get("vulns", ()):
            names = [each["id"], *each.get("aliases", ())]
            reason = next((IGNORED[name] for name in names if name in IGNORED), None)
            fixed = ", ".join(each.get("fix_versions", ())) or "no version yet"
            line = f"{package['name']} {package['version']}: {each['id']}, mended in {fixed}"
            (open_ones if reason is None else accepted).append(
                line + (f" (ignored: {reason})" if reason else "")
            )
    return open_ones, accepted


def main() -> int:
    """Audit what is installed; 1 if something known is wrong with it."""
    found = pip_audit("--local", "--skip-editable") if is_answered() else None
    if found is None:
        print(f"not audited: no connection to {SERVICE}")
        return 0
    open_ones, accepted = vulnerabilities(found)
    skipped = [
        f"{each['name']}: {each['skip_reason']}" for each in found["dependencies"] if "skip_reason" in each
    ]
    for line in (*open_ones, *accepted, *skipped):
        print(line)
    audited = len(found["dependencies"]) - len(skipped)
    print(f"audited {audited} packages: {len(open_ones)} known vulnerabilities")
    return int(bool(open_ones))


if __name__ == "__main__":
    sys.exit(main())
