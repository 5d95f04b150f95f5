"""`python -m sis_lightning` is `sis-lightning`."""

import sys

from sis_lightning.cli import main

sys.exit(main())
