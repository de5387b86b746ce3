"""What operator and agent tell each other: the desired set of adapters, and the agent's report.

The desired set is durable in the ConfigMap `<name>-adapters` (key `desired.json`) and comes at once as the answer to
a report, so that a swap need not wait for the kubelet. pydantic and the standard library only.
"""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field
from pydantic.alias_generators import to_camel

State = Literal["Downloading", "WaitingForEngine", "Loading", "Probing", "Ready", "Failed"]


class Wire(BaseModel):
    """Operator and agent are updated one after the other, so each ignores fields that only the other knows."""

    model_config = ConfigDict(frozen=True, extra="ignore", alias_generator=to_camel, populate_by_name=True)


class DesiredAdapter(Wire):
    """One adapter to have loaded. Two of the same name are a canary, or a new digest and the one it replaces."""

    name: str
    digest: str
    uri: str
    #: Its share of the name's requests. 0 keeps it loaded: it answers only while no other of its name can.
    weight: int = 100
    #: Set on a canary: one failure ends the trial of this name. Another try of the same digest is another trial.
    trial: str = ""


class DesiredBase(Wire):
    """The base model: s3://..., or file:///... on a mounted volume."""

    uri: str
    digest: str = ""


class Probe(Wire):
    """How the adapter's effect is proved: mean difference of log probabilities, over each prompt's tokens."""

    prompts: list[str] = Field(default_factory=list)
    min_logprob_delta: float = 0.0


class Desired(Wire):
    """The set to serve. Of two, the one with the higher sequence is newer, whichever way it came."""

    sequence: int
    base_model: DesiredBase
    adapters: list[DesiredAdapter]
    probe: Probe = Probe()

    def names(self) -> tuple[str, ...]:
        """The stable names, in the order of the spec."""
        return tuple(dict.fromkeys(adapter.name for adapter in self.adapters))


class AdapterReport(Wire):
    """Where one desired adapter stands in one pod."""

    name: str
    digest: str
    state: State
    reason: str = ""
    message: str = ""
    #: The trial that this is about, and whether it has failed for good.
    trial: str = ""
    trial_failed: bool = False
    rank: int | None = None
    logprob_delta: float | None = None


class ServedRoute(Wire):
    """One engine name that answers for a stable name now, such as `support-bot@3f9a1c20b7de`."""

    model: str
    weight: int
    trial: str = ""


class AgentReport(Wire):
    """What one pod's agent says of itself; sent every few seconds and whenever something changed."""

    sequence: int = 0
    ready: bool = False
    message: str = ""
    boot: str = ""
    max_lora_rank: int = 0
    adapters: list[AdapterReport] = Field(default_factory=list)
    served: dict[str, list[ServedRoute]] = Field(default_factory=dict)
