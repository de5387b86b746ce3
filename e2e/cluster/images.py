"""Container images: what each is made of, its content-hash tag, building with buildah, and the way to the node."""

from __future__ import annotations

import atexit
import configparser
import fcntl
import functools
import hashlib
import json
import os
import shutil
import tempfile
import urllib.error
import urllib.request
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

from e2e.cluster import dockerfile, programs, shell
from e2e.cluster.layout import (
    BIN,
    BUILDAH_STORAGE,
    CACHE,
    HERE,
    IMAGE_PREFIX,
    MACHINE,
    NODE_IP,
    REPO,
)
from e2e.cluster.node import CONTAINERD_SOCKET
from e2e.cluster.preflight import check_disk
from e2e.cluster.progress import step
from e2e.cluster.target import Target

MANIFEST_TYPES = "application/vnd.oci.image.manifest.v1+json, application/vnd.docker.distribution.manifest.v2+json"
INSIDE_BUILD = "/run/finetune-build"
UV_CACHE = Path(os.environ.get("UV_CACHE_DIR") or Path.home() / ".cache" / "uv")

PAUSE_SOURCE = HERE / "pause"
ROOT_FILE_SYSTEM = CACHE / "base" / "rootfs.tar"
TORCH_GIB = 25  # its layer in four forms: downloads, buildah's store, the registry, unpacked on the node
SUITE = "bookworm"
BASE_PACKAGES = ("python3", "python3-venv", "ca-certificates", "libgomp1")


@dataclass(frozen=True)
class Image:
    """One image: its Dockerfile, the stage of it, and the image of ours that it starts from."""

    name: str
    dockerfile: str
    base: tuple[str, str] | None = None  # build argument, name of our image
    target: str | None = None
    program: bool = False  # a Go program of tools/, taken from the cache of programs

    @property
    def context(self) -> Path:
        return BIN if self.program else ROOT_FILE_SYSTEM.parent if self.name == "base" else sources()

    def digest(self) -> str:
        """Hash of everything that decides what is in the image."""
        stage = dockerfile.stage((sources() / self.dockerfile).read_text(), self.target)
        parts = [stage.text]
        if self.base:
            parts.append(BY_NAME[self.base[1]].digest())
        if self.name == "base":
            parts.append(repr((SUITE, BASE_PACKAGES)))
        elif self.name == "pause":
            parts += [file.read_text() for file in _files(PAUSE_SOURCE)]
        elif self.program:
            parts += [module.fingerprint() for module in programs.GO_MODULES if self.name in module.programs]
        else:
            for source in stage.sources:
                for file in _files(sources() / source):
                    content = hashlib.sha256(file.read_bytes()).hexdigest()
                    parts.append(f"{file.relative_to(sources())} {file.stat().st_mode & 0o111} {content}")
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()

    @property
    def tag(self) -> str:
        return self.digest()[:12]

    @property
    def local(self) -> str:
        return f"localhost/finetune-operator/{self.name}:{self.tag}"

    @property
    def reference(self) -> str:
        """The name by which a pod asks for it."""
        return f"{IMAGE_PREFIX}/{self.name}:{self.tag}"


BASE = Image("base", "e2e/cluster/dockerfiles/base.Dockerfile")
ON_BASE = ("BASE_IMAGE", "base")
TORCH = Image("torch", "trainer_image/Dockerfile", ON_BASE, target="torch")
PAUSE = Image("pause", "e2e/cluster/dockerfiles/pause.Dockerfile", program=True)
COREDNS = Image("coredns", "e2e/cluster/dockerfiles/coredns.Dockerfile", program=True)
MINIO = Image("minio", "e2e/cluster/dockerfiles/minio.Dockerfile", program=True)
OPERATOR = Image("operator", "operator/Dockerfile", ON_BASE)
TRAINER = Image("trainer", "trainer_image/Dockerfile", ON_BASE)
AGENT = Image("agent", "serving_image/Dockerfile", ON_BASE)
ENGINE = Image("engine", "serving_image/Dockerfile.engine", ("TORCH_IMAGE", "torch"))

