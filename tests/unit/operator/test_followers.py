"""Who is looked at when a FineTune has a new adapter."""

from finetune_operator.followers import Followers
from finetune_operator.kube import Object
from finetune_operator.queue import Key

BOT, SERVED = Key("FineTune", "demo", "bot"), Key("AdapterDeployment", "demo", "served")


def following(*names: str) -> Object:
    return {"spec": {"adapters": [{"name": n, "fineTuneRef": {"name": n}} for n in names]}}


def with_adapter(digest: str, step: int = 0) -> Object:
    return {"status": {"adapter": {"digest": digest}, "progress": {"step": step}}}


def test_a_new_adapter_is_told_to_its_followers_and_progress_is_not() -> None:
    followers = Followers()
    followers.deployment_seen(SERVED, following("bot"))
    assert followers.finetune_seen(BOT, with_adapter("a")) == {SERVED}
    assert followers.finetune_seen(BOT, with_adapter("a", step=5)) == set()
    assert followers.finetune_seen(BOT, with_adapter("b")) == {SERVED}


def test_a_deployment_that_follows_another_run_now_is_no_longer_told() -> None:
    followers = Followers()
    followers.deployment_seen(SERVED, following("bot"))
    followers.deployment_seen(SERVED, following("other"))
    assert followers.finetune_seen(BOT, with_adapter("a")) == set()


def test_a_finetune_that_is_deleted_is_told_too() -> None:
    followers = Followers()
    followers.deployment_seen(SERVED, following("bot"))
    assert followers.finetune_gone(BOT) == {SERVED}
    followers.deployment_gone(SERVED)
    assert followers.finetune_gone(BOT) == set()


def test_an_artifact_is_followed_by_nobody() -> None:
    followers = Followers()
    followers.deployment_seen(SERVED, {"spec": {"adapters": [{"name": "a", "artifact": {"uri": "s3://x"}}]}})
    assert followers.finetune_seen(BOT, with_adapter("a")) == set()
