"""The journal: finished groups on disk, a line each, so that a process that was killed need not
generate them again.
"""

from __future__ import annotations

from typing import NamedTuple

from megatron_efr.durable import LineFile, checked
from megatron_efr.errors import UserError
from megatron_efr.rollout.group_json import decode_group, encode_group
from megatron_efr.types import Group


class JournalError(UserError):
    """A journal that is damaged. The message says where, and what would be right."""


class JournalContents(NamedTuple):
    """A journal's content: groups as they finished, and the number of torn last lines (0, 1)."""

    groups: list[Group]
    torn: int


class Journal(LineFile):
    """Finished groups that an iteration may take, one JSON line each, so that they are not
    generated again.
    """

    def append(self, group: Group) -> None:
        """Add one finished group. A torn line left by a crash is cut off first. UnwritableError
        leaves it out whole.
        """
        self.add(encode_group(group))

    def read(self) -> JournalContents:
        """The finished groups. JournalError if a line other than the last is damaged: that is no
        torn write; or if a group was asked for by a script that is not known here.
        """
        whole, torn = self.lines()
        groups: list[Group] = []
        for number, line in enumerate(whole, start=1):
            try:
                groups.append(decode_group(checked(line)))
            except UserError as error:
                raise JournalError(
                    f"{self.path}:{number}: a group that this version does not know: {error}. Go "
                    "on with the version that wrote it, or delete the file to generate its "
                    "responses again"
                ) from error
            except (ValueError, KeyError, TypeError) as error:
                raise JournalError(
                    f"{self.path}:{number}: not a finished group ({error}); the file is damaged "
                    "beyond a torn last line. Delete it to generate these responses again"
                ) from error
        return JournalContents(groups, torn)
