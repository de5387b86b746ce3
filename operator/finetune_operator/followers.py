"""Which AdapterDeployments follow which FineTune, so that a new adapter is served at once.

Filled from watch events. A missed deletion leaves an entry behind, which costs one look at an object that is gone.
"""

from __future__ import annotations

import json
from collections import defaultdict

from finetune_operator.kube import Object
from finetune_operator.queue import Key


class Followers:
    def __init__(self) -> None:
        self._followed: dict[Key, frozenset[Key]] = {}
        self._followers: defaultdict[Key, set[Key]] = defaultdict(set)
        self._adapters: dict[Key, str] = {}

    def deployment_seen(self, key: Key, body: Object) -> None:
        """Remember which FineTunes an AdapterDeployment names."""
        references = [adapter.get("fineTuneRef") for adapter in body.get("spec", {}).get("adapters", [])]
        followed = frozenset(Key("FineTune", key.namespace, r["name"]) for r in references if r)
        for finetune in self._followed.get(key, frozenset()) - followed:
            self._followers[finetune].discard(key)
        for finetune in followed:
            self._followers[finetune].add(key)
        self._followed[key] = followed

    def deployment_gone(self, key: Key) -> None:
        for finetune in self._followed.pop(key, frozenset()):
            self._followers[finetune].discard(key)

    def finetune_seen(self, key: Key, body: Object) -> set[Key]:
        """The AdapterDeployments to look at because the FineTune's adapters changed (a step of progress is none)."""
        status = body.get("status") or {}
        adapters = json.dumps([status.get("adapter"), status.get("history")], sort_keys=True)
        if self._adapters.get(key) == adapters:
            return set()
        self._adapters[key] = adapters
        return set(self._followers.get(key, ()))

    def finetune_gone(self, key: Key) -> set[Key]:
        self._adapters.pop(key, None)
        return set(self._followers.get(key, ()))
