"""What the repository holds: nothing of one machine, no registry's address, hashed requirements, short files."""

from __future__ import annotations

import re
import subprocess
import sysconfig
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
LINES_MAX = 400
LONGER: dict[str, str] = {
    "CHANGELOG.md": "nothing of it is released yet",
    "docs/cli.md": "made of the commands",
    "tests/integration/test_gateway.py": "one gateway, started once, serves the whole module",
}
"""Source files over LINES_MAX lines, each with its reason."""

SOURCES = {".py", ".sh", ".lua", ".js", ".css", ".html", ".j2", ".mako", ".sql", ".md", ".yaml", ".yml", ".toml"}
# In parts, so that this file does not hold what it looks for.
REGISTRIES = [
    "pypi" + ".org",
    "python" + "hosted.org",
    "proxy.golang" + ".org",
    "sum.golang" + ".org",
    "registry.npm" + "js.org",
    "deb." + "debian.org",
    "crates" + ".io",
    "conda." + "anaconda.org",
]
# But /root/.ollama: that is where the image ollama/ollama keeps its models.
MACHINE_PATHS = re.compile(r"(?<![\w.$}])/(?:home|root(?!/\.ollama\b)|Users|work|mnt)/[\w.-]+")


def tracked() -> list[Path]:
    """Files that git knows, or would with `git add`."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    paths = {ROOT / name for name in listed.stdout.split("\0") if name}
    return sorted(path for path in paths if path.is_file() and not path.is_symlink())


@pytest.fixture(scope="module")
def texts() -> dict[str, str]:
    """Tracked text files by their path in the repository."""
    found = {}
    for path in tracked():
        try:
            found[str(path.relative_to(ROOT))] = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
    assert found
    return found


def test_no_path_of_one_machine(texts: dict[str, str]) -> None:
    found = [
        f"{name}:{number}: {match.group()}"
        for name, text in texts.items()
        for number, line in enumerate(text.splitlines(), 1)
        if (match := MACHINE_PATHS.search(line))
    ]
    assert not found, "\n".join(found)


def test_no_registry_is_named(texts: dict[str, str]) -> None:
    found = [f"{name}: {host}" for name, text in texts.items() for host in REGISTRIES if host in text]
    assert not found, "\n".join(found)


def test_nothing_reads_outside_the_repository(texts: dict[str, str]) -> None:
    sources = {name: text for name, text in texts.items() if not name.endswith(".md") and not name.startswith("tests/")}
    assert not [name for name, text in sources.items() if "../" + "shared" in text]


def test_no_secret_is_tracked(texts: dict[str, str]) -> None:
    # A whole key has a checksum behind it; the examples in texts are shortened.
    key = re.compile(r"crl_[a-z2-7]{10}_[A-Za-z0-9]{32}[0-9a-f]{8}")
    found = [name for name, text in texts.items() if key.search(text) or "PRIVATE KEY-----" in text.replace('"', "")]
    assert [name for name in found if not name.startswith("tests/")] == []


LOCKED = sorted((ROOT / "api-gateway/requirements").glob("*.txt"))


@pytest.mark.parametrize("path", LOCKED, ids=lambda path: path.stem)
def test_every_requirement_is_pinned_and_hashed(path: Path) -> None:
    text = path.read_text()
    joined = text.replace("\\\n", " ")
    requirements = [line for line in joined.splitlines() if line.strip() and not line.lstrip().startswith("#")]
    assert requirements
    for line in requirements:
        assert re.match(r"[A-Za-z0-9._-]+(\[[\w,-]+\])?==[\w.!+]+\s", line), line
        assert re.search(r"--hash=sha256:[0-9a-f]{64}", line), line
        assert "://" not in line, line


def test_requirement_files_agree() -> None:
    versions: dict[str, set[str]] = {}
    for path in (ROOT / "api-gateway/requirements").glob("*.txt"):
        for name, version in re.findall(r"^([A-Za-z0-9._-]+)==([^\s;]+)", path.read_text(), re.MULTILINE):
            versions.setdefault(name.lower().replace("_", "-"), set()).add(version)
    assert {name: found for name, found in versions.items() if len(found) > 1} == {}


def test_every_list_of_requirements_is_locked() -> None:
    asked = (ROOT / "api-gateway/requirements").glob("*.in")
    assert {path.stem for path in LOCKED} == {"runtime", *(path.stem for path in asked)}


def test_nothing_is_installed_without_its_hash(texts: dict[str, str]) -> None:
    """Neither by a script nor in the image; pip checks the hash of what it takes from wherever that comes."""
    found = []
    for name, text in texts.items():
        if not name.startswith(("scripts/", ".ci/", "corral")) and not name.endswith(("Dockerfile", ".yml")):
            continue
        if name.startswith("tests/"):
            continue
        # A command may go on in the next line, and its arguments stand in an array.
        lines = re.sub(r"\\\n\s*", " ", text).splitlines()
        arrays = {line.split("=(")[0].split()[-1] for line in lines if "--require-hashes" in line and "=(" in line}
        for line in lines:
            if not re.search(r"\bpip3?\b.*\b(install|download)\b|=\(install\b", line) or line.lstrip().startswith(
                ("#", "say")
            ):
                continue
            if "--require-hashes" not in line and not any(f"${{{array}[@]}}" in line for array in arrays):
                found.append(f"{name}: {line.strip()}")
    assert not found, "\n".join(found)


PTH = {
    "distutils-precedence.pth": "import os; var = 'SETUPTOOLS_USE_DISTUTILS'; "
    "enabled = os.environ.get(var, 'local') == 'local'; enabled and __import__('_distutils_hack').add_shim(); \n"
}
"""Files that Python reads at each start, with all that is in them: setuptools' own, which mypyc needs."""


def test_nothing_runs_at_the_start_of_the_interpreter() -> None:
    """A `.pth` is how a package that nobody imports runs all the same."""
    installed = Path(sysconfig.get_path("purelib"))
    assert (installed / "pytest").is_dir()
    found = {str(path.relative_to(installed)): path.read_text() for path in installed.rglob("*.pth")}
    assert {name: text for name, text in found.items() if text != PTH.get(name)} == {}
    assert not [name for name in ("sitecustomize", "usercustomize") if (installed / f"{name}.py").exists()]


def test_files_are_short(texts: dict[str, str]) -> None:
    def counts(name: str) -> bool:
        path = Path(name)
        return path.suffix in SOURCES or (path.parts[0] in ("scripts", ".ci") and not path.suffix)

    long = {name for name, text in texts.items() if counts(name) and text.count("\n") > LINES_MAX}
    assert not long - LONGER.keys(), "split it, or give a reason in LONGER"
    assert not LONGER.keys() - long, "a reason for a file that is short, or gone"


def test_programs_are_executable() -> None:
    for path in [ROOT / "corral", ROOT / ".ci/run", *(ROOT / "scripts").iterdir()]:
        assert path.stat().st_mode & 0o111, f"{path.name} is not executable"
        assert path.read_text().startswith("#!"), f"{path.name} does not say what runs it"
