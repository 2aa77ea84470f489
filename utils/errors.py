"""The one kind of error that is the user's to mend."""

import difflib
import sys
from collections.abc import Iterable


class UserError(Exception):
    """Wrong argument, missing or damaged file: one line that says what is wrong and what mends it.

    `utils.cli.run` prints it to stderr and exits with code 2.
    """

    def _render_traceback_(self) -> list[str]:
        """What Jupyter shows: the line."""
        return [f"{type(self).__name__}: {self}"]


class MissingData(UserError):
    """A data set is not on the machine; the line says how to get it."""


def warn(message: object) -> None:
    """One line on stderr, about what does not stop the work."""
    print(f"warning: {message}", file=sys.stderr)


def check_name(name: str, known: Iterable[str], what: str) -> None:
    """Raises UserError with the closest of the `known` names if `name` is not one of them."""
    folded = {str(k).casefold(): str(k) for k in known}
    if name in folded.values():
        return
    close = difflib.get_close_matches(str(name).casefold(), folded, 1, cutoff=0.6)
    hint = f"did you mean {folded[close[0]]}?" if close else f"known: {', '.join(folded.values())}"
    raise UserError(f"unknown {what} {name}; {hint}")
