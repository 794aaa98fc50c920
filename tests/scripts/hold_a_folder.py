"Holds the folder of a training until its input ends"

import sys

from protloc.training import hold_folder

with hold_folder(sys.argv[1]):
    print('held', flush=True)
    sys.stdin.read()
