"""Stands for Python where a test starts a process: has the warm process fork one, and is its ears and its end.

    client.py SOCKET LATE -m MODULE WORDS...      client.py SOCKET LATE -c CODE WORDS...

LATE names variables (with commas) that may be other ones than those of the warm process.

Runs with `-I -S`, as it imports next to nothing. Signals go on to the fork; SIGKILL, which nobody sees, cuts the
connection, on which the warm process kills the fork. Where the fork would not be what a new process is, because of
a variable that libraries read while they are imported, a new process it is.
"""

import json
import os
import signal
import socket
import sys

PASSED_ON = ("SIGHUP", "SIGINT", "SIGQUIT", "SIGTERM", "SIGUSR1", "SIGUSR2", "SIGWINCH", "SIGCONT")
READ_LATE = (
    *(
        "COLUMNS",
        "LINES",
        "NO_COLOR",
        "TERM",
        "PATH",
        "PWD",
        "OLDPWD",
        "SHLVL",
        "_",
        "VIRTUAL_ENV",
        "SKIP_SETUP",
    ),
    *("PYTEST_CURRENT_TEST", "PYTEST_XDIST_WORKER", "PYTEST_XDIST_WORKER_COUNT", "PYTEST_XDIST_TESTRUNUID"),
    *("RUN", "OUTPUT_DIR", "OPENAI_API_KEY"),
    # Set by glmtune itself, also in the process of the tests.
    *("TOKENIZERS_PARALLELISM", "TRANSFORMERS_VERBOSITY", "HF_HUB_DISABLE_PROGRESS_BARS"),
)
"""Variables that may differ from those of the warm process, besides those of glmtune itself: nothing reads them while
it is imported."""


def is_as_warm(environment: dict[str, str], warm: dict[str, str], paths: list[str], late: list[str]) -> bool:
    """Whether a new process would have found the same while it imported."""
    names = {name for name in {*environment, *warm} if environment.get(name) != warm.get(name)}
    if environment.get("PYTHONPATH", "") in paths:
        names.discard("PYTHONPATH")
    return all(name in READ_LATE or name in late or name.startswith("GLMTUNE_") for name in names)


def main() -> None:
    place, late, *words = sys.argv[1:]
    environment = dict(os.environ)
    with open(os.path.join(os.path.dirname(place), "facts.json"), encoding="utf-8") as file:
        facts = json.load(file)
    if words[0] not in ("-m", "-c") or not is_as_warm(
        environment, facts["environment"], facts["paths"], late.split(",")
    ):
        os.execv(sys.executable, [sys.executable, *words])
    connection = socket.socket(socket.AF_UNIX)
    connection.connect(place)
    request = json.dumps({"words": words, "cwd": os.getcwd(), "environment": environment}).encode("utf-8")
    socket.send_fds(connection, [len(request).to_bytes(8, "big")], [0, 1, 2])
    connection.sendall(request)
    for name in PASSED_ON:
        signal.signal(getattr(signal, name), lambda number, frame: connection.send(bytes([number])))
    answer = connection.recv(64)
    if not answer:
        sys.stderr.write("the warm process ended\n")
        os._exit(254)
    code = int(answer)
    if code < 0:
        signal.signal(-code, signal.SIG_DFL) if -code != signal.SIGKILL else None
        os.kill(os.getpid(), -code)
    os._exit(code)


if __name__ == "__main__":
    main()
