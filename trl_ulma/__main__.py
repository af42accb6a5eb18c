"""`python -m trl_ulma` runs `trl-ulma`."""

from trl_ulma.scripts.cli import main

raise SystemExit(main())
