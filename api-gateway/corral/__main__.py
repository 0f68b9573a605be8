"""``python -m corral`` is the ``corral`` command."""

try:
    from corral.cli.main import main
except KeyboardInterrupt:  # Ctrl-C in its first moments
    raise SystemExit("corral: interrupted") from None

if __name__ == "__main__":
    main()
