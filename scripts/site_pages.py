"""A hook of MkDocs: the site has the pages of ``docs``, what they link to elsewhere here, and the notebooks.

Pages link to results of benchmarks, model cards and the like, which stand beside what they describe. MkDocs
knows one folder only; so all of it is put together in a temporary one, and links are turned to where things
stand there. On a page as it is read in the repository the same links work as they are.
"""

from __future__ import annotations

import atexit
import os
import re
import shutil
import tempfile
from pathlib import Path
from typing import Any

REPO = Path(__file__).resolve().parent.parent
DOCS = REPO / "docs"
ELSEWHERE = "more"
"""Folder of the site for what does not stand in ``docs``."""
FENCE = re.compile(r"(^ *```.*?^ *```[^\n]*$)", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"(\]\()([^)\s]+)(\))")
CHINESE = "\u3001-\u303f\u4e00-\u9fff\uff00-\uffef“”"
LINE_END = re.compile(rf"(?<=[{CHINESE}])\n *(?=[{CHINESE}])")


def on_config(config: Any) -> Any:
    """Let MkDocs build from the pages put together; it calls this for every language."""
    if Path(config.docs_dir) == DOCS:
        folder = Path(tempfile.mkdtemp(prefix="glmtune-docs-"))
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
        linked = put_together(folder)
        named = set(re.findall(r"[\w/]+\.md", str(config.nav)))
        pages = {
            page.relative_to(DOCS).as_posix() for page in DOCS.rglob("*.md") if ".zh" not in page.suffixes
        }
        if orphans := sorted(pages - named - {place.as_posix() for place in linked}):
            from mkdocs.exceptions import PluginError

            raise PluginError(
                f"No link leads to {', '.join(orphans)}. Name them in mkdocs.yml, or link to them."
            )
        config.docs_dir = str(folder)
    return config


def put_together(target: Path) -> set[Path]:
    """Write all pages of the site.

    Args:
        target: an empty folder.

    Returns:
        What some page links to, as it stands on the site.

    Raises:
        FileNotFoundError: a page links to a folder without a README.md.
    """
    shutil.copytree(DOCS, target, dirs_exist_ok=True)
    for notebook in sorted(DOCS.rglob("*.ipynb")):
        write_notebook(notebook, target / place_of(notebook).parent)
    waiting = sorted(DOCS.rglob("*.md"))
    seen = set(waiting)
    reached: set[Path] = set()
    while waiting:
        page = waiting.pop()
        text, linked = turned(page.read_text(encoding="utf-8"), page)
        place = target / place_of(page)
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_text(text, encoding="utf-8")
        for file in (file for file in linked if file not in seen):
            seen.add(file)
            if file.suffix == ".md":
                waiting.append(file)
            elif DOCS not in file.parents:
                (target / place_of(file)).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(file, target / place_of(file))
        reached |= {place_of(file) for file in linked if file != page}
    return reached


def turned(text: str, page: Path) -> tuple[str, list[Path]]:
    """Turn a page's links to where things stand on the site.

    Args:
        text: of the page.
        page: where it stands in the repository.

    Returns:
        The text, and the files of this repository that it links to.
    """
    linked: list[Path] = []

    def turn(match: re.Match[str]) -> str:
        target, mark, anchor = match[2].partition("#")
        if not target or re.match(r"[a-z]+:", target):
            return match[0]
        file = (page.parent / target).resolve()
        if file.is_dir():
            file /= "README.md"
        if not file.is_file():
            if REPO in file.parents and file.parent.is_dir() and file.name == "README.md":
                raise FileNotFoundError(
                    f"{page}: {match[2]} is a folder without a README.md. Link to a file."
                )
            return match[0]  # MkDocs names it
        linked.append(file)
        place = place_of(file)
        if file.suffix == ".ipynb":
            place = place.with_suffix(".md")
        away = os.path.relpath(place, place_of(page).parent).replace(os.sep, "/")
        return f"{match[1]}{away}{mark}{anchor}{match[3]}"

    def written(part: str) -> str:
        if FENCE.fullmatch(part):
            return part  # code stays as it is
        # A browser shows the end of a line as a blank, which Chinese has not.
        return LINK.sub(turn, LINE_END.sub("", part))

    return "".join(map(written, FENCE.split(text))), linked


def place_of(file: Path) -> Path:
    """Return where a file of the repository stands on the site."""
    return file.relative_to(DOCS) if DOCS in file.parents else Path(ELSEWHERE) / file.relative_to(REPO)


def write_notebook(notebook: Path, folder: Path) -> None:
    """Write a notebook as a page, its pictures in a folder beside it.

    Args:
        notebook: with the outputs of its last run.
        folder: of the page.
    """
    from nbconvert import MarkdownExporter

    text, resources = MarkdownExporter().from_filename(
        str(notebook), resources={"output_files_dir": f"{notebook.stem}_files", "unique_key": notebook.stem}
    )
    for name, content in resources["outputs"].items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(content)
    title, _, rest = turned(text, notebook)[0].partition("\n")
    note = f"[This page as a notebook]({notebook.name}) to run and change."
    (folder / f"{notebook.stem}.md").write_text(f"{title}\n\n{note}\n{rest}", encoding="utf-8")
