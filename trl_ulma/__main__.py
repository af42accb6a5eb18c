"""`python -m trl_ulma` is `trl-ulma`."""

from trl_ulma.scripts.cli import main

raise SystemExit(main())
