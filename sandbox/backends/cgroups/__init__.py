"""Caps on memory, processes and processor time, by the kernel's control groups.

Version 2 where our own part of the tree can be written (by root, or by a user to whom systemd delegates one), else in a
scope that the user's service manager makes; version 1 as root where only that can be written. Where nothing can, a
limit is reported as not enforced, with the cure.
"""

from warmcell.sandbox.backends.cgroups.group import Cgroup, leftovers
from warmcell.sandbox.backends.cgroups.maker import Cgroups
from warmcell.sandbox.backends.cgroups.survey import CONTROLLERS

__all__ = ["CONTROLLERS", "Cgroup", "Cgroups", "leftovers"]
