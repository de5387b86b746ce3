"""FineTunes on a real API server with the operator as a process; the tests play Job controller and kubelet."""

import json
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from . import kubelet
from .apiserver import ApiError, ApiServer, Client, Object
from .operator_process import Operator, install_rights, service_account_kubeconfig, until

DIGEST = "sha256:" + "ab" * 32


@pytest.fixture(scope="module")
def operator_kubeconfig(kube: Client, api_server: ApiServer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    install_rights(kube)
    return service_account_kubeconfig(api_server, tmp_path_factory.mktemp("operator-rights"))


@pytest.fixture(scope="module")
def operator(operator_kubeconfig: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Operator]:
    process = Operator(tmp_path_factory.mktemp("operator"), operator_kubeconfig).start().wait_until_leading()
    yield process
    process.kill()


class Run:
    """A FineTune and what became of it."""

    def __init__(self, kube: Client, namespace: str, name: str = "bot", **spec: Any) -> None:
        self.kube, self.namespace, self.name = kube, namespace, name
        # Its own in every test: objects with the same run wait for each other.
        self.run_id = uuid.uuid4().hex[:16]
        self.created = kube.create(
            {
                "apiVersion": "finetune.dev/v1alpha1",
                "kind": "FineTune",
                "metadata": {"name": name, "namespace": namespace},
                "spec": {
                    "baseModel": {"s3": {"uri": "s3://models/tiny-llama"}},
                    "dataset": {"train": {"configMap": {"name": "data", "key": "train.jsonl"}}},
                    **spec,
                },
            }
        )

    def now(self) -> Object:
        return self.kube.get(f"/apis/finetune.dev/v1alpha1/namespaces/{self.namespace}/finetunes/{self.name}")

    @property
    def status(self) -> Object:
        status: Object = self.now().get("status", {})
        return status

    def jobs(self, stage: str = "") -> list[Object]:
        selector = f"finetune.dev/finetune={self.name}" + (f",finetune.dev/stage={stage}" if stage else "")
        items: list[Object] = self.kube.get(f"/apis/batch/v1/namespaces/{self.namespace}/jobs", labelSelector=selector)[
            "items"
        ]
        return [{"apiVersion": "batch/v1", "kind": "Job", **item} for item in items]

    def job(self, stage: str, attempt: int = 1) -> Object:
        """Waits for the Job of an attempt."""

        def found() -> Object | None:
            label = str(attempt)
            return next((j for j in self.jobs(stage) if j["metadata"]["labels"]["finetune.dev/attempt"] == label), None)

        job: Object = until(found, f"{stage} Job {attempt} of {self.name}; status {self.status}")
        return job

    def reaches(self, phase: str, reason: str = "") -> Object:
        """Waits for a phase and returns the status."""

        def found() -> Object | None:
            status = self.status
            return status if status.get("phase") == phase and (not reason or status.get("reason") == reason) else None

        status: Object = until(found, f"{self.name} {phase} {reason}; is {self.status}")
        return status

    def edit(self, **spec: Any) -> None:
        self.kube.merge(self.created, {"spec": spec})

    def events(self) -> list[str]:
        items = self.kube.get(f"/apis/events.k8s.io/v1/namespaces/{self.namespace}/events")["items"]
        return [event["reason"] for event in items if event["regarding"]["name"] == self.name]

    def prepare(self, run_id: str | None = None, job: Object | None = None, **changes: Any) -> Object:
        """The prepare Job (the first, unless given) runs and succeeds; returns it."""
        run_id = run_id or self.run_id
        job = job or self.job("prepare")
        pod = kubelet.start_pod(self.kube, job)
        prepared = {
            "runId": run_id,
            "baseModel": {"revision": "3f9a", "digest": DIGEST, "uri": "s3://models/tiny-llama", "parameters": 5},
            "dataset": {"format": "Messages", "samples": 100, "tokens": 4000, "digest": DIGEST, "uri": "s3://f/d"},
            "estimate": {"verdict": "Unknown", "largestMicroBatch": 8},
            "totalSteps": 40,
            **changes,
        }
        self.finish(job, pod, prepared=prepared, runId=run_id)
        return job

    def finish(self, job: Object, pod: Object, **result: Any) -> None:
        stage = job["metadata"]["labels"]["finetune.dev/stage"]
        message = json.dumps({"stage": stage, "job": job["metadata"]["name"], **result})
        broken = "failure" in result
        kubelet.end_pod(self.kube, pod, 1 if broken else 0, message)
        kubelet.end_job(self.kube, job, "Failed" if broken else "Complete")

    def train(self, attempt: int = 1) -> tuple[Object, Object]:
        """The train Job runs; returns it and its pod."""
        job = self.job("train", attempt)
        return job, kubelet.start_pod(self.kube, job)

    def finish_training(self, job: Object, pod: Object, run_id: str | None = None, digest: str = DIGEST) -> None:
        run_id = run_id or self.run_id
        adapter = {
            "uri": f"s3://finetune/adapters/{digest[7:]}",
            "digest": digest,
            "rank": 16,
            "gatePassed": True,
            "runId": run_id,
        }
        trained = {
            "adapter": adapter,
            "evaluation": {"adapter": {"loss": 1.021}, "passed": True},
            "steps": 40,
            "finalLoss": 0.913,
        }
        self.finish(job, pod, trained=trained, runId=run_id)


def conditions(status: Object) -> dict[str, str]:
    return {c["type"]: c["status"] for c in status["conditions"]}


def test_a_finetune_is_prepared_trained_and_succeeds(kube: Client, namespace: str, operator: Operator) -> None:
    run = Run(kube, namespace)
    run.prepare()
    run.reaches("Queued")
    job, pod = run.train()
    run.reaches("Training")
    path = f"/apis/finetune.dev/v1alpha1/namespaces/{namespace}/finetunes/bot/report"
    progress = {"step": 12, "totalSteps": 40, "loss": 1.41234, "etaSeconds": 170}
    token = kubelet.token_of(kube, pod)
    assert operator.report(path, token, {"job": job["metadata"]["name"], "progress": progress}) == (200, {})
    until(lambda: run.status["summary"].get("progress") == "12/40", f"the reported step in {run.status}")
    assert run.status["summary"]["loss"] == "1.412" and run.status["summary"]["eta"] == "3m"
    run.finish_training(job, pod)
    status = run.reaches("Succeeded", "Trained")
    assert status["adapter"]["digest"] == DIGEST
    assert conditions(status) | {"DatasetValid": "True", "Complete": "True", "Failed": "False"} == conditions(status)
    # Events follow the status.
    until(lambda: {"Preparing", "Prepared", "TrainingStarted", "Succeeded"} <= set(run.events()), "the Events")


def test_the_object_of_the_user_is_left_as_it_is_but_for_its_status(
    kube: Client, namespace: str, operator: Operator
) -> None:
    run = Run(kube, namespace)
    run.job("prepare")
    until(lambda: run.status.get("phase"), "a status")
    now = run.now()
    assert now["spec"] == run.created["spec"]
    assert not now["metadata"].get("annotations") and not now["metadata"].get("finalizers")
    assert now["metadata"]["generation"] == 1


def test_a_bad_dataset_fails_the_run_with_file_and_line_and_no_gpu_is_asked_for(
    kube: Client, namespace: str, operator: Operator
) -> None:
    run = Run(kube, namespace)
    job = run.job("prepare")
    run.finish(job, kubelet.start_pod(kube, job), failure={"reason": "InvalidDataset", "message": "train.jsonl:3: bad"})
    status = run.reaches("Failed", "InvalidDataset")
    assert "train.jsonl:3" in status["message"]
    assert conditions(status)["DatasetValid"] == "False"
    assert not run.jobs("train")


def test_the_same_inputs_again_reuse_the_adapter_without_a_train_job(
    kube: Client, namespace: str, operator: Operator
) -> None:
    run = Run(kube, namespace)
    adapter = {"uri": "s3://finetune/adapters/ab", "digest": DIGEST, "runId": run.run_id, "gatePassed": True}
    run.prepare(reused={"adapter": adapter})
    run.reaches("Succeeded", "ReusedExisting")
    assert not run.jobs("train")


def test_an_edit_cancels_the_run_and_starts_the_next(kube: Client, namespace: str, operator: Operator) -> None:
    run = Run(kube, namespace)
    run.prepare()
    first, pod = run.train()
    run.reaches("Training")
    run.edit(training={"maxSteps": 7})
    until(lambda: not run.jobs("train"), "the train Job of the first inputs is deleted")
    run.prepare(run_id="fedcba9876543210")
    run.reaches("Queued", "WaitingForPod")
    kubelet.delete_pods(kube, first)
    second, pod = run.train()
    assert second["metadata"]["name"] == "bot-train-fedcba98-1"
    run.finish_training(second, pod, run_id="fedcba9876543210")
    assert [h["result"] for h in run.reaches("Succeeded")["history"]] == ["Succeeded", "Cancelled"]


def test_an_edit_of_labels_or_retries_disturbs_nothing(kube: Client, namespace: str, operator: Operator) -> None:
    run = Run(kube, namespace)
    job = run.job("prepare")
    run.edit(retry={"infrastructure": 1})
    until(lambda: run.status.get("observedGeneration") == 2, "the edit is seen")
    assert [j["metadata"]["uid"] for j in run.jobs()] == [job["metadata"]["uid"]]


def test_suspend_frees_the_gpu_and_resume_goes_on(kube: Client, namespace: str, operator: Operator) -> None:
    run = Run(kube, namespace)
    run.prepare()
    job, _ = run.train()
    run.reaches("Training")
    run.edit(suspend=True)
    until(lambda: not run.jobs("train"), "the train Job is deleted")
    run.reaches("Suspended", "Suspending")
    kubelet.delete_pods(kube, job)
    assert conditions(run.reaches("Suspended", "Suspended"))["Suspended"] == "True"
    run.edit(suspend=False)
    second, pod = run.train(attempt=2)
    run.finish_training(second, pod)
    status = run.reaches("Succeeded")
    assert status["run"]["infrastructureRetries"] == 0


def test_out_of_memory_goes_on_with_half_the_micro_batch(kube: Client, namespace: str, operator: Operator) -> None:
    run = Run(kube, namespace)
    run.prepare()
    job, pod = run.train()
    kubelet.end_pod(kube, pod, 137, reason="OOMKilled")
    kubelet.end_job(kube, job, "Failed")
    second = run.job("train", attempt=2)
    assert kubelet.run_spec(second)["microBatch"] == 4
    changed = until(lambda: run.status["run"].get("changed"), "the change is told")
    assert "micro batch 8 -> 4" in changed[0]


def test_a_missing_secret_is_named_while_the_pod_waits(kube: Client, namespace: str, operator: Operator) -> None:
    run = Run(kube, namespace)
    pod = kubelet.start_pod(kube, run.job("prepare"))
    message = 'secret "finetune-storage" not found'
    state = {"waiting": {"reason": "CreateContainerConfigError", "message": message}}
    container = {"name": "trainer", "image": "t", "imageID": "", "ready": False, "restartCount": 0, "state": state}
    kubelet.set_pod(kube, pod, phase="Pending", containerStatuses=[container])
    assert message in run.reaches("Preparing", "MissingReference")["message"]


def test_jobs_go_after_the_ttl_and_nothing_runs_again(kube: Client, namespace: str, operator: Operator) -> None:
    run = Run(kube, namespace, ttlAfterFinished="2s")
    run.prepare()
    run.finish_training(*run.train())
    run.reaches("Succeeded")
    until(lambda: not run.jobs(), "the Jobs are deleted")
    run.edit(retry={"infrastructure": 2})
    until(lambda: run.status["observedGeneration"] == 2, "the object is looked at again")
    assert not run.jobs() and run.status["phase"] == "Succeeded"


def test_a_job_the_api_server_refuses_is_shown(kube: Client, namespace: str, operator: Operator) -> None:
    quota = {"apiVersion": "v1", "kind": "ResourceQuota", "metadata": {"name": "none", "namespace": namespace}}
    created = kube.create({**quota, "spec": {"hard": {"count/jobs.batch": "0"}}})
    kube.merge(created, {"status": {"hard": {"count/jobs.batch": "0"}, "used": {"count/jobs.batch": "0"}}}, "status")
    run = Run(kube, namespace)
    assert "exceeded quota" in run.reaches("Pending", "JobRefused")["message"]
    kube.delete(created)
    run.job("prepare")
    run.reaches("Preparing")


def test_an_object_of_the_same_name_as_a_deleted_one_starts_from_scratch(
    kube: Client, namespace: str, operator: Operator
) -> None:
    run = Run(kube, namespace)
    old = run.job("prepare")
    kube.delete(run.created)
    again = Run(kube, namespace)
    # The garbage collector takes the old Job, in its own time.
    path = f"/apis/batch/v1/namespaces/{namespace}/jobs/{old['metadata']['name']}"
    kube.request("DELETE", path, {"propagationPolicy": "Background"})
    job = until(
        lambda: next((j for j in again.jobs() if j["metadata"]["uid"] != old["metadata"]["uid"]), None), "a Job"
    )
    assert job["metadata"]["ownerReferences"][0]["uid"] == again.created["metadata"]["uid"]


# ---- several nodes ---------------------------------------------------------------------------------------------------


def test_two_nodes_are_an_indexed_job_with_a_service_and_its_first_pod_speaks(
    kube: Client, namespace: str, operator: Operator
) -> None:
    run = Run(kube, namespace, resources={"gpus": 0, "nodes": 2})
    run.prepare()
    job = run.job("train")
    assert (job["spec"]["completions"], job["spec"]["completionMode"]) == (2, "Indexed")
    name = job["spec"]["template"]["spec"]["subdomain"]

    def services() -> list[Object]:
        found = kube.get(f"/api/v1/namespaces/{namespace}/services")["items"]
        return [service for service in found if service["metadata"]["name"] == name]

    (service,) = until(services, "the Service, which comes after its Job")
    assert service["spec"]["clusterIP"] == "None"
    assert service["metadata"]["ownerReferences"][0]["uid"] == job["metadata"]["uid"]
    first = kubelet.start_pod(kube, job, 0)
    run.reaches("Queued", "Starting")
    second = kubelet.start_pod(kube, job, 1)
    run.reaches("Training")
    path = f"/apis/finetune.dev/v1alpha1/namespaces/{namespace}/finetunes/bot/report"
    body = {"job": job["metadata"]["name"], "progress": {"step": 3, "totalSteps": 40}}
    status, answer = operator.report(path, kubelet.token_of(kube, second), body)
    assert status == 403 and "is not the first" in answer["message"]
    assert operator.report(path, kubelet.token_of(kube, first), body)[0] == 200
    until(lambda: run.status["summary"].get("progress") == "3/40", f"the reported step in {run.status}")
    kubelet.end_pod(kube, second)
    run.finish_training(job, first)
    run.reaches("Succeeded", "Trained")


def test_of_two_pods_the_one_that_ran_out_of_memory_is_blamed(kube: Client, namespace: str, operator: Operator) -> None:
    run = Run(kube, namespace, resources={"gpus": 0, "nodes": 2})
    run.prepare()
    job = run.job("train")
    first, second = (kubelet.start_pod(kube, job, index) for index in (0, 1))
    lost = {"stage": "train", "job": job["metadata"]["name"], "failure": {"reason": "PeerLost", "message": "gone"}}
    kubelet.end_pod(kube, first, 1, json.dumps(lost))
    kubelet.end_pod(kube, second, 137, reason="OOMKilled")
    kubelet.end_job(kube, job, "Failed")
    again = run.job("train", attempt=2)
    assert kubelet.run_spec(again)["microBatch"] == 4
    assert again["spec"]["template"]["spec"]["subdomain"] == f"ft-{again['metadata']['name']}"


# ---- reports ---------------------------------------------------------------------------------------------------------


def test_a_report_is_taken_only_from_the_pod_that_it_is_about(kube: Client, namespace: str, operator: Operator) -> None:
    mine, other = Run(kube, namespace, "mine"), Run(kube, namespace, "other")
    job = mine.job("prepare")
    pod, others_pod = kubelet.start_pod(kube, job), kubelet.start_pod(kube, other.job("prepare"))
    path = f"/apis/finetune.dev/v1alpha1/namespaces/{namespace}/finetunes/mine/report"
    body = {"job": job["metadata"]["name"], "progress": {"step": 1}}
    token = kubelet.token_of(kube, pod)
    assert operator.report(path, token, body)[0] == 200
    assert operator.report(path, "nonsense", body)[0] == 401
    assert operator.report(path, kubelet.token_of(kube, pod, audience="vault"), body)[0] == 401
    status, answer = operator.report(path, kubelet.token_of(kube, others_pod), body)
    assert status == 403 and "does not belong to FineTune" in answer["message"]
    assert operator.report(path, token, {**body, "job": "another"})[0] == 403
    assert operator.report(path.replace("mine", "other"), token, body)[0] == 403


def test_a_posted_result_counts_before_the_pod_has_ended(kube: Client, namespace: str, operator: Operator) -> None:
    run = Run(kube, namespace)
    job = run.job("prepare")
    pod = kubelet.start_pod(kube, job)
    failure = {
        "stage": "prepare",
        "job": job["metadata"]["name"],
        "failure": {"reason": "DatasetNotFound", "message": "x"},
    }
    path = f"/apis/finetune.dev/v1alpha1/namespaces/{namespace}/finetunes/bot/report"
    operator.report(path, kubelet.token_of(kube, pod), {"job": job["metadata"]["name"], "result": failure})
    run.reaches("Failed", "DatasetNotFound")


def test_the_leader_points_the_report_service_at_itself(kube: Client, operator: Operator) -> None:
    path = "/apis/discovery.k8s.io/v1/namespaces/finetune-system/endpointslices/finetune-operator-reports-ipv4"
    found = kube.get(path)
    assert found["endpoints"][0]["addresses"] == ["10.0.0.5"]
    assert found["metadata"]["labels"]["kubernetes.io/service-name"] == "finetune-operator-reports"


# ---- the operator itself ---------------------------------------------------------------------------------------------


def test_the_log_is_json_and_names_the_object(kube: Client, namespace: str, operator: Operator) -> None:
    run = Run(kube, namespace)
    run.job("prepare")

    def line() -> Object | None:
        lines = [json.loads(text) for text in operator.log.read_text().splitlines()]
        return next((x for x in lines if x.get("namespace") == namespace and "created Job" in x["message"]), None)

    found = until(line, "a line about the Job")
    assert (found["kind"], found["name"], found["level"]) == ("FineTune", "bot", "info")


def test_metrics_count_looks_and_phases(operator: Operator) -> None:
    text = operator.metrics()
    assert 'finetune_operator_reconcile_total{kind="FineTune",result="ok"}' in text
    assert "finetune_operator_leading 1.0" in text


def test_the_operator_may_not_read_secrets(kube: Client, operator_kubeconfig: Path, api_server: ApiServer) -> None:
    import yaml

    token = yaml.safe_load(operator_kubeconfig.read_text())["users"][0]["user"]["token"]
    as_operator = Client(api_server.url, kube.ca_file, token)
    with pytest.raises(ApiError) as refused:
        as_operator.get("/api/v1/namespaces/finetune-system/secrets/finetune-storage")
    assert refused.value.status == 403


def test_two_objects_that_ask_for_the_same_run_use_one_gpu(kube: Client, namespace: str, operator: Operator) -> None:
    first, second = Run(kube, namespace, "first"), Run(kube, namespace, "second")
    first.prepare(run_id="2222222222222222")
    job, pod = first.train()
    second.prepare(run_id="2222222222222222")
    status = second.reaches("Queued", "SameRunElsewhere")
    assert f"{namespace}/first trains the same run" in status["message"]
    assert not second.jobs("train")
    first.finish_training(job, pod, run_id="2222222222222222")
    again = second.job("prepare", attempt=2)
    adapter = {"uri": "s3://finetune/adapters/ab", "digest": DIGEST, "runId": "2222222222222222", "gatePassed": True}
    second.prepare(run_id="2222222222222222", job=again, reused={"adapter": adapter})
    second.reaches("Succeeded", "ReusedExisting")
    assert not second.jobs("train")
