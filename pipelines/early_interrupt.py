"""Imported first by what is run as a script: Ctrl-C ends it at once, in silence, while its libraries are loaded.

That takes seconds, and a trace from within an import would help nobody. Later `run_script` answers the signal.
"""

import os
import signal

signal.signal(signal.SIGINT, lambda *_: os._exit(130))
