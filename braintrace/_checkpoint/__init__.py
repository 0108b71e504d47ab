"""A run as named arrays, in a file or a dictionary: what it needs to go on, and what has to fit when it does."""

from .dicts import load_state_dict, state_dict
from .files import load, save

__all__ = ["load", "load_state_dict", "save", "state_dict"]
