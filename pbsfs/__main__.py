"""`python -m pbsfs`, and the program `pbsfs`.

Importing takes a tenth of a second and more, in which Ctrl-C has nothing to clean up. The process then ends
by the signal, without a traceback.
"""

import gc
import signal


def main() -> None:
    """Runs the command line, and ends the process with its exit status."""
    handler = signal.getsignal(signal.SIGINT)
    if handler is signal.default_int_handler:  # not if a shell has it ignored
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    gc.disable()  # importing leaves no garbage, and to look for it takes a twentieth of a short command
    from pbsfs.cli import main as run  # noqa: PLC0415 - see above

    gc.enable()
    signal.signal(signal.SIGINT, handler)
    run()


if __name__ == "__main__":
    main()
