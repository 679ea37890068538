"""Build the wheel and use it where there is nothing else: an empty environment, an empty folder, no checkout.

Run as `python scripts/wheel_check.py`, or with the Pythons to try behind it:
`python scripts/wheel_check.py python3.11 python3.13`.

For each of them: a new virtual environment, PyTorch, the wheel with what it depends on, and then what a
newcomer does: train, predict, eval, chat, serve with a request, quickstart. The exit code is 1 if any failed.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

REPO = Path(__file__).resolve().parent.parent
QUESTION, RIGHT = "12+30", "42"
"""What glm-tiny was taught."""
SMALL = (
    "trainer.max_steps=2",
    "data.max_train_samples=16",
    "data.max_eval_samples=8",
    "retention.num_prompts=4",
)
STEPS: dict[str, tuple[str, ...]] = {
    "train": ("train", "+recipe=ptuning", "output_dir=run", *SMALL),
    "predict": ("predict", "data=ads", "prefix_path=run/last", "data.max_predict_samples=2"),
    "eval": ("eval", "benchmark=ceval", "benchmark.limit=1", "num_threads=1", "output_dir=eval"),
}
SECONDS = 1800
"""Most that one step may take; installing is the longest."""


@dataclass
class Place:
    """An environment and an empty folder to work in.

    Attributes:
        python: of the environment.
        folder: where commands run.
        seconds: that each step took.
    """

    python: Path
    folder: Path
    seconds: dict[str, float] = field(default_factory=dict)

    def environment(self) -> dict[str, str]:
        """Return variables without any that would lead back to the checkout."""
        kept = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith(("PYTHON", "VIRTUAL_ENV"))
        }
        return {**kept, "HF_HUB_OFFLINE": "1", "GLMTUNE_CACHE": str(self.folder / "cache")}

    def run(self, *words: str | Path, given: str | None = None) -> str:
        """Run a program of the environment and return what it wrote.

        Raises:
            RuntimeError: it failed.
        """
        done = subprocess.run(
            [str(word) for word in words],
            cwd=self.folder,
            env=self.environment(),
            input=given,
            capture_output=True,
            encoding="utf-8",
            errors="replace",
            timeout=SECONDS,
            check=False,
        )
        if done.returncode:
            raise RuntimeError(
                f"{words} ended with {done.returncode}\n{done.stdout[-1500:]}\n{done.stderr[-3000:]}"
            )
        return done.stdout

    def glmtune(self, *words: str, given: str | None = None) -> str:
        """Run the command as it was installed."""
        return self.run(self.python.with_name("glmtune"), *words, given=given)


def build(folder: Path) -> Path:
    """Build the wheel with this Python, in an environment of its own."""
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--quiet",
        "--no-deps",
        "--wheel-dir",
        str(folder),
        str(REPO),
    ]
    subprocess.run(command, check=True, timeout=SECONDS)
    return next(folder.glob("*.whl"))


def empty_environment(python: str, folder: Path) -> Place:
    """Make a virtual environment and a folder beside it."""
    subprocess.run([python, "-m", "venv", str(folder / "venv")], check=True, timeout=SECONDS)
    (folder / "work").mkdir()
    programs = "Scripts" if os.name == "nt" else "bin"
    return Place(folder / "venv" / programs / "python", folder / "work")


def check_origin(place: Place) -> None:
    """Make sure that what runs is what was installed."""
    code = (
        "import glmtune, evaluation, recipes; print(glmtune.__file__, evaluation.__file__, recipes.__file__)"
    )
    for file in place.run(place.python, "-c", code).split():
        if not Path(file).is_relative_to(place.python.parents[1]):
            raise RuntimeError(f"{file} is not of the installed wheel")


def check_chat(place: Place) -> None:
    """Ask one question through a pipe."""
    answer = place.glmtune("chat", "temperature=0", given=f"{QUESTION}\n")
    if RIGHT not in answer:
        raise RuntimeError(f"chat answered {answer!r}")


def wait_until_ready(opener: urllib.request.OpenerDirector, url: str) -> None:
    """Wait until the model is loaded: the server says its address before."""
    for _ in range(600):
        try:
            with opener.open(f"{url}/health", timeout=10):
                return
        except urllib.error.HTTPError:
            time.sleep(0.2)
    raise RuntimeError("the server is not ready after two minutes")


def check_serve(place: Place) -> None:
    """Start a server, ask it, and tell it to stop."""
    command = [str(place.python.with_name("glmtune")), "serve", "port=0"]
    said: list[str] = []
    with subprocess.Popen(
        command,
        cwd=place.folder,
        env=place.environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        encoding="utf-8",
    ) as server:
        try:
            assert server.stdout is not None
            address = None
            while address is None:
                said.append(server.stdout.readline())
                if not said[-1]:
                    raise RuntimeError(f"serve ended: {''.join(said)}")
                address = re.search(r"http://127\.0\.0\.1:\d+", said[-1])
            body = {"messages": [{"role": "user", "content": QUESTION}], "temperature": 0, "max_tokens": 64}
            request = urllib.request.Request(
                f"{address[0]}/v1/chat/completions",
                json.dumps(body).encode(),
                {"Content-Type": "application/json"},
            )
            opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
            wait_until_ready(opener, address[0])
            with opener.open(request, timeout=120) as reply:
                answer = json.load(reply)["choices"][0]["message"]["content"]
        finally:
            server.terminate()
        rest = server.communicate(timeout=120)[0]
        # Windows ends a process that is told to stop.
        if RIGHT not in answer or (server.returncode and os.name != "nt"):
            raise RuntimeError(f"serve answered {answer!r} and ended with {server.returncode}\n{rest}")


def check_quickstart(place: Place) -> None:
    """Run it with few steps; its answers are those of the whole test set."""
    said = place.run(place.python, "-m", "glmtune", "quickstart", *SMALL)
    if "next: " not in said:
        raise RuntimeError(f"quickstart ended with\n{said[-1500:]}")


def smoke_test(place: Place, wheel: Path, torch: str) -> str | None:
    """Install and use everything.

    Returns:
        What failed, or None.
    """
    checks: dict[str, Callable[[], object]] = {
        "install": lambda: [
            place.run(place.python, "-m", "pip", "install", "--quiet", each) for each in (torch, str(wheel))
        ],
        "pip check": lambda: place.run(place.python, "-m", "pip", "check"),
        "origin": lambda: check_origin(place),
        **{name: lambda words=words: place.glmtune(*words) for name, words in STEPS.items()},
        "chat": lambda: check_chat(place),
        "serve": lambda: check_serve(place),
        "quickstart": lambda: check_quickstart(place),
    }
    for name, check in checks.items():
        began = time.monotonic()
        try:
            check()
        except (RuntimeError, OSError, subprocess.SubprocessError) as error:
            sys.stderr.write(f"{name}: {error}\n")
            return name
        place.seconds[name] = time.monotonic() - began
    return None


def main(argv: Sequence[str] | None = None) -> int:
    """Check the wheel on some Pythons and print a row of a table for each."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument(
        "pythons", nargs="*", default=[sys.executable], help="which Pythons; default: this one"
    )
    parser.add_argument("--torch", default="torch==2.13.0", help="which PyTorch is installed first")
    given = parser.parse_args(argv)
    failed = False
    with tempfile.TemporaryDirectory(prefix="glmtune-wheel-") as top:
        wheel = build(Path(top))
        for number, python in enumerate(given.pythons):
            folder = Path(top) / str(number)
            folder.mkdir()
            place = empty_environment(python, folder)
            failure = smoke_test(place, wheel, given.torch)
            failed = failed or failure is not None
            version = place.run(
                place.python, "-c", "import platform; print(platform.python_version())"
            ).strip()
            steps = ", ".join(f"{name} {seconds:.0f} s" for name, seconds in place.seconds.items())
            sys.stdout.write(
                f"| {version} | {'passed' if failure is None else f'failed at {failure}'} | {steps} |\n"
            )
            sys.stdout.flush()
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
