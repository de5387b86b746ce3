"""The EndpointSlice that leads reports to the leader."""

from finetune_operator.endpoint import Place, endpoint_slice

SERVICE = {
    "metadata": {"name": "finetune-operator-reports", "namespace": "finetune-system", "uid": "uid-service"},
    "spec": {"ports": [{"name": "reports", "port": 8090}]},
}


def test_the_slice_has_this_pod_as_its_only_endpoint() -> None:
    made = endpoint_slice(SERVICE, Place("finetune-system", "operator-0", "uid-0", "10.0.0.5"), 8090)
    assert made["addressType"] == "IPv4"
    assert [e["addresses"] for e in made["endpoints"]] == [["10.0.0.5"]]
    assert made["metadata"]["labels"]["kubernetes.io/service-name"] == "finetune-operator-reports"


def test_the_port_is_named_as_the_services_or_kube_proxy_would_not_find_it() -> None:
    made = endpoint_slice(SERVICE, Place("finetune-system", "operator-0", "uid-0", "fd00::5"), 8090)
    assert made["ports"] == [{"name": "reports", "port": 8090, "protocol": "TCP"}]
    assert made["addressType"] == "IPv6"


def test_the_slice_goes_with_the_service() -> None:
    made = endpoint_slice(SERVICE, Place("finetune-system", "operator-0", "uid-0", "10.0.0.5"), 8090)
    assert made["metadata"]["ownerReferences"][0]["uid"] == "uid-service"
