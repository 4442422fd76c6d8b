"""The files of the web page: all of them are served, none loads anything from elsewhere, and they are small."""

import re
import tomllib
from pathlib import Path

import pytest

from overlay import page_files

ROOT = Path(__file__).parents[2]


def test_every_file_of_the_page_is_served_and_part_of_the_wheel() -> None:
    assert sorted(page_files.FILES) == sorted(path.name for path in page_files.DIRECTORY.iterdir())
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert project["tool"]["setuptools"]["package-data"]["overlay"] == ["page/*"]


def test_the_page_is_at_the_root_and_its_parts_below() -> None:
    documents = page_files.documents()
    answer = documents["/"]("")
    assert answer.body.startswith(b"<!doctype html>")
    assert answer.kind == "text/html; charset=utf-8"
    assert set(documents) == {"/", *(f"/page/{name}" for name in page_files.FILES if name != "index.html")}


def test_a_tag_stands_for_the_contents() -> None:
    documents = page_files.documents()
    tags = {path: document("").tag for path, document in documents.items()}
    assert len(set(tags.values())) == len(tags)
    assert tags == {path: document("?other").tag for path, document in documents.items()}


@pytest.mark.parametrize("name", page_files.FILES)
def test_nothing_is_loaded_from_elsewhere_and_nothing_is_inline(name: str) -> None:
    text = (page_files.DIRECTORY / name).read_text()
    assert not re.search(r"https?://(?!www\.w3\.org/)|url\(|@import|//cdn", text)
    assert not re.search(r"innerHTML|outerHTML|insertAdjacent|document\.write|\beval\b|new Function", text)
    if name.endswith(".html"):
        assert not re.search(r"<style|\sstyle=|\son[a-z]+=|<script(?![^>]*src=)", text)


def test_every_import_and_reference_is_a_file_of_the_page() -> None:
    for name in page_files.FILES:
        text = (page_files.DIRECTORY / name).read_text()
        for target in re.findall(r'(?:from "\./|(?:src|href)="page/)([^"]+)"', text):
            assert target in page_files.FILES, f"{name}: {target}"


def test_scripts_and_styles_are_small() -> None:
    sizes = [
        len((page_files.DIRECTORY / name).read_bytes()) for name in page_files.FILES if name.endswith(("js", "css"))
    ]
    assert sum(sizes) < 50 * 1024


def test_the_policy_lets_nothing_in() -> None:
    assert "default-src 'none'" in page_files.POLICY
    for word in ("unsafe", "*", "http", "data:", "blob:"):
        assert word not in page_files.POLICY
