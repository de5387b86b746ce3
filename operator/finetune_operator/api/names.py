"""What an object of ours may be called: its name becomes a label value and, with what we append, that of Jobs, pods and
Services."""

from finetune_operator.api.rules import Rule

LONGEST_NAME = 40

RULES = {
    "FineTune": (
        Rule(
            f"self.metadata.name.size() <= {LONGEST_NAME} && !self.metadata.name.contains('.')",
            f"metadata.name: at most {LONGEST_NAME} characters and no dots, because Jobs and pods are named "
            "after it; choose a shorter name",
        ),
    ),
    "AdapterDeployment": (
        Rule(
            f"self.metadata.name.size() <= {LONGEST_NAME} && "
            "self.metadata.name.matches('^[a-z]([-a-z0-9]*[a-z0-9])?$')",
            f"metadata.name: at most {LONGEST_NAME} characters, no dots and a letter first, because its "
            "Service has the same name; choose another name",
        ),
    ),
}
