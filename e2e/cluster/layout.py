"""Where everything is: fixed names, addresses and paths of the embedded cluster."""

from __future__ import annotations

import os
from pathlib import Path

REPO = Path(__file__).resolve().parents[2]
HERE = Path(__file__).resolve().parent

# What belongs to this clone. Deleted by `cluster-down`.
STATE = REPO / ".cluster"
LOGS = STATE / "log"
RUN = STATE / "run"
PKI = STATE / "pki"
KUBECONFIG = STATE / "kubeconfig"

# What every clone of this machine shares: programs, image layers, the registry's and containerd's content.
CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "finetune-operator"
BIN = CACHE / "bin"
BUILDAH_STORAGE = CACHE / "buildah"
REGISTRY_STORAGE = CACHE / "registry"
CONTAINERD_ROOT = CACHE / "containerd"

# There is one embedded cluster per machine: the namespace's name is its lock, OWNER says which clone holds it.
MACHINE = Path("/run/finetune-operator")
OWNER = MACHINE / "owner"

NETNS = "finetune"
NETNS_PATH = Path("/run/netns") / NETNS
VETH = "finetune0"
CGROUP = "finetune-operator"
NODE = "finetune-node"
CNI_NETWORK = "finetune-pods"

HOST_IP = "10.201.0.1"
NODE_IP = "10.201.0.2"
LINK_CIDR = "10.201.0.0/30"
POD_CIDR = "10.244.0.0/16"
NODE_POD_CIDR = "10.244.0.0/24"
SERVICE_CIDR = "10.96.0.0/16"
KUBERNETES_SERVICE_IP = "10.96.0.1"
DNS_SERVICE_IP = "10.96.0.10"
API_SERVER = f"https://{NODE_IP}:6443"
REGISTRY = "127.0.0.1:5000"  # as the node sees it: containerd speaks plain HTTP to nothing but localhost
REGISTRY_LISTEN = "0.0.0.0:5000"  # within the namespace, so that the host can push to it
IMAGE_PREFIX = f"{REGISTRY}/finetune-operator"
PRETEND_GPUS = 4  # two trainings, a deployment, and the second pod of its rollout

SYSTEM_NAMESPACE = "finetune-system"
DEMO_NAMESPACE = "demo"
RELEASE = "finetune-operator"
