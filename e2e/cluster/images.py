"""Container images: what each is made of, its content-hash tag, building with buildah, and the way to the node."""

from __future__ import annotations

import configparser
import hashlib
import json
import os
import tempfile
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from e2e.cluster import processes, shell, tools
from e2e.cluster.layout import (
    BIN, BUILDAH_STORAGE, CACHE, IMAGE_PREFIX, MACHINE, NODE_IP, REPO,
)  # fmt: skip
from e2e.cluster.node import CONTAINERD_SOCKET
from e2e.cluster.progress import step

MANIFEST_TYPES = "application/vnd.oci.image.manifest.v1+json, application/vnd.docker.distribution.manifest.v2+json"
UV_CACHE = Path(os.environ.get("UV_CACHE_DIR") or Path.home() / ".cache" / "uv")

SUITE = "bookworm"
BASE_PACKAGES = ("python3", "python3-venv", "ca-certificates", "libgomp1")


@dataclass(frozen=True)
class Image:
    """One image: its Dockerfile, the files of the repository that it copies, and the image that it starts from."""

    name: str
    dockerfile: str
    inputs: tuple[str, ...] = ()
    base: tuple[str, str] | None = None  # build argument, name of our image
    target: str | None = None
    program: str | None = None  # a Go program of tools/, copied from the cache

    @property
    def context(self) -> Path:
        return BIN if self.program else REPO

    def digest(self) -> str:
        """Hash of everything that decides what is in the image."""
        parts: list[str] = [self.target or ""]
        for path in _files((self.dockerfile, *self.inputs)):
            parts.append(f"{path.relative_to(REPO)} {path.stat().st_mode & 0o111} {hashlib.sha256(path.read_bytes()).hexdigest()}")
        if self.base:
            parts.append(BY_NAME[self.base[1]].digest())
        if self.program:
            parts += [module.fingerprint() for module in tools.GO_MODULES if self.program in module.programs]
        if self.name == "base":
            parts.append(repr((SUITE, BASE_PACKAGES)))
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


INSTALL = "requirements/install.sh"
API = "operator/finetune_operator"
RUN_SPEC = "trainer_image/finetune_trainer"

BASE = Image("base", "e2e/cluster/images/base.Dockerfile")
TORCH = Image("torch", "trainer_image/Dockerfile", (INSTALL, "requirements/torch.txt"), ("BASE_IMAGE", "base"), "torch")
PAUSE = Image("pause", "e2e/cluster/images/pause.Dockerfile", program="pause")
COREDNS = Image("coredns", "e2e/cluster/images/coredns.Dockerfile", program="coredns")
MINIO = Image("minio", "e2e/cluster/images/minio.Dockerfile", program="minio")
OPERATOR = Image(
    "operator", "operator/Dockerfile", (INSTALL, "requirements/operator.txt", API, RUN_SPEC), ("BASE_IMAGE", "base")
)  # fmt: skip
TRAINER = Image(
    "trainer", "trainer_image/Dockerfile", (INSTALL, "requirements/torch.txt", "requirements/trainer.txt", API, RUN_SPEC), ("BASE_IMAGE", "base")
)  # fmt: skip
AGENT = Image(
    "agent", "serving_image/Dockerfile",
    (INSTALL, "requirements/serving.txt", API, RUN_SPEC, "serving_image/finetune_serving"), ("BASE_IMAGE", "base"),
)  # fmt: skip
ENGINE = Image(
    "engine", "serving_image/Dockerfile.engine", (INSTALL, "requirements/engine-cpu.txt"), ("TORCH_IMAGE", "torch")
)  # fmt: skip

SYSTEM = (PAUSE, COREDNS)  # what a bare cluster needs
PRODUCT = (OPERATOR, AGENT, TRAINER, ENGINE, MINIO)
BY_NAME = {image.name: image for image in (BASE, TORCH, *SYSTEM, *PRODUCT)}


def _files(paths: tuple[str, ...]) -> Iterator[Path]:
    """The files below some paths of the repository, in a fixed order, without what Python leaves there."""
    for path in paths:
        start = REPO / path
        for file in sorted(start.rglob("*")) if start.is_dir() else [start]:
            if file.is_file() and "__pycache__" not in file.parts and file.suffix != ".pyc":
                yield file


def missing(images: tuple[Image, ...]) -> list[Image]:
    return [image for image in images if not in_registry(image)]


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
    request = urllib.request.Request(f"http://{NODE_IP}:5000/v2/{path}", method=method, headers={"Accept": MANIFEST_TYPES})
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # whatever http_proxy says
    return direct.open(request, timeout=5).status


def ensure(images: tuple[Image, ...]) -> None:
    """Build, push and unpack on the node what is not there yet, in the given order."""
    with _one_build_at_a_time():
        for image in missing(images):
            build(image)
            push(image)
    on_node = set(shell.output(*_ctr("images", "ls", "-q")).split())
    for image in images:
        if image.reference not in on_node:
            pull(image)


