"""What the schema knows and this version cannot do yet: refused by the API server, never silently ignored.

One line per field: the path below spec, and the CEL condition under which it is used. Take a line away when the field
works; nothing else needs to change.
"""

from finetune_operator.api.rules import Rule

NOT_SUPPORTED_YET: dict[str, dict[str, str]] = {
    "FineTune": {},
    "AdapterDeployment": {
        "baseModel.huggingFace": "has(self.baseModel) && has(self.baseModel.huggingFace)",
        "autoscaling": "has(self.autoscaling)",
    },
}


def rules(kind: str) -> list[Rule]:
    """The rules on a kind's spec that refuse what is not supported yet."""
    return [
        Rule(
            f"!({used})",
            f"{path}: not supported yet",
            field=path,
            reason="FieldValueForbidden",
        )
        for path, used in NOT_SUPPORTED_YET.get(kind, {}).items()
    ]
