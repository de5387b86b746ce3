"""Reports over TLS: the server with the chart's certificate, and both of its clients with its CA."""

import asyncio
import shutil
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from finetune_operator import process
from finetune_operator.settings import Settings
from finetune_serving.desired import AgentReport
from finetune_serving.report import Reporter as AgentReporter
from finetune_trainer.report import Reporter
from finetune_trainer.runspec import Failure, Result, RunSpec
from tests.unit.operator.test_reports import AGENT_PATH, BOT, DEPLOYMENT, PATH, Bench

pytestmark = pytest.mark.skipif(shutil.which("openssl") is None, reason="openssl makes the certificate")


@pytest.fixture
def certificate(tmp_path: Path) -> Path:
    """A folder as the kubelet mounts a kubernetes.io/tls Secret, with a certificate for 127.0.0.1 that is its own CA."""
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "1", "-subj", "/CN=localhost"]
    files = ["-addext", "subjectAltName=IP:127.0.0.1", "-keyout", tmp_path / "tls.key", "-out", tmp_path / "tls.crt"]
    subprocess.run([*command, *files], check=True, capture_output=True)
    return tmp_path


def settings(folder: Path) -> Settings:
    return Settings.model_validate(
        {
            "images": {"trainer": "t", "agent": "a", "engine": "e"},
            "storage": {"uri": "s3://finetune"},
            "reports": {"certFile": str(folder / "tls.crt"), "keyFile": str(folder / "tls.key")},
        }
    )


async def test_trainer_and_agent_report_over_tls_and_check_the_certificate(certificate: Path) -> None:
    bench = Bench()
    server = await process._serve(bench.app, 0, process._tls(settings(certificate)))
    port = next(port for host, port, *_ in server.addresses if host == "0.0.0.0")
    address = f"https://127.0.0.1:{port}"
    try:
        assert await trainer_reports(address, certificate, ca=certificate / "tls.crt")
        assert bench.reports.of(BOT)["bot-train-1-x"].body["result"]["failure"]["reason"] == "InternalError"
        assert not await trainer_reports(address, certificate, ca=certificate / "absent.crt"), (
            "the system's CAs know it not"
        )
        await agent_reports(bench, address, certificate)
    finally:
        await server.cleanup()


async def trainer_reports(address: str, folder: Path, ca: Path) -> bool:
    (folder / "token").write_text("good")
    spec = cast(RunSpec, SimpleNamespace(report_url=address + PATH, job="bot-train-1"))
    result = Result(stage="train", job="bot-train-1", failure=Failure(reason="InternalError", message="a test"))
    return await asyncio.to_thread(Reporter(spec, folder / "token", ca).result, result)


async def agent_reports(bench: Bench, address: str, folder: Path) -> None:
    (folder / "agent-token").write_text("agent")
    agent: Any = AgentReporter(address + AGENT_PATH, folder / "agent-token", folder / "tls.crt")
    agent.offer(AgentReport(ready=True))
    answer = asyncio.ensure_future(anext(aiter(agent.answers())))
    while "bot-agent" not in bench.reports.of(DEPLOYMENT):
        await asyncio.sleep(0.01)
    answer.cancel()
