"""How it is run: data, training, attack, evaluation, files, command line."""

from utils.checkpoints import load_model, save_model

__all__ = ["load_model", "save_model"]