def build(image: Image) -> None:
    log = CACHE / "log" / f"image-{image.name}.log"
    if image.base and not _is_built(base := BY_NAME[image.base[1]]):
        build(base)
    if image.program == "pause":
        with step("build pause (Go)", log):
            shell.logged(["go", "build", "-trimpath", "-ldflags", "-s -w", "-o", BIN / "pause"], log, cwd=REPO / "e2e/cluster/pause", env={"CGO_ENABLED": "0"})  # fmt: skip
    if image.name == "base":
        _build_root_file_system(log)
    with step(f"build image {image.name}:{image.tag}", log), _build_mounts() as mounts:
        arguments = ["build", "--isolation", "chroot", "--layers", "--format", "oci", "--file", REPO / image.dockerfile]
        if image.base:
            arguments += ["--build-arg", f"{image.base[0]}={BY_NAME[image.base[1]].local}"]
        if image.target:
            arguments += ["--target", image.target]
        context = CACHE / "base" if image.name == "base" else image.context
        shell.logged([*_buildah(), *arguments, *mounts, "--tag", image.local, context], log)


def push(image: Image) -> None:
    log = CACHE / "log" / f"image-{image.name}.log"
    destination = f"docker://{NODE_IP}:5000/finetune-operator/{image.name}:{image.tag}"
    with step(f"push image {image.name}", log):
        shell.logged([*_buildah(), "push", "--tls-verify=false", *COMPRESSION, image.local, destination], log)


def pull(image: Image) -> None:
    """Unpack it on the node ahead of the first pod, so that no pod's start includes it."""
    with step(f"unpack image {image.name} on the node", log := CACHE / "log" / f"image-{image.name}.log"):
        shell.logged(_ctr("images", "pull", "--plain-http", image.reference), log)


COMPRESSION = ("--disable-compression",)


def _is_built(image: Image) -> bool:
    return shell.succeeds(*_buildah(), "inspect", "--type", "image", image.local)


def _buildah() -> list[str]:
    return [
        "buildah", "--root", str(BUILDAH_STORAGE), "--runroot", str(MACHINE / "buildah"), "--storage-driver", "overlay",
    ]  # fmt: skip


def _ctr(*arguments: str) -> list[str]:
    return [*shell.IN_NAMESPACE, "ctr", "--address", str(CONTAINERD_SOCKET), "--namespace", "k8s.io", *arguments]


def _build_root_file_system(log: Path) -> None:
    """A minimal Debian with Python: the base where no image registry can be reached."""
    target = CACHE / "base" / "rootfs.tar"
    target.parent.mkdir(parents=True, exist_ok=True)
    with step(f"make the base file system (Debian {SUITE})", log):
        fresh = target.with_suffix(".new.tar")
        shell.logged(
            ["mmdebstrap", "--variant=minbase", f"--include={','.join(BASE_PACKAGES)}",
             "--dpkgopt=path-exclude=/usr/share/doc/*", "--dpkgopt=path-exclude=/usr/share/man/*",
             "--dpkgopt=path-exclude=/usr/share/locale/*", SUITE, fresh], log,
        )  # fmt: skip
        os.replace(fresh, target)


@contextmanager
def _build_mounts() -> Iterator[list[str]]:
    """The machine's certificates, package index and download cache, visible to a build and never in the image."""
    with tempfile.TemporaryDirectory(prefix="finetune-build-") as folder:
        inside = "/run/finetune-build"
        mounts = []
        authorities = os.environ.get("SSL_CERT_FILE")
        if authorities and Path(authorities).exists():
            mounts += ["--volume", f"{authorities}:{inside}/ca.crt:ro"]
        pip = Path(os.environ.get("PIP_CONFIG_FILE") or "/etc/pip.conf")
        if pip.exists():
            mounts += ["--volume", f"{pip}:{inside}/pip.conf:ro"]
            if index := _index_url(pip):
                uv = Path(folder) / "uv.toml"
                uv.write_text(f"index-url = {json.dumps(index)}\n")
                mounts += ["--volume", f"{uv}:{inside}/uv.toml:ro"]
        UV_CACHE.mkdir(parents=True, exist_ok=True)
        mounts += ["--volume", f"{UV_CACHE}:{inside}/uv-cache"]
        yield mounts


def _index_url(pip_conf: Path) -> str | None:
    """pip's package index, for uv, which does not read pip's configuration."""
    parser = configparser.ConfigParser(interpolation=None)
    parser.read(pip_conf)
    return parser.get("global", "index-url", fallback=None)


@contextmanager
def _one_build_at_a_time() -> Iterator[None]:
    import fcntl

    MACHINE.mkdir(parents=True, exist_ok=True)
    with (MACHINE / "build.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
