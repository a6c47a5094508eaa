"""What every run imports. The process that runs are forked from imports this module once (`launch.Forked`)."""

import signal

# A Ctrl-C in the terminal must not end this process while it imports; and one that is sent to a fork before that has
# its handler waits until then (`interrupts.remembered`). Set before anything that takes time.
signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
# A fork gets back the handler found here. Were it the ignoring that a shell's background process inherits, the kernel
# would drop there and then what waits.
signal.signal(signal.SIGINT, signal.default_int_handler)

from pedyra.console import quiet_libraries  # noqa: E402

quiet_libraries()

import pedyra.cli  # noqa: E402, F401
import pedyra.report  # noqa: E402, F401
import pedyra.runs.run  # noqa: E402, F401
