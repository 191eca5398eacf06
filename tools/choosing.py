"""See `evidence.choosing`."""

from evidence.choosing import main

if __name__ == "__main__":
    main()
