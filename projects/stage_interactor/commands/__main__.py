"""``python -m stage_interactor.commands`` is ``stage-interactor``."""

import sys

from . import main

sys.exit(main())
