"""The programs of the cluster: Debian packages, and Go programs built once from the pinned modules in tools/."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

from e2e.cluster import shell
from e2e.cluster.layout import BIN, CACHE, HERE
from e2e.cluster.progress import Refused, step

# What to look for (a program on PATH or a file) -> the Debian package that brings it.
PACKAGES = {
    "etcd": "etcd-server",
    "containerd": "containerd",
    "runc": "runc",
    "/usr/lib/cni/bridge": "containernetworking-plugins",
    "nft": "nftables",  # kube-proxy in nftables mode calls it
    "iptables": "iptables",  # the bridge plugin masquerades with it
    "conntrack": "conntrack",
    "ip": "iproute2",
    "nsenter": "util-linux",
    "openssl": "openssl",
    "buildah": "buildah",
    "mmdebstrap": "mmdebstrap",
    "docker-registry": "docker-registry",
}


@dataclass(frozen=True)
class GoModule:
    """One folder of tools/ and the programs that it pins: binary name -> package."""

    folder: str
    programs: dict[str, str]

    @property
    def path(self) -> Path:
        return HERE / "tools" / self.folder

    def linker_flags(self) -> str:
        if self.folder != "kubernetes":
            return "-s -w"
        # Without its version a kube-apiserver calls itself v0.0.0-master, and the clients' version checks fail.
        version = re.search(r"k8s\.io/kubernetes (v(\d+)\.(\d+)\.\S+)", (self.path / "go.mod").read_text())
        assert version, "tools/kubernetes/go.mod does not require k8s.io/kubernetes"
        full, major, minor = version.groups()
        stamps = [
            f"-X {package}.gitVersion={full} -X {package}.gitMajor={major} -X {package}.gitMinor={minor}"
            for package in ("k8s.io/component-base/version", "k8s.io/client-go/pkg/version")
        ]
        return " ".join(["-s -w", *stamps])

    def fingerprint(self) -> str:
        pinned = (self.path / "go.mod").read_bytes() + (self.path / "go.sum").read_bytes()
        return hashlib.sha256(pinned + repr((self.programs, self.linker_flags())).encode()).hexdigest()


GO_MODULES = (
    GoModule(
        "kubernetes",
        {
            name: f"k8s.io/kubernetes/cmd/{name}"
            for name in (
                "kube-apiserver",
                "kubectl",
                "kubelet",
                "kube-controller-manager",
                "kube-scheduler",
                "kube-proxy",
            )
        },
    ),
    GoModule("coredns", {"coredns": "github.com/coredns/coredns"}),
    GoModule("minio", {"minio": "github.com/minio/minio"}),
    GoModule("helm", {"helm": "helm.sh/helm/v4/cmd/helm"}),
)
GO_VERSION = (1, 26)


def _present(what: str) -> bool:
    return Path(what).exists() if what.startswith("/") else shutil.which(what) is not None


def missing_packages() -> list[str]:
    return [package for what, package in PACKAGES.items() if not _present(what)]


def stale_modules() -> list[GoModule]:
    """The modules whose programs are not there, or were built from other pins."""

    def is_built(module: GoModule) -> bool:
        stamp = BIN / f".{module.folder}.stamp"
        return (
            stamp.exists()
            and stamp.read_text() == module.fingerprint()
            and all((BIN / name).exists() for name in module.programs)
        )

    return [module for module in GO_MODULES if not is_built(module)]


def check() -> None:
    """Refuse what `install` could not do, before anything is changed."""
    packages = missing_packages()
    if packages and not shutil.which("apt-get"):
        raise Refused(
            f"not installed: {', '.join(packages)} (Debian package names); there is no apt-get to install them"
        )
    if stale_modules():
        if not shutil.which("go"):
            names = ", ".join(name for module in stale_modules() for name in module.programs)
            raise Refused(
                f"Go is not installed, and {names} must be built: install Go {GO_VERSION[0]}.{GO_VERSION[1]} or newer"
            )
        version = re.search(r"go(\d+)\.(\d+)", shell.output("go", "version"))
        if version and tuple(map(int, version.groups())) < GO_VERSION:
            raise Refused(f"{version.group()} is too old: install Go {GO_VERSION[0]}.{GO_VERSION[1]} or newer")


def install() -> None:
    packages = missing_packages()
    if packages:
        log = CACHE / "log" / "apt.log"
        quiet = {"DEBIAN_FRONTEND": "noninteractive"}
        with step(f"install Debian packages {' '.join(packages)}", log):
            shell.logged(["apt-get", "update"], log, env=quiet)
            # Some bring a service of their own; policy-rc.d is how Debian is told not to start it.
            with _no_service_starts():
                shell.logged(["apt-get", "install", "-y", "--no-install-recommends", *packages], log, env=quiet)
    for module in stale_modules():
        build(module)


def build(module: GoModule) -> None:
    BIN.mkdir(parents=True, exist_ok=True)
    log = CACHE / "log" / f"go-{module.folder}.log"
    for name, package in module.programs.items():
        # A program that runs may not be overwritten, so it is built beside its place and renamed.
        fresh = BIN / f".{name}.new"
        with step(f"build {name} (Go)", log):
            shell.logged(
                ["go", "build", "-trimpath", "-ldflags", module.linker_flags(), "-o", fresh, package],
                log,
                cwd=module.path,
                env={"CGO_ENABLED": "0"},
            )
            os.replace(fresh, BIN / name)
    (BIN / f".{module.folder}.stamp").write_text(module.fingerprint())


class _no_service_starts:
    policy = Path("/usr/sbin/policy-rc.d")

    def __enter__(self) -> None:
        self.ours = not self.policy.exists()
        if self.ours:
            self.policy.write_text("#!/bin/sh\nexit 101\n")
            self.policy.chmod(0o755)

    def __exit__(self, *_: object) -> None:
        if self.ours:
            self.policy.unlink(missing_ok=True)
