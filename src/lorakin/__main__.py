"""`python -m lorakin`; `accelerate launch -m lorakin` and `torchrun -m lorakin`."""

from lorakin.cli import main

if __name__ == "__main__":
    main()
