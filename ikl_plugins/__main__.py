"""``python -m ikl_plugins``, the same as the console command ``ikl``."""

from .commands.main import main

if __name__ == "__main__":
    main()
