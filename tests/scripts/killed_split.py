"""Split a store and end without any clean-up before, between or after the renames: killed_split.py STORE MOMENT"""

import os
import sys

from protloc.data import resplit
from protloc.data.store import ImageStore

exchange = resplit._exchange


def before(new, path, aside):
    os._exit(9)


def between(new, path, aside):
    os.rename(path, aside)
    os._exit(9)


def after(new, path, aside):
    exchange(new, path, aside)
    os._exit(9)


store, moment = sys.argv[1:]
resplit._exchange = dict(before=before, between=between, after=after)[moment]
resplit.split_store(ImageStore(store))
