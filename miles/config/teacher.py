"""`teacher`: whose log-probabilities the policy is compared with, for distillation."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BeforeValidator

from miles.config.base import ComponentSpec, Flag, Section

DEFAULT = "default"
"""The teacher of prompts that name none."""
POLICY = "policy"
"""In place of a checkpoint: the policy itself, as it is when it is asked."""


def as_named(value: Any) -> Any:
    """Accept one place, or a list of `NAME=PLACE`, where a mapping from names to places is meant."""
    if not isinstance(value, str | list | tuple):
        return {} if value is None else value
    found = {}
    for item in [value] if isinstance(value, str) else value:
        name, equals, place = str(item).partition("=")
        named = equals and not set("/:") & set(name)
        name = name if named else DEFAULT
        if name in found:
            raise ValueError(f"two teachers are called {name!r}: write NAME=PLACE for each")
        found[name] = place if named else item
    return found


Places = Annotated[dict[str, str], BeforeValidator(as_named)]


class TeacherSection(Section):
    load: Annotated[Places, Flag("--opd-teacher-load")] = {}
    """Teachers in the trainer, by name: folder or hub name of a checkpoint with the policy's vocabulary, or `policy`
    for the policy itself. A place without a name is the teacher called `default`."""
    urls: Annotated[Places, Flag("--opd-teacher-urls")] = {}
    """Teachers on servers, by name: `NAME=URL NAME=URL ...`."""
    engine: Annotated[ComponentSpec | None, Flag("--opd-teacher-engine")] = None
    """The rollout engine that speaks to a teacher's server, built for each URL with it as the option `url`; the one
    that provides `scores` when not given."""
    key: Annotated[str, Flag("--opd-teacher-key")] = "opd_teacher"
    """Key in a prompt's metadata that names its teacher; `default` teaches where there is none."""
    prompt_key: Annotated[str | None, Flag("--opd-teacher-prompt-key")] = None
    """Key in a prompt's metadata with what the teacher is told instead of the prompt, as text or messages: a teacher
    that knows more than the pupil, which may be the policy itself."""
