"""What --resume 1 goes on from: a file that is replaced at intervals while the work goes on."""

import time
from pathlib import Path

from utils import files
from utils.errors import UserError

SAVE_EVERY = 30.0       # seconds between saved states
FORMAT = "CCU state, version 9"     # also the version of an attack's finished batches (utils/attack_batches.py)


class State:
    """The state of one piece of work: training a network, fitting a mixture, attacking a batch.

    options, plain values, decide the result: a state that was made with others is refused.
    """

    def __init__(self, path: str | Path, options: dict, resume: bool):
        self.path, self.options, self.resume, self.saved = Path(path), options, resume, time.monotonic()

    def due(self) -> bool:
        return time.monotonic() - self.saved > SAVE_EVERY

    def save(self, **values) -> None:
        files.save({"format": FORMAT, "options": self.options, **values}, self.path)
        self.saved = time.monotonic()

    def load(self) -> dict | None:
        """What was saved, with tensors on the CPU; None where nothing was, or where the work is to start anew."""
        if not self.resume or not self.path.exists():
            return None
        state = files.load(self.path, FORMAT, "remove it, or start without --resume")
        for key, value in self.options.items():
            if state["options"].get(key) != value:
                raise UserError(f"{self.path} was made with {key} {state['options'].get(key)}, not {value}: use the "
                                "same options, remove it, or start without --resume")
        return state

    def remove(self) -> None:
        self.path.unlink(missing_ok=True)