SYSTEM = (PAUSE, COREDNS)  # what a bare cluster needs
OWN = (OPERATOR, AGENT, TRAINER)  # what any cluster needs
PRODUCT = (OPERATOR, AGENT, MINIO, TRAINER, ENGINE)  # what one without a way to other images needs
BY_NAME = {image.name: image for image in (BASE, TORCH, *SYSTEM, *PRODUCT)}


@functools.cache
def sources() -> Path:
    """A copy of what images are made of, so that an edit during a build cannot end up under another content's tag."""
    copy = tempfile.TemporaryDirectory(prefix="finetune-sources-")
    atexit.register(copy.cleanup)
    for folder in ("operator", "trainer_image", "serving_image", "requirements", "e2e/cluster/dockerfiles"):
        skip = shutil.ignore_patterns("__pycache__", "*.pyc", "*.egg-info")
        shutil.copytree(REPO / folder, Path(copy.name) / folder, ignore=skip)
    shutil.copy2(REPO / ".dockerignore", copy.name)
    return Path(copy.name)


def _files(start: Path) -> Iterator[Path]:
    """A file, or the files below a folder, in a fixed order."""
    yield from (file for file in (sorted(start.rglob("*")) if start.is_dir() else [start]) if file.is_file())


def in_registry(image: Image) -> bool:
    try:
        return _registry("HEAD", f"finetune-operator/{image.name}/manifests/{image.tag}") == 200
    except urllib.error.HTTPError:
        return False


def registry_answers() -> bool:
    try:
        return _registry("GET", "") == 200
    except OSError:
        return False


def _registry(method: str, path: str) -> int:
    request = urllib.request.Request(
        f"http://{NODE_IP}:5000/v2/{path}", method=method, headers={"Accept": MANIFEST_TYPES}
    )
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # whatever http_proxy says
    status: int = direct.open(request, timeout=5).status
    return status


def ensure(images: Iterable[Image], cluster: Target) -> bool:
    """Build, push and unpack on the node what is not there yet, in the given order; True when anything was done."""
    wanted = list(images)
    changed = False
    for image in wanted:
        if not _is_pushed(image, cluster):
            with _turn(image):
                if not _is_pushed(image, cluster):  # whoever had the turn before may have done it
                    build(image)
                    push(image, cluster)
                    changed = True
    if cluster.embedded:
        on_node = set(shell.output(*ctr("images", "ls", "-q")).split())
        for image in wanted:
            if image.reference not in on_node:
                pull(image)
                changed = True
    return changed


def _is_pushed(image: Image, cluster: Target) -> bool:
    return cluster.embedded and in_registry(image)  # asking another registry needs its credentials; a push is as good


def build(image: Image) -> None:
    log = CACHE / "log" / f"image-{image.name}.log"
    if image.base:
        base = BY_NAME[image.base[1]]
        with _turn(base):
            if not _is_built(base):
                if base is TORCH:
                    check_disk(TORCH_GIB, "building the trainer and engine images")
                build(base)
    if image.name == "pause":
        command = ["go", "build", "-trimpath", "-ldflags", "-s -w", "-o", str(BIN / "pause")]
        shell.logged(command, log, cwd=PAUSE_SOURCE, env={"CGO_ENABLED": "0"})
    if image.name == "base":
        _build_root_file_system(log)
    with step(f"build image {image.name}:{image.tag}", log), _build_mounts() as mounts:
        arguments: list[str | Path] = [
            "build",
            "--isolation",
            "chroot",
            "--layers",
            "--format",
            "oci",
            "--file",
            sources() / image.dockerfile,
        ]
        if image.base:
            arguments += ["--build-arg", f"{image.base[0]}={BY_NAME[image.base[1]].local}"]
        if image.target:
            arguments += ["--target", image.target]
        shell.logged([*_buildah(), *arguments, *mounts, "--tag", image.local, image.context], log)


