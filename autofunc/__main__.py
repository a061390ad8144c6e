"""`python -m autofunc` is the command line.

`python -m` puts the working directory first on the path, where a user's file `einops.py` would hide the installed package
in the workers only. It goes to the end, where `_target_` still finds it.
"""

import sys
from pathlib import Path

if sys.path and sys.path[0] in ("", str(Path.cwd())):
    sys.path.append(sys.path.pop(0))

from autofunc.cli.main import main

main()
