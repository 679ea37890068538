"""The sources name nothing that only Unix has, unless they ask first; and text files are UTF-8 wherever they lie."""

from __future__ import annotations

import ast
import functools
from collections.abc import Iterator
from pathlib import Path

REPO = Path(__file__).resolve().parents[2]
FILES = [path for top in ("glmtune", "evaluation", "recipes") for path in sorted((REPO / top).rglob("*.py"))]
UNIX_MODULES = (
    "_posixsubprocess crypt curses fcntl grp nis posix pty pwd readline resource syslog termios tty"
)
UNIX_NAMES = {
    "os": "O_DIRECTORY O_NOFOLLOW WEXITSTATUS WIFEXITED WNOHANG chown chroot ctermid fchmod fchown fork forkpty getegid "
    "geteuid getgid getloadavg getpgid getpgrp getpriority getresuid getsid getuid killpg lchown mkfifo mknod nice "
    "openpty pread preadv pwrite pwritev register_at_fork sched_getaffinity sched_setaffinity sendfile setpgid setsid "
    "setuid statvfs sync sysconf tcgetpgrp uname wait wait3 wait4 waitid",
    "signal": "SIGALRM SIGBUS SIGCHLD SIGCONT SIGHUP SIGKILL SIGPIPE SIGPROF SIGQUIT SIGSTOP SIGTSTP SIGTTIN SIGTTOU "
    "SIGUSR1 SIGUSR2 SIGWINCH alarm pause pthread_kill pthread_sigmask setitimer sigwait",
    "socket": "AF_UNIX SO_REUSEPORT",
    "time": "tzset",
}
MAY = {
    # Never reached where `os.geteuid` is missing: `native_library` asks for it.
    ("glmtune/quantization/kernels/library_cache.py", "os.geteuid"),
    # In a function that is called on Linux only.
    ("glmtune/training/distributed/parent.py", "os.register_at_fork"),
    ("glmtune/training/distributed/parent.py", "signal.SIGKILL"),
}


@functools.cache
def trees() -> list[tuple[str, ast.Module]]:
    """Return every file's name and tree, which are read once for all tests."""
    return [
        (path.relative_to(REPO).as_posix(), ast.parse(path.read_text(encoding="utf-8"))) for path in FILES
    ]


@functools.cache
def calls() -> list[tuple[str, ast.Call, str]]:
    """Return every call with the name of its file, and what is called as text."""
    return [
        (name, node, ast.unparse(node.func))
        for name, tree in trees()
        for node in ast.walk(tree)
        if isinstance(node, ast.Call)
    ]


def asked_for(tree: ast.AST) -> frozenset[str]:
    """Return the names that a file asks for before it uses them: `hasattr(os, "fork")`."""
    calls = (node for node in ast.walk(tree) if isinstance(node, ast.Call))
    return frozenset(
        f"{ast.unparse(call.args[0])}.{call.args[1].value}"
        for call in calls
        if ast.unparse(call.func) in ("hasattr", "getattr") and isinstance(call.args[1], ast.Constant)
    )


def unguarded_imports(tree: ast.AST, guarded: bool = False) -> Iterator[str]:
    """Yield modules that are imported for better or worse: not where an ImportError is caught."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import | ast.ImportFrom) and not guarded:
            names = (
                [each.name for each in node.names] if isinstance(node, ast.Import) else [node.module or ""]
            )
            yield from (name.split(".")[0] for name in names)
        catches = isinstance(node, ast.Try) and any("ImportError" in ast.unparse(h) for h in node.handlers)
        yield from unguarded_imports(node, guarded or catches)


def test_modules_of_unix_are_imported_on_trial() -> None:
    found = {
        (name, each)
        for name, tree in trees()
        for each in unguarded_imports(tree)
        if each in UNIX_MODULES.split()
    }
    assert found == set()


def test_what_only_unix_has_is_asked_for() -> None:
    found = set()
    for name, tree in trees():
        asked = asked_for(tree)
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                whole = f"{node.value.id}.{node.attr}"
                if node.attr in UNIX_NAMES.get(node.value.id, "").split() and whole not in asked:
                    found.add((name, whole))
    assert found == MAY


def test_no_path_of_unix() -> None:
    allowed = {
        "glmtune/quantization/kernels/native.py": {"/proc/cpuinfo"},
        "glmtune/storage/holder.py": {"/proc/sys/kernel/random/boot_id", "/proc/self/ns/pid"},
    }
    for name, tree in trees():
        texts = {node.value for node in ast.walk(tree) if isinstance(node, ast.Constant)}
        places = {
            text for text in texts if str(text).startswith(("/proc/", "/dev/", "/tmp", "/etc/", "/usr/"))
        }
        assert places <= allowed.get(name, set()), name


def test_no_shell() -> None:
    """No process is started through a shell, nor a shell itself; ssh's other end is a Unix machine by its rule."""
    for name, call, called in calls():
        assert called not in ("os.system", "os.popen", "subprocess.getoutput"), name
        assert not any(word.arg == "shell" for word in call.keywords), name
        if called.startswith("subprocess."):
            words = {node.value for node in ast.walk(call) if isinstance(node, ast.Constant)}
            assert not words & {"sh", "bash", "/bin/sh"}, name


def is_text_without_encoding(call: ast.Call, called: str) -> bool:
    """Whether a call opens a text file in whatever encoding the system has."""
    words = {word.arg for word in call.keywords}
    method = call.func.attr if isinstance(call.func, ast.Attribute) else None
    if method in ("read_text", "write_text"):
        return "encoding" not in words and len(call.args) < (1 if method == "read_text" else 2)
    is_open = method == "open" or called == "open"
    modes = [
        each.value for each in call.args if isinstance(each, ast.Constant) and isinstance(each.value, str)
    ]
    mode = next((each for each in modes if set(each) <= set("rwaxbt+")), None)
    if not is_open or "encoding" in words:
        return False
    return mode is not None and "b" not in mode if method else mode is None or "b" not in mode


def test_text_files_are_utf8() -> None:
    found = [
        f"{name}:{node.lineno}" for name, node, called in calls() if is_text_without_encoding(node, called)
    ]
    assert found == []


def test_programs_are_read_as_utf8() -> None:
    """`text=True` would read what another program says in whatever encoding the system has."""
    found = [
        f"{name}:{node.lineno}"
        for name, node, called in calls()
        if any(word.arg in ("text", "universal_newlines") for word in node.keywords)
        and called.startswith("subprocess.")
    ]
    assert found == []
