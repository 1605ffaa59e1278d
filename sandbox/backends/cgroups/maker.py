"""Making a sandbox's control group with the limits that it is to hold."""

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

from warmcell.sandbox.backends.cgroups import survey
from warmcell.sandbox.backends.cgroups.group import Cgroup, name_for
from warmcell.sandbox.backends.cgroups.scope import Scope
from warmcell.sandbox.models import Limits, LimitStatus, SandboxId


class Cgroups:
    """What this machine lets us cap, found out once."""

    def statuses(self, limits: Limits) -> dict[str, LimitStatus]:
        """What of `limits` a group would hold. Blocks."""
        wanted = {"memory": limits.memory_bytes, "pids": limits.pids, "cpu": limits.cpus}
        return {
            name: LimitStatus(value=value, enforced=name in self._hierarchies, why=self._why.get(name, ""))
            for name, value in wanted.items()
        }

    def describe(self) -> dict[str, str]:
        """One line per controller, for doctor. Blocks."""
        return {
            name: f"enforced (cgroup v{self._hierarchies[name].version})"
            if name in self._hierarchies
            else f"not enforced: {self._why[name]}"
            for name in survey.CONTROLLERS
        }

    def parents(self) -> Sequence[Path]:
        """Directories in which groups of ours may lie. Blocks."""
        return list(dict.fromkeys(hierarchy.parent for hierarchy in self._hierarchies.values()))

    def make(self, sandbox_id: SandboxId, limits: Limits) -> tuple[Cgroup | None, dict[str, LimitStatus]]:
        """A group with these limits, and which of them it holds. None: no group can be made here. Blocks."""
        statuses = self.statuses(limits)
        values = {name: status.value for name, status in statuses.items() if status.enforced}
        if not values:
            return None, statuses
        first = self._hierarchies[next(iter(values))]
        if first.manager:
            return Scope(name_for(sandbox_id), values), statuses
        if first.version == 1:  # There each controller is a group of its own: none where nothing is limited.
            values = {name: value for name, value in values.items() if value is not None}
        directories = {name: self._hierarchies[name].parent / name_for(sandbox_id) for name in values}
        group = Cgroup(directories, first.version)
        try:
            for directory in group.directories:
                directory.mkdir()
            for name, value in values.items():
                if value is not None:
                    group.set(name, value)
        except OSError as error:
            group.remove_now()
            why = f"{error.filename}: {error.strerror}"
            return None, {
                name: LimitStatus(value=status.value, enforced=False, why=why) for name, status in statuses.items()
            }
        return group if values else None, statuses

    @cached_property
    def _survey(self) -> tuple[dict[str, survey.Hierarchy], dict[str, str]]:
        return survey.survey()

    @property
    def _hierarchies(self) -> dict[str, survey.Hierarchy]:
        return self._survey[0]

    @property
    def _why(self) -> dict[str, str]:
        return self._survey[1]
