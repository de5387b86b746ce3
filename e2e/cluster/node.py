"""The programs of the node and control plane with their configuration; nothing is started here."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from e2e.cluster.layout import (
    BIN,
    CGROUP,
    CNI_NETWORK,
    CONTAINERD_ROOT,
    DNS_SERVICE_IP,
    MACHINE,
    NODE,
    NODE_IP,
    NODE_POD_CIDR,
    PKI,
    POD_CIDR,
    REGISTRY_LISTEN,
    REGISTRY_STORAGE,
    SERVICE_CIDR,
    STATE,
)
from e2e.cluster.processes import Process

CONTAINERD_SOCKET = MACHINE / "containerd.sock"  # in the clone its path could grow past what a socket may have
CONFIG = STATE / "config"
ETCD = "http://127.0.0.1:2379"


def _debian(program: str) -> str:
    return shutil.which(program) or program


def etcd() -> Process:
    flags = {
        "data-dir": STATE / "etcd",
        "listen-client-urls": ETCD,
        "advertise-client-urls": ETCD,
        "listen-peer-urls": "http://127.0.0.1:2380",
        "log-level": "warn",
    }
    # A kill loses nothing without fsync, only a power cut does, and then the cluster is made anew.
    return Process("etcd", (_debian("etcd"), *_flags(flags), "--unsafe-no-fsync"))


def registry() -> Process:
    config = {
        "version": "0.1",
        "log": {"level": "warn", "accesslog": {"disabled": True}},
        "storage": {"filesystem": {"rootdirectory": str(REGISTRY_STORAGE)}, "delete": {"enabled": True}},
        "http": {"addr": REGISTRY_LISTEN},
    }
    path = CONFIG / "registry.yaml"
    return Process(
        "registry", (_debian("docker-registry"), "serve", str(path)), ((path, json.dumps(config, indent=1)),)
    )


def containerd(pause_image: str) -> Process:
    config = f"""\
version = 2
root = "{CONTAINERD_ROOT}"
state = "{STATE}/run/containerd"
[grpc]
  address = "{CONTAINERD_SOCKET}"
[plugins."io.containerd.internal.v1.opt"]
  path = "{STATE}/containerd-opt"
[plugins."io.containerd.grpc.v1.cri"]
  sandbox_image = "{pause_image}"
  # Where CAP_SYS_RESOURCE is missing runc may not lower oom_score_adj, and says "can't get final child's PID".
  restrict_oom_score_adj = true
  enable_unprivileged_ports = true  # CoreDNS listens on port 53 without being root
  netns_mounts_under_state_dir = true
  [plugins."io.containerd.grpc.v1.cri".cni]
    bin_dir = "/usr/lib/cni"
    conf_dir = "{CONFIG}/cni"
  [plugins."io.containerd.grpc.v1.cri".containerd]
    discard_unpacked_layers = true
    [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc]
      runtime_type = "io.containerd.runc.v2"
      [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc.options]
        Root = "{STATE}/run/runc"
