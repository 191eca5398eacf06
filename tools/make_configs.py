"""See `evidence.make_configs`."""

from evidence.make_configs import main

if __name__ == "__main__":
    main()
