"""`python -m grpo_watchdog.cli`."""

import sys

from grpo_watchdog.cli import main

sys.exit(main())
