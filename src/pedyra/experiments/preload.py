"""What every run imports. The process that runs are forked from imports this module once (`launch.Forked`)."""

from pedyra.console import quiet_libraries

quiet_libraries()

import pedyra.cli  # noqa: E402, F401
import pedyra.report  # noqa: E402, F401
import pedyra.runs.run  # noqa: E402, F401
