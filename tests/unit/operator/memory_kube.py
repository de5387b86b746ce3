"""A stand-in for Kube that keeps objects in memory, with resource versions: for what needs conflicts and lost answers."""

import copy
import itertools

from finetune_operator.kube import ApiError, Object, Resource


class MemoryKube:
    """`unreachable` makes every call fail as a lost API server does; `requests` counts them by verb and kind."""

    def __init__(self) -> None:
        self.objects: dict[tuple[str, str, str], Object] = {}
        self.unreachable = False
        self.requests: list[tuple[str, str]] = []
        self._versions = itertools.count(1)

    async def get(self, resource: Resource, namespace: str, name: str) -> Object | None:
        self._called("get", resource)
        return copy.deepcopy(self.objects.get((resource.kind, namespace, name)))

    async def create(self, resource: Resource, body: Object) -> Object:
        self._called("create", resource)
        key = (resource.kind, body["metadata"].get("namespace", ""), body["metadata"]["name"])
        if key in self.objects:
            raise ApiError("POST", 409, "AlreadyExists", f"{key} exists")
        return self._store(key, body)

    async def replace(self, resource: Resource, body: Object) -> Object:
        self._called("replace", resource)
        key = (resource.kind, body["metadata"].get("namespace", ""), body["metadata"]["name"])
        stored = self.objects.get(key)
        if stored is None:
            raise ApiError("PUT", 404, "NotFound", f"{key} not found")
        if body["metadata"]["resourceVersion"] != stored["metadata"]["resourceVersion"]:
            raise ApiError("PUT", 409, "Conflict", "the object has been modified")
        return self._store(key, body)

    async def patch(self, resource: Resource, namespace: str, name: str, patch: Object) -> Object:
        self._called("patch", resource)
        stored = self.objects.get((resource.kind, namespace, name))
        if stored is None:
            raise ApiError("PATCH", 404, "NotFound", f"{name} not found")
        return self._store((resource.kind, namespace, name), {**stored, **patch})

    def _called(self, verb: str, resource: Resource) -> None:
        self.requests.append((verb, resource.kind))
        if self.unreachable:
            raise ApiError(verb, 0, "ConnectionRefused", "nobody listens")

    def _store(self, key: tuple[str, str, str], body: Object) -> Object:
        stored = copy.deepcopy(body)
        stored["metadata"]["resourceVersion"] = str(next(self._versions))
        self.objects[key] = stored
        return copy.deepcopy(stored)