"""
    bridge = {
        "type": "bridge",
        "bridge": "cni0",
        "isGateway": True,
        "ipMasq": True,
        "hairpinMode": True,
        "ipam": {
            "type": "host-local",
            "dataDir": str(STATE / "run" / "cni"),
            "ranges": [[{"subnet": NODE_POD_CIDR}]],
            "routes": [{"dst": "0.0.0.0/0"}],
        },
    }
    portmap = {"type": "portmap", "capabilities": {"portMappings": True}}
    cni = {"cniVersion": "0.4.0", "name": CNI_NETWORK, "plugins": [bridge, portmap]}
    path = CONFIG / "containerd.toml"
    configs = ((path, config), (CONFIG / "cni" / "10-pods.conflist", json.dumps(cni, indent=1)))
    return Process("containerd", (_debian("containerd"), "--config", str(path)), configs)


def apiserver() -> Process:
    flags = {
        "etcd-servers": ETCD,
        "bind-address": "0.0.0.0",
        "advertise-address": NODE_IP,  # it must listen there, or pods do not reach 10.96.0.1
        "secure-port": 6443,
        "tls-cert-file": PKI / "apiserver.crt",
        "tls-private-key-file": PKI / "apiserver.key",
        "client-ca-file": PKI / "ca.crt",
        "kubelet-preferred-address-types": "InternalIP",
        "kubelet-client-certificate": PKI / "admin.crt",
        "kubelet-client-key": PKI / "admin.key",
        "kubelet-certificate-authority": PKI / "ca.crt",
        "service-account-issuer": "https://kubernetes.default.svc",
        "service-account-key-file": PKI / "sa.pub",
        "service-account-signing-key-file": PKI / "sa.key",
        "service-cluster-ip-range": SERVICE_CIDR,
        "authorization-mode": "Node,RBAC",
        "enable-admission-plugins": "NodeRestriction",
        "allow-privileged": "true",
        # Without allowed names it refuses the client CA as the request header CA.
        "requestheader-client-ca-file": PKI / "ca.crt",
        "requestheader-allowed-names": "front-proxy",
        "requestheader-username-headers": "X-Remote-User",
        "requestheader-group-headers": "X-Remote-Group",
        "requestheader-extra-headers-prefix": "X-Remote-Extra-",
        "proxy-client-cert-file": PKI / "front-proxy.crt",
        "proxy-client-key-file": PKI / "front-proxy.key",
    }
    return Process("kube-apiserver", (str(BIN / "kube-apiserver"), *_flags(flags)))


def controller_manager() -> Process:
    flags = {
        **_client("controller-manager"),
        "root-ca-file": PKI / "ca.crt",
        "service-account-private-key-file": PKI / "sa.key",
        "use-service-account-credentials": "true",
        "leader-elect": "false",
        "cluster-signing-cert-file": PKI / "ca.crt",
        "cluster-signing-key-file": PKI / "ca.key",
        "allocate-node-cidrs": "true",
        "cluster-cidr": POD_CIDR,
        "service-cluster-ip-range": SERVICE_CIDR,
    }
    return Process("kube-controller-manager", (str(BIN / "kube-controller-manager"), *_flags(flags)))


def scheduler() -> Process:
    flags = {**_client("scheduler"), "leader-elect": "false"}
    return Process("kube-scheduler", (str(BIN / "kube-scheduler"), *_flags(flags)))


def kubelet() -> Process:
    config = {
        "apiVersion": "kubelet.config.k8s.io/v1beta1",
        "kind": "KubeletConfiguration",
        "authentication": {
            "anonymous": {"enabled": False},
            "webhook": {"enabled": True},
            "x509": {"clientCAFile": str(PKI / "ca.crt")},
        },
        "authorization": {"mode": "Webhook"},
        "tlsCertFile": str(PKI / "kubelet.crt"),
        "tlsPrivateKeyFile": str(PKI / "kubelet.key"),
        "cgroupDriver": "cgroupfs",
        "cgroupRoot": f"/{CGROUP}",  # pods live under a folder that is ours alone to remove
        "failCgroupV1": False,
        "failSwapOn": False,
        "enforceNodeAllocatable": [],
        "clusterDomain": "cluster.local",
        "clusterDNS": [DNS_SERVICE_IP],
        "containerRuntimeEndpoint": f"unix://{CONTAINERD_SOCKET}",
        "resolvConf": str(CONFIG / "resolv.conf"),
        "podCIDR": NODE_POD_CIDR,
        "podLogsDir": str(STATE / "pod-logs"),
        "volumePluginDir": str(STATE / "kubelet" / "volume-plugins"),
        "serializeImagePulls": False,
        "registryPullQPS": 0,
        "nodeStatusUpdateFrequency": "4s",
        # The images are the cache of every later run, so a full disk evicts pods but never collects images.
        "imageGCHighThresholdPercent": 100,
        "evictionHard": {"memory.available": "100Mi", "nodefs.available": "1Gi", "imagefs.available": "1Gi"},
    }
    path = CONFIG / "kubelet.yaml"
    flags = {
        "config": path,
        "kubeconfig": PKI / "kubelet.kubeconfig",
        "hostname-override": NODE,
        "node-ip": NODE_IP,
        "root-dir": STATE / "kubelet",
        "cert-dir": STATE / "kubelet" / "pki",
    }
    configs = ((path, json.dumps(config, indent=1)), (CONFIG / "resolv.conf", "nameserver 127.0.0.1\n"))
    return Process("kubelet", (str(BIN / "kubelet"), *_flags(flags)), configs)


def proxy() -> Process:
    config = {
        "apiVersion": "kubeproxy.config.k8s.io/v1alpha1",
        "kind": "KubeProxyConfiguration",
        "mode": "nftables",
        "clientConnection": {"kubeconfig": str(PKI / "proxy.kubeconfig")},
        "clusterCIDR": POD_CIDR,
        "hostnameOverride": NODE,
        "conntrack": {"maxPerCore": 0},  # the host's limit, which a namespace may not set
    }
    path = CONFIG / "proxy.yaml"
    return Process(
        "kube-proxy", (str(BIN / "kube-proxy"), "--config", str(path)), ((path, json.dumps(config, indent=1)),)
    )


def _client(name: str) -> dict[str, Path]:
    kubeconfig = PKI / f"{name}.kubeconfig"
    return {"kubeconfig": kubeconfig, "authentication-kubeconfig": kubeconfig, "authorization-kubeconfig": kubeconfig}


def _flags(flags: dict[str, object]) -> list[str]:
    return [f"--{name}={value}" for name, value in flags.items()]
