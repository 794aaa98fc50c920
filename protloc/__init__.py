__version__ = "0.3.0.dev0"

from .threads import choose_waiting

choose_waiting()
