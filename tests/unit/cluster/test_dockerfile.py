"""What a Dockerfile's stage depends on."""

import pytest

from e2e.cluster.dockerfile import stage

DOCKERFILE = """\
# A comment with COPY secrets /
ARG BASE_IMAGE=python
FROM ${BASE_IMAGE} AS first
COPY --chown=1:1 a b \\
     c /target/
FROM first AS second
COPY --from=first /x /y
ADD d /
"""


def test_sources_are_what_the_instructions_copy_from_the_context() -> None:
    assert stage(DOCKERFILE).sources == ("a", "b", "c", "d")


def test_a_target_ends_where_the_next_stage_begins() -> None:
    first = stage(DOCKERFILE, "first")
    assert first.sources == ("a", "b", "c")
    assert "second" not in first.text


def test_comments_do_not_count() -> None:
    assert stage(DOCKERFILE).text == stage(DOCKERFILE.replace("# A comment", "# Another one")).text


def test_an_unknown_target_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match="no stage third"):
        stage(DOCKERFILE, "third")
