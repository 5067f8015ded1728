"""`python -m mmrdpm` is the command line."""

import sys


def run() -> int:
    """The command line; Ctrl-C while it is still being read ends it too."""
    try:
        from mmrdpm.cli import main

        return main()
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(run())
