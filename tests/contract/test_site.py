"""The documentation: it builds strictly, needs no network, every page is reached, both languages keep in step."""

from __future__ import annotations

import html.parser
import json
import os
import re
import subprocess
import urllib.parse
from pathlib import Path
from typing import Any

import pytest
import yaml

from glmtune.cli import COMMANDS, main
from scripts.reference import PAGE as REFERENCE
from scripts.site_pages import FENCE, LINK, turned
from tests.contract.test_readme import REPO

DOCS = REPO / "docs"
CHINESE = sorted(DOCS.rglob("*.zh.md"))
IN_ENGLISH_ONLY = "（英文）"
PLACES = ("start", "howto", "explain")
"""Folders of which every page is there in both languages."""


class Loader(yaml.SafeLoader):
    """MkDocs' configuration names functions of Python, which matter to MkDocs alone."""


Loader.add_multi_constructor("tag:yaml.org,2002:python/", lambda loader, suffix, node: suffix)  # pyright: ignore[reportArgumentType]
CONFIG: dict[str, Any] = yaml.load((REPO / "mkdocs.yml").read_text(encoding="utf-8"), Loader)


def nav_pages(entries: list[dict[str, Any]]) -> dict[str, str]:
    """Return file → title of all pages in the navigation."""
    found: dict[str, str] = {}
    for entry in entries:
        ((title, value),) = entry.items()
        found |= nav_pages(value) if isinstance(value, list) else {value: title}
    return found


def outline(page: Path) -> list[int]:
    """Return the levels of a page's headings, in order."""
    text = FENCE.sub("", page.read_text(encoding="utf-8"))
    return [len(marks) for marks in re.findall(r"^(#+) ", text, flags=re.MULTILINE)]


@pytest.mark.parametrize("page", CHINESE, ids=lambda page: page.relative_to(DOCS).as_posix())
def test_both_languages_keep_in_step(page: Path) -> None:
    english = page.with_name(page.name.replace(".zh.md", ".md"))
    assert outline(page) == outline(english)
    if page.parent.name in PLACES:
        pair = [each.read_text("utf-8").splitlines() for each in (page, english)]
        rows, items = (
            [sum(line.startswith(mark) for line in lines) for lines in pair] for mark in ("|", "- ")
        )
        assert rows[0] == rows[1]
        assert items[0] == items[1]


def test_what_a_newcomer_reads_is_there_in_both_languages() -> None:
    english = [page for place in PLACES for page in (DOCS / place).glob("*.md") if ".zh." not in page.name]
    assert len(english) > 15
    english += [DOCS / "index.md", DOCS / "trouble.md", DOCS / "architecture.md"]
    assert [page.name for page in english if not page.with_suffix(".zh.md").is_file()] == []


def test_the_chinese_navigation_says_what_is_in_english_only() -> None:
    (plugin,) = [plugin["i18n"] for plugin in CONFIG["plugins"] if "i18n" in plugin]
    (translations,) = [each["nav_translations"] for each in plugin["languages"] if each["locale"] == "zh"]
    for file, title in nav_pages(CONFIG["nav"]).items():
        is_chinese = (DOCS / file).with_suffix(".zh.md").is_file()
        assert translations[title].endswith(IN_ENGLISH_ONLY) is not is_chinese, file


@pytest.mark.parametrize("page", CHINESE, ids=lambda page: page.relative_to(DOCS).as_posix())
def test_chinese_pages_link_to_chinese_ones(page: Path) -> None:
    """Where there is one; and links to pages in English say so, results of benchmarks apart."""
    for target in (match[2].partition("#")[0] for match in LINK.finditer(page.read_text(encoding="utf-8"))):
        if target.endswith(".md") and not target.endswith(".zh.md") and not target.startswith("http"):
            assert not (page.parent / target).with_suffix(".zh.md").is_file(), target


def test_files_and_folders_are_turned(tmp_path: Path) -> None:
    page = DOCS / "howto" / "serve.md"
    text = "[a](../chat.md#tools) [b](../../SECURITY.md) ![c](../web-390.png) [d](https://e.org) [f](#g)\n```\n[h](i.md)\n```\n"
    found, linked = turned(text, page)
    assert found == text.replace("../../SECURITY.md", "../more/SECURITY.md")
    assert linked == [DOCS / "chat.md", REPO / "SECURITY.md", DOCS / "web-390.png"]
    assert turned("一行，\n  又一行\n\n- 另\n- one\n", page)[0] == "一行，又一行\n\n- 另\n- one\n"
    with pytest.raises(FileNotFoundError, match="is a folder without a README"):
        turned("[a](../../benchmarks)", page)


