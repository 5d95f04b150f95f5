"""`python -m sis_lightning` is `sis-lightning`."""

import sys

from sis_lightning.commands.main import main

sys.exit(main())
