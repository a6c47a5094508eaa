"""What the process that runs are forked from imports first (`process.Forked`)."""

import signal

# A Ctrl-C in the terminal must not end this process while it imports; and one that is sent to a fork before that has
# its handler waits until then (`interrupts.remembered`). Set before anything that takes time.
signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
# A fork gets back the handler found here. Were it the ignoring that a shell's background process inherits, the kernel
# would drop there and then what waits.
signal.signal(signal.SIGINT, signal.default_int_handler)

from pedyra.app.console import quiet_libraries  # noqa: E402

quiet_libraries()
