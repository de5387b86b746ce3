"""Two FineTunes that ask for the same run: one trains, the other waits and takes its adapter over.

Otherwise both would write the same checkpoints, and one GPU would do what another one is doing.
"""

from __future__ import annotations

from finetune_operator.context import Context
from finetune_operator.kube import FINETUNES, Object
from finetune_operator.queue import Key

# Long enough for the status of the one that claimed to be written and seen.
CLAIM_SECONDS = 30.0


async def claim(context: Context, key: Key, run_id: str, uri: str | None) -> Key | None:
    """None when `key` may train this run; otherwise the FineTune that does. `uri` is its output.s3.uri."""
    done = set()
    for namespace in context.settings.watch_namespaces or ("",):
        for item in await context.kube.list(FINETUNES, namespace):
            other = Key(FINETUNES.kind, item["metadata"]["namespace"], item["metadata"]["name"])
            run = (item.get("status") or {}).get("run") or {}
            if other == key or run.get("id") != run_id or _bucket(item) != uri:
                continue
            if run.get("finishedAt"):
                done.add(other)
            elif run.get("jobName"):
                return other
    # Nothing is awaited from here to the claim: of two that come at once, one is first.
    now, claims = context.now(), context.claims
    for claimed, (holder, since) in list(claims.items()):
        if holder in done or (now - since).total_seconds() > CLAIM_SECONDS:
            del claims[claimed]
    holder, _ = claims.setdefault((run_id, uri), (key, now))
    return None if holder == key else holder


def _bucket(item: Object) -> str | None:
    uri: str | None = ((item["spec"].get("output") or {}).get("s3") or {}).get("uri")
    return uri
