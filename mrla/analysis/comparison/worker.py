"""One run of a comparison in its process: ``python -m mrla.analysis.comparison.worker RECIPE FOLDER [PLUGIN...]``."""

import json
import os
import signal
import sys
import threading
from pathlib import Path

from mrla.files.atomic_write import NotWrittenError
from mrla.train.recipe import from_dict


def main() -> int:
    """Trains one recipe; the last line on standard error says why, if it fails."""
    recipe_file, folder, *plugins = sys.argv[1:]
    threading.Thread(target=_leave_with_parent, daemon=True).start()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's, which ends this process
    from mrla.train.fitting import train
    from mrla.train.plugins import load_plugins

    try:
        load_plugins(plugins)
        train(from_dict(json.loads(Path(recipe_file).read_text())), folder, progress=False)
    except (ValueError, NotWrittenError) as error:
        print(error.strerror if isinstance(error, NotWrittenError) else error, file=sys.stderr)
        return 2
    return 0


def _leave_with_parent() -> None:
    # The parent holds the other end of standard input. When it is gone, so must this run be: a restarted comparison
    # goes on in the same folder.
    while os.read(0, 1):  # not sys.stdin, whose lock a waiting thread would hold when the interpreter ends
        pass
    os._exit(1)


if __name__ == "__main__":
    sys.exit(main())