def push(image: Image, cluster: Target) -> None:
    log = CACHE / "log" / f"image-{image.name}.log"
    destination = f"docker://{cluster.push_to}/{image.name}:{image.tag}"
    how = ["--tls-verify=false", *COMPRESSION] if cluster.embedded else []
    with step(f"push image {image.name}", log):
        shell.logged([*_buildah(), "push", *how, image.local, destination], log)


def pull(image: Image) -> None:
    """Unpack it on the node ahead of the first pod, so that no pod's start includes it."""
    with step(f"unpack image {image.name} on the node", log := CACHE / "log" / f"image-{image.name}.log"):
        shell.logged(ctr("images", "pull", "--plain-http", image.reference), log)


COMPRESSION = ("--disable-compression",)


def _is_built(image: Image) -> bool:
    return shell.succeeds(*_buildah(), "inspect", "--type", "image", image.local)


def _buildah() -> list[str]:
    return [
        "buildah",
        "--root",
        str(BUILDAH_STORAGE),
        "--runroot",
        str(MACHINE / "buildah"),
        "--storage-driver",
        "overlay",
    ]


def ctr(*arguments: str) -> list[str]:
    return [*shell.IN_NAMESPACE, "ctr", "--address", str(CONTAINERD_SOCKET), "--namespace", "k8s.io", *arguments]


def _build_root_file_system(log: Path) -> None:
    """A minimal Debian with Python: the base where no image registry can be reached."""
    target = ROOT_FILE_SYSTEM
    target.parent.mkdir(parents=True, exist_ok=True)
    with step(f"make the base file system (Debian {SUITE})", log):
        fresh = target.with_suffix(".new.tar")
        shell.logged(
            [
                "mmdebstrap",
                "--variant=minbase",
                f"--include={','.join(BASE_PACKAGES)}",
                "--dpkgopt=path-exclude=/usr/share/doc/*",
                "--dpkgopt=path-exclude=/usr/share/man/*",
                "--dpkgopt=path-exclude=/usr/share/locale/*",
                SUITE,
                fresh,
            ],
            log,
        )
        os.replace(fresh, target)


@contextmanager
def _build_mounts() -> Iterator[list[str]]:
    """What only this machine has, for requirements/install.sh: certificates, package index, downloads."""
    with tempfile.TemporaryDirectory(prefix="finetune-build-") as folder:
        shown = Path(folder)
        authorities = os.environ.get("SSL_CERT_FILE")
        if authorities and Path(authorities).exists():
            shutil.copy(authorities, shown / "ca.crt")
        pip = Path(os.environ.get("PIP_CONFIG_FILE") or "/etc/pip.conf")
        if pip.exists():
            shutil.copy(pip, shown / "pip.conf")
            if index := _index_url(pip):
                (shown / "uv.toml").write_text(f"index-url = {json.dumps(index)}\n")
        (shown / "uv-cache").mkdir()
        UV_CACHE.mkdir(parents=True, exist_ok=True)
        # One folder, for a mounted file leaves an empty file of its name in the image.
        yield ["--volume", f"{shown}:{INSIDE_BUILD}:ro", "--volume", f"{UV_CACHE}:{INSIDE_BUILD}/uv-cache"]


def _index_url(pip_conf: Path) -> str | None:
    """pip's package index, for uv, which does not read pip's configuration."""
    parser = configparser.ConfigParser(interpolation=None)
    parser.read(pip_conf)
    return parser.get("global", "index-url", fallback=None)


@contextmanager
def _turn(image: Image) -> Iterator[None]:
    """Nobody else on this machine builds or pushes this image meanwhile; others may be built at the same time."""
    with _lock_file("build") as any_build, _lock_file(f"build-{image.name}") as this_image:
        fcntl.flock(any_build, fcntl.LOCK_SH)
        fcntl.flock(this_image, fcntl.LOCK_EX)
        yield


@contextmanager
def no_build_running() -> Iterator[bool]:
    """Whether nobody on this machine builds images, and nobody begins to meanwhile."""
    with _lock_file("build") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
        else:
            yield True


def _lock_file(name: str) -> TextIO:
    MACHINE.mkdir(parents=True, exist_ok=True)
    return (MACHINE / f"{name}.lock").open("w")