@pytest.mark.parametrize("name", COMMANDS)
def test_the_reference_is_what_help_says(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([name, "--help"]) == 0
    told = re.findall(
        r"^  ([a-z_][a-z_0-9]*(?:\.[a-z_0-9]+)*)  ",
        capsys.readouterr().out.partition("settings (default):")[2],
        re.M,
    )
    sections = dict(
        re.findall(r"^## glmtune (\w+)\n(.*?)(?=^## |\Z)", REFERENCE.read_text("utf-8"), re.M | re.S)
    )
    rows = re.findall(r"^\| `([^`]+)` \|", sections[name], re.M)
    if shared := re.search(r"^The settings of \[`glmtune train`\]\S*(.*)", sections[name], re.M):
        absent = re.findall(r"`([^`]+)`", shared[1])
        train = re.findall(r"^\| `([^`]+)` \|", sections["train"], re.M)
        rows += [path for path in train if path not in absent]
        assert set(absent) <= set(train)
    assert sorted(told) == sorted(rows)
    assert told


class Links(html.parser.HTMLParser):
    """Where a page leads to, and what it loads."""

    def __init__(self) -> None:
        super().__init__()
        self.leads_to: list[str] = []
        self.loads: list[str] = []
        self.language = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {name: value or "" for name, value in attrs}
        if tag == "a" and "href" in given:
            self.leads_to.append(given["href"])
        if tag in ("script", "img") and "src" in given:
            self.loads.append(given["src"])
        if tag == "link" and given.get("rel") in ("stylesheet", "preload", "icon", "preconnect"):
            self.loads.append(given.get("href", ""))
        if tag == "html":
            self.language = given.get("lang", "")


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    for package in ("mkdocs", "material", "mkdocstrings", "mkdocs_static_i18n", "nbconvert"):
        pytest.importorskip(
            package, reason="the documentation's packages are not installed: pip install -e '.[docs]'"
        )
    folder = tmp_path_factory.mktemp("site")
    done = subprocess.run(
        ["bash", "scripts/docs.sh"],
        cwd=REPO,
        env=os.environ | {"SITE": str(folder), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return folder


def read(page: Path) -> Links:
    links = Links()
    links.feed(page.read_text(encoding="utf-8"))
    return links


def pages_of(site: Path) -> list[Path]:
    return [page for page in sorted(site.rglob("*.html")) if page.name != "404.html"]


def test_every_page_is_reached_from_the_landing_page(site: Path) -> None:
    for landing in (site / "index.html", site / "zh" / "index.html"):
        waiting, seen = [landing], {landing}
        while waiting:
            page = waiting.pop()
            for link in read(page).leads_to:
                path = urllib.parse.unquote(urllib.parse.urlsplit(link).path)
                if re.match(r"[a-z]+:", link) or not path or path.startswith("/"):
                    continue
                file = (page.parent / path).resolve()
                file = file / "index.html" if file.is_dir() else file
                assert file.exists(), f"{page.relative_to(site)} leads to {link}, which is not there"
                if file.suffix == ".html" and file not in seen:
                    seen.add(file)
                    waiting.append(file)
        expected = {
            page for page in pages_of(site) if (site / "zh" in page.parents) == (landing.parent.name == "zh")
        }
        assert expected - seen == set()


def test_nothing_comes_from_elsewhere(site: Path) -> None:
    for page in pages_of(site):
        assert [place for place in read(page).loads if re.match(r"(https?:)?//", place)] == [], page
    for style in site.rglob("*.css"):
        assert not re.search(r"url\(\s*['\"]?(https?:)?//", style.read_text(encoding="utf-8")), style


def test_both_languages_are_there(site: Path) -> None:
    assert read(site / "index.html").language == "en"
    assert read(site / "zh" / "index.html").language == "zh"
    assert "常见问题" in (site / "zh" / "index.html").read_text(encoding="utf-8")
    chinese = (site / "zh" / "start" / "tiny" / "index.html").read_text(encoding="utf-8")
    assert "不需要 GPU" in chinese


def test_search_finds_chinese_words(site: Path) -> None:
    """Words stand apart in the index, by jieba, as its search knows no Chinese."""
    index = json.loads((site / "search" / "search_index.json").read_text(encoding="utf-8"))
    texts = [entry["text"] for entry in index["docs"] if entry["location"].startswith("zh/start/tiny")]
    assert any("\u200b" in text for text in texts)


def test_the_python_api_is_written_from_the_code(site: Path) -> None:
    text = (site / "api" / "index.html").read_text(encoding="utf-8")
    for name in ("load_model", "load_tokenizer", "render_prompt", "Engine", "ChatEngine", "PrefixEncoder"):
        assert f">{name}<" in text or f'.{name}"' in text, name


def test_notebooks_are_pages_with_their_outputs(site: Path) -> None:
    for name in ("tune", "evaluate"):
        page = (site / "notebooks" / name / "index.html").read_text(encoding="utf-8")
        assert "This page as a notebook" in page
        assert "<img" in page or "before" in page
