"""See `demo.main`."""

from demo.main import main

if __name__ == "__main__":
    main()
