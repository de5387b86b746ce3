"""Why an object is not where it should be: its conditions, its pods, its last events, and where to look next."""

from __future__ import annotations

from e2e.kubectl import Kubectl, KubectlFailed, Object


def explain(kubectl: Kubectl, kind: str, name: str, namespace: str, log_lines: int = 15) -> str:
    """Lines for a person; never fails itself."""
    try:
        found = kubectl.find(kind, name, "-n", namespace)
        if found is None:
            return f"{kind}/{name} does not exist in namespace {namespace}"
        selector = f"finetune.dev/{kind}={name}"
        pods = kubectl.items("pods", "-n", namespace, "-l", selector)
        lines = [f"{kind}/{name} in namespace {namespace}: phase {found.get('status', {}).get('phase', 'none yet')}"]
        lines += _conditions(found) + _events(kubectl, kind, name, namespace)
        for pod in pods:
            lines += _pod(kubectl, pod, log_lines)
        if not pods:
            lines.append(f"  no pod with label {selector}")
    except KubectlFailed as failure:
        return str(failure)
    lines.append(f"  look: kubectl describe {kind} {name} -n {namespace}")
    lines.append("        kubectl logs deployment/finetune-operator -n finetune-system")
    return "\n".join(lines)


def _conditions(found: Object) -> list[str]:
    entries = found.get("status", {}).get("conditions") or []
    return [f"  {c['type']}={c['status']} {c.get('reason', '')}: {c.get('message', '')}" for c in entries]


def _events(kubectl: Kubectl, kind: str, name: str, namespace: str) -> list[str]:
    selector = f"regarding.name={name}"
    try:
        events = kubectl.items("events.events.k8s.io", "-n", namespace, "--field-selector", selector)
    except KubectlFailed:
        return []
    recent = [event for event in events if event["regarding"]["kind"].lower() == kind][-8:]
    return [f"  event {event.get('reason')}: {event.get('note', '')}" for event in recent]


def _pod(kubectl: Kubectl, pod: Object, log_lines: int) -> list[str]:
    name, namespace = pod["metadata"]["name"], pod["metadata"]["namespace"]
    status = pod.get("status", {})
    lines = [f"  pod/{name}: {status.get('phase')} {status.get('reason', '')}".rstrip()]
    for entry in status.get("conditions") or []:
        if entry["type"] == "PodScheduled" and entry["status"] != "True":
            lines.append(f"    not scheduled: {entry.get('message', '')}")
    containers = [*(status.get("initContainerStatuses") or []), *(status.get("containerStatuses") or [])]
    for container in containers:
        state, detail = next(iter((container.get("state") or {"unknown": {}}).items()))
        said = " ".join(str(detail[key]) for key in ("reason", "exitCode", "message") if key in detail)
        # A container that left no message shows the end of its log there, which comes below anyway.
        said = said if len(said.splitlines()) == 1 else said.split("\n")[0]
        lines.append(
            f"    container {container['name']}: {state} {said} (restarts: {container.get('restartCount', 0)})"
        )
        if state == "terminated" and detail.get("exitCode") == 0:
            continue
        if state in ("running", "terminated"):
            lines += _log(kubectl, namespace, name, container["name"], log_lines)
    return lines


def _log(kubectl: Kubectl, namespace: str, pod: str, container: str, log_lines: int) -> list[str]:
    try:
        text = kubectl.run("logs", pod, "-n", namespace, "-c", container, f"--tail={log_lines}")
    except KubectlFailed as failure:
        return [f"      {failure}"]
    return [f"      | {line}" for line in text.splitlines()]
