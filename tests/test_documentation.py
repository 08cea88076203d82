"""Every command that the documentation shows exists, with the options it is shown with."""

import re
import shlex
from itertools import pairwise
from pathlib import Path

import click
import pytest
import typer

from service.cli import app
from service.settings import Settings, known_names

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
FENCE = re.compile(r"^```(?:sh|bash|console|shell)\n(.*?)^```", re.MULTILINE | re.DOTALL)


def shown_commands(page: Path) -> list[list[str]]:
    """The commands of a page's shell blocks, split into words."""
    commands = []
    for block in FENCE.findall(page.read_text(encoding="utf-8")):
        for line in block.replace("\\\n", " ").splitlines():
            words = split(line.removeprefix("$ "))
            while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
                words = words[1:]  # a variable set for this command
            if words:
                commands.append(words)
            commands += within(words)
    return commands


def within(words: list[str]) -> list[list[str]]:
    """The command that is run in a container, where one is.

    ``docker compose exec passerby passerby ...``, ``run --entrypoint passerby passerby ...`` or
    ``kubectl exec ... -- passerby ...``.
    """
    if words[:1] == ["kubectl"] and "--" in words:
        return [words[words.index("--") + 1 :]]
    doubled = [i for i, pair in enumerate(pairwise(words)) if pair == ("passerby", "passerby")]
    return [words[i + 1 :] for i in doubled]


def split(line: str) -> list[str]:
    try:
        return shlex.split(line, comments=True)
    except ValueError:  # one line of a quotation over several
        return line.split()


def all_shown(program: str) -> list[list[str]]:
    return [words for page in PAGES for words in shown_commands(page) if words[0].endswith(program)]


def serve_flags() -> set[str]:
    flags = {"--help"}
    for name in known_names():
        plain = name.removeprefix("PASSERBY_").lower().replace("__", ".").replace("_", "-")
        flags |= {f"--{plain}", f"--no-{plain}"}
    return flags


def test_the_readme_shows_a_working_command_within_25_lines() -> None:
    first = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()[:25]

    assert "make demo" in first


def test_every_make_target_shown_exists() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))

    shown = {word for words in all_shown("make") for word in words[1:] if "=" not in word}
    assert shown
    assert shown <= targets


def test_every_passerby_command_shown_exists_with_its_options() -> None:
    group = typer.main.get_command(app)
    assert isinstance(group, click.Group | typer.core.TyperGroup)
    shown = all_shown("passerby")

    assert shown
    for words in shown:
        assert words[1] in group.commands, words
        command = group.commands[words[1]]
        if isinstance(command, click.Group | typer.core.TyperGroup):  # like `passerby keys create`
            assert words[2] in command.commands, words
            command = command.commands[words[2]]
        known = {option for one in command.params for option in one.opts} | {"--help"}
        known |= serve_flags() if words[1] == "serve" else set()
        used = {word.partition("=")[0] for word in words[2:] if word.startswith("--")}
        assert used <= known, words


def test_every_script_shown_exists() -> None:
    scripts = [word for words in all_shown("python") for word in words if word.endswith(".py")]

    assert all((ROOT / script).is_file() for script in scripts), scripts


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_no_page_is_empty(page: Path) -> None:
    assert len(page.read_text(encoding="utf-8")) > 500


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_link_within_the_repository_leads_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+?)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
        assert target.startswith("http") or (page.parent / target).exists(), target


def headings(page: Path) -> set[str]:
    """What a page's headings are called in links to them."""
    text = re.sub(
        r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL
    )
    titles = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_link_to_a_heading_finds_it(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for target, heading in re.findall(r"\]\(([^):#]*?\.md|)#([^)]+)\)", text):
        assert heading in headings(page.parent / target if target else page), f"{target}#{heading}"


def test_commands_in_containers_are_looked_at_too() -> None:
    shown = "docker compose run --rm --entrypoint passerby passerby restore FILE --replace"
    inside = "kubectl exec passerby-0 -- passerby keys list"

    assert within(shown.split()) == [["passerby", "restore", "FILE", "--replace"]]
    assert within(inside.split()) == [["passerby", "keys", "list"]]


def test_the_readme_and_the_operations_page_lead_to_responsible_use() -> None:
    for page in (ROOT / "README.md", ROOT / "docs" / "operations.md"):
        assert "responsible-use.md)" in page.read_text(encoding="utf-8"), page.name


def test_every_setting_named_in_the_documentation_exists() -> None:
    for page in PAGES:
        for name in re.findall(r"PASSERBY_[A-Z_]+[A-Z]", page.read_text(encoding="utf-8")):
            prefixes = {one[: len(name)] for one in known_names()}
            assert name in prefixes, f"{page.name}: {name}"
    assert Settings.model_fields  # the names above come from there
